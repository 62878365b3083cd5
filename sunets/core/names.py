"""Names that become paths, and the directories that the pipeline writes."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from pathlib import Path

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$"
"""Pattern of keys in `params.yaml` that become file names, DVC targets and shell words."""
PREPARED = Path("data/prepared")
"""Where `prepare` writes, below the root of the checkout: one directory per benchmark."""
OUTPUTS = (PREPARED, Path("outputs"), Path("results"), Path(".work"))
"""Directories of the checkout whose content the pipeline replaces and deletes."""
_LONGEST = 240
"""Most bytes of a name: file systems take 255, and a suffix follows."""


def check_name(name: str) -> str:
    """Return a key that is safe as a file name, a DVC target and a shell word.

    Raises:
        ValueError: says which key and what is allowed.
    """
    if not re.fullmatch(NAME.strip("^$"), name):
        shown = printable(name) if len(name) <= 70 else f"{printable(name[:70])}..."
        raise ValueError(f"the name {shown!r}: use letters, digits, _ and -, at most 64, not starting with -")
    return name


def name_fault(name: str) -> str | None:
    """What keeps a text from being the name of a file in a directory; None where nothing does."""
    if not name or name in (".", ".."):
        return "it is no file name"
    if "/" in name or "\\" in name:
        return "a name has no / or \\"
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            os.fsencode(name).decode("utf-8")
            return "its name cannot be read in this locale; set PYTHONUTF8=1"
        return "its name is not UTF-8"
    if has_control(name):
        return "its name has control characters"
    if length > _LONGEST:
        return f"its name has {length} bytes; at most {_LONGEST} are allowed"
    return None


def has_control(text: str) -> bool:
    """Whether a text holds control characters or ends a line."""
    return any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)


def child(directory: Path, name: str, suffix: str = "") -> Path:
    """Path of a file by its name, always directly inside the directory.

    Raises:
        ValueError: the name would lead elsewhere, or no file can have it; says why.
    """
    fault = name_fault(name)
    if fault:
        raise ValueError(f"{printable(name)!r}: {fault}; rename it")
    return directory / f"{name}{suffix}"


def printable(text: str | Path) -> str:
    r"""Escape what a line of a message cannot show: line ends, control codes, bytes that are not UTF-8 (caf\udce9)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def overlap(path: str | Path, checkout: Path = Path()) -> str | None:
    """Why a directory cannot hold a user's data: it is, holds or lies in one that the pipeline deletes.

    Links are followed.

    Returns:
        The fault with its remedy, or None.
    """
    place = Path(path).resolve()
    for name in OUTPUTS:
        output = (checkout / name).resolve()
        if place == output:
            relation = "is"
        elif place.is_relative_to(output):
            relation = "lies in"
        elif output.is_relative_to(place):
            relation = "holds"
        else:
            continue
        return (
            f"{printable(path)} {relation} {name.as_posix()}/ of the checkout, whose content the pipeline deletes; "
            "keep the data set elsewhere, such as datasets/NAME"
        )
    return None

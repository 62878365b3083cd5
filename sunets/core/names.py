"""Names that become paths, and the output directories of the pipeline."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from pathlib import Path

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$"
"""Pattern of keys in `params.yaml` that become file names, DVC targets and shell words."""
PREPARED = Path("data/prepared")
"""Output directory of `prepare`, relative to the checkout: one subdirectory per benchmark."""
OUTPUTS = (PREPARED, Path("outputs"), Path("results"), Path(".work"))
"""Directories of the checkout whose content the pipeline deletes and replaces."""
_LONGEST = 240
"""Maximum bytes of a name: file systems allow 255, and a suffix is appended."""


def check_name(name: str) -> str:
    """Return a key if it is safe as a file name, a DVC target and a shell word.

    Raises:
        ValueError: names the key and what is allowed.
    """
    if not re.fullmatch(NAME.strip("^$"), name):
        shown = printable(name) if len(name) <= 70 else f"{printable(name[:70])}..."
        raise ValueError(f"the name {shown!r}: use letters, digits, _ and -, at most 64, not starting with -")
    return name


def name_fault(name: str) -> str | None:
    """Say why a text cannot be a file name; None if it can."""
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
    """Return whether a text contains control characters or line breaks."""
    return any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)


def child(directory: Path, name: str, suffix: str = "") -> Path:
    """Return the path of a file directly inside the directory.

    Raises:
        ValueError: the name is no file name, or points outside the directory; says why.
    """
    if fault := name_fault(name):
        raise ValueError(f"{printable(name)!r}: {fault}; rename it")
    return directory / f"{name}{suffix}"


def printable(text: str | Path) -> str:
    r"""Escape line breaks, control characters and bytes that are not UTF-8 (caf\udce9) for a one-line message."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def overlap(path: str | Path, checkout: Path = Path()) -> str | None:
    """Say why a directory cannot hold a user's data: it overlaps one that the pipeline deletes. Links are followed.

    Returns:
        The fault and the remedy, or None.
    """
    resolved = Path(path).resolve()
    for name in OUTPUTS:
        output = (checkout / name).resolve()
        if resolved == output:
            relation = "is"
        elif resolved.is_relative_to(output):
            relation = "lies in"
        elif output.is_relative_to(resolved):
            relation = "contains"
        else:
            continue
        return (
            f"{printable(path)} {relation} {name.as_posix()}/ of the checkout, whose content the pipeline deletes; "
            "keep the data set elsewhere, such as datasets/NAME"
        )
    return None

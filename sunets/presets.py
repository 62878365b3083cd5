"""The files of presets/, and putting one in place of params.yaml."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

from sunets.core.names import overlap, printable
from sunets.core.record import replacing, write_text

PARAMS = Path("params.yaml")
PRESETS = Path("presets")


def preset_path(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        ValueError: no such preset; names those there are.
    """
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml"))) or "none here"
        raise ValueError(f"{printable(name)}: no such preset; there are {there}")
    return path


def list_presets() -> dict[str, str]:
    """Return what each preset says of itself in its first line, by name."""
    there = sorted(PRESETS.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in there}


def use_preset(name: str, root: Path | None = None) -> Path | None:
    """Put a preset in place of params.yaml; what stood there is kept where no commit and no preset has it.

    Args:
        name: of the preset.
        root: directory that holds the data set, in place of the preset's own.

    Returns:
        The copy of the old params.yaml, if one was made.

    Raises:
        FileNotFoundError: no directory `root`.
        ValueError: no such preset, or a `root` that cannot be used.
    """
    text = preset_path(name).read_text(encoding="utf-8")
    if root is not None:
        text = _with_root(text, name, root)
    copy = _keep() if PARAMS.exists() else None
    write_text(PARAMS, text)
    return copy


def _with_root(text: str, name: str, root: Path) -> str:
    if not root.is_dir():
        raise FileNotFoundError(f"--root {printable(root)}: no such directory")
    if fault := overlap(root):
        raise ValueError(f"--root: {fault}")
    place = str(root.resolve())
    try:
        place.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--root {printable(root)}: its path is not UTF-8; rename it") from None
    # JSON's escapes are YAML's too, which wants these characters escaped as well.
    quoted = json.dumps(place, ensure_ascii=False)
    value = re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff]", lambda c: f"\\u{ord(c[0]):04x}", quoted)
    text, count = re.subn(r"(?m)^  root: .*$", lambda _: f"  root: {value}", text)
    if count != 1:
        raise ValueError(f"--root: the preset {name} has embedded data and takes no directory")
    return text


def _keep() -> Path | None:
    """Copy params.yaml beside itself, unless a preset or a commit holds the same bytes."""
    content = PARAMS.read_bytes()
    if any(path.read_bytes() == content for path in PRESETS.glob("*.yaml")) or _is_committed():
        return None
    copy = PARAMS.with_name(f"{PARAMS.name}.kept-{hashlib.sha256(content).hexdigest()[:8]}")
    with replacing(copy) as temporary:
        temporary.write_bytes(content)
    return copy


def _is_committed() -> bool:
    """Whether a commit of this repository holds params.yaml as it is; no where git cannot tell."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, timeout=60, check=True).stdout.decode().strip()

    try:
        blob = git("hash-object", "--", str(PARAMS))
        return bool(git("log", "--all", "-1", "--format=%H", f"--find-object={blob}", "--", str(PARAMS)))
    except (OSError, subprocess.SubprocessError):
        return False

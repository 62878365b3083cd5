"""The files of presets/, and their use as params.yaml."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import statistics
import subprocess
from pathlib import Path

from sunets.core.names import overlap, printable
from sunets.core.record import replacing, write_text

PARAMS = Path("params.yaml")
PRESETS = Path("presets")
SIDE_MULTIPLE = 16
"""Both sides of the images of a user's data are multiples of this number of pixels, the networks' deepest stride."""
IMAGES_LOOKED_AT = 20


def preset_path(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        ValueError: no such preset; lists the available ones.
        OSError: the directory cannot be read.
    """
    presets = {path.stem: path for path in _files()}
    if name not in presets:
        names = ", ".join(presets) or "none in this directory"
        raise ValueError(f"{printable(name)}: no such preset; there are {names}")
    return presets[name]


def list_presets() -> dict[str, str]:
    """Return the first line of each preset, which describes it, by name."""
    return {path.stem: path.read_bytes().partition(b"\n")[0].decode(errors="replace").lstrip("# ") for path in _files()}


def _files() -> list[Path]:
    files = PRESETS.iterdir() if PRESETS.is_dir() else ()  # unlike glob, names a directory that cannot be read
    return sorted(path for path in files if path.suffix == ".yaml" and path.is_file())  # a FIFO would be waited for


def use_preset(name: str, root: Path | None = None) -> tuple[Path | None, tuple[int, int] | None]:
    """Replace params.yaml with a preset; copy it first if neither a commit nor a preset has its content.

    The preset for a user's data gets the aspect ratio of its images.

    Args:
        name: name of the preset.
        root: directory of the data set, instead of the preset's.

    Returns:
        The copy of the old params.yaml, if one was made; and (height, width) in pixels that took the place of the
        preset's `data.size`, for another aspect ratio.

    Raises:
        FileNotFoundError: no such directory `root`.
        ValueError: no such preset, one that is not UTF-8, an unusable `root`, or a params.yaml that is not a file.
    """
    path = preset_path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    path_of_data = None if root is None else _quoted(root)
    text, size = _with_aspect_ratio(text, root)  # before the path, which may look like a size
    if path_of_data is not None:
        text, count = re.subn(r"(?m)^  root: .*$", lambda _: f"  root: {path_of_data}", text)
        if count != 1:
            raise ValueError(f"--root: the preset {name} has embedded data and takes no directory")
    if PARAMS.exists() and not PARAMS.is_file():
        raise ValueError(f"{PARAMS}: not a regular file; move it away")
    copy = _keep() if PARAMS.exists() else None
    write_text(PARAMS, text)
    return copy, size


def _quoted(root: Path) -> str:
    """Return the absolute path of a usable directory as a YAML string."""
    if not root.is_dir():
        raise FileNotFoundError(f"--root {printable(root)}: no such directory")
    if fault := overlap(root):
        raise ValueError(f"--root: {fault}")
    path = str(root.resolve())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--root {printable(root)}: its path is not UTF-8; rename it") from None
    # JSON's escapes are valid in YAML, which requires these characters to be escaped too.
    quoted = json.dumps(path, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff]", lambda c: f"\\u{ord(c[0]):04x}", quoted)


def _with_aspect_ratio(text: str, root: Path | None) -> tuple[str, tuple[int, int] | None]:
    """Set `data.size` to the median aspect ratio of a user's images, with about the preset's pixels or fewer."""
    folder = re.search(r"(?ms)^data:\n  name: folder\n  root: (\S+)\n  size: (\[(\d+), (\d+)\])\n", text)
    shapes = _shapes(Path(root or folder[1]) / "images") if folder else []
    if not folder or not shapes:
        return text, None
    aspect = statistics.median(width / height for height, width in shapes)
    pixels = min(int(folder[3]) * int(folder[4]), statistics.median(math.prod(shape) for shape in shapes))
    sides = math.sqrt(pixels / aspect), math.sqrt(pixels * aspect)
    height, width = (max(SIDE_MULTIPLE * round(side / SIDE_MULTIPLE), 2 * SIDE_MULTIPLE) for side in sides)
    size = f"[{height}, {width}]"
    return text.replace(folder[2], size), (height, width) if size != folder[2] else None


def _shapes(directory: Path) -> list[tuple[int, int]]:
    """Return (height, width) of some images, spread over a directory; `prepare` names those that cannot be read."""
    from sunets.data.picture import DataError, read_picture
    from sunets.data.raw_dataset import RawDataset

    shapes = []
    with contextlib.suppress(DataError):
        images = RawDataset(directory.parent).image_files(directory)
        for image in images[:: math.ceil(len(images) / IMAGES_LOOKED_AT) or 1]:
            with contextlib.suppress(DataError):
                height, width, _ = read_picture(image).shape
                shapes.append((height, width))
    return shapes


def _keep() -> Path | None:
    """Copy params.yaml beside itself, unless a preset or a commit has the same content."""
    content = PARAMS.read_bytes()
    if any(path.read_bytes() == content for path in _files()) or _is_committed():
        return None
    copy = PARAMS.with_name(f"{PARAMS.name}.kept-{hashlib.sha256(content).hexdigest()[:8]}")
    with replacing(copy) as temporary:
        temporary.write_bytes(content)
    return copy


def _is_committed() -> bool:
    """Return whether a commit of this repository has params.yaml as it is; false if git cannot tell."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, timeout=60, check=True).stdout.decode().strip()

    try:
        blob = git("hash-object", "--", str(PARAMS))
        return bool(git("log", "--all", "-1", "--format=%H", f"--find-object={blob}", "--", str(PARAMS)))
    except (OSError, subprocess.SubprocessError):
        return False

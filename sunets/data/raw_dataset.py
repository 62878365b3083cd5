"""What a data set's own files say: which images there are, their masks or classes, and what was left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sunets.core.config import IGNORE_INDEX, DataConfig
from sunets.core.names import child, has_control, name_fault
from sunets.data.picture import DataError, open_regular, read_mask

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".pgm", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Files that count as images, by suffix in lower case."""
_LEFT_BY_SYSTEMS = ("Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir")

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Entry:
    """An image that a data set's own files name; not looked at yet."""

    id: str
    image: Path
    target: Path | int | None


def read_labels(entry: Entry) -> np.ndarray:
    """The labels of a mask file as it stores them."""
    assert isinstance(entry.target, Path)
    return read_mask(entry.target)


def is_left_by_system(name: str) -> bool:
    """Whether a file is hidden or one that an operating system leaves behind, such as ._name.png of a Mac."""
    return name.startswith(".") or name in _LEFT_BY_SYSTEMS


@dataclass
class RawDataset:
    """What a data set module finds: entries to check, and how their labels are read."""

    root: Path
    """Directory that the paths of the data set begin with."""
    classes: Sequence[str] = ()
    palette: Sequence[Color] = ()
    splits: dict[str, list[Entry]] = field(default_factory=dict)
    """The splits that the configuration uses."""
    label_map: Mapping[int, int] | None = None
    """Stored label -> 0..K-1 or 255. None: labels are stored so."""
    read_labels: Callable[[Entry], np.ndarray | None] = read_labels
    """Labels of an entry before `label_map`; None drops the entry from its split."""
    may_overlap: frozenset[frozenset[str]] = frozenset()
    """Pairs of splits where one contains the other by definition: a warning instead of a fault."""
    overlap_is_published: bool = False
    """Equal images in two splits belong to the data set as published: a warning instead of a fault."""
    ignores_by_hand: bool = False
    """Whether 255 in a mask is the user's own word, and not part of a published data set."""
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    files: dict[Path, None] = field(default_factory=dict)
    """Lists and directories that decided what belongs to the data set."""
    hidden: int = 0
    """Hidden files and files of operating systems that were skipped."""
    _left_out: dict[str, Counter[str]] = field(default_factory=dict)

    def labels(self) -> dict[int, int]:
        """Every stored label that is allowed, and what becomes of it."""
        return dict(self.label_map or {k: k for k in [*range(len(self.classes)), IGNORE_INDEX]})

    def entries_of(self, directory: Path) -> list[os.DirEntry[str]]:
        """What a directory holds, by name, without hidden files; the directory is remembered."""
        self.files[directory] = None
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda e: e.name)
        kept = [e for e in entries if not is_left_by_system(e.name)]
        self.hidden += len(entries) - len(kept)
        return kept

    def images(self, directory: Path, group: Path | None = None) -> list[Path]:
        """The image files of a directory, by name; what else lies there is counted for a warning.

        Args:
            directory: where to look, not below it.
            group: directory that the warning speaks of, for one warning over several directories.
        """
        left_out = self._left_out.setdefault(self.shown(group or directory), Counter())
        found = []
        for entry in self.entries_of(directory):
            path = directory / entry.name
            if entry.is_dir():
                inside = sum(not is_left_by_system(n) for _, _, names in os.walk(path) for n in names)
                left_out["in directories below"] += inside
            elif path.suffix.lower() not in IMAGE_SUFFIXES:
                left_out[f"with suffix {path.suffix}" if path.suffix else "without suffix"] += 1
            elif fault := name_fault(entry.name):
                self.faults.append(f"{path}: {fault}; rename it")
            else:
                found.append(path)
        return found

    def named_files(self, directories: Sequence[Path], suffix: str) -> list[Path]:
        """The files whose names end so, directory by directory; others belong to the data set as published."""
        found = []
        for directory in directories:
            names = [e.name for e in self.entries_of(directory) if e.name.endswith(suffix)]
            found += [directory / name for name in self.named(directory, names)]
        return found

    def left_out(self) -> list[str]:
        """One warning for each place where files were left out."""
        return [
            f"{place}: {sum(kinds.values())} files left out, which are no images of the data set: "
            + ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
            for place, kinds in self._left_out.items()
            if sum(kinds.values())
        ]

    def lines(self, path: Path) -> list[str]:
        """The lines of a text file that are not blank, without surrounding space; the file is remembered.

        Raises:
            DataError: there is no such file, or it is no text in UTF-8.
        """
        self.files[path] = None
        if not path.exists():
            raise DataError(f"{path}: no such file; extract the archive again, or add it")
        try:
            with open_regular(path) as file:
                text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: no text in UTF-8 (byte {error.start}); save it as UTF-8") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        unfit = [line for line in lines if has_control(line)]
        if unfit:
            raise DataError(f"{path}: {unfit[0]!r} has control characters; write the line again")
        return lines

    def named(self, path: Path, names: Sequence[str]) -> list[str]:
        """The names of a list that can be file names; the others become faults of the list's file."""
        faults = {name: fault for name in names if (fault := name_fault(name))}
        self.faults += [f"{path}: names {n!r}: {f}; remove it" for n, f in faults.items()]
        return [name for name in names if name not in faults]

    def shown(self, path: Path) -> str:
        """A path in a warning, which does not depend on where the data set lies."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def pair(self, images: Path, masks: Path) -> list[Entry]:
        """The images of a directory with the masks of the same stem in another, by stem.

        A file without a partner, or with two, is a fault.
        """

        def by_stem(directory: Path) -> dict[str, Path]:
            found: dict[str, Path] = {}
            for path in self.images(directory):
                if path.stem in found:
                    self.faults.append(f"{path}: the same stem as {found[path.stem].name}; remove one of them")
                found[path.stem] = path
            return found

        left, right = by_stem(images), by_stem(masks)
        self.faults += [
            f"{left[s]}: no mask {masks / s}.png; add it or remove the image"
            for s in sorted(left.keys() - right.keys())
        ]
        self.faults += [
            f"{right[s]}: no image of this stem in {images}; add it or remove the mask"
            for s in sorted(right.keys() - left.keys())
        ]
        return [Entry(s, left[s], right[s]) for s in sorted(left.keys() & right.keys())]


def used_splits(config: DataConfig) -> list[str]:
    """The splits a configuration names, training first, each once."""
    return list(dict.fromkeys([config.train_split, config.val_split, config.test_split]))


def split_path(directory: Path, split: str, suffix: str = "") -> Path:
    """A split's file or directory.

    Raises:
        DataError: the split's name would lead elsewhere.
    """
    try:
        return child(directory, split, suffix)
    except ValueError as error:
        raise DataError(f"split {error}, or change data.*_split") from None


def existing_root(config: DataConfig) -> Path:
    """The data set's directory.

    Raises:
        DataError: there is none.
    """
    root = Path(config.root or "")
    if not config.root or not root.is_dir():
        raise DataError(f"data.root: no directory {root}; put the data set {config.name!r} there, or change it")
    return root


def color_map(count: int) -> list[Color]:
    """The first `count` colours of PASCAL VOC's colour map: the bits of a label spread over red, green and blue."""
    colors = []
    for label in range(count):
        red, green, blue = (
            sum(((label >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
        )
        colors.append((red, green, blue))
    return colors

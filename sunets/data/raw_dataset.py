"""The files of a data set as it comes: which images there are, their masks or classes, and what was left out."""

from __future__ import annotations

import os
import unicodedata
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
"""Suffixes of image files, in lower case."""
_SYSTEM_FILES = ("Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir")

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Entry:
    """An image that a data set lists, not yet opened."""

    id: str
    image: Path
    target: Path | int | None


def read_labels(entry: Entry) -> np.ndarray:
    """Read the labels of a mask file as stored."""
    assert isinstance(entry.target, Path)
    return read_mask(entry.target)


def is_hidden(name: str) -> bool:
    """Return whether a file is hidden, or left behind by an operating system, such as ._name.png by macOS."""
    return name.startswith(".") or name in _SYSTEM_FILES


@dataclass
class RawDataset:
    """The entries of a data set, to be checked by `prepare`, and how to read their labels."""

    root: Path
    """Directory of the data set."""
    classes: Sequence[str] = ()
    palette: Sequence[Color] = ()
    splits: dict[str, list[Entry]] = field(default_factory=dict)
    """The splits that the configuration uses."""
    label_map: Mapping[int, int] | None = None
    """Stored label -> 0..K-1 or 255. None: the identity."""
    read_labels: Callable[[Entry], np.ndarray | None] = read_labels
    """Labels of an entry before `label_map`; None drops the entry from its split."""
    may_overlap: frozenset[frozenset[str]] = frozenset()
    """Pairs of splits of which one contains the other by definition: a warning instead of a fault."""
    overlap_is_published: bool = False
    """Whether the data set as published has equal images in two splits: a warning instead of a fault."""
    ignored_by_user: bool = False
    """Whether the user wrote the 255 in the masks; elsewhere it belongs to the data set as published."""
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    files: dict[Path, None] = field(default_factory=dict)
    """Lists and directories that decide what belongs to the data set."""
    hidden: int = 0
    """Number of hidden files that were skipped."""
    _left_out: dict[str, Counter[str]] = field(default_factory=dict)

    def compare_count(self, split: str, count: int, published: Mapping[str, int]) -> None:
        """Warn of a split with another number of images than published: an archive may not be whole."""
        if count != published.get(split, count):
            self.warnings.append(f"split {split!r}: {count} images, published are {published[split]}")

    def allowed_labels(self) -> dict[int, int]:
        """Return stored label -> label for every label that a mask may hold."""
        return dict(self.label_map or {k: k for k in [*range(len(self.classes)), IGNORE_INDEX]})

    def list_directory(self, directory: Path) -> list[os.DirEntry[str]]:
        """List a directory by name, without hidden files, and record it in `files`.

        Raises:
            DataError: it is not a directory, or cannot be read.
        """
        self.files[directory] = None
        try:
            with os.scandir(directory) as scan:
                entries = sorted(scan, key=lambda e: e.name)
        except OSError as error:
            raise DataError(f"{directory}: cannot be listed ({error.strerror}); make it a readable directory") from None
        visible = [e for e in entries if not is_hidden(e.name)]
        self.hidden += len(entries) - len(visible)
        return visible

    def image_files(self, directory: Path, group: Path | None = None) -> list[Path]:
        """List the image files of a directory by name; count all others for a warning.

        Args:
            directory: searched without its subdirectories.
            group: directory that the warning names, to have one warning for several directories.
        """
        left_out = self._left_out.setdefault(self._relative(group or directory), Counter())
        images = []
        for entry in self.list_directory(directory):
            path = directory / entry.name
            if path.is_dir() if entry.is_symlink() else entry.is_dir():  # `DirEntry` fails on a loop of links
                left_out["in subdirectories"] += sum(not is_hidden(n) for _, _, names in os.walk(path) for n in names)
            elif path.suffix.lower() not in IMAGE_SUFFIXES:
                left_out[f"with suffix {path.suffix}" if path.suffix else "without suffix"] += 1
            elif fault := name_fault(entry.name):
                self.faults.append(f"{path}: {fault}; rename it")
            else:
                images.append(path)
        return images

    def files_ending(self, directories: Sequence[Path], suffix: str) -> list[Path]:
        """List the files with this end of the name; others belong to the data set as published, and are not counted."""
        files = []
        for directory in directories:
            names = [e.name for e in self.list_directory(directory) if e.name.endswith(suffix)]
            files += [directory / name for name in self.valid_names(directory, names)]
        return files

    def left_out_warnings(self) -> list[str]:
        """Return one warning per directory in which files were left out."""
        return [
            f"{directory}: {counts.total()} files left out, which are no images of the data set: "
            + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            for directory, counts in self._left_out.items()
            if counts.total()
        ]

    def read_lines(self, path: Path, *, numbered: bool = False) -> list[str]:
        """Read the non-blank lines of a text file, stripped, and record it in `files`.

        Args:
            path: the file.
            numbered: whether the numbers of the lines matter, so that only its end may be blank.

        Raises:
            DataError: the file does not exist, is not UTF-8 text, or has a blank line before another one.
        """
        self.files[path] = None
        if not path.exists():
            raise DataError(f"{path}: no such file; extract the archive again, or add it")
        try:
            with open_regular(path) as file:
                text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        lines = [line.strip() for line in text.rstrip().splitlines()]
        if numbered and "" in lines:
            raise DataError(
                f"{path}: line {lines.index('') + 1} is blank, and the lines are counted; remove it, or write the name "
                "that belongs there"
            )
        lines = [line for line in lines if line]
        if control := next((line for line in lines if has_control(line)), None):
            raise DataError(f"{path}: {control!r} has control characters; write the line again")
        return lines

    def valid_names(self, path: Path, names: Sequence[str]) -> list[str]:
        """Return the names that can be file names; the others become faults of `path`, which lists them."""
        faults = {name: fault for name in names if (fault := name_fault(name))}
        self.faults += [f"{path}: names {n!r}: {f}; remove it" for n, f in faults.items()]
        return [name for name in names if name not in faults]

    def by_stem(self, directory: Path, *, group: Path | None = None) -> dict[str, Path]:
        """Map stem -> file of `image_files`; two of one stem are a fault.

        Stems are composed (NFC): a Mac may store `é` as two characters, which no list that was typed has.
        """
        files: dict[str, Path] = {}
        for path in self.image_files(directory, group=group):
            if other := files.get(stem := composed(path.stem)):
                self.faults.append(f"{path}: the same stem as {other.name}; remove or rename one of them")
            files[stem] = path
        return files

    def pair(self, images: Path, masks: Path) -> list[Entry]:
        """Pair the images of a directory with the masks of the same stem in another, sorted by stem.

        A file without a partner, or with two, is a fault.
        """
        image, mask = self.by_stem(images), self.by_stem(masks)
        self.faults += [
            f"{image[s]}: no mask {masks / s}.png; add it or remove the image"
            for s in sorted(image.keys() - mask.keys())
        ]
        self.faults += [
            f"{mask[s]}: no image of this stem in {images}; add it or remove the mask"
            for s in sorted(mask.keys() - image.keys())
        ]
        return [Entry(image[s].stem, image[s], mask[s]) for s in sorted(image.keys() & mask.keys())]

    def _relative(self, path: Path) -> str:
        """Return a path for a warning, which must not depend on where the data set is stored."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)


def composed(name: str) -> str:
    """Return a name with composed characters, as most keyboards type them."""
    return unicodedata.normalize("NFC", name)


def used_splits(config: DataConfig) -> list[str]:
    """Return the splits that a configuration uses, training first, without repetition."""
    return list(dict.fromkeys([config.train_split, config.val_split, config.test_split]))


def split_path(directory: Path, split: str, suffix: str = "") -> Path:
    """Return the path of a split's file or directory.

    Raises:
        DataError: the path would lie outside the directory.
    """
    try:
        return child(directory, split, suffix)
    except ValueError as error:
        raise DataError(f"split {error}, or change data.*_split") from None


def existing_root(config: DataConfig) -> Path:
    """Return the data set's directory.

    Raises:
        DataError: it does not exist.
    """
    root = Path(config.root or "")
    if not config.root or not root.is_dir():
        raise DataError(f"data.root: no directory {root}; put the data set {config.name!r} there, or change it")
    return root


def color_map(count: int) -> list[Color]:
    """Return the first colours of PASCAL VOC's colour map: the bits of a label spread over red, green and blue."""
    colors = []
    for label in range(count):
        red, green, blue = (
            sum(((label >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
        )
        colors.append((red, green, blue))
    return colors

"""What a prepared data set is: its items, classes and statistics, and the files under `out_dir` that hold them.

    out_dir/manifest.json       classes, palette, digest, counts, class histogram, mean, std, warnings
    out_dir/splits/<split>.csv  one line an item: id, image, target, height, width
    out_dir/samples.png         training images with their masks
    out_dir/images, masks       what `prepare` drew or converted

Paths in the lists begin with `root/` (`data.root` of the configuration that reads them) or `out/` (`out_dir`), so that
neither a move of the data nor of the checkout changes a byte of them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from sunets.config import IGNORE_INDEX, DataConfig, Task

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
"""Files that count as images, by suffix in lower case."""

Color = tuple[int, int, int]

_FAULTS_SHOWN = 100
_COLUMNS = ["id", "image", "target", "height", "width"]


class DataError(ValueError):
    """Data that cannot be used. `faults` holds every fault found, each naming its file and the remedy."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        lines = list(self.faults[:_FAULTS_SHOWN])
        if len(self.faults) > 1:
            lines.insert(0, f"{len(self.faults)} faults in the data:")
        if len(self.faults) > _FAULTS_SHOWN:
            lines.append(f"... and {len(self.faults) - _FAULTS_SHOWN} more")
        super().__init__("\n".join(lines))


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a split."""

    id: str
    """Name, unique in the data set: the file's stem, or split/class/stem for class folders."""
    image: Path
    """Image file."""
    target: Path | int | None
    """Mask file with labels 0..K-1 and 255 (ignored), or the class; None where the split has no labels."""
    height: int
    """Pixels of the file, before any resizing."""
    width: int
    """Pixels of the file, before any resizing."""


@dataclass(frozen=True)
class Manifest:
    """A prepared data set."""

    name: str
    task: Task
    classes: tuple[str, ...]
    palette: tuple[Color, ...]
    """(K, 3) colours, 0..255."""
    digest: str
    """SHA-256 over all file contents, splits and classes."""
    mean: tuple[float, float, float]
    """RGB mean of the training split, 0..1."""
    std: tuple[float, float, float]
    """RGB standard deviation of the training split over all pixels, 0..1."""
    splits: Mapping[str, tuple[Item, ...]]
    class_pixels: Mapping[str, list[int]]
    """Per split, pixels (classification: images) of each class."""
    warnings: tuple[str, ...] = ()
    """What is unusual but no fault, such as a class without a pixel."""

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.classes)


@dataclass(frozen=True)
class Entry:
    """An image that a data set's own files name; not looked at yet."""

    id: str
    image: Path
    target: Path | int | None


def read_png_labels(entry: Entry) -> np.ndarray:
    """The labels of a mask file as it stores them.

    Returns:
        (height, width) integers; of a palette image, the indices.

    Raises:
        ValueError: the file has several channels.
        OSError: it cannot be decoded.
    """
    assert isinstance(entry.target, Path)
    with Image.open(entry.target) as mask:
        if mask.mode not in ("L", "P", "I", "I;16"):
            raise ValueError(f"{entry.target}: mode {mask.mode}; a mask has one channel of 8 or 16 bits")
        return np.asarray(mask)


@dataclass
class Source:
    """What a data set module finds: entries to check, and how their labels are read."""

    classes: Sequence[str]
    palette: Sequence[Color]
    splits: dict[str, list[Entry]]
    """The splits that the configuration uses."""
    label_map: Mapping[int, int] | None = None
    """Stored label -> 0..K-1 or 255. None: labels are stored so."""
    read_labels: Callable[[Entry], np.ndarray | None] = read_png_labels
    """Labels of an entry before `label_map`; None drops the entry from its split."""
    may_overlap: frozenset[frozenset[str]] = frozenset()
    """Pairs of splits where one contains the other by definition: a warning instead of a fault."""
    overlap_is_published: bool = False
    """Equal images in two splits belong to the data set as published: a warning instead of a fault."""
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def labels(self) -> dict[int, int]:
        """Every stored label that is allowed, and what becomes of it."""
        return dict(self.label_map or {k: k for k in [*range(len(self.classes)), IGNORE_INDEX]})


def used_splits(config: DataConfig) -> list[str]:
    """The splits a configuration names, training first, each once."""
    return list(dict.fromkeys([config.train_split, config.val_split, config.test_split]))


def existing_root(config: DataConfig) -> Path:
    """The data set's directory.

    Raises:
        DataError: there is none.
    """
    root = Path(config.root or "")
    if not root.is_dir():
        raise DataError(f"data.root: no directory {root}; put the data set {config.name!r} there, or change it")
    return root


def pair(images: Path, masks: Path) -> tuple[list[Entry], list[str]]:
    """The images of a directory with the masks of the same stem in another.

    Returns:
        The pairs, by stem, and a fault for every file without a partner or with two.
    """
    faults: list[str] = []

    def by_stem(directory: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(directory.iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
                if path.stem in found:
                    faults.append(f"{path}: the same stem as {found[path.stem].name}; remove one of them")
                found[path.stem] = path
        return found

    left, right = by_stem(images), by_stem(masks)
    faults += [
        f"{left[s]}: no mask {masks / s}.png; add it or remove the image" for s in sorted(left.keys() - right.keys())
    ]
    faults += [
        f"{right[s]}: no image of this stem in {images}; add it or remove the mask"
        for s in sorted(right.keys() - left.keys())
    ]
    return [Entry(s, left[s], right[s]) for s in sorted(left.keys() & right.keys())], faults


def read_list(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without surrounding space.

    Raises:
        DataError: there is no such file, or it is no text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; extract the archive again") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: no text in UTF-8; write it again") from None


def color_map(count: int) -> list[Color]:
    """The first `count` colours of PASCAL VOC's colour map: the bits of a label spread over red, green and blue."""
    colors = []
    for label in range(count):
        red, green, blue = (
            sum(((label >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
        )
        colors.append((red, green, blue))
    return colors


def write_manifest(manifest: Manifest, directory: Path, root: Path | None) -> None:
    """Write manifest.json and the split lists; the bytes depend on the manifest alone."""
    tree = {
        "name": manifest.name,
        "task": manifest.task,
        "classes": list(manifest.classes),
        "palette": [list(c) for c in manifest.palette],
        "digest": manifest.digest,
        "mean": list(manifest.mean),
        "std": list(manifest.std),
        "counts": {split: len(items) for split, items in manifest.splits.items()},
        "class_pixels": dict(manifest.class_pixels),
        "warnings": list(manifest.warnings),
    }
    (directory / "manifest.json").write_text(json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    (directory / "splits").mkdir()

    def relative(path: Path) -> str:
        if path.is_relative_to(directory):
            return f"out/{path.relative_to(directory).as_posix()}"
        assert root is not None
        return f"root/{path.relative_to(root).as_posix()}"

    for split, items in manifest.splits.items():
        with (directory / "splits" / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(_COLUMNS)
            for i in items:
                target = relative(i.target) if isinstance(i.target, Path) else i.target
                rows.writerow([i.id, relative(i.image), target, i.height, i.width])


def load_manifest(out_dir: Path, config: DataConfig) -> Manifest:
    """Read what `prepare` wrote.

    Args:
        out_dir: the directory `prepare` wrote to.
        config: where the data set lies and which splits are used.

    Raises:
        DataError: nothing prepared there, another data set, a split that is not in it, or no directory `data.root`.
    """
    out_dir = Path(out_dir)
    remedy = "run the prepare stage"
    try:
        tree = json.loads((out_dir / "manifest.json").read_text())
    except FileNotFoundError:
        raise DataError(f"{out_dir / 'manifest.json'}: no such file; {remedy} first") from None
    except ValueError as error:
        raise DataError(f"{out_dir / 'manifest.json'}: not readable ({error}); {remedy} again") from None
    if tree["name"] != config.name:
        raise DataError(f"{out_dir}: holds the data set {tree['name']!r}, not {config.name!r}; {remedy} again")
    absent = [s for s in used_splits(config) if s not in tree["counts"]]
    if absent:
        there = ", ".join(tree["counts"])
        raise DataError(f"{out_dir}: prepared with the splits {there}, without {', '.join(absent)}; {remedy} again")
    bases = {"out": out_dir}
    if not config.name.startswith("synthetic"):
        bases["root"] = existing_root(config)

    def absolute(text: str) -> Path:
        base, _, rest = text.partition("/")
        return bases[base] / rest

    def target(text: str) -> Path | int | None:
        return None if not text else int(text) if tree["task"] == "classification" else absolute(text)

    splits = {}
    for split in tree["counts"]:
        with (out_dir / "splits" / f"{split}.csv").open(newline="") as file:
            splits[split] = tuple(
                Item(
                    id=row["id"],
                    image=absolute(row["image"]),
                    target=target(row["target"]),
                    height=int(row["height"]),
                    width=int(row["width"]),
                )
                for row in csv.DictReader(file)
            )
    red, green, blue = tree["mean"]
    std_red, std_green, std_blue = tree["std"]
    return Manifest(
        name=tree["name"],
        task=tree["task"],
        classes=tuple(tree["classes"]),
        palette=tuple((r, g, b) for r, g, b in tree["palette"]),
        digest=tree["digest"],
        mean=(red, green, blue),
        std=(std_red, std_green, std_blue),
        splits=splits,
        class_pixels=tree["class_pixels"],
        warnings=tuple(tree["warnings"]),
    )

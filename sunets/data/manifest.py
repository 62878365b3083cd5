"""A prepared data set: its items, classes and statistics, and the files in `out_dir` that hold them.

    out_dir/manifest.json       classes, palette, digest, counts, class histogram, mean, std, warnings
    out_dir/splits/<split>.csv  one line per item: id, image, target, height, width
    out_dir/files.csv           path, size and SHA-256 of every file read or drawn
    out_dir/samples.png         training images with their masks
    out_dir/images, masks       what `prepare` drew or converted

Paths in the lists begin with `root/` (`data.root` of the configuration that reads them) or `out/` (`out_dir`), so that
moving the data or the checkout changes no byte of them.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sunets.core.config import DataConfig, Task
from sunets.data.changes import FILES, FileState, check_unchanged, file_state, write_states
from sunets.data.picture import DataError, open_regular
from sunets.data.raw_dataset import Color, existing_root, split_path, used_splits

_KINDS: dict[str, type] = {
    "name": str, "task": str, "classes": list, "palette": list, "digest": str, "mean": list, "std": list,
    "counts": dict, "class_pixels": dict, "image_pixels": dict, "warnings": list, "files": int,
    "lists": dict, "sha256": str,
}  # fmt: skip
_REMEDY = "run python -m sunets prepare"
_COLUMNS = ["id", "image", "target", "height", "width"]


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
    image_pixels: Mapping[str, list[int]]
    """Per split, pixels of the images that show each class, ignored ones included (classification: images)."""
    warnings: tuple[str, ...] = ()
    """Anything unusual that is no fault, such as a class without a pixel."""

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.classes)


def relative(path: Path, directory: Path, root: Path | None) -> str:
    """Return a path as in the lists: below `out/` (the manifest's directory) or `root/` (the data set's)."""
    if path.is_relative_to(directory):
        return f"out/{path.relative_to(directory).as_posix()}"
    assert root is not None
    return f"root/{path.relative_to(root).as_posix()}"


def write_manifest(
    manifest: Manifest, directory: Path, root: Path | None, states: Mapping[str, FileState] | None = None
) -> None:
    """Write manifest.json, the split lists and files.csv; the bytes depend on the content of the arguments only."""
    states = states or {}
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
        "image_pixels": dict(manifest.image_pixels),
        "warnings": list(manifest.warnings),
        "files": len(states),
    }
    (directory / "splits").mkdir()
    for split, items in manifest.splits.items():
        with split_path(directory / "splits", split, ".csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(_COLUMNS)
            for i in items:
                target = relative(i.target, directory, root) if isinstance(i.target, Path) else i.target
                rows.writerow([i.id, relative(i.image, directory, root), target, i.height, i.width])
    write_states(states, directory)
    tree["lists"] = {name: file_state(directory / name).digest for name in _lists(tree)}
    text = json.dumps(tree | {"sha256": _seal(tree)}, indent=1, sort_keys=True, ensure_ascii=False)
    (directory / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _lists(tree: Mapping[str, Any]) -> list[str]:
    """Return the names of the lists beside a manifest."""
    return [FILES, *(split_path(Path("splits"), split, ".csv").as_posix() for split in sorted(tree["counts"]))]


def _seal(tree: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the other keys of a manifest."""
    text = json.dumps({k: v for k, v in tree.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_lists(directory: Path, tree: Mapping[str, Any]) -> None:
    """Check that the lists beside a manifest are as `prepare` wrote them.

    Raises:
        DataError: one was damaged or edited; names it and the remedy.
    """
    for name in _lists(tree):
        path = directory / name
        try:
            whole = file_state(path).digest == tree["lists"].get(name)
        except DataError as error:
            raise DataError(f"{path}: damaged ({error}); {_REMEDY} again") from None
        if not whole:
            raise DataError(f"{path}: damaged or edited (another SHA-256 than manifest.json states); {_REMEDY} again")


def load_manifest(out_dir: Path, config: DataConfig) -> Manifest:
    """Read what `prepare` wrote, and check that the files of the data set have not changed since.

    Args:
        out_dir: the directory `prepare` wrote to.
        config: directory of the data set, and the splits in use.

    Raises:
        DataError: `out_dir` holds no or another data set, a split is missing, `data.root` does not exist, files have
            changed, or a list is damaged; names the file and the remedy.
    """
    out_dir = Path(out_dir)
    tree = read_tree(out_dir, *_KINDS)
    if tree["name"] != config.name:
        raise DataError(f"{out_dir}: holds the data set {tree['name']!r}, not {config.name!r}; {_REMEDY} again")
    absent = [s for s in used_splits(config) if s not in tree["counts"]]
    if absent:
        prepared = ", ".join(tree["counts"])
        raise DataError(f"{out_dir}: prepared with the splits {prepared}, without {', '.join(absent)}; {_REMEDY} again")
    _check_lists(out_dir, tree)
    bases = {"out": out_dir}
    if not config.name.startswith("synthetic"):
        bases["root"] = existing_root(config)
    splits = {split: read_split(out_dir, tree, split, bases.get("root")) for split in tree["counts"]}
    check_unchanged(out_dir, bases, tree["files"])
    return Manifest(
        name=tree["name"],
        task=tree["task"],
        classes=tuple(tree["classes"]),
        palette=tuple((r, g, b) for r, g, b in tree["palette"]),
        digest=tree["digest"],
        mean=tree["mean"],
        std=tree["std"],
        splits=splits,
        class_pixels=tree["class_pixels"],
        image_pixels=tree["image_pixels"],
        warnings=tuple(tree["warnings"]),
    )


def read_tree(out_dir: Path, *needed: str) -> dict[str, Any]:
    """Read and check manifest.json.

    Args:
        out_dir: its directory.
        needed: required keys.

    Raises:
        DataError: the file is missing or damaged; names it and the remedy.
    """
    path = out_dir / "manifest.json"
    if not path.exists():
        raise DataError(f"{path}: no such file; {_REMEDY} first")
    try:
        with open_regular(path) as file:
            tree = json.loads(file.read().decode())
        if not isinstance(tree, dict):
            raise ValueError("not a mapping")
        if bad := [key for key in _KINDS if not isinstance(tree.get(key), _KINDS[key]) and key in {*tree, *needed}]:
            raise ValueError(f"{bad[0]} is missing or of another type")
        if any(len(color) != 3 for color in tree.get("palette", [])):
            raise ValueError("palette is not a list of colours")
        if "sha256" in needed and tree["sha256"] != _seal(tree):
            raise ValueError("damaged or edited: it has another SHA-256 than it states")
        for key in {"mean", "std"} & tree.keys():
            red, green, blue = map(float, tree[key])
            tree[key] = (red, green, blue)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not readable ({error}); {_REMEDY} again") from None
    return tree


def read_split(out_dir: Path, tree: Mapping[str, Any], split: str, root: Path | None) -> tuple[Item, ...]:
    """Read the list of a split.

    Args:
        out_dir: directory of the manifest.
        tree: content of manifest.json, its task at least.
        split: its name.
        root: the data set's directory; None for a drawn data set.

    Raises:
        DataError: the list is missing or damaged; names it and the remedy.
    """
    path = split_path(out_dir / "splits", split, ".csv")
    bases = {"out": out_dir} | ({"root": root} if root is not None else {})

    def absolute(text: str) -> Path:
        base, _, rest = text.partition("/")
        return bases[base] / rest

    def target(text: str) -> Path | int | None:
        return None if not text else int(text) if tree["task"] == "classification" else absolute(text)

    try:
        with path.open(newline="", encoding="utf-8") as file:
            items = tuple(
                Item(
                    id=row["id"],
                    image=absolute(row["image"]),
                    target=target(row["target"]),
                    height=int(row["height"]),
                    width=int(row["width"]),
                )
                for row in csv.DictReader(file)
            )
        if len(items) != (count := tree.get("counts", {}).get(split, len(items))):
            raise ValueError(f"{len(items)} lines instead of {count}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: damaged ({reason}); {_REMEDY} again") from None
    return items

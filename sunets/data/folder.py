"""A user's own data: images/ and masks/ with the same stems, and classes.txt with one class name per line.

A mask has one channel; the value of a pixel is the line number of its class, counted from 0, or 255 to ignore it. The
splits are listed in splits/train.txt, val.txt and test.txt (stems, one per line); without that directory they are drawn
(70, 15 and 15 %) in the order of the stems' hashes, so that the same files make the same splits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sunets.core.config import DataConfig
from sunets.data.picture import DataError
from sunets.data.raw_dataset import (
    Color,
    Entry,
    RawDataset,
    color_map,
    composed,
    existing_root,
    split_path,
    used_splits,
)

OKABE_ITO: tuple[Color, ...] = (
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115),
    (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
"""Colours of the first eight classes (Okabe and Ito, 2008): colour-blind readers can tell them apart."""
_VAL_FRACTION = _TEST_FRACTION = 0.15
_LONGEST_CLASS = 100  # characters: names are columns of tables and labels of figures


def find(config: DataConfig, work: Path) -> RawDataset:
    """List the used splits."""
    root = existing_root(config)
    needed = [root / "images", root / "masks", root / "classes.txt"]
    absent = [f"{p}: missing; the directory needs images/, masks/ and classes.txt" for p in needed if not p.exists()]
    if absent:
        raise DataError(absent)
    raw = RawDataset(root, ignored_by_user=True)
    classes = raw.read_lines(root / "classes.txt", numbered=True)
    if not 2 <= len(classes) <= 255 or len(set(classes)) < len(classes):
        raise DataError(f"{root / 'classes.txt'}: 2 to 255 different class names, one per line, not {len(classes)}")
    if long := next((name for name in classes if len(name) > _LONGEST_CLASS), None):
        raise DataError(
            f"{root / 'classes.txt'}: {long[:_LONGEST_CLASS]!r}... has {len(long)} characters; use at most "
            f"{_LONGEST_CLASS}"
        )
    raw.classes, raw.palette = classes, [*OKABE_ITO, *color_map(len(classes))[len(OKABE_ITO) :]][: len(classes)]
    entries = raw.pair(root / "images", root / "masks")
    if (root / "splits").exists():
        _read_splits(root, config, entries, raw)
    else:
        drawn = _draw_splits(entries)
        for split in used_splits(config):
            if split not in drawn:
                raise DataError(
                    f"{root / 'splits'}: missing; without it the splits are train, val and test, not {split}"
                )
            raw.splits[split] = drawn[split]
    return raw


def _read_splits(root: Path, config: DataConfig, entries: list[Entry], raw: RawDataset) -> None:
    by_id = {composed(e.id): e for e in entries}
    for split in used_splits(config):
        path = split_path(root / "splits", split, ".txt")
        if not path.exists():
            raise DataError(f"{path}: missing; add it, or remove {path.parent} to have splits drawn")
        raw.splits[split] = []
        for name in raw.read_lines(path):
            if entry := by_id.get(composed(name)):
                raw.splits[split].append(entry)
            else:
                raw.faults.append(f"{path}: names {name!r}, but images/ and masks/ have no such pair; remove it")
    listed = {e.id for split in raw.splits.values() for e in split}
    unlisted = [e.id for e in entries if e.id not in listed]
    if unlisted:
        raw.warnings.append(
            f"splits/: {len(unlisted)} images are in no list that is used, such as {unlisted[0]}; left out"
        )


def _draw_splits(entries: list[Entry]) -> dict[str, list[Entry]]:
    shuffled = sorted(entries, key=lambda e: hashlib.sha256(composed(e.id).encode()).digest())
    val, test = (max(1, round(len(entries) * fraction)) for fraction in (_VAL_FRACTION, _TEST_FRACTION))
    return {"val": shuffled[:val], "test": shuffled[val : val + test], "train": shuffled[val + test :]}

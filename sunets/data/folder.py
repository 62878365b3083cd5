"""A user's own data: images/ and masks/ with the same stems, and classes.txt with one class name a line.

A mask has one channel; a pixel's value is the line number of its class, counted from 0, or 255 to ignore it. With
splits/train.txt, val.txt and test.txt (stems, one a line) the splits are the user's; without that directory they are
drawn, 70, 15 and 15 of 100, in an order that the stems' hashes decide, so that the same files make the same splits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sunets.core.config import DataConfig
from sunets.data.picture import DataError
from sunets.data.raw_dataset import Entry, RawDataset, color_map, existing_root, split_path, used_splits

_SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}


def find(config: DataConfig, work: Path) -> RawDataset:
    """List the used splits."""
    root = existing_root(config)
    names = [root / "images", root / "masks", root / "classes.txt"]
    absent = [f"{p}: missing; the directory needs images/, masks/ and classes.txt" for p in names if not p.exists()]
    if absent:
        raise DataError(absent)
    source = RawDataset(root, ignores_by_hand=True)
    classes = source.lines(root / "classes.txt")
    if not 2 <= len(classes) <= 255 or len(set(classes)) < len(classes):
        raise DataError(f"{root / 'classes.txt'}: 2 to 255 different class names, one a line, not {len(classes)}")
    source.classes, source.palette = classes, color_map(len(classes))
    entries = source.pair(root / "images", root / "masks")
    if (root / "splits").is_dir():
        _read_splits(root, config, entries, source)
    else:
        drawn = _draw_splits(entries)
        for split in used_splits(config):
            if split not in drawn:
                raise DataError(
                    f"{root / 'splits'}: missing; without it the splits are train, val and test, not {split}"
                )
            source.splits[split] = drawn[split]
    return source


def _read_splits(root: Path, config: DataConfig, entries: list[Entry], source: RawDataset) -> None:
    by_id = {e.id: e for e in entries}
    for split in used_splits(config):
        path = split_path(root / "splits", split, ".txt")
        if not path.is_file():
            raise DataError(f"{path}: missing; add it, or remove {path.parent} to have the splits drawn")
        source.splits[split] = []
        for name in source.lines(path):
            if name in by_id:
                source.splits[split].append(by_id[name])
            else:
                source.faults.append(f"{path}: names {name!r}, but images/ and masks/ have no such pair; remove it")
    listed = {e.id for found in source.splits.values() for e in found}
    unlisted = [e.id for e in entries if e.id not in listed]
    if unlisted:
        source.warnings.append(
            f"splits/: {len(unlisted)} images are in no list that is used, such as {unlisted[0]}; left out"
        )


def _draw_splits(entries: list[Entry]) -> dict[str, list[Entry]]:
    shuffled = sorted(entries, key=lambda e: hashlib.sha256(e.id.encode()).digest())
    n = len(shuffled)
    val, test = (max(1, round(n * _SHARES[s])) for s in ("val", "test"))
    return {"val": shuffled[:val], "test": shuffled[val : val + test], "train": shuffled[val + test :]}

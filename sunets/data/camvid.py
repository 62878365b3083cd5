"""CamVid (Brostow et al., 2008) in the directories of the SegNet tutorial: train/, trainannot/, val/, valannot/, ...

Images are .png or .jpg; an annotation has the stem of its image, labels 0..10, and 11 for void, which becomes 255.
"""

from __future__ import annotations

from pathlib import Path

from sunets.core.config import IGNORE_INDEX, DataConfig
from sunets.data.picture import DataError
from sunets.data.raw_dataset import Color, RawDataset, existing_root, split_path, used_splits

CLASSES: dict[str, Color] = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
_VOID = 11
COUNTS = {"train": 367, "val": 101, "test": 233}
"""Images of each split, as published."""
IMAGE_SIZE = (360, 480)


def find(config: DataConfig, work: Path) -> RawDataset:
    """List the used splits."""
    root = existing_root(config)
    raw = RawDataset(root, list(CLASSES), list(CLASSES.values()))
    raw.label_map = {k: k for k in range(len(CLASSES))} | {_VOID: IGNORE_INDEX, IGNORE_INDEX: IGNORE_INDEX}
    for split in used_splits(config):
        images, masks = split_path(root, split), split_path(root, split, "annot")
        absent = [
            f"{d}: no such directory; data.root must hold train/ and trainannot/"
            for d in (images, masks)
            if not d.is_dir()
        ]
        raw.faults += absent
        if not absent:
            raw.splits[split] = raw.pair(images, masks)
            raw.compare_count(split, len(raw.splits[split]), COUNTS)
    if len(raw.splits) < len(used_splits(config)):
        raise DataError(raw.faults)
    return raw

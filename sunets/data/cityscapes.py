"""Cityscapes, fine annotations (Cordts et al., 2016), with its 19 training classes.

    data.root/leftImg8bit/<split>/<city>/<id>_leftImg8bit.png
    data.root/gtFine/<split>/<city>/<id>_gtFine_labelIds.png

The labels of the test split are not public, so it has none here (its files hold dummies).
"""

from __future__ import annotations

from pathlib import Path

from sunets.core.config import IGNORE_INDEX, DataConfig
from sunets.data.picture import DataError
from sunets.data.raw_dataset import Color, Entry, RawDataset, existing_root, used_splits

CLASSES: dict[str, tuple[int, Color]] = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
"""Training class: its label in the labelIds files, and its colour."""
_LABELS = 34
_IMAGE, _MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"
COUNTS = {"train": 2975, "val": 500, "test": 1525}
"""Images of each split, as published."""
IMAGE_SIZE = (1024, 2048)


def find(config: DataConfig, work: Path) -> RawDataset:
    """List the used splits."""
    root = existing_root(config)
    raw = RawDataset(root, list(CLASSES), [color for _, color in CLASSES.values()])
    raw.label_map = dict.fromkeys([*range(_LABELS), 255], IGNORE_INDEX) | {
        stored: label for label, (stored, _) in enumerate(CLASSES.values())
    }
    for split in used_splits(config):
        if split not in COUNTS:
            raise DataError(f"split {split!r}: Cityscapes has {', '.join(COUNTS)}; change data.*_split")
        images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
        absent = [
            f"{d}: no such directory; extract leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in {root}"
            for d in ((images,) if split == "test" else (images, masks))
            if not d.is_dir()
        ]
        if absent:
            raise DataError(absent)
        raw.splits[split] = [
            Entry(identity, path, None if split == "test" else masks / path.parent.name / f"{identity}{_MASK}")
            for path in _files(raw, images, _IMAGE)
            for identity in [path.name.removesuffix(_IMAGE)]
        ]
        known = {e.id for e in raw.splits[split]}
        if split != "test":
            raw.faults += [
                f"{path}: its image is missing in {images / path.parent.name}; extract the archive again"
                for path in _files(raw, masks, _MASK)
                if path.name.removesuffix(_MASK) not in known
            ]
        raw.compare_count(split, len(raw.splits[split]), COUNTS)
    return raw


def _files(raw: RawDataset, directory: Path, suffix: str) -> list[Path]:
    """List the files with this suffix in the cities of a split; the archives hold others beside them."""
    cities = [path for city in raw.list_directory(directory) if (path := directory / city.name).is_dir()]
    return raw.files_ending(cities, suffix)

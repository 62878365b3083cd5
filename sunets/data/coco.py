"""COCO 2017 (Lin et al., 2014), with masks of the 21 PASCAL VOC classes drawn from its objects.

    data.root/annotations/instances_{train,val}2017.json, data.root/{train,val}2017/*.jpg

Images with at most 1,000 labelled pixels are left out. Where objects overlap, the first in the file is in front; crowds
(run-length encoded) count as their class. `prepare` writes the masks.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from sunets.core.config import DataConfig
from sunets.data.picture import MAX_PIXELS, DataError, open_regular
from sunets.data.raw_dataset import Entry, RawDataset, color_map, existing_root, used_splits
from sunets.data.voc import CLASSES

_MIN_PIXELS = 1000
COUNTS = {"train": 118_287, "val": 5000}
"""Images of each split, as published; only those with over `_MIN_PIXELS` labelled pixels of a VOC class are used."""
IMAGE_SIZE = (480, 640)
_RENAMED = {
    "airplane": "aeroplane",
    "dining table": "diningtable",
    "motorcycle": "motorbike",
    "potted plant": "pottedplant",
    "couch": "sofa",
    "tv": "tvmonitor",
}


def find(config: DataConfig, work: Path) -> RawDataset:
    """List the images that have an object of a VOC class."""
    root = existing_root(config)
    files = {s: (root / "annotations" / f"instances_{s}2017.json", root / f"{s}2017") for s in used_splits(config)}
    unknown = [s for s in files if s not in ("train", "val")]
    if unknown:
        raise DataError(
            f"split {unknown[0]!r}: COCO's labels are public for train and val; change data.*_split (test_split: val)"
        )
    absent = [
        f"{p}: missing; extract COCO's archives in {root}" for both in files.values() for p in both if not p.exists()
    ]
    if absent:
        raise DataError(absent)
    labels = {name: label for label, name in enumerate(CLASSES)}
    raw = RawDataset(root, CLASSES, color_map(len(CLASSES)))
    annotations: dict[Path, _Annotations] = {}
    for split, (path, images) in files.items():
        raw.files[path] = None
        annotation = annotations[path] = _Annotations(path, labels)
        names = raw.valid_names(path, annotation.names)
        raw.splits[split] = [Entry(Path(name).stem, images / name, path) for name in names]
        raw.compare_count(split, len(annotation.names) + annotation.without_object, COUNTS)
        if annotation.without_object:
            raw.warnings.append(
                f"split {split!r}: {annotation.without_object} images have no object of a PASCAL VOC class; left out"
            )

    def read_labels(entry: Entry) -> np.ndarray | None:
        assert isinstance(entry.target, Path)
        mask = annotations[entry.target].draw(entry.image.name)
        return mask if np.count_nonzero(mask) > _MIN_PIXELS else None

    raw.read_labels = read_labels
    return raw


class _Annotations:
    """One annotation file, read with pycocotools."""

    def __init__(self, path: Path, labels: dict[str, int]) -> None:
        try:
            from pycocotools.coco import COCO
        except ImportError:
            raise DataError("COCO needs the package pycocotools: pip install 'sunets[coco]'") from None
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
                self.coco = COCO()
                with open_regular(path) as file:  # COCO(path) reads it in the locale's encoding
                    self.coco.dataset = json.loads(file.read().decode())
                self.coco.createIndex()
            categories = self.coco.loadCats(self.coco.getCatIds())
            label_of = {c["id"]: labels.get(_RENAMED.get(c["name"], c["name"]), 0) for c in categories}
            self.objects: dict[str, list[tuple[int, dict[str, Any]]]] = {}
            images = self.coco.loadImgs(sorted(self.coco.getImgIds()))
            for image in images:
                objects = [(label_of[a["category_id"]], a) for a in self.coco.imgToAnns[image["id"]]]
                if any(label for label, _ in objects):
                    self.objects[str(image["file_name"])] = [(label, a) for label, a in objects if label]
            self.without_object = len(images) - len(self.objects)
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            raise DataError(f"{path}: not COCO instance annotations ({error!r}); extract the archive again") from None
        self.path = path
        self.names = list(self.objects)

    def draw(self, name: str) -> np.ndarray:
        """Draw the mask of an image, (height, width) uint8.

        Raises:
            DataError: a polygon or run-length code cannot be drawn.
        """
        mask: np.ndarray | None = None
        for label, annotation in self.objects[name]:
            try:
                image = self.coco.imgs[annotation["image_id"]]
                if not 0 < image["height"] * image["width"] <= MAX_PIXELS:
                    raise ValueError(f"{image['width']}x{image['height']} pixels")
                inside = self.coco.annToMask(annotation) if annotation["segmentation"] else None
                if mask is None:
                    mask = np.zeros((image["height"], image["width"]), np.uint8)
                if inside is not None:
                    mask[(inside > 0) & (mask == 0)] = label
            except Exception as error:  # pycocotools' C code fails in many ways
                raise DataError(
                    f"{self.path}: annotation {annotation.get('id')} of {name} cannot be drawn ({error!r})"
                ) from None
        assert mask is not None
        return mask

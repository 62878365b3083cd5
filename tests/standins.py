"""Tiny data sets in the exact on-disk formats of the real ones, drawn by code; shared by the tests.

Each `make_*` writes to `root`, the value for `data.root`. Colours follow the labels, so that a network can learn.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from sunets.data.cityscapes import CLASSES as CITYSCAPES_CLASSES
from sunets.data.raw_dataset import color_map

COCO_CATEGORIES = {1: "person", 5: "airplane", 24: "zebra", 63: "couch", 72: "tv"}
"""COCO's own ids; zebra is no VOC class."""


def scene(rng: np.random.Generator, size: tuple[int, int], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image (H, W, 3) and its mask (H, W): rectangles of the other labels on a background of `labels[0]`."""
    height, width = size
    mask = np.full(size, labels[0], np.uint8)
    for label in labels[1:]:
        y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask[y : y + height // 2, x : x + width // 2] = label
    colors = np.array([*color_map(255), (128, 128, 128)])[mask]
    image = np.clip(0.6 * colors + 50 + rng.normal(0, 12, (height, width, 3)), 0, 255)
    return image.astype(np.uint8), mask


def save_palette(mask: np.ndarray, path: Path) -> None:
    """Write an 8-bit palette PNG as in PASCAL VOC: index = label, 255 in the last colour of the palette."""
    image = Image.fromarray(mask)
    image.putpalette([channel for color in [*color_map(255), (224, 224, 192)] for channel in color])
    image.save(path)


def _write(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def make_camvid(
    root: Path, train: int = 4, val: int = 2, test: int = 2, size: tuple[int, int] = (24, 32), suffix: str = ".png"
) -> Path:
    """Write CamVid in the SegNet tutorial's directories; label 11 is void."""
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("val", val), ("test", test)):
        for index in range(count):
            image, mask = scene(rng, size, [3, index % 11, (index + 5) % 11])
            mask[0] = 11
            _write(image, root / split / f"{split}_{index:03d}{suffix}")
            _write(mask, root / f"{split}annot" / f"{split}_{index:03d}.png")
    return root


def make_folder(root: Path, count: int = 8, classes: int = 3, size: tuple[int, int] = (24, 32)) -> Path:
    """Write images/, masks/ and classes.txt; images of two sizes."""
    rng = np.random.default_rng(2)
    for index in range(count):
        height, width = size
        image, mask = scene(rng, (height + 8 * (index % 2), width), [0, 1 + index % (classes - 1)])
        mask[-1] = 255
        _write(image, root / "images" / f"photo {index}.jpg")
        _write(mask, root / "masks" / f"photo {index}.png")
    (root / "classes.txt").write_text("".join(f"class {k}\n" for k in range(classes)))
    return root


def make_imagefolder(
    root: Path,
    train: int = 4,
    val: int = 2,
    classes: Sequence[str] = ("n01440764", "n01443537", "n02102040", "n03000684", "n03394916", "n03888257"),
    size: tuple[int, int] = (40, 48),
) -> Path:
    """Write ImageNet's class folders, `train` and `val` images each; sizes differ, one image is grey."""
    rng = np.random.default_rng(3)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            for index in range(count):
                image, _ = scene(rng, (size[0] + 4 * (index % 2), size[1]), [label + 1])
                _write(image if index or label else image[..., 0], root / split / name / f"{name}_{index}.JPEG")
    return root


def make_voc(root: Path, train: int = 4, val: int = 2, test: int = 2, size: tuple[int, int] = (48, 64)) -> Path:
    """Write VOCdevkit/VOC2012 with palette masks and 255 borders; train, val, trainval and test lists."""
    rng = np.random.default_rng(4)
    voc = root / "VOCdevkit" / "VOC2012"
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    number = 0
    for split, count in (("train", train), ("val", val), ("test", test)):
        for _ in range(count):
            name = f"2007_{number:06d}"
            image, mask = scene(rng, (size[0] + 4 * (number % 2), size[1]), [0, 1 + number % 20])
            edge = mask != np.roll(mask, 1, 1)
            mask[edge] = 255
            _write(image, voc / "JPEGImages" / f"{name}.jpg")
            if split != "test":
                (voc / "SegmentationClass").mkdir(exist_ok=True)
                save_palette(mask, voc / "SegmentationClass" / f"{name}.png")
            lists[split].append(name)
            number += 1
    lists["trainval"] = sorted(lists["train"] + lists["val"])
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in lists.items():
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{n}\n" for n in names))
    return root


def make_sbd(root: Path, extra: int = 3, size: tuple[int, int] = (48, 64)) -> Path:
    """Write SBD beside `make_voc(root)`: `extra` new images, VOC's first train image and *all VOC val images*.

    The real SBD holds VOC val images as well; none of them may be in train_aug.
    """
    rng = np.random.default_rng(5)
    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    new = []
    for index in range(extra):
        name = f"2008_{index:06d}"
        image, mask = scene(rng, size, [0, 1 + index % 20])
        _write(image, voc / "JPEGImages" / f"{name}.jpg")
        save_sbd(mask, sbd / "cls" / f"{name}.mat")
        new.append(name)
    lists = voc / "ImageSets" / "Segmentation"
    shared = (lists / "train.txt").read_text().split()[:1] + (lists / "val.txt").read_text().split()
    for name in shared:
        with Image.open(voc / "SegmentationClass" / f"{name}.png") as file:
            mask = np.array(file)
        save_sbd(np.where(mask == 255, 0, mask).astype(np.uint8), sbd / "cls" / f"{name}.mat")
    half = len(shared) // 2 + 1
    (sbd / "train.txt").write_text("\n".join(new[:1] + shared[:half]))
    (sbd / "val.txt").write_text("\n".join(new[1:] + shared[half:]))
    return root


def save_sbd(mask: np.ndarray, path: Path) -> None:
    """Write a MATLAB 5 file with SBD's struct GTcls."""
    present = np.unique(mask[mask > 0]).reshape(-1, 1)
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[np.zeros(mask.shape, np.uint8)]] * 20
    savemat(path, {"GTcls": {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}})


def make_coco(root: Path, train: int = 3, val: int = 2, size: tuple[int, int] = (64, 72)) -> Path:
    """Write annotations/instances_*2017.json: a polygon, an uncompressed crowd and a compressed code in every image.

    Each split also has an image with too few labelled pixels and one with only a zebra; `prepare` leaves both out.
    """
    rng = np.random.default_rng(6)
    height, width = size
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        annotate = partial(_annotate, annotations)
        for index in range(count + 2):
            number = index + 1 + 100 * (split == "val")
            name = f"{number:012d}.jpg"
            image, _ = scene(rng, size, [0, 15, 20])
            _write(image, root / f"{split}2017" / name)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            if index == count:  # 10 x 10 pixels of a person
                annotate(number, 1, [[2, 2, 12, 2, 12, 12, 2, 12]])
                continue
            if index == count + 1:
                annotate(number, 24, [[0, 0, 60, 0, 60, 60, 0, 60]])
                continue
            # a tv, 40 x 40; a crowd of persons: the first 8 columns, in column order; a couch over the tv's corner
            annotate(number, 72, [[10, 10, 50, 10, 50, 50, 10, 50]])
            annotate(number, 1, {"size": [height, width], "counts": [0, 8 * height, (width - 8) * height]}, crowd=1)
            annotate(number, 63, _compressed(height, width, slice(40, 60), slice(40, 60)))
        categories = [{"id": k, "name": v, "supercategory": "thing"} for k, v in COCO_CATEGORIES.items()]
        tree = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(tree))
    return root


def _annotate(
    annotations: list[dict[str, object]], image_id: int, category: int, segmentation: object, crowd: int = 0
) -> None:
    annotations.append(
        {
            "id": len(annotations) + 1,
            "image_id": image_id,
            "category_id": category,
            "segmentation": segmentation,
            "area": 1200.0,
            "bbox": [0, 0, 10, 10],
            "iscrowd": crowd,
        }
    )


def _compressed(height: int, width: int, rows: slice, columns: slice) -> dict[str, object]:
    from pycocotools import mask as coder

    inside = np.zeros((height, width), np.uint8, order="F")
    inside[rows, columns] = 1
    code = coder.encode(inside)
    return {"size": [height, width], "counts": code["counts"].decode()}


def make_cityscapes(root: Path, train: int = 3, val: int = 2, test: int = 1, size: tuple[int, int] = (32, 64)) -> Path:
    """Write leftImg8bit/ and gtFine/ with one city per split and the 34 label ids; dummies in the test split."""
    rng = np.random.default_rng(7)
    ids = [stored for stored, _ in CITYSCAPES_CLASSES.values()]
    for split, city, count in (("train", "aachen", train), ("val", "frankfurt", val), ("test", "berlin", test)):
        for index in range(count):
            name = f"{city}_{index:06d}_000019"
            image, mask = scene(rng, size, [ids[0], ids[1 + index], ids[10 + index], 3])
            if split == "test":
                mask[:] = 0
            _write(image, root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            _write(mask, root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png")
    return root

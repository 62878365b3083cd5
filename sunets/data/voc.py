"""PASCAL VOC 2012 segmentation (Everingham et al., 2015), and its augmentation by SBD (Hariharan et al., 2011).

    data.root/VOCdevkit/VOC2012/{ImageSets/Segmentation, JPEGImages, SegmentationClass}    (or data.root is VOC2012)
    data.root/benchmark_RELEASE/dataset, or data.root/sbd: {train.txt, val.txt, cls/*.mat}

Splits: train, val, trainval, test (no labels), and with SBD train_aug = SBD's train and val and VOC's train, less VOC's
val; trainval_aug = that and VOC's val. VOC's own masks are used where there is one.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from sunets.core.config import DataConfig
from sunets.data.picture import DataError, open_regular
from sunets.data.raw_dataset import Entry, RawDataset, color_map, existing_root, read_labels, used_splits

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_COUNTS = {"train": 1464, "val": 1449, "trainval": 2913, "test": 1456, "train_aug": 10582, "trainval_aug": 12031}
_MAY_OVERLAP = frozenset(frozenset((whole, "val")) for whole in ("trainval", "trainval_aug"))


def find(config: DataConfig, work: Path) -> RawDataset:
    """List the used splits from the data sets' own lists."""
    root = existing_root(config)
    places = (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
    voc = next((d for d in places if (d / "ImageSets").is_dir()), None)
    if voc is None:
        raise DataError(f"{root}: no VOCdevkit/VOC2012 with ImageSets/; extract VOCtrainval_11-May-2012.tar there")
    needed = [voc / "ImageSets" / "Segmentation", voc / "JPEGImages", voc / "SegmentationClass"]
    absent = [f"{d}: no such directory; extract the archive again" for d in needed if not d.is_dir()]
    if absent:
        raise DataError(absent)

    source = RawDataset(root, CLASSES, color_map(len(CLASSES)), read_labels=_read_labels)

    def names_in(path: Path) -> list[str]:
        return source.named(path, source.lines(path))

    def listed(split: str) -> list[str]:
        return names_in(voc / "ImageSets" / "Segmentation" / f"{split}.txt")

    source.may_overlap = _MAY_OVERLAP
    for split in used_splits(config):
        if split not in _COUNTS:
            raise DataError(f"split {split!r}: PASCAL VOC has {', '.join(_COUNTS)}; change data.*_split")
        if split.endswith("_aug"):
            sbd = _find_sbd(root)
            own = listed("trainval" if split == "trainval_aug" else "train")
            held_out = set(listed("val")) - set(own)
            extra = {n for part in ("train", "val") for n in names_in(sbd / f"{part}.txt")} - held_out - set(own)
            masks = {n: voc / "SegmentationClass" / f"{n}.png" for n in own} | {
                n: sbd / "cls" / f"{n}.mat" for n in extra
            }
        else:
            names = listed(split)
            masks = {n: voc / "SegmentationClass" / f"{n}.png" for n in names}
            twice = [name for name, count in Counter(names).items() if count > 1]
            source.faults += [f"ImageSets/Segmentation/{split}.txt: {name} twice; remove one" for name in twice]
        source.splits[split] = [
            Entry(name, voc / "JPEGImages" / f"{name}.jpg", None if split == "test" else masks[name])
            for name in sorted(masks)
        ]
        if len(masks) != _COUNTS[split]:
            source.warnings.append(f"split {split!r}: {len(masks)} images, published are {_COUNTS[split]}")
    return source


def _find_sbd(root: Path) -> Path:
    places = (root / "benchmark_RELEASE" / "dataset", root / "sbd")
    found = next((d for d in places if d.is_dir()), None)
    if found is None:
        raise DataError(
            f"{places[0]}: no such directory; extract SBD's benchmark.tgz in {root}, or choose a split without _aug"
        )
    absent = [
        f"{found / part}: missing; extract benchmark.tgz again"
        for part in ("train.txt", "val.txt", "cls")
        if not (found / part).exists()
    ]
    if absent:
        raise DataError(absent)
    return found


def _read_labels(entry: Entry) -> np.ndarray:
    assert isinstance(entry.target, Path)
    if entry.target.suffix != ".mat":
        return read_labels(entry)
    fault = f"{entry.target}: no SBD class file (a MATLAB 5 file with GTcls.Segmentation); use the ones in SBD's cls/"
    try:
        with open_regular(entry.target) as file:
            labels = np.asarray(loadmat(file, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{entry.target}: cannot be decoded ({error}); fetch or extract it again") from None
    except Exception as error:  # a file of another kind fails in scipy in many ways
        raise DataError(f"{fault} ({' '.join(str(error).split())})") from None
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(fault)
    return labels


def download(root: Path) -> None:
    """Fetch VOC 2012 (train and val; the test images need a login) and SBD with torchvision's downloaders."""
    from torchvision.datasets import SBDataset, VOCSegmentation

    VOCSegmentation(str(root), year="2012", image_set="trainval", download=True)
    SBDataset(str(root / "sbd"), image_set="train", mode="segmentation", download=True)

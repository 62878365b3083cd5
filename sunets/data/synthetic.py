"""The embedded data sets, drawn by code: `synthetic` (segmentation) and `synthetic_shapes` (classification).

Objects of many sizes lie on a textured background. The class of an object is its shape, and whether it is lighter or
darker than its surroundings, which have the same texture and a random brightness. So a patch inside a large object
looks like background: only the object's edge tells its class, and is outside the receptive field of a local network.
With `context: false`, the control, stripes tell the class everywhere inside the objects of the same scenes.

Image `index` of a split depends only on the drawing seed, the split and the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from sunets.core.config import DataConfig, SyntheticConfig, Task, derive_seed
from sunets.data.picture import DataError
from sunets.data.raw_dataset import Color, Entry, RawDataset, used_splits

_COLORS: dict[str, Color] = {
    "background": (40, 40, 40),
    "disc_lighter": (255, 190, 90),
    "disc_darker": (170, 80, 0),
    "square_lighter": (110, 190, 255),
    "square_darker": (0, 80, 190),
    "triangle_lighter": (140, 230, 140),
    "triangle_darker": (0, 120, 40),
    "cross_lighter": (240, 150, 230),
    "cross_darker": (140, 30, 130),
}
SHAPES: dict[Task, tuple[str, ...]] = {
    "segmentation": ("disc", "square"),
    "classification": ("disc", "square", "triangle", "cross"),
}


def class_names(task: Task) -> list[str]:
    """Return the names of the classes, in label order."""
    names = [f"{shape}_{side}" for shape in SHAPES[task] for side in ("lighter", "darker")]
    return ["background", *names] if task == "segmentation" else names


def find(config: DataConfig, work: Path) -> RawDataset:
    """Draw the images (and masks) of the used splits under `work`."""
    settings = config.synthetic
    counts = {"train": settings.train, "val": settings.val, "test": settings.test}
    segmentation, shapes, classes = config.task == "segmentation", SHAPES[config.task], class_names(config.task)
    (work / "images").mkdir()
    (work / "masks").mkdir() if segmentation else None
    splits: dict[str, list[Entry]] = {}
    for split in used_splits(config):
        if split not in counts:
            raise DataError(f"split {split!r}: {config.name} has train, val and test; change data.*_split")
        splits[split] = []
        for index in range(counts[split]):
            identity = f"{split}_{index:05d}"
            rng = np.random.default_rng(derive_seed(config.name, settings.seed, split, index))
            image, labels = draw(rng, settings, shapes, single=not segmentation)
            path = work / "images" / f"{identity}.png"
            Image.fromarray(image).save(path, compress_level=1)
            target: Path | int
            if segmentation:
                target = work / "masks" / f"{identity}.png"
                Image.fromarray(labels).save(target)
            else:
                target = int(labels.max()) - 1
            splits[split].append(Entry(identity, path, target))
    return RawDataset(work, classes, [_COLORS[name] for name in classes], splits)


def draw(
    rng: np.random.Generator, settings: SyntheticConfig, shapes: Sequence[str], *, single: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        rng: the only source of randomness.
        settings: image size, and whether the class needs context.
        shapes: names of the shapes to draw.
        single: draw exactly one object instead of one to four.

    Returns:
        (size, size, 3) uint8 image; (size, size) uint8 labels: 0 background, 1 + 2 * shape (+ 1 if darker).
    """
    size = settings.image_size
    y, x = np.mgrid[:size, :size].astype(np.float32)
    textures = _textures(rng, size)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.2)
    level = rng.uniform(0.3, 0.7) + slope * ((x / size - 0.5) * np.cos(angle) + (y / size - 0.5) * np.sin(angle))
    color = level[..., None] + rng.uniform(-0.06, 0.06, 3) + textures[0]
    labels = np.zeros((size, size), np.uint8)
    for shape, width, left, top in _arrange(rng, size, len(shapes), single):
        inside = _shape(shapes[shape], x - left - width / 2, y - top - width / 2, width / 2)
        darker = int(rng.integers(2))
        contrast = rng.uniform(0.12, 0.2)
        fill = level[..., None] + rng.uniform(-0.06, 0.06, 3) + textures[1] + (-contrast if darker else contrast)
        phase = rng.uniform(0, 2 * np.pi)
        if not settings.context:
            direction = np.pi / len(shapes) * shape
            along = x * np.cos(direction) + y * np.sin(direction)
            fill = fill + 0.1 * np.sin(2 * np.pi * along / (7 if darker else 4) + phase)[..., None]
        color = np.where(inside[..., None], fill, color)
        labels[inside] = 1 + 2 * shape + darker
    return np.clip(np.rint(color * 255), 0, 255).astype(np.uint8), labels


def _arrange(rng: np.random.Generator, size: int, shapes: int, single: bool) -> list[tuple[int, float, float, float]]:
    """Return (shape, width, left, top), in pixels, of objects that lie inside the image and do not touch."""
    unit = size / 96
    objects: list[tuple[int, float, float, float]] = []
    for number in range(1 if single else rng.integers(1, 5)):
        # the first is large, so that its edge is outside a local receptive field; the others may be small
        low, high = (24, 74) if single else (54, 74) if number == 0 else (10, 40)
        for _ in range(12):
            width = unit * float(np.exp(rng.uniform(np.log(low), np.log(high))))
            left, top = rng.uniform(1, size - 1 - width, 2)
            gap = 3 * unit
            if all(
                left > a + w + gap or a > left + width + gap or top > b + w + gap or b > top + width + gap
                for _, w, a, b in objects
            ):
                objects.append((int(rng.integers(shapes)), width, float(left), float(top)))
                break
    return objects


def _shape(name: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return where (x, y), relative to the centre, is inside the shape, whose width is twice the radius."""
    if name == "disc":
        return x**2 + y**2 <= radius**2
    box = np.maximum(abs(x), abs(y)) <= radius
    if name == "square":
        return box
    if name == "triangle":
        return box & (abs(x) <= (y + radius) / 2)
    return box & (np.minimum(abs(x), abs(y)) <= radius / 2.5)  # cross


def _textures(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw two (size, size, 3) textures with the 1/f spectrum of natural images, mostly grey, std 0.05."""
    noise = rng.standard_normal((2, 4, size, size), dtype=np.float32)
    waves = np.fft.irfft2(np.fft.rfft2(noise) * _falloff(size), s=(size, size))
    waves *= 0.05 / waves.std((2, 3), keepdims=True)
    mixed = waves[:, :1] + 0.4 * waves[:, 1:]
    return np.moveaxis(mixed, 1, -1)


@lru_cache(maxsize=4)
def _falloff(size: int) -> np.ndarray:
    """Return 1/f, (size, size // 2 + 1), without the mean and with weaker long waves, which look like objects."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    return (f > 0) / np.maximum(f, 3.0)

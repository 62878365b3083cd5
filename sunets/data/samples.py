"""Masks as palette images, and the sample image that `prepare` draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sunets.core.config import IGNORE_INDEX
from sunets.data.manifest import Item, Manifest
from sunets.data.picture import read_mask, read_picture
from sunets.data.raw_dataset import Color

_GAP = 4  # pixels
_LINE = 18


def write_mask(labels: np.ndarray, palette: Sequence[Color], path: Path) -> None:
    """Write (height, width) uint8 labels as an 8-bit palette PNG whose indices are the labels."""
    image = Image.fromarray(labels)
    colors = [channel for color in palette for channel in color]
    image.putpalette(colors + [0] * (768 - len(colors)))  # with a short one Pillow writes fewer bits: 255 becomes 15
    image.save(path)


def overlay(pixels: np.ndarray, labels: np.ndarray, palette: Sequence[Color]) -> np.ndarray:
    """Blend the colours of labels (H, W) with an RGB image (H, W, 3), both uint8.

    Ignored pixels, and labels whose colour is black (PASCAL VOC's background), leave the image as it is.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    colors = table[labels]
    plain = (labels == IGNORE_INDEX) | ~colors.any(-1)
    return np.where(plain[..., None], pixels, (pixels.astype(np.uint16) + colors) // 2).astype(np.uint8)


def draw_samples(manifest: Manifest, items: Sequence[Item], path: Path, count: int = 6, height: int = 144) -> None:
    """Draw evenly spaced images of a split, each with its labels below, and the legend of the classes."""
    font = ImageFont.load_default(12)
    columns: list[Image.Image] = []
    for index in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int):
        item = items[index]
        width = min(max(1, round(item.width * height / item.height)), 8 * height)  # a long strip is compressed
        image = Image.fromarray(read_picture(item.image)).resize((width, height))
        if isinstance(item.target, Path):
            mask = Image.fromarray(read_mask(item.target).astype(np.uint8))
            labels = np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))
            column = Image.new("RGB", (width, 2 * height + _GAP), "white")
            colored = Image.fromarray(overlay(np.asarray(image), labels, manifest.palette))
            column.paste(colored, (0, height + _GAP))
        else:
            column = Image.new("RGB", (width, height + _LINE), "white")
            name = manifest.classes[item.target] if item.target is not None else ""
            ImageDraw.Draw(column).text((2, height + 2), name, "black", font)
        column.paste(image, (0, 0))
        columns.append(column)
    total = sum(c.width + _GAP for c in columns)
    legend: list[tuple[int, int, int]] = []  # x, row, class
    x = row = 0
    if manifest.task == "segmentation":
        for label, name in enumerate(manifest.classes):
            width = 24 + int(font.getlength(name))
            if x and x + width > total:
                x, row = 0, row + 1
            legend.append((x, row, label))
            x += width
    canvas = Image.new("RGB", (total, columns[0].height + _GAP + (row + 1) * _LINE * bool(legend)), "white")
    x = 0
    for column in columns:
        canvas.paste(column, (x, 0))
        x += column.width + _GAP
    draw = ImageDraw.Draw(canvas)
    for x, row, label in legend:
        y = columns[0].height + _GAP + row * _LINE
        draw.rectangle((x, y + 3, x + 11, y + 14), manifest.palette[label], "black")
        draw.text((x + 15, y + 1), manifest.classes[label], "black", font)
    canvas.save(path)

"""Masks as palette images, and the picture of samples that `prepare` draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sunets.core.config import IGNORE_INDEX
from sunets.data.manifest import Item, Manifest
from sunets.data.picture import read_mask, read_picture


def write_mask(labels: np.ndarray, palette: Sequence[tuple[int, int, int]], path: Path) -> None:
    """Write (height, width) uint8 labels as an 8-bit palette PNG, whose indices are the labels."""
    image = Image.fromarray(labels)
    colors = [channel for color in palette for channel in color]
    image.putpalette(colors + [0] * (768 - len(colors)))  # a short one makes Pillow write fewer bits: 255 becomes 15
    image.save(path)


def overlay(image: Image.Image, labels: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """The RGB image with its labels (height, width) laid over it in colour; ignored pixels stay as they are."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    pixels = np.asarray(image)
    mixed = (0.4 * pixels + 0.6 * table[labels]).astype(np.uint8)
    return Image.fromarray(np.where((labels == IGNORE_INDEX)[..., None], pixels, mixed))


def draw_samples(manifest: Manifest, items: Sequence[Item], path: Path, count: int = 6, height: int = 144) -> None:
    """A picture of evenly spaced training images: above as they are, below with their labels."""
    font = ImageFont.load_default(12)
    line = 18
    columns: list[Image.Image] = []
    for index in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int):
        item = items[index]
        width = min(max(1, round(item.width * height / item.height)), 8 * height)  # a strip is pressed together
        image = Image.fromarray(read_picture(item.image)).resize((width, height))
        if isinstance(item.target, Path):
            mask = Image.fromarray(read_mask(item.target).astype(np.uint8))
            labels = np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))
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

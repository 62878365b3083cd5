"""Draw the architecture for the README: `python docs/architecture.py` writes `docs/architecture.png` and `.pdf`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch
from numpy.typing import NDArray

from sunets.report.images import colorize, luminance
from sunets.report.style import STYLE, save_figure

_DOWN, _UP, _POINT, _HEAD = "#0072B2", "#D55E00", "#8A6FB3", "#009E73"
_STEM, _POOL, _INK = "#555555", "#B0B0B0", "#222222"


def architecture(path: Path) -> list[Path]:
    """Draw SUNet for a README or a paper: the whole network above, one of its U-Nets in detail below.

    What is drawn is the network as its authors built it: `num_blocks` (2, d, d, 1), `unet_depth` (2, 2, 2, 1), natural
    output stride 32 (Shah, Ghosh, Davis, Goldstein, arXiv 1804.10343, and their code).

    Args:
        path: of the files, without suffix.

    Returns:
        The .png and the .pdf.
    """
    with plt.rc_context(STYLE | {"figure.constrained_layout.use": False, "savefig.dpi": 200}):
        fig = plt.figure(figsize=(9.6, 6.6))
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, 96), ylim=(0, 66))
        ax.set_axis_off()
        zoom = _draw_network(ax)
        _draw_unet(ax, zoom)
    return save_figure(fig, path)


def _panel(ax: Axes, left: float, low: float, w: float, h: float, radius: float, **look: Any) -> None:
    """A rectangle with round corners."""
    ax.add_patch(FancyBboxPatch((left, low), w, h, boxstyle=f"round,pad=0,rounding_size={radius}", **look))


def _box(
    ax: Axes, x: float, y: float, w: float, h: float, color: str, text: str, *, fill: float = 0.16, size: float = 7.0
) -> None:
    """A rounded box centred on (x, y), its colour as frame and, lightened, as ground."""
    ground = tuple(1 - fill * (1 - c) for c in to_rgb(color))
    _panel(ax, x - w / 2, y - h / 2, w, h, 0.7, facecolor=ground, edgecolor=color, linewidth=1.1, zorder=3)
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=_INK, zorder=4, linespacing=1.25)


def _arrow(ax: Axes, points: Sequence[tuple[float, float]], color: str = "#444444", *, head: bool = True) -> None:
    """A line through the points, ending in a small arrow head."""
    x, y = zip(*points, strict=True)
    ax.plot(x, y, color=color, linewidth=1.1, solid_capstyle="round", solid_joinstyle="round", zorder=2)
    if head:
        ax.annotate(
            "", xy=points[-1], xytext=points[-2], zorder=2,
            arrowprops={"arrowstyle": "-|>,head_width=0.16,head_length=0.32", "color": color, "linewidth": 1.1,
                        "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _note(ax: Axes, x: float, y: float, text: str, **options: Any) -> None:
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.8, "color": "#444444", "linespacing": 1.3}
    ax.text(x, y, text, **(style | options))


def _glyph(ax: Axes, x: float, y: float, w: float, h: float, levels: int) -> None:
    """A small U-Net: bars that shorten to the middle, one step a level, and a line over the top for the skip."""
    bars = 2 * levels + 1
    pitch = w / bars
    for i in range(bars):
        level = min(i, bars - 1 - i)
        tall = h / 2**level
        color = _DOWN if i < levels else _UP if i > levels else "#5E5E8C"
        left = x - w / 2 + (i + 0.12) * pitch
        ax.add_patch(plt.Rectangle((left, y - tall / 2), pitch * 0.76, tall, facecolor=color, zorder=4))
    start, stop, low, top = x - (w - pitch) / 2, x + (w - pitch) / 2, y + h / 2 + 0.2, y + h / 2 + 0.75
    ax.plot([start, start, stop, stop], [low, top, top, low], color="#777777", linewidth=0.8, zorder=3)


def _draw_network(ax: Axes) -> tuple[float, float, float]:
    """The upper half; returns (x, y, half width) of the U-Net that the lower half magnifies."""
    y = 52.0
    ax.text(2, 63.7, "SUNet", fontsize=12, fontweight="bold", color=_INK, va="center")
    ax.text(
        10.2, 63.6, "stacked U-Nets in place of residual blocks: each passes information far across the image and "
        "returns it at the resolution it came in", fontsize=8, color="#444444", va="center",
    )  # fmt: skip
    picture, labels = _toy_scene()
    ax.imshow(picture, extent=(2, 8, y - 3, y + 3), zorder=3, aspect="auto", interpolation="bilinear")
    ax.add_patch(plt.Rectangle((2, y - 3), 6, 6, fill=False, edgecolor="#666666", linewidth=0.8, zorder=4))
    _note(ax, 5, y - 4.3, "image\n3 × H × W", va="top")
    ax.text(14.1, 60.3, "Stem", fontsize=8, fontweight="bold", ha="center", color=_INK)
    _box(ax, 11.1, y, 3.0, 10.5, _STEM, "7×7\n/2")
    _box(ax, 16.2, y, 4.8, 8.6, _STEM, "residual\nblock\n/2", size=6.6)
    _note(ax, 11.1, y - 6.3, "64 ch.\n1/2", va="top")
    _note(ax, 16.2, y - 6.3, "128 ch.\n1/4", va="top")
    _arrow(ax, [(8, y), (9.6, y)])
    _arrow(ax, [(12.6, y), (13.8, y)])
    stages = [
        ("2", 2, 2, "256", "1/4"), ("d", 2, 2, "512", "1/8"), ("d", 2, 2, "768", "1/16"), ("1", 1, 1, "1024", "1/32"),
    ]  # fmt: skip
    x, zoom = 18.6, (0.0, 0.0, 0.0)
    for i, (count, shown, levels, channels, scale) in enumerate(stages):
        height = (6.6, 5.0, 3.8, 2.9)[i]
        inner = 4.9 if levels == 2 else 3.4
        dots = 2.0 if count == "d" else 0.0
        width = shown * inner + (shown - 1) * 1.2 + dots + 2.2
        left = x + 1.2
        _arrow(ax, [(x, y), (left, y)])
        _panel(ax, left, y - 5.7, width, 11.8, 0.9, facecolor="#F5F7FA", edgecolor="#9AA5B1", linewidth=0.9, zorder=1)
        centre = left + width / 2
        ax.text(centre, 60.3, f"Stage {i + 1}", fontsize=8, fontweight="bold", ha="center", color=_INK)
        at = left + 1.1 + inner / 2
        for j in range(shown):
            if j:
                gap = at - inner - 1.2 - dots + inner / 2
                if dots:
                    _arrow(ax, [(gap, y), (gap + 0.9, y)], head=False)
                    _note(ax, gap + 1.72, y, "···", fontsize=9, fontweight="bold")
                    _arrow(ax, [(gap + 2.4, y), (at - inner / 2, y)])
                else:
                    _arrow(ax, [(gap, y), (at - inner / 2, y)])
            _glyph(ax, at, y, inner, height, levels)
            if i == 0 and j == 1:
                zoom = (at, y - height / 2, inner / 2)
            at += inner + 1.2 + dots
        plural = "U-Net" if count == "1" else "U-Nets"
        depth = "1 level" if levels == 1 else "2 levels each"
        _note(ax, centre, y - 6.3, f"{count} {plural}, {depth}\n{channels} channels, {scale} size", va="top")
        x = left + width
        if i < 3:
            _arrow(ax, [(x, y), (x + 1.0, y)])
            _box(ax, x + 2.0, y, 2.0, 5.6, _POOL, "", fill=0.5)
            ax.text(x + 2.0, y, "2×2 pool", fontsize=6.4, rotation=90, ha="center", va="center", color=_INK, zorder=4)
            x += 3.0
    _arrow(ax, [(x, y), (x + 1.4, y)])
    _box(ax, x + 3.0, y, 3.2, 8.4, _HEAD, "BN\nReLU\n1×1", size=6.8)
    _arrow(ax, [(x + 4.6, y), (x + 6.0, y)])
    ax.text(x + 3.0, 60.3, "Head", fontsize=8, fontweight="bold", ha="center", color=_INK)
    end = x + 6.0
    ax.imshow(labels, extent=(end, end + 6, y - 3, y + 3), zorder=3, aspect="auto", interpolation="nearest")
    ax.add_patch(plt.Rectangle((end, y - 3), 6, 6, fill=False, edgecolor="#666666", linewidth=0.8, zorder=4))
    _note(ax, end + 3, y - 4.3, "logits, bilinear\nto K × H × W", va="top")
    _note(
        ax, 48, 41.1, "Drawn: sunet64 (N = 64, d = 4), output stride 32.  At 16, stage 4 has no pool before it and is "
        "dilated instead of strided;  at 8, stages 3 and 4.\n"
        "As a classifier: global average pooling and a linear layer for a head.",
        fontsize=7.0,
    )  # fmt: skip
    return zoom


def _draw_unet(ax: Axes, zoom: tuple[float, float, float]) -> None:
    """The lower half: every layer of one U-Net of two levels, placed at the resolution it writes."""
    left, right, top, bottom = 2.0, 94.0, 37.6, 1.4
    frame = {"facecolor": "#FCFCFD", "edgecolor": "#9AA5B1", "linewidth": 0.9, "zorder": 0}
    _panel(ax, left, bottom, right - left, top - bottom, 1.0, **frame)
    zx, zy, half = zoom
    wedge = [(zx - half, zy - 0.4), (zx + half, zy - 0.4), (right - 1, top), (left + 1, top)]
    ax.add_patch(plt.Polygon(wedge, facecolor="#EEF1F5", edgecolor="none", zorder=0.1))
    ax.text(left + 1.6, top - 1.9, "One U-Net", fontsize=10, fontweight="bold", color=_INK, va="center")
    _note(ax, left + 13.2, top - 1.95, "C channels in and out, width N, two levels", fontsize=8, ha="left")
    rows = {0: 25.6, 1: 17.0, 2: 8.4}
    for level, name in enumerate(("1", "1/2", "1/4")):
        end = 61 if level == 2 else right - 1.2
        ax.plot([left + 4.0, end], [rows[level]] * 2, color="#E3E6EA", linewidth=0.8, zorder=0.5)
        _note(ax, left + 2.3, rows[level], name, fontsize=7.5)
    _note(ax, left + 2.3, rows[0] + 3.4, "size", fontsize=6.8)
    w, h = 4.7, 4.4
    groups = [
        ("down0", 14.3, 33.3, 0, 1, _DOWN), ("down1", 35.4, 47.6, 1, 2, _DOWN),
        ("up1", 49.2, 61.4, 1, 2, _UP), ("up0", 67.7, 86.1, 0, 1, _UP),
    ]  # fmt: skip
    for name, start, stop, first, last, color in groups:
        ground = tuple(1 - 0.07 * (1 - c) for c in to_rgb(color))
        low, high = rows[last] - h / 2 - 0.8, rows[first] + h / 2 + 0.8
        _panel(ax, start, low, stop - start, high - low, 0.8, facecolor=ground, edgecolor="none", zorder=0.2)
        _note(ax, (start + stop) / 2, low - 1.3, name, fontsize=8, fontweight="bold", color=readable_ink(color))
    layers = [
        (17.2, 0, _POINT, "1×1\nC→N"), (23.7, 1, _DOWN, "3×3\n/2"), (30.2, 1, _DOWN, "3×3"),
        (38.3, 2, _DOWN, "3×3\n/2"), (44.7, 2, _DOWN, "3×3"),
        (52.1, 1, _UP, "T 3×3\n×2"), (58.5, 1, _UP, "3×3"),
        (70.6, 0, _UP, "T 3×3\n×2"), (76.9, 0, _UP, "3×3"), (83.2, 0, _POINT, "1×1\nN→C"),
    ]  # fmt: skip
    for x, level, color, text in layers:
        _box(ax, x, rows[level], w, h, color, text)
    _box(ax, 10.0, rows[0], 4.0, h, _STEM, "x\nC", fill=0.08, size=8)
    _box(ax, 91.6, rows[0], 3.6, h, _STEM, "out\nC", fill=0.08, size=7.5)
    cat, total = (64.6, rows[1]), (88.0, rows[0])
    for centre, sign, radius in ((cat, "cat", 1.5), (total, "+", 1.1)):
        ax.add_patch(plt.Circle(centre, radius, facecolor="white", edgecolor="#444444", linewidth=1.1, zorder=3))
        ax.text(*centre, sign, ha="center", va="center", fontsize=6.2 if sign == "cat" else 10, color=_INK, zorder=4)
    e = w / 2
    places = [(x, rows[level]) for x, level, _, _ in layers]
    _arrow(ax, [(12.0, rows[0]), (places[0][0] - e, rows[0])])
    for (x, y), (to_x, to_y) in pairwise(places):
        if y == to_y:
            _arrow(ax, [(x + e, y), (to_x - e, y)])
        elif (x, y) == places[6]:
            _arrow(ax, [(x + e, y), (cat[0] - 1.5, y)])
            _arrow(ax, [(cat[0] + 1.5, y), (to_x, y), (to_x, to_y - h / 2)])
        else:
            _arrow(ax, [(x + e, y), (to_x, y), (to_x, to_y + math.copysign(h / 2, y - to_y))])
    _arrow(ax, [(places[-1][0] + e, rows[0]), (total[0] - 1.1, rows[0])])
    _arrow(ax, [(total[0] + 1.1, rows[0]), (89.8, rows[0])])
    fork, over = places[2][0] + e + 1.5, rows[1] + 4.2
    _arrow(ax, [(fork, rows[1]), (fork, over), (cat[0], over), (cat[0], rows[1] + 1.5)], _DOWN)
    _note(ax, (fork + cat[0]) / 2, over + 1.0, "what down0 returned, N channels", color=readable_ink(_DOWN))
    _note(ax, 66.6, rows[1] - 1.2, "2N", ha="left")
    skip = rows[0] + 5.4
    _arrow(ax, [(10.0, rows[0] + h / 2), (10.0, skip), (total[0], skip), (total[0], rows[0] + 1.1)])
    _note(
        ax, 49.0, skip + 1.1,
        "skip: x itself; where the channels change, x passes one BN–ReLU that both branches share, "
        "and the skip a 1×1 convolution",
    )  # fmt: skip
    _note(
        ax, 65.0, 8.2,
        "Every box is BN–ReLU–convolution; T: transposed,\nto exactly the size of what it is joined with.\n"
        "In a dilated stage nothing is strided: each level\nhas rates D, 2D going down and 2D, D going up.",
        ha="left", fontsize=7.0,
    )  # fmt: skip


def _toy_scene() -> tuple[NDArray, NDArray]:
    """A small drawn scene for the corners of the figure, and its labels: no photograph, no licence."""
    y, x = np.mgrid[0:60, 0:60] / 59.0
    labels = np.zeros((60, 60), dtype=np.uint8)
    labels[y > 0.62] = 1
    labels[(x - 0.68) ** 2 + (y - 0.45) ** 2 < 0.05] = 2
    labels[(np.abs(x - 0.27) < 0.15) & (np.abs(y - 0.6) < 0.22)] = 3
    picture = np.stack([0.62 - 0.25 * y, 0.78 - 0.2 * y, 0.92 - 0.1 * y], -1)
    for label, color in enumerate([(0.56, 0.66, 0.42), (0.85, 0.45, 0.30), (0.40, 0.42, 0.60)], start=1):
        picture[labels == label] = color
    palette = [(225, 231, 238), (0, 158, 115), (213, 94, 0), (0, 114, 178)]
    return picture, colorize(labels, np.array(palette, dtype=np.uint8))


def readable_ink(color: str) -> tuple[float, float, float]:
    """The colour, darkened until small text in it can be read on white (contrast of at least 4.5)."""
    rgb = np.array(to_rgb(color))
    while luminance(rgb) > 0.183:
        rgb = rgb * 0.92
    return (float(rgb[0]), float(rgb[1]), float(rgb[2]))


if __name__ == "__main__":
    architecture(Path(__file__).with_suffix(""))

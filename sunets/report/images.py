"""Figures made of images: heat maps, confusion matrices, receptive fields, predictions beside the truth."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import ndimage

from sunets.report.comparison import joint_estimate
from sunets.report.records import Records, quantity
from sunets.report.statistics import Estimate
from sunets.report.style import STYLE, WIDTH, legend_columns
from sunets.report.tables import class_keys, row_labels

MAX_CLASSES = 30
"""Classes beyond which a matrix cannot be read on a page."""
SMALLEST_PRINT = 4.3
"""Points of the numbers in a matrix, as long as the page is wide enough."""
FIELD_MASS = 0.95
"""Share of the input gradient that the contour of an effective receptive field encloses."""
DECADES = 3
"""Range of the logarithmic scale of receptive fields; gradients below a thousandth of the largest are drawn as that."""
CONTOUR = "#D55E00"
_PANELS = STYLE | {"axes.grid": False, "axes.titleweight": "normal", "axes.titlelocation": "center"}


def per_class(records: Records) -> Figure | None:
    """Draw the mean IoU of each class and model with its interval, as a heat map with the numbers in it."""
    keys = class_keys(records)
    if not keys or len(keys) > MAX_CLASSES:
        return None
    many = len(keys) > 12
    means: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    for model, label in row_labels(records).items():
        if records.scores(model):
            estimates = [joint_estimate(records, model, key) for key in keys]
            means[label] = [100 * e.mean if e else np.nan for e in estimates]
            texts[label] = [_cell_text(e, many=many) for e in estimates]
    if not means:
        return None
    names = [quantity(k).name.replace("_", " ") for k in keys]
    turned = max(map(len, names)) > 80 / len(names)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        letters = max(map(len, names)) if turned else 0
        fig, ax = plt.subplots(figsize=(WIDTH, 0.6 + 0.36 * len(means) + 0.045 * letters))
        heat_map(
            ax, np.array(list(means.values())), np.array(list(texts.values())), (0, 100), 6.0 if many else 7.0,
            yticklabels=False,  # seaborn lays labels out upright first, where long ones leave no room for the map
            cbar_kws={"label": "IoU (%)", "pad": 0.015, "aspect": 2.7 * len(means) + 1, "ticks": [0, 25, 50, 75, 100]},
        )  # fmt: skip
        ax.set_xticks(
            np.arange(len(names)) + 0.5, names, rotation=40 if turned else 0, ha="right" if turned else "center",
            rotation_mode="anchor" if turned else "default",
        )  # fmt: skip
        ax.set_yticks(np.arange(len(means)) + 0.5, list(means))
    return fig


def heat_map(
    ax: Axes,
    values: NDArray,
    texts: NDArray,
    limits: tuple[float, float],
    size: float,
    cmap: str = "cividis",
    **options: Any,
) -> None:
    """Draw a matrix with a text in each cell that has a number, black or white by contrast.

    `values` and `texts` are (rows, columns), NaN where there is no number; `limits` are the values at the ends of the
    colours, `size` is in points, and `options` are those of `seaborn.heatmap`.
    """
    sns.heatmap(values, vmin=limits[0], vmax=limits[1], cmap=cmap, annot=texts, fmt="", linewidths=0.8,
                linecolor="white", annot_kws={"fontsize": size}, ax=ax, **options)  # fmt: skip
    (mesh,) = ax.collections
    drawn = mesh.cmap(np.asarray(mesh.norm(values[~np.isnan(values)])))
    for text, color in zip(ax.texts, drawn, strict=True):
        text.set_color(ink(color))
    ax.tick_params(length=0)
    mesh.colorbar.outline.set_visible(False)  # type: ignore[union-attr]


def _cell_text(estimate: Estimate | None, *, many: bool) -> str:
    if estimate is None:
        return ""
    mean = f"{100 * estimate.mean:.{0 if many else 1}f}"
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean}\n[{max(0.0, 100 * estimate.low):.0f}, {min(100.0, 100 * estimate.high):.0f}]"


def luminance(color: Sequence[float]) -> float:
    """Return the relative luminance of a colour (WCAG 2), 0 to 1; red, green and blue are 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink(color: Sequence[float]) -> str:
    """Return black or white, the one with more contrast against a background: at least 4.5 to 1."""
    return "black" if luminance(color) > 0.179 else "white"


def confusion_shares(records: Records) -> tuple[dict[str, NDArray], list[str]]:
    """Sum confusion matrices over all seeds and divide each row by its sum; none of more than `MAX_CLASSES` classes.

    Returns:
        Label of a row -> (K, K) percent of the true class (row) by predicted class, NaN where the split lacks the
        class; the names of the classes.
    """
    shares: dict[str, NDArray] = {}
    for model, label in row_labels(records).items():
        matrices, _ = records.confusions(model)
        if matrices and matrices[0].shape[1] <= MAX_CLASSES:
            counts = np.sum([m.sum(axis=0, dtype=np.int64) for m in matrices], axis=0)
            total = counts.sum(axis=1, keepdims=True)
            shares[label] = np.divide(100.0 * counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    k = len(next(iter(shares.values()))) if shares else 0
    names = [n.replace("_", " ") for n in records.classes] if len(records.classes) == k else [str(i) for i in range(k)]
    return shares, names


def confusion(records: Records) -> Figure | None:
    """Draw the confusion matrices over all seeds, each row divided by its sum, one panel per model, with numbers."""
    shares, names = confusion_shares(records)
    if not shares:
        return None
    k = len(names)
    width = WIDTH - 1.3
    readable = SMALLEST_PRINT * k / 17  # inches of a panel whose numbers can be read
    columns = max(1, min(len(shares), 4, int(width / readable)))
    rows = math.ceil(len(shares) / columns)
    side = min(width / columns, max(2.6, readable))
    with plt.rc_context(_PANELS):
        inches = (side * columns + 1.3, rows * (side + 0.3) + 0.75)
        fig, axes = plt.subplots(rows, columns, figsize=inches, squeeze=False)
        for ax in axes.flat[len(shares) :]:
            ax.set_axis_off()
        for index, (label, percent) in enumerate(shares.items()):
            ax = axes.flat[index]
            drawn = ax.imshow(percent, vmin=0, vmax=100, cmap="cividis")
            ax.set_title(_wrap(label, max(10, int(13 * side))), fontsize=7.5)
            for (i, j), v in np.ndenumerate(percent):
                if not np.isnan(v):
                    size = min(7.5, 17 * side / k)
                    ax.text(j, i, f"{v:.0f}", ha="center", va="center", fontsize=size, color=ink(drawn.cmap(v / 100)))
            left, lowest = index % columns == 0, index + columns >= len(shares)
            small = min(7.0, 60 * side / k / 1.15)
            ax.set_xticks(range(k), names if lowest else [], rotation=90, fontsize=small)
            ax.set_yticks(range(k), names if left else [], fontsize=small)
            ax.tick_params(length=0, pad=2)
            for spine in ax.spines.values():
                spine.set_visible(False)
        _shared_bar(fig, axes, [0, 25, 50, 75, 100], "Share of true class (%)")
        fig.supylabel("True class", fontsize=8)
        fig.supxlabel("Predicted class", fontsize=8)
    return fig


def _shared_bar(fig: Figure, axes: NDArray, ticks: Sequence[float], label: str) -> Colorbar:
    """Draw one colour bar for all panels, as high as a row of them, beside the first row."""
    rows, anchor = len(axes), (0.0, 0.5 if len(axes) == 1 else 1.0)
    drawn = axes.flat[0].images[0]
    bar = fig.colorbar(drawn, ax=axes, shrink=0.8 / rows, aspect=22, pad=0.015, ticks=ticks, anchor=anchor, label=label)
    bar.outline.set_visible(False)
    return bar


# --- receptive field -------------------------------------------------------------------------------------------------


def receptive_field(records: Records) -> Figure | None:
    """Draw the effective receptive field of each model: the input gradient of a centre logit, on one log scale."""
    fields = {label: f for m, label in records.labels.items() if (f := records.effective_field(m)) is not None}
    shares = records.cost.set_index("label").get("receptive_field.effective_share", pd.Series(dtype=float))
    return draw_fields(fields, shares.dropna().to_dict()) if fields else None


def draw_fields(fields: Mapping[str, NDArray], shares: Mapping[Any, float]) -> Figure:
    """Draw effective receptive fields side by side on one logarithmic scale, with the contour of the 95 % area.

    The contour is drawn on a smoothed field, since single pixels are noisy (Gaussian, a fortieth of the image).
    `fields` maps the label of a model to the (H, W) absolute gradient, `shares` to the smallest share of the image that
    holds 95 % of it.
    """
    columns = min(len(fields), 4)
    rows = math.ceil(len(fields) / columns)
    shades = ["#FFFFFF", "#CFE1EF", "#6BAED6", "#2171B5", "#08306B", "#031526"]
    colors = LinearSegmentedColormap.from_list("field", shades)
    side = min((WIDTH - 0.7) / columns, 2.2)
    with plt.rc_context(_PANELS):
        fig, axes = plt.subplots(rows, columns, figsize=(side * columns + 0.7, rows * (side + 0.42)), squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, (label, field) in zip(axes.flat, fields.items(), strict=False):
            peak = float(field.max())
            shown = np.log10(np.maximum(field / peak if peak > 0 else field, 10.0**-DECADES))
            ax.imshow(shown, cmap=colors, vmin=-DECADES, vmax=0, interpolation="nearest")
            smooth = ndimage.gaussian_filter(np.asarray(field, dtype=np.float64), max(field.shape) / 40)
            if smooth.min() < (level := mass_level(smooth)):
                ax.contour(smooth, levels=[level], colors=CONTOUR, linewidths=1.1)
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(visible=True, color="#999999", linewidth=0.6)
            text = f"effective field {100 * shares[label]:.1f} %" if label in shares else ""
            ax.set_title(_wrap(label, max(10, int(14 * side))), fontsize=7.5, pad=3)
            ax.set_xlabel(text, fontsize=6.8, labelpad=3)
        bar = _shared_bar(fig, axes, range(-DECADES, 1), "Input gradient, relative")
        exponents = [f"10{str(e).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}" for e in range(-DECADES, 0)]
        bar.ax.set_yticklabels([f"≤{exponents[0]}", *exponents[1:], "1"])
    return fig


def mass_level(field: NDArray) -> float:
    """Return the level above which the fewest pixels hold `FIELD_MASS` of a field's sum."""
    values = np.sort(field.ravel())[::-1]
    return float(values[min(np.searchsorted(values.cumsum(), FIELD_MASS * values.sum()), values.size - 1)])


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One test image for the qualitative grid."""

    name: str
    image: NDArray[np.uint8]
    """(H, W, 3)."""
    truth: NDArray[np.uint8]
    """(H, W) classes, 255 where ignored."""
    predictions: Mapping[str, NDArray[np.uint8]]
    """Label of the model -> (H, W) classes."""


def qualitative(
    examples: Sequence[Example], labels: Sequence[str], classes: Sequence[str], palette: NDArray
) -> Figure | None:
    """Draw test images, their ground truth and the predictions of each model, one row per image.

    The models stand in the order of `labels`; a missing prediction leaves its cell empty. `palette` is (K, 3), 0..255.
    """
    if not examples:
        return None
    # Predictions of more models than fit beside image and truth continue on the next line.
    per_row = min(len(labels), 6)
    lines = math.ceil(len(labels) / per_row)
    cells = {"Image": (0, 0), "Truth": (0, 1)} | {k: (i // per_row, i % per_row + 2) for i, k in enumerate(labels)}
    ratio = float(np.median([e.image.shape[0] / e.image.shape[1] for e in examples]))
    cell = min(WIDTH / (per_row + 2), 1.5)
    names = list(classes) if len(classes) <= MAX_CLASSES else []
    legend_rows = math.ceil(len(names) / 6)
    with plt.rc_context(_PANELS):
        height = len(examples) * lines * (cell * ratio + 0.03) + 0.35 * lines + 0.2 * legend_rows
        width = cell * (per_row + 2)
        fig, axes = plt.subplots(len(examples) * lines, per_row + 2, figsize=(width, height), squeeze=False)
        fig.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
        for ax in axes.flat:
            ax.set_axis_off()
        for number, example in enumerate(examples):
            pictures = {"Image": example.image, "Truth": colorize(example.truth, palette)}
            pictures |= {k: colorize(v, palette) for k, v in example.predictions.items()}
            for title, (line, column) in cells.items():
                ax = axes[number * lines + line, column]
                if title in pictures:
                    ax.imshow(pictures[title], interpolation="nearest", aspect="auto")
                if number == 0:
                    ax.set_title(_wrap(title, max(8, int(cell * 15))), fontsize=7.5, pad=3)
        handles = [plt.Rectangle((0, 0), 1, 1, color=np.asarray(palette[i]) / 255) for i in range(len(names))]
        if handles:
            fig.legend(
                handles, [n.replace("_", " ") for n in names], loc="outside lower center",
                ncols=legend_columns(names, fig.get_figwidth()),
                frameon=False, handlelength=1.0, handleheight=1.0, fontsize=7,
            )  # fmt: skip
    return fig


def colorize(labels: NDArray, palette: NDArray) -> NDArray[np.uint8]:
    """Map (H, W) classes to (H, W, 3) colours; ignored pixels are white."""
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def _wrap(text: str, width: int) -> str:
    """Break a text at spaces and underscores into lines of at most `width` characters where possible."""
    lines = [""]
    for word in re.findall(r"[^\s_]*_|[^\s_]+\s*|\s+", text):
        if lines[-1].strip() and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append(word)
        else:
            lines[-1] += word
    return "\n".join(line.strip() for line in lines)

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
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sunets.report.records import Records, quantity
from sunets.report.style import STYLE, WIDTH
from sunets.report.tables import class_keys

MAX_CLASSES = 30
"""Classes beyond which a matrix cannot be read on a page."""


def per_class(records: Records) -> Figure | None:
    """Mean IoU of each class and model, as a heat map with the numbers in it."""
    keys = class_keys(records)
    if not keys or len(keys) > MAX_CLASSES:
        return None
    rows = {}
    for model, label in records.labels.items():
        if records.scores(model):
            by_class = [list(records.scores(model, key).values()) for key in keys]
            rows[label] = [100 * float(np.mean(v)) if v else np.nan for v in by_class]
    if not rows:
        return None
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[quantity(k).name for k in keys])
    names = [n.replace("_", " ") for n in frame.columns]
    turned = max(map(len, names)) > 80 / len(names)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        fig, ax = plt.subplots(
            figsize=(WIDTH, 0.6 + 0.3 * len(rows) + (0.045 * max(map(len, names)) if turned else 0.0))
        )
        many = frame.shape[1] > 12
        sns.heatmap(
            frame, vmin=0, vmax=100, cmap="cividis", annot=True, fmt=".0f" if many else ".1f", linewidths=0.8,
            linecolor="white", annot_kws={"fontsize": 6.0 if many else 7.5}, ax=ax,
            cbar_kws={"label": "IoU (%)", "pad": 0.015, "aspect": 2.7 * len(rows) + 1, "ticks": [0, 25, 50, 75, 100]},
        )  # fmt: skip
        ax.set_xticks(
            np.arange(len(names)) + 0.5, names, rotation=40 if turned else 0, ha="right" if turned else "center",
            rotation_mode="anchor" if turned else "default",
        )  # fmt: skip
        ax.tick_params(length=0)
        ax.tick_params(axis="y", rotation=0)
        ax.collections[0].colorbar.outline.set_visible(False)  # type: ignore[union-attr]
    return fig


def confusion(records: Records) -> Figure | None:
    """Confusion matrices over all seeds, each row divided by its sum, one panel a model."""
    found = {}
    for model, label in records.labels.items():
        matrices, _ = records.confusions(model)
        if matrices and matrices[0].shape[1] <= MAX_CLASSES:
            found[label] = np.sum([m.sum(axis=0, dtype=np.int64) for m in matrices], axis=0)
    if not found:
        return None
    k = next(iter(found.values())).shape[0]
    names = [n.replace("_", " ") for n in records.classes] if len(records.classes) == k else [str(i) for i in range(k)]
    columns = min(len(found), 4 if k <= 8 else 3 if k <= 14 else 2)
    rows = math.ceil(len(found) / columns)
    side = min((WIDTH - 1.3) / columns, 2.6)
    with plt.rc_context(STYLE | {"axes.grid": False, "axes.titleweight": "normal", "axes.titlelocation": "center"}):
        fig, axes = plt.subplots(
            rows, columns, figsize=(side * columns + 1.3, rows * (side + 0.3) + 0.75), squeeze=False
        )
        for ax in axes.flat[len(found) :]:
            ax.set_axis_off()
        for index, (label, matrix) in enumerate(found.items()):
            ax = axes.flat[index]
            total = matrix.sum(axis=1, keepdims=True)
            share = np.divide(100.0 * matrix, total, out=np.full(matrix.shape, np.nan), where=total > 0)
            ax.imshow(share, vmin=0, vmax=100, cmap="cividis")
            ax.set_title(_wrap(label, max(10, int(13 * side))), fontsize=7.5)
            size = min(7.5, 38 * side / k / 2.2)
            if size >= 4.5:
                for (i, j), v in np.ndenumerate(share):
                    if not np.isnan(v):
                        ink = "white" if v < 55 else "black"
                        ax.text(j, i, f"{v:.0f}", ha="center", va="center", fontsize=size, color=ink)
            left, lowest = index % columns == 0, index + columns >= len(found)
            small = min(7.0, 60 * side / k / 1.15)
            ax.set_xticks(range(k), names if lowest else [], rotation=90, fontsize=small)
            ax.set_yticks(range(k), names if left else [], fontsize=small)
            ax.tick_params(length=0, pad=2)
            for spine in ax.spines.values():
                spine.set_visible(False)
        bar = _shared_bar(fig, axes, [0, 25, 50, 75, 100])
        bar.set_label("Share of true class (%)")
        fig.supylabel("True class", fontsize=8)
        fig.supxlabel("Predicted class", fontsize=8)
    return fig


def _shared_bar(fig: Figure, axes: NDArray, ticks: Sequence[float]) -> Colorbar:
    """One colour bar for all panels, as high as a row of them, beside the first."""
    rows = len(axes)
    bar = fig.colorbar(
        axes.flat[0].images[0], ax=axes, shrink=0.8 / rows, aspect=22, pad=0.015, ticks=ticks,
        anchor=(0.0, 0.5 if rows == 1 else 1.0),
    )  # fmt: skip
    bar.outline.set_visible(False)
    return bar


# --- receptive field -------------------------------------------------------------------------------------------------


def receptive_field(records: Records) -> Figure | None:
    """Where the input gradient of a centre logit lies: panels of all models on one logarithmic scale."""
    fields = {label: f for m, label in records.labels.items() if (f := records.effective_field(m)) is not None}
    shares = records.cost.set_index("label").get("receptive_field.effective_share", pd.Series(dtype=float))
    return draw_fields(fields, shares.dropna().to_dict()) if fields else None


def draw_fields(fields: Mapping[str, NDArray], shares: Mapping[Any, float]) -> Figure:
    """Draw effective receptive fields side by side, over five decades.

    Args:
        fields: label of a model -> (H, W) sizes of the gradient.
        shares: label of a model -> share of the image that holds 95 % of them.
    """
    columns = min(len(fields), 4)
    rows = math.ceil(len(fields) / columns)
    shades = ["#FFFFFF", "#CFE1EF", "#6BAED6", "#2171B5", "#08306B", "#031526"]
    colors = LinearSegmentedColormap.from_list("field", shades)
    side = min((WIDTH - 0.7) / columns, 2.2)
    with plt.rc_context(STYLE | {"axes.grid": False, "axes.titleweight": "normal", "axes.titlelocation": "center"}):
        fig, axes = plt.subplots(rows, columns, figsize=(side * columns + 0.7, rows * (side + 0.42)), squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, (label, field) in zip(axes.flat, fields.items(), strict=False):
            peak = float(field.max())
            shown = np.log10(np.maximum(field / peak if peak > 0 else field, 1e-5))
            ax.imshow(shown, cmap=colors, vmin=-5, vmax=0, interpolation="nearest")
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(visible=True, color="#999999", linewidth=0.6)
            text = f"effective field {100 * shares[label]:.1f} %" if label in shares else ""
            ax.set_title(_wrap(label, max(10, int(14 * side))), fontsize=7.5, pad=3)
            ax.set_xlabel(text, fontsize=6.8, labelpad=3)
        bar = _shared_bar(fig, axes, [-5, -4, -3, -2, -1, 0])
        bar.ax.set_yticklabels(["≤10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"])
        bar.set_label("Input gradient over its largest")
    return fig


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
    """Test images, their truth and what each model says, one row an image.

    Args:
        examples: the rows.
        labels: the models, in order; a model without a prediction leaves its cell empty.
        classes: K names, for the legend.
        palette: (K, 3) colours, 0..255.
    """
    if not examples:
        return None
    # Pictures of more models than fit beside image and truth go on below them.
    per_row = min(len(labels), 6)
    lines = math.ceil(len(labels) / per_row)
    places = {"Image": (0, 0), "Truth": (0, 1)} | {k: (i // per_row, i % per_row + 2) for i, k in enumerate(labels)}
    ratio = float(np.median([e.image.shape[0] / e.image.shape[1] for e in examples]))
    cell = min(WIDTH / (per_row + 2), 1.5)
    names = list(classes) if len(classes) <= MAX_CLASSES else []
    legend_rows = math.ceil(len(names) / 6)
    with plt.rc_context(STYLE | {"axes.grid": False, "axes.titlelocation": "center", "axes.titleweight": "normal"}):
        height = len(examples) * lines * (cell * ratio + 0.03) + 0.35 * lines + 0.2 * legend_rows
        width = cell * (per_row + 2)
        fig, axes = plt.subplots(len(examples) * lines, per_row + 2, figsize=(width, height), squeeze=False)
        fig.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
        for ax in axes.flat:
            ax.set_axis_off()
        for number, example in enumerate(examples):
            pictures = {"Image": example.image, "Truth": colorize(example.truth, palette)}
            pictures |= {k: colorize(v, palette) for k, v in example.predictions.items()}
            for title, (line, column) in places.items():
                ax = axes[number * lines + line, column]
                if title in pictures:
                    ax.imshow(pictures[title], interpolation="nearest", aspect="auto")
                if number == 0:
                    ax.set_title(_wrap(title, max(8, int(cell * 15))), fontsize=7.5, pad=3)
        handles = [plt.Rectangle((0, 0), 1, 1, color=np.asarray(palette[i]) / 255) for i in range(len(names))]
        if handles:
            fig.legend(
                handles, [n.replace("_", " ") for n in names], loc="outside lower center", ncols=min(6, len(names)),
                frameon=False, handlelength=1.0, handleheight=1.0, fontsize=7,
            )  # fmt: skip
    return fig


def colorize(labels: NDArray, palette: NDArray) -> NDArray[np.uint8]:
    """(H, W) classes -> (H, W, 3) colours; ignored pixels are white."""
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def _wrap(text: str, width: int) -> str:
    """Lines of at most this many characters where spaces and underscores allow it."""
    lines = [""]
    for word in re.findall(r"[^\s_]*_|[^\s_]+\s*|\s+", text):
        if lines[-1].strip() and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append(word)
        else:
            lines[-1] += word
    return "\n".join(line.strip() for line in lines)

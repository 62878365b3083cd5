"""Figures of a benchmark: records -> matplotlib figures; `style` says how they look."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from sunets.report.records import FINISHED, Quantity, Records, quantity
from sunets.report.statistics import Estimate, mean_interval
from sunets.report.style import STYLE, WIDTH, Style, model_styles, save_figure
from sunets.report.tables import class_keys

MAX_CLASSES = 30
"""Classes beyond which a matrix cannot be read on a page."""

# --- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(records: Records) -> Figure | None:
    """Every seed's headline score, and the mean with its interval, one row a model."""
    scores = {m: s for m in records.labels if (s := records.scores(m))}
    if not scores:
        return None
    q, styles = quantity(records.headline), model_styles(records.labels)
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH * 0.72, 0.75 + 0.34 * len(scores)))
        for y, (model, by_seed) in enumerate(scores.items()):
            style, values = styles[model], [q.scale * v for v in by_seed.values()]
            estimate = mean_interval(values)
            ax.scatter(values, [y + 0.2] * len(values), s=11, color=style.color, alpha=0.5, linewidths=0, zorder=2)
            _interval_bar(ax, estimate.mean, y - 0.1, estimate, style, horizontal=True)
        ax.set_yticks(range(len(scores)), [records.labels[m] for m in scores])
        ax.set_ylim(len(scores) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.margins(x=0.08)
        better = "higher is better" if q.higher_is_better else "lower is better"
        ax.set_xlabel(f"{q.heading}, {better}")
    return fig


def accuracy_cost(records: Records) -> Figure | None:
    """Headline score against multiply-adds and against parameters, with intervals over the seeds."""
    cost = records.cost[records.cost.status == FINISHED].set_index("model")
    panels = [k for k in ("cost.gmacs", "cost.params_m") if cost[k].notna().any()]
    scores = {m: s for m in cost.index if (s := records.scores(m))}
    if not panels or not scores:
        return None
    q, styles = quantity(records.headline), model_styles(records.labels)
    with plt.rc_context(STYLE):
        height = 3.0 + 0.12 * max(0, len(scores) - 6)
        fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, height), sharey=True, squeeze=False)
        drawn: list[tuple[Axes, list[_Point]]] = []
        for ax, key in zip(axes[0], panels, strict=True):
            points = []
            for model, x in cost[key].dropna().items():
                if model in scores and x > 0:
                    estimate = mean_interval([q.scale * v for v in scores[model].values()])
                    _interval_bar(ax, x, estimate.mean, estimate, styles[model], horizontal=False)
                    points.append(_Point(x, estimate, records.labels[model], styles[model].color))
            ax.margins(y=0.16)
            logarithmic = _cost_axis(ax, [p.x for p in points])
            ax.set_xlabel(quantity(key).heading + (", logarithmic" if logarithmic else ""))
            drawn.append((ax, points))
        axes[0][0].set_ylabel(q.heading)
        if not q.higher_is_better:
            axes[0][0].invert_yaxis()  # up is better in every figure
            axes[0][0].set_ylabel(f"{q.heading}, inverted")
        fig.draw_without_rendering()
        fig.set_layout_engine("none")  # labels are placed in the layout as it is now
        for ax, points in drawn:
            _place_labels(ax, points)
    return fig


@dataclass(frozen=True)
class _Point:
    x: float
    y: Estimate
    text: str
    color: str


def _interval_bar(ax: Axes, x: float, y: float, e: Estimate, style: Style, *, horizontal: bool) -> None:
    half = e.half_width
    error: dict[str, Any] = {"xerr" if horizontal else "yerr": half} if half is not None else {}
    ax.errorbar(
        x, y, **error, fmt=style.marker, color=style.color, markersize=5.5, markeredgecolor="white",
        markeredgewidth=0.7, elinewidth=1.3, capsize=2.5, capthick=1.3, zorder=3,
    )  # fmt: skip


def _cost_axis(ax: Axes, values: Sequence[float]) -> bool:
    """Room for labels beside the points, plain numbers; logarithmic, and True, where costs differ by a factor of 3."""
    low, high = min(values), max(values)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    if high < 3 * low:
        room = max(high - low, 0.1 * high) * 0.25
        ax.set_xlim(low - room, high + room)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        return False
    room = math.log10(high / low) * 0.22
    left, right = low / 10**room, high * 10**room
    ax.set_xscale("log")
    ax.set_xlim(left, right)
    exponents = range(math.floor(math.log10(left)) - 1, math.ceil(math.log10(right)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**e for e in exponents for s in steps if left <= s * 10.0**e <= right]
        if len(ticks) <= 6:
            break
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return True


def _place_labels(ax: Axes, points: Sequence[_Point], fontsize: float = 7.5) -> None:
    """Write each point's name beside it: of many places, the near one that covers least of labels, bars and edge."""
    fig = ax.get_figure()
    assert isinstance(fig, Figure)
    renderer = fig.canvas.get_renderer()  # type: ignore[attr-defined]
    pt = fig.dpi / 72  # pixels of a point
    anchors = ax.transData.transform([(p.x, p.y.mean) for p in points])
    # Boxes are rows of left, bottom, right, top in pixels.
    bars = np.empty((len(points), 4))
    sizes = np.empty((len(points), 2))
    for i, p in enumerate(points):
        ends = ax.transData.transform([(p.x, p.y.mean if v is None else v) for v in (p.y.low, p.y.high)])
        bars[i] = [ends[0, 0] - 3.5 * pt, ends[:, 1].min() - 3 * pt, ends[0, 0] + 3.5 * pt, ends[:, 1].max() + 3 * pt]
        probe = ax.text(p.x, p.y.mean, p.text, fontsize=fontsize)
        sizes[i] = probe.get_window_extent(renderer).size
        probe.remove()
    frame = np.array(ax.get_window_extent(renderer).extents)

    def overlap(boxes: NDArray, others: NDArray) -> NDArray:
        low = np.maximum(boxes[:, None, :2], others[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
        return np.prod(np.maximum(high - low, 0), axis=-1).sum(axis=1)

    def candidates(i: int) -> tuple[NDArray, NDArray]:
        """Boxes right of, left of, above and below a point, and what each costs by its distance."""
        (w, h), (x, y), gaps = sizes[i], anchors[i], pt * np.arange(3, 64, 6)
        beside = np.concatenate([[0], *[[g, -g] for g in pt * np.arange(6, 73, 6)]]) - h / 2
        spots = [(bars[i, 2] + g, y + dy) for g in gaps for dy in beside]
        spots += [(bars[i, 0] - g - w, y + dy) for g in gaps for dy in beside]
        spots += [
            (x - part * w, at) for part in (0.5, 0.2, 0.8) for g in gaps for at in (bars[i, 3] + g, bars[i, 1] - g - h)
        ]
        low = np.array(spots)
        boxes = np.hstack([low, low + sizes[i]])
        away = np.maximum(np.maximum(boxes[:, :2] - [x, y], [x, y] - boxes[:, 2:]), 0)
        return boxes, np.hypot(*away.T) / pt + np.arange(len(boxes)) * 1e-3

    placed = np.zeros((len(points), 4))
    for _ in range(4):  # later sweeps let early labels move out of the way
        for i in range(len(points)):
            boxes, far = candidates(i)
            outside = np.prod(sizes[i]) - overlap(boxes, frame[None])
            hit = overlap(boxes, bars) + 2 * overlap(boxes, np.delete(placed, i, axis=0))
            placed[i] = boxes[np.argmin(2 * far + outside + hit)]
    inverse = ax.transData.inverted()
    for p, box, anchor in zip(points, placed, anchors, strict=True):
        near = np.clip(anchor, box[:2], box[2:])
        if math.dist(near, anchor) > 14 * pt:
            line = inverse.transform([near, anchor])
            ax.plot(line[:, 0], line[:, 1], color=p.color, linewidth=0.6, alpha=0.7, zorder=1)
        x, y = inverse.transform((box[0], (box[1] + box[3]) / 2))
        ax.text(x, y, p.text, fontsize=fontsize, color=_ink(p.color), va="center", ha="left", zorder=5)


def _ink(color: str) -> tuple[float, float, float]:
    """The colour, darkened until small text in it can be read on white (contrast of at least 4.5)."""
    rgb = np.array(to_rgb(color))
    while _luminance(rgb) > 0.183:
        rgb = rgb * 0.92
    return (float(rgb[0]), float(rgb[1]), float(rgb[2]))


def _luminance(rgb: NDArray) -> float:
    """Relative luminance (WCAG 2)."""
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


# --- training --------------------------------------------------------------------------------------------------------


def training_curves(records: Records) -> Figure | None:
    """Training loss and validation score by epoch: mean over the seeds, band of the 95 % interval."""
    history = records.history
    short = records.headline.removeprefix("score.")
    wanted = [("train.loss", Quantity("Training loss")), (f"val.{short}", _prefixed("Validation", records.headline))]
    panels = [(k, q) for k, q in wanted if k in history and history[k].notna().any()]
    if not panels:
        return None
    styles = {records.labels[k]: s for k, s in model_styles(records.labels).items()}
    present = [label for label in records.labels.values() if (history.label == label).any()]
    with plt.rc_context(STYLE):
        height = 2.85 + 0.16 * math.ceil(len(present) / 4)
        fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, height), squeeze=False)
        for ax, (key, q) in zip(axes[0], panels, strict=True):
            data = history[history[key].notna()]
            data = data.assign(shown=q.scale * data[key])
            sns.lineplot(
                data=data, x="epoch", y="shown", hue="label", style="label", hue_order=present, style_order=present,
                palette={k: styles[k].color for k in present}, markers={k: styles[k].marker for k in present},
                dashes={k: "" if styles[k].line == "-" else styles[k].line[1] for k in present},
                errorbar=_band, err_kws={"alpha": 0.16, "linewidth": 0}, linewidth=1.4, markersize=4.2,
                markeredgewidth=0.4, legend=False, ax=ax,
            )  # fmt: skip
            ax.set(xlabel="Epoch", ylabel=q.heading)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            ax.set_xlim(left=0)
            ax.margins(y=0.06)
        handles = [
            plt.Line2D([], [], color=styles[k].color, marker=styles[k].marker, linestyle=styles[k].line, markersize=4.5,
                       markeredgecolor="white", markeredgewidth=0.4)
            for k in present
        ]  # fmt: skip
        fig.legend(handles, present, loc="outside lower center", ncols=min(4, len(present)), frameon=False)
    return fig


def _prefixed(word: str, key: str) -> Quantity:
    q = quantity(key)
    name = q.name if q.name.startswith("mIoU") else q.name[0].lower() + q.name[1:]
    return Quantity(f"{word} {name}", q.unit, q.scale, q.digits, q.higher_is_better)


def _band(values: pd.Series) -> tuple[float, float]:
    estimate = mean_interval(values.tolist())
    return (estimate.low, estimate.high) if estimate.low is not None and estimate.high is not None else (np.nan, np.nan)


# --- classes ---------------------------------------------------------------------------------------------------------


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
    fields = {m: f for m in records.labels if (f := records.effective_field(m)) is not None}
    if not fields:
        return None
    cost = records.cost.set_index("model")
    columns = min(len(fields), 4)
    rows = math.ceil(len(fields) / columns)
    shades = ["#FFFFFF", "#CFE1EF", "#6BAED6", "#2171B5", "#08306B", "#031526"]
    colors = LinearSegmentedColormap.from_list("field", shades)
    side = min((WIDTH - 0.7) / columns, 2.2)
    with plt.rc_context(STYLE | {"axes.grid": False, "axes.titleweight": "normal", "axes.titlelocation": "center"}):
        fig, axes = plt.subplots(rows, columns, figsize=(side * columns + 0.7, rows * (side + 0.42)), squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, (model, field) in zip(axes.flat, fields.items(), strict=False):
            peak = float(field.max())
            shown = np.log10(np.maximum(field / peak if peak > 0 else field, 1e-5))
            ax.imshow(shown, cmap=colors, vmin=-5, vmax=0, interpolation="nearest")
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(visible=True, color="#999999", linewidth=0.6)
            share = cost.loc[model].get("field.effective_share") if model in cost.index else None
            text = f"effective field {100 * share:.1f} %" if share is not None and share == share else ""
            ax.set_title(_wrap(records.labels[model], max(10, int(14 * side))), fontsize=7.5, pad=3)
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


DRAWN: dict[str, Callable[[Records], Figure | None]] = {
    "accuracy": accuracy,
    "accuracy_cost": accuracy_cost,
    "training_curves": training_curves,
    "per_class": per_class,
    "confusion": confusion,
    "receptive_field": receptive_field,
}
"""File stem -> what draws it from records alone."""


# --- the architecture ------------------------------------------------------------------------------------------------

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


def _box(
    ax: Axes, x: float, y: float, w: float, h: float, color: str, text: str, *, fill: float = 0.16, size: float = 7.0
) -> None:
    """A rounded box centred on (x, y), its colour as frame and, lightened, as ground."""
    ground = tuple(1 - fill * (1 - c) for c in to_rgb(color))
    ax.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0,rounding_size=0.7", facecolor=ground, edgecolor=color,
            linewidth=1.1, zorder=3,
        )
    )  # fmt: skip
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
    ax.imshow(_toy_picture(), extent=(2, 8, y - 3, y + 3), zorder=3, aspect="auto", interpolation="bilinear")
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
        ax.add_patch(
            FancyBboxPatch(
                (left, y - 5.7), width, 11.8, boxstyle="round,pad=0,rounding_size=0.9", facecolor="#F5F7FA",
                edgecolor="#9AA5B1", linewidth=0.9, zorder=1,
            )
        )  # fmt: skip
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
    ax.imshow(_toy_labels(), extent=(end, end + 6, y - 3, y + 3), zorder=3, aspect="auto", interpolation="nearest")
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
    ax.add_patch(
        FancyBboxPatch(
            (left, bottom), right - left, top - bottom, boxstyle="round,pad=0,rounding_size=1.0", facecolor="#FCFCFD",
            edgecolor="#9AA5B1", linewidth=0.9, zorder=0,
        )
    )  # fmt: skip
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
        ax.add_patch(
            FancyBboxPatch(
                (start, low), stop - start, high - low, boxstyle="round,pad=0,rounding_size=0.8", facecolor=ground,
                edgecolor="none", zorder=0.2,
            )
        )  # fmt: skip
        _note(ax, (start + stop) / 2, low - 1.3, name, fontsize=8, fontweight="bold", color=_ink(color))
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
    _note(ax, (fork + cat[0]) / 2, over + 1.0, "what down0 returned, N channels", color=_ink(_DOWN))
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


def _toy_picture() -> NDArray:
    """A small drawn scene for the corner of the figure: no photograph, no licence."""
    y, x = np.mgrid[0:60, 0:60] / 59.0
    picture = np.stack([0.62 - 0.25 * y, 0.78 - 0.2 * y, 0.92 - 0.1 * y], -1)
    picture[y > 0.62] = (0.56, 0.66, 0.42)
    picture[(x - 0.68) ** 2 + (y - 0.45) ** 2 < 0.05] = (0.85, 0.45, 0.30)
    picture[(np.abs(x - 0.27) < 0.15) & (np.abs(y - 0.6) < 0.22)] = (0.40, 0.42, 0.60)
    return picture


def _toy_labels() -> NDArray:
    y, x = np.mgrid[0:60, 0:60] / 59.0
    labels = np.zeros((60, 60), dtype=np.uint8)
    labels[y > 0.62] = 1
    labels[(x - 0.68) ** 2 + (y - 0.45) ** 2 < 0.05] = 2
    labels[(np.abs(x - 0.27) < 0.15) & (np.abs(y - 0.6) < 0.22)] = 3
    return colorize(labels, np.array([(225, 231, 238), (0, 158, 115), (213, 94, 0), (0, 114, 178)], dtype=np.uint8))

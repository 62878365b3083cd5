"""Figures of a benchmark: records -> matplotlib figures; `style` says how they look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from sunets.report.images import confusion, per_class, receptive_field
from sunets.report.records import FINISHED, Quantity, Records, quantity
from sunets.report.statistics import Estimate, mean_interval
from sunets.report.style import STYLE, WIDTH, Style, model_styles


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
        ax.text(x, y, p.text, fontsize=fontsize, color=readable_ink(p.color), va="center", ha="left", zorder=5)


def readable_ink(color: str) -> tuple[float, float, float]:
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


DRAWN: dict[str, Callable[[Records], Figure | None]] = {
    "accuracy": accuracy,
    "accuracy_cost": accuracy_cost,
    "training_curves": training_curves,
    "per_class": per_class,
    "confusion": confusion,
    "receptive_field": receptive_field,
}
"""File stem -> what draws it from records alone."""

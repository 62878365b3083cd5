"""Figures of a benchmark: records -> matplotlib figures; `style` says how they look."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sunets.core.metrics import higher_is_better
from sunets.report.comparison import joint_estimate, within_range
from sunets.report.images import confusion, per_class, receptive_field
from sunets.report.records import FINISHED, Quantity, Records, quantity
from sunets.report.statistics import Estimate, mean_interval
from sunets.report.style import STYLE, WIDTH, Style, legend_columns, model_styles
from sunets.report.tables import SIZE_KEYS, row_labels


def accuracy(records: Records) -> Figure | None:
    """Draw every seed's headline score, and the mean with its interval; one row per model."""
    scores = {m: s for m in records.labels if (s := records.scores(m))}
    if not scores:
        return None
    q, styles = quantity(records.headline), model_styles(records.labels)
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH * 0.72, 0.75 + 0.34 * len(scores)))
        for y, (model, by_seed) in enumerate(scores.items()):
            style, values = styles[model], [q.scale * v for v in by_seed.values()]
            ax.scatter(values, [y + 0.2] * len(values), s=11, color=style.color, alpha=0.5, linewidths=0, zorder=2)
            estimate = _shown_estimate(records, model, records.headline)
            interval_bar(ax, estimate.mean, y - 0.1, estimate, style, horizontal=True)
        name_rows(ax, _labels(records, scores))
        ax.margins(x=0.08)
        better = "higher is better" if higher_is_better(records.headline) else "lower is better"
        ax.set_xlabel(f"{q.heading}, {better}")
    return fig


def accuracy_cost(records: Records) -> Figure | None:
    """Draw the headline score against multiply-adds and against parameters, with the intervals of the table."""
    cost = records.cost[records.cost.status == FINISHED].set_index("model")
    panels = [k for k in ("cost.gmacs", "cost.params_m") if cost[k].notna().any()]
    scores = {m: s for m in cost.index if (s := records.scores(m))}
    if not panels or not scores:
        return None
    q, styles = quantity(records.headline), model_styles(records.labels)
    with plt.rc_context(STYLE):
        labels = _labels(records, scores)
        size = (WIDTH, 2.8 + _legend_height(labels))
        fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        for ax, key in zip(axes[0], panels, strict=True):
            costs = {m: x for m, x in cost[key].dropna().items() if m in scores and x > 0}
            for model, x in costs.items():
                estimate = _shown_estimate(records, model, records.headline)
                interval_bar(ax, x, estimate.mean, estimate, styles[model])
            ax.margins(y=0.1)
            logarithmic = _cost_axis(ax, list(costs.values()))
            ax.set_xlabel(quantity(key).heading + (", logarithmic" if logarithmic else ""))
        axes[0][0].set_ylabel(q.heading)
        if not higher_is_better(records.headline):
            axes[0][0].invert_yaxis()  # up is better in every figure
            axes[0][0].set_ylabel(f"{q.heading}, inverted")
        _legend(fig, [styles[m] for m in scores], labels, lines=False)
    return fig


def object_size(records: Records) -> Figure | None:
    """Draw the mean class accuracy on small, medium and large objects, with intervals over the seeds."""
    models = [m for m in records.labels if all(records.scores(m, key) for key in SIZE_KEYS)]
    if not models:
        return None
    styles = model_styles(records.labels)
    with plt.rc_context(STYLE):
        labels = _labels(records, models)
        fig, ax = plt.subplots(figsize=(WIDTH * 0.72, 2.8 + _legend_height(labels, WIDTH * 0.72)))
        for number, model in enumerate(models):
            shift = 0.6 * ((number + 0.5) / len(models) - 0.5)
            for x, key in enumerate(SIZE_KEYS):
                estimate = _shown_estimate(records, model, key)
                interval_bar(ax, x + shift, estimate.mean, estimate, styles[model])
        ax.set_xticks(range(len(SIZE_KEYS)), [quantity(key).name for key in SIZE_KEYS])
        ax.set_xlim(-0.5, len(SIZE_KEYS) - 0.5)
        ax.grid(axis="x", visible=False)
        ax.set_ylabel("Mean class accuracy (%)")
        _legend(fig, [styles[m] for m in models], labels, lines=False, width=WIDTH * 0.72)
    return fig


def name_rows(ax: Axes, names: Iterable[str]) -> None:
    """Label the rows of a figure, the first at the top."""
    names = list(names)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)


def _labels(records: Records, models: Iterable[str]) -> list[str]:
    labels = row_labels(records)
    return [labels[m] for m in models]


def _shown_estimate(records: Records, model: str, key: str) -> Estimate:
    """Return a score that a model has: mean and interval over seeds and images, in the unit of the figure."""
    estimate = joint_estimate(records, model, key)
    assert estimate is not None
    return estimate.scaled(quantity(key).scale)


def _legend(fig: Figure, styles: Sequence[Style], labels: Sequence[str], *, lines: bool, width: float = WIDTH) -> None:
    """Name the models below the panels, by marker and colour."""
    handles = [
        plt.Line2D([], [], color=s.color, marker=s.marker, linestyle=s.line if lines else "", markersize=4.5,
                   markeredgecolor="white", markeredgewidth=0.4)
        for s in styles
    ]  # fmt: skip
    fig.legend(handles, labels, loc="outside lower center", ncols=legend_columns(labels, width), frameon=False)


def _legend_height(labels: Sequence[str], width: float = WIDTH) -> float:
    """Return the height of the legend below a figure, in inches."""
    return 0.16 * math.ceil(len(labels) / legend_columns(labels, width)) if labels else 0.0


def interval_bar(
    ax: Axes,
    x: float,
    y: float,
    e: Estimate,
    style: Style,
    *,
    horizontal: bool = False,
    hollow: bool = False,
    **options: Any,
) -> None:
    """Draw a point and its interval; a hollow one has a white centre."""
    error: dict[str, Any] = {}
    if e.low is not None and e.high is not None:
        error["xerr" if horizontal else "yerr"] = [[e.mean - e.low], [e.high - e.mean]]
    face, edge = ("white", style.color) if hollow else (style.color, "white")
    ax.errorbar(
        x, y, **error, fmt=style.marker, color=style.color, markersize=5.5, markerfacecolor=face, markeredgecolor=edge,
        markeredgewidth=1.0 if hollow else 0.7, elinewidth=1.3, capsize=2.5, capthick=1.3, zorder=3, **options,
    )  # fmt: skip


def _cost_axis(ax: Axes, values: Sequence[float]) -> bool:
    """Give the cost axis margins and plain numbers; return whether it is logarithmic, for costs a factor of 3 apart."""
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


# --- training --------------------------------------------------------------------------------------------------------


def training_curves(records: Records) -> Figure | None:
    """Draw the training loss and validation score by epoch: mean over the seeds, band of the 95 % interval."""
    history = records.history
    validation = records.validation, _prefixed("Validation", records.headline)
    wanted = [("train.loss", Quantity("Training loss")), validation]
    panels = [(k, q) for k, q in wanted if k in history and history[k].notna().any()]
    if not panels:
        return None
    labels = row_labels(records)
    styles = {labels[k]: s for k, s in model_styles(records.labels).items()}
    present = [label for model, label in labels.items() if (history.model == model).any()]
    with plt.rc_context(STYLE):
        size = (WIDTH, 2.85 + _legend_height(present))
        fig, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
        for ax, (key, q) in zip(axes[0], panels, strict=True):
            data = history[history[key].notna()]
            data = data.assign(shown=q.scale * data[key], label=data.model.map(labels))
            sns.lineplot(
                data=data, x="epoch", y="shown", hue="label", style="label", hue_order=present, style_order=present,
                palette={k: styles[k].color for k in present}, markers={k: styles[k].marker for k in present},
                dashes={k: "" if styles[k].line == "-" else styles[k].line[1] for k in present},
                errorbar=functools.partial(_band, q), err_kws={"alpha": 0.16, "linewidth": 0}, linewidth=1.4,
                markersize=4.2, markeredgewidth=0.4, legend=False, ax=ax,
            )  # fmt: skip
            for line in ax.lines:
                line.set_markevery(max(1, len(line.get_xdata()) // 20))
            ax.set(xlabel="Epoch", ylabel=q.heading)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            ax.set_xlim(left=0)
            ax.margins(y=0.06)
        _legend(fig, [styles[k] for k in present], present, lines=True)
    return fig


def _prefixed(word: str, key: str) -> Quantity:
    q = quantity(key)
    name = q.name if q.name.startswith("mIoU") else q.name[0].lower() + q.name[1:]
    return Quantity(f"{word} {name}", q.unit, q.scale, q.digits)


def _band(q: Quantity, values: pd.Series) -> tuple[float, float]:
    e = within_range(q, mean_interval((values / q.scale).tolist())).scaled(q.scale)
    return (e.low, e.high) if e.low is not None and e.high is not None else (np.nan, np.nan)


def tuning(records: Records) -> Figure | None:
    """Draw the best validation score so far by trial, one line per model, and every trial as a dot."""
    trials = {model: frame for model in records.labels if len(frame := records.trials(model))}
    if not trials:
        return None
    q, styles = _prefixed("Validation", records.headline), model_styles(records.labels)
    labels = row_labels(records)
    first = {m: "first" if "first" in frame else records.validation for m, frame in trials.items()}
    frames = {labels[m]: frame.rename(columns={first[m]: "score"}) for m, frame in trials.items()}
    return draw_trials(frames, [styles[m] for m in trials], "Trial", q)


def draw_trials(trials: Mapping[str, pd.DataFrame], styles: Sequence[Style], xlabel: str, q: Quantity) -> Figure:
    """Draw every trial as a dot, or a cross below where it did not finish, and the best score so far as a line.

    `trials` maps the label of a line to number, status, score and best of its trials; `xlabel` says what they are.
    """
    labels = list(trials) if len(trials) > 1 else []
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH * 0.72, 2.7 + _legend_height(labels, WIDTH * 0.72)))
        for i, (frame, look) in enumerate(zip(trials.values(), styles, strict=True)):
            score, best = (q.scale * frame[column].astype(float) for column in ("score", "best"))
            ax.scatter(frame.number, score, s=14, color=look.color, marker=look.marker, alpha=0.5, linewidths=0)
            ax.plot(frame.number, best, color=look.color, linestyle=look.line, drawstyle="steps-post", linewidth=1.3)
            lost = frame.number[frame.status != FINISHED]
            ax.scatter(lost, [0.02 + 0.03 * (i % 8)] * len(lost), marker="x", s=14, color=look.color,
                       transform=ax.get_xaxis_transform(), clip_on=False)  # fmt: skip
        ax.set(xlabel=xlabel, ylabel=q.heading)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.margins(y=0.1)
        if labels:
            _legend(fig, styles, labels, lines=True, width=WIDTH * 0.72)
    return fig


DRAWN: dict[str, Callable[[Records], Figure | None]] = {
    "accuracy": accuracy,
    "accuracy_cost": accuracy_cost,
    "training_curves": training_curves,
    "tuning": tuning,
    "per_class": per_class,
    "object_size": object_size,
    "confusion": confusion,
    "receptive_field": receptive_field,
}
"""File stem -> what draws it from records alone."""

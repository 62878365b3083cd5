"""Figures of a study: axes, interaction, variance, importance, Pareto front, history of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ablations.report.importance import NOISE, SEED, Term, importance, term_name, variance_shares
from ablations.report.results import Study, arm_text, axis_name
from sunets.core.metrics import higher_is_better
from sunets.core.record import Record
from sunets.report.comparison import NO_COMPARISON, NOT_COMPARABLE, within_range
from sunets.report.figures import draw_trials, interval_bar, name_rows
from sunets.report.images import heat_map
from sunets.report.records import FINISHED, quantity
from sunets.report.statistics import BETTER, WORSE, Estimate, mean_interval
from sunets.report.style import PALETTE, STYLE, WIDTH, Style, legend_columns, model_styles


def axes_figure(study: Study) -> Figure | None:
    """Draw a panel per axis: every seed, mean and interval of each value."""
    panels = {path: values for path in study.axes if len(values := study.marginal(path)) > 1}
    if not panels or study.config.kind == "search" or study.reference is None:
        return None
    q = study.shown
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        fig, grid = plt.subplots(
            rows, columns, figsize=(WIDTH * (0.5 if columns == 1 else 1), 2.5 * rows), sharey=True, squeeze=False
        )
        for ax in grid.flat[len(panels) :]:
            ax.set_visible(False)
        for ax, (path, values) in zip(grid.flat, panels.items(), strict=False):
            base, effects = study.base(path), study.effects(path)
            unlike = {v for v, c in effects.items() if not c.comparable}
            for x, (value, scores) in enumerate(values.items()):
                reference = value == base
                noise = not reference and effects.get(value, NO_COMPARISON).verdict not in (BETTER, WORSE)
                look = Style("#222222", "s", "-") if reference else Style(PALETTE[0], "o", "-")
                shown = [q.scale * s for s in scores.values()]
                beside = np.linspace(x + 0.14, x + 0.26, len(shown)) if len(shown) > 1 else [x + 0.2]
                ax.scatter(beside, shown, s=9, color=look.color, alpha=0.45, linewidths=0, zorder=2)
                estimate = within_range(q, mean_interval(list(scores.values()))).scaled(q.scale)
                interval_bar(ax, x, estimate.mean, estimate, look, hollow=noise)
                if reference and estimate.low is not None:
                    ax.axhspan(estimate.low, estimate.high or 0, color="#000000", alpha=0.06, linewidth=0)
            notes = dict.fromkeys(unlike, f"\n({NOT_COMPARABLE})") | {base: "\n(reference)"}
            ticks = [v + notes.get(v, "") for v in values]
            ax.set_xticks(range(len(values)), ticks)
            ax.set_xlim(-0.6, len(values) - 0.4)
            ax.set_title(axis_name(path))
            ax.grid(axis="x", visible=False)
        for ax in grid[:, 0]:
            ax.set_ylabel(q.heading)
    return fig


def interaction_figure(study: Study) -> Figure | None:
    """Draw a heat map of the mean score over two axes: depth and blocks of a grid that has both, else its first two."""
    if not study.crossed or not study.comparable:
        return None
    wanted = [p for p in ("model.unet_depth", "model.num_blocks") if p in study.axes]
    pair = (wanted if len(wanted) == 2 else study.axes)[:2]
    if len(pair) < 2:
        return None
    scored: dict[tuple[str, ...], dict[tuple[str, ...], Estimate]] = {}
    """Values of the pair -> values of the other axes -> score."""
    indices = [study.axes.index(path) for path in pair]
    for arm, setting in study.by_arm().items():
        if setting.estimate is not None:
            others = tuple(value for i, value in enumerate(arm) if i not in indices)
            scored.setdefault(tuple(arm[i] for i in indices), {})[others] = setting.estimate
    # Cells are means over the same values of the other axes, or one without a poor setting would look better.
    shared = [others for others in next(iter(scored.values()), {}) if all(others in row for row in scored.values())]
    if len(scored) < 4 or not shared:
        return None
    cells = {key: [row[others].mean for others in shared] for key, row in scored.items()}
    widths = [2 * (row[others].half_width or 0.0) for row in scored.values() for others in shared]
    q = study.shown
    down, across = (study.in_order(path, (key[i] for key in cells)) for i, path in enumerate(pair))
    rising = higher_is_better(study.headline)
    matrix = np.array([[q.scale * np.mean(cells[d, a]) if (d, a) in cells else np.nan for a in across] for d in down])
    # Noise alone must not fill the range of the colours.
    room = max(0.0, q.scale * float(np.mean(widths)) - float(np.nanmax(matrix) - np.nanmin(matrix))) / 2
    limits = (float(np.nanmin(matrix)) - room, float(np.nanmax(matrix)) + room)
    texts = np.array([["" if np.isnan(v) else f"{v:.{min(1, q.digits)}f}" for v in line] for line in matrix])
    with plt.rc_context(STYLE | {"axes.grid": False}):
        size = (1.6 + 0.75 * len(across), 1.1 + 0.5 * len(down))
        fig, ax = plt.subplots(figsize=(min(WIDTH, max(3.2, size[0])), max(2.0, size[1])))
        heat_map(ax, matrix, texts, limits, 8.0, cmap="cividis" if rising else "cividis_r",
                 xticklabels=across, yticklabels=down, cbar_kws={"label": q.heading})  # fmt: skip
        ax.set(xlabel=axis_name(pair[1]), ylabel=axis_name(pair[0]))
        ax.tick_params(rotation=0)
    return fig


def variance_figure(study: Study) -> Figure | None:
    """Draw `variance_shares` as bars."""
    if (shares := variance_shares(study)) is None:
        return None
    return _bars({term: (share,) for term, share in shares.items()}, f"Share of the variance of {study.shown.name} (%)")


def importance_figure(study: Study) -> Figure | None:
    """Draw `importance` as bars."""
    if (shares := importance(study)) is None:
        return None
    return _bars({(path,): share for path, share in shares.items()}, "Share of the variance of the score (%), fANOVA")


def _bars(bars: Mapping[Term, Sequence[float]], heading: str) -> Figure:
    """Draw shares, each with the ends of its interval where it has one."""
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH * 0.66, 0.8 + 0.3 * len(bars)))
        for y, (term, (share, *ends)) in enumerate(bars.items()):
            color = "#888888" if term in ((SEED,), (NOISE,)) else PALETTE[0]
            ax.barh(y, 100 * share, height=0.6, color=color, alpha=0.75, linewidth=0)
            if ends:
                ax.plot([100 * end for end in ends], [y, y], color="#222222", linewidth=1.3, marker="|", markersize=6)
        ax.set_xlim(left=0)
        ax.set_xlabel(heading)
        name_rows(ax, map(term_name, bars))
    return fig


def pareto_figure(study: Study) -> Figure | None:
    """Draw a search's trials and front (validation), and beside them the points that were trained again (test)."""
    rows = [r for r in study.sampled if r["phase"] == "search" and r["status"] == FINISHED]
    if not rows:
        return None
    q = study.shown
    rising = higher_is_better(study.headline)

    def points(trials: Sequence[Record]) -> tuple[list[float], list[float]]:
        return [r["cost"]["cost.gmacs"] for r in trials], [q.scale * r["scores"][study.search_key] for r in trials]

    with plt.rc_context(STYLE):
        fig, (seen, again) = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
        seen.scatter(*points(rows), s=16, color="#999999", linewidths=0, label="trial")
        seen.plot(
            *points(study.front), color=PALETTE[1], marker="o", markersize=4.5, linewidth=1.2,
            drawstyle="steps-post", label="Pareto front",
        )  # fmt: skip
        seen.set(title=f"Search ({study.sampled[0]['split']} split, one seed)", ylabel=f"Search {q.heading}")
        seen.legend(frameon=False, loc="lower right" if rising else "upper right")
        confirmed = {i: s for i, s in enumerate(study.settings) if s.estimate and s.cost("cost.gmacs") is not None}
        looks = model_styles(map(str, confirmed)).values()
        for (i, setting), look in zip(confirmed.items(), looks, strict=True):
            assert setting.estimate is not None
            assert study.reference is not None
            name = "default" if setting.reference else arm_text(study, setting.arm, study.reference.arm)
            if not study.compared.get(i, NO_COMPARISON).comparable:
                name += f" ({NOT_COMPARABLE})"
            estimate = within_range(q, setting.estimate).scaled(q.scale)
            interval_bar(again, setting.cost("cost.gmacs") or 0.0, estimate.mean, estimate, look, label=name)
        again.set(title="Trained again (test split, all seeds)", ylabel=q.heading)
        if confirmed:
            handles, names = again.get_legend_handles_labels()
            fig.legend(handles, names, loc="outside lower center", ncols=legend_columns(names), frameon=False)
        for ax in (seen, again):
            ax.set_xlabel(quantity("cost.gmacs").heading)
            ax.margins(0.12)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return fig


def history_figure(study: Study) -> Figure | None:
    """Draw the scores of a sampler's trials in their order and the best so far, a line per arm."""
    arms: dict[str, list[Record]] = {}
    for r in study.sampled:
        name = arm_text(study, r["arm"]) if r["phase"] == "tuning" else "search"
        arms.setdefault(name, []).append(r)
    if not arms:
        return None
    best = np.fmax if higher_is_better(study.headline) else np.fmin
    frames = {}
    for name, rows in arms.items():
        scores = np.array([r["scores"].get(study.search_key, np.nan) for r in rows], dtype=float)
        frames[name] = pd.DataFrame(
            {"number": range(len(rows)), "status": [r["status"] for r in rows], "score": scores}
        ).assign(best=best.accumulate(scores))
    xlabel = "Trial" + (" of the arm" if len(arms) > 1 else "")
    return draw_trials(
        frames, list(model_styles(frames).values()), xlabel, replace(study.shown, name=f"Search {study.shown.name}")
    )


DRAWN: dict[str, Callable[[Study], Figure | None]] = {
    "axes": axes_figure,
    "interaction": interaction_figure,
    "variance": variance_figure,
    "importance": importance_figure,
    "pareto": pareto_figure,
    "history": history_figure,
}
"""Name -> what draws it."""

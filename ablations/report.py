"""Tables, figures and the page of the ablations, from their records alone.

Every number is of a grid or a confirmation on the test split, over the seeds, unless it says `search`: what a sampler
looked at on the validation split, with one seed, chooses settings and compares nothing. No torch here.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import optuna
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sunets.config import StudyConfig, Suite
from sunets.record import Record, read_json
from sunets.report.records import FINISHED, SCORES, Quantity, quantity
from sunets.report.statistics import (
    BETTER,
    WITHIN_NOISE,
    WORSE,
    Difference,
    Estimate,
    holm,
    mean_interval,
    paired_difference,
)
from sunets.report.style import LINES, MARKERS, PALETTE, STYLE, WIDTH, save_figure
from sunets.report.tables import (
    Table,
    difference_columns,
    difference_text,
    estimate_columns,
    estimate_text,
    markdown,
    verdict_text,
    write,
)

NAMES = {
    "model.unet_depth": "U-Net depth",
    "model.num_blocks": "U-Nets a stage",
    "model.output_stride": "Output stride",
    "model.dilation": "Dilation schedule",
    "train.lr": "Learning rate",
    "train.weight_decay": "Weight decay",
}
"""Axes with a name of their own; any other goes by its path."""
COSTS = ("cost.params_m", "cost.gmacs", "memory.saved_mib", "field.effective_share")
IMPORTANCE = "fANOVA (Hutter et al., 2014; Optuna's evaluator, 64 trees)"
PAGE_ROWS = 16
"""Rows beyond which a table is linked from the page instead of shown."""
IMPORTANCE_TRIALS = 8
"""Trials below which no importance is shown."""
RESAMPLES = 40
"""Bootstrap samples of the trials behind the spread of an importance."""
KINDS = {
    "one_at_a_time": "one axis at a time from the default",
    "grid": "every combination",
    "tuned": "every combination, each tuned with as many sampled trials, its best setting trained again",
    "search": "a sampled search for two objectives, points of its front trained again",
}
optuna.logging.set_verbosity(optuna.logging.WARNING)
Arm = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One row of a table: a setting of the axes and its scores over the seeds."""

    arm: Arm
    reference: bool
    scores: dict[int, float]
    """Seed -> score of the finished trials."""
    records: list[Record]
    same_as: list[Arm] = field(default_factory=list)

    @property
    def estimate(self) -> Estimate | None:
        """Mean and interval over the seeds."""
        return mean_interval(list(self.scores.values())) if self.scores else None

    def cost(self, key: str) -> float | None:
        """An exact figure of its network."""
        return next((r["cost"][key] for r in self.records if r["cost"].get(key) is not None), None)


@dataclass(frozen=True)
class Study:
    """The records of one study."""

    name: str
    config: StudyConfig
    records: list[Record]
    label: str
    """Of the model."""

    @property
    def axes(self) -> list[str]:
        """Paths of the axes."""
        return [axis.path for axis in self.config.axes]

    @cached_property
    def headline(self) -> str:
        """Key of the score."""
        wrong = any("top1_error_percent" in key for r in self.records for key in r["scores"])
        return SCORES["classification" if wrong else "segmentation"][0]

    @property
    def shown(self) -> Quantity:
        """How the score is shown."""
        return quantity(self.headline)

    @property
    def search_key(self) -> str:
        """Key of what a sampler looked at."""
        return self.headline.replace("score.", "search.")

    @cached_property
    def final(self) -> list[Record]:
        """Trials of a grid or confirmation."""
        return [r for r in self.records if r["phase"] in ("grid", "confirmation")]

    @cached_property
    def sampled(self) -> list[Record]:
        """Trials of a sampler."""
        return [r for r in self.records if r["phase"] in ("tuning", "search")]

    @cached_property
    def settings(self) -> list[Setting]:
        """The settings that were trained on every seed, in the order of the study."""
        groups: dict[str, list[Record]] = {}
        for record in self.final:
            groups.setdefault(json.dumps(record["arm"], sort_keys=True), []).append(record)
        return [
            Setting(
                arm=rows[0]["arm"],
                reference=rows[0]["reference"],
                scores={r["seed"]: r["scores"][self.headline] for r in rows if r["status"] == FINISHED},
                records=rows,
                same_as=rows[0]["same_as"],
            )
            for rows in groups.values()
        ]

    @cached_property
    def reference(self) -> Setting | None:
        """The setting that differences are taken to."""
        return next((s for s in self.settings if s.reference), None)

    @cached_property
    def compared(self) -> dict[int, tuple[Difference | None, float | None]]:
        """Place of a setting -> its paired difference to the reference, and its p-value adjusted over the table."""
        if self.reference is None:
            return {}
        places = [i for i, s in enumerate(self.settings) if not s.reference]
        found = [self.difference(self.settings[i].scores, self.reference.scores) for i in places]
        adjusted = holm([d.p_value if d else None for d in found])
        return {i: (d, p) for i, d, p in zip(places, found, adjusted, strict=True)}

    def difference(self, scores: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
        """Paired difference of two settings."""
        return paired_difference(scores, reference, higher_is_better=self.shown.higher_is_better)

    def by_arm(self) -> dict[tuple[str, ...], Setting]:
        """Values of all axes -> setting, under every name that it has."""
        return {
            tuple(value_text(arm[path]) for path in self.axes): setting
            for setting in self.settings
            for arm in (setting.arm, *setting.same_as)
        }

    def marginal(self, path: str) -> dict[str, dict[int, float]]:
        """Value of an axis -> seed -> score: of the base with that value alone, or the mean over the other axes.

        The mean goes over those settings of the other axes that have a score for every value and seed shown, so that
        values are compared on equal terms.
        """
        place = self.axes.index(path)
        if self.config.kind in ("one_at_a_time", "search"):
            if self.reference is None:
                return {}
            base = [value_text(self.reference.arm[p]) for p in self.axes]
            found = {}
            for arm, setting in self.by_arm().items():
                others = [(a, b) for i, (a, b) in enumerate(zip(arm, base, strict=True)) if i != place]
                if setting.scores and all(a == b for a, b in others):
                    found[arm[place]] = setting.scores
            return _sorted_values(found)
        arms = {arm: s.scores for arm, s in self.by_arm().items() if s.scores}
        rest = {(*arm[:place], *arm[place + 1 :]) for arm in arms}
        values = list(dict.fromkeys(arm[place] for arm in arms))
        balanced = [r for r in rest if all((*r[:place], v, *r[place:]) in arms for v in values)]
        marginals: dict[str, dict[int, float]] = {}
        for value in values:
            parts = [arms[*r[:place], value, *r[place:]] for r in balanced]
            seeds = set.intersection(*(set(p) for p in parts)) if parts else set()
            marginals[value] = {seed: float(np.mean([p[seed] for p in parts])) for seed in sorted(seeds)}
        return _sorted_values({v: s for v, s in marginals.items() if s})


def value_text(value: Any) -> str:
    """A value of an axis as a reader should see it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "default"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def axis_name(path: str) -> str:
    """An axis in words."""
    return NAMES.get(path, path)


def _sorted_values(values: dict[str, T]) -> dict[str, T]:
    """Numbers by size, then everything else as it came."""

    def place(item: tuple[int, str]) -> tuple[int, float]:
        try:
            return (0, float(item[1]))
        except ValueError:
            return (1, item[0])

    return {key: values[key] for _, key in sorted(enumerate(values), key=place)}


# Reading and writing -------------------------------------------------------------------------------------------------


def build_ablation_report(suite: Suite, root: Path = Path()) -> list[Path]:
    """Write the tables, figures and the page of a benchmark's ablations, as a whole.

    Args:
        suite: the benchmark; its studies without records are named as not run.
        root: of the checkout.

    Returns:
        Every path written.

    Raises:
        FileNotFoundError: no study has records.
    """
    folder = root / "results" / suite.benchmark
    studies, absent = [], []
    for name, config in suite.ablations.items():
        path = folder / "records" / "ablations" / f"{name}.json"
        if path.exists() and (records := read_json(path)):
            studies.append(Study(name, config, records, records[0]["label"]))
        else:
            absent.append(name)
    if suite.ablations and not studies:
        raise FileNotFoundError(f"{folder / 'records' / 'ablations'}: no records; run `dvc repro` first")
    shutil.rmtree(folder / "ablations", ignore_errors=True)  # all of it is written anew
    (folder / "ablations").mkdir(parents=True)
    written: list[Path] = []
    parts = [
        f"# Ablations: {suite.report.title}",
        "Made by `dvc repro` (stage `ablation_report`) from [`records/ablations/`](records/ablations): do not edit. "
        "One record there is one trial, with all its parameters, environment, commit and command.",
    ]
    if not suite.ablations:
        parts.append("The parameter file has no study.")
    if absent:
        parts.append(f"Not run: {', '.join(absent)}.")
    for study in studies:
        made = (settings_table(study), axes_table(study), sampled_table(study))
        tables = [table for table in made if table is not None]
        figures = {name: (figure, caption) for name, draw, caption in FIGURES if (figure := draw(study)) is not None}
        for table in tables:
            written += write(table, folder / "ablations")
        for name, (figure, _) in figures.items():
            written += save_figure(figure, folder / "ablations" / f"{study.name}_{name}")
        parts += _section(study, tables, {name: caption for name, (_, caption) in figures.items()})
    page = folder / "ablations.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8", newline="\n")
    return [*written, page]


def _section(study: Study, tables: Sequence[Table], figures: Mapping[str, str]) -> list[str]:
    parts = [
        f"## {study.name}",
        what_was_run(study),
        "\n".join(f"- {sentence}" for sentence in findings(study)),
    ]
    for table in tables:
        stem = f"ablations/{table.name}"
        if len(table.view) <= PAGE_ROWS and not table.name.endswith("_trials"):
            parts.append(markdown(table.view, table.caption, table.notes).strip())
        else:
            parts.append(f"{table.caption} [Table of {len(table.view)} rows]({stem}.md), [CSV]({stem}.csv).")
    for name, caption in figures.items():
        stem = f"ablations/{study.name}_{name}"
        text = caption.format(score=study.shown.name, evaluator=IMPORTANCE, resamples=RESAMPLES)
        parts.append(f"![{study.name}: {name}]({stem}.png)\n\n*{text}* ([PDF]({stem}.pdf))")
    failed = [r for r in study.records if r["status"] == "failed"]
    if failed:
        lines = [
            f"- trial {r['number']} ({arm_text(study, r['arm'])}, seed {r['seed']}): {r['reason']}" for r in failed
        ]
        parts.append("Failed trials:\n\n" + "\n".join(lines))
    return parts


def what_was_run(study: Study) -> str:
    """Protocol of a study in a few sentences."""
    c, params = study.config, study.records[0]["params"]
    axes = "; ".join(
        f"{axis_name(a.path)} (`{a.path}`) "
        + (", ".join(_bracketed(map(value_text, a.values))) or f"{a.low:g} to {a.high:g}")
        for a in c.axes
    )
    budget = [f"{params['train.epochs']} epochs", f"batch {params['train.batch_size']}", f"{params['train.optimizer']}"]
    if c.kind != "tuned":
        budget += [f"learning rate {params['train.lr']:g}", f"weight decay {params['train.weight_decay']:g}"]
    given = [f"{path} {value_text(value)}" for path, value in c.overrides.items() if path.startswith("model.")]
    base = f"{study.label} with {', '.join(given)}" if given else study.label
    sentences = [
        f"{base}, {KINDS[c.kind]}: {axes}.",
        f"Every training: {', '.join(budget)}; seeds {', '.join(map(str, c.seeds))}, the same for all settings; "
        f"{len(study.final)} trainings scored on the {study.final[0]['split']} split."
        if study.final
        else "No trial has been trained on the seeds yet.",
    ]
    if study.sampled:
        nuisance = f" over {', '.join(axis_name(a.path).lower() for a in c.nuisance)}" if c.nuisance else ""
        per = " an arm" if c.kind == "tuned" else ""
        sentences.append(
            f"Before that, {c.trials} trials{per} by Optuna's TPE (multivariate){nuisance}, with seed {c.tuning_seed}, "
            f"looked at on the {study.sampled[0]['split']} split only"
            + (
                "; those below the median of the finished ones were stopped."
                if c.kind == "tuned" and c.pruning
                else "."
            )
        )
    devices = sorted({r["environment"].get("gpu") or r["environment"].get("cpu", "?") for r in study.records})
    return " ".join([*sentences, f"Device: {', '.join(devices)}."])


def arm_text(study: Study, arm: Arm, reference: Arm | None = None) -> str:
    """A setting in words: its axes, or only those that differ from a reference."""
    paths = [p for p in study.axes if reference is None or value_text(arm[p]) != value_text(reference[p])]
    return ", ".join(f"{axis_name(p)} {value_text(arm[p])}" for p in paths) or "default"


# Tables --------------------------------------------------------------------------------------------------------------


def settings_table(study: Study) -> Table:
    """One row a setting: score, difference to the reference, cost."""
    q, rows, lines = study.shown, [], []
    for place, setting in enumerate(study.settings):
        difference, adjusted = study.compared.get(place, (None, None))
        estimate = setting.estimate
        tuned = setting.records[0]["tuned"]
        failed = [r for r in setting.records if r["status"] != FINISHED]
        row: dict[str, Any] = {"study": study.name, **{p: value_text(setting.arm[p]) for p in study.axes}, **tuned}
        row |= {
            "reference": setting.reference,
            "n_seeds": len(setting.scores),
            "status": FINISHED if not failed else f"{len(setting.scores)} of {len(setting.records)} seeds",
            "reason": failed[0]["reason"] if failed else None,
            **estimate_columns(study.headline, estimate),
            **difference_columns(study.headline, _reference_text(study), difference, adjusted),
            **{key: setting.cost(key) for key in COSTS},
        }
        line = {axis_name(p): value_text(setting.arm[p]) for p in study.axes}
        line |= {axis_name(path): value_text(value) for path, value in tuned.items()}
        line["Seeds"] = str(len(setting.scores))
        line[q.heading] = estimate_text(q, estimate) if estimate else f"failed: {row['reason']}"
        line["Difference"] = difference_text(q, difference)
        line["Verdict"] = "reference" if setting.reference else verdict_text(difference, adjusted) if estimate else ""
        line |= {quantity(key).heading: quantity(key).text(row[key]) for key in COSTS}
        rows.append(row)
        lines.append(line)
    notes = [
        f"Mean with its 95 % t-interval over the seeds; difference to the reference ({_reference_text(study)}), paired "
        "by seed, with its 95 % interval. Verdicts are adjusted for the number of rows (Holm)."
    ]
    twice = [(setting.arm, arm) for setting in study.settings for arm in setting.same_as]
    if twice:
        one, other = (arm_text(study, arm) for arm in twice[0])
        count = f"{len(twice)} further settings are" if len(twice) > 1 else "One further setting is"
        notes.append(f"{count} the very same training as a row and not run again, such as {other} (as {one}).")
    return Table(
        study.name,
        f"Ablation {study.name}: {study.label}, {KINDS[study.config.kind]}.",
        pd.DataFrame(rows),
        pd.DataFrame(lines),
        tuple(notes),
        keys=tuple(study.axes),
    )


def axes_table(study: Study) -> Table | None:
    """One row a value of an axis, the mean over the other axes; where several axes are combined."""
    if study.config.kind not in ("grid", "tuned") or len(study.axes) < 2 or study.reference is None:
        return None
    q, rows, lines = study.shown, [], []
    for path in study.axes:
        values, base = study.marginal(path), value_text(study.reference.arm[path])
        others = [value for value in values if value != base and base in values]
        found = {value: study.difference(values[value], values[base]) for value in others}
        adjusted = dict(zip(others, holm([d.p_value if d else None for d in found.values()]), strict=True))
        for value, scores in values.items():
            estimate, d = mean_interval(list(scores.values())), found.get(value)
            rows.append(
                {"study": study.name, "axis": path, "value": value, "reference": value == base, "n_seeds": estimate.n}
                | estimate_columns(study.headline, estimate)
                | difference_columns(study.headline, base, d, adjusted.get(value))
            )
            lines.append(
                {
                    "Axis": axis_name(path),
                    "Value": value,
                    "Seeds": str(estimate.n),
                    q.heading: estimate_text(q, estimate),
                    "Difference": difference_text(q, d),
                    "Verdict": "reference" if value == base else verdict_text(d, adjusted.get(value)),
                }
            )
    note = (
        "Mean over the settings of the other axes that have scores for every value and seed, seed by seed; intervals "
        "over the seeds. Differences to the reference's value, paired by seed; verdicts adjusted within an axis (Holm)."
    )
    return Table(
        f"{study.name}_axes",
        f"Ablation {study.name}: each axis on its own, averaged over the others.",
        pd.DataFrame(rows),
        pd.DataFrame(lines),
        (note,),
        keys=("axis", "value"),
    )


def _reference_text(study: Study) -> str:
    return arm_text(study, study.reference.arm) if study.reference else "none was run"


def sampled_table(study: Study) -> Table | None:
    """One row a trial of a sampler; its scores have names of their own."""
    if not study.sampled:
        return None
    rows = []
    for r in study.sampled:
        row = {"number": r["number"], "phase": r["phase"], "status": r["status"], "reason": r["reason"]}
        row |= {p: value_text(r["arm"][p]) for p in study.axes} | r["tuned"]
        rows.append(
            row | {study.search_key: r["scores"].get(study.search_key), "cost.gmacs": r["cost"].get("cost.gmacs")}
        )
    data = pd.DataFrame(rows)
    q = study.shown
    view = pd.DataFrame({"Trial": data.number.astype(str), "Status": data.status})
    for path in [*study.axes, *(a.path for a in study.config.nuisance)]:
        view[axis_name(path)] = data[path].map(value_text)
    view[f"Search {q.heading}"] = data[study.search_key].map(q.text)
    gmacs = quantity("cost.gmacs")
    view[gmacs.heading] = data["cost.gmacs"].map(gmacs.text)
    return Table(
        f"{study.name}_trials",
        f"What the sampler of {study.name} saw.",
        data,
        view,
        (f"Scores of one seed on the {study.sampled[0]['split']} split: they choose settings and compare nothing.",),
        keys=("number",),
    )


# Findings ------------------------------------------------------------------------------------------------------------


def findings(study: Study) -> list[str]:
    """One sentence an axis, or a confirmed point of a search, made by the statistics alone."""
    if study.reference is None or not study.reference.scores:
        return ["The reference has no score, so no difference can be shown."]
    if study.config.kind != "search":
        return [_axis_finding(study, path) for path in study.axes]
    sentences = []
    default = study.reference.cost("cost.gmacs")
    for place, (difference, adjusted) in study.compared.items():
        setting = study.settings[place]
        name, gmacs = arm_text(study, setting.arm, study.reference.arm), setting.cost("cost.gmacs")
        cost = f", at {gmacs / default:.2f} times its multiply-adds" if gmacs is not None and default else ""
        sentences.append(f"{name}: {_words(study, difference, adjusted)} against the default{cost}.")
    return sentences or ["No point of the search but the default was trained again: no difference shown."]


def _axis_finding(study: Study, path: str) -> str:
    values = study.marginal(path)
    assert study.reference is not None
    base = value_text(study.reference.arm[path])
    mean = "" if len(study.axes) == 1 or study.config.kind == "one_at_a_time" else ", on average over the other axes"
    head = f"**{axis_name(path)}** (`{path}`, reference {base}{mean}): "
    others = [value for value in values if value != base]
    if base not in values or not others:
        return head + "no two values have scores to compare: no difference shown."
    found = [study.difference(values[value], values[base]) for value in others]
    adjusted = holm([d.p_value if d else None for d in found])
    said = {v: (d, p, _verdict(d, p)) for v, d, p in zip(others, found, adjusted, strict=True)}
    if all(verdict == WITHIN_NOISE for _, _, verdict in said.values()):
        largest = max((d for d in found if d is not None), key=lambda d: abs(d.mean))
        text = f"{difference_text(study.shown, largest)} {_unit(study)}"
        return head + (
            f"no difference shown between {_join([base, *others])}; the largest, {text}, is within the noise of "
            f"{_seeds(largest.n)}."
        )
    return head + "; ".join(f"{value}: {_words(study, d, p)}" for value, (d, p, _) in said.items()) + "."


def _verdict(difference: Difference | None, adjusted: float | None) -> str:
    text = verdict_text(difference, adjusted)
    return WITHIN_NOISE if WITHIN_NOISE in text else text


def _words(study: Study, difference: Difference | None, adjusted: float | None) -> str:
    verdict = _verdict(difference, adjusted)
    if difference is None:
        return "no common seed, no difference shown"
    text = f"{difference_text(study.shown, difference)} {_unit(study)}"
    if verdict in (BETTER, WORSE):
        return f"{verdict}, {text}"
    if verdict == WITHIN_NOISE:
        return f"no difference shown ({text})"
    return f"no difference shown, one seed has no interval ({text})"


def _unit(study: Study) -> str:
    return "points" if study.shown.unit == "%" else study.shown.unit


def _seeds(n: int) -> str:
    return f"{n} seed" + ("s" if n > 1 else "")


def _bracketed(values: Iterable[str]) -> list[str]:
    """Values for an enumeration: those that hold commas themselves in brackets."""
    return [f"({value})" if "," in value else value for value in values]


def _join(values: Sequence[str]) -> str:
    quoted = _bracketed(values)
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


# Figures -------------------------------------------------------------------------------------------------------------


def axes_figure(study: Study) -> Figure | None:
    """One panel an axis: every seed, mean and interval of each value."""
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
            base = value_text(study.reference.arm[path])
            others = {v: study.difference(s, values[base]) for v, s in values.items() if v != base and base in values}
            adjusted = dict(zip(others, holm([d.p_value if d else None for d in others.values()]), strict=True))
            for x, (value, scores) in enumerate(values.items()):
                reference = value == base
                noise = not reference and _verdict(others.get(value), adjusted.get(value)) not in (BETTER, WORSE)
                _value(ax, x, [q.scale * s for s in scores.values()], reference=reference, hollow=noise)
            if (
                base in values
                and (low_high := mean_interval([q.scale * s for s in values[base].values()])).low is not None
            ):
                ax.axhspan(low_high.low, low_high.high or 0, color="#000000", alpha=0.06, linewidth=0)
            ticks = [f"{v}\n(reference)" if v == base else v for v in values]
            ax.set_xticks(range(len(values)), ticks)
            ax.set_xlim(-0.6, len(values) - 0.4)
            ax.set_title(axis_name(path))
            ax.grid(axis="x", visible=False)
        for ax in grid[:, 0]:
            ax.set_ylabel(q.heading)
    return fig


def _value(ax: Axes, x: float, values: Sequence[float], *, reference: bool, hollow: bool) -> None:
    estimate = mean_interval(values)
    color = "#222222" if reference else PALETTE[0]
    beside = np.linspace(0.14, 0.26, len(values)) if len(values) > 1 else [0.2]
    ax.scatter([x + d for d in beside], values, s=9, color=color, alpha=0.45, linewidths=0, zorder=2)
    half = estimate.half_width
    ax.errorbar(
        x, estimate.mean, yerr=half, fmt="s" if reference else "o", color=color, markersize=5.5, zorder=3,
        markerfacecolor="white" if hollow else color, markeredgecolor=color, elinewidth=1.3, capsize=3, capthick=1.3,
    )  # fmt: skip


def interaction_figure(study: Study) -> Figure | None:
    """Heat map of the mean score over two axes: depth and blocks where a grid has both, else its first two."""
    if study.config.kind not in ("grid", "tuned"):
        return None
    wanted = [p for p in ("model.unet_depth", "model.num_blocks") if p in study.axes]
    pair = (wanted if len(wanted) == 2 else study.axes)[:2]
    if len(pair) < 2:
        return None
    cells: dict[tuple[str, str], list[float]] = {}
    places = [study.axes.index(path) for path in pair]
    for arm, setting in study.by_arm().items():
        if setting.estimate is not None:
            cells.setdefault((arm[places[0]], arm[places[1]]), []).append(setting.estimate.mean)
    if len(cells) < 4:
        return None
    q = study.shown
    across, down = (list(_sorted_values({key[i]: None for key in cells})) for i in (1, 0))
    matrix = np.array([[q.scale * np.mean(cells[d, a]) if (d, a) in cells else np.nan for a in across] for d in down])
    with plt.rc_context(STYLE):
        size = (1.6 + 0.75 * len(across), 1.1 + 0.5 * len(down))
        fig, ax = plt.subplots(figsize=(min(WIDTH, max(3.2, size[0])), max(2.0, size[1])))
        sns.heatmap(
            matrix, annot=True, fmt=f".{min(1, q.digits)}f", cmap="cividis" if q.higher_is_better else "cividis_r",
            xticklabels=across, yticklabels=down, linewidths=1.5, ax=ax, annot_kws={"fontsize": 8},
            cbar_kws={"label": q.heading},
        )  # fmt: skip
        ax.set(xlabel=axis_name(pair[1]), ylabel=axis_name(pair[0]))
        ax.tick_params(length=0, rotation=0)
        ax.grid(visible=False)
    return fig


def importance(study: Study) -> dict[str, tuple[float, float, float]] | None:
    """Axis -> share of the score's variance that it alone explains, and the ends of a 95 % bootstrap interval.

    Of a grid, the seed is among the axes: what does not matter more than it, does not matter. None where there are
    fewer than `IMPORTANCE_TRIALS` finished trials or a single axis.
    """
    rows = study.sampled or study.final
    key = study.search_key if study.sampled else study.headline
    trials = [(_factors(study, r), r["scores"][key]) for r in rows if r["status"] == FINISHED]
    varied = [p for p in trials[0][0] if len({str(t[0][p]) for t in trials}) > 1] if trials else []
    known = study.config.kind in ("grid", "tuned", "search")
    if not known or len(trials) < IMPORTANCE_TRIALS or len(set(varied) - {"seed"}) < 2:
        return None
    space = {path: _distribution([t[0][path] for t in trials]) for path in varied}
    rng = np.random.default_rng(0)
    point = _fanova(space, trials, seed=0, trees=64)
    draws = []
    for resample in range(RESAMPLES):
        chosen = [trials[i] for i in rng.integers(len(trials), size=len(trials))]
        if len({score for _, score in chosen}) > 1:
            draws.append(_fanova(space, chosen, seed=resample + 1, trees=16))
    found = {}
    for path in varied:
        low, high = np.quantile([d[path] for d in draws], [0.025, 0.975])
        found[path] = (point[path], float(low), float(high))
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def _factors(study: Study, record: Record) -> dict[str, Any]:
    arm = {
        p: v if isinstance(v, int | float) and not isinstance(v, bool) else value_text(v)
        for p, v in record["arm"].items()
    }
    return {**arm, **record["tuned"], **({} if study.sampled else {"seed": record["seed"]})}


def _distribution(values: Sequence[Any]) -> optuna.distributions.BaseDistribution:
    """The range or the choices that the values came from, as far as they show it."""
    if all(isinstance(v, float) for v in values) and len(set(values)) > 2:
        return optuna.distributions.FloatDistribution(min(values), max(values), log=min(values) > 0)
    return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))


def _fanova(
    space: Mapping[str, Any], trials: Iterable[tuple[Mapping[str, Any], float]], *, seed: int, trees: int
) -> dict[str, float]:
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(params={p: values[p] for p in space}, distributions=dict(space), value=score)
            for values, score in trials
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about experimental parts
        return optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=seed), normalize=False
        )


def importance_figure(study: Study) -> Figure | None:
    """Bars of `importance`."""
    found = importance(study)
    if found is None:
        return None
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH * 0.66, 0.8 + 0.3 * len(found)))
        for y, (path, (share, low, high)) in enumerate(found.items()):
            color = "#888888" if path == "seed" else PALETTE[0]
            ax.barh(y, share, height=0.6, color=color, alpha=0.75, linewidth=0)
            ax.plot([low, high], [y, y], color="#222222", linewidth=1.3, marker="|", markersize=6)
        ax.set_yticks(range(len(found)), ["Seed (noise)" if p == "seed" else axis_name(p) for p in found])
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.set_xlim(left=0)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("Share of the score's variance, fANOVA")
    return fig


def pareto_figure(study: Study) -> Figure | None:
    """What a search saw and its front; beside it what was trained again. Two scores, two panels."""
    rows = [r for r in study.sampled if r["phase"] == "search" and r["status"] == FINISHED]
    if not rows:
        return None
    q = study.shown
    gmacs = np.array([r["cost"]["cost.gmacs"] for r in rows])
    scores = np.array([q.scale * r["scores"][study.search_key] for r in rows])
    front = _front(gmacs, scores if q.higher_is_better else -scores)
    with plt.rc_context(STYLE):
        fig, (seen, again) = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
        seen.scatter(gmacs, scores, s=16, color="#999999", linewidths=0, label="trial")
        seen.plot(
            gmacs[front], scores[front], color=PALETTE[1], marker="o", markersize=4.5, linewidth=1.2,
            drawstyle="steps-post", label="Pareto front",
        )  # fmt: skip
        seen.set(title=f"Search ({study.sampled[0]['split']} split, one seed)", ylabel=f"Search {q.heading}")
        seen.legend(frameon=False, loc="lower right" if q.higher_is_better else "upper right")
        confirmed = [(s, s.estimate, s.cost("cost.gmacs")) for s in study.settings]
        for i, (setting, estimate, x) in enumerate([c for c in confirmed if c[1] is not None and c[2] is not None]):
            assert estimate is not None
            assert study.reference is not None
            half = estimate.half_width
            name = "default" if setting.reference else arm_text(study, setting.arm, study.reference.arm)
            again.errorbar(
                x, q.scale * estimate.mean, yerr=None if half is None else q.scale * half, label=name,
                fmt=MARKERS[i % len(MARKERS)], color=PALETTE[i % len(PALETTE)],
                markersize=5.5, elinewidth=1.3, capsize=3,
            )  # fmt: skip
        again.set(title="Trained again (test split, all seeds)", ylabel=q.heading)
        if study.settings:
            fig.legend(*again.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        for ax in (seen, again):
            ax.set_xlabel(quantity("cost.gmacs").heading)
            ax.margins(0.12)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return fig


def _front(costs: np.ndarray, scores: np.ndarray) -> list[int]:
    """Places of the points that no cheaper or equally dear one matches, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not front or scores[i] > scores[front[-1]]:
            front.append(i)
    return front


def history_figure(study: Study) -> Figure | None:
    """Scores of a sampler's trials in their order, and the best so far; a line an arm."""
    if not study.sampled:
        return None
    q = study.shown
    arms: dict[str, list[Record]] = {}
    for r in study.sampled:
        name = arm_text(study, r["arm"]) if r["phase"] == "tuning" else "search"
        arms.setdefault(name, []).append(r)
    best = np.fmax if q.higher_is_better else np.fmin
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH * 0.72, 2.7 + 0.12 * (len(arms) > 3) * len(arms)))
        for i, (name, rows) in enumerate(arms.items()):
            color, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
            y = np.array(
                [q.scale * s if (s := r["scores"].get(study.search_key)) is not None else np.nan for r in rows]
            )
            x = np.arange(1, len(y) + 1)
            ax.scatter(x, y, s=16, color=color, marker=marker, alpha=0.55, linewidths=0)
            ax.plot(x, best.accumulate(y), color=color, drawstyle="steps-post", linewidth=1.3, label=name,
                    linestyle=LINES[(i // len(PALETTE)) % len(LINES)])  # fmt: skip
            lost = [n for n, r in zip(x, rows, strict=True) if r["status"] != FINISHED]
            marks = ax.get_xaxis_transform()
            ax.scatter(
                lost, [0.02 + 0.03 * (i % 8)] * len(lost), marker="x", s=14, color=color, transform=marks, clip_on=False
            )
        ax.set(xlabel="Trial" + (" of the arm" if len(arms) > 1 else ""), ylabel=f"Search {q.heading}")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.margins(y=0.14)
        if len(arms) > 1:
            fig.legend(loc="outside lower center", ncols=min(3, len(arms)), frameon=False)
    return fig


FIGURES = (
    (
        "axes",
        axes_figure,
        "{score} by the value of each axis: every seed (dots), mean and 95 % t-interval. Square and band: the "
        "reference. Hollow: the paired difference to it is within noise.",
    ),
    ("interaction", interaction_figure, "Mean {score} over the seeds and over the axes that are not shown."),
    (
        "importance",
        importance_figure,
        "Importance by {evaluator}: share of the variance over all trials that an axis alone explains. Lines: 95 % of "
        "{resamples} bootstrap samples of the trials (16 trees each).",
    ),
    (
        "pareto",
        pareto_figure,
        "{score} against multiply-adds. Left: what the search saw; right: the points trained again on every seed, with "
        "95 % t-intervals.",
    ),
    (
        "history",
        history_figure,
        "Optimisation history: every trial and the best so far (search score, validation split). Crosses: pruned or "
        "failed.",
    ),
)
"""Name, what draws it, caption."""

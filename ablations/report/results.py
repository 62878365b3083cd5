"""A study read from its records: settings, differences, values of its axes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sunets.core.config import ReportConfig, StudyConfig
from sunets.core.metrics import PRIMARY_METRIC, higher_is_better, pareto_front, search_key, validation_column
from sunets.core.record import Record, RecordError
from sunets.report.comparison import Comparison, compare_all
from sunets.report.records import FINISHED, Quantity, Runs, quantity
from sunets.report.statistics import Estimate, mean_interval
from sunets.report.tables import change_at_end
from sunets.report.write import NAMES, value_text

KINDS = {
    "one_at_a_time": "one axis at a time from the default",
    "grid": "every combination",
    "tuned": "every combination, each tuned with the same effort, its best recipe trained again",
    "search": "a sampled search for two objectives, points of its front trained again",
}

Arm = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A setting of the axes and its scores over the seeds; a row of a table."""

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
        """Return an exact cost of its network."""
        return next((r["cost"][key] for r in self.records if r["cost"].get(key) is not None), None)


@dataclass(frozen=True)
class Recipe:
    """A recipe of a tuned arm and its validation scores over the tuning seeds."""

    records: list[Record]
    scores: dict[int, float]
    """Tuning seed -> score of the finished trials."""
    chosen: bool


@dataclass(frozen=True)
class Study:
    """The records of one study."""

    name: str
    config: StudyConfig
    records: list[Record]
    label: str
    """Of the model."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """What may differ between compared settings, and the margin of equivalence."""
    history: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """A row per trial and epoch, as `read_history` returns them."""

    def check(self, path: Path) -> None:
        """Check that the records, of the file `path`, have what the report shows.

        Raises:
            RecordError: names the file, the record and the key.
        """
        needed = {"arm": self.axes, "tuned": [axis.path for axis in self.config.nuisance]}
        for number, r in enumerate(self.records):
            lacks = [key for part, keys in needed.items() for key in keys if key not in r[part]]
            if r["status"] == FINISHED:
                score = self.headline if r["phase"] in ("grid", "confirmation") else self.search_key
                lacks += [key for key in (score, "cost.gmacs") if r["scores"].get(key, r["cost"].get(key)) is None]
            if lacks:
                raise RecordError(f"{path}: record {number} lacks {', '.join(lacks)}; run its study again")

    @property
    def crossed(self) -> bool:
        """Whether every combination of the axes is a setting."""
        return self.config.kind in ("grid", "tuned")

    @property
    def axes(self) -> list[str]:
        """Paths of the axes."""
        return [axis.path for axis in self.config.axes]

    @property
    def headline(self) -> str:
        """Key of the score."""
        return PRIMARY_METRIC[self.records[0]["task"]]

    @property
    def shown(self) -> Quantity:
        """Unit and format of the score."""
        return quantity(self.headline)

    @property
    def search_key(self) -> str:
        """Key of the score that a sampler sees."""
        return search_key(self.headline)

    @cached_property
    def final(self) -> list[Record]:
        """Trials of a grid or confirmation."""
        return [r for r in self.records if r["phase"] in ("grid", "confirmation")]

    @cached_property
    def sampled(self) -> list[Record]:
        """Trials of a sampler, all with one training seed."""
        seed = self.config.tuning_seed
        return [r for r in self.records if r["phase"] in ("tuning", "search") and r["seed"] == seed]

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The recipes of each tuned arm that were trained on several tuning seeds, an arm's best mean first."""
        final = {json.dumps([r["arm"], r["tuned"]]) for r in self.final}
        groups: dict[str, dict[str, list[Record]]] = {}
        for r in self.records:
            if r["phase"] == "tuning" and r.get("duplicate_of") is None:
                key = json.dumps([r["arm"], r["tuned"]])
                groups.setdefault(json.dumps(r["arm"]), {}).setdefault(key, []).append(r)
        recipes = []
        for arm in groups.values():
            several = [
                Recipe(
                    rows,
                    {r["seed"]: r["scores"][self.search_key] for r in rows if r["status"] == FINISHED},
                    chosen=key in final,
                )
                for key, rows in arm.items()
                if len(rows) > 1
            ]
            sign = -1 if higher_is_better(self.headline) else 1
            recipes += sorted(  # as they were ranked: a recipe that diverged on a seed is behind the others
                several, key=lambda r: (not r.chosen, -len(r.scores), sign * float(np.mean([*r.scores.values()])))
            )
        return recipes

    @cached_property
    def front(self) -> list[Record]:
        """Trials of a search on its Pareto front of score and multiply-adds, fewest multiply-adds first."""
        rows = [r for r in self.sampled if r["phase"] == "search" and r["status"] == FINISHED]
        sign = 1 if higher_is_better(self.headline) else -1
        points = [(sign * r["scores"][self.search_key], -r["cost"]["cost.gmacs"]) for r in rows]
        return [rows[i] for i in reversed(pareto_front(points))]

    @cached_property
    def settings(self) -> list[Setting]:
        """The settings that were trained on every seed: of a grid in natural order, else in the order of the study."""
        groups: dict[str, list[Record]] = {}
        for record in self.final:
            groups.setdefault(json.dumps(record["arm"], sort_keys=True), []).append(record)
        settings = [
            Setting(
                arm=rows[0]["arm"],
                reference=rows[0]["reference"],
                scores={r["seed"]: r["scores"][self.headline] for r in rows if r["status"] == FINISHED},
                records=rows,
                same_as=rows[0]["same_as"],
            )
            for rows in groups.values()
        ]
        if self.crossed or (self.config.kind == "one_at_a_time" and len(self.axes) == 1):
            for path in reversed(self.axes):
                rank = {v: i for i, v in enumerate(self.in_order(path, (value_text(s.arm[path]) for s in settings)))}
                settings.sort(key=lambda setting: rank[value_text(setting.arm[path])])
        return settings

    @cached_property
    def reference(self) -> Setting | None:
        """The setting that differences are taken from."""
        return next((s for s in self.settings if s.reference), None)

    @cached_property
    def compared(self) -> dict[int, Comparison]:
        """Index of a setting -> its comparison with the reference, adjusted over all settings (Holm)."""
        if self.reference is None:
            return {}
        runs = {i: Runs(s.scores, s.records, self.trials_of([s])) for i, s in enumerate(self.settings)}
        reference = runs.pop(self.settings.index(self.reference))
        return compare_all(runs, reference, self.headline, self.report, self.varied)

    @cached_property
    def comparable(self) -> bool:
        """Whether every setting that has scores can be compared with the reference."""
        return all(c.comparable for c in self.compared.values())

    def trials_of(self, settings: Sequence[Setting]) -> float:
        """Return how many tuning trials are behind the recipe of a setting, on average."""
        tuned = [r["arm"] for r in self.sampled if r["phase"] == "tuning"]
        return sum(tuned.count(setting.arm) for setting in settings) / len(settings)

    @cached_property
    def last_fifths(self) -> list[float | None]:
        """Change of the validation score of each setting at the end of its trainings, as of `change_at_end`."""
        history, changes = pd.DataFrame(self.history), list[float | None]()
        for setting in self.settings:
            numbers = [r["number"] for r in setting.records if r["status"] == FINISHED]
            rows = history[history.number.isin(numbers)] if self.validation in history else None
            changes.append(None if rows is None else change_at_end(rows, self.validation, "number"))
        return changes

    @property
    def validation(self) -> str:
        """Key of the score in a history."""
        return validation_column(self.headline)

    @property
    def varied(self) -> list[str]:
        """Paths that the study varies or tunes."""
        return [axis.path for axis in (*self.config.axes, *self.config.nuisance)]

    def effects(self, path: str) -> dict[str, Comparison]:
        """Map each value of an axis to its comparison with the reference's value.

        Adjusted over the axis (Holm); where a value is a single setting, it is the comparison of the table of settings.
        """
        values, base = self.marginal(path), self.base(path)
        if base not in values:
            return {}
        averaged = self.averaged(path)
        records = {value: [r for setting in averaged[value] for r in setting.records] for value in values}
        runs = {v: Runs(scores, records[v], self.trials_of(averaged[v])) for v, scores in values.items()}
        reference = runs.pop(base)
        effects = compare_all(runs, reference, self.headline, self.report, self.varied)
        if self.crossed:
            return effects
        return {v: self.compared.get(self.settings.index(averaged[v][0]), effect) for v, effect in effects.items()}

    def base(self, path: str) -> str | None:
        """Return the value of an axis that the reference has; None without a reference."""
        return value_text(self.reference.arm[path]) if self.reference else None

    def by_arm(self) -> dict[tuple[str, ...], Setting]:
        """Map the values of all axes to their setting; a training that several settings share is under each of them."""
        return {
            tuple(value_text(arm[path]) for path in self.axes): setting
            for setting in self.settings
            for arm in (setting.arm, *setting.same_as)
        }

    def in_order(self, path: str, values: Iterable[str]) -> list[str]:
        """Sort the distinct values of an axis naturally; text as the study lists it, a value of the base first."""
        listed = [value_text(value) for axis in self.config.axes if axis.path == path for value in axis.values]
        return sorted(dict.fromkeys(values), key=lambda value: _natural(value, listed))

    def averaged(self, path: str) -> dict[str, list[Setting]]:
        """Map the value of an axis -> its compared settings: the base with that value alone, or one per context."""
        if self.crossed:
            rows, _ = self.contexts(path)
            return {value: [row[value] for row in rows.values()] for value in next(iter(rows.values()), ())}
        if self.reference is None:
            return {}
        index, base = self.axes.index(path), tuple(value_text(self.reference.arm[p]) for p in self.axes)
        return {
            arm[index]: [setting]
            for arm, setting in self.by_arm().items()
            if setting.scores and (*arm[:index], base[index], *arm[index + 1 :]) == base
        }

    def contexts(self, path: str) -> tuple[dict[tuple[str, ...], dict[str, Setting]], int]:
        """Find the values of the other axes at which the values of an axis are compared on equal terms.

        Returns:
            The values of the other axes -> value of the axis -> setting, where every value has a score. Contexts in
            which every value is the same training, such as the dilation of a network that dilates nothing, are left
            out unless there are no others. Then the number of contexts left out.
        """
        index = self.axes.index(path)
        rows: dict[tuple[str, ...], dict[str, Setting]] = {}  # in order: a sum depends on it
        for arm, setting in self.by_arm().items():
            if setting.scores:
                rows.setdefault((*arm[:index], *arm[index + 1 :]), {})[arm[index]] = setting
        values = {value for row in rows.values() for value in row}
        balanced = {context: row for context, row in rows.items() if row.keys() == values}
        active = {context: row for context, row in balanced.items() if len({id(s) for s in row.values()}) > 1}
        return (active, len(balanced) - len(active)) if active else (balanced, 0)

    def marginal(self, path: str) -> dict[str, dict[int, float]]:
        """Map value -> seed -> score: the mean over the settings of `averaged`, on the seeds that all have."""
        scores = {}
        for value, settings in self.averaged(path).items():
            seeds = sorted(set.intersection(*(set(setting.scores) for setting in settings)))
            scores[value] = {seed: float(np.mean([s.scores[seed] for s in settings])) for seed in seeds}
        return {value: scores[value] for value in self.in_order(path, scores) if scores[value]}


def axis_name(path: str) -> str:
    """Name an axis in words."""
    return NAMES.get(path, path)


def _natural(text: str, listed: Sequence[str]) -> tuple[int, float, tuple[float, ...]]:
    """Return the sort key of a value: numbers, and lists of them by mean; then text as the study lists it."""
    try:
        numbers = tuple(float(part) for part in text.split(", "))
    except ValueError:
        return 1, listed.index(text) if text in listed else -1, ()
    return 0, sum(numbers) / len(numbers), numbers


def arm_text(study: Study, arm: Arm, reference: Arm | None = None) -> str:
    """Describe a setting by its axes, or by those that differ from a reference."""
    paths = [p for p in study.axes if reference is None or value_text(arm[p]) != value_text(reference[p])]
    return ", ".join(f"{axis_name(p)} {value_text(arm[p])}" for p in paths) or "default"

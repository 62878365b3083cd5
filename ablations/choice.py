"""The settings of a study that are trained again, chosen by the validation scores of its trials."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ablations.search import Direction, Setting, Trial
from ablations.space import Arm
from sunets.core.config import StudyConfig
from sunets.core.metrics import pareto_front

T = TypeVar("T")


def finalists(study: StudyConfig, direction: Direction, trials: Sequence[Trial]) -> list[Arm]:
    """Choose the recipes of each tuned arm that are trained on more tuning seeds: its best few, if there are several.

    The score of one seed does not tell apart recipes that lie within its noise.
    """
    if study.kind != "tuned" or len(study.seeds) == 1:
        return []
    best: list[Arm] = []
    for recipes in _scores(study, direction, trials):
        ranked = sorted(recipes, key=lambda recipe: -recipe[1][0])[: study.confirm]
        best += [setting for setting, _ in ranked if len(ranked) > 1]
    return best


def confirmed(
    study: StudyConfig, direction: Direction, trials: Sequence[Trial], identity: Callable[[Arm], Any]
) -> list[Arm]:
    """Choose what is trained again on fresh seeds: each arm's best recipe, or the base and points of the front.

    Args:
        study: a tuned one or a search.
        direction: of the score, the first objective.
        trials: those of the search and, of a tuned study, of the finalists.
        identity: equal for settings that are the same training.
    """
    if study.kind == "tuned":
        # A finalist that diverged on a seed has fewer scores. Of equal means, the first.
        arms = _scores(study, direction, trials)
        return [max(recipes, key=lambda r: (len(r[1]), statistics.fmean(r[1])))[0] for recipes in arms]
    finished = [t for t in trials if t.status == "finished"]
    front = pareto_front([(_gain(direction, t), -t.result["values"]["cost.gmacs"]) for t in finished])
    chosen = [without_seed(trial.setting) for trial in spread([finished[i] for i in front], study.confirm)]
    unique: dict[Any, Arm] = {}
    for setting in ({}, *chosen):  # the base first, which may lie on the front: it stays the reference
        unique.setdefault(identity(setting), setting)
    return list(unique.values())


def spread(items: Sequence[T], count: int) -> list[T]:
    """Choose `count` items at about equal distances, the first and the last among them."""
    if count >= len(items):
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def without_seed(setting: Setting) -> Arm:
    """Return a trial's setting without its training seed."""
    return {path: value for path, value in setting.items() if path != "seed"}


def _scores(study: StudyConfig, direction: Direction, trials: Sequence[Trial]) -> list[list[tuple[Arm, list[float]]]]:
    """List the finished recipes of each tuned arm and their scores by seed, larger is better, in order of trials."""
    arms: dict[str, dict[str, tuple[Arm, list[float]]]] = {}
    for trial in trials:
        if trial.status == "finished" and trial.duplicate_of is None:
            setting = without_seed(trial.setting)
            recipes = arms.setdefault(json.dumps([setting.get(axis.path) for axis in study.axes]), {})
            recipes.setdefault(json.dumps(setting), (setting, []))[1].append(_gain(direction, trial))
    return [list(recipes.values()) for recipes in arms.values()]


def _gain(direction: Direction, trial: Trial) -> float:
    """Return the score of a trial, its first objective, so that larger is better."""
    score = float(next(iter(trial.result["values"].values())))
    return score if direction == "maximize" else -score

"""What explains the variance of a score: exactly over a complete grid, by a random forest over a sampler's trials."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray

from ablations.report.results import Study, axis_name
from sunets.core.record import Record
from sunets.report.records import FINISHED
from sunets.report.write import Table, value_text

FOREST_TRIALS = 12
"""Trials below which no forest is fitted."""
RESAMPLES = 40
"""Bootstrap samples of the trials behind the spread of an importance."""

SEED = "seed"
NOISE = "noise"
"""All interactions of the seed with the axes: what the axes explain neither alone nor together."""
Term = tuple[str, ...]
"""Axes that interact; one alone; or the seed or the noise."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


def decompose(scores: NDArray[np.float64]) -> dict[tuple[int, ...], float]:
    """Return the share of the variance that each set of dimensions explains beyond its subsets.

    `scores` has a value per cell of the grid, a dimension per factor. Sets are indices of dimensions, smallest first;
    the shares add up to 1.
    """
    dims = range(scores.ndim)
    effects: dict[tuple[int, ...], NDArray[np.float64]] = {(): scores.mean(keepdims=True)}
    for size in range(1, scores.ndim + 1):
        for chosen in itertools.combinations(dims, size):
            mean = scores.mean(axis=tuple(d for d in dims if d not in chosen), keepdims=True)
            below = (part for n in range(size) for part in itertools.combinations(chosen, n))
            effects[chosen] = mean - sum(effects[part] for part in below)
    variance = float(scores.var())
    return {chosen: float((effect**2).mean()) / variance for chosen, effect in effects.items() if chosen}


def variance_shares(study: Study) -> dict[Term, float] | None:
    """Return the share of the variance over all settings and seeds that axes, interactions and the seed explain.

    Settings that are the same training as another count under each of their names. None where the study has no
    complete grid of at least two settings and seeds that can be compared, or its scores do not differ.
    """
    if not study.crossed or not study.comparable:
        return None
    cells = {arm: setting.scores for arm, setting in study.by_arm().items()}
    values = {path: study.in_order(path, (arm[i] for arm in cells)) for i, path in enumerate(study.axes)}
    varied = [i for i, path in enumerate(study.axes) if len(values[path]) > 1]
    seeds = sorted({seed for scores in cells.values() for seed in scores})
    grid = list(itertools.product(*values.values()))
    if not varied or len(seeds) < 2 or any(seed not in cells.get(arm, {}) for arm in grid for seed in seeds):
        return None
    scores = np.array([[cells[arm][seed] for seed in seeds] for arm in grid])
    scores = scores.reshape(*(len(values[study.axes[i]]) for i in varied), len(seeds))
    if np.ptp(scores) == 0:
        return None
    shares: dict[Term, float] = {}
    for chosen, share in decompose(scores).items():
        paths = tuple(study.axes[varied[d]] for d in chosen if d < len(varied))
        if len(varied) in chosen:
            paths = (NOISE,) if paths else (SEED,)
        shares[paths] = shares.get(paths, 0.0) + share
    return shares


def term_name(term: Term) -> str:
    """Put a term into words."""
    names = {SEED: "Seed", NOISE: "Noise (seed x axes)"}
    return " x ".join(names.get(part) or axis_name(part) for part in term)


def variance_table(study: Study) -> Table | None:
    """Return one row per term of the decomposition, in a fixed order."""
    if (shares := variance_shares(study)) is None:
        return None
    rows = [{"study": study.name, "term": " x ".join(term), "share": share} for term, share in shares.items()]
    lines = [{"Term": term_name(term), "Share of variance (%)": f"{100 * share:.1f}"} for term, share in shares.items()]
    note = (
        "Functional ANOVA by sums of squares over the complete grid of settings and seeds: exact, no model is fitted. "
        "Settings that are the same training count under each of their names."
    )
    return Table(
        f"{study.name}_variance",
        f"Ablation {study.name}: what explains the variance of {study.shown.name}.",
        pd.DataFrame(rows),
        pd.DataFrame(lines),
        (note,),
    )


def importance(study: Study) -> dict[str, tuple[float, float, float]] | None:
    """Estimate by a random forest what each axis alone explains of a sampler's trials, or of an incomplete grid's.

    Of a grid, the seed is among the axes.

    Returns:
        Axis -> share of the variance and the ends of its 95 % bootstrap interval, largest first; None for a complete
        grid, which needs no forest, one axis at a time, fewer than `FOREST_TRIALS` finished trials, equal scores, or
        a single axis.
    """
    if not study.sampled and variance_shares(study) is not None:
        return None
    rows = study.sampled or study.final
    key = study.search_key if study.sampled else study.headline
    trials = [
        (_factors(study, r), r["scores"][key])
        for r in rows
        if r["status"] == FINISHED and r.get("duplicate_of") is None
    ]
    varied = [p for p in trials[0][0] if len({str(t[0][p]) for t in trials}) > 1] if trials else []
    if study.config.kind == "one_at_a_time" or len(trials) < FOREST_TRIALS or len(set(varied) - {"seed"}) < 2:
        return None
    combinations = math.prod(len({str(t[0][p]) for t in trials}) for p in varied)
    if len({score for _, score in trials}) < 2 or len({str(t[0]) for t in trials}) == combinations:
        return None
    space = {path: _distribution([t[0][path] for t in trials]) for path in varied}
    rng = np.random.default_rng(0)
    point = _fanova(space, trials, seed=0, trees=64)
    draws = []
    for resample in range(RESAMPLES):
        chosen = [trials[i] for i in rng.integers(len(trials), size=len(trials))]
        if len({score for _, score in chosen}) > 1:
            draws.append(_fanova(space, chosen, seed=resample + 1, trees=16))
    shares = {}
    for path in varied:
        low, high = np.quantile([d[path] for d in draws], [0.025, 0.975])
        shares[path] = (point[path], float(low), float(high))
    return dict(sorted(shares.items(), key=lambda item: -item[1][0]))


def _factors(study: Study, record: Record) -> dict[str, Any]:
    values = record["arm"] | record["tuned"] | ({} if study.sampled else {"seed": record["seed"]})
    return {p: v if type(v) in (int, float) else value_text(v) for p, v in values.items()}


def _distribution(values: Sequence[Any]) -> optuna.distributions.BaseDistribution:
    """Return the range or the choices that the values came from, as far as they show it."""
    if all(isinstance(v, float) for v in values) and len(set(values)) > 2:
        return optuna.distributions.FloatDistribution(min(values), max(values), log=min(values) > 0)
    return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))


def _fanova(
    space: Mapping[str, Any], trials: Iterable[tuple[Mapping[str, Any], float]], *, seed: int, trees: int
) -> dict[str, float]:
    study = optuna.create_study()
    for values, score in trials:
        params = {path: values[path] for path in space}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=dict(space), value=score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about experimental parts
        forest = optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=seed)
        return optuna.importance.get_param_importances(study, evaluator=forest, normalize=False)

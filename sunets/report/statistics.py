"""Means, intervals, paired differences, verdicts and power from a handful of seeds.

Two kinds of uncertainty: *seeds* (the same recipe trained again: `mean_interval`, `paired_difference`) and *images*
(another test set of the same kind: `bootstrap_scores`).

Every interval is for one comparison. Where a table makes several, `holm` adjusts the p-values, of differences and of
equivalences alike, and `verdict` judges by the adjusted ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from sunets.core.metrics import mean_iou

CONFIDENCE = 0.95
"""Coverage of every interval in tables and figures."""

BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "undecided"
POWER = 0.8
"""Probability with which a detectable difference is found."""
_ROUNDING = 8 * np.finfo(np.float64).eps
"""Relative spread below which values agree to the last digit."""


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval around it, in the unit of the values."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Half the interval's width; None without an interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference(Estimate):
    """Mean paired difference to a reference, and what tests say of it."""

    p_value: float | None
    """Two-sided p-value of no difference; None where nothing was tested."""
    sd: float | None = None
    """Standard deviation of the differences over the seeds; None without spread."""
    wins: int = 0
    """Seeds on which the row beats its reference."""
    untested: str = ""
    """Why nothing was tested."""

    @property
    def detectable(self) -> float | None:
        """True difference that these seeds would have found with `POWER`; None without spread."""
        return None if self.sd is None else detectable_difference(self.sd, self.n)

    def equivalence_p(self, margin: float) -> float | None:
        """p-value of a true difference of `margin` or more, by two one-sided t-tests (Schuirmann, 1987).

        It is the larger of the two, doubled: at most 0.05 exactly where the 95 % interval lies within +- margin.
        """
        if self.sd is None:
            return None
        t = (margin - abs(self.mean)) * math.sqrt(self.n) / self.sd
        return min(1.0, float(2 * stats.t.sf(t, self.n - 1)))


def detectable_difference(sd: float, n: int, power: float = POWER) -> float:
    """Smallest true difference that a paired two-sided t-test at the 5 % level finds with the given power.

    Args:
        sd: standard deviation of the paired differences; the result has its unit.
        n: number of pairs, at least 2.
        power: probability of finding it.
    """
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    # t² follows a noncentral F with 1 and n - 1 degrees of freedom; this inverts its distribution for noncentrality.
    return float(sd * math.sqrt(special.ncfdtrinc(1, n - 1, 1 - power, critical**2) / n))


def verdict(mean: float, p: float | None, equivalence_p: float | None, *, higher_is_better: bool = True) -> str:
    """Judge a difference by its p-values: equivalent, better, worse or undecided.

    Equivalence goes first: a difference that is surely smaller than the margin is "equivalent" even where its sign is
    sure too. "Undecided" means that the seeds exclude neither.
    """
    if equivalence_p is not None and equivalence_p <= 1 - CONFIDENCE:
        return EQUIVALENT
    if p is not None and p <= 1 - CONFIDENCE:
        return BETTER if (mean > 0) == higher_is_better else WORSE
    return UNDECIDED


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean and Student t-interval of independent values; one value, or values that are all equal, have no interval.

    Equal scores of several seeds are those of a network that collapsed, or of an exact figure: an interval of no width
    would claim a certainty that they do not give.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("mean_interval: no values")
    if not np.isfinite(x).all():
        raise ValueError(f"mean_interval: values that are not finite: {list(values)}")
    mean = float(x.mean())
    if x.size == 1 or np.ptp(x) <= _ROUNDING * np.abs(x).max():
        return Estimate(mean, None, None, int(x.size))
    half = _half_width(x)
    return Estimate(mean, mean - half, mean + half, int(x.size))


def _half_width(x: NDArray[np.float64]) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))


def paired_difference(
    values: Mapping[int, float],
    reference: Mapping[int, float],
    *,
    higher_is_better: bool = True,
) -> Difference | None:
    """Mean of value - reference over the seeds that both have, with its t-interval.

    Args:
        values: seed -> score of a model.
        reference: seed -> score of the model it is compared with.
        higher_is_better: direction of the score; decides what a win is.

    Returns:
        The difference; without an interval and untested where there is one common seed, or where all seeds differ by
        the same amount. None without a common seed.

    Raises:
        ValueError: a value is not finite.
    """
    common = sorted(values.keys() & reference.keys())
    if not common:
        return None
    ours, theirs = (np.array([v[s] for s in common], dtype=np.float64) for v in (values, reference))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("paired_difference: values that are not finite")
    delta = ours - theirs
    n, mean = len(delta), float(delta.mean())
    wins = int((delta > 0).sum() if higher_is_better else (delta < 0).sum())
    if n == 1:
        return Difference(mean, None, None, 1, None, None, wins, "not tested (1 seed)")
    if np.ptp(delta) <= _ROUNDING * max(np.abs(ours).max(), np.abs(theirs).max()):
        if not delta.any():
            return Difference(0.0, None, None, n, 1.0)
        return Difference(mean, None, None, n, None, None, wins, "not tested (the seeds do not differ)")
    half, sd = _half_width(delta), float(delta.std(ddof=1))
    p_value = float(2 * stats.t.sf(abs(mean) * math.sqrt(n) / sd, n - 1))
    return Difference(mean, mean - half, mean + half, n, p_value, sd, wins)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of a family of p-values (Holm, 1979); None stays None and does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted


def bootstrap_scores(
    confusions: Sequence[NDArray], *, resamples: int = 1000, seed: int = 0, max_bytes: int = 1 << 28
) -> NDArray[np.float64]:
    """Scores (mIoU) of resampled test sets, averaged over seeds.

    The draws depend on `seed` and the number of images only, so two models on the same images get the same
    resamples, and the difference of their results is the paired one.

    Args:
        confusions: one (n_images, K, K) array a training seed, on the same images.
        resamples: test sets drawn with replacement.
        seed: of the drawing.
        max_bytes: working memory for the resampled matrices.

    Returns:
        (resamples,) scores in 0..1; `percentile_interval` makes an interval of them.
    """
    n, k, _ = confusions[0].shape
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, max_bytes // (8 * max(n, k * k))))
    flat = [c.reshape(n, -1).astype(np.float64) for c in confusions]
    parts = []
    for start in range(0, resamples, chunk):
        # How often each image is drawn; row by row, so that the chunk size does not change the draws.
        size = min(chunk, resamples - start)
        weights = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(size)]).astype(np.float64)
        parts.append(np.mean([mean_iou((weights @ c).reshape(-1, k, k)) for c in flat], axis=0))
    return np.concatenate(parts)


def percentile_interval(samples: NDArray) -> tuple[float, float] | None:
    """Percentile interval of bootstrap results; None where they do not differ, which tells nothing of their spread."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(samples, [tail, 1 - tail])
    return (float(low), float(high)) if high - low > _ROUNDING * abs(high) else None

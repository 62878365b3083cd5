"""Means, intervals, paired differences, verdicts and power from a handful of seeds.

Two kinds of uncertainty: *seeds* (the same recipe trained again: `mean_interval`, `paired_difference`), and *seeds and
images* (trained again, and scored on another test set of the same kind: `bootstrap_scores`, `joint_interval`).

Every interval is for one comparison. Where a table makes several, `holm` adjusts the p-values, of differences and of
equivalences alike, and `verdict` judges by the adjusted ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from scipy.special import expit, logit

from sunets.core.metrics import mean_iou

CONFIDENCE = 0.95
"""Coverage of every interval in tables and figures."""

BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "undecided"
POWER = 0.8
"""Probability with which a detectable difference is found."""
_EDGE = 1e-6
"""Distance from 0 and 1 below which a mean is taken as one of them."""
_ROUNDING = 8 * np.finfo(np.float64).eps
"""Relative spread below which values agree to the last digit."""


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval around it, in the unit of the values."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def scaled(self, factor: float) -> Estimate:
        """Convert to another unit."""
        low, high = (None if end is None else factor * end for end in (self.low, self.high))
        return Estimate(factor * self.mean, low, high, self.n)

    @property
    def half_width(self) -> float | None:
        """Half the interval's width; None without an interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference(Estimate):
    """Mean paired difference from a reference, and what tests say about it."""

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
        """Return the p-value of a true difference of `margin` or more, by two one-sided t-tests (Schuirmann, 1987).

        It is the larger of the two, doubled: at most 0.05 exactly where the 95 % interval lies within +- margin.
        """
        if self.sd is None:
            return None
        t = (margin - abs(self.mean)) * math.sqrt(self.n) / self.sd
        return min(1.0, float(2 * stats.t.sf(t, self.n - 1)))


def detectable_difference(sd: float, n: int, power: float = POWER) -> float:
    """Return the smallest true difference that a paired two-sided t-test at 5 % finds with the given power.

    It has the unit of `sd`, the standard deviation of the n >= 2 paired differences.
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
    """Return the mean and Student t-interval of independent values; one value, or equal values, have no interval.

    If all seeds score the same, the network collapsed or the figure is exact: an interval of no width would overstate
    what is known.

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
    values: Mapping[int, float], reference: Mapping[int, float], *, higher_is_better: bool = True
) -> Difference | None:
    """Return the mean of value - reference over the seeds that both have, with its t-interval.

    Without an interval and untested where there is one common seed, or where all seeds differ by the same amount. None
    without a common seed. The direction of the score decides what a win is.

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
    """Adjust a family of p-values by Holm's step-down method (Holm, 1979); None stays None and does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted


def bootstrap_scores(
    confusions: Sequence[NDArray],
    score: Callable[[NDArray], NDArray[np.float64]] = mean_iou,
    *,
    blocks: Sequence[int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    max_bytes: int = 1 << 28,
) -> NDArray[np.float64]:
    """Score every seed on resampled test sets, the same for all seeds.

    Args:
        confusions: per training seed the (n_images, K, K) counts of the same images.
        score: (..., K, K) counts -> (..., *S) scores.
        blocks: number of the block of each image; blocks are drawn as a whole. None draws single images.
        resamples: R, the number of test sets drawn with replacement.
        seed: of the drawing.
        max_bytes: working memory for the resampled matrices.

    Returns:
        (n_seeds, R, *S) scores.
    """
    k = confusions[0].shape[1]
    numbers, starts = np.unique(np.arange(len(confusions[0])) if blocks is None else blocks, return_inverse=True)
    n = len(numbers)
    sums = np.zeros((len(confusions), n, k * k))
    for total, counts in zip(sums, confusions, strict=True):
        np.add.at(total, starts, counts.reshape(len(counts), -1))
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, max_bytes // (8 * max(n, k * k))))
    parts = []
    for start in range(0, resamples, chunk):
        # How often each block is drawn; row by row, so that the chunk size does not change the draws.
        size = min(chunk, resamples - start)
        weights = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(size)]).astype(np.float64)
        parts.append(np.stack([score((weights @ total).reshape(-1, k, k)) for total in sums]))
    return np.concatenate(parts, axis=1)


def joint_interval(scores: Sequence[float], samples: NDArray | None = None) -> Estimate:
    """Return the mean over the seeds with an interval over seeds and images together, which stays within 0 to 1.

    Hierarchical bootstrap: n - 1 of n seeds are drawn, which makes the variance unbiased, and scored on a resampled
    test set. Percentile intervals of a few seeds cover the truth too rarely; the interval is built from the
    bootstrap's standard error on the logit scale and Student's quantile with n - 1 degrees of freedom. With one seed it
    is over the images alone. Without an interval where nothing varies, and where a mean is 0 or 1, of the scores or of
    a draw: their logit is infinite, and any finite stand-in would decide the width.

    Args:
        scores: of the seeds on the whole test set, as fractions.
        samples: (n_seeds, R) of `bootstrap_scores`, NaN where a resampled test set lacks a class; None takes the test
            set as given.
    """
    n, mean = len(scores), float(np.mean(scores))
    fixed = np.repeat(np.asarray(scores, dtype=np.float64)[:, None], 1000, axis=1)
    drawn = fixed if samples is None else samples
    weights = np.random.default_rng(0).multinomial(max(1, n - 1), [1 / n] * n, size=drawn.shape[1]).T
    counted = np.sum(weights * np.isfinite(drawn), axis=0)  # 0 where a resampled test set lacks the class
    means = np.nansum(weights * drawn, axis=0)[counted > 0] / counted[counted > 0]
    inside = 0 < mean < 1 and means.size and means.min() > _EDGE and means.max() < 1 - _EDGE
    if not inside or np.ptp(means) <= _ROUNDING * mean:
        return Estimate(mean, None, None, n)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1 if n > 1 else np.inf) * logit(means).std())
    low, high = expit(logit(mean) - half), expit(logit(mean) + half)
    return Estimate(mean, float(low), float(high), n)

"""The one comparison of tables and pages: means, paired differences and their verdicts, as text and as columns."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sunets.core.metrics import higher_is_better
from sunets.report.records import Quantity
from sunets.report.statistics import (
    BETTER,
    CONFIDENCE,
    WITHIN_NOISE,
    WORSE,
    Difference,
    Estimate,
    holm,
    paired_difference,
)

K = TypeVar("K", bound=Hashable)


def estimate_text(q: Quantity, estimate: Estimate | None) -> str:
    """`48.31 ± 0.92` in the quantity's unit; the mean alone where there is no interval."""
    if estimate is None:
        return ""
    half = estimate.half_width
    return q.text(estimate.mean) + (f" ± {q.text(half)}" if half is not None else "")


def difference_text(q: Quantity, difference: Difference | None) -> str:
    """`+1.20 [+0.31, +2.09]` in the quantity's unit."""
    if difference is None:
        return ""
    text = q.text(difference.mean, sign=True)
    if difference.low is None:
        return text
    return f"{text} [{q.text(difference.low, sign=True)}, {q.text(difference.high, sign=True)}]"


@dataclass(frozen=True)
class Comparison:
    """The difference of one row to its table's reference, judged as one of the table's several comparisons."""

    difference: Difference | None
    """Paired by seed; None without a common seed."""
    adjusted_p: float | None
    """Its p-value after Holm's adjustment over the table."""

    @property
    def verdict(self) -> str:
        """Better, worse or within noise, adjusted for the number of comparisons; else why nothing was tested."""
        return WITHIN_NOISE if self._lost else self._alone

    @property
    def verdict_text(self) -> str:
        """The verdict as a table shows it, which says where the adjustment changed it."""
        return f"{self._alone}, but {WITHIN_NOISE} after Holm" if self._lost else self._alone

    @property
    def _alone(self) -> str:
        return self.difference.verdict if self.difference else "not tested (no common seed)"

    @property
    def _lost(self) -> bool:
        """Whether a difference that is clear by itself may be one of many that chance made."""
        return self._alone in (BETTER, WORSE) and self.adjusted_p is not None and self.adjusted_p > 1 - CONFIDENCE


NO_COMPARISON = Comparison(None, None)
"""That of a reference."""


def compare_all(
    family: Mapping[K, Mapping[int, float]], reference: Mapping[int, float], key: str
) -> dict[K, Comparison]:
    """Compare each member of a family with one reference, p-values adjusted over the family.

    Args:
        family: what a row is called -> seed -> score.
        reference: seed -> score.
        key: record key of the score, which has the direction.
    """
    better = higher_is_better(key)
    differences = {k: paired_difference(v, reference, higher_is_better=better) for k, v in family.items()}
    adjusted = holm([d.p_value if d else None for d in differences.values()])
    return {k: Comparison(d, p) for (k, d), p in zip(differences.items(), adjusted, strict=True)}


def estimate_columns(key: str, estimate: Estimate | None) -> dict[str, Any]:
    """CSV columns of a mean and its interval; empty where there is none."""
    e = estimate
    return {
        f"{key}.mean": e.mean if e else None,
        f"{key}.ci95_low": e.low if e else None,
        f"{key}.ci95_high": e.high if e else None,
    }


def difference_columns(key: str, reference: str, comparison: Comparison) -> dict[str, Any]:
    """CSV columns of a paired difference to what `reference` names; empty where there is none."""
    d = comparison.difference
    return {
        f"{key}.difference.reference": reference if d else None,
        f"{key}.difference.mean": d.mean if d else None,
        f"{key}.difference.ci95_low": d.low if d else None,
        f"{key}.difference.ci95_high": d.high if d else None,
        f"{key}.difference.n_seeds": d.n if d else None,
        f"{key}.difference.p": d.p_value if d else None,
        f"{key}.difference.p_holm": comparison.adjusted_p,
        f"{key}.difference.verdict": d.verdict if d else None,
    }

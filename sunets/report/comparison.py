"""Means with their intervals and paired differences, as text and as columns, for every table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sunets.report.records import Quantity, quantity
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


def verdict_text(difference: Difference | None, adjusted_p: float | None) -> str:
    """The verdict, and whether it survives Holm's adjustment."""
    if difference is None:
        return "not tested (no common seed)"
    if difference.verdict in (BETTER, WORSE) and adjusted_p is not None and adjusted_p > 1 - CONFIDENCE:
        return f"{difference.verdict}, but {WITHIN_NOISE} after Holm"
    return difference.verdict


def compare_all(
    family: Mapping[str, dict[int, float]], reference: dict[int, float], key: str
) -> dict[str, tuple[Difference | None, float | None]]:
    """Each member's difference to the reference, with the p-value adjusted over the family."""
    better = quantity(key).higher_is_better
    differences = {k: paired_difference(v, reference, higher_is_better=better) for k, v in family.items()}
    adjusted = holm([d.p_value if d else None for d in differences.values()])
    return {k: (d, p) for (k, d), p in zip(differences.items(), adjusted, strict=True)}


def estimate_columns(key: str, estimate: Estimate | None) -> dict[str, Any]:
    """CSV columns of a mean and its interval; empty where there is none."""
    e = estimate
    return {
        f"{key}.mean": e.mean if e else None,
        f"{key}.low95": e.low if e else None,
        f"{key}.high95": e.high if e else None,
    }


def difference_columns(
    key: str, reference: str, difference: Difference | None, adjusted: float | None
) -> dict[str, Any]:
    """CSV columns of a paired difference to what `reference` names; empty where there is none."""
    d = difference
    return {
        f"{key}.difference.reference": reference if d else None,
        f"{key}.difference.mean": d.mean if d else None,
        f"{key}.difference.low95": d.low if d else None,
        f"{key}.difference.high95": d.high if d else None,
        f"{key}.difference.n_seeds": d.n if d else None,
        f"{key}.difference.p": d.p_value if d else None,
        f"{key}.difference.p_holm": adjusted,
        f"{key}.difference.verdict": d.verdict if d else None,
    }

"""Comparisons shared by tables, figures and pages: what may be compared, differences, verdicts, text, columns."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sunets.core.config import ReportConfig
from sunets.core.metrics import class_iou, higher_is_better, mean_iou
from sunets.core.record import Record
from sunets.report.records import Quantity, Records, Runs, quantity
from sunets.report.statistics import (
    POWER,
    UNDECIDED,
    Difference,
    Estimate,
    bootstrap_scores,
    holm,
    joint_interval,
    paired_difference,
    verdict,
)

K = TypeVar("K", bound=Hashable)

NOT_COMPARABLE = "not comparable"
_IGNORED = (
    "seed", "model", "variant", "data.root", "data.workers", "data.cache", "train.checkpoint_seconds", "train.threads",
    "train.validate_every", "evaluate.batch_size", "evaluate.num_qualitative", "evaluate.variants",
)  # fmt: skip
"""Parameters that tell the row apart, that change no score, or that are compared under another name."""
_FIRST = ("data_digest", "split", "variant", "tune.trials", "tune", "train.epochs", "train.batch_size")
"""Keys that a verdict names before others."""


VIDEO_BLOCKS = {"camvid": 20}
"""Data set -> consecutive frames resampled together: neighbouring frames of a video are not independent."""
BOOTSTRAP_LIMIT = 50_000_000
"""Confusion counts per model above which images are not resampled (it would take minutes)."""


def joint_estimate(records: Records, model: str, key: str, variant: str | None = None) -> Estimate | None:
    """Return the mean of a score over the seeds with its interval over seeds and images, in the unit of the records.

    A score that is not a function of the images' confusion matrices has an interval over the seeds alone. None without
    a score.
    """
    unit = 100 / quantity(key).scale
    scores = records.scores(model, key, variant)
    if not scores:
        return None
    samples = None
    if covers_images(records, model, key, variant):
        samples = _resampled(records, model, variant or records.variants[0])[key]
    return joint_interval([v / unit for v in scores.values()], samples).scaled(unit)


def covers_images(records: Records, model: str, key: str, variant: str | None = None) -> bool:
    """Return whether the interval of `joint_estimate` is one over seeds and images."""
    samples = _resampled(records, model, variant or records.variants[0]).get(key)
    return samples is not None and len(samples) == len(records.scores(model, key, variant))


@functools.lru_cache(maxsize=32)
def _resampled(records: Records, model: str, variant: str) -> dict[str, NDArray[np.float64]]:
    """Score -> (n_seeds, R) values on resampled test sets; empty where images cannot be resampled."""
    confusions, images = records.confusions(model, variant)
    blocks = video_blocks(images, VIDEO_BLOCKS.get(records.data_name or "", 1))
    if len(set(blocks)) < 2 or sum(c.size for c in confusions) > BOOTSTRAP_LIMIT:
        return {}
    samples = bootstrap_scores(confusions, _all_scores, blocks=blocks)
    names = [*_SUMMARIES, *(f"score.iou.{name}" for name in records.classes)]
    return {name: samples[..., i] for i, name in enumerate(names)} if samples.shape[-1] >= len(names) else {}


_SUMMARIES = ("score.miou", "score.pixel_accuracy", "score.mean_accuracy")


def _all_scores(confusion: NDArray) -> NDArray[np.float64]:
    """Summarise (..., K, K) counts as (..., 3 + K): `_SUMMARIES`, the IoU per class; NaN where nothing was counted."""
    hits, truth = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1)
    recall = np.divide(hits, truth, out=np.zeros(hits.shape), where=truth > 0)
    accuracy = recall.sum(-1) / np.maximum(1, (truth > 0).sum(-1))
    summaries = [mean_iou(confusion), hits.sum(-1) / np.maximum(1, truth.sum(-1)), accuracy]
    return np.concatenate([np.stack(summaries, axis=-1), class_iou(confusion)], axis=-1)


def video_blocks(images: Sequence[str], length: int) -> list[int]:
    """Number each image's block of `length` consecutive images of a sequence; an id names it before its last `_`."""
    numbers: dict[tuple[str, int], int] = {}
    seen: dict[str, int] = {}
    blocks = []
    for image in images:
        sequence = image.rpartition("_")[0] if length > 1 else ""
        seen[sequence] = seen.get(sequence, -1) + 1
        blocks.append(numbers.setdefault((sequence, seen[sequence] // length), len(numbers)))
    return blocks


def joint_note(records: Records, keys: Sequence[str]) -> str:
    """Say below a table of some scores what its intervals cover."""
    scored = {k: [m for m in records.labels if records.scores(m, k)] for k in keys}
    alone = {k: [m for m in models if not covers_images(records, m, k)] for k, models in scored.items()}
    if all(alone.values()) and alone == scored:
        return "In brackets: 95 % interval over the seeds alone (logit scale, Student's t)."
    length = VIDEO_BLOCKS.get(records.data_name or "")
    images = f"blocks of {length} consecutive frames of a sequence" if length else "images"
    names = [
        quantity(k).name + (f" of {', '.join(records.labels[m] for m in rows)}" if rows != scored[k] else "")
        for k, rows in alone.items()
        if rows
    ]
    return (
        "In brackets: 95 % interval over seeds and test images together (bootstrap of seeds and, within them, of "
        f"{images}; standard error on the logit scale, Student's t); with one seed, over the images alone; none "
        "where a resampled score is 0 or 100 %. The CSV also has the t-interval over the seeds."
    ) + (f" Over the seeds alone: {', '.join(names)}." if names else "")


def estimate_text(q: Quantity, estimate: Estimate | None) -> str:
    """Format as `48.31 [47.39, 49.20]` in the quantity's unit; the mean alone without an interval."""
    if estimate is None:
        return ""
    cut = within_range(q, estimate)
    return q.text(cut.mean) + (f" [{q.text(cut.low)}, {q.text(cut.high)}]" if cut.low is not None else "")


def within_range(q: Quantity, estimate: Estimate) -> Estimate:
    """Cut an interval, which a t-interval over few seeds may need, at 0 and 100 %."""
    if q.unit != "%" or estimate.low is None or estimate.high is None:
        return estimate
    return replace(estimate, low=max(0.0, estimate.low), high=min(100 / q.scale, estimate.high))


def difference_text(q: Quantity, difference: Difference | None) -> str:
    """Format as `+1.20 [+0.31, +2.09]` in the quantity's unit."""
    if difference is None:
        return ""
    text = q.text(difference.mean, sign=True)
    if difference.low is None:
        return text
    return f"{text} [{q.text(difference.low, sign=True)}, {q.text(difference.high, sign=True)}]"


def undecided_text(q: Quantity, comparison: Comparison) -> str:
    """Write `worse before Holm's adjustment; 3 seeds would detect 5.4 points with 80 % power`; empty if decided."""
    if comparison.verdict != UNDECIDED:
        return ""
    alone, d = comparison.unadjusted_verdict, comparison.difference
    parts = [f"{alone} before Holm's adjustment"] if alone != UNDECIDED else []
    if d and (detectable := _detectable(q, d)):
        parts.append(f"{d.n} seeds would detect {detectable} with {100 * POWER:.0f} % power")
    return "; ".join(parts)


def _detectable(q: Quantity, difference: Difference | None) -> str:
    if difference is None or difference.detectable is None:
        return ""
    return f"{q.scale * difference.detectable:.1f} {q.difference_unit}"


@dataclass(frozen=True)
class Comparison:
    """The difference of one row from its table's reference, judged as one of the table's several comparisons."""

    difference: Difference | None
    """Paired by seed; None without a common seed, and where the rows are not comparable."""
    adjusted_p: float | None
    """Its p-value after Holm's adjustment over the table."""
    verdict: str = ""
    """Better, worse, equivalent or undecided after Holm's adjustment; else why nothing was tested."""
    unadjusted_verdict: str = ""
    """The verdict of this comparison alone."""
    declared: tuple[str, ...] = ()
    """Declared differences between the rows, such as `train.init_from A / B`."""

    @property
    def comparable(self) -> bool:
        """Whether nothing but the networks and what is declared tells the rows apart."""
        return not self.verdict.startswith(NOT_COMPARABLE)


NO_COMPARISON = Comparison(None, None)
"""Comparison of a reference row, which is compared with nothing."""


WINS = "Wins: seeds on which the row is ahead of what it is compared with."


def wins_text(comparison: Comparison) -> str:
    """Write on how many of the common seeds a row beats its reference, such as `4/5`."""
    d = comparison.difference
    return f"{d.wins}/{d.n}" if d else ""


def verdict_text(q: Quantity, comparison: Comparison) -> str:
    """Format a verdict for a table, with the one before Holm's adjustment and, if undecided, what was detectable."""
    alone, judged = comparison.unadjusted_verdict, comparison.verdict
    parts = [f"{alone} before Holm"] if alone != judged else []
    if judged == UNDECIDED and (detectable := _detectable(q, comparison.difference)):
        parts.append(f"{detectable} detectable")
    return f"{judged} ({'; '.join(parts)})" if parts else judged


def compare_all(
    family: Mapping[K, Runs], reference: Runs, key: str, report: ReportConfig, varied: Collection[str] = ()
) -> dict[K, Comparison]:
    """Compare each member of a family with one reference, as `compare_pairs` does."""
    return compare_pairs({name: (runs, reference) for name, runs in family.items()}, key, report, varied)


def compare_pairs(
    pairs: Mapping[K, tuple[Runs, Runs]], key: str, report: ReportConfig, varied: Collection[str] = ()
) -> dict[K, Comparison]:
    """Compare each row with its reference, p-values adjusted over all pairs that are comparable.

    `report` has the margin of equivalence and the declared differences; dotted keys that the table `varied`, such as
    the axes of a study, are no obstacle.
    """
    rising, margin = higher_is_better(key), report.equivalence_margin_percent / quantity(key).scale
    result: dict[K, Comparison] = {}
    tested: dict[K, Difference] = {}
    for name, (runs, reference) in pairs.items():
        difference = paired_difference(runs.scores, reference.scores, higher_is_better=rising)
        obstacle, declared = differing_settings(runs, reference, report.declared_differences, varied)
        reason = "not tested (no common seed)" if difference is None else obstacle or difference.untested
        result[name] = Comparison(None if obstacle else difference, None, reason, reason, declared)
        if difference is not None and not reason:
            tested[name] = difference
    p_values = [d.p_value for d in tested.values()]
    equivalence = [d.equivalence_p(margin) for d in tested.values()]
    adjusted = zip(holm(p_values), holm(equivalence), strict=True)
    for (name, d), alone, pair in zip(tested.items(), zip(p_values, equivalence, strict=True), adjusted, strict=True):
        single, judged = (verdict(d.mean, *p, higher_is_better=rising) for p in (alone, pair))
        result[name] = replace(result[name], adjusted_p=pair[0], verdict=judged, unadjusted_verdict=single)
    return result


def differing_settings(
    row: Runs, reference: Runs, declared: Collection[str] = (), varied: Collection[str] = ()
) -> tuple[str, tuple[str, ...]]:
    """List what two rows differ in besides their networks, seed by seed.

    Compared are data digest, code hash and every parameter outside `model` that can change a score: data and split,
    budget, recipe, tuning effort, precision, augmentation and the settings of the test-time variant. What tuning chose
    may differ where both rows were tuned alike, and so may the dotted keys or sections that are declared or varied.

    Returns:
        `not comparable: KEY A / B` or an empty text; and `KEY A / B` of each declared difference.
    """
    obstacles, stated = dict[str, str](), dict[str, str]()
    if row.trials != reference.trials:
        obstacles["trials"] = f"tuning trials {row.trials:g} / {reference.trials:g}"
    tuned = _tuned(row.records) & _tuned(reference.records)
    for seed in sorted(row.scores.keys() & reference.scores.keys()):
        ours, theirs = (
            _settings(r for r in runs.records if r["seed"] == seed or r["kind"] == "tune") for runs in (row, reference)
        )
        for key in sorted(ours.keys() | theirs.keys(), key=_rank):
            a, b = ours.get(key, {"absent"}), theirs.get(key, {"absent"})
            if a == b or _within(key, (*varied, *tuned)):
                continue
            text = f"{key} {_shown(a)} / {_shown(b)}"
            (stated if _within(key, declared) else obstacles).setdefault(key, text)
    if not obstacles:
        return "", tuple(stated.values())
    more = f" and {len(obstacles) - 1} more" if len(obstacles) > 1 else ""
    return f"{NOT_COMPARABLE}: {next(iter(obstacles.values()))}{more}", tuple(stated.values())


def _tuned(records: Iterable[Record]) -> set[str]:
    """Return the keys that a row's tuning could choose, including those that its network does not have."""
    keys: set[str] = set()
    for r in (r for r in records if r["kind"] == "tune"):
        keys |= r["chosen"].keys() | {key for key, why in r["left_out"].items() if not why.startswith("fixed by")}
    return keys


def _settings(records: Iterable[Record]) -> dict[str, set[str]]:
    """Map key -> values, as text, that a fair comparison holds fixed: two where training and evaluation disagree."""
    settings: dict[str, set[str]] = {}
    for r in records:
        params = r["params"]
        if r["kind"] == "tune":  # its other parameters are those of its first trial
            params = {k: v for k, v in params.items() if k.startswith("tune.")}
        values = {k: v for k, v in params.items() if not _within(k, _IGNORED)}
        start = f"evaluate.variants.{r['variant']}."
        values |= {f"evaluate.variants.{k.removeprefix(start)}": v for k, v in params.items() if k.startswith(start)}
        values |= {"data_digest": r["provenance"]["data_digest"], "task": r["task"]}
        values[f"code_hash of {r['kind']}"] = r["provenance"]["code_hash"]
        if r["variant"] is not None:
            values["variant"] = r["variant"]
        if "split" in r:
            values["split"] = r["split"]
        if isinstance(path := values.get("train.init_from"), str):  # a chain of trainings names model and seed
            path = f"/{path}".replace(f"/{r['model']}/", "/{model}/").replace(f"seed{r['seed']}.", "seed{seed}.")
            values["train.init_from"] = path.removeprefix("/")
        for key, value in values.items():
            settings.setdefault(key, set()).add(value if isinstance(value, str) else json.dumps(value))
    return settings


def _within(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith((f"{name}.", f"{name} ")) for name in names)


def _rank(key: str) -> tuple[int, str]:
    """Order the keys in a verdict; the code comes last."""
    first = next((i for i, name in enumerate(_FIRST) if _within(key, [name])), len(_FIRST))
    return (first + key.startswith("code_hash"), key)


def _shown(values: Collection[str]) -> str:
    return ", ".join(f"{v[:8]}..." if re.fullmatch("[0-9a-f]{32,}", v) else v for v in sorted(values))


def verdict_note(report: ReportConfig, q: Quantity, compared: Iterable[Comparison]) -> str:
    """Explain a table's verdicts in a note; `compared` are all that Holm's adjustment may cover."""
    comparisons = sum(c.adjusted_p is not None for c in compared)
    margin = f"{report.equivalence_margin_percent:g} {q.difference_unit}"
    adjusted = (
        f" Verdicts are adjusted for {comparisons} comparisons (Holm), differences and equivalences separately: what "
        "is better or worse may still lie within the margin."
        if comparisons > 1
        else ""
    )
    return (
        f"Equivalent: the interval lies within ± {margin}; better, worse: it does not, and it excludes 0; undecided: "
        f"neither. Detectable: the difference that these seeds would find in one comparison with {100 * POWER:.0f} % "
        f"power.{adjusted}"
    )


def declared_notes(compared: Mapping[str, Comparison]) -> list[str]:
    """State below a table the declared differences of its rows, by label, from the reference."""
    texts = [f"{label} {text}" for label, c in compared.items() for text in c.declared]
    what = "Declared differences from the reference (report.declared_differences)"
    return [f"{what}: {'; '.join(texts)}."] if texts else []


def estimate_columns(key: str, estimate: Estimate | None) -> dict[str, Any]:
    """Return the CSV columns of a mean and its t-interval over the seeds; empty where there is none."""
    cut = estimate and within_range(quantity(key), estimate)
    return {f"{key}.mean": cut and cut.mean, f"{key}.ci95_low": cut and cut.low, f"{key}.ci95_high": cut and cut.high}


def difference_columns(key: str, reference: str, comparison: Comparison) -> dict[str, Any]:
    """Return the CSV columns of a paired difference from the row `reference`; empty where there is none."""
    d = comparison.difference
    columns = {
        "reference": d and reference, "mean": d and d.mean, "ci95_low": d and d.low, "ci95_high": d and d.high,
        "n_seeds": d and d.n, "p": d and d.p_value, "p_holm": comparison.adjusted_p, "detectable": d and d.detectable,
        "wins": wins_text(comparison) or None, "verdict": comparison.verdict or None,
    }  # fmt: skip
    return {f"{key}.difference.{name}": value for name, value in columns.items()}

"""The tables of a benchmark: one function each, records -> `Table`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sunets.core.finalists import FINALISTS
from sunets.core.metrics import OBJECT_SIZES, higher_is_better
from sunets.core.record import Record
from sunets.report.comparison import (
    NO_COMPARISON,
    NOT_COMPARABLE,
    WINS,
    Comparison,
    compare_all,
    compare_pairs,
    covers_images,
    declared_notes,
    difference_columns,
    difference_text,
    estimate_columns,
    estimate_text,
    joint_estimate,
    joint_note,
    verdict_note,
    verdict_text,
    wins_text,
)
from sunets.report.records import DIVERGED, FAILED, FINISHED, NOT_RUN, SCORES, Records, cost_rows, quantity
from sunets.report.statistics import mean_interval
from sunets.report.write import NAMES, Table, plural, value_text


def cost(records: Records) -> Table:
    """Return parameters, multiply-adds, memory and receptive field of every model: exact figures."""
    data, view = cost_frames(records.cost)
    notes = [note for key, note in COST_COLUMNS.items() if note and quantity(key).heading in view]
    if "cost.uncounted_operators" in data:
        names = sorted({n for text in data["cost.uncounted_operators"].dropna() for n in text.split(", ") if n})
        notes += [f"Not counted, since counters have no formula for them: {', '.join(names)}."] if names else []
    caption = f"Architectures and their cost{_input(records)}."
    return Table("cost", caption, data, view, (*notes, *_failures(data)))


def cost_frames(records: Sequence[Mapping[str, Any]] | pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the cost table of records of kind "cost", or of their tidy table, as `Records.cost` is.

    Returns:
        Tidy table (model, label, status, reason, cost.*, memory.*, receptive_field.*), and its formatted view without
        columns that no row fills.
    """
    data = records if isinstance(records, pd.DataFrame) else cost_rows(records)
    shown = [key for key in COST_COLUMNS if key in data and data[key].notna().any()]
    columns = {quantity(k).heading: data[k].map(quantity(k).text) for k in shown}
    return data, _with_states(pd.DataFrame({"Model": data.label} | columns), data)


COST_COLUMNS = {
    "cost.output_stride": "Output stride: input size over that of the features that enter the head; of a U-Net, over "
    "that of its bottleneck, which it decodes back to the size of the input.",
    "cost.params_m": "",
    "cost.gmacs": "Multiply-adds of a forward pass (1 G = 2 GFLOPs), and of a forward and backward pass.",
    "cost.gmacs_forward_backward": "",
    "memory.saved_mib": "Saved for backward: what autograd keeps of a training step's forward pass, parameters left "
    "out; recomputing: with memory_efficient=True, where the network has it.",
    "memory.saved_mib_memory_efficient": "",
    "receptive_field.theoretical_px": "Theoretical field: larger side of the centre "
    "pixel's receptive field, cut at the border.",
    "receptive_field.effective_share": "Effective field: smallest share of the input that holds 95 % of the "
    "gradient of a centre logit, of the untrained network; mean over initialisations and images.",
}
"""Columns of the architecture table in order -> the note that explains each."""


def accuracy(records: Records, reference: str) -> Table:
    """Return the mean and interval of every score, and the paired difference of the headline to a reference."""
    headline = records.headline
    q = quantity(headline)
    compared = compared_models(records, reference)
    rows, shown, budgets = [], [], []
    for model, label in records.labels.items():
        row, line = _score_row(records, model, None, (reference, records.labels[reference]), compared.get(model))
        change = row[f"{records.validation}.last_fifth"] = last_fifth(records, model)
        budgets.append(budget_text(headline, change))
        rows.append(row)
        shown.append({"Model": label, "Seeds": str(row["n_seeds"] or "")} | line)
    view = pd.DataFrame(shown).fillna("")
    if any(budgets):
        view.insert(view.shape[1] - 3, "Budget", budgets)
    difference_note = (
        f"Difference: paired by seed, in points of {q.name}, with its 95 % interval over the seeds alone, for these "
        f"test images and one comparison. {WINS} {verdict_note(records.report, q, compared.values())}"
    )
    if not compared:
        view = view.iloc[:, :-3]
    notes = [
        joint_note(records, SCORES[records.task]),
        *([difference_note] if compared else []),
        *declared_notes({records.labels[model]: c for model, c in compared.items()}),
        *_caveats(records),
        *budget_note(headline, [row[f"{records.validation}.last_fifth"] for row in rows], "network"),
        *run_failures(records),
    ]
    return Table("accuracy", f"Accuracy{_split(records)}.", pd.DataFrame(rows), view, tuple(notes))


def compared_models(records: Records, reference: str, key: str | None = None) -> dict[str, Comparison]:
    """Compare a score of every other model with the reference's; the headline by default."""
    key = key or records.headline
    others = {m: records.runs(m, key) for m in records.labels if m != reference}
    return compare_all(others, records.runs(reference, key), key, records.report)


def row_labels(records: Records) -> dict[str, str]:
    """Map each model to its label; those of rows that cannot be compared with the reference say so."""
    compared = compared_models(records, records.report.reference)
    unlike = {m for m, c in compared.items() if not c.comparable}
    return {m: label + (f" ({NOT_COMPARABLE})" if m in unlike else "") for m, label in records.labels.items()}


def per_class(records: Records) -> Table | None:
    """Return the mean IoU of each class over the seeds; None for classification."""
    keys = class_keys(records)
    if not keys:
        return None
    data, view = _scores(records, [*keys, "score.miou"])
    notes = [f"IoU in %, mean over the seeds. {joint_note(records, [*keys, 'score.miou'])}"]
    finished = records.evaluated[records.evaluated.status == FINISHED]
    if absent := [quantity(key).name for key in keys if finished[key].isna().all()]:
        notes.append(f"Left out of the mean, since no test image has them: {', '.join(absent)}.")
    return Table("per_class", f"IoU of each class{_split(records)}.", data, view, tuple(notes))


SIZE_KEYS = tuple(f"score.mean_accuracy.{size}" for size in OBJECT_SIZES)
MEDIUM, LARGE = (f"{100 * OBJECT_SIZES[size]:g} %" for size in ("medium", "large"))
SIZE_NOTE = (
    "Correctly classified pixels in %, averaged over the classes. An object is a connected region of one class; "
    f"small: less than {MEDIUM} of the image, large: at least {LARGE}."
)


def object_size(records: Records) -> Table | None:
    """Return the mean class accuracy on the pixels of small, medium and large objects; None where no record has it."""
    if not any(records.scores(model, key) for model in records.labels for key in SIZE_KEYS):
        return None
    data, view = _scores(records, SIZE_KEYS)
    note = f"{SIZE_NOTE} {joint_note(records, SIZE_KEYS)}"
    return Table("object_size", f"Accuracy by object size{_split(records)}.", data, view, (note,))


def _scores(records: Records, keys: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return some scores of every model: the numbers, and what a reader sees."""
    made = [_score_cells(records, model, keys) for model in records.labels]
    shown = [{"Model": label} | line for label, (_, line) in zip(row_labels(records).values(), made, strict=True)]
    return pd.DataFrame([row for row, _ in made]), pd.DataFrame(shown)


def _score_cells(
    records: Records, model: str, keys: Sequence[str], variant: str | None = None, *, brief: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return columns of the CSV file and the cells of a reader; in brief, only the first score has its interval."""
    status, reason, seeds = model_status(records, model, variant)
    row = {"model": model, "label": records.labels[model], "status": status, "reason": reason, "n_seeds": len(seeds)}
    line = {}
    for key in keys:
        q, values = quantity(key), list(records.scores(model, key, variant).values())
        joint = joint_estimate(records, model, key, variant)
        row |= estimate_columns(key, mean_interval(values) if values else None)
        whole = joint if covers_images(records, model, key, variant) else None
        row |= {f"{key}.joint_ci95_{end}": getattr(whole, end, None) for end in ("low", "high")}
        text = q.text(joint.mean) if joint and brief and key != keys[0] else estimate_text(q, joint)
        if not seeds and key == keys[0]:
            text = state_text(status, reason)
        line[q.heading if brief else q.name] = text
    return row, line


def _score_row(
    records: Records, model: str, variant: str | None, reference: tuple[str, str], comparison: Comparison | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the scores of a row and its difference from a reference (key, name), which itself has no comparison."""
    row, line = _score_cells(records, model, SCORES[records.task], variant, brief=True)
    q, c = quantity(records.headline), comparison or NO_COMPARISON
    row |= difference_columns(records.headline, reference[0], c)
    line |= {f"Difference from {reference[1]}": difference_text(q, c.difference), "Wins": wins_text(c)}
    judged = verdict_text(q, comparison) if comparison else "reference"
    return row, line | {"Verdict": judged if row["n_seeds"] else ""}


def test_time(records: Records) -> Table | None:
    """Compare every test-time variant with the first one; None where there is one variant only."""
    if len(records.variants) < 2:
        return None
    first, q = records.variants[0], quantity(records.headline)
    pairs = {
        (m, v): (records.runs(m, variant=v), records.runs(m)) for m in records.labels for v in records.variants[1:]
    }
    compared = compare_pairs(pairs, records.headline, records.report, ("variant", "evaluate.variants"))
    rows, shown = [], []
    for model, label in records.labels.items():
        for variant in records.variants:
            reference = (first, first.replace("_", " "))
            row, line = _score_row(records, model, variant, reference, compared.get((model, variant)))
            rows.append({"model": model, "variant": variant} | row)
            shown.append({"Model": label, "Variant": variant.replace("_", " ")} | line)
    notes = (
        f"{joint_note(records, SCORES[records.task])} Difference from the first variant of the same network, paired by "
        f"seed, with its 95 % interval. {WINS} {verdict_note(records.report, q, compared.values())}",
    )
    caption = f"Test-time variants{_split(records)}."
    return Table("test_time", caption, pd.DataFrame(rows), pd.DataFrame(shown), notes)


def tuning(records: Records) -> Table | None:
    """Return the recipe that each model's tuning chose, and what it gained; None where nothing was tuned."""
    made = {r["model"]: r for r in records.all("tune")}
    if not made:
        return None
    key, q = records.validation, quantity(records.headline)
    paths = dict.fromkeys(axis["path"] for r in made.values() for axis in r["space"])
    tried = {model: records.trials(model) for model in records.labels}
    rows, shown = [], []
    for model, label in records.labels.items():
        r, trials = made.get(model), tried[model]
        status, reason = (r["status"], r["reason"]) if r else (NOT_RUN, f"no record in records/tune/{model}.json")
        row: dict[str, Any] = {"model": model, "label": label, "status": status, "reason": reason}
        line: dict[str, Any] = {"Model": label, "Trials": state_text(status, reason)}
        if r is not None and status == FINISHED:
            default, chosen = trials.set_index("number")[key].get(0), r["scores"][key]
            row |= {
                "trials": len(trials),
                "drawn": max(0, len(trials) - math.prod(len(a["values"]) for a in r["space"] if a.get("values"))),
                "diverged": int((trials.status == FAILED).sum()),
                "train.epochs": r["params"]["train.epochs"],
                "trial": r["trial"],
                **{path: r["chosen"].get(path, r["params"].get(path)) for path in paths},
                f"{key}.default": default,
                key: chosen,
            }
            line |= {name: str(row[name.lower()]) for name in ("Trials", "Drawn", "Diverged")}
            line["Epochs"] = str(row["train.epochs"])
            line |= {NAMES.get(k, k): "" if row[k] is None else value_text(row[k]) for k in paths}
            line |= {f"Default recipe ({q.unit})": q.text(default), f"Chosen ({q.unit})": q.text(chosen)}
        rows.append(row)
        shown.append(line)
    left_out = [
        f"{NAMES.get(p, p)} of {records.labels[m]} ({why})" for m, r in made.items() for p, why in r["left_out"].items()
    ]
    seeds = 1 + max(sum(name.startswith("seed ") for name in tried[model]) for model in made)
    note = (
        f"Validation {q.name}, mean over {plural(seeds, 'seed')}. Trial 0 has the recipe of the parameter file, the "
        "next ones its variants with the other listed values of what is tuned; Optuna (TPE) draws the rest."
    )
    if seeds > 1:
        note += f" One seed ranks them; trial 0 and the best {FINALISTS - 1} others are trained on all."
    efforts = {tuple(r["params"].get(f"tune.{k}") for k in ("trials", "epochs", "seed")) for r in made.values()}
    if len(efforts) == 1:
        fewer = "; the more variants, the fewer are drawn" if len({row.get("drawn") for row in rows}) > 1 else ""
        note += f" Every model has the same number of trials, epochs and tuning seed{fewer}."
    notes = (note, f"Not tuned: {'; '.join(left_out)}.") if left_out else (note,)
    caption = "Tuned recipes, chosen on the validation split."
    return Table("tuning", caption, pd.DataFrame(rows), pd.DataFrame(shown).fillna(""), notes)


def speed(records: Records) -> Table | None:
    """Return the measured speed: noisy, comparable within this one run only; None where nothing was timed."""
    timed = records.all("speed")
    caption = "Speed, all models taken in turn within one run."
    return speed_table(caption, records.speed, timed[0]) if timed else None


def speed_table(caption: str, data: pd.DataFrame, first: Record) -> Table:
    """Make the table of timings in `data`, which `speed_rows` returns; `first` is a record among them."""
    view = pd.DataFrame({"Model": data.label} | speed_columns(data))
    return Table("speed", caption, data, _with_states(view, data), (_protocol(first), *_failures(data)), noisy=True)


def speed_columns(data: pd.DataFrame) -> dict[str, pd.Series]:
    """Map heading -> formatted cells of each timing that a row has: median, interquartile range in brackets."""
    columns = {}
    for key in ("speed.latency_ms", "speed.images_per_second", "speed.step_ms", "memory.peak_mib"):
        if key in data and data[key].notna().any():
            q, spread = quantity(key), f"{key.removesuffix('_ms')}_iqr_ms"
            texts = data[key].map(q.text)
            if spread in data:
                texts += [f" ({q.text(v)})" if pd.notna(v) else "" for v in data[spread]]
            columns[q.heading] = texts
    return columns


def training_time(records: Records) -> Table | None:
    """Return the wall-clock time of the trainings: noisy; None where no record has it."""
    data = records.timing
    if data.empty or "seconds" not in data:
        return None
    rows = []
    for model, label in records.labels.items():
        mine = data[data.model == model].reindex(columns=["seconds", "resumed", "device"])
        resumed = mine.resumed.eq(True)
        whole = mine.seconds[~resumed].dropna()
        rows.append({
            "Model": label, "Trainings": str(len(mine)), "Resumed": str(resumed.sum()),
            "Median time (s)": f"{whole.median():,.1f}" if len(whole) else "",
            "Device": ", ".join(sorted(set(mine.device.dropna()))),
        })  # fmt: skip
    note = (
        "Median over the seeds of the time from start to finished weights, several trainings side by side on one "
        "machine; resumed trainings are left out of it."
    )
    return Table("training_time", "Time to train.", data, pd.DataFrame(rows), (note,), noisy=True)


def class_keys(records: Records) -> list[str]:
    """Return the keys of the class scores, in label order where the classes are known."""
    keys = [c for c in records.evaluated if c.startswith("score.iou.")]
    order = {f"score.iou.{name}": i for i, name in enumerate(records.classes)}
    return sorted(keys, key=lambda k: order.get(k, len(order)))


def model_status(records: Records, model: str, variant: str | None = None) -> tuple[str, str | None, list[int]]:
    """Sum up the runs of a model: status, first reason, and the seeds that finished."""
    e = records.evaluated
    rows = e[(e.model == model) & (e.variant == (variant or records.variants[0]))]
    seeds = [int(s) for s in rows.seed[rows.status == FINISHED]]
    if len(seeds) == len(rows):
        return FINISHED, None, seeds
    first = rows[rows.status != FINISHED].iloc[0]
    if seeds:
        return f"{len(seeds)} of {len(rows)} seeds", first.reason, seeds
    if (rows.status == DIVERGED).all():
        return f"{DIVERGED} ({len(rows)} of {len(rows)})", first.reason, seeds
    return first.status, first.reason, seeds


def state_text(status: str, reason: str | None) -> str:
    """Format the state of a row without numbers; reasons of diverged trainings are given below the table."""
    return status if status == NOT_RUN or status.startswith(DIVERGED) or not reason else f"{status}: {reason}"


def _with_states(view: pd.DataFrame, data: pd.DataFrame) -> pd.DataFrame:
    """Give the state of rows without numbers in their first column of numbers."""
    if view.shape[1] < 2:
        view.insert(1, "Status", "")
    states = [state_text(s, r) for s, r in zip(data.status, data.reason, strict=True)]
    view.isetitem(1, view.iloc[:, 1].where(data.status == FINISHED, pd.Series(states, index=view.index)))
    return view


def _failures(data: pd.DataFrame) -> list[str]:
    bad = data[data.status != FINISHED]
    return [f"{r.label}: {r.status} ({r.reason})." for r in bad.itertuples()]


def _caveats(records: Records) -> list[str]:
    """Define the boundary score; name models with several seeds but no interval, or scores that were not recomputed."""
    tolerances = {r["params"].get("evaluate.boundary_tolerance") for r in records.all("evaluate")} - {None}
    shares = " or ".join(f"{100 * share:g} %" for share in sorted(tolerances))
    boundary = "Boundary F: boundary F-score (Csurka et al., 2013), mean over the images; pixels match within "
    boundary += f"{shares} of the image diagonal. The confusion matrices do not tell it, so it is not checked by them."
    scored = {m: list(scores.values()) for m in records.labels if (scores := records.scores(m))}
    alike = [
        records.labels[m]
        for m, scores in scored.items()
        if len(scores) > 1 and mean_interval(scores).low is None and not covers_images(records, m, records.headline)
    ]
    folder = records.directory / "confusion"
    unchecked = [records.labels[m] for m in scored if not (folder / f"{m}.npz").exists()]
    return [
        *([boundary] if shares and records.task == "segmentation" else []),
        *([f"No interval, since all seeds have the same score: {', '.join(alike)}."] if alike else []),
        *([f"Scores not checked, since there are no confusion matrices: {', '.join(unchecked)}."] if unchecked else []),
    ]


SETTLED = 2.0
"""Points of validation score: rows that change by as much over the last fifth of their epochs are marked."""


def last_fifth(records: Records, model: str) -> float | None:
    """Return the change of a model's validation score at the end, as `change_at_end` does."""
    history = records.history
    if records.validation not in history:
        return None
    rows = history[(history.model == model) & history.seed.isin(list(records.scores(model)))]
    return change_at_end(rows, records.validation, "seed")


def change_at_end(history: pd.DataFrame, key: str, training: str) -> float | None:
    """Return the change of a validation score over the last fifth of the epochs, mean over the trainings.

    Between validated epochs the score is taken as linear. None where fewer than two epochs were validated.

    Args:
        history: a row per training and epoch.
        key: column of the score.
        training: column that tells the trainings apart.
    """
    changes = []
    for _, run in history.groupby(training):
        scored = run[pd.to_numeric(run[key]).notna()].sort_values("epoch")
        if len(scored) > 1:
            epochs, values = scored.epoch.to_numpy(float), pd.to_numeric(scored[key]).to_numpy(float)
            changes.append(values[-1] - np.interp(0.8 * run.epoch.max(), epochs, values))
    return float(np.mean(changes)) if changes else None


def _unsettled(headline: str, change: float | None) -> bool:
    return change is not None and abs(change) * quantity(headline).scale >= SETTLED


def budget_text(headline: str, change: float | None) -> str:
    """Write `still improving (+2.40)`; nothing where the validation score had settled."""
    if change is None or not _unsettled(headline, change):
        return ""
    direction = "improving" if (change > 0) == higher_is_better(headline) else "getting worse"
    return f"still {direction} ({quantity(headline).text(change, sign=True)})"


def budget_note(headline: str, changes: Iterable[float | None], noun: str) -> list[str]:
    """Say of how many rows, such as networks, the validation score had not settled by the end of training."""
    q, known = quantity(headline), [change for change in changes if change is not None]
    if not known:
        return []
    moved = sum(_unsettled(headline, change) for change in known)
    subject = f"of {plural(moved, noun)} changed by {SETTLED:g} points or more (column Budget)"
    subject = subject if moved else f"of every {noun} changed by less than {SETTLED:g} points"
    return [f"Over the last fifth of the epochs, validation {q.name} {subject}; mean over the seeds."]


def run_failures(records: Records) -> list[str]:
    """Write one sentence per model and reason, naming the seeds."""
    e = records.evaluated
    bad = e[(e.status != FINISHED) & (e.variant == records.variants[0])]
    return [
        f"{label}, seed{'s' * (len(rows) > 1)} {', '.join(map(str, rows.seed))}: {status} ({reason})."
        for (label, status, reason), rows in bad.groupby(["label", "status", "reason"], sort=False)
    ]


def _split(records: Records) -> str:
    split = next((r["params"].get("data.test_split") for r in records.all("evaluate")), None)
    return f" on the {split} split" if split else ""


def _input(records: Records) -> str:
    params: dict[str, Any] = next((r["params"] for r in records.all("cost")), {})
    shape = (params.get("cost.batch_size", 1), *(params.get("cost.size") or ()))
    return f" at {' × '.join(map(str, shape))} pixels" if len(shape) == 3 else ""


def _protocol(first: Record) -> str:
    """Describe how and on what the timings were taken."""
    c, e, p = first["cost"], first["environment"], first["params"]
    size = " × ".join(str(v) for v in (c.get("speed.batch_size"), *(p.get("cost.size") or ())) if v is not None)
    parts = [
        f"median (interquartile range) of {c['speed.repeats']} rounds after {c['speed.warmup']} of warm-up, each round "
        "timing every model once" if "speed.repeats" in c else "",
        f"input {size}" if size else "",
        f"{c['speed.dtype']}, {c.get('speed.memory_format', '').replace('_', ' ')}" if "speed.dtype" in c else "",
        str(e.get("gpu") or e.get("cpu") or ""),
        plural(e["threads"], "CPU thread") if e.get("threads") else "",
        ", ".join(f"{k} {e[k]}" for k in ("torch", "cuda") if e.get(k)),
    ]  # fmt: skip
    return "Protocol: " + "; ".join(part for part in parts if part) + "."

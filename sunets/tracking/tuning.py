"""Runs of the tuning of a model: a parent with the best recipe so far, and a child per trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sunets.core.history import read_history
from sunets.core.record import Record, read_records, read_rows
from sunets.tracking.view import Run, child_run, finite_numbers, legal, make_slot, model_run, plain_text, shorten


def tuning_runs(folder: Path) -> list[tuple[Run, list[Run]]]:
    """Parent and children of every tuning of a benchmark; a model that was not tuned has none.

    Args:
        folder: results/BENCHMARK.
    """
    families = []
    for path in sorted((folder / "records" / "tune").glob("*.json")):
        for record in read_records(path, "tune"):
            rows = read_rows(path.with_suffix(".csv"), ("number", "status", "best"))
            history = read_history(path.with_suffix(".history.csv"), "number")
            children = [_trial(record, row, [r for r in history if r["number"] == row["number"]]) for row in rows]
            pictures = tuple((picture, "figures") for picture in (folder / "figures").glob("tuning.png"))
            parent, *children = (replace(run, files=pictures) for run in (_tuning(record, rows), *children))
            families.append((parent, children))
    return families


def _tuning(record: Record, rows: Sequence[Mapping[str, Any]]) -> Run:
    """The parent run: its curve is the best score after each trial."""
    best = [(row["number"], row["best"]) for row in rows if row["best"] is not None]
    whole = model_run([record])
    score = f"best/{next(iter(record['scores']), 'score')}"
    chosen = {path: plain_text(value) for path, value in record["chosen"].items()}
    tuned = {axis["path"] for axis in record["space"]}
    left_out = {f"left_out.{path}": reason for path, reason in record["left_out"].items()}
    return replace(
        whole,
        experiment=f"{record['benchmark']}/tuning",
        slot=make_slot("tuning", record["benchmark"], record["model"]),
        name=shorten(f"tuning of {record['label']}", 250),
        params={**{k: v for k, v in whole.params.items() if k not in tuned}, **legal(chosen)},
        tags={**whole.tags, **legal(left_out | {"kind": "tuning"})},
        points={(score, number): value for number, value in best},
        metrics=finite_numbers({"trials.failed": sum(row["status"] == "failed" for row in rows)}),
        headline="",
        columns=(f"metrics.`{score}`", *(f"params.`{axis['path']}`" for axis in record["space"])),
    )


def _trial(record: Record, row: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Run:
    """The run of one trial; what the trials share stands in their parent."""
    values = {axis["path"]: plain_text(row[axis["path"]]) for axis in record["space"]}
    own = {"status": row["status"], "reason": row["reason"], "scores": {}, "number": row["number"]}
    run = child_run(record | own, history)
    shown = [f"{path.removeprefix('train.')}={value}" for path, value in values.items()]
    return replace(
        run,
        experiment=f"{record['benchmark']}/tuning",
        slot=make_slot("tuning", record["benchmark"], record["model"], f"{row['number']}"),
        name=shorten(", ".join([f"{record['label']} #{row['number']}", *shown]), 250),
        params=legal(values),
        headline="",
    )

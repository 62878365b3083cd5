"""Tables of trials beside their records: one of the two that was damaged or edited contradicts the other."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from sunets.core.metrics import higher_is_better
from sunets.core.record import Record, RecordError, read_rows, rows_text

COLUMNS = ("number", "status", "reason", "duplicate_of")
"""First columns of a table of tuning trials."""
_HEAD = ("number", "phase", "status", "reason", "duplicate_of", "model", "seed", "split", "reference")


def startup_trials(trials: int) -> int:
    """Return how many of a sampler's trials are drawn at random before it learns."""
    return min(10, max(3, trials // 3))


def trial_row(record: Record) -> Record:
    """Flatten the record of a study's trial to a row of its table."""
    arm = {path: str(value) if isinstance(value, list) else value for path, value in record["arm"].items()}
    return {k: record.get(k) for k in _HEAD} | arm | record["tuned"] | record["scores"] | record["cost"]


def check_trials(records: Sequence[Record], path: Path) -> None:
    """Check the records of a study against the table beside them, if it is there.

    Raises:
        RecordError: the two differ; names both, and the row.
    """
    table = path.with_suffix(".csv")
    if not table.exists():
        return
    read_rows(table, ("number",))
    stated, rows = (
        list(csv.DictReader(io.StringIO(text, newline="")))
        for text in (rows_text(map(trial_row, records)), table.read_text(encoding="utf-8"))
    )
    if stated != rows:
        number = next((n for n, (a, b) in enumerate(zip(stated, rows, strict=False)) if a != b), len(stated))
        fault = f"trial {number} is not that of {table.name}"
        raise RecordError(f"{path}: {fault}: one of the two is damaged or edited; {_again(f'run {path.stem}')}")


def check_chosen(record: Record, path: Path) -> None:
    """Check the recipe that a tuning chose against the table of trials beside its record, if it is there.

    Raises:
        RecordError: recipe or score are not those of the best trial; names both files.
    """
    table = path.with_suffix(".csv")
    if record["status"] == "failed" or not table.exists():
        return
    score, value = next(iter(record["scores"].items()), ("score", None))
    rows = [row for row in read_rows(table, COLUMNS[:2]) if isinstance(row.get(score), int | float)]
    sign = 1 if higher_is_better(score) else -1
    best = max(rows, key=lambda row: sign * row[score], default={})  # of equal scores the first
    stated = {"number": record["trial"], score: value, **record["chosen"]}
    edited = [name for name, value in stated.items() if str(best.get(name)) != str(value)]
    edited += sorted({str(axis.get("path")) for axis in record["space"]} ^ record["chosen"].keys())
    if edited:
        fault = f"{edited[0]} is not that of the best trial in {table.name}"
        raise RecordError(f"{path}: {fault}: one of the two is damaged or edited; {_again(f'tune {path.stem}')}")


def _again(command: str) -> str:
    return f"run `python -m ablations {command}` again"

"""Histories of trainings: one row per training and epoch, in a table whose digest the records beside it state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sunets.core.config import fingerprint
from sunets.core.record import Record, damaged, read_records, read_rows, rows_text, write_json, write_text

_DIGEST = "history_digest"
"""Key of a record; records of earlier versions lack it."""
_SUFFIX = ".history.csv"
"""End of the name of a history whose trainings have numbers; those with seeds lie in a directory `history`."""


def write_history(path: Path, rows: Iterable[Mapping[str, Any]], records: Sequence[Record], record_path: Path) -> None:
    """Write a history, then the records of its trainings, to which its digest is added."""
    text = rows_text(rows, ("number", "epoch") if path.name.endswith(_SUFFIX) else ())
    for record in records:
        record[_DIGEST] = fingerprint(text)
    write_text(path, text)
    write_json(record_path, records)


def read_history(path: str | Path, key: Literal["seed", "number"]) -> list[dict[str, Any]]:
    """Read the history of trainings.

    Args:
        path: a file of `write_history`.
        key: column that identifies a training.

    Raises:
        FileNotFoundError: no such file.
        RecordError: a damaged file, text in a column of numbers, or not the table whose digest the records state.
    """
    rows, path = read_rows(path, (key, "epoch")), Path(path)
    for number, row in enumerate(rows, start=2):
        for name, value in row.items():
            if isinstance(value, str) and name not in ("model", "phase"):
                raise damaged(path, f"line {number}: {name} is no number")
        if not isinstance(row[key], int) or not isinstance(row["epoch"], int):
            raise damaged(path, f"line {number} lacks {key} or epoch")
    in_train = path.parent.parent / "train" / f"{path.stem}.json"
    record_path = in_train if key == "seed" else path.with_name(path.name.removesuffix(_SUFFIX) + ".json")
    allowed = (None, fingerprint(path.read_text(encoding="utf-8")))
    if record_path.exists() and any(record.get(_DIGEST) not in allowed for record in read_records(record_path)):
        raise damaged(path, f"not the table of {record_path}: one of the two is damaged or edited")
    return rows

"""What leaves a run: one tidy record, with where it came from and what it ran on.

Records are the truth of the suite: tables, figures and MLflow are made from them and from nothing else. They hold no
time stamp and no absolute path, so that a rerun of the same code, configuration and data on the same machine writes the
same bytes.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sunets.core.config import Section, fingerprint, flatten

Kind = Literal["train", "evaluate", "profile", "speed", "trial"]
Status = Literal["finished", "failed", "pruned"]
Record = dict[str, Any]
REASON_LENGTH = 500
"""Most characters of the reason of a failed run."""


def make_record(
    kind: Kind,
    *,
    benchmark: str,
    model: str,
    label: str | None = None,
    status: Status = "finished",
    reason: str | None = None,
    seed: int | None = None,
    variant: str | None = None,
    config: Section | Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    **extra: Any,
) -> Record:
    """One record: plain values only, every key present.

    Args:
        kind: what was run.
        benchmark: name of the benchmark.
        model: key of the model in `params.yaml`.
        label: its name in tables; the key where None.
        status: `failed` and `pruned` need a reason.
        reason: why the run has no result, in one line; cut to `REASON_LENGTH`.
        seed: training seed, where the run has one.
        variant: test-time variant of an evaluation.
        config: all that decides the run, kept flat under `params`; or flat dotted values already.
        scores: `score.*`; an absent score is None, never NaN.
        cost: `cost.*`, `memory.*`, `field.*` or `speed.*`.
        environment: what `environment()` returned.
        provenance: what `provenance()` returned, before the work began.
        extra: keys of a trial: study, number, phase, arm.

    Raises:
        ValueError: a failed or pruned run without a reason, or a reason where there was no failure.
    """
    if reason and len(reason) > REASON_LENGTH:  # it stands in tables, pages and MLflow's tags
        reason = f"{reason[: REASON_LENGTH - 3]}..."
    if (status == "finished") == bool(reason):
        raise ValueError(f"record of {model}, seed {seed}: status {status!r} does not go with reason {reason!r}")
    record = {
        "kind": kind,
        "status": status,
        "reason": reason,
        "benchmark": benchmark,
        "model": model,
        "label": label or model,
        "seed": seed,
        "variant": variant,
        "params": parameters(config or {}),
        "scores": scores or {},
        "cost": cost or {},
        "environment": environment or {},
        "provenance": provenance or {},
    }
    if clash := sorted(record.keys() & extra.keys()):
        raise ValueError(f"record of {model}: keys given twice: {', '.join(clash)}")
    return dict(_plain(record | extra))


def parameters(config: Section | Mapping[str, Any]) -> dict[str, Any]:
    """Flat plain parameters that mean the same on every machine: where the user keeps a file is not one of them."""
    flat = flatten(config) if isinstance(config, Section) else config
    return dict(_plain({name: portable(value) if isinstance(value, str) else value for name, value in flat.items()}))


def parameters_hash(params: Mapping[str, Any]) -> str:
    """Digest of what a record keeps under `params`."""
    return fingerprint(dict(params))


def portable(argument: str) -> str:
    """Return an argument, or the value of `name=value`, without an absolute path."""
    name, sign, value = argument.rpartition("=")
    path = Path(value)
    if path.is_absolute():
        value = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    return name + sign + value


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, of the same suffix, that takes its place if the block ends without an error.

    A reader, or a kill at any moment, meets the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values as JSON, atomically, with sorted keys; NaN and infinity become null."""
    text = json.dumps(_plain(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON; names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it and run its stage again") from None


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV, atomically.

    Args:
        path: the file.
        rows: each a mapping of column to number, text or None (an empty cell).
        columns: names that come first; others follow in order of their first appearance.
    """
    rows = [_plain_row(row) for row in rows]
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote: numbers as int or float (exactly), empty cells as None, the rest as text."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [{name: _cell(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _cell(text: str) -> int | float | str | None:
    if not text:
        return None
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf", text):
        return float(text)
    return text


def _scalar(value: Any) -> Any:
    """Zero-dimensional values of numpy and torch as Python's own."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if (cell := _scalar(value)) is None else cell for name, value in row.items()}


def _plain(value: Any) -> Any:
    """`value` in JSON's types."""
    value = _scalar(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.as_posix() if isinstance(value, Path) else value

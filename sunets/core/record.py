"""Records of runs, and the formats of result files.

Tables, figures and MLflow are made from records alone. Records hold no time stamp and no absolute path: a rerun of the
same code, configuration and data on the same machine writes the same bytes.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sunets.core.config import Section, Task, fingerprint, flatten
from sunets.core.names import printable

Kind = Literal["train", "evaluate", "cost", "speed", "trial", "tune"]
Status = Literal["finished", "failed", "pruned"]
Record = dict[str, Any]
T = TypeVar("T")
REASON_LENGTH = 500
"""Maximum characters of the reason of a failed run, which tables, pages and MLflow show."""
_VALUES = "plain values"
"""Name of the array of a `write_values` file that holds the plain values."""
REMEDY = "delete it and run its stage again"


class RecordError(ValueError):
    """An unreadable file of results: names the file, the fault and the remedy."""


def make_record(
    kind: Kind,
    *,
    benchmark: str,
    task: Task,
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
    """Make a record: plain values only, every key present.

    Args:
        kind: kind of run.
        benchmark: name of the benchmark.
        task: task of the network, which determines the scores.
        model: key of the model in `params.yaml`.
        label: name in tables; None takes the key.
        status: `failed` and `pruned` need a reason.
        reason: why the run has no result; put on one line, shortened to `REASON_LENGTH`.
        seed: training seed, if the run has one.
        variant: test-time variant of an evaluation.
        config: complete configuration of the run, stored flat under `params`; or flat dotted values.
        scores: `score.*`; an absent score is None, never NaN.
        cost: `cost.*`, `memory.*`, `receptive_field.*` or `speed.*`.
        environment: result of `environment()`.
        provenance: result of `provenance()`, called before the work.
        extra: keys of a trial (study, number, phase, arm) or of a tuning (trial, chosen, space).

    Raises:
        ValueError: a failed or pruned run without a reason, or a finished run with one.
    """
    if (status == "finished") == bool(reason):
        raise ValueError(f"record of {model}, seed {seed}: status {status!r} does not go with reason {reason!r}")
    record = {
        "kind": kind,
        "status": status,
        "reason": shortened(reason) if reason else None,
        "benchmark": benchmark,
        "task": task,
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


def shortened(text: str, length: int = REASON_LENGTH) -> str:
    """Put a text on one line of at most `length` characters, leaving out the middle of a longer one."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    tail = length // 3  # the remedy of a message
    return f"{text[: length - tail - 5].rstrip()} ... {text[-tail:].lstrip()}"


def parameters(config: Section | Mapping[str, Any]) -> dict[str, Any]:
    """Return flat plain parameters that are equal on every machine: without the directories of absolute paths."""
    flat = flatten(config) if isinstance(config, Section) else config
    return dict(_plain({name: portable(value) if isinstance(value, str) else value for name, value in flat.items()}))


def parameters_hash(params: Mapping[str, Any]) -> str:
    """Hash the `params` of a record."""
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
    """Yield a temporary file beside `path`, of the same suffix, that replaces it if the block ends without an error.

    At any moment, a reader or a kill finds the whole old file or the whole new one.

    Raises:
        OSError: the file cannot be written; names it.
        RecordError: a device or FIFO, such as /dev/stdout, which would be replaced.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RecordError(f"{printable(path)}: not a regular file, and would be replaced by one; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename2 is None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, atomically, with unchanged line ends."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values as JSON, atomically, with sorted keys; NaN and infinity become null."""
    text = json.dumps(_plain(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: no such file.
        RecordError: no valid JSON.
    """
    try:
        with _opened(path) as file:
            return json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON ({error})", error) from None


class _Provenance(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    git_commit: str | None
    git_dirty: bool | None
    data_digest: str | None
    code_hash: str
    config_hash: str
    command: str


class _Stored(BaseModel):
    """Keys of every record; trials have more."""

    model_config = ConfigDict(extra="allow", strict=True)

    kind: Kind
    status: Status
    reason: str | None
    benchmark: str
    task: Task
    model: str
    label: str
    seed: int | None
    variant: str | None
    params: dict[str, Any]
    scores: dict[str, float | None]
    cost: dict[str, float | str | None]
    environment: dict[str, Any]
    provenance: _Provenance


class _StoredTrial(_Stored):
    study: str
    number: int
    phase: Literal["grid", "tuning", "search", "confirmation"]
    split: str
    setting: dict[str, Any]
    arm: dict[str, Any]
    tuned: dict[str, Any]
    reference: bool
    same_as: list[dict[str, Any]]


class _StoredTune(_Stored):
    """The tuning of one model; params are those of its first trial and of section `tune`."""

    trial: int | None
    """Number of the chosen trial; None where none ended with a score."""
    chosen: dict[str, Any]
    """Dotted path -> value, of every axis."""
    space: list[dict[str, Any]]
    """The axes that were sampled."""
    left_out: dict[str, str]
    """Path of an axis that the model does not have -> why."""
    fingerprint: str
    """Digest of all that decides the recipe, but for data and code."""


class _StoredTiming(BaseModel):
    """A row of records/timing: noisy figures, separate from the records."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    seed: int
    started: datetime.datetime | None = Field(default=None, strict=False)
    seconds: float | None = None
    images_per_second: float | None = None
    resumed: bool | None = None
    device: str | None = None


def read_records(path: str | Path, kind: Kind | Literal["timing"] | None = None) -> list[Record]:
    """Read a file of records.

    Args:
        path: file of one record or a list of records.
        kind: required kind of the records; "timing" for the rows of records/timing.

    Raises:
        FileNotFoundError: no such file.
        RecordError: a damaged file, another kind, a missing key or a value of another type.
    """
    content = read_json(path)
    return check_records(content if isinstance(content, list) else [content], path, kind)


def json_files(directory: Path) -> list[Path]:
    """List the JSON files of a directory by name, without temporary ones that a killed process left behind."""
    return sorted(directory.glob("[!.]*.json"))


def check_records(rows: list[Any], path: str | Path, kind: Kind | Literal["timing"] | None = None) -> list[Record]:
    """Check the content of a file of records as `read_records` does, and return it."""
    schema = {"timing": _StoredTiming, "trial": _StoredTrial, "tune": _StoredTune}.get(kind or "", _Stored)
    try:
        TypeAdapter(list[schema]).validate_python(rows)  # type: ignore[valid-type]
    except ValidationError as error:
        raise damaged(path, _first_fault(error), error) from None
    if kind not in (None, "timing"):
        for number, row in enumerate(rows):
            if row["kind"] != kind:
                raise damaged(path, f"record {number} is of kind {row['kind']}, not {kind}")
    if kind == "tune" and len(rows) > 1:
        raise damaged(path, f"{len(rows)} records instead of one")
    return rows


def _first_fault(error: ValidationError) -> str:
    """Describe the first invalid record."""
    faults = error.errors(include_url=False)
    number = faults[0]["loc"][0]
    missing = [".".join(map(str, f["loc"][1:])) for f in faults if f["loc"][0] == number and f["type"] == "missing"]
    if missing:
        return f"record {number} lacks {', '.join(missing)}"
    key = ".".join(map(str, faults[0]["loc"][1:]))
    return f"record {number}: {key + ': ' if key else ''}{faults[0]['msg']}"


def read_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """Read an .npz file: name -> array.

    Raises:
        FileNotFoundError: no such file.
        RecordError: a damaged file.
    """
    with _opened(path) as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # a damaged archive fails in many ways
            # numpy's ValueError advises to load the file with its code.
            reason = "it holds something else" if isinstance(error, ValueError) else error
            raise damaged(path, f"no readable archive of arrays ({reason})", error) from None


def write_arrays(path: str | Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name as an .npz file, compressed, atomically."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def write_values(path: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Write plain values and arrays by name to one .npz file, atomically; returns them as `read_values` does.

    The name of the file, a fingerprint of what made the values, is written with them.
    """
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    plain = json.dumps({name: value for name, value in values.items() if name not in arrays})
    head = json.dumps([Path(path).stem, plain]).encode()
    with replacing(path) as temporary:
        np.savez(temporary, **{_VALUES: np.frombuffer(head, np.uint8), **arrays})  # type: ignore[arg-type]
    return {**json.loads(plain), **arrays}


def read_values(path: str | Path) -> dict[str, Any]:
    """Read what `write_values` wrote to a file of this name; raises as `read_arrays` does."""
    arrays = read_arrays(path)
    try:
        name, plain = json.loads(arrays.pop(_VALUES).tobytes())
        values = json.loads(plain)
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(path, "no plain values in it", error) from None
    if name != Path(path).stem:
        raise damaged(path, f"the values of another file, {name}")
    return {**values, **arrays}


@contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a regular file; opening a FIFO would block.

    Raises:
        FileNotFoundError: no such file.
        RecordError: not a regular file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{printable(path)}: no such file; run its stage first")
    if not path.is_file():
        raise RecordError(f"{printable(path)}: not a regular file; move it away and run its stage again")
    with path.open("rb") as file:
        yield file


def damaged(path: str | Path, fault: str, error: Exception | None = None) -> RecordError:
    """Make the error that names a file, its fault and the remedy; returns an `error` that is one already."""
    if isinstance(error, RecordError):
        return error
    return RecordError(f"{printable(path)}: {printable(shortened(fault))}; {REMEDY}")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV, atomically.

    Args:
        path: the file.
        rows: each a mapping of column to number, text or None (an empty cell).
        columns: names of the first columns; others follow in order of appearance.
    """
    write_text(path, rows_text(rows, columns))


def rows_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Return the text that `write_rows` writes."""
    rows = [_plain_row(row) for row in rows]
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(path: str | Path, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote: numbers as int or float (exactly), empty cells as None, the rest as text.

    Args:
        path: the file.
        columns: required names, unless there is no row.

    Raises:
        FileNotFoundError: no such file.
        RecordError: a damaged file; names the line.
    """
    try:
        with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            reader = csv.reader(text, strict=True)
            names = next(reader, [])
            rows = []
            for cells in reader:
                if len(cells) != len(names):
                    raise ValueError(f"line {reader.line_num} has {len(cells)} cells instead of {len(names)}")
                rows.append({name: _cell(cell) for name, cell in zip(names, cells, strict=True)})
    except (ValueError, csv.Error) as error:
        raise damaged(path, f"no readable table ({error})", error) from None
    if absent := [name for name in columns if rows and name not in names]:
        raise damaged(path, f"no column {', '.join(absent)}")
    return rows


def _cell(text: str) -> int | float | str | None:
    if not text:
        return None
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf", text):
        return float(text)
    return text


def _scalar(value: Any) -> Any:
    """Convert zero-dimensional values of numpy and torch to Python numbers."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if (cell := _scalar(value)) is None else cell for name, value in row.items()}


def _plain(value: Any) -> Any:
    """Convert a value to JSON types; NaN and infinity become None."""
    value = _scalar(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.as_posix() if isinstance(value, Path) else value

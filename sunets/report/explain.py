"""Trace a number in a table back to its records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from sunets.core.record import RecordError, read_rows
from sunets.report.records import FINISHED, Records, ReportError, find_records, quantity

_SUFFIX = re.compile(r"\.(mean|ci95_low|ci95_high|joint_ci95_low|joint_ci95_high|difference\.[a-z0-9_]+)$")
_KEYS = {
    "cost": ("model",), "accuracy": ("model",), "per_class": ("model",), "object_size": ("model",),
    "test_time": ("model", "variant"),
    "tuning": ("model",), "speed": ("model",),
    "training_time": ("model", "seed"), "published": ("our_model", "published_model", "metric"),
}  # fmt: skip
_KIND = {"cost": "cost", "tuning": "tune", "speed": "speed", "training_time": "train"}


def explain(results_dir: Path, benchmark: str, table: str, row: str, column: str) -> str:
    """Trace a number in a table to its runs: seeds and values, commit, data digest, code, command.

    Args:
        results_dir: the directory that holds the benchmarks' results.
        benchmark: name of the benchmark.
        table: file stem of a table, such as accuracy.
        row: key or label of a model; several keys are joined by slashes.
        column: name of a CSV column, with or without its .mean or .ci95_low, or its heading on the page.

    Returns:
        Lines of plain text.

    Raises:
        ReportError: no such table, row or column; names the existing ones.
    """
    folder = results_dir / benchmark / "tables"
    tables = sorted(p.stem for p in folder.glob("*.csv") if p.stem in _KEYS)
    if table not in tables:
        raise ReportError(
            f"{table}: no such table in {folder}; there are {', '.join(tables) or 'none: run `dvc repro` first'}"
        )
    rows = read_rows(folder / f"{table}.csv", _KEYS[table])
    if not rows:
        raise RecordError(f"{folder / table}.csv: holds no row; run `dvc repro` again")
    frame = pd.DataFrame(rows)
    records = find_records(results_dir, benchmark)
    cells = _row(frame, _KEYS[table], table, row)
    base, columns = _column(frame, table, column)
    shown = [f"{name} = {_plain(cells[name])}" for name in columns]
    lines = [f"{benchmark}, table {table}, row {row}", *(f"  {line}" for line in shown), ""]
    model = str(cells["our_model"] if table == "published" else cells["model"])
    if table == "published":
        base = str(cells["metric"])
        lines += [f"published value: {cells['source']}", ""]
    kind = "cost" if base.startswith("cost.") else _KIND.get(table, "evaluate")
    variant = str(cells["variant"]) if "variant" in frame else records.variants[0]
    seed = int(cells["seed"]) if table == "training_time" else None
    used = [
        r
        for r in records.all(kind)
        if r["model"] == model
        and (kind != "evaluate" or r["variant"] == variant)
        and (seed is None or r["seed"] == seed)
    ]
    if not used:
        return "\n".join([*lines, f"no record of {model}: it has not been run"])
    lines += _runs(used, base, f"{results_dir / benchmark / 'records' / _file(kind, model)}")
    if ".difference." in " ".join(columns) and kind == "evaluate":
        lines += _reference(records, table, cells, base)
    return "\n".join(lines)


def _row(frame: pd.DataFrame, keys: tuple[str, ...], table: str, row: str) -> dict[str, Any]:
    names = frame[list(keys)].astype(str).agg("/".join, axis=1)
    hit = names == row
    for other in ("label", "our_label"):  # what the page shows
        if other in frame and not hit.any():
            hit = frame[other] == row
    if hit.sum() == 1:
        return frame[hit].iloc[0].to_dict()
    problem = "several rows" if hit.any() else "no row"
    raise ReportError(f"{row}: {problem} of table {table}; there are {', '.join(names)}")


def _column(frame: pd.DataFrame, table: str, column: str) -> tuple[str, list[str]]:
    """The record key and the CSV columns that a name stands for."""
    bases = list(dict.fromkeys(_SUFFIX.sub("", c) for c in frame.columns))
    headings = {quantity(b).heading.lower(): b for b in bases} | {quantity(b).name.lower(): b for b in bases}
    if column in frame.columns:
        return _SUFFIX.sub("", column), [column]
    base = column if column in bases else headings.get(column.lower())
    if base is None:
        raise ReportError(f"{column}: no column of table {table}; there are {', '.join(bases)}")
    return base, [c for c in frame.columns if _SUFFIX.sub("", c) == base]


def _runs(used: list[dict[str, Any]], key: str, path: str) -> list[str]:
    lines = [f"from {len(used)} record{'s' if len(used) > 1 else ''} in {path}:"]
    for r in used:
        name = ", ".join(f"{k} {r[k]}" for k in ("kind", "seed", "variant") if r[k] is not None)
        value = r["scores"].get(key, r["cost"].get(key))
        state = f"{key} = {value}" if r["status"] == FINISHED else f"{r['status']}: {r['reason']}"
        lines.append(
            f"  {name}: {state if key in r['scores'] or key in r['cost'] or r['status'] != FINISHED else 'finished'}"
        )
    for name in ("git_commit", "data_digest", "code_hash", "config_hash", "command"):
        values: dict[str, list[str]] = {}
        for r in used:
            text = r["provenance"].get(name) or ("unknown" if name == "git_commit" else None)
            if text is not None:
                dirty = name == "git_commit" and r["provenance"].get("git_dirty")
                values.setdefault(f"{text} with uncommitted changes" if dirty else str(text), []).append(str(r["seed"]))
        title = name.replace("_", " ")
        for text, seeds in values.items():
            lines.append(f"{title}: {text}" + (f" (seed {', '.join(seeds)})" if len(values) > 1 else ""))
    e = used[0]["environment"]
    versions = ", ".join(
        f"{k} {e[k]}" for k in ("python", "torch", "torchvision", "device", "gpu", "threads") if e.get(k)
    )
    return [*lines, f"environment: {versions}"]


def _reference(records: Records, table: str, cells: dict[str, Any], key: str) -> list[str]:
    """The scores that a paired difference subtracts."""
    other = cells.get(f"{key}.difference.reference")
    if not isinstance(other, str):
        return []
    model, variant = (cells["model"], other) if table == "test_time" else (other, records.variants[0])
    return [
        "",
        f"difference to {model}, {variant.replace('_', ' ')}, paired by seed:",
        *(f"  seed {seed}: {key} = {value}" for seed, value in records.scores(model, key, variant).items()),
    ]


def _file(kind: str, model: str) -> str:
    return "speed.json" if kind == "speed" else f"{kind}/{model}.json"


def _plain(value: Any) -> str:
    if isinstance(value, float):  # counts come back from a CSV as floats where a row has none
        return "none" if value != value else repr(int(value) if value.is_integer() else value)
    return "none" if value is None else str(value)

"""Check that committed results belong to the code and the parameters beside them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sunets.core.config import Suite
from sunets.core.paths import BenchmarkPaths
from sunets.core.provenance import code_hash
from sunets.core.recipes import tune_record, tuned
from sunets.core.record import Record, check_records, parameters, parameters_hash, read_json
from sunets.models.zoo import resolve_config

_MODULES = {
    "train": ("sunets.stages.train",), "evaluate": ("sunets.stages.evaluate",),
    # Of a benchmark, and of `make zoo` and `profile`.
    "cost": ("sunets.stages.cost", "sunets.profiling.cost"), "speed": ("sunets.stages.cost", "sunets.profiling.speed"),
    "trial": ("ablations.study",), "tune": ("ablations.tune",),
}  # fmt: skip
"""Kind of a record -> modules, one of which made it."""
_MACHINE = {"data.root", "data.workers", "data.cache"}
"""Parameters that may differ between machines without changing a result."""


@dataclass
class Verdict:
    """Outcome of `verify`, one line each."""

    faults: list[str] = field(default_factory=list)
    """Reasons why the results do not belong to this code and these parameters."""
    earlier: list[str] = field(default_factory=list)
    """Results of the benchmark that earlier code made, or that a run would make anew."""
    notes: list[str] = field(default_factory=list)
    """Other benchmarks: the code that made their records."""


def verify(suite: Suite, root: Path = Path()) -> Verdict:
    """Check the results of `params.yaml` against DVC's lock file, this code and these parameters.

    Raises:
        RecordError: a file of records is damaged; names it.
    """
    verdict = Verdict()
    _ask_dvc(root, verdict)
    files = list(record_files(root / "results"))
    made_by = code_of_records(files)
    if suite.benchmark not in made_by:
        verdict.faults.append(f"{suite.benchmark}: results/ holds no records of it; run `dvc repro`")
    for benchmark, kinds in made_by.items():
        for commits in dict.fromkeys(kinds.values()):
            names = ", ".join(kind for kind, by in kinds.items() if by == commits)
            by = f"other code, of commit {commits}" if commits else "this code"
            lines = verdict.earlier if commits and benchmark == suite.benchmark else verdict.notes
            lines.append(f"{benchmark}: records of {names} were made by {by}")
    faults = []
    paths = BenchmarkPaths(suite.benchmark, root)
    for file in files:
        if any(_is_current(record) for record in file.records):
            check_records(file.rows, file.path)
            faults += [f"{file.path}: {_name(r)}: {fault}" for r in file.rows if (fault := _fault(suite, r, paths))]
    if faults:
        verdict.faults.append(faults[0] + (f" (and {len(faults) - 1} more records)" if faults[1:] else ""))
    return verdict


@dataclass(frozen=True)
class _File:
    path: Path
    benchmark: str
    rows: list[Any]
    records: list[Record]
    """The rows that have a kind and provenance, in the form of any version of the code; timings have none."""


def record_files(results_dir: Path) -> Iterator[_File]:
    """Read every file of records.

    Raises:
        RecordError: a file is damaged; names it.
    """
    paths = list(results_dir.glob("*/records/**/[!.]*.json"))
    paths += [results_dir / "zoo" / f"{name}.json" for name in ("records", "speed")]
    for path in sorted(p for p in paths if p.exists()):
        content = read_json(path)
        rows = content if isinstance(content, list) else [content]
        records = [r for r in rows if isinstance(r, dict) and r.get("kind") in _MODULES]
        records = [r for r in records if isinstance(r.get("provenance"), dict)]
        yield _File(path, path.relative_to(results_dir).parts[0], rows, records)


def code_of_records(files: Iterable[_File]) -> dict[str, dict[str, str | None]]:
    """Map benchmark -> kind of its records -> None if this code made them, else the commits that did."""
    commits: dict[str, dict[str, dict[str, None]]] = {}  # benchmark -> kind -> commits of other code, each once
    for file in files:
        kinds = commits.setdefault(file.benchmark, {})
        for record in file.records:
            others = kinds.setdefault(record["kind"], {})
            if not _is_current(record):
                others[record["provenance"].get("git_commit") or "unknown"] = None
    return {
        benchmark: {kind: ", ".join(others) or None for kind, others in kinds.items()}
        for benchmark, kinds in commits.items()
    }


@functools.cache
def _code_now(kind: str) -> list[str]:
    return [code_hash(module) for module in _MODULES[kind]]


def _is_current(record: Record) -> bool:
    return record["provenance"].get("code_hash") in _code_now(record["kind"])


def _name(record: Record) -> str:
    parts = {k: record[k] for k in ("model", "seed", "variant") if record[k] is not None}
    return ", ".join(f"{k} {v}" for k, v in parts.items())


def _fault(suite: Suite, record: Record, paths: BenchmarkPaths) -> str | None:
    """Say how a record contradicts itself or the current parameters; None if it does not."""
    params = record["params"]
    if record["provenance"]["config_hash"] != parameters_hash(params):
        return "its config_hash is not that of its params: edited by hand; run its stage again"
    if record["benchmark"] != suite.benchmark or record["kind"] not in ("train", "evaluate", "tune"):
        return None
    model, digest = record["model"], record["provenance"]["data_digest"]
    if model not in suite.models:
        return "no such model in params.yaml; delete its records, or put the model back"
    try:
        if record["kind"] == "tune":
            trials = paths.records / "tune" / f"{model}.csv"
            tune_record(suite, paths, model)
            return None if trials.exists() else f"{trials}: no such file; run its stage again"
        if record["seed"] not in suite.seeds:
            return "this seed is not one of `seeds` in params.yaml; run its stage again"
        suite = tuned(suite, paths, [model], digest)
        current = parameters(resolve_config(suite.config(model, record["seed"])))
    except ValueError as error:
        return str(error)
    for key in sorted((current.keys() | params.keys()) - _MACHINE):
        if record["kind"] == "train" and key.startswith("evaluate."):
            continue  # scoring does not change the training
        if (old := params.get(key)) != (new := current.get(key)):
            chosen_by = "the tuned recipe" if key in suite.recipes.get(model, {}) else "params.yaml"
            return f"{key} is {old!r} in the record and {new!r} in {chosen_by}; run its stage again"
    return None


def _ask_dvc(root: Path, verdict: Verdict) -> None:
    """Add the findings of `dvc status`, except outputs that only DVC's cache of another clone holds."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "status", "--json"], cwd=root, capture_output=True, encoding="utf-8",
            errors="replace", check=False,
        )  # fmt: skip
    except OSError as error:
        verdict.faults.append(f"DVC cannot be started: {error}")
        return
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), " ".join(lines)) or "it gave no reason"
        verdict.faults.append(f"`dvc status` fails with exit status {done.returncode}: {reason[:300]}")
        return
    stages: dict[str, list[Any]] = json.loads(done.stdout or "{}")
    changes = {name: [part for part in parts if part != "always changed"] for name, parts in stages.items()}
    outs = [part.get("changed outs", {}) for parts in changes.values() for part in parts if isinstance(part, dict)]
    absent = [out for states in outs for out, state in states.items() if state == "not in cache"]

    def is_absent_output(path: str) -> bool:
        return any(path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/") for out in absent)

    def why(parts: list[Any]) -> str | None:
        """Name the first change that makes a stage run."""
        for part in parts:
            if not isinstance(part, dict):  # changed command
                return str(part)
            for items in part.values():
                for path, state in items.items():
                    if isinstance(state, dict):  # of a parameter file: key -> state
                        return " ".join(str(word) for word in next(iter(state.items())))
                    if not (state == "not in cache" or (state == "deleted" and is_absent_output(path))):
                        return f"{path} {state}"
        return None

    stale = {name: cause for name, parts in changes.items() if (cause := why(parts))}
    if stale:
        first, cause = next(iter(stale.items()))
        others = f"; also {', '.join(list(stale)[1:])}" if len(stale) > 1 else ""
        verdict.earlier.append(f"`dvc repro` would run {first} ({cause}){others}")

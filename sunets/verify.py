"""Check that committed results belong to the code and the parameters beside them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sunets.core.config import Suite
from sunets.core.provenance import code_hash
from sunets.core.record import Record, parameters, parameters_hash, read_json, read_records
from sunets.models.zoo import resolve_config

_MODULES = {
    "train": "sunets.stages.train", "evaluate": "sunets.stages.evaluate", "cost": "sunets.stages.cost",
    "speed": "sunets.stages.cost", "trial": "ablations.study",
}  # fmt: skip
_MACHINE = {"data.root", "data.workers", "data.cache"}
"""Parameters that may differ between machines without changing a result."""


@dataclass
class Verdict:
    """What `verify` found, one line each."""

    faults: list[str] = field(default_factory=list)
    """Reasons why the results do not belong to this code and these parameters."""
    earlier: list[str] = field(default_factory=list)
    """Results of the benchmark that earlier code made, or that a run would make anew."""
    notes: list[str] = field(default_factory=list)
    """Other benchmarks: the code that made their records."""


def verify(suite: Suite, root: Path = Path()) -> Verdict:
    """Check the results of `params.yaml` against DVC's lock file, this code and these parameters.

    Args:
        suite: the content of params.yaml.
        root: of the checkout.

    Raises:
        RecordError: a file of records is damaged; names it.
    """
    verdict = Verdict()
    _ask_dvc(root, verdict)
    made_by = code_of_records(root / "results")
    if suite.benchmark not in made_by:
        verdict.faults.append(f"{suite.benchmark}: results/ holds no records of it; run `dvc repro`")
    for benchmark, kinds in made_by.items():
        by_commit: dict[str | None, list[str]] = {}
        for kind, commits in kinds.items():
            by_commit.setdefault(commits, []).append(kind)
        for commits, names in by_commit.items():
            by = f"other code, of commit {commits}" if commits else "this code"
            lines = verdict.earlier if commits and benchmark == suite.benchmark else verdict.notes
            lines.append(f"{benchmark}: records of {', '.join(names)} were made by {by}")
    wrong = [
        f"{path}: {_name(record)}: {fault}"
        for path in sorted((root / "results").glob("*/records/**/*.json"))
        for record in _records_of_this_code(path)
        if (fault := _fault(suite, record))
    ]
    if wrong:
        verdict.faults.append(wrong[0] + (f" (and {len(wrong) - 1} more records)" if wrong[1:] else ""))
    return verdict


def code_of_records(results_dir: Path) -> dict[str, dict[str, str | None]]:
    """Tell for each benchmark whether the code beside its records is the code that made them.

    Returns:
        Benchmark -> kind of record -> None where it is, else the commits that did make them.
    """
    found: dict[str, dict[str, str | None]] = {}
    for folder in sorted(results_dir.glob("*/records")):
        others: dict[str, dict[str, None]] = {}  # kind -> commits of other code, each once
        for path in sorted(folder.glob("**/*.json")):
            for record in _made_records(path):
                commits = others.setdefault(record["kind"], {})
                if record["provenance"].get("code_hash") != _code_now(record["kind"]):
                    commits[record["provenance"].get("git_commit") or "unknown"] = None
        found[folder.parent.name] = {kind: ", ".join(commits) or None for kind, commits in others.items()}
    return found


@functools.cache
def _code_now(kind: str) -> str:
    return code_hash(_MODULES[kind])


def _made_records(path: Path) -> list[Record]:
    """The records of a file, in the form of whatever code made them; rows of timings are none."""
    content = read_json(path)
    rows = [row for row in (content if isinstance(content, list) else [content]) if isinstance(row, dict)]
    return [row for row in rows if row.get("kind") in _MODULES and isinstance(row.get("provenance"), dict)]


def _records_of_this_code(path: Path) -> list[Record]:
    """The records of a file, checked whole, if this code made one of them."""
    made = [row["provenance"].get("code_hash") == _code_now(row["kind"]) for row in _made_records(path)]
    return read_records(path) if any(made) else []


def _name(record: Record) -> str:
    parts = {k: record[k] for k in ("model", "seed", "variant") if record[k] is not None}
    return ", ".join(f"{k} {v}" for k, v in parts.items())


def _fault(suite: Suite, record: Record) -> str | None:
    """How a record contradicts itself or today's parameters; None where it does not."""
    there = record["params"]
    if record["provenance"]["config_hash"] != parameters_hash(there):
        return "its config_hash is not that of its params: edited by hand; run its stage again"
    if record["benchmark"] != suite.benchmark or record["kind"] not in ("train", "evaluate"):
        return None
    if record["seed"] not in suite.seeds:
        return "this seed is not one of `seeds` in params.yaml; run its stage again"
    try:
        now = parameters(resolve_config(suite.config(record["model"], record["seed"])))
    except ValueError as error:
        return str(error)
    for key in sorted((now.keys() | there.keys()) - _MACHINE):
        if record["kind"] == "train" and key.startswith("evaluate."):
            continue  # how it is scored later does not make another training
        if now.get(key) != there.get(key):
            return f"{key} is {there.get(key)!r} in the record and {now.get(key)!r} in params.yaml; run its stage again"
    return None


def _ask_dvc(root: Path, verdict: Verdict) -> None:
    """Add what `dvc status` says; outputs that a fresh clone lacks and DVC's cache holds for others are no change."""
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
    changes = {name: [part for part in parts if isinstance(part, dict)] for name, parts in stages.items()}
    absent = [
        out
        for parts in changes.values()
        for part in parts
        for out, state in part.get("changed outs", {}).items()
        if state == "not in cache"
    ]

    def is_absent_output(path: str) -> bool:
        return any(path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/") for out in absent)

    def why(parts: list[Any]) -> str | None:
        """The first change that makes a stage run."""
        for part in parts:
            for items in part.values():
                for path, state in items.items() if isinstance(items, dict) else [("its command", "modified")]:
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

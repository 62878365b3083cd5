"""Measure the engine on this machine: trials per hour with one and two workers, and overhead per job.

Command: `python benchmarks/engine.py` (a few minutes on two cores). It runs the same grid of short trainings with one
worker and with two, from scratch each time, and then empty jobs, in processes and on a Dask cluster.
Expect at least 1.7 times the trials per hour with two workers on two idle cores, and an overhead of some milliseconds
per job. Start-up (imports, about ten seconds per process, paid once) is excluded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from sunets.core.cli import refuse_other_checkout
from sunets.core.config import load
from sunets.core.executor import SCHEDULER, Job, at_once, open_pool

PRESET = Path(__file__).resolve().parents[1] / "presets" / "smoke.yaml"


def nothing(arguments: dict[str, Any], send: Any) -> dict[str, Any]:
    """Do nothing, so that the time is that of the engine."""
    return {}


def trials_per_hour(workers: int, trials: int, epochs: int) -> float:
    """Run a grid of `trials` equal trainings from scratch; start-up is not counted."""
    from ablations.study import run_study
    from sunets.data.preparation import prepare

    tree = yaml.safe_load(PRESET.read_text())
    axis = {"path": "train.lr", "values": [0.001 * 1.01**n for n in range(trials // 2)]}
    tree["ablations"] = {
        "rates": {"kind": "grid", "model": "sunet_tiny", "axes": [axis], "seeds": [0, 1]}
        | {"overrides": {"train.epochs": epochs, "train.warmup_epochs": 0}}
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("params.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        suite = load("params.yaml", ["tune.trials=0"])
        prepare(suite.data, Path("data/prepared/smoke"))
        run_study(suite, "rates", workers=workers)
        ends = sorted(path.stat().st_mtime for path in Path(".work/results").glob("*.npz"))
    # From the end of the first round to the end of the last.
    return 3600 * (len(ends) - workers) / (ends[-1] - ends[workers - 1])


def seconds_per_job(workers: int, jobs: int) -> float:
    """Time an empty job, with its result stored on disk."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "manifest.json").write_text(json.dumps({"digest": "none"}), encoding="utf-8")
        made = [
            Job(f"job {n}", f"{Path(__file__).stem}:{nothing.__name__}", {"number": n}, {}) for n in range(jobs + 4)
        ]
        with open_pool(
            ["sunets.core.executor"], Path(folder), "none", device="cpu", threads=1, jobs=jobs,
            results=Path(folder, "results"), workers=workers,
        ) as pool:  # fmt: skip
            pool.drive([at_once(made[:4])])  # the workers start
            started = time.perf_counter()
            pool.drive([at_once(made[4:])])
            return (time.perf_counter() - started) / jobs


def main() -> None:
    """Measure, and print a table."""
    refuse_other_checkout()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="trainings of the grid, an even number")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each training")
    parser.add_argument("--jobs", type=int, default=200, help="empty jobs")
    options = parser.parse_args()
    os.environ |= {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    os.environ.pop(SCHEDULER, None)
    rates = {workers: trials_per_hour(workers, options.trials, options.epochs) for workers in (1, 2)}
    table = Table("what", "1 worker", "2 workers", "ratio")
    table.add_row("trials per hour", *(f"{rate:.0f}" for rate in rates.values()), f"{rates[2] / rates[1]:.2f}")
    local = [f"{1000 * seconds_per_job(workers, options.jobs):.1f}" for workers in (1, 2)]
    table.add_row("milliseconds per empty job, local", *local, "")
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=logging.ERROR) as cluster:
        os.environ[SCHEDULER] = cluster.scheduler_address
        table.add_row("milliseconds per empty job, Dask", "", f"{1000 * seconds_per_job(2, options.jobs):.1f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()

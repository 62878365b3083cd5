"""Stage `train`: one model on every seed of the benchmark, and the records of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import TaskID

from sunets.core.config import Config, ConfigError, Suite
from sunets.core.executor import Job, Send, at_once, open_pool
from sunets.core.hardware import torchrun_process
from sunets.core.history import write_history
from sunets.core.paths import BenchmarkPaths
from sunets.core.progress import progress_bar, scores_text
from sunets.core.provenance import environment, provenance, stage_command, utc_now
from sunets.core.recipes import tuned
from sunets.core.record import make_record, replacing, write_json
from sunets.core.stage import stage
from sunets.data.manifest import load_manifest
from sunets.models.device import select_device
from sunets.models.zoo import resolve_config
from sunets.training.fit import check, fit, run_fingerprint, waiting_for
from sunets.training.loop import TrainingError


def train_one(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Train one configuration, in a worker process; sends each epoch's row.

    Args:
        arguments: config (plain), training (the driver's `run_fingerprint`, which tells results apart), data and
            work (directories).
        send: takes the rows.

    Returns:
        status, reason, rows (the history), seconds of this process, images_per_second, started (UTC), resumed,
        environment, and the bytes of the weights file.
    """
    config = Config.model_validate(arguments["config"])
    manifest = load_manifest(Path(arguments["data"]), config.data)
    outcome: dict[str, Any] = {
        "status": "finished",
        "reason": None,
        "started": utc_now(),
        "environment": environment(select_device(config.train.device), config.train.threads),
        "rows": [],
    }

    def on_epoch(row: dict[str, Any]) -> None:
        outcome["rows"].append(row)
        send(row)

    work_dir = Path(arguments["work"], run_fingerprint(config, manifest))  # of this device, not the driver's
    try:
        with waiting_for(work_dir):
            result = fit(config, manifest, work_dir=work_dir, on_epoch=on_epoch)
            # Of torchrun's processes, the first alone has the file.
            weights = np.fromfile(result.weights_path if torchrun_process()[0] == 0 else os.devnull, np.uint8)
    except TrainingError as error:  # a diverged training is a result; a defect or a kill is not
        return outcome | {"status": "failed", "reason": str(error)}
    return outcome | {
        "rows": result.history,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "resumed": result.resumed,
        "weights": weights,
    }


def train_stage(suite: Suite, key: str, *, workers: int | None = None) -> list[dict[str, Any]]:
    """Train `models.<key>` on every seed of the suite, with the recipe that its tuning chose, if it was tuned.

    Finished trainings are reused, interrupted ones go on.

    A training that diverges is a result: its record says so, the terminal too, and the pipeline goes on.

    Returns:
        The records, one per seed.

    Raises:
        ConfigError, ValueError: the model cannot be built or trained as configured, or its recipe is not tuned yet, or
            torchrun's processes would not share batch statistics; raised before any training.
        JobError, StageError: a training ended without a result, or source, parameters or data changed meanwhile; run
            again to go on.
    """
    paths = BenchmarkPaths(suite.benchmark)
    manifest = load_manifest(paths.data, suite.data)
    suite = tuned(suite, paths, [key], manifest.digest)
    configs = [suite.config(key, seed) for seed in suite.seeds]
    started_from = {config.train.init_from: config for config in reversed(configs)}  # may differ from seed to seed
    summaries = [check(config, manifest) for config in reversed(started_from.values())]
    rank, _, processes = torchrun_process()
    if processes > 1 and not configs[0].train.sync_bn:
        raise ConfigError(
            "train.sync_bn: true under torchrun: batch statistics of each process alone would make the result depend "
            "on the number of processes"
        )
    first = rank == 0  # of torchrun's processes
    for summary in filter(None, summaries if first else []):
        print(f"{key}: {summary}", flush=True)
    params = ("benchmark", "seeds", "data", "train", "tune", f"models.{key}")
    with stage(f"train@{key}", paths, __name__, suite=suite, params=params, data_digest=manifest.digest) as code:
        from sunets.tracking.live import Tracker

        job_paths = {"data": str(paths.data), "work": str(paths.work)}
        jobs = [
            Job(
                f"{key} seed {c.seed}",
                f"{__name__}:{train_one.__name__}",
                # The fingerprint holds the content of `train.init_from`, of which `config` has the path alone.
                {"config": c.model_dump(mode="json"), "training": run_fingerprint(c, manifest)},
                job_paths,
            )
            for c in configs
        ]
        numbers = {job.name: number for number, job in enumerate(jobs)}
        stated = [resolve_config(c) for c in configs]
        sources = [provenance(manifest.digest, code, c, stage_command(suite, "train", key)) for c in stated]
        tracker = Tracker("train", suite, key, list(zip(stated, sources, strict=True)))
        with _EpochProgress(key, configs) as progress:

            def on_epoch(name: str, row: dict[str, Any]) -> None:
                progress.update(numbers[name], row)
                tracker.log_epoch(configs[numbers[name]].seed, row)

            with open_pool(
                [__name__], paths.data, manifest.digest, device=configs[0].train.device,
                threads=configs[0].train.threads, jobs=len(jobs), results=paths.job_results, workers=workers,
            ) as pool:  # fmt: skip
                (outcomes,) = pool.drive([at_once(jobs)], on_epoch)
        if not first:
            return []
        records, rows, timing = [], [], []
        for config, source, outcome in zip(stated, sources, outcomes, strict=True):
            history = outcome["rows"]
            record = make_record(
                "train",
                benchmark=suite.benchmark,
                task=manifest.task,
                model=key,
                label=suite.models[key].label or key,
                seed=config.seed,
                config=config,
                status=outcome["status"],
                reason=outcome["reason"],
                scores={k: v for k, v in (history[-1] if history else {}).items() if "." in k},
                environment=outcome["environment"],
                provenance=source,
            )
            records.append(record)
            rows += [{"model": key, "seed": config.seed, **row} for row in history]
            timing.append(
                {"model": key, "seed": config.seed}
                | {k: outcome.get(k) for k in ("started", "seconds", "images_per_second", "resumed")}
                | {"device": outcome["environment"]["device"], "threads": config.train.threads}
            )
            weights = paths.weights(key, config.seed)
            if outcome["status"] == "finished":
                with replacing(weights) as target:
                    target.write_bytes(outcome["weights"])  # numpy's tofile does not say why it fails
            else:  # those of an earlier run are not this training's
                weights.unlink(missing_ok=True)
            tracker.finish(config.seed, record, history)
        # A seed that failed has no weights, and DVC wants the directory even when all did.
        folder = paths.weights(key, 0).parent
        folder.mkdir(parents=True, exist_ok=True)
        for path in set(folder.glob("seed*.pt")) - {paths.weights(key, seed) for seed in suite.seeds}:
            if re.fullmatch(r"seed\d+\.pt", path.name):  # of a seed that is no longer asked for; no copy of a user
                path.unlink()
        write_json(paths.records / "timing" / f"{key}.json", timing)
        directory = paths.records
        write_history(directory / "history" / f"{key}.csv", rows, records, directory / "train" / f"{key}.json")
        tracker.close()
        _report_failures(key, records)
    return records


def _report_failures(key: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Print which trainings failed, and why."""
    failed = [record for record in records if record["status"] == "failed"]
    for record in failed:
        print(f"{key} seed {record['seed']}: training failed: {record['reason']}", file=sys.stderr)
    if failed:
        count = f"{len(failed)} of {len(records)}"
        rest = "there is nothing to score" if len(failed) == len(records) else "the others are scored"
        print(f"{key}: trainings failed on {count} seeds; the tables will say so, and {rest}", file=sys.stderr)


class _EpochProgress:
    """A bar per seed on a terminal, a line per epoch elsewhere."""

    def __init__(self, key: str, configs: list[Config]) -> None:
        self._key, self._configs = key, configs
        self._bars = progress_bar()
        self._tasks: list[TaskID] = []

    def __enter__(self) -> _EpochProgress:
        if not self._bars.disable:
            self._bars.start()
            self._tasks = [
                self._bars.add_task(f"{self._key} seed {c.seed}", total=c.train.epochs, last="") for c in self._configs
            ]
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:  # elsewhere it would end an empty line
            self._bars.stop()

    def update(self, index: int, row: dict[str, Any]) -> None:
        """Show the row of an epoch of the training at this index."""
        shown = scores_text(row)
        if self._tasks:
            self._bars.update(self._tasks[index], completed=row["epoch"], last=shown)
        else:
            config = self._configs[index]
            print(f"{self._key} seed {config.seed} epoch {row['epoch']}/{config.train.epochs}: {shown}", flush=True)

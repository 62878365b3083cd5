"""A pipeline that tracks runs without training, and readers of its MLflow runs."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.models import Model

from sunets.core.config import Suite, load
from sunets.core.provenance import provenance
from sunets.core.record import Record, make_record, write_json, write_rows
from sunets.models.zoo import resolve_config
from sunets.tracking.live import Tracker
from sunets.tracking.store import CURRENT, KEY, PARENT

EPOCHS = 3
SUITE = """
benchmark: bench
seeds: [0, 1, 2]
data: {name: synthetic}
models:
  sunet_tiny: {name: sunet_tiny, label: SUNet-tiny}
  unet_small: {name: unet_small}
train: {epochs: 3, lr: %s}
evaluate: {variants: {single: {}, flipped: {flip: true}}}
ablations:
  depth:
    {kind: one_at_a_time, model: sunet_tiny, seeds: [0, 1], axes: [{path: model.unet_depth, values: [1, 2]}]}
"""


def make_suite(tmp_path: Path, lr: float = 0.01) -> Suite:
    path = tmp_path / "params.yaml"
    path.write_text(SUITE % lr)
    return load(path)


def row(epoch: int, seed: int, shift: float = 0.0) -> dict[str, Any]:
    scored = epoch == EPOCHS
    miou = 0.1 * epoch + 0.01 * seed + shift
    return {
        "epoch": epoch,
        "iteration": 10 * epoch,
        "lr": 0.01 / epoch,
        "train.loss": 1 / (epoch + seed + 1) + shift,
    } | {
        "val.miou": miou if scored else None,
        "val.iou.a thing": 0.5 if scored else None,
    }


class Pipeline:
    """Stand-in of the stages: plans runs, and writes their records."""

    def __init__(self, tmp_path: Path, lr: float = 0.01, code: str = "c" * 16) -> None:
        self.suite = make_suite(tmp_path, lr)
        self.code = code
        self.results = tmp_path / "results"
        self.records = self.results / "bench/records"

    def plan(self, model: str) -> list[tuple[Any, Record]]:
        configs = [resolve_config(self.suite.config(model, seed)) for seed in self.suite.seeds]
        return [(c, provenance("d" * 64, self.code, c, f"python -m sunets train {model}")) for c in configs]

    def record(self, model: str, seed: int, rows: list[dict[str, Any]], **extra: Any) -> Record:
        config, source = self.plan(model)[seed]
        return make_record(
            "train",
            task="segmentation",
            benchmark="bench",
            model=model,
            label=self.suite.models[model].label,
            seed=seed,
            config=config,
            scores={k: v for k, v in (rows[-1] if rows else {}).items() if "." in k},
            environment={"torch": "2", "threads": 1},
            provenance=source,
            **extra,
        )

    def train(self, model: str, *, shift: float = 0.0, fail: int | None = None, live: bool = True) -> None:
        """Run the train stage: all seeds, interleaved as with parallel workers."""
        tracker = Tracker("train", self.suite, model, self.plan(model)) if live else None
        history: dict[int, list[dict[str, Any]]] = {seed: [] for seed in self.suite.seeds}
        for epoch in range(1, EPOCHS + 1):
            for seed in self.suite.seeds:
                if seed == fail and epoch == 2:
                    continue
                history[seed].append(row(epoch, seed, shift))
                if tracker:
                    tracker.log_epoch(seed, history[seed][-1])
        records = []
        for seed, rows in history.items():
            outcome = {"status": "failed", "reason": "NaN at step 7"} if seed == fail else {}
            records.append(self.record(model, seed, rows, **outcome))
            if tracker:
                tracker.finish(seed, records[-1])
            if seed != fail:
                self.weights(model, seed).parent.mkdir(parents=True, exist_ok=True)
                self.weights(model, seed).write_bytes(f"{model}, seed {seed}: {shift}".encode() * 1000)
        write_json(self.records / f"train/{model}.json", records)
        flat = [{"model": model, "seed": seed, **r} for seed, rows in history.items() for r in rows]
        write_rows(self.records / f"history/{model}.csv", flat)
        if tracker:
            tracker.close()

    def weights(self, model: str, seed: int) -> Path:
        return self.results.parent / f"outputs/bench/weights/{model}/seed{seed}.pt"

    def evaluate(self, model: str, shift: float = 0.0) -> None:
        records = []
        for config, source in self.plan(model):
            for number, variant in enumerate(self.suite.evaluate.variants):
                miou = 0.4 + 0.02 * config.seed**2 + 0.1 * number + shift
                records.append(
                    make_record(
                        "evaluate",
                        task="segmentation",
                        benchmark="bench",
                        model=model,
                        seed=config.seed,
                        variant=variant,
                        config=config,
                        provenance=source,
                        scores={"score.miou": miou, "score.iou.a/b (c)": 0.25, "score.iou.absent": None},
                    )
                )
        write_json(self.records / f"evaluate/{model}.json", records)
        source = self.plan(model)[0][1]
        cost = make_record(
            "cost",
            provenance=source,
            task="segmentation",
            benchmark="bench",
            model=model,
            cost={"cost.params_m": 0.2, "cost.gmacs": 1.5, "cost.output_stride": 16}
            | {f"cost.detail{i}": i for i in range(20)},
        )
        write_json(self.records / f"cost/{model}.json", cost)
        speed = make_record(
            "speed",
            provenance=source,
            task="segmentation",
            benchmark="bench",
            model=model,
            cost={"speed.latency_ms": 7.0 + shift},
        )
        write_json(self.records / "speed.json", [speed])
        timing = [{"model": model, "seed": s, "started": "2026-01-02T03:04:05Z", "seconds": 60.5} for s in (0, 1, 2)]
        write_json(self.records / f"timing/{model}.json", timing)

    def ablate(
        self, path: str = "model.unet_depth", values: Sequence[Any] = (1, 2), *, live: bool = True
    ) -> list[Record]:
        """Run the ablation stage: two trials per value of the axis, of which one fails and one is pruned."""
        tracker = Tracker("trial", self.suite, "depth") if live else None
        records, flat = [], []
        outcomes = [("finished", None), ("pruned", "below the median"), ("failed", "out of memory"), ("finished", None)]
        for number, (status, reason) in enumerate(outcomes):
            arm = {path: values[number // 2]}
            config = resolve_config(self.suite.config("sunet_tiny", number % 2, arm))
            source = provenance("d" * 64, self.code, config, "python -m ablations run depth")
            rows = [row(epoch, number) for epoch in range(1, 1 if status == "failed" else EPOCHS + 1)]
            if tracker:
                tracker.plan(number, config, source, phase="grid", arm=arm)
                for r in rows:
                    tracker.log_epoch(number, r)
            records.append(
                make_record(
                    "trial",
                    task="segmentation",
                    benchmark="bench",
                    model="sunet_tiny",
                    label="SUNet-tiny",
                    seed=config.seed,
                    config=config,
                    status=status,  # type: ignore[arg-type]
                    reason=reason,
                    scores={"score.miou": 0.1 * number} if status == "finished" else {},
                    cost={"cost.gmacs": 1.0 + number, "cost.params_m": 0.2},
                    provenance=source,
                    study="depth",
                    number=number,
                    phase="grid",
                    split="test",
                    setting=arm,
                    arm=arm,
                    tuned={},
                    reference=False,
                    same_as=[],
                )
            )
            if tracker:
                tracker.finish(number, records[-1])
            flat += [{"number": number, **r} for r in rows]
        write_json(self.records / "ablations/depth.json", records)
        write_rows(self.records / "ablations/depth.history.csv", flat)
        if tracker:
            tracker.close()
        return records


def runs(experiment: str = "bench", *, current: bool = True) -> list[Any]:
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    known = client.get_experiment_by_name(experiment)
    query = f"tags.`{CURRENT}` = '{str(current).lower()}'"
    return sorted(client.search_runs([known.experiment_id], query), key=lambda r: r.info.run_name) if known else []


def points(run: Any, name: str) -> list[tuple[int, float]]:
    """Return the measured points of a curve."""
    history = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in history if not math.isnan(point.value))


def models(run: Any) -> list[tuple[Any, int]]:
    """Return the logged models of a run, and their epochs."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return [(client.get_logged_model(m.model_id), m.step) for m in run.outputs.model_outputs]


def signature(model: Any) -> tuple[Any, Any]:
    """Return the shapes of input and output of a logged model."""
    stored = Model.load(Path(model.artifact_location.removeprefix("file://"), "MLmodel")).signature
    return tuple([(spec.shape, spec.type.name) for spec in part.inputs] for part in (stored.inputs, stored.outputs))


def snapshot() -> dict[str, Any]:
    """Return the content of the current runs, without what only a live run knows."""
    current = [*runs("bench"), *runs("bench/ablations")]
    keys = {run.info.run_id: run.data.tags[KEY] for run in current}
    return {
        run.data.tags[KEY]: {
            "name": run.info.run_name,
            "status": run.info.status,
            "params": run.data.params,
            "parent": keys.get(run.data.tags.get(PARENT)),
            "tags": {k: v for k, v in run.data.tags.items() if k not in ("sunets.process", PARENT)},
            "metrics": {k: points(run, k) for k in run.data.metrics if not k.startswith("system/")},
            "data": [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs],
            "models": [
                (model.name, model.status, step, model.params, model.tags, signature(model))
                for model, step in models(run)
            ],
        }
        for run in current
    }


def counts(db: Path) -> dict[str, int]:
    with sqlite3.connect(db) as connection:
        tables = ("runs", "metrics", "params", "tags", "inputs", "datasets", "latest_metrics")
        tables += ("logged_models", "logged_model_params", "logged_model_tags")
        return {table: connection.execute(f"select count(*) from {table}").fetchone()[0] for table in tables}


def by_name(experiment: str = "bench") -> dict[str, Any]:
    return {run.info.run_name: run for run in runs(experiment)}

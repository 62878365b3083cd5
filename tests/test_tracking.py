"""MLflow shows what the records say: live or rebuilt, once or twice, after kills, from several processes."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from mlflow import MlflowClient
from scipy import stats

from sunets.core.config import Suite, load
from sunets.core.provenance import provenance
from sunets.core.record import Record, make_record, write_json, write_rows
from sunets.report.records import SCORES
from sunets.tracking import live as tracking_live
from sunets.tracking import store, view
from sunets.tracking import sync as tracking_sync
from sunets.tracking.address import TrackingError
from sunets.tracking.live import Tracker
from sunets.tracking.store import CURRENT, KEY, PARENT
from sunets.tracking.sync import sync, sync_or_warn

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database: making one takes seconds, copying it none."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    store._create_database(file, MlflowClient)
    return file


@pytest.fixture
def fresh(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Makes another empty database the one in use."""
    numbers = iter(range(100))

    def switch() -> Path:
        file = tmp_path / f"db{next(numbers)}" / "mlflow.db"
        file.parent.mkdir()
        shutil.copy(template, file)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        return file

    return switch


@pytest.fixture
def db(fresh: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking_live, "_warned", type(tracking_live._warned)())
    return fresh()


@pytest.fixture(autouse=True)
def _no_tracker_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registered: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    yield
    for close in registered:
        close()


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
    """Stands for the stages: plans runs, and writes their records."""

    def __init__(self, tmp_path: Path, lr: float = 0.01, code: str = "c" * 16) -> None:
        self.suite = make_suite(tmp_path, lr)
        self.code = code
        self.results = tmp_path / "results"
        self.records = self.results / "bench/records"

    def plan(self, model: str) -> list[tuple[Any, Record]]:
        configs = [self.suite.run(model, seed) for seed in self.suite.seeds]
        return [(c, provenance("d" * 64, self.code, c, f"python -m sunets train {model}")) for c in configs]

    def record(self, model: str, seed: int, rows: list[dict[str, Any]], **extra: Any) -> Record:
        config, source = self.plan(model)[seed]
        return make_record(
            "train",
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
        """The train stage: all seeds, interleaved as parallel workers are."""
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
        write_json(self.records / f"train/{model}.json", records)
        flat = [{"model": model, "seed": seed, **r} for seed, rows in history.items() for r in rows]
        write_rows(self.records / f"history/{model}.csv", flat)
        if tracker:
            tracker.close()

    def evaluate(self, model: str, shift: float = 0.0) -> None:
        records = []
        for config, source in self.plan(model):
            for number, variant in enumerate(self.suite.evaluate.variants):
                miou = 0.4 + 0.02 * config.seed**2 + 0.1 * number + shift
                records.append(
                    make_record(
                        "evaluate",
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
        cost = make_record("profile", benchmark="bench", model=model, cost={"cost.params_m": 0.2, "cost.gmacs": 1.5})
        write_json(self.records / f"profile/{model}.json", cost)
        speed = make_record("speed", benchmark="bench", model=model, cost={"speed.latency_ms": 7.0 + shift})
        write_json(self.records / "speed.json", [speed])
        timing = [{"model": model, "seed": s, "started": "2026-01-02T03:04:05Z", "seconds": 60.5} for s in (0, 1, 2)]
        write_json(self.records / f"timing/{model}.json", timing)

    def ablate(self, *, live: bool = True) -> list[Record]:
        """The ablation stage: four trials, of which one fails and one is pruned."""
        tracker = Tracker("trial", self.suite, "depth") if live else None
        records, flat = [], []
        outcomes = [("finished", None), ("pruned", "below the median"), ("failed", "out of memory"), ("finished", None)]
        for number, (status, reason) in enumerate(outcomes):
            arm = {"model.unet_depth": 1 + number // 2}
            config = self.suite.run("sunet_tiny", number % 2, arm)
            source = provenance("d" * 64, self.code, config, "python -m ablations run depth")
            rows = [row(epoch, number) for epoch in range(1, 1 if status == "failed" else EPOCHS + 1)]
            if tracker:
                tracker.plan(number, config, source, phase="grid", arm=arm)
                for r in rows:
                    tracker.log_epoch(number, r)
            records.append(
                make_record(
                    "trial",
                    benchmark="bench",
                    model="sunet_tiny",
                    label="SUNet-tiny",
                    seed=config.seed,
                    config=config,
                    status=status,  # type: ignore[arg-type]
                    reason=reason,
                    scores={"score.miou": 0.1 * number} if status == "finished" else {},
                    cost={"cost.gmacs": 1.0 + number},
                    provenance=source,
                    study="depth",
                    number=number,
                    phase="grid",
                    arm=arm,
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
    found = client.get_experiment_by_name(experiment)
    query = f"tags.`{CURRENT}` = '{str(current).lower()}'"
    return sorted(client.search_runs([found.experiment_id], query), key=lambda r: r.info.run_name) if found else []


def points(run: Any, name: str) -> list[tuple[int, float]]:
    """The measured points of a curve."""
    history = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in history if not math.isnan(point.value))


def snapshot() -> dict[str, Any]:
    """All that a reader of the current runs sees, less what only a live run can know."""
    found = [*runs("bench"), *runs("bench/ablations")]
    keys = {run.info.run_id: run.data.tags[KEY] for run in found}
    return {
        run.data.tags[KEY]: {
            "name": run.info.run_name,
            "status": run.info.status,
            "params": run.data.params,
            "parent": keys.get(run.data.tags.get(PARENT)),
            "tags": {k: v for k, v in run.data.tags.items() if k not in ("sunets.process", PARENT)},
            "metrics": {k: points(run, k) for k in run.data.metrics if not k.startswith("system/")},
            "data": [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs],
        }
        for run in found
    }


def counts(db: Path) -> dict[str, int]:
    with sqlite3.connect(db) as connection:
        tables = ("runs", "metrics", "params", "tags", "inputs", "datasets", "latest_metrics")
        return {table: connection.execute(f"select count(*) from {table}").fetchone()[0] for table in tables}


def by_name(experiment: str = "bench") -> dict[str, Any]:
    return {run.info.run_name: run for run in runs(experiment)}


def test_live_runs_and_rebuilt_runs_are_the_same(db: Path, fresh: Callable[[], Path], tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", fail=1)
    pipeline.train("unet_small")
    live = snapshot()
    assert len(live) == 8
    assert {run["status"] for run in live.values()} == {"FINISHED", "FAILED"}
    fresh()
    assert str(sync(pipeline.results)) == "MLflow: 8 runs created, 0 updated, 0 unchanged"
    assert snapshot() == live


def test_live_trials_and_rebuilt_trials_are_the_same(db: Path, fresh: Callable[[], Path], tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.ablate()
    sync(pipeline.results, "bench")  # counts the parent's trials
    live = snapshot()
    fresh()
    sync(pipeline.results, "bench")
    assert snapshot() == live
    found = by_name("bench/ablations")
    parent = found.pop("depth")
    assert all(run.data.tags[PARENT] == parent.info.run_id for run in found.values())
    assert dict(parent.data.metrics) == {
        "aim/trials.finished": 2.0,
        "trials.finished": 2.0,
        "trials.pruned": 1.0,
        "trials.failed": 1.0,
    }
    assert {run.data.tags["number"]: (run.info.status, run.data.tags["status"]) for run in found.values()} == {
        "0": ("FINISHED", "finished"),
        "1": ("KILLED", "pruned"),
        "2": ("FAILED", "failed"),
        "3": ("FINISHED", "finished"),
    }
    last = found["#3, unet_depth=2, seed 1"]
    assert last.data.params["model.unet_depth"] == "2"
    assert last.data.tags["train.lr"] == parent.data.params["train.lr"] == "0.01"
    assert last.data.metrics["cost.gmacs"] == 4.0
    assert last.data.metrics["score.miou"] == pytest.approx(0.3)
    assert points(last, "train.loss") == [(e, row(e, 3)["train.loss"]) for e in (1, 2, 3)]
    failed = found["#2, unet_depth=2, seed 0"]
    assert failed.data.tags["mlflow.note.content"] == "failed: out of memory"


def test_a_second_sync_adds_nothing(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    pipeline.ablate()
    pipeline.evaluate("sunet_tiny")
    first = sync(pipeline.results)
    assert (first.created, first.updated, first.unchanged) == (0, 5, 4)
    before, state = counts(db), snapshot()
    assert sync(pipeline.results) == tracking_sync.Synced(0, 0, 9)
    assert counts(db) == before
    assert snapshot() == state


def test_parent_has_mean_interval_and_cost(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", live=False)
    pipeline.evaluate("sunet_tiny")
    sync(pipeline.results)
    found = by_name()
    parent, child = found["SUNet-tiny"], found["SUNet-tiny, seed 2"]
    assert child.data.tags[PARENT] == parent.info.run_id
    values = np.array([0.4, 0.42, 0.48])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    got = parent.data.metrics
    assert got["score.miou.mean"] == pytest.approx(values.mean())
    assert got["score.miou.ci95_low"] == pytest.approx(low)
    assert got["score.miou.ci95_high"] == pytest.approx(high)
    assert got["score.miou.seeds"] == 3
    assert got["flipped/score.miou.mean"] == pytest.approx(values.mean() + 0.1)
    assert (got["cost.params_m"], got["cost.gmacs"], got["speed.latency_ms"]) == (0.2, 1.5, 7.0)
    assert "seed" not in parent.data.params
    assert parent.data.params["model.name"] == "sunet_tiny"
    assert child.data.params["seed"] == "2"
    assert child.data.metrics["score.miou"] == pytest.approx(0.48)
    assert child.data.metrics["score.iou.a/b _c_"] == 0.25  # MLflow refuses parentheses
    assert child.data.metrics["best/val.miou"] == child.data.metrics["final/val.miou"] == row(3, 2)["val.miou"]
    assert child.data.metrics["timing.seconds"] == 60.5
    assert child.info.end_time - child.info.start_time == 60_500
    assert child.data.tags["evaluate.variants.flipped.flip"] == "true"
    assert child.data.tags["provenance.config_hash"]
    assert [i.dataset.digest for i in child.inputs.dataset_inputs] == ["d" * 36]
    pipeline.evaluate("sunet_tiny", shift=-0.1)  # evaluated again in another way: the trainings are the same runs
    assert sync(pipeline.results).created == 0
    assert by_name()["SUNet-tiny"].data.metrics["score.miou.mean"] == pytest.approx(values.mean() - 0.1)
    assert by_name()["SUNet-tiny, seed 2"].data.metrics["score.miou"] == pytest.approx(0.38)


def test_interrupted_training_goes_on_in_its_run(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    killed = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    for epoch in (1, 2):
        killed.log_epoch(0, row(epoch, 0))
    killed._store = None  # as after a kill: nothing more is written
    before = by_name()["SUNet-tiny, seed 0"]
    assert before.info.status == "RUNNING"
    pipeline.train("sunet_tiny")  # restored rows are reported again
    after = by_name()
    assert len(after) == 4
    assert not runs(current=False)
    again = after["SUNet-tiny, seed 0"]
    assert again.info.run_id == before.info.run_id
    assert again.info.status == "FINISHED"
    assert points(again, "train.loss") == [(e, row(e, 0)["train.loss"]) for e in (1, 2, 3)]
    pipeline.train("sunet_tiny")  # and a whole repetition adds nothing either
    assert {name: run.info.run_id for name, run in by_name().items()} == {n: r.info.run_id for n, r in after.items()}
    assert points(again, "train.loss") == [(e, row(e, 0)["train.loss"]) for e in (1, 2, 3)]


def test_exception_marks_runs_as_interrupted(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    tracker.log_epoch(0, row(1, 0))
    tracker.close()  # what atexit calls
    assert {run.info.status for run in runs()} == {"KILLED"}
    pipeline.train("sunet_tiny")
    assert {run.info.status for run in runs()} == {"FINISHED"}
    assert len(runs()) == 4


def test_another_configuration_is_another_run(db: Path, tmp_path: Path) -> None:
    Pipeline(tmp_path).train("sunet_tiny")
    first = {run.info.run_id for run in runs()}
    changed = Pipeline(tmp_path, lr=0.02)
    changed.train("sunet_tiny", shift=0.1)
    assert {run.info.run_id for run in runs(current=False)} == first
    assert {run.data.params["train.lr"] for run in runs()} == {"0.02"}
    assert sync(changed.results).unchanged == 4
    original = Pipeline(tmp_path)
    original.train("sunet_tiny", live=False)  # as when DVC restores its outputs
    assert sync(original.results) == tracking_sync.Synced(0, 4, 0)
    assert {run.info.run_id for run in runs()} == first
    assert len(runs(current=False)) == 4


def test_other_code_is_another_run(db: Path, tmp_path: Path) -> None:
    Pipeline(tmp_path).train("sunet_tiny")
    Pipeline(tmp_path, code="e" * 16).train("sunet_tiny")
    assert len(runs()) == len(runs(current=False)) == 4


def test_other_numbers_are_another_run(db: Path, tmp_path: Path) -> None:
    """The same configuration on another machine: an epoch must not get two values in one curve."""
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    pipeline.train("sunet_tiny", shift=0.001)
    children = [run for run in runs() if "seed" in run.data.params]
    assert len(children) == 3
    assert len(runs(current=False)) == 3
    for run in children:
        seed = int(run.data.params["seed"])
        assert points(run, "train.loss") == [(e, row(e, seed, 0.001)["train.loss"]) for e in (1, 2, 3)]
    pipeline.train("sunet_tiny", live=False)  # the first machine's records are checked out
    assert sync(pipeline.results).created == 0
    assert points(by_name()["SUNet-tiny, seed 0"], "train.loss") == [(e, row(e, 0)["train.loss"]) for e in (1, 2, 3)]


def test_runs_without_record_are_not_current(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    pipeline.train("unet_small")
    for kind, suffix in (("train", "json"), ("history", "csv")):
        (pipeline.records / kind / f"unet_small.{suffix}").unlink()
    sync(pipeline.results)
    assert {run.data.tags["model"] for run in runs()} == {"sunet_tiny"}
    assert {run.data.tags["model"] for run in runs(current=False)} == {"unet_small"}


def test_sync_tells_dead_writers_from_living_ones(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    tracker = Tracker("train", pipeline.suite, "unet_small", pipeline.plan("unet_small"))
    tracker.log_epoch(0, row(1, 0))
    sync(pipeline.results)
    running = [run for run in runs() if run.info.status == "RUNNING"]
    assert len(running) == 2  # a training in progress has no record yet
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for run in running:
        host = run.data.tags["sunets.process"].rpartition(":")[0]
        MlflowClient().set_tag(run.info.run_id, "sunets.process", f"{host}:{gone.pid}")
    tracker._store = None
    sync(pipeline.results)
    assert {run.info.status for run in runs(current=False)} == {"KILLED"}
    assert len(runs(current=False)) == 2


def test_page_and_figures_are_artifacts(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    folder = pipeline.results / "bench"
    for name in ("README.md", "tables/accuracy.md", "figures/miou.png", "figures/field_sunet_tiny.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    sync(pipeline.results)
    found, client = by_name(), MlflowClient()
    place = found["report"].info.artifact_uri
    assert place.startswith(db.parent.as_uri())
    local = Path(place.removeprefix("file://"))
    assert {p.relative_to(local).as_posix() for p in local.rglob("*.*")} == {
        p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if "records" not in p.parts
    }
    own = client.list_artifacts(found["SUNet-tiny"].info.run_id, "figures")
    assert [item.path for item in own] == ["figures/field_sunet_tiny.png"]
    assert sync(pipeline.results).updated == 0
    (folder / "figures/miou.png").write_text("drawn anew")
    assert sync(pipeline.results) == tracking_sync.Synced(0, 1, 5 - 1)
    assert (local / "figures/miou.png").read_text() == "drawn anew"


def test_system_metrics_while_live(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    time.sleep(1)
    tracker.close()
    names = set(by_name()["SUNet-tiny"].data.metrics)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= names


def test_comparisons_open_on_the_headline_score(
    db: Path, fresh: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's pages take the first stored metric or the first name, whatever was measured first."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    tracker.log_epoch(0, row(1, 0))
    time.sleep(1)
    tracker.close()
    found = by_name()
    assert any(name.startswith("system/") for name in found["SUNet-tiny"].data.metrics)
    for name, headline in (("SUNet-tiny", "score.miou.mean"), ("SUNet-tiny, seed 0", "score.miou")):
        metrics = found[name].data.metrics
        assert next(iter(metrics)) == headline
        assert math.isnan(metrics[headline])  # no number is made up
        query = f"metrics.`{headline}` < 1"
        assert not MlflowClient().search_runs([found[name].info.experiment_id], query)
    pipeline.train("sunet_tiny")
    pipeline.ablate()
    pipeline.evaluate("sunet_tiny")
    for database in ("live", "rebuilt"):
        if database == "rebuilt":
            fresh()
        sync(pipeline.results)
        for run in [*runs(), *runs("bench/ablations")]:
            kind, metrics = run.data.tags["kind"], run.data.metrics
            headline = {"model": "score.miou.mean", "study": "trials.finished"}.get(kind, "score.miou")
            assert next(iter(metrics)) == headline
            if run.info.status == "FINISHED":
                assert min(metrics) == f"aim/{headline}"
                assert metrics[f"aim/{headline}"] == metrics[headline]
            else:
                assert f"aim/{headline}" not in metrics
                assert math.isnan(metrics[headline])


@pytest.mark.parametrize(
    ("data", "phase", "headline"),
    [
        ("synthetic", None, "score.miou"),
        ("imagefolder", None, "score.top1_error_percent"),
        ("camvid", "confirmation", "score.miou"),
        ("camvid", "tuning", "search.miou"),
        ("synthetic_shapes", "search", "search.top1_error_percent"),
    ],
)
def test_headline_of_a_task_and_phase(data: str, phase: str | None, headline: str) -> None:
    assert view._headline({"params": {"data.name": data}, "phase": phase}) == headline
    assert {task: scores[0] for task, scores in SCORES.items()} == view.HEADLINE


def test_trials_have_what_varies_as_parameters(db: Path, fresh: Callable[[], Path], tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    two_axes = (SUITE % 0.01).replace("2]}]", "2]}, {path: model.head, values: [linear]}]")
    (tmp_path / "params.yaml").write_text(two_axes)
    pipeline.suite = load(tmp_path / "params.yaml")
    shared: dict[str, Any] = {"benchmark": "bench", "model": "sunet_tiny", "label": "SUNet-tiny", "study": "depth"}
    tracker = Tracker("trial", pipeline.suite, "depth")
    records = []
    for number, depth in enumerate([None, [1, 1, 1]]):
        config = pipeline.suite.run("sunet_tiny", 0, {"model.unet_depth": depth} if depth else {})
        source = provenance("d" * 64, pipeline.code, config, "python -m ablations run depth")
        arm = {"model.unet_depth": depth or [2, 2, 1], "model.head": "linear"}
        tracker.plan(number, config, source, phase="grid", arm=arm)
        tracker.log_epoch(number, row(1, number))
        extra = {"seed": 0, "config": config, "provenance": source, "number": number, "phase": "grid", "arm": arm}
        records.append(make_record("trial", **shared, **extra, tuned={}))
        tracker.finish(number, records[-1])
    tracker.close()
    write_json(pipeline.records / "ablations/depth.json", records)
    rows = [{"number": number, **row(1, number)} for number in range(2)]
    write_rows(pipeline.records / "ablations/depth.history.csv", rows)
    assert sync(pipeline.results) == tracking_sync.Synced(0, 1, 2)  # the parent gets its counts
    live = snapshot()
    found = by_name("bench/ablations")
    names = {"#0, head=linear, unet_depth=[2,2,1], seed 0", "#1, head=linear, unet_depth=[1,1,1], seed 0", "depth"}
    assert set(found) == names
    parent = found.pop("depth").data
    for run, depth in zip(found.values(), ("[2,2,1]", "[1,1,1]"), strict=True):
        # What was not given is what the network makes of it, and no word among numbers.
        assert run.data.params == {"model.unet_depth": depth, "model.head": "linear", "seed": "0"}
        fixed = {k: v for k, v in parent.params.items() if v != "null"}
        assert fixed.items() <= run.data.tags.items()
        assert not set(parent.params) & set(run.data.params)
        given = {k for k, v in records[0]["params"].items() if v is not None}
        assert given <= {*run.data.params, *run.data.tags}
    fresh()
    sync(pipeline.results)
    assert snapshot() == live


@pytest.fixture
def server(postgres: str, free_port: int, tmp_path: Path) -> Iterator[str]:
    """Address of an MLflow server as README starts it, on a database of its own in PostgreSQL."""
    with psycopg.connect(postgres.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("create database mlflow")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "0.0.0.0", "--port", str(free_port)]
    command += ["--workers", "1"]
    command += ["--backend-store-uri", postgres.replace("/postgres?", "/mlflow?")]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        address, deadline = f"http://127.0.0.1:{free_port}", time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_server_on_postgresql_shows_the_same(
    server: str, db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", fail=1)
    pipeline.ablate()
    pipeline.evaluate("sunet_tiny")
    (pipeline.results / "bench/README.md").write_text("# The page")
    sync(pipeline.results)
    state = snapshot()
    assert len(state) == 10
    assert sync(pipeline.results) == tracking_sync.Synced(0, 0, 10)
    page = by_name()["report"].info.run_id
    assert [file.path for file in MlflowClient(server).list_artifacts(page)] == ["README.md"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{db}")
    sync(pipeline.results)
    assert snapshot() == state


def test_unreachable_server_costs_no_training(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    start = time.monotonic()
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    pipeline.train("unet_small")
    sync_or_warn(pipeline.results, "bench")
    assert time.monotonic() - start < 30
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "http://127.0.0.1:9" in message
    assert "python -m sunets mlflow-sync" in message
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9"):
        sync(pipeline.results)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{db}")
    assert sync(pipeline.results).created == 8  # the remedy works


def test_server_that_fails_midway_costs_no_training(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    tracker.log_epoch(0, row(1, 0))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", fail)
        tracker.log_epoch(0, row(2, 0))
    tracker.log_epoch(0, row(3, 0))
    tracker.finish(0, pipeline.record("sunet_tiny", 0, [row(3, 0)]))
    tracker.close()
    assert capsys.readouterr().err.count("the disk is full") == 1
    pipeline.train("sunet_tiny", live=False)
    sync(pipeline.results)
    assert points(by_name()["SUNet-tiny, seed 0"], "train.loss") == [(e, row(e, 0)["train.loss"]) for e in (1, 2, 3)]
    assert {run.info.status for run in runs()} == {"FINISHED"}


def test_machine_without_mlflow_can_train(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    assert "mlflow is not installed" in capsys.readouterr().err
    with pytest.raises(TrackingError, match="mlflow is not installed"):
        sync(pipeline.results)


def test_only_the_first_process_of_torchrun_writes(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    Pipeline(tmp_path).train("sunet_tiny")
    assert runs() == []


def test_sync_without_records_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results.nowhere.records: no records; run `dvc repro` first"):
        sync(tmp_path / "results", "nowhere")


RACER = """
import sys
from sunets.core.config import load
from sunets.core.record import make_record
from sunets.core.provenance import provenance
from sunets.tracking.address import TrackingError
from sunets.tracking.live import Tracker
suite, number = load(sys.argv[1]), int(sys.argv[2])
config = suite.run("sunet_tiny", number)
source = provenance("d" * 64, "c" * 16, config, "x")
print("ready", flush=True)
sys.stdin.readline()
tracker = Tracker("trial", suite, "depth")
tracker.plan(number, config, source, phase="grid", arm={})
for epoch in (1, 2, 3):
    tracker.log_epoch(number, {"epoch": epoch, "train.loss": epoch + number / 8})
tracker.finish(number, make_record("trial", benchmark="bench", model="sunet_tiny", seed=number, config=config,
    provenance=source, study="depth", number=number, phase="grid", arm={}))
tracker.close()
"""


@pytest.mark.slow
def test_processes_racing_for_a_cold_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: a process killed while it creates the database leaves nothing behind that hurts."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    environ = os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)}
    make_suite(tmp_path)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path / "params.yaml"), str(number)],
            env=environ,
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        victim = racers.pop()
        assert victim.stdin is not None
        victim.stdin.write("\n")
        victim.stdin.flush()
        end = time.monotonic() + 60
        while not list(tmp_path.glob("mlflow.db.*.tmp")) and time.monotonic() < end:
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        assert not (tmp_path / "mlflow.db").exists()
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        for racer in racers:
            _, errors = racer.communicate(timeout=120)
            assert racer.returncode == 0, errors
            assert not errors
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    found = by_name("bench/ablations")
    assert sorted(found) == ["#0, seed 0", "#1, seed 1", "#2, seed 2", "depth"]
    assert len(runs("bench/ablations")) == 4
    for number in range(3):
        run = found[f"#{number}, seed {number}"]
        assert run.data.tags[PARENT] == found["depth"].info.run_id
        assert points(run, "train.loss") == [(e, e + number / 8) for e in (1, 2, 3)]

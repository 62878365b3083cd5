"""MLflow shows what the records say: live or rebuilt, once or twice, after kills, for every reader."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
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
from tracked import SUITE, Pipeline, by_name, counts, points, row, runs, snapshot

from sunets.core.config import load
from sunets.core.metrics import PRIMARY_METRIC
from sunets.core.provenance import provenance
from sunets.core.record import make_record, write_json, write_rows
from sunets.models.zoo import resolve_config
from sunets.report.records import SCORES
from sunets.tracking import sync as tracking_sync
from sunets.tracking import view
from sunets.tracking.live import Tracker
from sunets.tracking.store import PARENT
from sunets.tracking.sync import sync


@pytest.mark.slow
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


@pytest.mark.slow
def test_live_trials_and_rebuilt_trials_are_the_same(db: Path, fresh: Callable[[], Path], tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.ablate()
    sync(pipeline.results, "bench")  # counts the parent's trials
    live = snapshot()
    fresh()
    sync(pipeline.results, "bench")
    assert snapshot() == live
    shown = by_name("bench/ablations")
    parent = shown.pop("depth")
    assert all(run.data.tags[PARENT] == parent.info.run_id for run in shown.values())
    assert dict(parent.data.metrics) == {
        "aim/trials.finished": 2.0,
        "trials.finished": 2.0,
        "trials.pruned": 1.0,
        "trials.failed": 1.0,
        "summary/score.miou.mean.best": pytest.approx(0.3),  # of depth 2: one of its seeds failed
    }
    assert parent.data.tags["best.setting"] == '{"model.unet_depth":2}'
    assert {run.data.tags["number"]: (run.info.status, run.data.tags["status"]) for run in shown.values()} == {
        "0": ("FINISHED", "finished"),
        "1": ("KILLED", "pruned"),
        "2": ("FAILED", "failed"),
        "3": ("FINISHED", "finished"),
    }
    last = shown["#3, unet_depth=2, seed 1"]
    assert last.data.params["model.unet_depth"] == "2"
    assert last.data.tags["train.lr"] == parent.data.params["train.lr"] == "0.01"
    assert last.data.metrics["cost.gmacs"] == 4.0
    assert last.data.metrics["score.miou"] == pytest.approx(0.3)
    assert points(last, "curves/train.loss") == [(e, row(e, 3)["train.loss"]) for e in (1, 2, 3)]
    failed = shown["#2, unet_depth=2, seed 0"]
    assert failed.data.tags["mlflow.note.content"] == "failed: out of memory"


@pytest.mark.slow
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
    shown = by_name()
    parent, child = shown["SUNet-tiny"], shown["SUNet-tiny, seed 2"]
    assert child.data.tags[PARENT] == parent.info.run_id
    values = np.array([0.4, 0.42, 0.48])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    got = parent.data.metrics
    assert got["score.miou.mean"] == pytest.approx(values.mean())
    assert got["score.miou.ci95_low"] == pytest.approx(low)
    assert got["score.miou.ci95_high"] == pytest.approx(high)
    assert got["score.miou.seeds"] == 3
    assert got["variants/flipped.score.miou.mean"] == pytest.approx(values.mean() + 0.1)
    assert (got["cost.params_m"], got["cost.gmacs"], got["speed.latency_ms"]) == (0.2, 1.5, 7.0)
    assert "seed" not in parent.data.params
    assert parent.data.params["model.name"] == "sunet_tiny"
    assert child.data.params["seed"] == "2"
    assert child.data.metrics["score.miou"] == pytest.approx(0.48)
    assert child.data.metrics["score.iou.a/b _c_"] == 0.25  # MLflow refuses parentheses
    assert {child.data.metrics[f"summary/val.miou.{end}"] for end in ("best", "final")} == {row(3, 2)["val.miou"]}
    assert child.data.metrics["timing.seconds"] == 60.5
    assert child.info.end_time - child.info.start_time == 60_500
    assert child.data.tags["evaluate.variants.flipped.flip"] == "true"
    assert child.data.tags["provenance.config_hash"]
    assert [i.dataset.digest for i in child.inputs.dataset_inputs] == ["d" * 36]
    pipeline.evaluate("sunet_tiny", shift=-0.1)  # evaluated again in another way: the trainings are the same runs
    assert sync(pipeline.results).created == 0
    assert by_name()["SUNet-tiny"].data.metrics["score.miou.mean"] == pytest.approx(values.mean() - 0.1)
    assert by_name()["SUNet-tiny, seed 2"].data.metrics["score.miou"] == pytest.approx(0.38)


@pytest.mark.slow
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
    assert points(again, "curves/train.loss") == [(e, row(e, 0)["train.loss"]) for e in (1, 2, 3)]
    pipeline.train("sunet_tiny")  # and a whole repetition adds nothing either
    assert {name: run.info.run_id for name, run in by_name().items()} == {n: r.info.run_id for n, r in after.items()}
    assert points(again, "curves/train.loss") == [(e, row(e, 0)["train.loss"]) for e in (1, 2, 3)]


def test_exception_marks_runs_as_interrupted(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    tracker.log_epoch(0, row(1, 0))
    tracker.close()  # what atexit calls
    assert {run.info.status for run in runs()} == {"KILLED"}
    pipeline.train("sunet_tiny")
    assert {run.info.status for run in runs()} == {"FINISHED"}
    assert len(runs()) == 4


@pytest.mark.slow
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


@pytest.mark.slow
def test_other_code_is_another_run(db: Path, tmp_path: Path) -> None:
    Pipeline(tmp_path).train("sunet_tiny")
    Pipeline(tmp_path, code="e" * 16).train("sunet_tiny")
    assert len(runs()) == len(runs(current=False)) == 4


@pytest.mark.slow
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
        assert points(run, "curves/train.loss") == [(e, row(e, seed, 0.001)["train.loss"]) for e in (1, 2, 3)]
    pipeline.train("sunet_tiny", live=False)  # the first machine's records are checked out
    assert sync(pipeline.results).created == 0
    assert points(by_name()["SUNet-tiny, seed 0"], "curves/train.loss") == [
        (e, row(e, 0)["train.loss"]) for e in (1, 2, 3)
    ]


@pytest.mark.slow
def test_runs_without_record_are_not_current(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    pipeline.train("unet_small")
    for kind, suffix in (("train", "json"), ("history", "csv")):
        (pipeline.records / kind / f"unet_small.{suffix}").unlink()
    sync(pipeline.results)
    assert {run.data.tags["model"] for run in runs()} == {"sunet_tiny"}
    assert {run.data.tags["model"] for run in runs(current=False)} == {"unet_small"}


@pytest.mark.slow
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


def artifacts(run: Any, folder: str) -> list[str]:
    return [file.path for file in MlflowClient().list_artifacts(run.info.run_id, folder)]


@pytest.mark.slow
def test_page_and_figures_are_artifacts(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    folder = pipeline.results / "bench"
    for name in ("README.md", "tables/accuracy.md", "figures/accuracy.png", "figures/training_curves.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    sync(pipeline.results)
    shown = by_name()
    uri = shown["report"].info.artifact_uri
    assert uri.startswith(db.parent.as_uri())
    local = Path(uri.removeprefix("file://"))
    assert {p.relative_to(local).as_posix() for p in local.rglob("*.*")} == {
        p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if "records" not in p.parts
    }
    curves = "figures/training_curves.png"
    assert artifacts(shown["SUNet-tiny"], "figures") == ["figures/accuracy.png", curves]
    for seed in (0, 1, 2):
        assert artifacts(shown[f"SUNet-tiny, seed {seed}"], "figures") == [curves]
    assert sync(pipeline.results).updated == 0
    (folder / "figures/accuracy.png").write_text("drawn anew")
    assert sync(pipeline.results) == tracking_sync.Synced(0, 2, 5 - 2)
    assert (local / "figures/accuracy.png").read_text() == "drawn anew"


@pytest.mark.slow
def test_system_metrics_while_live(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    time.sleep(1)
    tracker.close()
    names = set(by_name()["SUNet-tiny"].data.metrics)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= names


@pytest.mark.slow
def test_comparisons_open_on_the_headline_score(
    db: Path, fresh: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's pages take the first stored metric or the first name, not what was measured first."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    tracker.log_epoch(0, row(1, 0))
    time.sleep(1)
    tracker.close()
    shown = by_name()
    assert any(name.startswith("system/") for name in shown["SUNet-tiny"].data.metrics)
    for name, headline in (("SUNet-tiny", "score.miou.mean"), ("SUNet-tiny, seed 0", "score.miou")):
        metrics = shown[name].data.metrics
        assert next(iter(metrics)) == headline
        assert math.isnan(metrics[headline])  # no number is made up
        query = f"metrics.`{headline}` < 1"
        assert not MlflowClient().search_runs([shown[name].info.experiment_id], query)
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
    ("task", "phase", "headline"),
    [
        ("segmentation", None, "score.miou"),
        ("classification", None, "score.top1_error_percent"),
        ("segmentation", "confirmation", "score.miou"),
        ("segmentation", "tuning", "search.miou"),
        ("classification", "search", "search.top1_error_percent"),
    ],
)
def test_headline_of_a_task_and_phase(task: str, phase: str | None, headline: str) -> None:
    assert view._headline({"task": task, "phase": phase}) == headline
    assert {name: scores[0] for name, scores in SCORES.items()} == PRIMARY_METRIC


def test_trials_have_what_varies_as_parameters(db: Path, fresh: Callable[[], Path], tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    two_axes = (SUITE % 0.01).replace("2]}]", "2]}, {path: model.head, values: [linear]}]")
    (tmp_path / "params.yaml").write_text(two_axes)
    pipeline.suite = load(tmp_path / "params.yaml")
    shared: dict[str, Any] = {"benchmark": "bench", "model": "sunet_tiny", "label": "SUNet-tiny", "study": "depth"}
    tracker = Tracker("trial", pipeline.suite, "depth")
    records = []
    for number, depth in enumerate([None, [1, 1, 1]]):
        config = resolve_config(pipeline.suite.config("sunet_tiny", 0, {"model.unet_depth": depth} if depth else {}))
        source = provenance("d" * 64, pipeline.code, config, "python -m ablations run depth")
        arm = {"model.unet_depth": depth or [2, 2, 1], "model.head": "linear"}
        tracker.plan(number, config, source, phase="grid", arm=arm)
        tracker.log_epoch(number, row(1, number))
        extra = {"seed": 0, "config": config, "provenance": source, "number": number, "phase": "grid", "arm": arm}
        records.append(
            make_record(
                "trial",
                task="segmentation",
                **shared,
                **extra,
                tuned={},
                split="test",
                setting=arm,
                reference=False,
                same_as=[],
            )
        )
        tracker.finish(number, records[-1])
        if number == 0:  # stopped before the second trial's first epoch
            tracker.plan(1, config, source, phase="grid", arm=arm)
            tracker.close()
            assert by_name("bench/ablations")["depth"].info.status == "KILLED"
            tracker = Tracker("trial", pipeline.suite, "depth")
            tracker.plan(0, config, source, phase="grid", arm=arm)
            tracker.finish(0, records[-1], [row(1, 0)])
    tracker.close()
    assert by_name("bench/ablations")["depth"].info.status == "FINISHED"
    write_json(pipeline.records / "ablations/depth.json", records)
    rows = [{"number": number, **row(1, number)} for number in range(2)]
    write_rows(pipeline.records / "ablations/depth.history.csv", rows)
    assert sync(pipeline.results) == tracking_sync.Synced(0, 1, 2)  # the parent gets its counts
    live = snapshot()
    shown = by_name("bench/ablations")
    names = {"#0, head=linear, unet_depth=[2,2,1], seed 0", "#1, head=linear, unet_depth=[1,1,1], seed 0", "depth"}
    assert set(shown) == names
    parent = shown.pop("depth").data
    for run, depth in zip(shown.values(), ("[2,2,1]", "[1,1,1]"), strict=True):
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


def test_a_study_has_one_run_where_other_values_follow_its_axis(db: Path, tmp_path: Path) -> None:
    names = ["sunet_tiny", "sunet64"]  # of other widths, depths and numbers of blocks
    text = (SUITE % 0.01).replace("model.unet_depth, values: [1, 2]", f"model.name, values: [{', '.join(names)}]")
    pipeline = Pipeline(tmp_path)
    (tmp_path / "params.yaml").write_text(text)
    pipeline.suite = load(tmp_path / "params.yaml")
    pipeline.ablate("model.name", names)
    assert sync(pipeline.results).created == 0
    kinds = [run.data.tags["kind"] for run in runs("bench/ablations")]
    assert sorted(kinds) == ["study", *["trial"] * 4]
    (study,) = (run for run in runs("bench/ablations") if run.data.tags["kind"] == "study")
    assert "model.width" not in study.data.params
    assert study.data.params["train.lr"] == "0.01"


@pytest.fixture
def server(postgres: str, free_port: int, tmp_path: Path) -> Iterator[str]:
    """Address of an MLflow server as README starts it, on a new PostgreSQL database."""
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


@pytest.mark.slow
def test_studies_have_their_own_figures_and_tables(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.ablate(live=False)
    folder = pipeline.results / "bench/ablations"
    folder.mkdir()
    base = pipeline.records / "ablations"
    for suffix in (".json", ".history.csv"):  # another study, whose name goes on
        (base / f"depth_wide{suffix}").write_text(
            (base / f"depth{suffix}").read_text().replace('"depth"', '"depth_wide"')
        )
    names = ["depth.md", "depth.tex", "depth_axes.png", "depth_axes.pdf", "depth_axes.csv", "depth_wide_axes.png"]
    for name in [*names, "depthless.png"]:
        (folder / name).write_text(name)
    sync(pipeline.results)
    shown = by_name("bench/ablations")
    both = [file for folder in ("figures", "tables") for file in artifacts(shown["depth"], folder)]
    assert both == ["figures/depth_axes.png", "tables/depth.md", "tables/depth_axes.csv"]
    assert artifacts(shown["depth_wide"], "figures") == ["figures/depth_wide_axes.png"]
    assert artifacts(shown["depth_wide"], "tables") == []
    for run in shown.values():
        if run.data.tags["kind"] == "trial":
            assert artifacts(run, "figures") == [f"figures/{run.data.tags['study']}_axes.png"]


@pytest.mark.parametrize("metric", ["score.miou", "score.top1_error_percent"])
def test_best_setting_of_a_study(metric: str) -> None:
    task = {"score.miou": "segmentation", "score.top1_error_percent": "classification"}[metric]
    records = [
        {"task": task, "status": status, "arm": {"train.lr": lr}, "scores": {metric: score}}
        for lr, score, status in (
            (0.1, 0.4, "finished"), (0.1, 0.6, "finished"), (0.2, 0.55, "finished"), (0.3, 0.45, "finished"),
            (0.4, 0.99, "pruned"), (0.5, math.nan, "finished"), (0.6, None, "finished"),
        )
    ]  # fmt: skip
    best, setting = (0.55, '{"train.lr":0.2}') if metric == "score.miou" else (0.45, '{"train.lr":0.3}')
    assert view._best(records) == ({f"summary/{metric}.mean.best": best}, {"best.setting": setting})
    search = {**records[0], "phase": "search", "scores": {metric.replace("score.", "search."): 0.7}}
    assert view._best([search, *records]) == view._best(records)
    assert view._best([search])[0] == {f"summary/{metric.replace('score.', 'search.')}.mean.best": 0.7}
    assert view._best(records[4:]) == ({}, {})


@pytest.mark.slow
def test_table_of_runs_opens_on_score_interval_and_recipe(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", live=False)
    pipeline.evaluate("sunet_tiny")
    pipeline.ablate(live=False)
    done = sync(pipeline.results, pages="http://host:7000/")
    client = MlflowClient()
    for name in ("bench", "bench/ablations"):  # a run of an earlier configuration
        client.create_run(client.get_experiment_by_name(name).experiment_id, tags={"sunets.current": "false"})
    for line, name in zip(done.links, ("bench", "bench/ablations"), strict=True):
        experiment = client.get_experiment_by_name(name)
        query = "?workflowType=machine_learning&viewStateShareKey=sunets"
        assert line == f"{name}: http://host:7000/#/experiments/{experiment.experiment_id}/runs{query}"
        state = json.loads(experiment.tags["mlflow.sharedViewState.sunets"])
        columns = state["selectedColumns"]
        existing = {
            f"{kind}.`{key}`"
            for run in runs(name)
            for kind, values in (("metrics", run.data.metrics), ("params", run.data.params), ("tags", run.data.tags))
            for key in values
        }
        assert set(columns) <= existing
        first = {
            "bench": [*(f"metrics.`score.miou.{k}`" for k in ("mean", "ci95_low", "ci95_high")), "params.`train.lr`"],
            "bench/ablations": ["metrics.`summary/score.miou.mean.best`"],
        }[name]
        # Without an order of its own MLflow shows metrics, then parameters, each by name.
        assert state["columnOrder"][:2] == ["attributes.`Run Name`", "runDateAndNestInfo"]
        assert state["columnOrder"][2 : 2 + len(first)] == first
        assert set(state["columnOrder"][2:]) == set(columns) == set(state["columnWidths"])
        shown = client.search_runs([experiment.experiment_id], state["searchFilter"])
        assert {run.info.run_id for run in shown} == {run.info.run_id for run in runs(name)}

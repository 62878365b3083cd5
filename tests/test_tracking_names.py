"""Every class, name and value reaches MLflow, and two experiments at once on one MLflow leave each other alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric_name
from tracked import Pipeline, by_name, row, runs

from sunets.core.record import read_json, write_json
from sunets.tracking import view
from sunets.tracking.live import Tracker
from sunets.tracking.store import PROCESS, is_alive
from sunets.tracking.sync import _models, _studies, _tunings, sync

ROOT = Path(__file__).resolve().parents[1]

CLASSES = [
    "背景", "天空", "дорога", "سماء", "सड़क", "été", "e\u0301te\u0301", "a(b", "a[b", "a_b", "a/b", "a//b", "a/", "/a",
    "..", "../a", ".", "", " ", "x\ty", "x\ny", "🚗", "🚕", "n" * 400, "n" * 401, "\udce9",
]  # fmt: skip


def test_classes_of_every_alphabet_have_a_metric_each() -> None:
    scores = {f"score.iou.{name}": float(number) for number, name in enumerate(CLASSES)}
    shown = view.finite_numbers(scores)
    assert sorted(shown.values()) == sorted(scores.values())
    for name in shown:
        _validate_metric_name(name)
        assert len(f"{view.SUMMARY}{name}.mean.best") <= 250
        assert name.startswith("score.iou.")
    assert {"score.iou.背景", "score.iou.дорога", "score.iou.a_b", "score.iou.a/b"} <= set(shown)
    assert shown["score.iou.a_b"] == scores["score.iou.a_b"]  # what needs no change keeps its name
    assert view.finite_numbers(shown) == shown
    backwards = view.finite_numbers(dict(reversed(scores.items())))
    assert backwards == shown
    assert view.finite_numbers({"score.iou.a(b": 1}) == {"score.iou.a_b": 1.0}


GROUPS = {
    "model": ["aim", "variants", ""],
    "train": ["aim", "curves", "summary", "variants", ""],
    "study": ["aim", "summary", ""],
    "trial": ["aim", "curves", "summary", ""],
    "tuning": ["curves", "summary", ""],
    "tune": ["curves", "summary"],
}
"""Kind of a run -> the groups of its metrics in MLflow's order: by name, those without a slash last."""


def test_a_run_shows_its_headline_then_curves_and_fewer_than_twenty_metrics() -> None:
    folder = ROOT / "results/synthetic"
    kinds = set()
    for parent, children in [*_models(folder), *_studies(folder), *_tunings(folder)]:
        missing = {column for column in parent.columns if column.startswith("metrics")}
        for run in (parent, *children):
            kind = run.tags["kind"]
            kinds.add(kind)
            names = {*run.values, *(name for name, _ in run.points)}
            assert sorted({name.rpartition("/")[0] for name in names}, key=lambda group: group or "~") == GROUPS[kind]
            assert bool({*view.COSTS[2:]} & names) == (kind == "model")
            missing -= {f"metrics.`{name}`" for name in names}
            names |= set(view.COSTS if kind == "model" else ())  # a GPU has more of them
            assert len([name for name in names if kind != "train" or not name.startswith("score.iou.")]) < 20
            assert any(name.startswith("score.iou.") for name in names) == (kind == "train")
        assert not missing
    assert kinds == set(GROUPS)


def test_a_run_with_older_names_is_not_continued(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", live=False)
    with monkeypatch.context() as older:
        older.setattr(view, "CURVES", "")
        older.setattr(view, "NAMES", 1)
        sync(pipeline.results)
    assert sync(pipeline.results).created == len(runs()) == len(runs(current=False)) == 4
    assert not any("train.loss" in run.data.metrics for run in runs())


@pytest.mark.slow
def test_curves_of_classes_stay_apart(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    scores = {f"val.iou.{name}": number / 100 for number, name in enumerate(CLASSES)}
    tracker.log_epoch(0, {"epoch": 1, "train.loss": 1.0} | dict.fromkeys(scores))
    tracker.log_epoch(0, {"epoch": 2, "train.loss": 0.5} | scores)
    tracker.close()
    shown = by_name()["SUNet-tiny, seed 0"].data.metrics
    assert sorted(v for k, v in shown.items() if k.startswith("curves/val.iou.")) == sorted(scores.values())


def test_long_values_neither_warn_nor_fail(
    db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", fail=1, live=False)
    pipeline.ablate(live=False)
    reason = "NaN in image " + "n01440760_front_camera\0 " * 600
    file = pipeline.records / "train/sunet_tiny.json"
    records: list[dict[str, Any]] = read_json(file)
    for record in records:
        record["label"] = "L" * 9000
        record["params"]["data.classes"] = ["c" * 30] * 500
        record["params"]["k" * 300] = "v"
        if record["status"] == "failed":
            record["reason"] = reason
    write_json(file, records)
    file = pipeline.records / "ablations/depth.json"
    records = read_json(file)
    for record in records:
        record["arm"]["model.widths"] = list(range(5000))
        record["environment"]["cpu"] = "x" * 9000
    write_json(file, records)
    assert sync(pipeline.results).created == 9
    assert sync(pipeline.results).unchanged == 9
    assert not caplog.records
    assert not capsys.readouterr().err
    for run in [*runs(), *runs("bench/ablations")]:
        assert len(run.info.run_name) <= 250
        assert all(len(value) <= 6000 for value in {**run.data.tags, **run.data.params}.values())


def test_values_that_differ_late_stay_different() -> None:
    assert view.plain_text("a" * 9000 + "b") != view.plain_text("a" * 9000 + "c")
    assert view.plain_text("short") == "short"
    assert view.plain_text("caf\udce9\0") == "caf??"  # what databases refuse


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Another living process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def given_to(process: subprocess.Popen[str]) -> None:
    """Make all running runs look as if another process wrote them."""
    for run in runs():
        if run.info.status == "RUNNING":
            namespace = run.data.tags[PROCESS].rpartition(":")[0]
            MlflowClient().set_tag(run.info.run_id, PROCESS, f"{namespace}:{process.pid}")


def test_other_experiment_leaves_a_living_training_alone(
    db: Path, tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    pipeline = Pipeline(tmp_path)
    living = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    living.log_epoch(0, row(1, 0))
    given_to(other)
    ours = {run.info.run_id for run in runs()}

    (tmp_path / "second").mkdir()
    second = Pipeline(tmp_path / "second", lr=0.02)
    second.train("sunet_tiny")  # another configuration in the same slots
    sync(second.results)
    status = {run.info.run_id: run.info.status for run in [*runs(), *runs(current=False)]}
    assert {status[run_id] for run_id in ours} == {"RUNNING"}

    other.kill()
    other.wait()
    for run in runs(current=False):
        assert not is_alive(run)
    living._store = None


@pytest.mark.slow
def test_sync_does_not_end_what_is_trained_again(db: Path, tmp_path: Path, other: subprocess.Popen[str]) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    again = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    again.log_epoch(0, row(1, 0))
    given_to(other)
    before = {run.info.run_id: run.info.status for run in runs()}
    assert sorted(before.values()) == ["FINISHED", "FINISHED", "RUNNING", "RUNNING"]
    sync(pipeline.results)
    again.close()  # not its runs any more
    assert {run.info.run_id: run.info.status for run in runs()} == before
    other.kill()
    other.wait()
    sync(pipeline.results)
    assert {run.info.status for run in runs()} == {"FINISHED"}


def test_process_of_another_container_or_machine_may_live(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    (run,) = runs()
    assert is_alive(run)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = run.data.tags[PROCESS].rpartition(":")[0]
    for namespace, alive in ((here, False), ("elsewhere/1", True), (here.partition("/")[0] + "/1", True)):
        MlflowClient().set_tag(run.info.run_id, PROCESS, f"{namespace}:{gone.pid}")
        assert is_alive(MlflowClient().get_run(run.info.run_id)) == alive
    tracker._store = None

"""Weights are logged models of MLflow: described, registered once, and never copied."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tracked import Pipeline, by_name, counts, models, runs, signature, snapshot

from sunets.core.record import read_json, write_json
from sunets.tracking import sync as tracking_sync
from sunets.tracking.store import CURRENT
from sunets.tracking.sync import sync


def trained(tmp_path: Path, **options: Any) -> Pipeline:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", live=False, **options)
    pipeline.evaluate("sunet_tiny")
    return pipeline


def current(run: Any) -> list[str]:
    return [model.tags[CURRENT] for model, _ in models(run)]


@pytest.mark.slow
def test_each_training_has_its_weights_as_a_model(db: Path, fresh: Callable[[], Path], tmp_path: Path) -> None:
    pipeline = trained(tmp_path, fail=1)
    manifest = tmp_path / "data/prepared/bench/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"classes": ["a", "b", "c"]}')
    sync(pipeline.results)
    shown = by_name()
    assert [len(models(shown[f"SUNet-tiny, seed {seed}"])) for seed in (0, 1, 2)] == [1, 0, 1], "seed 1 diverged"
    ((model, epoch),) = models(shown["SUNet-tiny, seed 2"])
    assert (model.name, epoch, model.status.value) == ("sunet_tiny-seed2", 3, "READY")
    assert model.params == {
        "cost.params_m": "0.2", "cost.gmacs": "1.5", "cost.output_stride": "16",
        "weights.path": "outputs/bench/weights/sunet_tiny/seed2.pt",
    }  # fmt: skip
    digest = hashlib.sha256(pipeline.weights("sunet_tiny", 2).read_bytes()).hexdigest()
    assert model.tags["weights.sha256"] == digest
    assert signature(model) == ([((-1, 3, -1, -1), "float32")], [((-1, 3, -1, -1), "float32")])
    stored = Path(model.artifact_location.removeprefix("file://"))
    assert [path.name for path in stored.rglob("*")] == ["MLmodel"]
    state = snapshot()
    database = fresh()
    sync(pipeline.results)
    assert snapshot() == state
    before = counts(database)
    assert before["logged_models"] == 2
    assert sync(pipeline.results) == tracking_sync.Synced(0, 0, 4)
    assert counts(database) == before


@pytest.mark.slow
def test_other_weights_are_the_same_model_and_another_cost_another_one(db: Path, tmp_path: Path) -> None:
    pipeline = trained(tmp_path)
    sync(pipeline.results)
    (first, _), *_ = models(by_name()["SUNet-tiny, seed 0"])
    pipeline.weights("sunet_tiny", 0).write_bytes(b"others")
    assert sync(pipeline.results).updated == 1
    ((second, _),) = models(by_name()["SUNet-tiny, seed 0"])
    assert second.model_id == first.model_id
    assert second.tags["weights.sha256"] == hashlib.sha256(b"others").hexdigest() != first.tags["weights.sha256"]
    path = pipeline.records / "cost/sunet_tiny.json"
    record = read_json(path)
    record["cost"]["cost.gmacs"] = 1.6
    write_json(path, record)
    sync(pipeline.results)
    found = models(by_name()["SUNet-tiny, seed 0"])
    assert {m.params["cost.gmacs"]: m.tags[CURRENT] for m, _ in found} == {"1.5": "false", "1.6": "true"}


@pytest.mark.slow
def test_models_of_runs_that_are_not_current_are_not_either(db: Path, tmp_path: Path) -> None:
    sync(trained(tmp_path).results)
    changed = Pipeline(tmp_path, lr=0.02)
    changed.train("sunet_tiny", live=False)
    changed.evaluate("sunet_tiny")
    sync(changed.results)
    children = [run for run in runs(current=False) if "seed" in run.data.params]
    assert [current(run) for run in children] == [["false"]] * 3
    sync(trained(tmp_path).results)
    children = [run for run in runs() if "seed" in run.data.params]
    assert [current(run) for run in children] == [["true"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("step", ["log_model_artifacts", "finalize_logged_model", "log_outputs"])
def test_an_interrupted_registration_is_completed(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    pipeline = trained(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise MlflowException("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, fail)
        with pytest.raises(tracking_sync.TrackingError, match="the disk is full"):
            sync(pipeline.results)
    sync(pipeline.results)
    shown = by_name()
    for seed in (0, 1, 2):
        ((model, _),) = models(shown[f"SUNet-tiny, seed {seed}"])
        assert model.status.value == "READY"
        assert signature(model)
    assert counts(db)["logged_models"] == 3


@pytest.mark.slow
def test_a_clone_without_weights_has_no_models(db: Path, tmp_path: Path) -> None:
    pipeline = trained(tmp_path)
    for seed in (0, 1, 2):
        pipeline.weights("sunet_tiny", seed).unlink()
    sync(pipeline.results)
    assert counts(db)["logged_models"] == 0

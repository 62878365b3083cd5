"""Stages on a cluster that loses a worker, and with other weights to start from."""

from __future__ import annotations

import contextlib
import glob
import os
import pkgutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster import cluster, until
from tiny import TINY, NoTracker, write_checkout

import sunets.tracking.live
from ablations.study import run_study
from sunets.core.config import load, override
from sunets.core.executor import JobError
from sunets.core.paths import BenchmarkPaths
from sunets.core.record import read_json
from sunets.data.manifest import load_manifest
from sunets.stages.evaluate import evaluate_stage
from sunets.stages.prepare import prepare_stage
from sunets.stages.train import train_stage
from sunets.training.fit import run_fingerprint
from sunets.training.loop import TrainingError

PARAMS: dict[str, Any] = {
    **TINY,
    "train": {"epochs": 20, "batch_size": 4},
    "evaluate": {"batch_size": 4, "variants": {"plain": {}, "flip": {"flip": True}}},
}


def written(folder: Path) -> dict[str, bytes]:
    """Files of the stages, but for those that hold times."""
    found = [*folder.glob("outputs/**/*.*"), *folder.glob("results/**/*.*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.is_file() and "timing" not in p.parts}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the stages write in one process of this machine."""
    folder = write_checkout(tmp_path_factory.mktemp("alone"), PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sunets.tracking.live, "Tracker", NoTracker)
        train_stage(load("params.yaml"), "net", workers=1)
        evaluate_stage(load("params.yaml"), "net", workers=1)
    return written(folder)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared_directory", "none_shared"])
def test_a_cluster_that_loses_a_worker_trains_and_scores_the_same(
    shared: bool, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a shared directory the lost training goes on, with none it starts anew on another worker."""
    driver = write_checkout(tmp_path / "driver", PARAMS)
    folders = [driver if shared else write_checkout(tmp_path / f"worker{number}", PARAMS) for number in range(2)]
    with cluster(folders[0], 1, preload="sunets.stages.train") as made:
        for folder in folders[1:]:
            made.add_worker(folder)
        held = [f"{folder}/.work/*/checkpoint.pt" for folder in folders]

        def kill() -> None:
            until(lambda: sum(map(len, map(glob.glob, {*held}))) >= 2, 300)
            next(worker for worker in made.workers if busy(worker.pid)).kill()

        monkeypatch.chdir(driver)
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", made.address)
        monkeypatch.setattr(sunets.tracking.live, "Tracker", NoTracker)
        with ThreadPoolExecutor() as killer:
            killed = killer.submit(kill)
            train_stage(load("params.yaml"), "net")
        killed.result()
        evaluate_stage(load("params.yaml"), "net")
    assert written(driver) == alone
    timing = read_json(driver / "results/tiny/records/timing/net.json")
    assert [entry["resumed"] for entry in timing].count(True) == (1 if shared else 0)


@pytest.mark.slow
def test_a_worker_misses_its_gpu_and_the_driver_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_checkout(tmp_path / "driver", PARAMS))
    monkeypatch.setattr(sunets.tracking.live, "Tracker", NoTracker)
    missed = r"^net seed \d on \S+: train\.device: cuda, but torch sees no GPU here"
    with cluster(Path.cwd(), 1, "--resources", "GPU=1", preload="sunets.stages.train") as made:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", made.address)
        with pytest.raises(JobError, match=missed):
            train_stage(load("params.yaml", ["train.device=cuda"]), "net")


@pytest.mark.parametrize("job", ["sunets.stages.train:train_one", "ablations.study:run_trial"])
def test_a_training_s_directory_is_named_by_the_device_that_trains(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver may see no GPU where its workers have one: a training on a CPU must not go on from theirs."""
    monkeypatch.chdir(write_checkout(tmp_path / "worker", PARAMS))
    config, directories = load("params.yaml").config("net", 0), []

    def fit(*_: Any, work_dir: Path, **__: Any) -> None:
        directories.append(work_dir)
        raise TrainingError("enough")

    monkeypatch.setattr(f"{job.partition(':')[0]}.fit", fit)
    paths = {"data": "data/prepared/tiny", "work": ".work"}
    arguments = paths | {"config": config.model_dump(mode="json"), "training": "of the driver", "until": None}
    assert pkgutil.resolve_name(job)(arguments, print)["reason"] == "enough"
    assert directories == [Path(".work", run_fingerprint(config, load_manifest(Path(paths["data"]), config.data)))]


def busy(pid: int) -> bool:
    """Whether a worker is training: it holds the lock of a training's directory open."""
    with contextlib.suppress(OSError):
        return any(os.readlink(path).endswith("/.lock") for path in Path(f"/proc/{pid}/fd").iterdir())
    return False


@pytest.mark.slow
def test_training_again_keeps_a_user_s_copy_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkout(tmp_path, PARAMS | {"train": {"epochs": 1, "batch_size": 8}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sunets.tracking.live, "Tracker", NoTracker)
    suite = load("params.yaml")
    train_stage(suite, "net", workers=1)
    folder = Path("outputs/tiny/weights/net")
    (folder / "seed0_best.pt").write_bytes((folder / "seed0.pt").read_bytes())
    train_stage(override(suite, {"seeds": [0]}), "net", workers=1)
    assert sorted(path.name for path in folder.iterdir()) == ["seed0.pt", "seed0_best.pt"]


@pytest.mark.slow
def test_the_headline_is_the_first_variant_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored results of the same variants in another order are of another headline."""
    study = {"kind": "one_at_a_time", "model": "net", "seeds": [0], "axes": [{"path": "model.width", "values": [8]}]}
    variants = {"plain": {}, "half": {"scales": [0.5]}}
    scores = []
    for order in (["plain", "half"], ["half", "plain"]):
        params = PARAMS | {"train": {"epochs": 1, "batch_size": 8}, "ablations": {"width": study}}
        params["evaluate"] = {"batch_size": 4, "variants": {name: variants[name] for name in order}}
        write_checkout(tmp_path, params)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sunets.tracking.live, "Tracker", NoTracker)
        run_study(load("params.yaml"), "width", workers=1)
        rows = read_json("results/tiny/records/ablations/width.json")
        assert {row["variant"] for row in rows} == {order[0]}
        scores.append([row["scores"]["score.miou"] for row in rows])
    assert scores[0] != scores[1]


def test_weights_of_an_axis_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axis = {"path": "train.init_from", "values": ["outputs/x/weights/net/seed{seed}.pt"]}
    study = {"kind": "one_at_a_time", "model": "net", "seeds": [0, 1], "axes": [axis]}
    write_checkout(tmp_path, PARAMS | {"watch": {"files": True}, "ablations": {"start": study}})
    monkeypatch.chdir(tmp_path)
    prepare_stage(load("params.yaml"))
    watched = read_json(BenchmarkPaths("tiny").watched)["init_from_sha256"]
    assert list(watched) == [f"outputs/x/weights/net/seed{seed}.pt" for seed in (0, 1)]


@pytest.mark.slow
def test_other_weights_to_start_from_are_another_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the same path: results are found by what decides them, not by the configuration alone."""
    folder = write_checkout(tmp_path / "chain", PARAMS)
    start, made = folder / "start.pt", folder / "outputs/tiny/weights/net/seed0.pt"

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sunets.tracking.live, "Tracker", NoTracker)

    def train(*settings: str) -> bytes:
        train_stage(load("params.yaml", ["train.epochs=1", *settings]), "net", workers=1)
        return made.read_bytes()

    first = train()
    second = (folder / "outputs/tiny/weights/net/seed1.pt").read_bytes()
    trained = {}
    for content in (first, second, first):
        start.write_bytes(content)
        weights = train("train.init_from=start.pt", "seeds=[0]")
        assert trained.setdefault(content, weights) == weights
    assert len(set(trained.values())) == 2

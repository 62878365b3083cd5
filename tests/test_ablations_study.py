"""Whole studies of tiny real trainings: their records, a kill, the commands."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from cluster import NO_SERVER, cluster, environment, until
from tiny import TINY, write_checkout

import sunets.core.stage
import sunets.tracking.live
from ablations import __main__ as commands
from ablations.choice import confirmed, finalists, spread
from ablations.plan import estimate, plan_studies
from ablations.search import Trial
from ablations.space import check_study, most_jobs
from ablations.study import _Plan, run_study
from sunets.core.config import StudyConfig, Suite, load
from sunets.core.metrics import pareto_front
from sunets.core.paths import BenchmarkPaths
from sunets.core.record import read_json, read_rows
from sunets.data.manifest import load_manifest
from sunets.duration import Speed
from sunets.plan import dataset_facts
from sunets.stages.train import train_stage

ROOT = Path(__file__).resolve().parents[1]
DEPTHS = {"path": "model.unet_depth", "values": [1, 2]}
RATE = {"path": "train.lr", "low": 1e-4, "high": 0.1, "log": True}
PARAMS: dict[str, Any] = {
    **TINY,
    "train": {"epochs": 3, "batch_size": 8},
    "evaluate": {"batch_size": 4, "variants": {"plain": {}}},
    "cost": {"size": [32, 32], "receptive_field_seeds": 1, "receptive_field_images": 1},
    "ablations": {
        "depth": {"kind": "one_at_a_time", "model": "net", "seeds": [0, 1], "axes": [DEPTHS]},
        "rates": {
            "kind": "one_at_a_time",
            "model": "net",
            "seeds": [0],
            "axes": [DEPTHS, {"path": "train.lr", "values": [1e30]}],
        },
        "tuned": {
            "kind": "tuned", "model": "net", "seeds": [0], "trials": 5, "axes": [DEPTHS], "nuisance": [RATE],
        },
        "search": {"kind": "search", "model": "net", "seeds": [0], "trials": 3, "confirm": 2, "axes": [DEPTHS, RATE]},
    },
}  # fmt: skip


TRACKER = sunets.tracking.live.Tracker


class QuietTracker:
    """Takes what a live tracker takes, and notes the method and the number of the trial."""

    seen: list[tuple[Any, ...]]

    def __init__(self, kind: str, suite: Suite, item: str) -> None:
        QuietTracker.seen = [(kind, item)]

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments, **_: QuietTracker.seen.append((method, *arguments[:1]))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with parameters and prepared data, and the trainings that earlier tests left."""
    return write_checkout(tmp_path_factory.mktemp("checkout"), PARAMS)


@pytest.fixture
def suite(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sunets.tracking.live, "Tracker", QuietTracker)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    return load("params.yaml")


def files(root: Path, study: str) -> dict[str, bytes]:
    folder = root / "results/tiny/records/ablations"
    return {suffix: (folder / f"{study}{suffix}").read_bytes() for suffix in (".json", ".csv", ".history.csv")}


@pytest.mark.slow
def test_a_grid_leaves_one_record_a_training_and_nothing_new_when_run_again(suite: Suite) -> None:
    records = run_study(suite, "depth", workers=2)
    assert [(r["arm"]["model.unet_depth"], r["seed"], r["reference"]) for r in records] == [
        (1, 0, True), (1, 1, True), (2, 0, False), (2, 1, False),
    ]  # fmt: skip
    assert [r["number"] for r in records] == [0, 1, 2, 3]
    first = records[0]
    assert (first["kind"], first["status"], first["phase"], first["split"]) == ("trial", "finished", "grid", "test")
    assert (first["setting"], first["same_as"]) == ({}, [])
    assert 0 <= first["scores"]["score.miou"] <= 1
    assert records[2]["cost"]["cost.params_m"] > first["cost"]["cost.params_m"] > 0
    assert {"cost.gmacs", "memory.saved_mib", "receptive_field.effective_share"} <= first["cost"].keys()
    assert records[2]["params"]["model.unet_depth"] == [2, 2, 2]  # of every stage, as built
    assert first["provenance"]["command"] == "python -m ablations run depth"
    assert len({r["provenance"]["config_hash"] for r in records}) == 4
    assert first["environment"]["threads"] == 1
    history = read_rows("results/tiny/records/ablations/depth.history.csv")
    assert [(row["number"], row["epoch"]) for row in history] == [(n, e) for n in range(4) for e in (1, 2, 3)]
    seen = QuietTracker.seen
    assert seen[0] == ("trial", "depth")
    for number in range(4):
        own = [entry[0] for entry in seen if entry[1:2] == (number,)]
        assert own == ["plan", "log_epoch", "log_epoch", "log_epoch", "finish"]

    written = files(Path(), "depth")
    assert run_study(suite, "depth", workers=1) == records
    assert files(Path(), "depth") == written
    assert not [entry for entry in QuietTracker.seen if entry[0] == "log_epoch"], "something was trained again"
    assert [entry[:2] for entry in QuietTracker.seen if entry[0] == "finish"] == [("finish", n) for n in range(4)]


@pytest.mark.slow
def test_a_failed_training_is_a_row_and_equal_trainings_are_shared(suite: Suite) -> None:
    run_study(suite, "depth")
    before = set(Path(".work").glob("*/weights.pt"))
    records = run_study(suite, "rates")
    assert [r["status"] for r in records] == ["finished", "finished", "failed"]
    failed = records[2]
    assert failed["arm"]["train.lr"] == 1e30
    assert failed["reason"].startswith("the loss became nan in epoch ")
    assert failed["scores"] == {}
    assert failed["provenance"]["data_digest"] == records[0]["provenance"]["data_digest"]
    assert set(Path(".work").glob("*/weights.pt")) == before, "the other two are trainings of the study `depth`"
    row = read_rows("results/tiny/records/ablations/rates.csv")[2]
    assert (row["status"], row["score.miou"]) == ("failed", None)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["benchmark", "study"])
def test_the_reference_arm_is_the_training_of_the_benchmark_whichever_runs_first(
    first: str, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_checkout(tmp_path / "checkout", PARAMS))
    monkeypatch.setattr(sunets.tracking.live, "Tracker", lambda *_: MagicMock())
    axes = "[{path: model.unet_depth, values: [[1, 1, 1], [2, 2, 2]]}]"  # written out; the model says 1
    grid = f"{{kind: grid, model: net, seeds: [0, 5], axes: {axes}}}"
    tuned = f"{{kind: tuned, model: net, seeds: [0, 5], trials: 1, axes: {axes}, nuisance: [{json.dumps(RATE)}]}}"
    suite = load("params.yaml", [f"ablations={{depth: {grid}, tuned: {tuned}}}"])

    def trainings() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in Path(".work").glob("*/checkpoint.pt")}

    if first == "benchmark":
        train_stage(suite, "net", workers=1)
        before = trainings()
        records = run_study(suite, "depth", workers=1)
    else:
        records = run_study(suite, "depth", workers=1)
        before = trainings()
        train_stage(suite, "net", workers=1)
    after = trainings()
    assert before == {name: after[name] for name in before}, "a training of one was changed by the other"
    assert len(after) == 5, "seeds 0 and 1 of the benchmark; depth 2 on seeds 0 and 5, depth 1 on seed 5"
    shared = {(r["arm"]["model.unet_depth"][0], r["seed"]): r["benchmark_training"] for r in records}
    assert shared == {(1, 0): True, (1, 5): False, (2, 0): False, (2, 5): False}
    benchmark = read_json("results/tiny/records/train/net.json")[0]
    assert benchmark["provenance"]["config_hash"] == records[0]["provenance"]["config_hash"]
    history = [row for row in read_rows("results/tiny/records/ablations/depth.history.csv") if row["number"] == 0]
    for ours, theirs in zip(history, read_rows("results/tiny/records/history/net.csv"), strict=False):
        assert {key: ours[key] for key in ("epoch", "train.loss")} == {
            key: theirs[key] for key in ("epoch", "train.loss")
        }

    records = run_study(suite, "tuned", workers=1)
    assert [r["recipe_of_base"] for r in records] == [True] * 6
    assert {(r["arm"]["model.unet_depth"][0], r["seed"]) for r in records if r["benchmark_training"]} == {(1, 0)}
    assert len(trainings()) == 7, "the two trials of the tuning are new"


@pytest.mark.slow
def test_a_tuned_study_gives_each_arm_the_same_trials_and_trains_its_best_again(suite: Suite) -> None:
    records = run_study(suite, "tuned")
    tuning = [r for r in records if r["phase"] == "tuning"]
    assert [r["arm"]["model.unet_depth"] for r in tuning] == [1] * 5 + [2] * 5
    assert [r["number"] for r in records] == list(range(12))
    assert {r["seed"] for r in tuning} == {100}
    assert {r["split"] for r in tuning} == {"val"}
    assert "pruned" in {r["status"] for r in tuning}
    assert [r["tuned"] for r in tuning[:3]] == [r["tuned"] for r in tuning[5:8]], "arms start from the same draws"
    assert [r["number"] for r in records if r["recipe_of_base"]][:2] == [0, 5], "each arm tries it first"
    final = records[10:]
    assert [(r["phase"], r["split"], r["seed"]) for r in final] == [("confirmation", "test", 0)] * 2
    for arm, confirmation in zip((tuning[:5], tuning[5:]), final, strict=True):
        best = max((r for r in arm if r["status"] == "finished"), key=lambda r: r["scores"]["search.miou"])
        assert confirmation["params"]["train.lr"] == best["params"]["train.lr"]
    rows = read_rows("results/tiny/records/ablations/tuned.csv")
    assert [row["number"] for row in rows] == list(range(12))
    for row, record in zip(rows, records, strict=True):
        given = {name for name in ("search.miou", "score.miou") if row[name] is not None}
        own = "search.miou" if record["phase"] == "tuning" else "score.miou"
        assert given == ({own} if record["status"] == "finished" else set())
    pruned = next(r for r in tuning if r["status"] == "pruned")
    rows = [r for r in read_rows("results/tiny/records/ablations/tuned.history.csv") if r["number"] == pruned["number"]]
    assert 0 < len(rows) < 3


@pytest.mark.slow
def test_a_search_confirms_the_base_and_points_of_its_front(suite: Suite) -> None:
    records = run_study(suite, "search")
    seen = [r for r in records if r["phase"] == "search"]
    final = [r for r in records if r["phase"] == "confirmation"]
    assert len(seen) == 3
    assert final[0]["reference"]
    assert final[0]["setting"] == {}
    points = [(r["scores"]["search.miou"], -r["cost"]["cost.gmacs"]) for r in seen]
    front = [seen[i]["setting"] for i in pareto_front(points)]
    assert [r["setting"] for r in final[1:]] == [front[0], front[-1]][: len(front)]
    assert all(not r["reference"] for r in final[1:])


def recipe_trial(depth: int, lr: float, score: float | None, seed: int = 100, copy: int | None = None) -> Trial:
    """Make a trial of a tuned arm; without a score it diverged."""
    status: Any = "failed" if score is None else "finished"
    result = {"values": {} if score is None else {"search.miou": score}}
    setting = {"model.unet_depth": depth, "train.lr": lr, "seed": seed}
    return Trial("s", 0, setting, status, None, result, copy)


def recipe(depth: int, lr: float) -> dict[str, Any]:
    return {"model.unet_depth": depth, "train.lr": lr}


def test_an_arm_without_a_finished_trial_is_not_confirmed(suite: Suite) -> None:
    study = suite.ablations["tuned"]
    trials = [recipe_trial(1, 0.0, 0.1), recipe_trial(1, 1.0, 0.3), recipe_trial(1, 2.0, 0.3), recipe_trial(2, 0, None)]
    assert confirmed(study, "maximize", trials, repr) == [recipe(1, 1.0)]
    assert confirmed(study, "minimize", trials, repr) == [recipe(1, 0.0)]


def test_the_best_recipes_of_an_arm_go_to_more_seeds_and_their_mean_decides(suite: Suite) -> None:
    study = suite.ablations["tuned"].model_copy(update={"seeds": (0, 1), "confirm": 2})
    trials = [
        *(recipe_trial(1, lr, score) for lr, score in ((0.1, 0.5), (0.2, 0.7), (0.3, 0.6))),
        recipe_trial(1, 0.2, 0.7, copy=1),
        *(recipe_trial(2, lr, score) for lr, score in ((0.1, None), (0.2, 0.4))),
    ]
    assert finalists(study, "maximize", trials) == [recipe(1, 0.2), recipe(1, 0.3)], "of the other arm, one finished"
    assert finalists(study, "minimize", trials) == [recipe(1, 0.1), recipe(1, 0.3)]
    assert finalists(study.model_copy(update={"confirm": 1}), "maximize", trials) == []
    assert finalists(study.model_copy(update={"seeds": (0,)}), "maximize", trials) == []
    again = [*trials, recipe_trial(1, 0.2, 0.1, 101), recipe_trial(1, 0.3, 0.6, 101)]
    assert confirmed(study, "maximize", again, repr) == [recipe(1, 0.3), recipe(2, 0.2)]
    diverged = [*trials, recipe_trial(1, 0.2, 0.1, 101), recipe_trial(1, 0.3, None, 101)]
    assert confirmed(study, "maximize", diverged, repr) == [recipe(1, 0.2), recipe(2, 0.2)]


@pytest.mark.slow
def test_recipes_are_chosen_on_seeds_that_no_score_has(suite: Suite) -> None:
    again = {"kind": "tuned", "model": "net", "seeds": [101, 0], "trials": 2, "axes": [DEPTHS], "nuisance": [RATE]}
    suite = load("params.yaml", [f"ablations={{again: {json.dumps(again | {'pruning': False})}}}"])
    records = run_study(suite, "again")
    tuning = [r for r in records if r["phase"] == "tuning"]
    assert [r["number"] for r in records] == list(range(12))
    assert [r["seed"] for r in tuning] == [100] * 4 + [102] * 4, "the next that the study does not score"
    assert {r["split"] for r in tuning} == {"val"}
    final = records[8:]
    assert [(r["phase"], r["split"], r["seed"]) for r in final] == [("confirmation", "test", s) for s in (101, 0)] * 2
    for records_of_arm in (final[:2], final[2:]):
        means: dict[float, list[float]] = {}
        for r in tuning:
            if r["arm"] == records_of_arm[0]["arm"]:
                means.setdefault(r["tuned"]["train.lr"], []).append(r["scores"]["search.miou"])
        assert {len(scores) for scores in means.values()} == {2}
        assert {r["tuned"]["train.lr"] for r in records_of_arm} == {max(means, key=lambda lr: sum(means[lr]))}
    estimate, *_ = plan_studies(suite, ["again"], gpu_tflops=1.0).values()
    assert (estimate.points, estimate.trainings) == (2, len(records))


def test_weights_that_only_the_benchmark_starts_from_may_be_absent(suite: Suite) -> None:
    study = PARAMS["ablations"]["depth"] | {"overrides": {"train.init_from": None}}
    made = load("params.yaml", ["train.init_from=absent{seed}.pt", f"ablations={{depth: {json.dumps(study)}}}"])
    manifest = load_manifest(Path("data/prepared/tiny"), suite.data)
    plan = _Plan(made, "depth", manifest, points=(), paths=BenchmarkPaths("tiny"), fingerprint="", origin={})
    check_study(plan)
    assert plan.benchmark_trainings == set()
    assert plan.job("grid", 0, {"seed": 0}, None)
    assert len(dataclasses.replace(plan, suite=suite).benchmark_trainings) == 2


@pytest.mark.parametrize(
    ("study", "points", "jobs"),
    [
        ({"kind": "grid", "seeds": [0, 1]}, 3, 6),
        ({"kind": "search", "trials": 9, "batch": 4, "confirm": 1, "seeds": [0]}, 1, 4),
        ({"kind": "search", "trials": 9, "batch": 4, "confirm": 3, "seeds": [0, 1]}, 1, 8),
        ({"kind": "tuned", "trials": 9, "batch": 4, "confirm": 1, "seeds": [0, 1]}, 3, 12),
        ({"kind": "tuned", "trials": 2, "batch": 4, "confirm": 1, "seeds": [0]}, 3, 6),
        ({"kind": "tuned", "trials": 9, "batch": 4, "confirm": 3, "seeds": [0, 1, 2]}, 3, 18),
    ],
)
def test_the_most_jobs_at_a_time_are_those_of_the_widest_phase(study: dict[str, Any], points: int, jobs: int) -> None:
    nuisance = [RATE] if study["kind"] == "tuned" else []
    config = StudyConfig.model_validate({"model": "net", "axes": [DEPTHS], "nuisance": nuisance, **study})
    assert most_jobs(config, points) == jobs


def test_a_base_on_the_front_stays_the_reference(suite: Suite) -> None:
    def identity(setting: Any) -> int:
        return setting.get("model.unet_depth", 1)  # that of the base

    def trial(number: int, score: float, gmacs: float) -> Trial:
        values = {"search.miou": score, "cost.gmacs": gmacs}
        return Trial("s", number, {"model.unet_depth": number, "seed": 100}, "finished", None, {"values": values})

    trials = [trial(1, 0.1, 1.0), trial(2, 0.2, 2.0)]
    assert confirmed(suite.ablations["search"], "maximize", trials, identity) == [{}, {"model.unet_depth": 2}]


def test_the_front_has_no_dominated_point() -> None:
    points = [(0.5, -2.0), (0.6, -3.0), (0.4, -2.5), (0.3, -1.0), (0.6, -3.0), (0.5, -2.0), (0.55, -9.0)]
    assert pareto_front(points) == [1, 0, 3]
    assert pareto_front([]) == []
    assert spread([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert spread([1, 2], 3) == [1, 2]
    assert spread([1, 2, 3], 1) == [1]


# The commands, in processes of their own -----------------------------------------------------------------------------


def command(root: Path, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ablations", *arguments], cwd=root, env=environment(**env), stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_study_killed_while_it_trains_leaves_the_records_of_one_left_alone(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(suite, "tuned", workers=1)
    expected = files(Path(), "tuned")
    write_checkout(tmp_path, PARAMS)

    end = time.monotonic() + 120
    with command(tmp_path, "run", "tuned", "--workers", "1") as process:
        # The third training has just written a checkpoint and is on its way.
        while len(list(tmp_path.glob(".work/*/checkpoint.pt"))) < 3:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < end
            time.sleep(0.005)
        process.kill()
    assert not (tmp_path / "results").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sunets.tracking.live, "Tracker", TRACKER)
    run_study(suite, "tuned", workers=1)
    assert files(tmp_path, "tuned") == expected
    assert (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_a_second_driver_of_a_study_is_refused_with_one_line(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkout(tmp_path / "checkout", PARAMS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sunets.core.stage, "LOCK_SECONDS", 1.0)
    monkeypatch.setattr(sys, "argv", ["ablations", "run", "tuned", "--workers", "1"])
    with command(folder, "run", "tuned", "--workers", "1", "--set", "train.epochs=300", **NO_SERVER) as first:
        until(lambda: list(folder.glob(".work/*/checkpoint.pt")), 300)
        with pytest.raises(SystemExit) as second:
            commands.main()
        running = first.poll() is None
        first.kill()
    error = capsys.readouterr().err
    assert (second.value.code, running) == (2, True), error
    assert error == "error: ablate@tuned: already running in this checkout; wait for it, or stop it\n"


@pytest.mark.slow
@pytest.mark.parametrize("study", ["depth", "tuned", "search"])
def test_the_records_are_the_same_to_the_byte_with_1_2_and_4_workers(
    study: str, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(suite, study, workers=1)
    expected = files(Path(), study)
    for workers in (2, 4):
        monkeypatch.chdir(write_checkout(tmp_path / str(workers), PARAMS))
        run_study(suite, study, workers=workers)
        assert files(Path(), study) == expected
        assert len(list(Path(".work").glob("*/checkpoint.pt"))) > 2, "nothing was trained here"


@pytest.mark.slow
@pytest.mark.parametrize(  # without a shared directory: test_stages.py, and here where all is asked for
    "shared", [True, False] if os.environ.get("SUNETS_THOROUGH") else [True], ids=lambda s: f"shared_directory_{s}"
)
def test_a_cluster_that_loses_a_worker_in_mid_trial_leaves_the_same_bytes(
    shared: bool, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(suite, "tuned", workers=1)
    expected = files(Path(), "tuned")
    driver = write_checkout(tmp_path / "driver", PARAMS)
    folders = [driver if shared else write_checkout(tmp_path / f"worker{number}", PARAMS) for number in range(4)]
    with cluster(folders[0], 1, preload="sunets.stages.train") as made:
        for folder in folders[1:]:
            made.add_worker(folder)

        def kill() -> None:
            until(lambda: sum(len(list(folder.glob(".work/*/checkpoint.pt"))) for folder in {*folders}) >= 2, 300)
            made.workers[0].kill()

        monkeypatch.chdir(driver)
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", made.address)
        with ThreadPoolExecutor() as killer:
            killed = killer.submit(kill)
            run_study(suite, "tuned")
        killed.result()
    assert files(driver, "tuned") == expected
    assert bool(list(driver.glob(".work/*/checkpoint.pt"))) == shared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "width"], "error: width: no such study; there are depth, rates, tuned, search"),
        (["run", "depth", "--set", "ablations.depth.axes=[{path: model.unet_depth, values: [5]}]"],
         "error: ablations.depth: model.unet_depth=5: cannot be built sensibly for 32 x 32 pixels"),
        (["run", "depth", "--set", "ablations.depth.axes=[{path: model.depth, values: [5]}]"],
         "ablations.depth.axes: unknown key 'model.depth'"),
        (["run", "depth", "--set", "ablations.depth.axes=[{path: model.width, values: []}]"],
         "ablations.depth.axes.0: values: model.width: the axis is empty"),
        (["plan", "--set", "benchmark=other", "--set", "data.name=folder", "--set", "data.root=datasets"],
         "error: data/prepared/other/manifest.json: no such file; run python -m sunets prepare first"),
        (["report", "--set", "benchmark=other"], "records/ablations: no records"),
        (["list", "--params", "absent.yaml"], "error: absent.yaml: no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, suite: Suite, call: Callable[..., str]
) -> None:
    error = call(Path(), *arguments, code=2, app=commands.app)
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_plan_and_list_say_what_there_is(suite: Suite, call: Callable[..., str]) -> None:
    output = call(Path(), "plan", "depth", "tuned", "search", app=commands.app) + call(Path(), "list", app=commands.app)
    lines = [line.split("│")[1:-1] for line in output.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    planned = {line[0]: line[1:4] for line in cells if len(line) == 8}
    assert planned["depth"] == ["one_at_a_time", "2", "4"]
    assert planned["tuned"] == ["tuned", "2", "12"]
    assert planned["search"] == ["search", "3", "6"]
    assert planned["all"][2] == "22"
    assert any(line[0] == "search" and "model.unet_depth: 1, 2" in line[3] for line in cells if len(line) == 6)


def test_hours_here_are_those_of_the_measured_speed(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sunets.duration.macs_per_second", lambda config, work, data: work.train.macs / 2)
    manifest = load_manifest(Path("data/prepared/tiny"), suite.data)
    data = dataset_facts(suite.data, Path("data/prepared/tiny"))
    made = estimate(suite, "depth", manifest, data, Speed(data), gpu_tflops=1.0)
    # Two seconds for each of 16 images, three times, on two seeds and with two depths; scoring comes on top.
    assert 1.0 < made.hours_here * made.workers * 3600 / (2 * 16 * 3 * 2 * 2) < 1.3
    monkeypatch.setattr("ablations.plan.default_workers", lambda *_: 64)
    many = estimate(suite, "depth", manifest, data, Speed(data), gpu_tflops=1.0)
    assert many.workers == 4, "no more than its trainings"
    assert many.hours_here * 4 == pytest.approx(made.hours_here * made.workers)


def test_plan_needs_no_prepared_data_of_an_embedded_set(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, call: Callable[..., str], tmp_path: Path
) -> None:
    """As in a fresh clone, where data/ is absent; nothing is left behind."""
    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert re.search(r"depth +│ one_at_a_time +│ +2 │ +4 ", call(tmp_path, "plan", "depth", app=commands.app))
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.slow
def test_fresh_forgets_failures_and_keeps_trainings(suite: Suite) -> None:
    first = run_study(suite, "rates")
    kept = {path: path.stat().st_mtime_ns for path in Path(".work").glob("*/checkpoint.pt")}
    assert len(kept) >= len(first)
    assert run_study(suite, "rates", fresh=True) == first
    assert [e for e in QuietTracker.seen if e[0] == "log_epoch"], "the trials were not run again"
    for path, changed in kept.items():
        assert path.stat().st_mtime_ns == changed
    assert read_json("results/tiny/records/ablations/rates.json") == first

"""Searches in batches: the same trials with any number of workers, on a cluster, killed or not; and their storages.

Run as a program, this file is one driver: `python tests/test_ablations_search.py STORAGE FOLDER KIND WORKERS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pytest
from cluster import cluster, environment, until
from optuna.trial import TrialState

from ablations.search import Search, Setting, Trial, open_storage, repeat, search
from sunets.core.config import AxisConfig, ConfigError
from sunets.core.executor import SCHEDULER, Job, JobError, open_pool

HERE = Path(__file__).resolve()
THOROUGH = bool(os.environ.get("SUNETS_THOROUGH"))
"""Whether a cluster is killed for every kind of study; they differ in nothing that a cluster sees."""
RATE = AxisConfig(path="train.lr", low=1e-4, high=1.0, log=True)
BETAS = AxisConfig(path="train.betas", values=([0.9, 0.99], [0.9, 0.999]))
WIDTH = AxisConfig(path="width", values=(4, 8, 16))


def train(arguments: dict[str, Any], send: Any) -> dict[str, Any]:
    """A few sleeping epochs; the score is a function of the setting, as a training's is. Logs every start."""
    setting, until_epoch = arguments["setting"], arguments["until"] or 4
    with (Path(arguments["folder"]) / "log").open("a") as file:
        file.write(json.dumps([setting, arguments["until"], os.getpid()]) + "\n")
    if setting.get("fails") and not (Path(arguments["folder"]) / "room").exists():
        raise OSError(28, "No space left on device")
    x = float(setting.get("train.lr", 0.01))
    if x > 0.5:
        return {"status": "failed", "reason": "TrainingError: the loss became nan", "values": {}, "curve": []}
    noise = int(hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:4], 16) / 65536
    score = 1 - (math.log10(x) + 2) ** 2 / 4 + 0.1 * noise
    curve = []
    for epoch in range(1, until_epoch + 1):
        time.sleep(random.uniform(0, 2 * arguments["seconds"]))  # in no order
        curve.append([epoch, score * epoch / 4])
        send(epoch)
    values = dict.fromkeys(arguments["objectives"], curve[-1][1])
    if "cost.gmacs" in values:
        values["cost.gmacs"] = float(setting["width"])
    return {"status": "finished", "reason": None, "values": values, "curve": curve}


def make_job(folder: Path, objectives: Any, study: str, seconds: float = 0.02) -> Callable[..., Job]:
    def make(number: int, setting: Setting, until_epoch: int | None) -> Job:
        arguments = {"setting": setting, "until": until_epoch, "objectives": list(objectives)}
        paths: Any = {"folder": str(folder), "seconds": seconds}
        return Job(f"{study} trial {number}", "test_ablations_search:train", arguments, paths)

    return make


def specs(kind: str) -> list[Search]:
    common: dict[str, Any] = {"batch": 4, "seed": 0}
    if kind == "search":
        objectives: Any = {"search.miou": "maximize", "cost.gmacs": "minimize"}
        space = {axis.path: axis for axis in (WIDTH, RATE, BETAS)}
        return [Search("search", objectives, space, fixed={"seed": 100}, trials=14, **common)]
    return [
        Search(
            f"arm{depth}", {"search.miou": "maximize"}, {axis.path: axis for axis in (RATE, BETAS)},
            fixed={"depth": depth, "seed": 100}, trials=14, rungs=(1, 3), **common,
        )
        for depth in (1, 2)
    ]  # fmt: skip


def plans(kind: str, storage: Any, folder: Path) -> list[Any]:
    if kind in ("tuned", "search"):
        return [search(s, storage, make_job(folder, s.objectives, s.name), identity) for s in specs(kind)]
    cells = [{"depth": d, "seed": s} for d in (1, [2, 2, 1], None) for s in range(4)]
    # All twelve jobs may start at once: they last long enough for a test to kill the workers of some.
    job = make_job(folder, ["score.miou"], "grid", seconds=0.1)
    return repeat("grid", {"score.miou": "maximize"}, cells, storage, job)


def identity(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def run(address: str, folder: Path, kind: str, workers: int | None, name: str = "study") -> Any:
    """Run a study as plain values."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data / "manifest.json").write_text(json.dumps({"digest": "d"}))
    with (
        open_storage(address, name) as storage,
        open_pool(
            ["sunets.core.record"], data, "d",
            device="cpu", threads=1, jobs=12, results=folder / "results", workers=workers,
        ) as pool,
    ):  # fmt: skip
        done = pool.drive(plans(kind, storage, folder))
    return json.loads(json.dumps([[asdict(t) for t in ([part] if isinstance(part, Trial) else part)] for part in done]))


def starts(folder: Path) -> list[Any]:
    path = folder / "log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def program(address: str, folder: Path, kind: str, workers: int = 1, **env: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, str(HERE), address, str(folder), kind, str(workers)]
    return subprocess.Popen(
        arguments, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def told(address: str) -> Any:
    """What the storage says of every study: states, values, parameters."""
    with open_storage(address, "reader") as storage:
        return {
            s.study_name: [
                (t.state.name, t.values, t.params, t.intermediate_values, t.user_attrs)
                for t in storage.get_all_trials(s._study_id)
            ]
            for s in storage.get_all_studies()
        }


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SCHEDULER, raising=False)


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return str(tmp_path / "studies" / "a.journal")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Trials of a study on one worker, left alone, and what the storage says then."""
    made: dict[str, Any] = {}

    def of(kind: str) -> Any:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = run(str(folder / "journal"), folder, kind, 1), told(str(folder / "journal"))
        return made[kind]

    return of


@pytest.mark.parametrize("line", ["garbage", "5", "{}", '{"op_code": 99}', "\x00"])
def test_a_damaged_journal_is_named(line: str, journal: str, tmp_path: Path) -> None:
    with open_storage(journal, "a") as storage:
        optuna.create_study(storage=storage, study_name="s")
    lines = Path(journal).read_text(encoding="utf-8").splitlines()
    for damaged in ([line, *lines, ""], [*lines, line, ""]):
        Path(journal).write_text("\n".join(damaged), encoding="utf-8")
        with (
            pytest.raises(ValueError, match=r"a\.journal: damaged .*; delete it and run again"),
            open_storage(journal, "a"),
        ):
            pass
    Path(journal).unlink()
    with open_storage(journal, "a"):
        pass
    Path(journal).unlink()
    os.mkfifo(journal)
    with pytest.raises(ValueError, match=r"a\.journal: not a regular file"), open_storage(journal, "a"):
        pass


# The same trials -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("kind", ["grid", "tuned", "search"])
def test_any_number_of_workers_gives_the_same_trials(
    kind: str, workers: int, journal: str, tmp_path: Path, alone: Any
) -> None:
    expected, stored = alone(kind)
    assert run(journal, tmp_path, kind, workers) == expected
    assert told(journal) == stored
    assert len({start[2] for start in starts(tmp_path)}) == workers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grid", "tuned", "search"])
def test_a_driver_killed_again_and_again_leaves_what_one_left_alone_leaves(
    kind: str, journal: str, tmp_path: Path, alone: Any
) -> None:
    expected, stored = alone(kind)
    # While the first trials run, in the middle of some, before the first of a rerun.
    for number, (started, delay) in enumerate(((1, 0.01), (3, 0.1), (0, 0.4))):
        wanted = len(starts(tmp_path)) + started
        with program(journal, tmp_path, kind, 1 + number % 2) as process:
            until(lambda n=wanted: len(starts(tmp_path)) >= n)  # type: ignore[misc]
            time.sleep(delay)
            process.kill()
            assert process.stdout is not None
            assert not process.stdout.read(), "the study ended before it was killed; the test shows nothing"
    with program(journal, tmp_path, kind) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(output) == expected
    assert told(journal) == stored
    jobs = [json.dumps(start[:2]) for start in starts(tmp_path)]
    # One or two run at a kill, and each of two workers may begin another before it notices.
    assert len(set(jobs)) < len(jobs) <= len(set(jobs)) + 2 * 1 + 1 * 4, "only what was running at a kill runs again"


@pytest.mark.slow
def test_a_finished_study_is_not_run_again(journal: str, tmp_path: Path) -> None:
    first = run(journal, tmp_path, "tuned", 2)
    before = starts(tmp_path)
    assert run(journal, tmp_path, "tuned", 1) == first
    assert starts(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grid", "tuned", "search"] if THOROUGH else ["tuned"])
def test_a_cluster_that_loses_a_worker_and_then_its_scheduler_gives_the_same_trials(
    kind: str, journal: str, tmp_path: Path, alone: Any
) -> None:
    expected, stored = alone(kind)
    with cluster(tmp_path, 4, preload=__name__) as made:  # no job imports torch
        with program(journal, tmp_path, kind, 99, DASK_SCHEDULER_ADDRESS=made.address) as process:
            until(lambda: len({start[2] for start in starts(tmp_path)}) == 4)
            victim = starts(tmp_path)[-1][2]
            next(worker for worker in made.workers if worker.pid == victim).kill()
            seen = len(starts(tmp_path))
            until(lambda: len(starts(tmp_path)) > seen + 2)
            made.scheduler.kill()
            output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (2, "")
        assert errors.count("\n") == 1
        assert "the Dask scheduler is gone; start it and run again to go on" in errors
    with cluster(tmp_path, 4, preload=__name__) as made:  # no job imports torch
        with program(journal, tmp_path, kind, 99, DASK_SCHEDULER_ADDRESS=made.address) as process:
            before = len(starts(tmp_path))
            until(lambda: len(starts(tmp_path)) > before + 2)
            victim = starts(tmp_path)[-1][2]
            next(worker for worker in made.workers if worker.pid == victim).kill()
            output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert json.loads(output) == expected
    assert told(journal) == stored


@pytest.mark.slow
def test_arms_start_with_the_same_settings(alone: Any) -> None:
    arms, _ = alone("tuned")
    assert [t["setting"]["train.lr"] for t in arms[0][:4]] == [t["setting"]["train.lr"] for t in arms[1][:4]]
    assert isinstance(arms[0][0]["setting"]["train.betas"], list)
    assert {t["status"] for arm in arms for t in arm} == {"finished", "pruned", "failed"}


# What is drawn, and who goes on --------------------------------------------------------------------------------------


def direct(spec: Search, tmp_path: Path, identify: Any = identity) -> list[Trial]:
    with open_storage(str(tmp_path / f"{spec.name}.journal"), spec.name) as storage:
        plan, results = search(spec, storage, make_job(tmp_path, spec.objectives, spec.name), identify), None
        while True:
            try:
                jobs = plan.send(results)
            except StopIteration as stop:
                return stop.value
            results = [
                json.loads(json.dumps(train({**job.arguments, **job.paths, "seconds": 0}, lambda _: None)))
                for job in jobs
            ]


def test_trials_below_the_median_stop_at_the_rung(tmp_path: Path) -> None:
    (spec, _) = specs("tuned")
    trials = direct(spec, tmp_path)
    assert [t.number for t in trials] == list(range(spec.trials))
    for rung, above in ((1, 0), (3, 1)):
        reached: list[float] = []
        for start in range(0, spec.trials, spec.batch):
            batch = [t for t in trials[start : start + spec.batch] if len(t.result["curve"]) > above]
            scores = {t.number: t.result["curve"][rung - 1][1] for t in batch if len(t.result["curve"]) >= rung}
            reached += scores.values()
            median = sorted(reached)[len(reached) // 2] / 2 + sorted(reached)[(len(reached) - 1) // 2] / 2
            for trial in (trials[number] for number in scores):
                if len(trial.result["curve"]) == rung:
                    assert scores[trial.number] < median
                    assert trial.status == "pruned"
                    assert trial.reason == f"below the median of {len(reached)} trials after epoch {rung}"
                else:
                    assert scores[trial.number] >= median
    assert {len(t.result["curve"]) for t in trials if t.status == "pruned"} == {1, 3}


def test_no_setting_is_trained_twice(tmp_path: Path) -> None:
    axes = {"width": WIDTH, "train.lr": AxisConfig(path="train.lr", values=(0.001, 0.01, 0.1))}
    spec = Search("finite", {"search.miou": "maximize"}, axes, fixed={}, trials=11, batch=4, seed=0)
    trials = direct(spec, tmp_path)
    assert len({identity(t.setting) for t in trials[:9]}) == 9
    assert [t.duplicate_of is None for t in trials] == [True] * 9 + [False] * 2
    for copy in trials[9:]:
        original = trials[copy.duplicate_of or 0]
        assert (copy.status, copy.setting, copy.result) == (original.status, original.setting, original.result)
    assert len(starts(tmp_path)) == 9
    stored = told(str(tmp_path / "finite.journal"))["finite"]
    assert [row[4].get("duplicate_of") for row in stored] == [t.duplicate_of for t in trials]


def test_settings_that_make_the_same_training_are_one_and_impossible_ones_are_drawn_anew(tmp_path: Path) -> None:
    def same_for_wide(setting: Setting) -> str:
        if setting["width"] == 4:
            raise ConfigError("too narrow")
        return str(setting["train.betas"])

    axes = {"width": WIDTH, "train.betas": BETAS}
    spec = Search("same", {"search.miou": "maximize"}, axes, fixed={}, trials=4, batch=2, seed=0)
    trials = direct(spec, tmp_path, same_for_wide)
    assert all(t.setting["width"] != 4 for t in trials)
    assert [t.duplicate_of is None for t in trials] == [True, True, False, False]
    narrow = Search("narrow", {"search.miou": "maximize"}, {"width": WIDTH}, fixed={}, trials=1, batch=2, seed=0)
    with pytest.raises(ConfigError, match="too narrow"):
        direct(narrow, tmp_path, lambda setting: same_for_wide({"width": 4}))


ONE: Any = {"search.miou": "maximize"}
TWO: Any = {"search.miou": "maximize", "cost.gmacs": "minimize"}


def diverging(monkeypatch: pytest.MonkeyPatch, *optimizers: str) -> None:
    """Let trainings with some optimizers diverge in the second epoch; the others score by their rate."""

    def train(arguments: dict[str, Any], send: Any) -> dict[str, Any]:
        setting = arguments["setting"]
        if setting["optimizer"] in optimizers:
            return {"status": "failed", "reason": "the loss became nan", "values": {}, "curve": [[1, 0.99]]}
        values = {"search.miou": setting["train.lr"], "cost.gmacs": setting["train.lr"] ** 2}
        return {"status": "finished", "reason": None, "values": values, "curve": [[1, 0.1], [2, values["search.miou"]]]}

    monkeypatch.setattr(sys.modules[__name__], "train", train)


def optimizers(objectives: Any, tmp_path: Path, trials: int = 40) -> list[str]:
    """Search among four optimizers; returns those of the trials."""
    space = {"optimizer": AxisConfig(path="optimizer", values=("a", "b", "c", "d")), "train.lr": RATE}
    made = direct(Search("diverging", objectives, space, fixed={}, trials=trials, batch=4, seed=0), tmp_path)
    return [trial.setting["optimizer"] for trial in made]


@pytest.mark.parametrize("objectives", [ONE, TWO])
def test_the_sampler_learns_where_trainings_diverge(
    objectives: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, "b", "c")
    drawn = optimizers(objectives, tmp_path)
    blind = 12  # the first ten, and the rest of their batch
    assert sum(name in "bc" for name in drawn[:blind]) >= 4
    assert sum(name in "bc" for name in drawn[blind:]) <= 10, "half of 28 would be chance"
    stored = told(str(tmp_path / "diverging.journal"))["diverging"]
    assert [row[0] for row in stored] == ["FAIL" if name in "bc" else "COMPLETE" for name in drawn]


def test_where_all_have_diverged_draws_are_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverging(monkeypatch, "a", "b", "c", "d")
    drawn = optimizers(ONE, tmp_path)
    monkeypatch.setattr("ablations.search.startup_trials", lambda trials: trials)
    assert drawn == optimizers(ONE, tmp_path), "no place is taken as the best of those that diverged"


def test_the_machine_s_fault_is_no_result_and_is_repeated(journal: str, tmp_path: Path) -> None:
    def cells(storage: Any) -> list[Any]:
        settings = [{"fails": number == 1, "seed": number} for number in range(4)]
        return repeat("grid", {"score.miou": "maximize"}, settings, storage, make_job(tmp_path, ["score.miou"], "grid"))

    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text(json.dumps({"digest": "d"}))
    options: dict[str, Any] = {"device": "cpu", "threads": 1, "jobs": 4, "results": tmp_path / "results", "workers": 1}
    with open_storage(journal, "grid") as storage:
        with (
            pytest.raises(JobError, match=r"grid trial 1 on .* No space left on device"),
            open_pool(["sunets.core.record"], tmp_path / "data", "d", **options) as pool,
        ):
            pool.drive(cells(storage))
        (tmp_path / "room").touch()
        with open_pool(["sunets.core.record"], tmp_path / "data", "d", **options) as pool:
            trials = pool.drive(cells(storage))
    assert [t.status for t in trials] == ["finished"] * 4
    assert [start[0]["seed"] for start in starts(tmp_path)] == [0, 1, 1, 2, 3]
    assert [row[0] for row in told(journal)["grid"]] == ["COMPLETE"] * 4


# Storages ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_optuna_s_own_tools_read_the_studies(journal: str, tmp_path: Path) -> None:
    run(journal, tmp_path, "tuned", 2)
    run(journal, tmp_path, "search", 2)
    arm = optuna.load_study(study_name="arm1", storage=optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(journal)))  # fmt: skip
    assert arm.metric_names == ["search.miou"]
    assert {t.state for t in arm.trials} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert arm.best_value == max(t.value for t in arm.trials if t.state == TrialState.COMPLETE and t.value)
    assert all(t.intermediate_values for t in arm.trials if t.state == TrialState.PRUNED)
    both = optuna.load_study(study_name="search", storage=arm._storage)
    assert both.metric_names == ["search.miou", "cost.gmacs"]
    assert both.best_trials
    pictures = optuna.visualization.matplotlib
    for draw, study in (
        (pictures.plot_optimization_history, arm),
        (pictures.plot_intermediate_values, arm),
        (pictures.plot_pareto_front, both),
    ):
        draw(study)


@pytest.mark.slow
def test_a_storage_that_says_something_else_is_written_anew(journal: str, tmp_path: Path) -> None:
    expected = run(journal, tmp_path, "tuned", 2)
    right = told(journal)
    with open_storage(journal, "study") as storage:
        optuna.delete_study(study_name="arm1", storage=storage)
        other = optuna.create_study(study_name="arm1", storage=storage, direction="maximize")
        other.add_trial(optuna.trial.create_trial(value=0.5))
    assert told(journal) != right
    assert run(journal, tmp_path, "tuned", 1) == expected
    assert told(journal) == right


@pytest.mark.slow
def test_a_line_that_a_killed_driver_left_unfinished_is_cut(journal: str, tmp_path: Path) -> None:
    first = run(journal, tmp_path, "grid", 1)
    right = told(journal)
    with Path(journal).open("ab") as file:
        file.write(b'{"op_code": 4, "study')
    with open_storage(journal, "another") as storage:
        optuna.create_study(study_name="another", storage=storage)
    assert run(journal, tmp_path, "grid", 1) == first
    assert told(journal) == right | {"another": []}


@pytest.mark.slow
def test_a_second_driver_is_refused_with_one_line(journal: str, tmp_path: Path) -> None:
    refused_by(journal, tmp_path)


@pytest.mark.slow
def test_postgresql_holds_the_same_and_refuses_a_second_driver(postgres: str, tmp_path: Path, alone: Any) -> None:
    refused_by(postgres, tmp_path)
    for kind in ("tuned", "search"):
        expected, stored = alone(kind)
        assert run(postgres, tmp_path, kind, 2) == expected
        assert told(postgres).items() >= stored.items()


def refused_by(address: str, tmp_path: Path) -> None:
    with program(address, tmp_path, "tuned") as first:
        until(lambda: starts(tmp_path))
        with program(address, tmp_path, "tuned") as second:
            output, errors = second.communicate(timeout=60)
        assert (second.returncode, output) == (2, "")
        assert errors == "error: study: another driver runs this study; wait for it to end, or stop it\n"
        with open_storage(address, "another study"):
            pass
        first.kill()
    run(address, tmp_path, "tuned", 2)  # a killed driver keeps nobody out


@pytest.mark.slow
def test_a_proxy_holds_the_same(postgres: str, free_port: int, tmp_path: Path, alone: Any) -> None:
    pytest.importorskip("grpc")
    code = (
        "import optuna, warnings; warnings.simplefilter('ignore')\n"
        f"optuna.storages.run_grpc_proxy_server(optuna.storages.get_storage({postgres!r}), port={free_port})"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        assert run(f"grpc://localhost:{free_port}", tmp_path, "grid", 2) == alone("grid")[0]
    finally:
        server.kill()
        server.wait()
    assert told(postgres)["grid"] == alone("grid")[1]["grid"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("grpc://nohost", "grpc://host:port is expected"),
        ("sqlite:///a.db", "OPTUNA_STORAGE: sqlite://...: the path of a journal file, postgresql"),
        ("postgresql+nosuchdriver://user:secret@host/name", "cannot use postgresql"),
        ("nosuchdb://user:secret@host/name", "nosuchdb://...: the path of a journal file"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught, open_storage(address, "study"):
        pass
    assert "secret" not in str(caught.value)


def main(address: str, folder: str, kind: str, workers: str) -> None:
    try:
        results = run(address, Path(folder), kind, int(workers))
    except (JobError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])

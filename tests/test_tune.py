"""The tuning of recipes: the same trials with any number of workers, and every stage trains with what was chosen."""

from __future__ import annotations

import copy
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from optuna.storages import InMemoryStorage
from tiny import DEPTH_STUDY, NET, PLAIN, TINY, NoTracker, write_checkout

import ablations.tune
import sunets.tracking.live
from ablations.search import Trial, search
from ablations.study import run_study
from ablations.tune import _outcome, _Scores, _search, plan_tuning, tune_stage
from sunets.core.config import ConfigError, Suite, load, override
from sunets.core.finalists import FINALISTS, TUNING_SEEDS, tuning_trainings
from sunets.core.paths import BenchmarkPaths
from sunets.core.recipes import tuned
from sunets.core.record import RecordError, read_json, read_records, read_rows, write_json, write_rows
from sunets.core.stage import StageError
from sunets.data.manifest import load_manifest
from sunets.stages.evaluate import evaluate_stage
from sunets.stages.train import train_stage
from sunets.tracking.sync import sync
from sunets.training.fit import run_fingerprint
from sunets.verify import verify

ROOT = Path(__file__).resolve().parents[1]
RATE = {"path": "train.lr", "low": 0.001, "high": 0.1, "log": True}
RESIDUAL = {"path": "train.zero_init_residual", "values": [False, True]}
HEAD = {"path": "train.zero_init_head", "values": [False, True]}
PARAMS: dict[str, Any] = {
    **TINY,
    "models": {"net": NET, "plain": PLAIN | {"train": {"weight_decay": 0.0}}},
    "train": {"epochs": 2, "batch_size": 8},
    "tune": {
        "trials": 4, "batch": 2, "epochs": 1,
        "space": [RATE, {"path": "train.weight_decay", "low": 1e-4, "high": 0.1, "log": True}, RESIDUAL, HEAD],
    },
    "evaluate": {"batch_size": 4, "variants": {"plain": {}}},
    "cost": {"size": [32, 32], "receptive_field_seeds": 1, "receptive_field_images": 1},
    "ablations": {"depth": DEPTH_STUDY},
}  # fmt: skip
PATHS = BenchmarkPaths("tiny")


def write(tree: dict[str, Any], **tune: Any) -> Suite:
    """Write params.yaml with other values of section `tune`, and read it."""
    tree = copy.deepcopy(tree)
    tree["tune"] |= tune
    Path("params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load("params.yaml")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkout(tmp_path_factory.mktemp("prepared"), PARAMS)


@pytest.fixture(scope="module")
def baseline(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which both models are tuned, by one worker."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(prepared, root, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for key in ("net", "plain"):
            tune_stage(load(), key, workers=1)
    return root


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sunets.tracking.live, "Tracker", NoTracker)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)


@pytest.fixture
def empty(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with prepared data alone, and the current directory."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def checkout(baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tuned checkout, and the current directory."""
    shutil.copytree(baseline, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(root: Path = Path()) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / PATHS.records / "tune").iterdir())}


def count_trainings(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[str]:
    """Note each training of a trial from now on; one of them ends without a result."""
    made: list[str] = []
    real = ablations.tune.train_one

    def train_one(arguments: Any, send: Any) -> dict[str, Any]:
        made.append(arguments["training"])
        if len(made) - 1 == fail_at:
            raise MemoryError
        return real(arguments, send)

    monkeypatch.setattr(ablations.tune, "train_one", train_one)
    return made


# The trials ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_recipe_is_chosen_and_the_first_is_that_of_the_parameter_file(checkout: Path) -> None:
    (record,) = read_records(PATHS.records / "tune/net.json", "tune")
    rows = read_rows(PATHS.records / "tune/net.csv")
    assert [row["number"] for row in rows] == [0, 1, 2, 3]
    axes = ["train.lr", "train.weight_decay", "train.zero_init_residual", "train.zero_init_head"]
    assert [rows[0][axis] for axis in axes] == [0.003, 0.01, "False", "False"]
    assert len({tuple(row[axis] for axis in axes) for row in rows}) == 4
    starts = [(row["train.zero_init_residual"], row["train.zero_init_head"]) for row in rows]
    assert sorted(starts) == [("False", "False"), ("False", "True"), ("True", "False"), ("True", "True")]
    first = [row["first"] for row in rows]
    assert [row["best"] for row in rows] == [max(first[: n + 1]) for n in range(4)]
    finalists = [n for n, row in enumerate(rows) if row["val.miou"] is not None]
    assert finalists == sorted([0, *sorted(range(1, 4), key=lambda n: -first[n])[:2]])
    more = [name for name in rows[0] if name.startswith("seed ")]
    assert len(more) == TUNING_SEEDS - 1
    for n, row in enumerate(rows):
        seeds = [row["first"], *(row[name] for name in more)]
        assert (row["val.miou"] == statistics.fmean(seeds)) if n in finalists else seeds[1:] == [None, None]
    means = [row["val.miou"] or 0.0 for row in rows]
    assert record["trial"] == means.index(max(means))
    assert record["scores"] == {"val.miou": max(means)}
    assert [str(record["chosen"][axis]) for axis in axes] == [str(rows[record["trial"]][axis]) for axis in axes]
    params = record["params"]
    assert [params[f"tune.{k}"] for k in ("trials", "epochs", "batch", "seed")] == [4, 1, 2, 0]
    assert (params["train.epochs"], params["train.lr"], params["model.unet_depth"]) == (1, 0.003, [1, 1, 1])
    assert [axis["path"] for axis in record["space"]] == axes
    assert record["seed"] not in load().seeds
    history = read_rows(PATHS.records / "tune/net.history.csv")
    assert [(row["number"], row["epoch"]) for row in history] == [(n, 1) for n in range(4)]
    assert [row["val.miou"] for row in history] == first


@pytest.mark.slow
def test_a_choice_that_a_network_cannot_have_or_has_made_is_left_out(checkout: Path) -> None:
    (record,) = read_records(PATHS.records / "tune/plain.json", "tune")
    assert record["left_out"] == {
        "train.weight_decay": "fixed by models.plain.train",
        "train.zero_init_residual": "no residual branches",
    }
    assert record["chosen"].keys() == {"train.lr", "train.zero_init_head"}
    rows = read_rows(PATHS.records / "tune/plain.csv")
    assert len(rows) == 4
    assert not {"train.weight_decay", "train.zero_init_residual"} & rows[0].keys()


@pytest.mark.slow
def test_a_start_that_other_weights_replace_is_left_out(empty: Path) -> None:
    params = copy.deepcopy(PARAMS) | {"benchmark": "first"}
    suite = write(params, trials=0)
    shutil.copytree("data/prepared/tiny", "data/prepared/first")
    train_stage(override(suite, {"seeds": [0]}), "net", workers=1)
    start = "outputs/first/weights/net/seed0.pt"
    params = copy.deepcopy(PARAMS)
    params["models"]["net"] = params["models"]["net"] | {"train": {"init_from": start}}
    made = plan_tuning(write(params), "net", load_manifest(PATHS.data, load("params.yaml").data), PATHS)
    # The same classes: the head is loaded too.
    assert made.left_out == dict.fromkeys((RESIDUAL["path"], HEAD["path"]), "replaced by train.init_from")
    assert list(made.space) == ["train.lr", "train.weight_decay"]


@pytest.mark.slow
def test_two_workers_and_a_second_run_write_the_same_bytes(
    baseline: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("net", "plain"):
        tune_stage(load(), key, workers=2)
    assert files() == files(baseline)
    made = count_trainings(monkeypatch)
    tune_stage(load(), "net", workers=1)
    assert files() == files(baseline)
    assert not made


@pytest.mark.slow
def test_a_trial_that_ends_without_a_result_is_no_trial(
    baseline: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_trainings(monkeypatch, fail_at=2)
    with pytest.raises(Exception, match="memory"):
        tune_stage(load(), "net", workers=1)
    assert not (PATHS.records / "tune/net.json").exists()
    tune_stage(load(), "net", workers=1)
    assert len(made) == 5 + FINALISTS * (TUNING_SEEDS - 1)
    assert made[2] == made[3]
    assert {k: v for k, v in files(baseline).items() if k.startswith("net.")} == files()


def test_a_recipe_that_was_drawn_before_is_not_trained_again(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = write(PARAMS, space=[HEAD], trials=4)
    made = count_trainings(monkeypatch)
    record = tune_stage(suite, "net", workers=1)
    rows = read_rows(PATHS.records / "tune/net.csv")
    assert [row["duplicate_of"] is None for row in rows] == [True, True, False, False]
    assert [row["val.miou"] for row in rows[2:]] == [rows[row["duplicate_of"]]["val.miou"] for row in rows[2:]]
    assert len(made) == 2 * TUNING_SEEDS
    assert record["trial"] in (0, 1)


@pytest.mark.slow
def test_a_diverged_trial_is_the_worst_and_all_of_them_are_an_error(empty: Path) -> None:
    tree = copy.deepcopy(PARAMS)
    tree["train"]["lr"] = 1e30
    suite = write(tree, space=[{"path": "train.lr", "values": [1e30, 0.003]}], trials=2)
    record = tune_stage(suite, "net", workers=1)
    rows = read_rows(PATHS.records / "tune/net.csv")
    assert [(row["status"], row["val.miou"] is None, row["best"] is None) for row in rows] == [
        ("failed", True, True), ("finished", False, False),
    ]  # fmt: skip
    assert (record["trial"], record["chosen"]) == (1, {"train.lr": 0.003})

    suite = write(tree, space=[{"path": "train.lr", "values": [1e30, 1e29]}], trials=2)
    with pytest.raises(StageError, match=r"models\.net: not tuned: all 2 trials diverged"):
        tune_stage(suite, "net", workers=1)
    assert read_records(PATHS.records / "tune/net.json")[0]["status"] == "failed"
    with pytest.raises(ConfigError, match=r"models\.net: not tuned: all 2 trials diverged"):
        train_stage(suite, "net", workers=1)


def planned(train: dict[str, Any] | None = None, **tune: Any) -> Any:
    """Plan the tuning of `net` with other values of sections `train` and `tune`."""
    suite = write(PARAMS | {"train": PARAMS["train"] | (train or {})}, **tune)
    return plan_tuning(suite, "net", load_manifest(PATHS.data, suite.data), PATHS)


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ({"path": "train.micro_batch_size", "values": [None, 1]}, "with one image per forward pass, a BatchNorm of"),
        ({"path": "train.class_weights", "values": [None, [1, 2]]}, "5 values, one per class, not 2"),
        ({"path": "train.augment.scale", "values": [None, [0.5, 2]]}, "needs train.augment.crop"),
    ],
)
def test_a_value_that_cannot_be_trained_is_refused_before_the_first_trial(
    empty: Path, axis: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(space=[RATE, axis])
    message = str(caught.value)
    assert message.startswith(f"tune.space: {axis['path']}={axis['values'][1]}: models.net: ")
    assert words in message
    assert "\n" not in message


def test_a_combination_that_cannot_be_trained_is_drawn_anew(empty: Path) -> None:
    crops = {"path": "train.augment.crop", "values": [[64, 64], [32, 32]]}
    images = {"path": "train.micro_batch_size", "values": [None, 1]}
    # One image of 32 x 32 pixels leaves a BatchNorm a single value per channel.
    tuning = planned({"augment": {"crop": [64, 64]}}, space=[crops, images], trials=4, batch=4)
    jobs = next(search(_search(tuning, "s"), InMemoryStorage(), tuning.job, tuning.identity))
    recipes = [job.arguments["config"]["train"] for job in jobs]
    tried = {(recipe["augment"]["crop"][0], recipe["micro_batch_size"]) for recipe in recipes}
    assert tried == {(64, None), (64, 1), (32, None)}


@pytest.mark.parametrize("trials", [4, 3])
def test_combinations_go_first_if_all_fit_and_are_drawn_otherwise(trials: int, empty: Path) -> None:
    first = _search(planned(space=[RATE, RESIDUAL, HEAD], trials=trials), "s").first
    assert first[0] == {RATE["path"]: 0.003, RESIDUAL["path"]: False, HEAD["path"]: False}
    assert len(first) == (4 if trials == 4 else 1)


def tuning_trial(number: int, score: float | None, rate: float, copy: int | None = None) -> Trial:
    """Make a trial of a tuning; without a score it diverged."""
    status: Any = "failed" if score is None else "finished"
    result = {"values": {} if score is None else {"val.miou": score}, "environment": {}}
    return Trial("s", number, {"train.lr": rate}, status, None, result, copy)


def test_the_first_and_the_best_two_others_go_to_more_seeds_and_their_mean_decides(empty: Path) -> None:
    suite = load()
    tuning = plan_tuning(suite, "net", load_manifest(PATHS.data, suite.data), PATHS)
    assert len({*tuning.seeds, *suite.seeds}) == TUNING_SEEDS + len(suite.seeds)
    assert tuning.seeds[0] == tuning.base.seed
    scores = enumerate((0.1, 0.7, None, 0.5, 0.7, 0.6))
    trials = [*(tuning_trial(n, score, n / 10) for n, score in scores), tuning_trial(6, 0.7, 0.1, copy=1)]
    finalists = tuning.finalists(trials)
    assert [trial.number for trial in finalists] == [0, 1, 4], "of equal recipes one"
    assert tuning.finalists(trials[:1]) == tuning.finalists(trials[1:3]) == [], "one recipe has no rival"
    assert [trial.number for trial in tuning.finalists(trials[2:])] == [3, 4, 5], "the first has diverged"

    def chosen(*again: float | None) -> tuple[int | None, Any]:
        more = [tuning_trial(n, score, 0.0) for n, score in enumerate(again)]
        outcome = _outcome(tuning, trials, _Scores(tuning, finalists, more))
        return outcome["trial"], outcome["scores"]["val.miou"]

    assert chosen(0.9, 0.9, 0.1, 0.1, 0.5, 0.5) == (0, pytest.approx(1.9 / 3))
    assert chosen(0.1, 0.1, 0.4, 0.4, 0.4, 0.4) == (1, pytest.approx(0.5)), "of equal means the first"
    assert chosen(0.1, 0.1, 0.9, None, 0.2, 0.2) == (4, pytest.approx(1.1 / 3)), "diverging on a seed is worse"


# What uses them ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_stage_trains_scores_and_checks_the_chosen_recipe(checkout: Path, baseline: Path) -> None:
    (record,) = read_records(PATHS.records / "tune/net.json")
    chosen = {"train.lr": 0.0123, "train.weight_decay": 0.002, "train.zero_init_residual": True}
    record["chosen"] |= chosen  # none of the first trial's values
    write_json(PATHS.records / "tune/net.json", [record])
    suite = load()
    with pytest.raises(RecordError, match=r"net\.json: train\.lr is not that of the best trial in net\.csv"):
        train_stage(suite, "net", workers=1)
    table = PATHS.records / "tune/net.csv"
    table.rename("net.csv")
    effort = {"tune.trials": 4, "tune.epochs": 1, "tune.seed": 0}
    trained = train_stage(suite, "net", workers=1)
    scored = evaluate_stage(suite, "net", workers=1)
    (trial,) = run_study(suite, "depth", workers=1)
    for made in (*trained, *scored, trial):
        assert {k: made["params"][k] for k in (chosen | effort)} == chosen | effort
        assert made["params"]["train.epochs"] == 2
    trials = 2 * tuning_trainings(4)
    assert len(list(Path(".work").glob("*/weights.pt"))) == trials + 2, "the study's training is that of the benchmark"
    config, manifest = tuned(suite, PATHS, ["net"]).config("net", 0), load_manifest(PATHS.data, suite.data)
    assert run_fingerprint(override(config, {"tune.trials": 9}), manifest) == run_fingerprint(config, manifest)
    plain = tuned(suite, PATHS, ["plain"]).config("plain", 0)
    assert plain.train.weight_decay == 0
    assert suite.config("net", 0).tune.model_dump() == {"trials": 0, "epochs": None, "seed": None}

    Path("net.csv").rename(table)
    (fault,) = faults(suite)
    assert "train.lr is not that of the best trial in net.csv" in fault, "the trainings are those of the record"
    shutil.copy(baseline / PATHS.records / "tune/net.json", PATHS.records / "tune")
    (fault,) = faults(suite)
    assert "train.lr is 0.0123 in the record and " in fault
    assert "in the tuned recipe; run its stage again" in fault


def faults(suite: Suite) -> list[str]:
    return [fault for fault in verify(suite).faults if "records/" in fault]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"train.lr": 0.003', '"train.lr": 0.004', "config_hash"),
        ('"trial": ', '"trial": 1', "number is not that of the best trial in plain.csv"),
        ('"val.miou": 0', '"val.miou": 1', "val.miou is not that of the best trial in plain.csv"),
    ],
)
def test_an_edited_recipe_is_found(checkout: Path, old: str, new: str, words: str) -> None:
    suite, path = load(), PATHS.records / "tune/plain.json"
    assert not faults(suite)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    (fault,) = faults(suite)
    assert words in fault


def test_a_missing_or_stale_recipe_is_one_clear_error(checkout: Path) -> None:
    def refused(suite: Suite, words: str, stage: Callable[..., Any] = train_stage, name: str = "net") -> None:
        with pytest.raises(ConfigError, match=words) as caught:
            stage(suite, name, workers=1)
        assert "run `python -m ablations tune net` first" in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(write(PARAMS, trials=5), r"tuned with other parameters: tune\.trials 4 / 5;")
    refused(write(PARAMS, space=[RATE]), r"tuned with other parameters: tune\.space;")
    tree = copy.deepcopy(PARAMS)
    tree["train"]["clip_grad_norm"] = 1.0
    refused(write(tree), r"train\.clip_grad_norm None / 1\.0;")
    tree = copy.deepcopy(PARAMS)
    tree["models"]["net"]["width"] = 6
    refused(write(tree), r"other parameters: of models\.net;")
    tree = copy.deepcopy(PARAMS)
    tree["evaluate"]["variants"]["plain"] = {"flip": True}
    tree["models"]["plain"]["width"] = 6
    tuned(write(tree), PATHS, ["net"])  # neither has a part in it
    with pytest.raises(ConfigError, match="tuned on other data"):
        tuned(write(PARAMS), PATHS, ["net"], "0" * 16)
    (PATHS.records / "tune/net.json").unlink()
    refused(load(), "its recipe is not tuned")
    refused(load(), "its recipe is not tuned", run_study, "depth")
    (PATHS.records / "train").mkdir()
    write_json(PATHS.records / "train/net.json", [])
    refused(load(), "its recipe is not tuned", evaluate_stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"net": {"train": {"lr": 0.001}}}, "tuned before train.lr was fixed by models.net.train"),
        ({"plain": {"train": None}}, "tuned before train.weight_decay was free"),
    ],
)
def test_a_recipe_of_other_choices_is_refused(checkout: Path, models: dict[str, Any], words: str) -> None:
    """The value that was fixed may be the one of the first trial, whose fingerprint then is the same."""
    params = copy.deepcopy(PARAMS)
    ((key, change),) = models.items()
    params["train"] |= {"lr": 0.001, "weight_decay": 0.01}
    params["models"]["plain"]["train"] = {"weight_decay": 0.01}
    (checkout / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    tune_stage(load("params.yaml"), key, workers=1)
    params["models"][key] = {k: v for k, v in (params["models"][key] | change).items() if v is not None}
    (checkout / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    with pytest.raises(ConfigError, match=words):
        tuned(load("params.yaml"), PATHS, [key])


def test_without_trials_nothing_is_tried_and_nothing_heavy_is_imported(empty: Path) -> None:
    write(PARAMS, trials=0)
    before = {path.relative_to(empty) for path in empty.rglob("*") if path.is_file()}
    code = (
        "import sys; from typer.testing import CliRunner; from ablations.__main__ import app;"
        "done = CliRunner().invoke(app, ['tune', 'net']); assert done.exit_code == 0, done.output;"
        "assert not {'torch', 'optuna', 'mlflow', 'pandas'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)}, timeout=60)
    assert read_json(PATHS.records / "tune/net.json") == []
    assert read_rows(PATHS.records / "tune/net.csv") == []
    written = {path.relative_to(empty) for path in empty.rglob("*") if path.is_file()} - before
    assert {path.parent for path in written} == {PATHS.records / "tune"}
    assert tuned(load(), PATHS, ["net"]).config("net", 0).train.lr == 0.003


@pytest.mark.slow
def test_mlflow_shows_a_tuning_with_its_trials_and_a_second_sync_adds_nothing(baseline: Path, db: Path) -> None:
    shutil.copytree(baseline / "results", "results")
    (record,) = read_records(PATHS.records / "tune/net.json")
    rows = read_rows(PATHS.records / "tune/net.csv")
    (PATHS.results / "figures").mkdir()
    (PATHS.results / "figures/tuning.png").touch()
    done = sync(Path("results"))
    assert (done.created, done.updated) == (2 * (1 + 4) + 1, 0)  # the report too
    client = MlflowClient(f"sqlite:///{db}")
    experiment = client.get_experiment_by_name("tiny/tuning")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs["tuning of net"]
    for run in runs.values():
        assert [file.path for file in client.list_artifacts(run.info.run_id, "figures")] == ["figures/tuning.png"]
    assert parent.data.params["train.lr"] == str(record["chosen"]["train.lr"])
    assert runs["tuning of plain"].data.tags["left_out.train.zero_init_residual"] == "no residual branches"
    curve = client.get_metric_history(parent.info.run_id, "curves/val.miou.best")
    assert [(point.step, point.value) for point in curve] == [(row["number"], row["best"]) for row in rows]
    trials = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(float(run.data.params["train.lr"]) for run in trials) == sorted(row["train.lr"] for row in rows)
    assert {run.data.metrics["summary/val.miou.final"] for run in trials} == {row["first"] for row in rows}
    means = [run.data.metrics["summary/val.miou.mean"] for run in trials if "summary/val.miou.mean" in run.data.metrics]
    assert sorted(means) == sorted(row["val.miou"] for row in rows if row["val.miou"] is not None)
    assert len(means) == FINALISTS
    assert parent.data.metrics["summary/val.miou.mean"] == record["scores"]["val.miou"]
    assert "train.epochs" not in trials[0].data.params
    again = sync(Path("results"))
    assert (again.created, again.updated) == (0, 0)
    rows[3]["train.lr"] = 0.05  # another machine may draw otherwise from its own scores
    write_rows(PATHS.records / "tune/net.csv", rows)
    assert sync(Path("results")).created == 1
    current = client.search_runs([experiment.experiment_id], "tags.`sunets.current` = 'true'")
    assert [run.data.params["train.lr"] for run in current if run.data.params.get("train.lr") == "0.05"] == ["0.05"]
    assert len(current) == 2 * (1 + 4)


# The parameter file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"space": []}, "space: at least one axis"),
        ({"space": [RATE, RATE]}, "space: a path occurs twice"),
        ({"space": [{"path": "train.epochs", "values": [2, 3]}]}, "not train.epochs"),
        ({"space": [{"path": "model.width", "values": [2, 3]}]}, "not model.width"),
        ({"space": [{"path": "train.lrr", "values": [2, 3]}]}, "unknown key 'train.lrr'"),
        ({"space": [{"path": "train.augment", "values": [{"flip": True}]}]}, "train.augment: a section"),
        ({"space": [{"path": "train.lr", "values": [0.003, -1]}]}, "train.lr: Input should be greater than 0"),
        ({"space": [{"path": "train.lr", "values": [0.1, 0.2]}]}, "train.lr: 0.003, with which models.net is tried"),
        ({"space": [RATE | {"low": 0.01}]}, "train.lr: 0.003, with which models.net is tried first, lies outside"),
        ({"space": [RATE | {"high": 0.002}]}, "train.lr: 0.003, with which models.net is tried first, lies outside"),
        ({"epochs": 0}, "tune.epochs"),
        ({"trials": -1}, "tune.trials"),
    ],
)
def test_nonsense_is_refused_when_the_file_is_read(
    tune: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        write(PARAMS, **tune)
    assert words in str(caught.value)


def test_a_value_at_the_end_of_the_space_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(PARAMS, space=[RATE | {"low": 0.003}])
    write(PARAMS, space=[RATE | {"high": 0.003}])
    write(PARAMS, space=[{"path": "train.bn_momentum", "values": [None, 0.1]}])


def test_a_trial_of_less_than_the_warm_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = copy.deepcopy(PARAMS)
    tree["train"]["warmup_epochs"] = 1.5
    with pytest.raises(ConfigError, match=r"tune\.epochs.*warmup_epochs: less than epochs"):
        write(tree)

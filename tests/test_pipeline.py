"""The pipeline as a user meets it: `dvc repro` in a fresh clone, killed, repeated, edited, and fed nonsense."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from checkout import ENV, clone, ran, run, start
from mlflow import MlflowClient

from sunets.core.record import read_json

pytestmark = pytest.mark.slow
KILLS, KILL_SEED = int(os.environ.get("SUNETS_KILLS", 1)), int(os.environ.get("SUNETS_KILL_SEED", 0))
"""How often `dvc repro` is killed at drawn moments before it may end; SUNETS_KILLS=20 for a thorough run."""
REPORTS = ("report", "ablation_report")
"""Stages that follow an edit of a model: both show the labels of all models."""


def _kill_at(process: subprocess.Popen[str], pattern: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern, line):
            process.send_signal(signal.SIGKILL)
            break
    else:
        pytest.fail(f"{pattern} was not printed")
    process.stdout.close()
    process.wait()


def _kill_after(process: subprocess.Popen[str], seconds: float, whom: str) -> None:
    """Kill `dvc` alone, or its youngest descendant alone, if it has not ended by then; wait for its end."""
    assert process.stdout is not None
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid).children(recursive=True)
        victim = max(family, key=lambda p: p.create_time()) if whom == "descendant" and family else process
        victim.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()


@pytest.fixture(scope="module")
def clones(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished clones: one left alone, one whose `dvc repro` was killed again and again.

    In training, and at moments drawn from KILL_SEED: in turns `dvc` alone, whose stage must not go on
    without it, and a process below it.
    """
    killed = clone(tmp_path_factory.mktemp("killed"))
    _kill_at(start(killed, "dvc", "repro"), r"seed \d epoch 1/")
    moments = random.Random(KILL_SEED)
    for number in range(KILLS):
        seconds, whom = moments.uniform(2, 25), ("dvc", "descendant")[number % 2]
        print(f"kill {number}: {whom} after {seconds:.1f} s")  # shown where a test fails
        _kill_after(start(killed, "dvc", "repro"), seconds, whom)
        locks = killed / ".dvc" / "tmp" / "rwlock"
        if locks.exists() and not locks.stat().st_size:  # as `make repro` does
            locks.unlink()
    run(killed, "dvc", "repro")
    return finished, killed


def test_killed_pipeline_gives_the_same_tables(clones: tuple[Path, Path]) -> None:
    alone, killed = clones
    exact = [
        path.relative_to(alone)
        for pattern in ("results/smoke/tables/*", "results/smoke/ablations/*", "results/smoke/records/confusion/*")
        for path in alone.glob(pattern)
        if not path.name.startswith(("speed", "training_time"))
    ]
    assert len(exact) > 15
    for path in exact:
        assert (alone / path).read_bytes() == (killed / path).read_bytes(), path


def test_weights_of_the_killed_pipeline_are_the_same(clones: tuple[Path, Path]) -> None:
    alone, killed = clones
    weights = sorted(path.relative_to(alone) for path in alone.glob("outputs/smoke/weights/*/*.pt"))
    assert len(weights) == 4
    for path in weights:
        assert (alone / path).read_bytes() == (killed / path).read_bytes(), path


def test_nothing_to_do_runs_nothing(clones: tuple[Path, Path]) -> None:
    assert not ran(run(clones[0], "dvc", "repro"))


def test_page_shows_what_was_made(clones: tuple[Path, Path]) -> None:
    folder = clones[0] / "results" / "smoke"
    page = (folder / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert any(link.endswith(".png") for link in links)
    assert [link for link in links if "://" not in link and not (folder / link).exists()] == []


def test_every_number_is_explained(clones: tuple[Path, Path]) -> None:
    output = run(clones[0], "sunets", "explain", "accuracy", "sunet_tiny", "score.miou")
    records = read_json(clones[0] / "results" / "smoke" / "records" / "evaluate" / "sunet_tiny.json")
    values = {r["seed"]: r["scores"]["score.miou"] for r in records if r["variant"] == "single_scale"}
    assert values.keys() == {0, 1}
    for seed, value in values.items():
        assert re.search(rf"(?m)^.*seed {seed}\b.*score\.miou = {re.escape(str(value))}$", output)
    for commit in {r["provenance"]["git_commit"] for r in records}:
        assert f"git commit: {commit}" in output


def test_tracked_runs_are_not_doubled(clones: tuple[Path, Path]) -> None:
    client = MlflowClient(f"sqlite:///{clones[1] / 'mlflow.db'}")

    def count() -> dict[str, int]:
        found = client.search_experiments()
        return {experiment.name: len(client.search_runs([experiment.experiment_id])) for experiment in found}

    before = count()
    assert before["smoke"]
    run(clones[1], "sunets", "mlflow-sync")
    assert count() == before


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("sunets/report/figures.py", '"""Figures', '"""The figures', {*REPORTS}),
        (
            "params.yaml",
            "width: 8",
            "width: 9",
            {*(f"{stage}@plain_conv_small" for stage in ("tune", "train", "evaluate", "cost")), "speed", *REPORTS},
        ),
        ("params.yaml", "values: [1, 2]", "values: [1, 3]", {"ablate@unet_depth", *REPORTS}),
    ],
    ids=["plot", "model", "study"],
)
def test_only_what_depends_on_an_edit_runs_again(
    clones: tuple[Path, Path], file: str, old: str, new: str, expected: set[str]
) -> None:
    path = clones[0] / file
    before = path.read_text()
    assert old in before
    try:
        path.write_text(before.replace(old, new) if file != "params.yaml" else _edited(before, old, new))
        assert set(ran(run(clones[0], "dvc", "repro", "--dry"))) == expected
    finally:
        path.write_text(before)


def _edited(params: str, old: str, new: str) -> str:
    """The last occurrence replaced: the model compared last, and the last value of the study's axis."""
    head, _, tail = params.rpartition(old)
    return head + new + tail


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.lrr=0.1"], ["train.lrr", "unknown key"]),
        (["train.lr=-1"], ["train.lr", "greater than 0"]),
        (["data.name=camvid"], ["root", "camvid"]),
        (["data.name=camvid", "data.root=does/not/exist"], ["does/not/exist"]),
        (["models.sunet_tiny.unet_depth=9", "tune.trials=0"], ["unet_depth"]),
    ],
)
def test_nonsense_is_one_clear_error(
    clones: tuple[Path, Path], call: Callable[..., str], settings: list[str], words: list[str]
) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    command = "train" if "unet_depth" in settings[0] else "prepare"
    output = call(clones[0], command, *(["sunet_tiny"] if command == "train" else []), *options, code=2)
    assert "Traceback" not in output
    assert [word for word in words if word not in output] == []
    assert len(output.strip().splitlines()) <= 3


def test_dvc_shows_scores_curves_and_changed_parameters(clones: tuple[Path, Path]) -> None:
    root = clones[0]
    shown = run(root, "dvc", "metrics", "show", "--json")
    assert len(re.findall("miou_percent|params_m|gmacs", shown)) == 6
    run(root, "dvc", "plots", "show", "-o", "dvc_plots")
    page = (root / "dvc_plots" / "index.html").read_text()
    assert [title for title in ("Training loss", "Validation score (%)", "Confusion") if title not in page] == []
    assert [*(root / "dvc_plots").rglob("*accuracy.png")]  # its path is part of its name
    assert "weights" in run(root, "dvc", "ls", ".", "outputs/smoke")
    path = root / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("title: Smoke test", "title: Another title"))
    try:
        assert "Another title" in run(root, "dvc", "params", "diff")
    finally:
        path.write_text(before)


def test_experiment_with_one_changed_parameter_runs_what_depends_on_it(clones: tuple[Path, Path]) -> None:
    root = clones[1]
    before = (root / "params.yaml").read_text()
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["add", "-A"], [*author, "commit", "-qm", "results"]):
        subprocess.run(["git", *command], cwd=root, env=ENV, check=True)
    try:
        output = run(root, "dvc", "exp", "run", "--name", "titled", "-S", "report.title=Titled")
        assert ran(output) == [*REPORTS]
        assert (root / "results" / "smoke" / "README.md").read_text().startswith("# Titled")
        assert "titled" in run(root, "dvc", "exp", "show", "--csv")
    finally:
        (root / "params.yaml").write_text(before)


def test_outputs_come_back_from_a_remote(clones: tuple[Path, Path], tmp_path: Path) -> None:
    root = clones[0]
    run(root, "dvc", "remote", "add", "--default", "--local", "store", str(tmp_path / "store"))
    run(root, "dvc", "push")
    for folder in ("data", "outputs", ".dvc/cache"):
        shutil.rmtree(root / folder)
    run(root, "dvc", "pull")
    assert (root / "outputs" / "smoke" / "weights" / "sunet_tiny" / "seed0.pt").is_file()
    assert not ran(run(root, "dvc", "repro"))
    assert run(root, "dvc", "status").strip() == "Data and pipelines are up to date."

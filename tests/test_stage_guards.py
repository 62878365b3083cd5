"""What the stages share: one at a time, guards against changes meanwhile, and failed trainings that are told."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from checkout import replace_once
from tiny import DEPTH_STUDY, NET, PLAIN, TINY, NoTracker, write_checkout

import ablations.report.page
import ablations.study
import sunets.report.build
import sunets.stages.cost
import sunets.stages.prepare
import sunets.stages.train
import sunets.tracking.live
from sunets.core.config import Suite, load
from sunets.core.paths import BenchmarkPaths
from sunets.core.record import write_json
from sunets.core.stage import StageError, stage
from sunets.data.preparation import prepare
from sunets.models.tensor_file import CheckpointError, atomic_save
from sunets.stages.evaluate import evaluate_stage
from sunets.stages.train import train_stage

ROOT = Path(__file__).resolve().parents[1]
PARAMS: dict[str, Any] = {
    **TINY,
    "models": {"net": NET, "plain": PLAIN},
    "train": {"epochs": 1, "batch_size": 8},
    "evaluate": {"batch_size": 4, "variants": {"whole": {}}, "num_qualitative": 1},
    "cost": {"size": [32, 32], "repeats": 3, "receptive_field_seeds": 1, "receptive_field_images": 1},
    "ablations": {"depth": DEPTH_STUDY},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkout(tmp_path_factory.mktemp("checkout"), PARAMS)


@pytest.fixture
def suite(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Suite]:
    """Parameters and prepared data in the working directory, which keep their content."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(sunets.tracking.live, "Tracker", NoTracker)
    kept = {path: path.read_bytes() for path in (made / "params.yaml", made / "data/prepared/tiny/manifest.json")}
    yield load("params.yaml")
    for path, content in kept.items():
        path.write_bytes(content)


def test_stage_runs_once_at_a_time(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sunets.core.stage.LOCK_SECONDS", 0.1)
    layout = BenchmarkPaths("smoke", tmp_path)
    with (
        stage("train@x", layout, "sunets.core.config", suite=suite, params=()),
        pytest.raises(StageError, match="already running"),
        stage("train@x", layout, "sunets.core.config", suite=suite, params=()),
    ):
        pass


def test_edited_source_is_noticed(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter(["before", "after"])
    monkeypatch.setattr("sunets.core.stage.code_hash", lambda *_: next(hashes))
    with (
        pytest.raises(StageError, match="its code changed"),
        stage("train@x", BenchmarkPaths("smoke", tmp_path), "sunets.core.config", suite=suite, params=()),
    ):
        pass


def test_source_edited_after_its_import_is_noticed(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sunets.core.stage.STARTED", 0.0)
    with (
        pytest.raises(StageError, match="its code was edited while it started"),
        stage("train@x", BenchmarkPaths("smoke", tmp_path), "sunets.core.config", suite=suite, params=()),
    ):
        pass


def test_torchrun_is_for_trainings_alone(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(StageError, match=r"tune@x: torchrun is for `sunets train` alone"),
        stage("tune@x", BenchmarkPaths("smoke", tmp_path), "sunets.core.config", suite=suite, params=()),
    ):
        pass


def test_timing_a_network_needs_no_published_weights(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Any] = []
    get_model = torchvision.models.get_model

    def without_download(name: str, weights: Any = None, **options: Any) -> Any:
        wanted.append(weights)
        return get_model(name, **options)

    monkeypatch.setattr("torchvision.models.get_model", without_download)
    monkeypatch.setattr(sunets.stages.cost, "measure_speed", lambda models, **_: {key: {} for key in models})
    named = load("params.yaml", ["models.plain={name: dilated_resnet18, weights: IMAGENET1K_V1}"])
    assert [r["model"] for r in sunets.stages.cost.speed_stage(named)] == ["net", "plain"]
    assert set(wanted) == {None}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("params.yaml", "epochs: 1", "epochs: 2", r"train@net: train in the parameter file changed while it ran"),
        ("params.yaml", "width: 4", "width: 5", r"models\.net in the parameter file changed"),
        ("params.yaml", "seeds:", "seeds: [", r"the parameter file changed while it ran.*params.yaml"),
        ("data/prepared/tiny/manifest.json", '"digest": "', '"digest": "0', r"the prepared data \(\S+\) changed"),
    ],
)
def test_what_changes_while_a_stage_runs_is_not_credited_to_it(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, message: str
) -> None:
    fit = sunets.stages.train.fit

    def edited(*arguments: Any, **options: Any) -> Any:
        if new not in Path(file).read_text():
            replace_once(Path(file), old, new)
        return fit(*arguments, **options)

    monkeypatch.setattr(sunets.stages.train, "fit", edited)
    monkeypatch.setattr("sunets.core.executor._stored", lambda *_: None)
    one = load("params.yaml", ["seeds=[0]"])
    with pytest.raises(StageError, match=message):
        train_stage(one, "net", workers=1)


def test_what_a_stage_does_not_depend_on_may_change(suite: Suite, tmp_path: Path) -> None:
    with stage(
        "train@net", BenchmarkPaths("tiny", tmp_path), "sunets.core.config", suite=suite, params=("models.net",)
    ):
        replace_once(Path("params.yaml"), "plain_conv_small", "unet_small")
        replace_once(Path("params.yaml"), "epochs: 1", "epochs: 2")


class _Seen(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "module", "call"),
    [
        ("prepare", "sunets.stages.prepare", lambda s: sunets.stages.prepare.prepare_stage(s)),
        ("train", "sunets.stages.train", lambda s: train_stage(s, "net")),
        ("evaluate", "sunets.stages.evaluate", lambda s: evaluate_stage(s, "net")),
        ("cost", "sunets.stages.cost", lambda s: sunets.stages.cost.cost_stage(s, "net")),
        ("speed", "sunets.stages.cost", lambda s: sunets.stages.cost.speed_stage(s)),
        ("ablate", "ablations.study", lambda s: ablations.study.run_study(s, "depth")),
        ("report", "sunets.report.build", lambda s: sunets.report.build.build_report(s, Path())),
        ("ablation_report", "ablations.report.page", lambda s: ablations.report.page.build_ablation_report(s)),
    ],
)
def test_a_stage_guards_what_dvc_follows(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, name: str, module: str, call: Any
) -> None:
    guarded: list[str] = []

    @contextmanager
    def seen(*_: Any, suite: Suite, params: Any, data_digest: str | None = None) -> Iterator[str]:
        guarded.extend(params)
        assert (data_digest is None) == (name in ("prepare", "report", "ablation_report"))
        raise _Seen
        yield ""

    monkeypatch.setattr(f"{module}.stage", seen)
    write_json("results/tiny/records/train/net.json", [])
    with pytest.raises(_Seen):
        call(suite)
    body = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]
    key = "depth" if name == "ablate" else "net"
    listed = [p.replace("${key}", key).replace("${item.model}", "net") for p in body.get("do", body)["params"]]
    assert sorted(guarded) == sorted(listed)


@pytest.mark.slow
def test_weights_of_seeds_no_longer_asked_for_go(suite: Suite) -> None:
    weights = BenchmarkPaths("tiny").weights("plain", 7)
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.touch()
    kept = weights.with_name("notes.txt")
    kept.touch()
    train_stage(suite, "plain", workers=1)
    assert not weights.exists()
    assert kept.exists()
    assert len(list(weights.parent.glob("*.pt"))) == len(suite.seeds)


@pytest.mark.slow
def test_when_every_seed_diverges_the_terminal_says_so_and_the_pipeline_goes_on(
    suite: Suite, capfd: pytest.CaptureFixture[str]
) -> None:
    train_stage(suite, "plain", workers=1)
    weights = BenchmarkPaths("tiny").weights("plain", 0)
    assert weights.exists()
    wild = load("params.yaml", ["train.lr=1e30"])
    capfd.readouterr()
    records = train_stage(wild, "plain", workers=1)
    assert [r["status"] for r in records] == ["failed", "failed"]
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["plain seed 0", "plain seed 1", "plain"]
    assert "training failed: the loss became" in lines[0]
    assert lines[2] == "plain: trainings failed on 2 of 2 seeds; the tables will say so, and there is nothing to score"
    assert not weights.exists()  # those of the training before
    scored = evaluate_stage(wild, "plain", workers=1)
    assert [(r["seed"], r["status"]) for r in scored] == [(0, "failed"), (1, "failed")]
    assert all("its training failed: the loss became" in r["reason"] for r in scored)
    elsewhere = evaluate_stage(load("params.yaml", ["train.lr=1e30", "train.device=cuda"]), "plain")
    assert [r["environment"]["device"] for r in elsewhere] == ["cpu", "cpu"], "trained on a cluster, told from here"
    with pytest.raises(ValueError, match=r"plain, seed 0: another training failed: train.lr is 1e\+30 there, 0.003"):
        evaluate_stage(suite, "plain", workers=1)


def _scored(suite: Suite) -> list[str]:
    return [r["status"] for r in evaluate_stage(suite, "net", workers=1)]


def _refuse(path: str, **_: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", path)


@pytest.mark.slow
def test_only_the_weights_of_this_training_are_scored(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    train_stage(suite, "net", workers=1)
    train_stage(suite, "plain", workers=1)
    layout = BenchmarkPaths("tiny")
    path = layout.weights("net", 0)
    own = path.read_bytes()
    assert _scored(load("params.yaml", ["data.workers=1", "evaluate.batch_size=2", "train.device=cpu"])) == [
        "finished",
        "finished",
    ]
    foreign = {
        "network": (
            layout.weights("plain", 0).read_bytes(),
            r"model\.\w+ is .* there, .* here and \d+ more; train net",
        ),
        "seed": (layout.weights("net", 1).read_bytes(), r"seed is 1 there, 0 here; train net again"),
        "bit": (bytes([*own[: len(own) // 2], own[len(own) // 2] ^ 1, *own[len(own) // 2 + 1 :]]), "damaged|readable"),
    }
    for content, message in foreign.values():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"seed0.pt: .*({message})"):
            _scored(suite)
    content = torch.load(layout.weights("net", 1), weights_only=True)
    content.pop("sha256")
    next(iter(content["state_dict"].values()))[...] = float("nan")
    atomic_save(content, path)
    with pytest.raises(CheckpointError, match=r"seed0.pt: \S+ holds NaN or infinity; train again"):
        _scored(suite)
    path.write_bytes(own)
    with pytest.raises(CheckpointError, match=r"train\.lr is 0\.003 there, 0\.5 here"):
        _scored(load("params.yaml", ["train.lr=0.5"]))
    prepare(load("params.yaml", ["data.synthetic.seed=1"]).data, Path("data/other"))
    Path("data/prepared/tiny").rename("data/kept")
    Path("data/other").rename("data/prepared/tiny")
    try:
        with pytest.raises(CheckpointError, match=r"data\.synthetic\.seed is 0 there, 1 here and 1 more"):
            _scored(load("params.yaml", ["data.synthetic.seed=1"]))
    finally:
        Path("data/prepared/tiny").rename("data/other")
        Path("data/kept").rename("data/prepared/tiny")
    assert _scored(suite) == ["finished", "finished"]
    monkeypatch.setattr(os, "rmdir", _refuse)
    with pytest.raises(PermissionError):  # not "a file stands where a directory is needed"
        _scored(suite)


@pytest.mark.slow
def test_records_state_the_network_as_built(suite: Suite) -> None:
    train_stage(suite, "net", workers=1)
    evaluate_stage(suite, "net", workers=1)
    sunets.stages.cost.cost_stage(suite, "net")
    for path in ("train/net.json", "evaluate/net.json", "cost/net.json"):
        content = json.loads(Path("results/tiny/records", path).read_text())
        for record in content if isinstance(content, list) else [content]:
            params = record["params"]
            assert params["model.unet_depth"] == params["model.num_blocks"] == [1, 1, 1], path
            assert (params["model.output_stride"], params["model.dilation"]) == (16, "multi_grid"), path
            unknown = {key for key, value in params.items() if key.startswith("model.") and value is None}
            assert unknown <= {"model.weights", "model.label"}, path


@pytest.mark.slow
def test_what_a_training_starts_from_is_said(suite: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    train_stage(suite, "net", workers=1)
    again = load("params.yaml", ["train.init_from=outputs/tiny/weights/net/seed{seed}.pt", "train.epochs=2"])
    capfd.readouterr()
    train_stage(again, "net", workers=1)
    lines = [line for line in capfd.readouterr().out.splitlines() if "init_from" in line]
    assert [line.split(":")[2].strip() for line in lines] == [f"outputs/tiny/weights/net/seed{s}.pt" for s in (0, 1)]
    assert all("backbone tensors loaded; the head too" in line for line in lines)

"""Two processes give what one gives: gradients, weights, metrics; and go on when one of them dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SUNET, TINY, tiny_config, tiny_manifest, write_checkout

from sunets.core.config import load
from sunets.core.hardware import torchrun_process
from sunets.core.record import read_json
from sunets.stages.train import train_stage
from sunets.training.fit import FitResult, fit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback is tested on Linux"),
]

ROOT = Path(__file__).resolve().parents[1]
BASE: dict[str, Any] = {
    **SUNET,
    "train.optimizer": "sgd",
    "train.lr": 0.05,
    "train.batch_size": 6,
    "train.sync_bn": True,
    "train.augment.color_jitter": 0.3,
    "train.clip_grad_norm": 1.0,
}
CASES: dict[str, dict[str, Any]] = {
    # The labelled pixels of the two halves of a batch differ in number, so the mean of two means would be another.
    "sync": {**BASE, "train.class_weights": "median_frequency"},
    "micro": {**BASE, "train.micro_batch_size": 1, "train.frozen_bn": True},
    "classes": {**BASE, "data.name": "synthetic_shapes"},
}
WORKER = """
import json, os, signal, sys, warnings
from pathlib import Path

import torch
import sunets.training.fit
import sunets.training.loop
from test_distributed import BASE, CASES
from tiny import tiny_config, tiny_manifest

warnings.simplefilter("error")
folder, job = Path(sys.argv[1]), sys.argv[2]
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
if job == "cases":
    for name, values in CASES.items():
        config = tiny_config(**values)
        manifest = tiny_manifest(folder / f"{config.data.task}{rank}", config.data.task)
        gradients = {}
        step = torch.optim.Optimizer.zero_grad
        def first(optimizer, **arguments):  # before the second step: the first one's gradients
            if not gradients and optimizer.param_groups[0]["params"][0].grad is not None:
                gradients.update({i: p.grad.clone() for i, p in enumerate(
                    q for g in optimizer.param_groups for q in g["params"])})
            step(optimizer, **arguments)
        torch.optim.SGD.zero_grad = first
        rows = []
        result = sunets.training.fit.fit(config, manifest, work_dir=folder / name, on_epoch=rows.append)
        torch.optim.SGD.zero_grad = step
        torch.save({"gradients": gradients, "history": result.history, "heard": rows,
                    "state": result.model.state_dict()}, folder / f"{name}.rank{rank}.pt")
else:
    step = sunets.training.loop.Trainer._step
    def deadly(trainer, *batch):
        if rank == "1" and attempt == "0" and trainer.iteration == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, *batch)
    sunets.training.loop.Trainer._step = deadly
config = tiny_config(**BASE, train__checkpoint_seconds=0)
result = sunets.training.fit.fit(config, tiny_manifest(folder / f"data{rank}"), work_dir=folder / "run")
(folder / f"run{rank}.json").write_text(json.dumps([result.resumed, result.history, attempt]))
"""


def _torchrun(folder: Path, job: str, *options: str) -> subprocess.CompletedProcess[str]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": f".{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *options]
    return subprocess.run(
        [*command, str(script), str(folder), job], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of all cases, and of one training that nothing disturbs."""
    path = tmp_path_factory.mktemp("two")
    done = _torchrun(path, "cases")
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def _train(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "sunets"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "train", "net", *settings], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_command_trains_with_two_processes_what_one_trains(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Larger steps would blow up rounding, which differs.
    recipe = {"epochs": 2, "batch_size": 8, "sync_bn": True, "optimizer": "sgd", "lr": 0.001}
    params = TINY | {"seeds": [0], "train": recipe}
    two, one = (write_checkout(tmp_path / name, params) for name in ("two", "one"))
    done = _train(two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("net seed 0 epoch 2/2") == 1
    assert (two / "outputs/tiny/weights/net/seed0.pt").exists()
    monkeypatch.chdir(one)
    train_stage(load("params.yaml"), "net", workers=1)
    scores, expected = (read_json(f / "results/tiny/records/train/net.json")[0]["scores"] for f in (two, one))
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_processes_that_do_not_share_batch_statistics_are_refused(tmp_path: Path) -> None:
    """Their number would decide the result, and no record holds it."""
    params = TINY | {"seeds": [0], "train": {"epochs": 1, "batch_size": 4}}
    done = _train(write_checkout(tmp_path, params))
    assert done.returncode != 0
    assert "error: train.sync_bn: true under torchrun" in done.stderr
    assert not (tmp_path / "outputs").exists()


def _alone(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[FitResult, dict[int, torch.Tensor]]:
    config = tiny_config(**CASES[name])
    manifest = tiny_manifest(folder / f"{config.data.task}0", config.data.task)
    gradients: dict[int, torch.Tensor] = {}
    zero_grad = torch.optim.SGD.zero_grad

    def first(optimizer: torch.optim.Optimizer, **arguments: Any) -> None:
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        if not gradients and parameters[0].grad is not None:
            gradients.update({i: p.grad.clone() for i, p in enumerate(parameters)})
        zero_grad(optimizer, **arguments)

    monkeypatch.setattr(torch.optim.SGD, "zero_grad", first)
    return fit(config, manifest, work_dir=folder / f"{name}.alone"), gradients


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, gradients = _alone(folder, name, monkeypatch)
    ranks = [torch.load(folder / f"{name}.rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert gradients
    for index, gradient in gradients.items():
        assert torch.equal(ranks[0]["gradients"][index], ranks[1]["gradients"][index])
        torch.testing.assert_close(ranks[0]["gradients"][index], gradient, rtol=1e-5, atol=2e-6)
    for key, value in alone.model.state_dict().items():
        torch.testing.assert_close(ranks[0]["state"][key], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(ranks[0]["state"][key], ranks[1]["state"][key])
    assert ranks[0]["history"] == ranks[1]["history"] == ranks[0]["heard"]
    assert ranks[1]["heard"] == []  # one process reports
    for row, expected in zip(ranks[0]["history"], alone.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-3)
    saved = torch.load(folder / name / "weights.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[key], value) for key, value in ranks[0]["state"].items())


def test_a_dead_process_is_replaced_and_the_result_is_the_same(folder: Path, tmp_path: Path) -> None:
    """torchrun starts both again; a call after an interrupted one goes on in the same way."""
    died = _torchrun(tmp_path, "dies", "--max-restarts=1")
    assert died.returncode == 0, died.stderr[-3000:]
    resumed, history, attempt = json.loads((tmp_path / "run0.json").read_text())
    assert (resumed, attempt) == (True, "1")
    assert [False, history, "0"] == json.loads((folder / "run0.json").read_text())
    assert (tmp_path / "run" / "weights.pt").read_bytes() == (folder / "run" / "weights.pt").read_bytes()


@pytest.mark.parametrize(
    ("variables", "stated"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": "1"}, (0, 0, 1)),  # a training that took it for torchrun's would write nothing, without a word
        ({"RANK": "", "LOCAL_RANK": "7", "WORLD_SIZE": "1"}, (0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (3, 1, 4)),
        ({"RANK": "4", "WORLD_SIZE": "4"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "0"}, None),
        ({"WORLD_SIZE": ""}, None),
    ],
)
def test_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], stated: object) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if stated is None:
        with pytest.raises(ValueError, match=r"WORLD_SIZE='\S*': not what torchrun sets"):
            torchrun_process()
    else:
        assert torchrun_process() == stated

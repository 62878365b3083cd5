"""The time that `prepare` announces: the work of the plan, at the speed of this machine."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import make_folder
from torch import nn
from typer.testing import CliRunner

from sunets import create_model, duration
from sunets.__main__ import app
from sunets.core.config import Suite
from sunets.duration import _estimate, duration_line, in_words, macs_per_second
from sunets.plan import dataset_facts, training_work

VALUES: dict[str, Any] = {
    "benchmark": "tiny",
    "seeds": [0, 1, 2],
    "data": {"synthetic": {"image_size": 64, "train": 20, "val": 6, "test": 5}},
    "models": {"sunet": {"name": "sunet_tiny", "num_blocks": 1, "unet_depth": 1}},
    "report": {"reference": "sunet"},
    "train": {"epochs": 4, "batch_size": 8, "validate_every": 2, "device": "cpu"},
}


def test_the_time_is_that_of_the_plans_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = Suite.model_validate(VALUES)
    work = training_work(suite.config("sunet", 0), dataset_facts(suite.data, tmp_path))
    macs = work.train.images * work.train.macs + 2 * 6 * work.validation.macs + 5 * work.test[0].macs
    measured: list[Any] = []
    monkeypatch.setattr(duration, "macs_per_second", lambda config, *_: measured.append(config.model) or 1e6)
    monkeypatch.setattr(duration, "default_workers", lambda *_: 2)  # three seeds: two rounds
    seconds, trainings = _estimate(suite, tmp_path)
    assert (seconds, trainings) == (pytest.approx(2 * macs / 1e6), 3)
    tuned = Suite.model_validate(
        VALUES | {"tune": {"trials": 4, "space": [{"path": "train.lr", "low": 0.001, "high": 0.01}]}}
    )
    measured.clear()
    more, trainings = _estimate(tuned, tmp_path)
    assert len(measured) == 1, "the network of the trainings is that of the trials"
    assert more > seconds
    assert trainings == 3 + 4 + 6
    monkeypatch.setattr(duration, "default_workers", lambda *_: 64)  # a batch of trials at a time
    in_pairs = tuned.model_copy(update={"tune": tuned.tune.model_copy(update={"batch": 2})})
    assert _estimate(in_pairs, tmp_path)[0] > _estimate(tuned, tmp_path)[0]


@pytest.mark.parametrize(("channels_last", "amp"), [(False, "none"), (True, "bf16")])
def test_a_large_image_is_measured_as_a_small_one(
    channels_last: bool, amp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = VALUES | {"train": VALUES["train"] | {"channels_last": channels_last, "amp": amp}}
    values |= {"data": {"size": [2048, 4096], "synthetic": {"image_size": 64}}}
    config, inputs = Suite.model_validate(values).config("sunet", 0), []

    def create(*args: Any, **kwargs: Any) -> nn.Module:
        model = create_model(*args, **kwargs)
        model.register_forward_pre_hook(
            lambda _, given: inputs.append((given[0].shape, torch.is_autocast_enabled("cpu")))
        )
        return model

    data = dataset_facts(config.data, Path("nowhere"))
    work = training_work(config, data)
    monkeypatch.setattr(duration, "create_model", create)
    assert 1e7 < macs_per_second(config, work, data) < 1e13
    assert inputs
    for (images, _, height, width), autocast in inputs:
        assert images == 1
        assert autocast == (amp == "bf16")
        assert width == pytest.approx(2 * height, rel=0.02)
        assert work.train.macs * height * width / (2048 * 4096) == pytest.approx(duration.MEASURED_MACS, rel=0.02)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 min"), (300, "5 min"), (2300, "40 min"), (7300, "2 h"), (49 * 3600, "2 days"), (4e8, "4,630 days")],
)
def test_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_prepare_says_the_time_of_new_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "own", count=20)
    monkeypatch.chdir(tmp_path)
    values = {k: v for k, v in VALUES.items() if k != "data"}
    text = f"{values | {'data': {'name': 'folder', 'root': str(root), 'size': [32, 32]}}}"
    (tmp_path / "params.yaml").write_text(text)
    first, second = (CliRunner().invoke(app, ["prepare"]) for _ in range(2))
    assert "time: about 1 min on this machine for 3 trainings and their scores (rough" in first.stdout
    assert second.exit_code == 0
    assert "time:" not in second.stdout
    monkeypatch.setitem(sys.modules, "sunets.duration", None)  # as where torch cannot be loaded
    shutil.rmtree(tmp_path / "data")
    third = CliRunner().invoke(app, ["prepare"])
    assert third.exit_code == 0
    assert "time:" not in third.stdout


def test_a_failed_estimate_fails_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> float:
        raise MemoryError

    monkeypatch.setattr(duration, "macs_per_second", fail)
    line = duration_line(Suite.model_validate(VALUES), tmp_path)
    assert line == "time: no estimate; `python -m sunets plan` says what is missing"

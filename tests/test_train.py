"""Training: exact gradients, the same bytes after any kill, and one clear error for what cannot be trained."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SUNET, tiny_config, tiny_manifest
from torch import nn
from torch.nn import functional

import sunets.core.config
import sunets.models.device
import sunets.models.initialization
import sunets.training.fit
import sunets.training.loop
from sunets.core.config import Config, ConfigError
from sunets.core.lock import locked
from sunets.data.loading import make_dataset, train_batches
from sunets.data.manifest import Manifest
from sunets.data.picture import DataError
from sunets.models.reference import WeightsError, reference_keys
from sunets.models.tensor_file import CheckpointError
from sunets.models.weights import load_trained
from sunets.models.zoo import create_model
from sunets.stages.train import _EpochProgress
from sunets.training.fit import FitResult, check, fit, run_fingerprint
from sunets.training.loop import TrainingError
from sunets.training.recipe import class_weights, lr_factor, parameter_groups


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return tiny_manifest(tmp_path_factory.mktemp("pictures"), task="classification")


def _fit(config: Config, manifest: Manifest, work_dir: Path, **arguments: Any) -> FitResult:
    return fit(config, manifest, work_dir=work_dir, **arguments)


def _bytes(result: FitResult) -> bytes:
    return result.weights_path.read_bytes()


# The recipe's parts.


def test_schedules_have_their_textbook_values() -> None:
    def factors(schedule: str, **values: Any) -> list[float]:
        train = tiny_config(train__schedule=schedule, train__epochs=10, **values).train
        return [lr_factor(i, train, 5) for i in range(50)]

    assert set(factors("constant")) == {1.0}
    assert factors("cosine")[::10] == pytest.approx([(1 + math.cos(math.pi * t)) / 2 for t in (0, 0.2, 0.4, 0.6, 0.8)])
    assert factors("poly", train__poly_power=2.0)[::10] == pytest.approx([1, 0.64, 0.36, 0.16, 0.04])
    step = factors("step", train__step_epochs=4, train__step_gamma=0.1)
    assert [step[i] for i in (0, 19, 20, 39, 40, 49)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    train = tiny_config(train__epochs=3, train__warmup_epochs=0.8, train__schedule="cosine").train
    factors = [lr_factor(i, train, 5) for i in range(15)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_the_authors_four_parameter_groups() -> None:
    rates = {"train.head_lr_multiplier": 10, "train.head_bias_lr_multiplier": 20}
    config = tiny_config(**SUNET, model__head="degridding", **rates)
    model = create_model(**config.model.arguments(), num_classes=3)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["name"]: g for g in parameter_groups(model, config.train)}
    found = {name: {names[id(p)] for p in g["params"]} for name, g in groups.items()}
    assert {n: g["lr_multiplier"] for n, g in groups.items()} == {
        "backbone.biases": 1,
        "backbone.weights": 1,
        "head.biases": 20,
        "head.weights": 10,
    }
    assert sum(map(len, found.values())) == len(names)
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and n.startswith("head.")}
    assert norms
    assert found["head.biases"]
    assert {f"{n}.{part}" for n in norms for part in ("weight", "bias")} <= found["head.weights"]
    assert all(n.startswith("head.") and n.endswith("bias") for n in found["head.biases"])
    assert not any(n.startswith("head.") for n in found["backbone.weights"] | found["backbone.biases"])

    spared = parameter_groups(model, tiny_config(train__decay_norm_and_bias=False, train__weight_decay=0.1).train)
    assert {group["weight_decay"] for group in spared} == {0, 0.1}
    for group in spared:
        assert group["weight_decay"] == (0 if group["name"].endswith("no_decay") else 0.1)
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_median_frequency_weights(manifest: Manifest) -> None:
    # Three images of 100 pixels. a: 30 of the 300 pixels of the images that show it; b: 20 of 100; c: nowhere; d: 60 of
    # 200. Frequencies 0.1, 0.2, 0.3: median 0.2.
    counted = dataclasses.replace(
        manifest, class_pixels={"train": [30, 20, 0, 60]}, image_pixels={"train": [300, 100, 0, 200]}
    )
    weights = class_weights(tiny_config(train__class_weights="median_frequency"), counted)
    assert weights == pytest.approx((2, 1, 1, 2 / 3))


def test_median_pixel_frequency_weights(manifest: Manifest) -> None:
    counted = dataclasses.replace(manifest, class_pixels={"train": [100, 25, 0, 50]})
    assert class_weights(tiny_config(train__class_weights="median_pixel_frequency"), counted) == (0.5, 2.0, 1.0, 1.0)
    assert class_weights(tiny_config(train__class_weights=[1, 2, 3]), manifest) == (1, 2, 3)


def test_median_frequency_is_for_segmentation(pictures: Manifest) -> None:
    values = {"data__name": "synthetic_shapes", "model__name": "resnet18", "model__width": None}
    with pytest.raises(ConfigError, match=r"train.class_weights: median_pixel_frequency for classification"):
        check(tiny_config(**values, train__class_weights="median_frequency"), pictures)


@pytest.mark.parametrize("extra", [{}, {"train__label_smoothing": 0.1, "train__class_weights": [0.5, 1.0, 3.0]}])
@pytest.mark.parametrize("micro", [None, 1, 5])
def test_one_step_is_that_of_the_mean_over_the_whole_batch(
    manifest: Manifest, tmp_path: Path, micro: int | None, extra: dict[str, Any]
) -> None:
    """Images with different numbers of ignored pixels, however they are spread over micro-batches."""
    config = tiny_config(
        **SUNET,
        train__optimizer="sgd",
        train__lr=0.1,
        train__weight_decay=0.0,
        train__schedule="constant",
        train__epochs=1,
        train__batch_size=10,
        train__micro_batch_size=micro,
        train__frozen_bn=True,  # batch statistics are the one thing that micro-batches change
        **extra,
    )
    trained = _fit(config, manifest, tmp_path / "run").model.state_dict()

    torch.manual_seed(sunets.core.config.derive_seed(0, "init"))
    model = create_model(**config.model.arguments(), num_classes=3).eval()
    dataset = make_dataset(
        manifest, "train", config.data, config.train.augment, sunets.core.config.derive_seed(0, "augment")
    )
    order = sunets.core.config.derive_seed(0, "order")
    images, targets = next(iter(train_batches(dataset, batch_size=10, seed=order, epoch=0)))
    assert len({int((t == 255).sum()) for t in targets}) > 1
    weights = torch.tensor(config.train.class_weights) if config.train.class_weights else None
    loss = functional.cross_entropy(
        model(images), targets, weights, ignore_index=255, label_smoothing=config.train.label_smoothing
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "norm" not in name:
            expected = parameter - 0.1 * (1 + 0.9) * parameter.grad  # Nesterov's first step
            torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(trained[name], parameter)


def test_frozen_bn_and_bn_momentum(manifest: Manifest, tmp_path: Path) -> None:
    frozen = _fit(tiny_config(**SUNET, train__frozen_bn=True), manifest, tmp_path / "frozen").model
    momentum = _fit(tiny_config(**SUNET, train__bn_momentum=0.25), manifest, tmp_path / "momentum").model
    norms = [m for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert norm.running_mean is not None
        assert not norm.running_mean.any()
    assert {m.momentum for m in momentum.modules() if isinstance(m, nn.BatchNorm2d)} == {0.25}


def test_gradient_clipping_bounds_the_step(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(
        train__optimizer="sgd",
        train__momentum=0.0,
        train__weight_decay=0.0,
        train__lr=1.0,
        train__schedule="constant",
        train__epochs=1,
        train__batch_size=10,
        train__clip_grad_norm=1e-3,
    )
    torch.manual_seed(sunets.core.config.derive_seed(0, "init"))
    before = dict(create_model(**config.model.arguments(), num_classes=3).named_parameters())
    after = dict(_fit(config, manifest, tmp_path / "run").model.named_parameters())
    moved = math.sqrt(sum(float((after[n] - before[n]).detach().square().sum()) for n in before))
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_a_batch_without_a_labelled_pixel_is_harmless(manifest: Manifest, tmp_path: Path) -> None:
    blank = tmp_path / "blank.png"
    Image.fromarray(np.full((32, 32), 255, dtype=np.uint8)).save(blank)
    items = tuple(dataclasses.replace(item, target=blank) for item in manifest.splits["train"])
    void = dataclasses.replace(manifest, splits={**manifest.splits, "train": items})
    result = _fit(tiny_config(train__weight_decay=0.0), void, tmp_path / "run")
    assert [row["train.loss"] for row in result.history] == [0, 0]
    assert [row["train.miou"] for row in result.history] == [None, None]
    assert all(torch.isfinite(v).all() for v in result.model.state_dict().values())


# What a training returns and writes.


def test_training_learns_and_reports(manifest: Manifest, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    config = tiny_config(train__epochs=6, train__validate_every=4, train__lr=0.03)
    result = _fit(config, manifest, tmp_path / "run", on_epoch=rows.append)
    assert rows == result.history
    assert not result.resumed
    assert result.images_per_second
    assert [row["iteration"] for row in rows] == [3, 6, 9, 12, 15, 18]
    assert rows[-1]["train.loss"] < 0.5 * rows[0]["train.loss"]
    assert rows[-1]["val.miou"] > 0.6
    assert [row["epoch"] for row in rows if "val.miou" in row] == [4, 6]
    assert list(rows[-1]) == [
        "epoch", "iteration", "lr", "train.loss", "train.miou", "val.loss", "val.miou", "val.pixel_accuracy"
    ]  # fmt: skip

    model, info = load_trained(result.weights_path)
    assert info["classes"] == list(manifest.classes)
    assert info["config"]["train"]["lr"] == 0.03
    images = torch.randn(1, 3, 20, 27)
    with torch.no_grad():
        torch.testing.assert_close(model(images), result.model(images))


def _shown(manifest: Manifest, folder: Path) -> None:
    """Show a training as its stage does."""
    config = tiny_config()
    with _EpochProgress("net", [config]) as progress:
        _fit(config, manifest, folder, on_epoch=lambda row: progress.update(0, row))


def test_progress_is_one_line_an_epoch_when_nobody_watches(
    manifest: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _shown(manifest, tmp_path / "run")
    out, err = capfd.readouterr()
    assert not err
    lines = out.splitlines()
    assert [line[:33] for line in lines] == [f"net seed 0 epoch {e}/2: train.loss " for e in (1, 2)]
    assert all("val.miou" in line for line in lines)


def test_progress_bar_on_a_terminal(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    _shown(manifest, tmp_path / "run")
    assert re.search(r"net seed 0 .*val\.miou \d\.\d+.*0:00:00", capfd.readouterr().err)


@pytest.mark.slow
def test_compiled_training_gives_the_same(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with = nn.Module.compile
    # The graph is captured as always, and run without the minutes that the C++ compiler takes.
    monkeypatch.setattr(nn.Module, "compile", lambda model: compile_with(model, backend="eager"))
    compiled = _fit(tiny_config(train__compile=True), manifest, tmp_path / "compiled")
    plain = _fit(tiny_config(), manifest, tmp_path / "plain")
    assert compiled.history == plain.history
    loaded, _ = load_trained(compiled.weights_path)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)


def test_classification_rows(pictures: Manifest, tmp_path: Path) -> None:
    config = tiny_config(data__name="synthetic_shapes", **SUNET, train__epochs=3, train__lr=0.02)
    rows = _fit(config, pictures, tmp_path / "run").history
    assert {"train.top1_error_percent", "val.top1_error_percent", "val.top5_error_percent"} < rows[-1].keys()
    assert rows[-1]["val.top5_error_percent"] == 0
    assert rows[-1]["train.loss"] < rows[0]["train.loss"]


def test_class_255_of_a_classifier_is_a_class(pictures: Manifest, tmp_path: Path) -> None:
    classes = tuple(f"class {number}" for number in range(300))
    items = {s: tuple(dataclasses.replace(i, target=255) for i in split) for s, split in pictures.splits.items()}
    many = dataclasses.replace(pictures, classes=classes, palette=((0, 0, 0),) * 300, splits=items)
    rows = _fit(tiny_config(data__name="synthetic_shapes", **SUNET), many, tmp_path / "run").history
    assert rows[0]["train.loss"] > 1
    assert rows[0]["val.loss"] > 1


@pytest.mark.parametrize(
    ("extra", "tolerance"),
    [
        ({"train__channels_last": True}, 1e-3),
        ({"train__amp": "bf16"}, 0.03),
        ({"train__amp": "fp16"}, 0.1),  # its first steps are skipped, until the scale of the loss fits
    ],
)
def test_formats_change_the_result_only_a_little(
    manifest: Manifest, tmp_path: Path, extra: dict[str, Any], tolerance: float
) -> None:
    config = tiny_config(**SUNET)
    plain = _fit(config, manifest, tmp_path / "plain").history[0]["train.loss"]
    changed = _fit(tiny_config(**SUNET, **extra), manifest, tmp_path / "changed").history[0]["train.loss"]
    assert changed == pytest.approx(plain, rel=tolerance)
    assert changed != plain


# The same bytes, whatever happens.


def test_the_same_configuration_gives_the_same_bytes(manifest: Manifest, tmp_path: Path) -> None:
    first = _fit(tiny_config(), manifest, tmp_path / "first")
    torch.manual_seed(random.randrange(10**6))  # what ran before in this process does not matter
    again = _fit(tiny_config(), manifest, tmp_path / "again")
    other = _fit(tiny_config(seed=1), manifest, tmp_path / "other")
    assert _bytes(first) == _bytes(again)
    assert first.history == again.history
    assert _bytes(first) != _bytes(other)


class _Killed(BaseException):
    pass


RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {**SUNET, "train__micro_batch_size": 2},
    "sgd": {"train__optimizer": "sgd", "train__augment": {"flip": True, "color_jitter": 0.5, "rotate_degrees": 10}},
    "fp16": {**SUNET, "train__amp": "fp16", "train__channels_last": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["adamw", "sgd", "fp16"])
def test_a_training_killed_at_any_iteration_ends_the_same(
    manifest: Manifest, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**RECIPES[recipe], train__checkpoint_seconds=0)
    whole = _fit(config, manifest, tmp_path / "whole")
    step = sunets.training.loop.Trainer._step

    def killed(trainer: Any, *batch: Any) -> bool:
        due = step(trainer, *batch)
        if steps.pop():
            raise _Killed
        return due

    work_dir = tmp_path / "killed"
    for survived in (1, 0, 2, 1):  # 6 iterations in all; the killed one is lost each time
        steps = [True] + [False] * survived
        monkeypatch.setattr(sunets.training.loop.Trainer, "_step", killed)
        with pytest.raises(_Killed):
            _fit(config, manifest, work_dir)
    monkeypatch.setattr(sunets.training.loop.Trainer, "_step", step)
    rows: list[dict[str, Any]] = []
    ended = _fit(config, manifest, work_dir, on_epoch=rows.append)
    assert ended.resumed
    assert _bytes(ended) == _bytes(whole)
    assert ended.history == whole.history == rows


def test_a_network_that_draws_random_numbers_resumes_too(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.drop = nn.Conv2d(3, 3, 1), nn.Dropout(0.5)
            self.head_prefixes = ("head.",)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.drop(images))

    monkeypatch.setattr(sunets.models.initialization, "create_model", lambda *_, **__: Noisy())
    config = tiny_config(train__checkpoint_seconds=0)
    whole = _fit(config, manifest, tmp_path / "whole")
    save, saved = sunets.training.loop.Trainer.save, []

    def killed(trainer: Any) -> None:
        save(trainer)
        saved.append(trainer.iteration)
        if len(saved) == 2:
            raise _Killed

    monkeypatch.setattr(sunets.training.loop.Trainer, "save", killed)
    with pytest.raises(_Killed):
        _fit(config, manifest, tmp_path / "killed")
    torch.manual_seed(99)
    assert _bytes(_fit(config, manifest, tmp_path / "killed")) == _bytes(whole)


def test_float32_is_not_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    sunets.models.device.prepare_torch(tiny_config().train)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


SLOW_TRAINING = """
import sys, time
from pathlib import Path
import sunets.training.fit
import sunets.training.loop
from tiny import tiny_config, tiny_manifest

step = sunets.training.loop.Trainer._step
def slow(trainer, *batch):
    time.sleep(0.1)
    return step(trainer, *batch)
sunets.training.loop.Trainer._step = slow
folder = Path(sys.argv[1])
config = tiny_config(train__epochs=4, train__checkpoint_seconds=0.15)
sunets.training.fit.fit(config, tiny_manifest(folder / "data"), work_dir=folder / "run")
"""


@pytest.mark.slow
def test_kill_9_at_a_random_moment(tmp_path: Path) -> None:
    """A real process, killed within an epoch, and what goes on from what it left."""
    config, manifest = tiny_config(train__epochs=4, train__checkpoint_seconds=0.15), tiny_manifest(tmp_path / "data")
    environment = os.environ | {"PYTHONPATH": f".{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SLOW_TRAINING, str(tmp_path)], env=environment)
    checkpoint, deadline = tmp_path / "run" / "checkpoint.pt", time.monotonic() + 60
    while not checkpoint.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.6))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "weights.pt").exists()
    assert 0 < torch.load(checkpoint, weights_only=True)["iteration"] < 12

    resumed = _fit(config, manifest, tmp_path / "run")
    whole = _fit(config, manifest, tmp_path / "whole")
    assert resumed.resumed
    assert _bytes(resumed) == _bytes(whole)
    assert resumed.history == whole.history


def test_a_finished_training_is_not_repeated(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _fit(tiny_config(), manifest, tmp_path / "run")
    content = _bytes(first)
    first.weights_path.unlink()
    monkeypatch.setattr(sunets.training.loop, "train_batches", None)
    again = _fit(tiny_config(), manifest, tmp_path / "run")
    assert not again.resumed
    assert again.images_per_second == first.images_per_second
    assert 0 < again.seconds <= first.seconds, "the time of the training, not that of loading it"
    assert again.history == first.history
    assert _bytes(again) == content
    elsewhere = tiny_config(data__workers=1, train__checkpoint_seconds=5)  # no other training
    assert _fit(elsewhere, manifest, tmp_path / "run").history == first.history


def test_stop_early_prunes_and_stays_pruned(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(train__epochs=5)
    asked: list[int] = []

    def stop(row: dict[str, Any]) -> bool:
        asked.append(row["epoch"])
        return row["epoch"] == 2

    for _ in range(2):
        result = _fit(config, manifest, tmp_path / "run", stop_early=stop)
        assert result.pruned
        assert len(result.history) == 2
    assert asked == [1, 2, 1, 2]


# What must not happen silently.


def test_another_trainings_checkpoint_is_refused_and_kept(manifest: Manifest, tmp_path: Path) -> None:
    _fit(tiny_config(), manifest, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    other = tiny_config(train__lr=0.02)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: of another .*train.lr is 0.01 there, 0.02 here"):
        _fit(other, manifest, tmp_path / "run")
    with pytest.raises(CheckpointError, match="digest of the data"):
        _fit(tiny_config(), dataclasses.replace(manifest, digest="else"), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_the_fingerprint_is_that_of_the_result(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    same = [tiny_config(), tiny_config(data__workers=2), tiny_config(evaluate__batch_size=1)]
    assert len({run_fingerprint(c, manifest) for c in same}) == 1
    other = [*same[:1], tiny_config(seed=1), tiny_config(train__threads=2), tiny_config(model__width=5)]
    prints = {run_fingerprint(c, manifest) for c in other}
    assert len(prints) == 4
    monkeypatch.setattr(sunets.training.fit, "_code", lambda: "another code")
    assert run_fingerprint(same[0], manifest) not in prints


def test_a_damaged_checkpoint_says_what_to_do(manifest: Manifest, tmp_path: Path) -> None:
    result = _fit(tiny_config(), manifest, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoint.pt", result.weights_path):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: not readable .*delete it"):
        _fit(tiny_config(), manifest, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"weights.pt: not readable"):
        load_trained(result.weights_path)
    with pytest.raises(FileNotFoundError, match=r"none.pt: no such file"):
        load_trained(tmp_path / "none.pt")


def _hold(folder: Path, ready: Any, done: Any) -> None:
    with locked(folder / ".lock", 60):
        ready.set()
        done.wait(60)


def test_two_trainings_in_one_directory_are_refused(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sunets.training.fit, "LOCK_SECONDS", 0.1)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "run", ready, done))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(CheckpointError, match="another process is training here"):
            _fit(tiny_config(), manifest, tmp_path / "run")
    finally:
        done.set()
        holder.join()
    _fit(tiny_config(), manifest, tmp_path / "run")


def test_a_diverged_training_names_step_rate_and_images(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(train__lr=1e30, train__optimizer="sgd", train__checkpoint_seconds=0)
    with pytest.raises(
        TrainingError, match=r"loss became (nan|inf) in epoch 1, step [23] .* rate [19]\S*e\+"
    ) as raised:
        _fit(config, manifest, tmp_path / "run")
    assert sum(item.id in str(raised.value) for item in manifest.splits["train"]) >= 4
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["iteration"] < 3
    last = tiny_config(train__lr=1e30, train__optimizer="sgd", train__epochs=1, train__batch_size=10)
    with pytest.raises(TrainingError, match=r"validation loss became (nan|inf) in epoch 1, after step 1"):
        _fit(last, manifest, tmp_path / "last")
    assert not (tmp_path / "last" / "weights.pt").exists()


@pytest.mark.parametrize(
    ("values", "processes", "message"),
    [
        ({}, "3", r"train.batch_size: a multiple of the 3 processes, not 4"),
        ({"train__micro_batch_size": 2, "train__batch_size": 6}, "2", r"train.micro_batch_size: a divisor of each"),
        ({"train__class_weights": [1.0, 2.0]}, "1", r"train.class_weights: 3 values, one per class, not 2"),
        ({"data__train_split": "more"}, "1", r"data.train_split: .* no split 'more'; it has train, val, test"),
        ({"model__name": "sunet_typo"}, "1", r"sunet_typo"),
        ({"train__init_from": "absent.pt"}, "1", r"absent.pt: no such file"),
        ({"model__in_channels": 1}, "1", r"model.in_channels: 3, as the images have, not 1"),
        (SUNET | {"train__micro_batch_size": 1}, "1", r"train.micro_batch_size: with one image .* 32 x 32 pixels"),
        (SUNET | {"train__batch_size": 1}, "1", r"train.batch_size: with one image .* BatchNorm of sunet_tiny gets"),
        (SUNET | {"train__batch_size": 2}, "2", r"train.batch_size: with one image"),
        ({"model__name": "deeplabv3_resnet50", "model__width": None, "train__batch_size": 1}, "1", "train.batch_size"),
        ({"data__test_split": "more"}, "1", r"data.test_split: no split 'more' in the data set; it has train, val"),
        (
            {"evaluate__variants": {"plain": {}, "small": {"scales": [0.4, 1.0]}}},
            "1",
            r"evaluate.variants.small.scales: 0.4 makes 13 x 13 pixels of the smallest test image \(32 x 32\)",
        ),
    ],
)
def test_bad_input_is_refused_before_work(
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    processes: str,
    message: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(tiny_config(**values), manifest)


@pytest.mark.parametrize(
    "values",
    [
        {"train__batch_size": 1},
        SUNET | {"train__micro_batch_size": 2},
        SUNET | {"train__micro_batch_size": 1, "train__frozen_bn": True},
        SUNET | {"train__micro_batch_size": 1, "train__augment__crop": [33, 33]},
        {"evaluate__variants": {"windows": {"scales": [0.4], "window": [32, 32]}, "half": {"scales": [0.5]}}},
    ],
)
def test_what_can_be_trained_is_not_refused(manifest: Manifest, tmp_path: Path, values: dict[str, Any]) -> None:
    config = tiny_config(**values, train__epochs=1)
    check(config, manifest)
    _fit(config, manifest, tmp_path)


def test_a_training_belongs_to_its_libraries_and_not_to_the_name_of_its_device(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_fingerprint(tiny_config(train__device="cpu"), manifest)
    assert run_fingerprint(tiny_config(train__device="auto"), manifest) == before
    monkeypatch.setattr("sunets.training.fit.library_versions", lambda: {"torchvision": "0"})
    assert run_fingerprint(tiny_config(train__device="cpu"), manifest) != before


@pytest.mark.parametrize(
    ("values", "message"),
    [({"train__augment__scale": [0.5, 2]}, r"train\.augment\.scale: needs train\.augment\.crop"),
     ({"train__augment__resized_crop": 32}, r"train\.augment\.resized_crop: for classification")],
)  # fmt: skip
def test_images_that_cannot_be_batched_are_refused_before_work(
    manifest: Manifest, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        check(tiny_config(**values), manifest)


def test_an_absent_gpu_is_missed_where_the_training_runs(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node needs none, and `torchrun` runs no job elsewhere."""
    config = tiny_config(train__device="cuda")
    absent = pytest.raises(ConfigError, match=r"cuda, but torch sees no GPU here with CUDA_VISIBLE_DEVICES='-1'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with absent:
        check(config, manifest)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://scheduler:8786")
    check(config, manifest)
    assert run_fingerprint(config, manifest) != run_fingerprint(tiny_config(train__device="cpu"), manifest)
    with absent:
        fit(config, manifest, work_dir=tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with absent:
        check(config, manifest)


# Starting from a checkpoint.


def test_fine_tuning_takes_the_backbone(manifest: Manifest, pictures: Manifest, tmp_path: Path) -> None:
    classifier = _fit(tiny_config(**SUNET, data__name="synthetic_shapes"), pictures, tmp_path / "classifier")
    config = tiny_config(**SUNET, train__init_from=str(classifier.weights_path))
    more = dataclasses.replace(manifest, classes=("a", "b", "c", "d"), palette=((0, 0, 0),) * 4)
    model, note = sunets.models.initialization.build_network(config, more)
    for name, value in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, classifier.model.state_dict()[name])
    assert "2 tensors of the head kept as initialised" in str(note)
    assert "backbone tensors loaded" in str(check(config, manifest))
    assert "backbone tensors loaded" in str(_fit(config, manifest, tmp_path / "run").init_summary)

    segmenter = _fit(tiny_config(**SUNET), manifest, tmp_path / "segmenter")
    model, note = sunets.models.initialization.build_network(
        tiny_config(**SUNET, train__init_from=str(segmenter.weights_path)), manifest
    )
    assert "the head too" in str(note)
    assert all(torch.equal(v, segmenter.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_changed_init_from_is_another_training(manifest: Manifest, tmp_path: Path) -> None:
    start = tmp_path / "start.pt"
    config = tiny_config(train__init_from=str(start))
    start.write_bytes(b"one")
    before = run_fingerprint(config, manifest)
    start.write_bytes(b"two")
    assert run_fingerprint(config, manifest) != before


def test_another_variants_checkpoint_is_refused_before_work(manifest: Manifest, tmp_path: Path) -> None:
    deep = _fit(tiny_config(**{**SUNET, "model.num_blocks": 2}), manifest, tmp_path / "deep")
    config = tiny_config(**SUNET, train__init_from=str(deep.weights_path))
    with pytest.raises(CheckpointError, match=r"does not fit sunet_tiny as configured: \S+ is \[.*\] there, absent"):
        check(config, manifest)
    plain = _fit(tiny_config(), manifest, tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"holds a plain_conv_small that does not fit sunet_tiny"):
        check(tiny_config(**SUNET, train__init_from=str(plain.weights_path)), manifest)
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"text.pt: not readable"):
        check(tiny_config(**SUNET, train__init_from=str(tmp_path / "text.pt")), manifest)


def test_fine_tuning_from_a_file_of_the_authors(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "released.pth"
    source = create_model(**tiny_config(**SUNET).model.arguments(), task="classification", num_classes=7)
    keys = reference_keys(source)  # type: ignore[arg-type]
    state = {f"module.{keys[name]}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 90, "best_prec1": 70.0}, path)
    model, note = sunets.models.initialization.build_network(tiny_config(**SUNET, train__init_from=str(path)), manifest)
    assert "tensors loaded" in str(note)
    assert torch.equal(model.state_dict()["stem.conv.weight"], source.state_dict()["stem.conv.weight"])
    with pytest.raises(WeightsError, match=r"released.pth"):
        check(tiny_config(**{**SUNET, "model.width": 5}, train__init_from=str(path)), manifest)

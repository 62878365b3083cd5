"""Weights files and checkpoints: damaged, foreign or harmful ones are refused in one line of our own words."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SUNET, tiny_config, tiny_manifest

from sunets.core.config import Config
from sunets.data.manifest import Manifest
from sunets.models.reference import load_reference_weights, reference_keys
from sunets.models.tensor_file import SEAL, CheckpointError, atomic_save, content_digest, read_file
from sunets.models.weights import check_weights, load_trained
from sunets.models.zoo import create_model
from sunets.training.fit import check, fit
from sunets.training.loop import NAME_LENGTH, Trainer, TrainingError

CONFIG = tiny_config(**SUNET, train__epochs=1)


@pytest.fixture(scope="module")
def trained(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished training."""
    folder = tmp_path_factory.mktemp("run")
    fit(CONFIG, manifest, work_dir=folder)
    return folder


def _copy(trained: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("weights.pt", "checkpoint.pt"):
        (target / name).write_bytes((trained / name).read_bytes())
    return target


def _from(path: Path) -> Config:
    return tiny_config(**SUNET, train__epochs=1, train__init_from=str(path))


READERS: dict[str, tuple[str, Callable[[Path, Manifest], Any]]] = {
    "predict": ("weights.pt", lambda path, _: load_trained(path)),
    "evaluate": ("weights.pt", lambda path, manifest: check_weights(path, CONFIG, manifest, "train again")),
    "init_from": ("weights.pt", lambda path, manifest: check(_from(path), manifest)),
    "training": ("checkpoint.pt", lambda path, manifest: fit(CONFIG, manifest, work_dir=path.parent)),
}


def _flip_a_bit_of_a_tensor(path: Path) -> None:
    """Change the lowest bit of a number: it still is one, and torch checks no sum."""
    content = torch.load(path, weights_only=True)
    state = content.get("state_dict") or content["model"]
    raw = bytearray(path.read_bytes())
    largest = max(state.values(), key=lambda tensor: tensor.numel())
    place = raw.find(largest.contiguous().numpy().tobytes())
    assert place > 0
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_is_noticed(reader: str, trained: Path, manifest: Manifest, tmp_path: Path) -> None:
    file, read = READERS[reader]
    path = _copy(trained, tmp_path / "run") / file
    read(path, manifest)
    _flip_a_bit_of_a_tensor(path)
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=rf"{file}: damaged or edited: its content has another SHA-256"):
        read(path, manifest)


@pytest.mark.parametrize("key", ["classes", "mean", "config", "identity"])
def test_an_edited_value_is_noticed(key: str, trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "weights.pt", weights_only=True)
    value = content[key]
    content[key] = {**value, "seed": 9} if isinstance(value, dict) else [*value[1:], value[0]]
    torch.save(content, tmp_path / "edited.pt")
    with pytest.raises(CheckpointError, match=r"edited.pt: damaged or edited"):
        load_trained(tmp_path / "edited.pt")
    del content[SEAL]
    torch.save(content, tmp_path / "edited.pt")
    with pytest.raises(CheckpointError, match=r"edited.pt: lacks the SHA-256"):
        load_trained(tmp_path / "edited.pt")


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("reader", [*READERS, "reference"])
def test_a_file_with_code_is_refused_in_our_own_words(
    reader: str, zipped: bool, manifest: Manifest, tmp_path: Path
) -> None:
    file, read = READERS.get(reader, ("weights.pt", lambda path, _: load_reference_weights(_sunet(), path)))
    path, sign = tmp_path / file, tmp_path / "it-ran"
    content = {"state_dict": Bomb(sign), "config": {}, "classes": [], "identity": {}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"{file}: refused, and nothing in it was run: it holds \w+.mkdir") as e:
        read(path, manifest)
    assert "weights_only" not in str(e.value)
    assert "\n" not in str(e.value)
    assert not sign.exists()
    torch.load(path, weights_only=False)
    assert sign.exists(), "the file would have run it"


def _sunet() -> Any:
    return create_model(**CONFIG.model.arguments(), num_classes=3)


@pytest.mark.parametrize("reader", ["predict", "evaluate", "init_from"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    reader: str, value: float, trained: Path, manifest: Manifest, tmp_path: Path
) -> None:
    content = torch.load(trained / "weights.pt", weights_only=True)
    content.pop(SEAL)
    content["state_dict"]["stem.norm.running_var"][0] = value
    atomic_save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights.pt: stem.norm.running_var holds NaN or infinity; train again"):
        READERS[reader][1](tmp_path / "weights.pt", manifest)


def test_a_file_of_the_authors_without_numbers_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    model = _sunet()
    state = {reference_keys(model)[name]: value for name, value in model.state_dict().items()}
    state["features.conv1.weight"][0] = float("nan")
    torch.save({"state_dict": state}, tmp_path / "released.pth")
    with pytest.raises(CheckpointError, match=r"released.pth: features.conv1.weight holds NaN"):
        check(_from(tmp_path / "released.pth"), manifest)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, manifest: Manifest) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", tmp_path):
        with pytest.raises(CheckpointError, match="no regular file; fetch it"):
            read_file(path, "fetch it")
    with pytest.raises(FileNotFoundError, match=r"pipe.pt: no such file"):
        check(_from(tmp_path / "pipe.pt"), manifest)


def test_the_digest_is_of_the_content_alone() -> None:
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4)
    content = {"a": tensor, "b": [1, 2.5, None, "x"], "c": {0: (True, tensor[0, 0, 0, 0])}}
    same = {**content, "a": tensor.contiguous(memory_format=torch.channels_last)}
    assert content_digest(content) == content_digest(same)
    others = [
        {**content, "a": tensor.double()},
        {**content, "a": tensor.reshape(2, 1, 3, 4)},
        {**content, "b": [1, 2.5, None, "xy"]},
        {**content, "b": (1, 2.5, None, "x")},
        {**content, "c": {0: (1, tensor[0, 0, 0, 0])}},
        {"b": content["b"], "a": tensor, "c": content["c"]},
    ]
    assert len({content_digest(c) for c in [content, *others]}) == 1 + len(others)


def test_a_training_that_ends_in_nan_is_no_result(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a last step that no validated pixel tells of."""
    row = Trainer._row

    def poisoned(trainer: Trainer) -> Any:
        found = row(trainer)
        trainer.model.state_dict()["head.bias"][0] = float("nan")
        return found

    monkeypatch.setattr(Trainer, "_row", poisoned)
    with pytest.raises(TrainingError, match=r"after iteration 3, head.bias holds NaN or infinity; lower train.lr"):
        fit(CONFIG, manifest, work_dir=tmp_path)
    assert not (tmp_path / "weights.pt").exists()


def test_the_reason_of_a_divergence_is_short(tmp_path: Path) -> None:
    manifest = tiny_manifest(tmp_path / "data", train=40)
    items = tuple(dataclasses.replace(i, id=f"{i.id}-{'long ' * 40}") for i in manifest.splits["train"])
    long = dataclasses.replace(manifest, splits={**manifest.splits, "train": items})
    config = tiny_config(train__lr=1e30, train__optimizer="sgd", train__batch_size=20)
    with pytest.raises(TrainingError, match=r"on the images train\d+-.* and 16 more; lower train.lr") as error:
        fit(config, long, work_dir=tmp_path / "run")
    assert len(str(error.value)) < 300 + 4 * NAME_LENGTH


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", None), ("task", "detection"), ("classes", 3), ("classes", "abc"), ("palette", [[300, 0, 0]]),
        ("mean", [0.5]), ("std", ["a", "b", "c"]), ("config", {}), ("config", {"model": {"width": "x"}, "data": {}}),
        ("identity", [1]), ("state_dict", None), ("state_dict", {1: torch.zeros(1)}),
    ],
)  # fmt: skip
def test_weights_of_another_layout_are_named(key: str, value: Any, trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "weights.pt", weights_only=True) | {key: value}
    del content[SEAL]
    if value is None:
        del content[key]
    atomic_save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt: (written by another version|no weights file of this package)"):
        load_trained(tmp_path / "w.pt")


@pytest.mark.parametrize("key", ["identity", "iteration", "history", "model", "optimizer", "sums"])
@pytest.mark.parametrize("value", [None, [1]])
def test_a_checkpoint_of_another_layout_is_named(
    key: str, value: Any, trained: Path, manifest: Manifest, tmp_path: Path
) -> None:
    path = _copy(trained, tmp_path / "run") / "checkpoint.pt"
    content = torch.load(path, weights_only=True) | {key: value}
    del content[SEAL]
    atomic_save(content, path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: written by another version .*; delete it to start"):
        fit(CONFIG, manifest, work_dir=path.parent)

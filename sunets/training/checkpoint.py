"""Files of a training: its lock, checkpoints and weights, and the network that it starts from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sunets.core.config import Config, ModelConfig, derive_seed
from sunets.data import Manifest
from sunets.models.reference import load_reference_weights
from sunets.models.zoo import create_model, head_parameters

LOCK_SECONDS = 10.0
"""How long a training waits for another to leave its directory; a killed one may take a moment to go."""


class CheckpointError(ValueError):
    """A checkpoint or weights file that cannot be used: names the file, what is wrong and the remedy."""


def load_trained(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a weights file that `fit` wrote.

    Returns:
        The network on the CPU in evaluation mode, and task, config (plain), classes, palette, mean, std, data_digest.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, or is no weights file of this package.
    """
    content = read_file(
        Path(path), "train again, or name a weights file, such as outputs/BENCHMARK/weights/MODEL/seed0.pt"
    )
    if not isinstance(content, dict) or not {"state_dict", "config", "classes"} <= content.keys():
        raise CheckpointError(f"{path}: no weights file of this package (those have state_dict, config and classes)")
    arguments = ModelConfig.model_validate(content["config"]["model"]).arguments()
    arguments.pop("weights", None)  # what training started from is not needed any more
    model = create_model(**arguments, task=content["task"], num_classes=len(content["classes"]))
    model.load_state_dict(content.pop("state_dict"))
    return model.eval(), content


def atomic_save(content: Any, path: Path) -> None:
    """Write with `torch.save` such that a reader, or a kill at any moment, sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:  # given a file name, torch would write it into the archive
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def waiting_for(work_dir: Path) -> Iterator[None]:
    """Wait for an equal training to leave the directory: of another study, or of a worker that was given up."""
    if int(os.environ.get("RANK", 0)) != 0:
        yield
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(work_dir / ".job.lock"):
        yield


# Everything below is private to `fit`.


@contextlib.contextmanager
def training_lock(work_dir: Path) -> Iterator[None]:
    """Keep other trainings out of the directory; the system frees it when this process dies."""
    if int(os.environ.get("RANK", 0)) != 0:
        yield
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work_dir / ".lock").acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise CheckpointError(f"{work_dir}: another process is training here; wait for it to end, or stop it") from None
    with lock:
        yield


def read_file(path: Path, remedy: str) -> Any:
    """Load a file of plain values and tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; {remedy}") from None
    except Exception as error:  # a damaged file fails in the archive, the pickle or a tensor, each in its own way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not readable ({reason}); {remedy}") from None


def starting_file(config: Config) -> Path:
    """The file that a training starts from."""
    path = Path(str(config.train.init_from))
    if not path.is_file():
        raise FileNotFoundError(
            f"train.init_from: {path}: no such file; run the training that makes it first, name a checkpoint of the "
            "authors, or set null to start from random weights"
        )
    return path


def build_network(config: Config, manifest: Manifest) -> tuple[nn.Module, str | None]:
    """The network as training starts with it, on the CPU, and a line about what it was initialised from."""
    train = config.train
    torch.manual_seed(derive_seed(config.seed, "init"))
    model = create_model(**config.model.arguments(), task=manifest.task, num_classes=manifest.num_classes)
    note = _initialise(model, config, manifest) if train.init_from else None
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if train.bn_momentum is not None:
                module.momentum = train.bn_momentum
            if train.frozen_bn:
                module.requires_grad_(False)
    return model, note


def _initialise(model: nn.Module, config: Config, manifest: Manifest) -> str:
    """Copy the backbone of `train.init_from`, and its head where the classes are the same.

    Raises:
        CheckpointError, WeightsError: not readable, or of another network; names the first tensor that does not fit.
    """
    path = starting_file(config)
    content = read_file(path, "name a weights file of this package or a released one of the authors")
    if not isinstance(content, dict) or "classes" not in content:
        return f"train.init_from: {path}: {load_reference_weights(model, path)}"
    other, info = load_trained(path)
    state, own = other.state_dict(), model.state_dict()
    backbone, there = _backbone(model), _backbone(other)
    for name in [*(n for n in own if n in backbone), *sorted(there - backbone)]:
        theirs, ours = (list(s[name].shape) if name in s else "absent" for s in (state, own))
        if theirs != ours:
            raise CheckpointError(
                f"train.init_from: {path} holds a {info['config']['model']['name']} that does not fit "
                f"{config.model.name} as configured: {name} is {theirs} there, {ours} here; "
                "name a checkpoint of the same variant"
            )
    head = own.keys() - backbone
    same = info["classes"] == list(manifest.classes) and all(
        name in state and state[name].shape == own[name].shape for name in head
    )
    model.load_state_dict({name: state[name] for name in (own if same else backbone)}, strict=False)
    rest = "the head too, of the same classes" if same else f"{len(head)} tensors of the head kept as initialised"
    return f"train.init_from: {path}: {len(backbone)} backbone tensors loaded; {rest}"


def _backbone(model: nn.Module) -> set[str]:
    """Names of all parameters and buffers outside the head."""
    heads = {name.rpartition(".")[0] for name in head_parameters(model)}
    return {name for name in model.state_dict() if name.rpartition(".")[0] not in heads}

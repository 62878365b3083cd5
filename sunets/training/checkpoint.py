"""Files of a training: lock and weights; and the network that it starts from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sunets.core.config import Config, ModelConfig, Task, derive_seed
from sunets.core.hardware import torchrun_process
from sunets.core.record import shortened
from sunets.data.manifest import Manifest
from sunets.models.initialization import zero_init_
from sunets.models.reference import load_reference_weights
from sunets.models.tensor_file import CheckpointError, check_seal, first_not_finite, read_file
from sunets.models.zoo import create_model, head_parameters

LOCK_SECONDS = 10.0
"""How long a training waits for the lock of its directory; a killed process may take a moment to exit."""

_REMEDY = "train again, or name a weights file, such as outputs/BENCHMARK/weights/MODEL/seed0.pt"
_KEYS = {"state_dict", "config", "classes", "identity"}
_Triple = tuple[float, float, float]
_Byte = Annotated[int, Field(ge=0, le=255)]


class _ScoredAt(BaseModel):
    size: tuple[int, int] | None


class _Config(BaseModel):
    model: ModelConfig
    data: _ScoredAt


class _Weights(BaseModel):
    """What readers of a weights file use of it."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    state_dict: dict[str, Tensor]
    task: Task
    config: _Config
    classes: list[str] = Field(min_length=2)
    palette: list[tuple[_Byte, _Byte, _Byte]]
    mean: _Triple
    std: _Triple
    data_digest: str
    identity: dict[str, Any]


def load_trained(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a weights file that `fit` wrote.

    Returns:
        The network on the CPU in evaluation mode, and a dict of task, config (plain values), classes, palette, mean,
        std, data_digest, and identity (see `run_fingerprint`).

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, holds NaN or infinity, or is no weights file of this package.
    """
    content = read_weights(path)
    arguments = ModelConfig.model_validate(content["config"]["model"]).arguments()
    arguments.pop("weights", None)  # would be downloaded and then replaced
    try:
        model = create_model(**arguments, task=content["task"], num_classes=len(content["classes"]))
        model.load_state_dict(content.pop("state_dict"))
    except (RuntimeError, ValueError) as error:
        fault = shortened(str(error), 200)
        raise CheckpointError(f"{path}: does not fit the network that this code builds ({fault}); {_REMEDY}") from None
    return model.eval(), content


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a weights file that `fit` wrote, without building its network; see `load_trained`."""
    content = read_file(path, _REMEDY)
    if not isinstance(content, dict) or not content.keys() >= _KEYS - {"identity"}:
        raise CheckpointError(f"{path}: no weights file of this package (those have state_dict, config and classes)")
    check_seal(content, Path(path), _REMEDY)
    if missing := _KEYS - content.keys():
        raise CheckpointError(f"{path}: written by an earlier version: it lacks {', '.join(missing)}; train again")
    try:
        _Weights.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        fault = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CheckpointError(f"{path}: written by another version ({shortened(fault, 200)}); train again") from None
    if name := first_not_finite(content["state_dict"]):
        raise CheckpointError(f"{path}: {name} holds NaN or infinity; train again")
    return content


def difference(made_by: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Describe the first key in which two identities of trainings differ; None if they are equal."""
    wanted = json.loads(json.dumps(wanted))
    keys = [key for key in sorted(made_by.keys() | wanted.keys()) if made_by.get(key) != wanted.get(key)]
    if not keys:
        return None
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{keys[0]} is {made_by.get(keys[0])!r} there, {wanted.get(keys[0])!r} here{more}"


@contextlib.contextmanager
def waiting_for(work_dir: Path) -> Iterator[None]:
    """Wait for the same training in another process: of another study, or of a worker considered lost."""
    if torchrun_process()[0] != 0:
        yield
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(work_dir / ".job.lock"):
        yield


# Everything below is private to `fit`.


@contextlib.contextmanager
def training_lock(work_dir: Path) -> Iterator[None]:
    """Lock the directory against other trainings; the operating system releases the lock if this process dies."""
    if torchrun_process()[0] != 0:
        yield
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work_dir / ".lock").acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise CheckpointError(f"{work_dir}: another process is training here; wait for it to end, or stop it") from None
    with lock:
        yield


def starting_file(config: Config) -> Path:
    """Return the path `train.init_from`; FileNotFoundError if there is no such file."""
    path = Path(str(config.train.init_from))
    if not path.is_file():
        raise FileNotFoundError(
            f"train.init_from: {path}: no such file; run the training that makes it first, name a checkpoint of the "
            "authors, or set null to start from random weights"
        )
    return path


def build_network(config: Config, manifest: Manifest) -> tuple[nn.Module, str | None]:
    """Build and initialise the network of a training, on the CPU.

    Returns:
        The network, and a line that says which tensors `train.init_from` gave it, or None.
    """
    train = config.train
    torch.manual_seed(derive_seed(config.seed, "init"))
    model = create_model(**config.model.arguments(), task=manifest.task, num_classes=manifest.num_classes)
    zero_init_(model, residual=train.zero_init_residual, head=train.zero_init_head)
    init_summary = _initialise(model, config, manifest) if train.init_from else None
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if train.bn_momentum is not None:
                module.momentum = train.bn_momentum
            if train.frozen_bn:
                module.requires_grad_(False)
    return model, init_summary


def _initialise(model: nn.Module, config: Config, manifest: Manifest) -> str:
    """Copy the backbone of `train.init_from`, and its head if it has the same classes.

    Raises:
        CheckpointError, WeightsError: unreadable, or of another network; names the first tensor that does not fit.
    """
    path = starting_file(config)
    content = read_file(path, "name a weights file of this package or a released one of the authors")
    if not isinstance(content, dict) or "classes" not in content:
        return f"train.init_from: {path}: {load_reference_weights(model, path)}"
    other, info = load_trained(path)
    loaded, current = other.state_dict(), model.state_dict()
    backbone = _backbone(model)
    for name in [*(n for n in current if n in backbone), *sorted(_backbone(other) - backbone)]:
        theirs, ours = (list(s[name].shape) if name in s else "absent" for s in (loaded, current))
        if theirs != ours:
            raise CheckpointError(
                f"train.init_from: {path} holds a {info['config']['model']['name']} that does not fit "
                f"{config.model.name} as configured: {name} is {theirs} there, {ours} here; "
                "name a checkpoint of the same variant"
            )
    head = current.keys() - backbone
    head_fits = info["classes"] == list(manifest.classes) and all(
        name in loaded and loaded[name].shape == current[name].shape for name in head
    )
    model.load_state_dict({name: loaded[name] for name in (current if head_fits else backbone)}, strict=False)
    rest = "the head too, of the same classes" if head_fits else f"{len(head)} tensors of the head kept as initialised"
    return f"train.init_from: {path}: {len(backbone)} backbone tensors loaded; {rest}"


def _backbone(model: nn.Module) -> set[str]:
    """Return the names of all parameters and buffers outside the head."""
    heads = {name.rpartition(".")[0] for name in head_parameters(model)}
    return {name for name in model.state_dict() if name.rpartition(".")[0] not in heads}

"""The weights file of a training: reading it, and whether it belongs to a configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from sunets.core.config import NOT_IN_IDENTITY, Config, ModelConfig, Task, flatten
from sunets.core.record import shortened
from sunets.data.manifest import Manifest
from sunets.models.tensor_file import CheckpointError, check_seal, first_not_finite, read_file
from sunets.models.zoo import create_model, resolve_config

START = "digest of train.init_from"
"""Key of an identity."""
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


def check_weights(path: Path, config: Config, manifest: Manifest, remedy: str) -> None:
    """Refuse a weights file of another training: another network, seed, recipe or data set.

    Code, libraries and device may differ, so that networks trained on another machine can be scored.

    Raises:
        FileNotFoundError, CheckpointError: it is absent, damaged, or of another training; names the difference.
    """
    identity = read_weights(path)["identity"]
    wanted = decisions(config, manifest)
    if config.train.init_from and Path(config.train.init_from).is_file():
        wanted[START] = start_digest(config)
    else:
        wanted[START] = identity.get(START)
    ignored = {"hash of the code", "libraries", "device", "torch", "train.device"}  # the last two of earlier versions
    made_by = {key: value for key, value in identity.items() if key not in ignored}
    if text := difference(made_by, wanted):
        raise CheckpointError(f"{path}: weights of another training: {text}; {remedy}")


def decisions(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Map dotted name -> value of what a user decides a training by, and the digest of the data.

    The network is stated as it is built, so that a value that is written out and the same value by default are one.
    """
    flat = {k: v for k, v in flatten(resolve_config(config)).items() if not k.startswith(NOT_IN_IDENTITY)}
    return flat | {"digest of the data": manifest.digest}


def starting_file(config: Config) -> Path:
    """Return the path `train.init_from`; FileNotFoundError if there is no such file."""
    path = Path(str(config.train.init_from))
    if not path.is_file():
        raise FileNotFoundError(
            f"train.init_from: {path}: no such file; run the training that makes it first, name a checkpoint of the "
            "authors, or set null to start from random weights"
        )
    return path


def start_digest(config: Config) -> str:
    """Return the SHA-256 of the file `train.init_from`."""
    return hashlib.sha256(starting_file(config).read_bytes()).hexdigest()

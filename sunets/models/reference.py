"""The authors' released checkpoints: safe reading, and their parameter names as ours.

A released file is a dict with `state_dict` (names prefixed `module.`), `epoch`, `best_prec1` and `optimizer`. Only
tensors and plain values are read (`weights_only=True`); a file that holds code is refused, and none of it is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from sunets.models.structure import VARIANTS
from sunets.models.sunet import SUNet, sunet
from sunets.models.tensor_file import CheckpointError, first_not_finite, read_file

_FEATURES = (
    (r"stem\.conv\.", r"conv1."),
    (r"stem\.norm\.", r"residual1.bn.0."),
    (r"stem\.shortcut\.", r"residual1.shortcut.0."),
    (r"stem\.reduce\.", r"residual1.conv.0."),
    (r"stem\.expand\.norm\.", r"residual1.conv.2."),
    (r"stem\.expand\.conv\.", r"residual1.conv.4."),
    (r"norm\.", r"bn2."),
)
_UNET = (
    (r"shortcut\.", r"upsample.conv0."),
    (r"reduce\.", r"down.0.conv0."),
    (r"downs\.(\d+)\.0\.norm\.", r"down.\1.bn1."),
    (r"downs\.(\d+)\.0\.conv\.", r"down.\1.conv1."),
    (r"downs\.(\d+)\.1\.norm\.", r"down.\1.bn2."),
    (r"downs\.(\d+)\.1\.conv\.", r"down.\1.conv2."),
    (r"ups\.(\d+)\.0\.norm\.", r"up.\1.bn0."),
    (r"ups\.(\d+)\.0\.conv\.", r"up.\1.deconv0."),
    (r"ups\.(\d+)\.1\.norm\.", r"up.\1.bn1."),
    (r"ups\.(\d+)\.1\.conv\.", r"up.\1.deconv1."),
    (r"expand\.norm\.", r"up.0.bn2."),
    (r"expand\.conv\.", r"up.0.conv2."),
)
_DEGRIDDING = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3"}


class WeightsError(CheckpointError):
    """A checkpoint of the authors cannot be used; names the file, the key and the reason."""


@dataclass(frozen=True)
class LoadReport:
    """Result of `load_reference_weights`."""

    loaded: tuple[str, ...]
    """The authors' keys whose values were copied."""
    left_out: tuple[str, ...]
    """The authors' keys that the model lacks: a classifier's linear layer, in a segmentation network."""
    untouched: tuple[str, ...]
    """The model's parameters and buffers that kept their values: the head, if a classifier gave the backbone."""
    epoch: int | None
    """The epoch that the file states."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        parts += [f"kept as they were: {', '.join(self.untouched)}"] if self.untouched else []
        return "; ".join(parts)


def reference_keys(model: SUNet) -> dict[str, str]:
    """Map each name in `model.state_dict()` to the authors' name, in order."""
    return {name: _reference_key(model, name) for name in model.state_dict()}


def _reference_key(model: SUNet, name: str) -> str:
    if name.startswith("head."):
        rest = name.removeprefix("head.")
        if model.config.head == "classifier":
            return f"linear.{rest}"
        if model.config.head == "linear":
            return f"final.conv1.{rest}"
        layer, rest = rest.split(".", 1)
        return f"final.{_DEGRIDDING[layer]}.{rest}"
    unet = re.match(r"stages\.(\d+)\.(\d+)\.", name)
    if unet is None:
        return "features." + _translate(_FEATURES, name)
    stage, block = (int(number) for number in unet.groups())
    prefix, rest = f"features.unet{stage + 1}_{block}.", name[unet.end() :]
    if rest.startswith("norm."):  # under another name where the U-Net changes the number of channels
        changes = cast(Any, model.stages)[stage][block].shortcut is not None
        return prefix + ("bn.bn0." if changes else "down.0.bn0.") + rest.removeprefix("norm.")
    return prefix + _translate(_UNET, rest)


def _translate(table: tuple[tuple[str, str], ...], name: str) -> str:
    for ours, theirs in table:
        if match := re.match(ours, name):
            return match.expand(theirs) + name[match.end() :]
    raise KeyError(name)


def load_reference_weights(model: nn.Module, source: str | PathLike[str] | Mapping[str, Any]) -> LoadReport:
    """Load a checkpoint of the authors' code into a SUNet.

    A classifier's checkpoint fits a classifier, or the backbone of a segmentation network, whose head keeps its values;
    a segmentation checkpoint fits a segmentation network with the same head. Output stride and dilation may differ:
    they do not change the weights. The model is changed only after every key has been checked.

    Args:
        model: a SUNet of this package.
        source: a file as the authors save it, its content, or a state dict; names with or without `module.`.

    Raises:
        WeightsError: the file is damaged, holds code, NaN or infinity, or a key is unknown, missing or of another
            shape.
        FileNotFoundError: no such file.
    """
    if not isinstance(model, SUNet):
        raise WeightsError(f"model: the authors' checkpoints are for SUNets, not for {type(model).__name__}")
    name = "state dict" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else _read(name)
    epoch = content.get("epoch")
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(f"{name}: state_dict: a dict of tensors is expected, not {type(state).__name__}")
    state = {str(key).removeprefix("module."): value for key, value in state.items()}

    current = model.state_dict()
    names = {theirs: ours for ours, theirs in reference_keys(model).items()}
    backbone_only = model.task == "segmentation" and "linear.weight" in state
    left_out = [key for key in state if backbone_only and key in ("linear.weight", "linear.bias")]
    wanted = {theirs: ours for theirs, ours in names.items() if not (backbone_only and theirs.startswith("final."))}
    for key, value in state.items():
        if key in left_out:
            continue
        if key not in wanted:
            raise WeightsError(f"{name}: unknown key {key!r}{_advice(model, state)}")
        if not isinstance(value, Tensor):
            raise WeightsError(f"{name}: {key}: a tensor is expected, not {type(value).__name__}")
        if value.shape != current[wanted[key]].shape:
            raise WeightsError(
                f"{name}: {key} has shape {list(value.shape)}, the model needs {list(current[wanted[key]].shape)}"
                f"{_advice(model, state)}"
            )
    for key in wanted:
        if key not in state and not key.endswith("num_batches_tracked"):  # PyTorch before 0.4.1 did not save it
            raise WeightsError(f"{name}: {key} is missing{_advice(model, state)}")

    if key := first_not_finite({key: value for key, value in state.items() if key in wanted}):
        raise WeightsError(f"{name}: {key} holds NaN or infinity; fetch it again, or use another checkpoint")

    loaded = {wanted[key]: value for key, value in state.items() if key in wanted}
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        loaded=tuple(key for key in state if key in wanted),
        left_out=tuple(left_out),
        untouched=tuple(key for key in current if key not in loaded and not key.endswith("num_batches_tracked")),
        epoch=epoch if isinstance(epoch, int) else None,
    )


def _read(path: str) -> Mapping[str, Any]:
    content = read_file(path, "fetch it again, or use one that holds only weights and plain values", WeightsError)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: a dict with state_dict is expected, not {type(content).__name__}")
    return content


def _advice(model: SUNet, state: Mapping[str, Any]) -> str:
    """Say, at the end of an error message, which kind of checkpoint this is, if not one for `model`."""
    if not {"features.conv1.weight", "features.bn2.weight"} <= state.keys():
        return "; this is no checkpoint of the authors' code"
    if "linear.weight" not in state and model.task == "classification":
        return "; a classifier cannot be loaded from a segmentation checkpoint"
    given = {key: value.shape for key, value in state.items() if isinstance(value, Tensor)}
    for name in VARIANTS:
        with torch.device("meta"):
            shapes = _backbone_shapes(sunet(name, num_classes=1))
        if shapes != _backbone_shapes(model) and shapes.items() <= given.items():
            return f"; the checkpoint is one of {name}, the model is another network"
    return ""


def _backbone_shapes(model: SUNet) -> dict[str, torch.Size]:
    state = model.state_dict()
    shapes = {theirs: state[ours].shape for ours, theirs in reference_keys(model).items()}
    return {k: v for k, v in shapes.items() if k.startswith("features.") and not k.endswith("num_batches_tracked")}

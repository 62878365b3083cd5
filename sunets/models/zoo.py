"""Every network by name: SUNets and the baselines, one `create_model`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn

from sunets.core.config import Config, ModelConfig
from sunets.models import baselines, libraries
from sunets.models.structure import HEADS, VARIANTS, SUNetConfig
from sunets.models.sunet import sunet

M = TypeVar("M", bound=ModelConfig)


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    tasks: tuple[str, ...] = ("segmentation",)
    options: tuple[str, ...] = ()
    """Accepted overrides besides in_channels and output_stride."""
    published: bool = False
    """Whether its library publishes weights."""


_SUNET_OPTIONS = tuple(
    f.name for f in fields(SUNetConfig) if f.name not in ("num_classes", "in_channels", "output_stride", "head")
)

_MODELS: dict[str, _Entry] = {
    **{name: _Entry(sunet, tuple(HEADS), _SUNET_OPTIONS) for name in VARIANTS},
    **{
        name: _Entry(libraries.dilated_resnet, published=True)
        for name in ("dilated_resnet18", "dilated_resnet50", "dilated_resnet101")
    },
    **{
        name: _Entry(libraries.torchvision_segmentation, published=True)
        for name in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_resnet101", "lraspp_mobilenet_v3_large")
    },
    **{
        name: _Entry(libraries.smp_segmentation, published=True)
        for name in ("unet_resnet34", "deeplabv3plus_resnet50", "segformer_b0", "segformer_b2")
    },
    **{
        name: _Entry(libraries.torchvision_classification, ("classification",), published=True)
        for name in ("resnet18", "resnet50", "resnet101", "densenet161", "densenet201")
    },
    "unet_small": _Entry(baselines.unet_small, options=("width", "unet_depth")),
    "dilated_resnet_small": _Entry(baselines.dilated_resnet_small, options=("width", "num_blocks")),
    "plain_conv_small": _Entry(baselines.plain_conv_small, options=("width", "num_blocks")),
}


def list_models(task: str | None = None) -> list[str]:
    """List the names that `create_model` accepts: all, or those for one task (segmentation, classification)."""
    if task is not None and task not in HEADS:
        raise ValueError(f"task: one of {', '.join(HEADS)}, not {task!r}")
    return [name for name, entry in _MODELS.items() if task is None or task in entry.tasks]


def create_model(
    name: str,
    *,
    task: str = "segmentation",
    num_classes: int,
    output_stride: int | None = None,
    head: str | None = None,
    weights: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a network on the current default device; nothing is downloaded unless `weights` is given.

    Args:
        name: one of `list_models()`.
        task: segmentation or classification.
        num_classes: channels of the logits.
        output_stride: input size over the size of the last features; None is the network's default (of a SUNet, its
            natural stride).
        head: segmentation head of a SUNet: linear (the default) or degridding.
        weights: published weights by their library's name (torchvision: IMAGENET1K_V2, COCO_WITH_VOC_LABELS_V1;
            segmentation-models-pytorch: imagenet), which are downloaded.
        overrides: in_channels for every network; other fields of `SUNetConfig` for SUNets; width and unet_depth or
            num_blocks for the small baselines.

    Returns:
        A module that maps (B, in_channels, H, W), H and W of at least 16 pixels, to logits: (B, num_classes, H, W), or
        (B, num_classes) for classification. It has the attributes task, num_classes, output_stride and structure.

    Raises:
        ValueError: the network cannot be built; names the field and what is allowed.
    """
    if name not in _MODELS:
        raise ValueError(f"name: one of {', '.join(_MODELS)}, not {name!r}")
    entry = _MODELS[name]
    if task not in entry.tasks:
        raise ValueError(f"task: {' or '.join(entry.tasks)} for {name}, not {task!r}")
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(f"num_classes: an integer of at least 1, not {num_classes!r}")
    allowed = ("in_channels", *entry.options)
    for key in overrides:
        if key not in allowed:
            raise ValueError(f"{key}: no option of {name}; there are output_stride, {', '.join(allowed)}")
    in_channels = overrides.get("in_channels", 3)
    if type(in_channels) is not int or in_channels < 1:
        raise ValueError(f"in_channels: an integer of at least 1, not {in_channels!r}")
    if name in VARIANTS:
        overrides["head"] = head
    elif head is not None:
        raise ValueError(f"head: chosen for SUNets only; {name} has one head, so leave it out, not {head!r}")
    if entry.published:
        overrides["weights"] = weights
    elif weights is not None:
        also = "; the authors' checkpoints are read by sunets.models.reference.load_reference_weights" * (
            name in VARIANTS
        )
        raise ValueError(f"weights: none are published for {name}, so leave it out, not {weights!r}{also}")
    return entry.build(name, task=task, num_classes=num_classes, output_stride=output_stride, **overrides)


def head_parameters(model: nn.Module) -> set[str]:
    """Return the names of the head's parameters; the others belong to the backbone."""
    prefixes: Any = model.head_prefixes
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def resolve(model: M, task: str) -> M:
    """Return a copy in which the named network's values replace None; None is left where it has no such field.

    Raises:
        ValueError: the network cannot be built.
    """
    arguments = {key: value for key, value in model.arguments().items() if key != "weights"}
    structure = _structure(json.dumps(arguments), task)
    return model.model_copy(update={k: v for k, v in structure.items() if k in ModelConfig.model_fields})


def resolve_config(config: Config) -> Config:
    """Return the configuration with its network resolved, as records state it; see `resolve`."""
    return config.model_copy(update={"model": resolve(config.model, config.data.task)})


@functools.cache
def _structure(arguments: str, task: str) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        structure: Any = create_model(**json.loads(arguments), task=task, num_classes=2).structure
    return dict(structure)

"""Starts at zero: residual branches that begin as their shortcut, heads that begin with equal logits."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation.lraspp import LRASPPHead

from sunets.core.config import ModelConfig
from sunets.models.sunet import UNet
from sunets.models.zoo import create_model


def zero_init_(model: nn.Module, *, residual: bool, head: bool) -> None:
    """Set the last layer of each residual branch, or of the head, to zero in place; no random number is drawn.

    Args:
        model: a network that `create_model` built.
        residual: weight and bias of the layer that ends each residual branch: in a SUNet the convolution `expand` of
            every U-Net, in a ResNet the last BatchNorm of every block (torchvision's zero_init_residual), in a
            SegFormer the projections. Each block starts as its shortcut.
        head: weight and bias of the layer that gives the logits, so that all classes start equally probable.

    Raises:
        ValueError: `residual` for a network without residual branches.
    """
    layers = _logit_layers(model) if head else []
    if residual:
        ends = _branch_ends(model)
        if not ends:
            raise ValueError("zero_init_residual: false for a network without residual branches")
        layers += ends
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            nn.init.zeros_(parameter)


def has_residual_branches(model: ModelConfig, task: str) -> bool:
    """Say whether `train.zero_init_residual` is possible: not without residual branches, nor with published weights.

    Args:
        model: the network; built on the meta device, so that nothing is computed or downloaded.
        task: segmentation or classification.

    Raises:
        ValueError: it cannot be built.
    """
    return model.weights is None and _has_branches(json.dumps(model.arguments()), task)


@functools.cache
def _has_branches(arguments: str, task: str) -> bool:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return bool(_branch_ends(create_model(**json.loads(arguments), task=task, num_classes=2)))


def _branch_ends(model: nn.Module) -> list[nn.Module]:
    """Return the last layer with parameters of every residual branch."""
    ends: list[nn.Module] = []
    module: Any
    for module in model.modules():
        if isinstance(module, UNet):
            ends.append(module.expand.conv)
        elif isinstance(module, BasicBlock):
            ends.append(module.bn2)
        elif isinstance(module, Bottleneck):
            ends.append(module.bn3)
        elif isinstance(module, InvertedResidual) and module.use_res_connect:
            ends.append(module.block[-1][1])
        elif type(module).__module__.endswith("encoders.mix_transformer") and type(module).__name__ == "Block":
            ends += [module.attn.proj, module.mlp.fc2]  # of segmentation-models-pytorch, an optional package
    return ends


def _logit_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose output, or the sum of whose outputs, is the logits."""
    prefixes: Any = model.head_prefixes
    layers: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, LRASPPHead):
            return [module.low_classifier, module.high_classifier]
        if f"{name}.".startswith(prefixes) and isinstance(module, nn.Conv2d | nn.Linear):
            layers = [module]
    return layers

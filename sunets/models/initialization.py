"""The network that a training starts from: random weights, layers that start at zero, or `train.init_from`."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation.lraspp import LRASPPHead

from sunets.core.config import Config, ModelConfig, derive_seed
from sunets.data.manifest import Manifest
from sunets.models.reference import load_reference_weights
from sunets.models.sunet import UNet
from sunets.models.tensor_file import CheckpointError, read_file
from sunets.models.weights import load_trained, starting_file
from sunets.models.zoo import create_model, head_parameters

# Of the images that all published weights were trained on, 0..1.
_PUBLISHED_MEAN = (0.485, 0.456, 0.406)
_PUBLISHED_STD = (0.229, 0.224, 0.225)


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


def match_normalisation_(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Make a network with published weights take images normalised by `mean` and `std` instead of ImageNet's, in place.

    The first convolution is scaled; the constant that it then lacks goes into its bias, or out of the running mean of
    the BatchNorm after it. The network computes the same, but that zero padding now has the colour `mean`.

    Args:
        model: a network with published weights, not trained further.
        mean: RGB mean, 0..1, of the images that it is to take.
        std: RGB standard deviation.

    Raises:
        ValueError: its first convolution does not take RGB, or has neither a bias nor a BatchNorm after it.
    """
    leaves = [module for module in model.modules() if not list(module.children())]
    first = next((index for index, module in enumerate(leaves) if isinstance(module, nn.Conv2d)), len(leaves))
    conv, norm = [*leaves[first:], None, None][:2]
    shifted = None
    if isinstance(conv, nn.Conv2d) and conv.in_channels == 3:
        shifted = conv.bias
        if shifted is None and isinstance(norm, _BatchNorm):
            shifted = norm.running_mean
    if not isinstance(conv, nn.Conv2d) or shifted is None:
        raise ValueError(
            "weights: published ones are for a network whose first convolution takes RGB and has a bias or a BatchNorm "
            "after it; leave them out"
        )
    ours, theirs = (
        [torch.tensor(values, dtype=torch.float64) for values in pair]
        for pair in ((mean, std), (_PUBLISHED_MEAN, _PUBLISHED_STD))
    )
    with torch.no_grad():
        weight = conv.weight.double()
        shift = weight.sum((2, 3)) @ ((ours[0] - theirs[0]) / theirs[1])
        conv.weight.copy_(weight * (ours[1] / theirs[1]).view(1, 3, 1, 1))
        shifted.copy_(shifted.double() + (-shift if conv.bias is None else shift))


def build_network(config: Config, manifest: Manifest) -> tuple[nn.Module, str | None]:
    """Build and initialise the network of a training, on the CPU.

    Returns:
        The network, and a line that says which tensors `train.init_from` gave it, or None.
    """
    train = config.train
    torch.manual_seed(derive_seed(config.seed, "init"))
    model = create_model(**config.model.arguments(), task=manifest.task, num_classes=manifest.num_classes)
    if config.model.weights is not None:
        match_normalisation_(model, manifest.mean, manifest.std)
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

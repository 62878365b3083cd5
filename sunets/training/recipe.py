"""Learning rate, parameter groups and class weights of a training, and a check of its smallest forward pass."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from sunets.core.config import Config, ConfigError, TrainConfig
from sunets.data.manifest import Manifest
from sunets.models.zoo import head_parameters
from sunets.training.distributed import world_size


def lr_factor(iteration: int, train: TrainConfig, iterations_per_epoch: int) -> float:
    """Return the learning rate of an iteration (from 0), relative to the peak.

    Linear warm-up to 1, then the schedule over the other iterations; `step` counts its epochs from the start.
    """
    total, warmup = train.epochs * iterations_per_epoch, round(train.warmup_epochs * iterations_per_epoch)
    if iteration < warmup:
        return (iteration + 1) / warmup
    done = (iteration - warmup) / (total - warmup)
    match train.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "poly":
            return (1 - done) ** train.poly_power
        case "step":
            return train.step_gamma ** (iteration // (train.step_epochs * iterations_per_epoch))
        case _:
            return 1.0


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Return the authors' four groups, split further if norms and biases are exempt from weight decay.

    The backbone has the base learning rate, head weights and norms `head_lr_multiplier` times it, head biases
    `head_bias_lr_multiplier` times it. Frozen parameters are in no group.

    Returns:
        Dicts with name, params, lr_multiplier and weight_decay, for `torch.optim`; no group is empty.
    """
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm)
        for p in module.parameters(recurse=False)
    }
    head = head_parameters(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bias = name.endswith("bias") and id(parameter) not in norms
        group = f"{'head' if name in head else 'backbone'}.{'biases' if bias else 'weights'}"
        multiplier = {"head.weights": train.head_lr_multiplier, "head.biases": train.head_bias_lr_multiplier}
        decay = train.decay_norm_and_bias or parameter.ndim > 1
        entry = groups.setdefault(
            group if decay else f"{group}.no_decay",
            {"params": [], "lr_multiplier": multiplier.get(group, 1.0), "weight_decay": train.weight_decay * decay},
        )
        entry["params"].append(parameter)
    return [{"name": name, **groups[name]} for name in sorted(groups)]


def class_weights(config: Config, manifest: Manifest) -> tuple[float, ...] | None:
    """Return the weights of the cross entropy, one per class, or None; see `TrainConfig.class_weights`.

    A class that is absent from the training split weighs 1.
    """
    setting, split = config.train.class_weights, config.data.train_split
    if setting is None or isinstance(setting, tuple):
        return setting
    pixels = manifest.class_pixels[split]
    # Weights depend only on ratios of frequencies: a total that all classes share may be 1.
    totals = manifest.image_pixels[split] if setting == "median_frequency" else [1] * len(pixels)
    frequencies = [count / total if count else None for count, total in zip(pixels, totals, strict=True)]
    median = statistics.median([frequency for frequency in frequencies if frequency] or [1])
    return tuple(median / frequency if frequency else 1.0 for frequency in frequencies)


def input_size(config: Config, manifest: Manifest) -> tuple[int, int]:
    """Return (height, width) of the smallest image of this training."""
    if config.train.augment.resized_crop is not None:
        return (config.train.augment.resized_crop, config.train.augment.resized_crop)
    if (given := config.train.augment.crop or config.data.size) is not None:
        return given
    items = manifest.splits[config.data.train_split]
    return (min(item.height for item in items), min(item.width for item in items))


def check_batch_norm(model: nn.Module, config: Config, manifest: Manifest) -> None:
    """Refuse forward passes so small that a BatchNorm gets one value per channel, which has no variance.

    Args:
        model: on the meta device; nothing is computed.
        config: the whole configuration.
        manifest: the prepared data set.

    Raises:
        ConfigError: names the key to change.
    """
    train, processes = config.train, world_size()
    per_process = train.batch_size // processes
    images = min(train.micro_batch_size or per_process, per_process)
    if images > 1 or train.frozen_bn or (train.sync_bn and processes > 1):
        return
    height, width = input_size(config, manifest)
    key = "train.micro_batch_size" if train.micro_batch_size else "train.batch_size"

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            raise ConfigError(
                f"{key}: with one image per forward pass, a BatchNorm of {config.model.name} gets a single value per "
                f"channel at {height} x {width} pixels, which has no variance; use at least 2 images per pass (and "
                "process), or set train.frozen_bn"
            )

    hooks = [m.register_forward_pre_hook(check) for m in model.modules() if isinstance(m, _BatchNorm)]
    model.train()
    try:
        with torch.no_grad():
            model(torch.empty(1, config.model.in_channels or 3, height, width, device="meta"))
    finally:
        model.eval()
        for hook in hooks:
            hook.remove()

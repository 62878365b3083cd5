"""The recipe in numbers: learning rate, parameter groups, class weights, and how images are scored."""

from __future__ import annotations

import math
import statistics
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from sunets.core.config import Config, TrainConfig
from sunets.data import Manifest, make_dataset
from sunets.data.loading import ImageDataset
from sunets.models.zoo import head_parameters


def lr_factor(iteration: int, train: TrainConfig, iterations_per_epoch: int) -> float:
    """Learning rate of one iteration (from 0) as a share of the peak.

    Linear warm-up to 1, then the schedule over what is left; the drops of `step` are counted from the start.
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
    """The authors' four groups, split again where norms and biases are exempt from weight decay.

    Backbone weights and biases learn at the base rate, head weights and norms at `head_lr_multiplier` times it, head
    biases at `head_bias_lr_multiplier` times it. Parameters without gradient (frozen BatchNorm) are in no group.

    Returns:
        Dicts with name, params, lr_multiplier and weight_decay, for `torch.optim`; empty groups are left out.
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
    """Weights of the cross entropy, one a class, or None.

    `median_frequency` is the median of the classes' pixel counts (classification: images) over each class's own (after
    Eigen and Fergus, 2015, who count a class's share within the images that show it); an absent class weighs 1.
    """
    setting = config.train.class_weights
    if setting is None or isinstance(setting, tuple):
        return setting
    pixels = manifest.class_pixels[config.data.train_split]
    median = statistics.median([count for count in pixels if count] or [1])
    return tuple(median / count if count else 1.0 for count in pixels)


def scoring_dataset(manifest: Manifest, split: str, config: Config) -> ImageDataset:
    """A split as it is scored: no random change; classifiers that train on random crops see the centre crop."""
    crop = config.train.augment.resized_crop if manifest.task == "classification" else None
    return make_dataset(manifest, split, config.data, None, 0, center_crop=crop)

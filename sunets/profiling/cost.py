"""The exact cost of one network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sunets.core.config import ModelConfig, flatten
from sunets.models.sunet import MIN_SIZE, SUNet
from sunets.models.zoo import create_model, resolve
from sunets.profiling.memory import saved_bytes, to_mib
from sunets.profiling.modes import Figures, Size, input_channels, usual_algorithms
from sunets.profiling.multiply_adds import CONV_AND_LINEAR, Uncounted, audit, compare_with_formula, count_macs
from sunets.profiling.receptive_field import receptive_field


@usual_algorithms()
def cost(arguments: Mapping[str, Any], *, size: Size, batch_size: int = 1) -> Figures:
    """Count and audit the exact figures of one network.

    Args:
        arguments: keyword arguments of `create_model`; `weights` is ignored, since it does not affect the cost.
        size: (height, width) of the input in pixels.
        batch_size: images of the input.

    Returns:
        cost.params_m: parameters in millions.
        cost.output_stride: input size over the size of the last features.
        cost.gmacs, cost.gflops: multiply-adds of a forward pass in 10^9, and twice that.
        cost.gmacs_attention: those in products of two activations.
        cost.gmacs_forward_backward: those of a forward and backward pass with gradients of all parameters.
        cost.uncounted_operators: operators of the forward pass without a formula in any counter.
        memory.saved_mib, memory.saved_mib_memory_efficient: see `saved_bytes`; the second for SUNets only.

    Raises:
        ValueError: the network cannot be built, or the size is too small.
        AuditError: two counts differ by more than 0.1 %.
    """
    check_size(size)
    model = build(arguments)
    params = sum(parameter.numel() for parameter in model.parameters())
    audit(model)

    shape = (batch_size, input_channels(model), *size)
    model = model.to("meta").eval()
    x = torch.zeros(shape, device="meta")
    uncounted = Uncounted()
    with uncounted:
        counts = count_macs(model, x)
    compare_with_formula(model, counts, x)
    forward = counts[""]
    gmacs = sum(forward.values()) / 1e9
    efficient = None
    if isinstance(model, SUNet):
        config = model.config
        model.config = dataclasses.replace(config, memory_efficient=True)
        efficient = to_mib(saved_bytes(model, x))
        model.config = dataclasses.replace(config, memory_efficient=False)
    return {
        "cost.params_m": params / 1e6,
        "cost.output_stride": int(cast(int, model.output_stride)),
        "cost.gmacs": gmacs,
        "cost.gflops": 2 * gmacs,
        "cost.gmacs_attention": sum(n for op, n in forward.items() if op not in CONV_AND_LINEAR) / 1e9,
        "cost.gmacs_forward_backward": sum(count_macs(model, x, backward=True)[""].values()) / 1e9,
        "cost.uncounted_operators": ", ".join(sorted(uncounted.names)),
        "memory.saved_mib": to_mib(saved_bytes(model, x)),
        "memory.saved_mib_memory_efficient": efficient,
    }


def cost_parameters(settings: Mapping[str, Any], model: ModelConfig, task: str) -> dict[str, Any]:
    """Return the flat parameters of a cost or speed record: settings of the measurement and the resolved structure."""
    resolved = flatten(resolve(model, task))
    return {f"cost.{k}": v for k, v in settings.items()} | {f"model.{k}": v for k, v in resolved.items()}


def build(arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network with the weights of seed 0, without published ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(**{key: value for key, value in arguments.items() if key != "weights"})


def check_size(size: Size) -> None:
    """Raise ValueError where an input is too small."""
    if min(size) < MIN_SIZE:
        raise ValueError(f"size: height and width of at least {MIN_SIZE} pixels, not {size[0]} x {size[1]}")


def measure_cost(
    arguments: Mapping[str, Any],
    *,
    size: Size,
    batch_size: int = 1,
    receptive_field_seeds: int = 0,
    receptive_field_images: int = 2,
) -> tuple[Figures, NDArray[np.float32] | None]:
    """Count the cost of a network; with `receptive_field_seeds`, also measure its receptive field.

    Args:
        arguments: keyword arguments of `create_model`.
        size: (height, width) of the input in pixels.
        batch_size: images whose multiply-adds and memory are counted.
        receptive_field_seeds: initialisations that the effective field is averaged over; 0 skips it.
        receptive_field_images: random images per initialisation.

    Returns:
        The figures of `cost` and `receptive_field`, and the map of the effective field (H, W) or None.
    """
    figures = cost(arguments, size=size, batch_size=batch_size)
    if not receptive_field_seeds:
        return figures, None
    plain = {key: value for key, value in arguments.items() if key != "weights"}
    field_figures, gradient = receptive_field(
        lambda: create_model(**plain), size, seeds=receptive_field_seeds, images=receptive_field_images
    )
    return figures | field_figures, gradient

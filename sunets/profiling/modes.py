"""Types of the figures, and temporary settings of torch and networks while they are measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

Size: TypeAlias = tuple[int, int]
Figures: TypeAlias = dict[str, float | int | str | None]


def input_channels(model: nn.Module) -> int:
    """Return the input channels of a network: those of its first convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError(f"{type(model).__name__} has no convolution, so its input channels are unknown")


@contextlib.contextmanager
def usual_algorithms() -> Iterator[None]:
    """Temporarily restore PyTorch's default choice of kernels.

    `torch.use_deterministic_algorithms`, which a training sets, replaces some operators on all devices but the CPU,
    including the meta device, so that counts would differ between devices.
    """
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


@contextlib.contextmanager
def switched_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Temporarily switch a network to training or evaluation mode.

    In training mode, a BatchNorm layer that sees a single value per channel (the pooled image of DeepLab at batch size
    1) runs in evaluation mode: PyTorch refuses it, since one value has no variance.
    """
    before = {module: module.training for module in model.modules()}

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        module.training = training and args[0].numel() > args[0].shape[1]

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(check) for norm in norms if training]
    model.train(training)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in before.items():
            module.training = mode


@torch.no_grad()
def modes_in_training(model: nn.Module, x: Tensor) -> dict[nn.Module, bool]:
    """Return the mode that `switched_mode` gives every module on an input; with it, a timing needs no hooks."""
    with switched_mode(model, training=True):
        model(x)
        return {module: module.training for module in model.modules()}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Temporarily compute float32 without TF32, as trainings do; convolutions on GPUs use it by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before

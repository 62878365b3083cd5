"""Receptive fields: which pixels can, and which do, move a logit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sunets.core.config import derive_seed
from sunets.profiling.modes import Figures, Size, input_channels, switched_mode

CALIBRATION_IMAGES = 8
"""Images whose statistics a fresh network's BatchNorm layers hold while its effective field is measured."""
MASS = 0.95
"""Part of the input gradient that the effective receptive field holds."""


def _centre_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Sizes (B,H,W) of the gradient of the centre pixel's logits (or the logits, of a classifier) by each pixel."""
    x = x.detach().requires_grad_()
    logits = model(x)
    if logits.dim() == 4:
        logits = logits[:, :, logits.shape[2] // 2, logits.shape[3] // 2]
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    return gradient.abs().sum(1)


_TO_IDENTITY = {
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.hardswish, F.silu, F.gelu,
    F.leaky_relu, F.batch_norm, F.layer_norm, F.group_norm,
}  # fmt: skip

_POOL = ("input", "kernel_size", "stride", "padding")


class _Positive(TorchFunctionMode):
    """Makes a network's gradient by its input positive wherever there is a path, given positive weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TO_IDENTITY:
            return args[0]
        if func is F.hardsigmoid:
            return torch.sigmoid(args[0])
        if func in (F.max_pool2d, torch.max_pool2d):
            given = dict(zip(_POOL, args, strict=False)) | kwargs
            return F.avg_pool2d(**{k: given[k] for k in (*_POOL, "ceil_mode") if given.get(k) is not None})
        return func(*args, **kwargs)


def theoretical_field(model: nn.Module, size: Size) -> NDArray[np.bool_]:
    """The pixels (H,W) that can have an influence on the logits of the centre pixel.

    Exact for any network of convolutions, norms, activations, pooling and resampling: weights become positive,
    activations and norms the identity and maxima means, so that no two paths cancel; what then has a gradient is the
    field. It ends at the image's border.

    Args:
        model: network; stays as it is.
        size: (height, width) of the input in pixels.
    """
    # Double precision: at the border of a deep network's field the gradient is too small for single precision.
    model = copy.deepcopy(model).eval().double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            spread = parameter.abs() / parameter.abs().max().clamp(min=1e-300)  # equal weights cancel in a softmax
            parameter.copy_((1 + spread) / parameter[0].numel())
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    with _Positive():
        gradient = _centre_gradient(model, torch.full((1, input_channels(model), *size), 1e-3, dtype=torch.float64))
    return (gradient[0] > 0).numpy()


def natural_noise(count: int, channels: int, size: Size, generator: torch.Generator) -> Tensor:
    """Random images (count,channels,H,W), float64, of mean 0 and variance 1, whose amplitude falls as 1/frequency.

    So does that of photographs (Field, 1987, doi:10.1364/JOSAA.4.002379). White noise would not do: what a network
    averages over a region would then be the same everywhere.
    """
    white = torch.randn(count, channels, *size, generator=generator, dtype=torch.float64)
    rows, columns = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]
    frequency = torch.hypot(rows, columns).clamp(min=1 / max(size))
    images = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=size)
    return images / images.std()


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Give a fresh network's BatchNorm layers the statistics of these images (B,C,H,W), in place of 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # running statistics become those of the batch
    with switched_mode(model, training=True), torch.no_grad():
        model(images)


def effective_map(model: nn.Module, images: Tensor) -> NDArray[np.float64]:
    """How much each pixel moves the logits of the centre pixel: mean over images of the absolute gradient (H,W).

    Luo et al., "Understanding the effective receptive field in deep convolutional neural networks" (NeurIPS 2016).
    In evaluation mode: in training mode every pixel moves the statistics of the batch, and through them every logit.

    Args:
        model: network, trained or calibrated.
        images: images (B,C,H,W) as the network takes them.
    """
    total = np.zeros(images.shape[2:])
    with switched_mode(model, training=False):
        for image in images.split(1):
            total += _centre_gradient(model, image)[0].cpu().double().numpy()
    return total / len(images)


def mass_share(weights: NDArray[np.float64], mass: float = MASS) -> float:
    """Smallest share of the pixels that together hold `mass` of the sum."""
    cumulated = np.cumsum(np.sort(weights, axis=None)[::-1])
    return float(np.searchsorted(cumulated, mass * cumulated[-1]) + 1) / weights.size


def receptive_field(
    build: Callable[[], nn.Module], size: Size, *, seeds: int, images: int
) -> tuple[Figures, NDArray[np.float32]]:
    """How far information travels in a freshly initialised network.

    Args:
        build: makes the network; its weights are drawn from torch's random state.
        size: (height, width) of the input in pixels, where the field ends at the latest.
        seeds: initialisations that the effective field is averaged over.
        images: random images per initialisation; `natural_noise`.

    Returns:
        receptive_field.theoretical_px: larger side of the theoretical field.
        field.theoretical_share: share of the pixels that lie in it; 1 means that it reaches every border.
        receptive_field.effective_share: smallest share of the pixels that holds 95 % of the mean absolute gradient.
        And that mean (H,W).
    """
    total = np.zeros(size)
    for seed in range(seeds):
        # The weights and images of seed n are the same however many seeds there are.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("receptive_field", seed))
            model = build()
        generator = torch.Generator().manual_seed(derive_seed("receptive_field_images", seed))
        noise = natural_noise(max(images, CALIBRATION_IMAGES), input_channels(model), size, generator)
        # Double precision, so that the shares do not depend on the number of threads.
        calibrate(model.double(), noise)
        total += effective_map(model, noise[:images]) / seeds  # not normalised one by one: a dead pixel has none
    inside = theoretical_field(model, size)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    figures: Figures = {
        "receptive_field.theoretical_px": int(max(np.ptp(rows), np.ptp(columns))) + 1,
        "field.theoretical_share": round(float(inside.mean()), 4),
        "receptive_field.effective_share": round(mass_share(total), 4),
    }
    return figures, total.astype(np.float32)

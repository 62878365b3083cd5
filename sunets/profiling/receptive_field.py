"""Theoretical and effective receptive fields: the pixels that can change a logit, and those that do."""

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
"""Images for the BatchNorm statistics of a network whose effective field is measured at initialisation."""
MASS = 0.95
"""Share of the input gradient within the effective receptive field."""


def _centre_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the absolute gradient (B,H,W) of the centre pixel's logits, or of a classifier's, by each pixel."""
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
    """Makes the input gradient of a network with positive weights positive wherever a path exists."""

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
    """Find the pixels (H,W) that can influence the logits of the centre pixel.

    Exact for networks of convolutions, norms, activations, pooling and resampling: with positive weights, the identity
    for activations and norms, and means for maxima, no two paths cancel, and the field is where the gradient is not
    zero. It ends at the image border.

    Args:
        model: network; stays unchanged.
        size: (height, width) of the input in pixels.
    """
    # Double precision: at the border of a deep network's field, the gradient underflows in single precision.
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
    """Draw random images (count,channels,H,W), float64, of mean 0 and variance 1, with amplitude 1/frequency.

    Photographs have this spectrum (Field, 1987, doi:10.1364/JOSAA.4.002379). With white noise, averages over a region
    would be the same everywhere.
    """
    white = torch.randn(count, channels, *size, generator=generator, dtype=torch.float64)
    rows, columns = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]
    frequency = torch.hypot(rows, columns).clamp(min=1 / max(size))
    images = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=size)
    return images / images.std()


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set the BatchNorm statistics of a freshly initialised network to those of images (B,C,H,W)."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # running statistics become those of the batch
    with switched_mode(model, training=True), torch.no_grad():
        model(images)


def effective_map(model: nn.Module, images: Tensor) -> NDArray[np.float64]:
    """Compute the mean over images of the absolute gradient (H,W) of the centre pixel's logits.

    Luo et al., "Understanding the effective receptive field in deep convolutional neural networks" (NeurIPS 2016).
    Evaluation mode is used: in training mode, every pixel changes every logit through the batch statistics.

    Args:
        model: network, trained or calibrated.
        images: normalised images (B,C,H,W).
    """
    total = np.zeros(images.shape[2:])
    with switched_mode(model, training=False):
        for image in images.split(1):
            total += _centre_gradient(model, image)[0].cpu().double().numpy()
    return total / len(images)


def mass_share(weights: NDArray[np.float64], mass: float = MASS) -> float:
    """Compute the smallest share of the pixels that together hold `mass` of the sum."""
    cumulated = np.cumsum(np.sort(weights, axis=None)[::-1])
    return float(np.searchsorted(cumulated, mass * cumulated[-1]) + 1) / weights.size


def receptive_field(
    build: Callable[[], nn.Module], size: Size, *, seeds: int, images: int
) -> tuple[Figures, NDArray[np.float32]]:
    """Measure the receptive fields of a freshly initialised network.

    Args:
        build: builds the network with weights from torch's random state.
        size: (height, width) of the input in pixels, which bounds the field.
        seeds: initialisations that the effective field is averaged over.
        images: random images per initialisation; `natural_noise`.

    Returns:
        receptive_field.theoretical_px: larger side of the theoretical field.
        receptive_field.theoretical_share: share of the pixels inside it; 1 means that it reaches every border.
        receptive_field.effective_share: smallest share of the pixels that holds 95 % of the mean absolute gradient.
        And that mean gradient (H,W).
    """
    total = np.zeros(size)
    for seed in range(seeds):
        # Weights and images of seed n do not depend on the number of seeds.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("receptive_field", seed))
            model = build()
            generator = torch.Generator().manual_seed(derive_seed("receptive_field_images", seed))
            noise = natural_noise(max(images, CALIBRATION_IMAGES), input_channels(model), size, generator)
            # Double precision, so that the shares do not depend on the number of threads.
            calibrate(model.double(), noise)  # draws, where the network has dropout
        # Not normalised per seed: a dead centre pixel has no gradient.
        total += effective_map(model, noise[:images]) / seeds
    inside = theoretical_field(model, size)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    figures: Figures = {
        "receptive_field.theoretical_px": int(max(np.ptp(rows), np.ptp(columns))) + 1,
        "receptive_field.theoretical_share": round(float(inside.mean()), 4),
        "receptive_field.effective_share": round(mass_share(total), 4),
    }
    return figures, total.astype(np.float32)

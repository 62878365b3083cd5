"""What a network costs: parameters, multiply-adds, memory, speed, and how far information travels in it.

`cost.*`, `memory.*` and `field.*` are exact: counted, as far as possible on PyTorch's meta device, where nothing is
computed. `speed.*` is measured and noisy. A multiply-add (MAC) is one multiplication and one addition, so that
GFLOPs = 2 GMACs.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry

from sunets.config import ProfileConfig, derive_seed

type Size = tuple[int, int]
type Figures = dict[str, float | int | str | None]

AUDIT_SIZE: Size = (64, 96)
"""(height, width) of the real input on which the counters are compared: fvcore cannot count on the meta device."""
AUDIT_TOLERANCE = 1e-3
"""Largest relative difference between two ways of counting."""
CALIBRATION_IMAGES = 8
"""Images whose statistics a fresh network's BatchNorm layers hold while its effective field is measured."""
MASS = 0.95
"""Part of the input gradient that the effective receptive field holds."""
MIN_SIDE = 16
MIB = 2**20

_aten = torch.ops.aten
_CONV_AND_LINEAR = {_aten.convolution, _aten._convolution, _aten.addmm, _aten.mm}


class AuditError(ValueError):
    """Two ways of counting the same multiply-adds disagree; says where."""


def input_channels(model: nn.Module) -> int:
    """Channels of the images that a network takes: those of its first convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError(f"{type(model).__name__} has no convolution, so its input channels are unknown")


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a while.

    In training mode a BatchNorm layer that sees a single value a channel (the pooled image of DeepLab at batch 1) runs
    as in evaluation mode: one value has no variance, and PyTorch refuses it.
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


# Multiply-adds ------------------------------------------------------------------------------------------------------


def _conv_backward_flops(grad_out: Any, x: Any, w: Any, *rest: Any, **_: Any) -> int:
    """FLOPs of a convolution's backward pass: each gradient takes as many multiply-adds as the forward pass.

    torch's own formula counts the weight gradient of a grouped convolution `groups` times.
    """
    transposed, output_mask = rest[4], rest[7]
    return conv_flop_count(x, w, grad_out, transposed) * (output_mask[0] + output_mask[1])


def count_macs(model: nn.Module, x: Tensor, *, backward: bool = False) -> dict[str, dict[Any, int]]:
    """Multiply-adds of one pass, by module ("" is the whole network) and operator, by torch's own counter.

    Args:
        model: network, on the meta device or any other.
        x: images (B,C,H,W) on the same device.
        backward: count the gradients of all parameters too.
    """
    counter = FlopCounterMode(display=False, custom_mapping={_aten.convolution_backward: _conv_backward_flops})
    with counter, torch.set_grad_enabled(backward):
        out = model(x)
        if backward:
            out.sum().backward()
    model.zero_grad(set_to_none=True)
    prefix = f"{type(model).__name__}."
    counts = {name.removeprefix(prefix): ops for name, ops in counter.get_flop_counts().items()}
    counts[""] = counts.pop("Global", {})
    return {name: {op: flops // 2 for op, flops in ops.items()} for name, ops in counts.items()}


def _conv_and_linear(counts: Mapping[str, Mapping[Any, int]], names: Iterable[str]) -> dict[str, int]:
    return {k: sum(n for op, n in counts.get(k, {}).items() if op in _CONV_AND_LINEAR) for k in names}


def audit(model: nn.Module, size: Size = AUDIT_SIZE) -> None:
    """Compare torch's counter with fvcore's, layer by layer, on a small real input.

    Convolutions and linear layers are compared: they are what both count alike.

    Args:
        model: network on the CPU; its weights do not matter and stay as they are.
        size: (height, width) of the input in pixels.

    Raises:
        AuditError: some layer or the whole differs by more than 0.1 %.
    """
    x = torch.zeros(1, input_channels(model), *size)
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    names = [*(name for name, module in model.named_modules() if isinstance(module, layers)), ""]
    # fvcore traces the network: in training mode that would move the BatchNorm statistics.
    with warnings.catch_warnings(), _mode(model, training=False), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecation of TorchScript, and sizes that the trace freezes
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        theirs = analysis.by_module_and_operator()
        fvcore = {k: sum(theirs[k][op] for op in ("conv", "linear", "addmm", "mm") if k in theirs) for k in names}
        ours = _conv_and_linear(count_macs(model, x), names)
    compare(ours, fvcore, ("torch's counter", "fvcore"), f"{type(model).__name__} at {size[0]}x{size[1]}")


def compare(a: Mapping[str, int], b: Mapping[str, int], sources: tuple[str, str], subject: str) -> None:
    """Check that two ways of counting agree in every part.

    Args:
        a: multiply-adds by part; "" is the whole.
        b: the same, counted otherwise.
        sources: what counted a and b.
        subject: what was counted, for the message.

    Raises:
        AuditError: names the first part that differs by more than 0.1 %.
    """
    for part in [k for k in a if k] + [""]:
        if abs(a[part] - b[part]) > AUDIT_TOLERANCE * max(a[part], b[part]):
            raise AuditError(
                f"{subject}: multiply-adds of {part or 'the whole network'}: "
                f"{sources[0]} says {a[part]:,}, {sources[1]} {b[part]:,}"
            )


class _Uncounted(TorchDispatchMode):
    """Collects the operators that compute something and that the counter has no formula for."""

    moving = {"clone", "copy", "detach", "empty_like", "full_like", "to_copy", "unsafe_view", "zeros_like"}

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in flop_registry and not func.is_view:
            if any(isinstance(a, Tensor | list) for a in args):
                self.names.add(func.overloadpacket.__name__.strip("_").removeprefix("native_"))
        return func(*args, **(kwargs or {}))


# Memory -------------------------------------------------------------------------------------------------------------


def _loss(logits: Tensor) -> Tensor:
    target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, target)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of a training step with the cross-entropy loss.

    Every storage counts once, however many tensors share it; parameters and buffers are left out. The same number on
    every device, the meta device included.

    Args:
        model: network.
        x: images (B,C,H,W).
    """
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}  # holding the tensor keeps the address of its storage from being used again

    def pack(tensor: Tensor) -> Tensor:
        # On the meta device all data pointers are 0, so the storage object itself is the identity.
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with _mode(model, training=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(model(x))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)


def peak_bytes(model: nn.Module, x: Tensor) -> int | None:
    """Most memory allocated on the GPU during a training step, weights and gradients included; None on a CPU.

    Args:
        model: network on the GPU.
        x: images (B,C,H,W) on the GPU.
    """
    if x.device.type != "cuda":
        return None
    with _mode(model, training=True):
        for _ in range(2):  # the first step also holds what the libraries need to choose their kernels
            torch.cuda.reset_peak_memory_stats(x.device)
            _loss(model(x)).backward()
            model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(x.device)


# Receptive field ----------------------------------------------------------------------------------------------------


def _centre_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Sizes (B,H,W) of the gradient of the centre pixel's logits (or the logits, of a classifier) by each pixel."""
    x = x.detach().requires_grad_()
    logits = model(x)
    if logits.dim() == 4:
        logits = logits[:, :, logits.shape[2] // 2, logits.shape[3] // 2]
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    return gradient.abs().sum(1)


class _Positive(TorchFunctionMode):
    """Makes a network's gradient by its input positive wherever there is a path, given positive weights."""

    identity = {
        F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.hardswish, F.silu, F.gelu,
        F.leaky_relu, F.batch_norm, F.layer_norm, F.group_norm,
    }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.identity:
            return args[0]
        if func is F.hardsigmoid:
            return torch.sigmoid(args[0])
        if func in (F.max_pool2d, torch.max_pool2d):
            x, kernel, stride, padding = (*args, *(kwargs.get(k) for k in ("kernel_size", "stride", "padding")))[:4]
            return F.avg_pool2d(x, kernel, stride, padding, ceil_mode=kwargs.get("ceil_mode", False))
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
    # Double precision: at the border of a deep network's field the gradient is below single precision's smallest number.
    model = copy.deepcopy(model).eval().requires_grad_(False).double()
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


def effective_map(model: nn.Module, images: Tensor, *, calibrate: bool = False) -> NDArray[np.float64]:
    """How much each pixel moves the logits of the centre pixel: absolute gradient (H,W), of sum 1, mean over images.

    Luo et al., "Understanding the effective receptive field in deep convolutional neural networks" (NeurIPS 2016).

    Args:
        model: network; stays as it is.
        images: images (B,C,H,W) as the network takes them.
        calibrate: give BatchNorm the statistics of these images first, as a fresh network needs. The gradient is always
            taken in evaluation mode: in training mode every pixel moves the batch's statistics, and so every logit.
    """
    model = copy.deepcopy(model).double().requires_grad_(False)
    images = images.double()
    if calibrate:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                module.momentum = None  # running statistics become those of the batch
        with _mode(model, training=True), torch.no_grad():
            model(images)
    model.eval()
    total = np.zeros(images.shape[2:])
    for image in images.split(1):
        gradient = _centre_gradient(model, image)[0].numpy()
        total += gradient / gradient.sum()
    return total / len(images)


def mass_share(weights: NDArray[np.float64], mass: float = MASS) -> float:
    """Smallest share of the pixels that together hold `mass` of the sum."""
    cumulated = np.cumsum(np.sort(weights, axis=None)[::-1])
    return float(np.searchsorted(cumulated, mass * cumulated[-1]) + 1) / weights.size

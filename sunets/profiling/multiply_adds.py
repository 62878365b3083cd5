"""Multiply-adds of a network by three counts that must agree: torch, fvcore and a formula."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry

from sunets.core.hardware import torch_threads
from sunets.models.structure import SUNetConfig, dilation_schedule
from sunets.models.sunet import SUNet
from sunets.profiling.modes import Size, input_channels, switched_mode

AUDIT_SIZE: Size = (64, 96)
"""(height, width) of the input on which the counters are compared; fvcore cannot count on the meta device."""
AUDIT_TOLERANCE = 1e-3
"""Maximum relative difference between two counts."""

_aten = torch.ops.aten
CONV_AND_LINEAR = {_aten.convolution, _aten._convolution, _aten.addmm, _aten.mm}


class AuditError(ValueError):
    """Disagreement between two counts of the same multiply-adds; names the layer."""


def _conv_backward_flops(grad_out: Any, x: Any, w: Any, *rest: Any, **_: Any) -> int:
    """Count the FLOPs of a convolution's backward pass: each gradient takes as many as the forward pass.

    torch's own formula counts the weight gradient of a grouped convolution `groups` times.
    """
    transposed, output_mask = rest[4], rest[7]
    return conv_flop_count(x, w, grad_out, transposed) * (output_mask[0] + output_mask[1])


def count_macs(model: nn.Module, x: Tensor, *, backward: bool = False) -> dict[str, dict[Any, int]]:
    """Count the multiply-adds of one pass by module ("" is the whole network) and operator, with torch's counter.

    Args:
        model: network, on the meta device or any other.
        x: images (B,C,H,W) on the same device.
        backward: also count the gradients of all parameters.
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
    return {k: sum(n for op, n in counts.get(k, {}).items() if op in CONV_AND_LINEAR) for k in names}


def audit(model: nn.Module, size: Size = AUDIT_SIZE) -> None:
    """Compare torch's counter with fvcore's on a small input, layer by layer, and with `sunet_macs` for SUNets.

    Convolutions and linear layers are compared, which both counters define alike.

    Args:
        model: network on the CPU; its weights do not matter and stay unchanged.
        size: (height, width) of the input in pixels.

    Raises:
        AuditError: a layer or the whole differs by more than 0.1 %.
    """
    x = torch.zeros(1, input_channels(model), *size)
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    names = [*(name for name, module in model.named_modules() if isinstance(module, layers)), ""]
    # fvcore traces the network; training mode would change the BatchNorm statistics. One thread: on a busy machine
    # several would wait for each other after each of these small layers.
    with warnings.catch_warnings(), switched_mode(model, training=False), torch.no_grad(), torch_threads(1):
        warnings.simplefilter("ignore")  # deprecation of TorchScript, sizes frozen by the trace
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_module = analysis.by_module_and_operator()
        operators = ("conv", "linear", "addmm", "mm")
        fvcore = {k: sum(by_module[k][op] for op in operators if k in by_module) for k in names}
        counts = count_macs(model, x)
    subject = f"{type(model).__name__} at {size[0]}x{size[1]}"
    compare(_conv_and_linear(counts, names), fvcore, ("torch's counter", "fvcore"), subject)
    compare_with_formula(model, counts, x)


def compare_with_formula(model: nn.Module, counts: Mapping[str, Mapping[Any, int]], x: Tensor) -> None:
    """Compare counted multiply-adds with `sunet_macs`, for SUNets only."""
    if isinstance(model, SUNet):
        size = (x.shape[2], x.shape[3])
        formula = sunet_macs(model.config, size, len(x))
        subject = f"{type(model).__name__} at {size[0]}x{size[1]}"
        compare(_conv_and_linear(counts, formula), formula, ("torch's counter", "the formula"), subject)


def compare(a: Mapping[str, int], b: Mapping[str, int], counters: tuple[str, str], subject: str) -> None:
    """Check that two counts agree in every part.

    Args:
        a: multiply-adds by part; "" is the whole.
        b: another count of the same parts.
        counters: names of the counters of a and b, for the message.
        subject: name of the network, for the message.

    Raises:
        AuditError: names the first part that differs by more than 0.1 %.
    """
    for part in [k for k in a if k] + [""]:
        if abs(a[part] - b[part]) > AUDIT_TOLERANCE * max(a[part], b[part]):
            raise AuditError(
                f"{subject}: multiply-adds of {part or 'the whole network'}: "
                f"{counters[0]} says {a[part]:,}, {counters[1]} {b[part]:,}"
            )


def sunet_macs(config: SUNetConfig, size: Size, batch_size: int = 1) -> dict[str, int]:
    """Compute the multiply-adds of a SUNet's convolutions and linear layer from its structure, by module ("" is all).

    Args:
        config: structure.
        size: (height, width) of the input in pixels; strides round up.
        batch_size: images.
    """

    def half(at: Size) -> Size:
        return (at[0] + 1) // 2, (at[1] + 1) // 2

    def conv(at: Size, channels_in: int, channels_out: int, kernel: int = 1) -> int:
        """Count a convolution with output size `at`, or a transposed one with input size `at`."""
        return batch_size * at[0] * at[1] * channels_in * channels_out * kernel**2

    stem, width = config.stem_channels, config.width
    at = half(size)
    macs = {"stem": conv(at, config.in_channels, stem, 7)}
    at, channels = half(at), 2 * stem
    macs["stem"] += conv(at, stem, channels) + conv(at, stem, channels, 3) + conv(at, channels, channels, 3)
    per_stage = (config.stage_channels, config.num_blocks, config.unet_depth, dilation_schedule(config))
    for stage, (out, blocks, levels, rates) in enumerate(zip(*cast(Any, per_stage), strict=True)):
        for block in range(blocks):
            count = conv(at, channels, width) + conv(at, width, out)
            count += conv(at, channels, out) if channels != out else 0
            fine = at
            for level in range(levels):
                coarse = half(fine) if rates is None else fine
                joined = 2 * width if config.skip == "concat" and level < levels - 1 else width
                down = 2 * conv(coarse, width, width, 3)
                up = conv(coarse, joined, width, 3) + conv(fine, width, width, 3)
                count += down + up
                fine = coarse
            macs[f"stages.{stage}.{block}"] = count
            channels = out
        if 4 * 2**stage < cast(int, config.output_stride):
            at = half(at)
    if config.head == "degridding":
        macs["head"] = conv(at, channels, 512, 3) + conv(at, 512, 512, 3) + conv(at, 512, config.num_classes)
    else:
        macs["head"] = conv((1, 1) if config.head == "classifier" else at, channels, config.num_classes)
    return macs | {"": sum(macs.values())}


_MOVING = {"clone", "copy", "detach", "empty_like", "full_like", "to_copy", "unsafe_view", "zeros_like"}


class Uncounted(TorchDispatchMode):
    """Collects the computing operators for which the counter has no formula."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.strip("_").removeprefix("native_").partition("_legit")[0]
        takes_tensors = any(isinstance(a, Tensor) or (isinstance(a, list) and isinstance(a[0], Tensor)) for a in args)
        if takes_tensors and not func.is_view and func.overloadpacket not in flop_registry and name not in _MOVING:
            self.names.add(name)
        return func(*args, **(kwargs or {}))

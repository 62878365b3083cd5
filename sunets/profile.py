"""What a network costs: parameters, multiply-adds, memory, speed, and how far information travels in it.

`cost.*`, `memory.*` and `field.*` are exact: counted, as far as possible on PyTorch's meta device, where nothing is
computed. `speed.*` is measured and noisy. A multiply-add (MAC) is one multiplication and one addition, so that
GFLOPs = 2 GMACs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

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
from sunets.record import (
    code_hash,
    command_line,
    environment,
    make_record,
    provenance,
    replacing,
    write_json,
    write_rows,
)
from sunets.sunet import MIN_SIZE, SUNet, SUNetConfig, dilation_schedule
from sunets.zoo import create_model, list_models

Size: TypeAlias = tuple[int, int]
Figures: TypeAlias = dict[str, float | int | str | None]

AUDIT_SIZE: Size = (64, 96)
"""(height, width) of the real input on which the counters are compared: fvcore cannot count on the meta device."""
AUDIT_TOLERANCE = 1e-3
"""Largest relative difference between two ways of counting."""
CALIBRATION_IMAGES = 8
"""Images whose statistics a fresh network's BatchNorm layers hold while its effective field is measured."""
MASS = 0.95
"""Part of the input gradient that the effective receptive field holds."""
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
def _usual_algorithms() -> Iterator[None]:
    """PyTorch's default choice of kernels for a while.

    With `torch.use_deterministic_algorithms`, which a training sets, some operators are replaced by others on all
    devices but the CPU, the meta device included, and the counts would no longer be the same everywhere.
    """
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


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


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    """Compare torch's counter with fvcore's on a small real input, layer by layer, and with `sunet_macs` for SUNets.

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
    # fvcore traces the network: in training mode that would move the BatchNorm statistics. One thread: on a busy
    # machine several would wait for each other after each of these small layers.
    with warnings.catch_warnings(), _mode(model, training=False), torch.no_grad(), _threads(1):
        warnings.simplefilter("ignore")  # deprecation of TorchScript, and sizes that the trace freezes
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        theirs = analysis.by_module_and_operator()
        fvcore = {k: sum(theirs[k][op] for op in ("conv", "linear", "addmm", "mm") if k in theirs) for k in names}
        counts = count_macs(model, x)
    subject = f"{type(model).__name__} at {size[0]}x{size[1]}"
    compare(_conv_and_linear(counts, names), fvcore, ("torch's counter", "fvcore"), subject)
    _compare_with_formula(model, counts, x)


def _compare_with_formula(model: nn.Module, counts: Mapping[str, Mapping[Any, int]], x: Tensor) -> None:
    if isinstance(model, SUNet):
        size = (x.shape[2], x.shape[3])
        formula = sunet_macs(model.config, size, len(x))
        subject = f"{type(model).__name__} at {size[0]}x{size[1]}"
        compare(_conv_and_linear(counts, formula), formula, ("torch's counter", "the formula"), subject)


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


def sunet_macs(config: SUNetConfig, size: Size, batch_size: int = 1) -> dict[str, int]:
    """Multiply-adds of a SUNet's convolutions and linear layer from its structure alone, by module ("" is the whole).

    Args:
        config: structure.
        size: (height, width) of the input in pixels; every stride rounds up.
        batch_size: images.
    """

    def half(at: Size) -> Size:
        return (at[0] + 1) // 2, (at[1] + 1) // 2

    def conv(at: Size, channels_in: int, channels_out: int, kernel: int = 1) -> int:
        """At `at` pixels: a convolution's output, a transposed convolution's input."""
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


class _Uncounted(TorchDispatchMode):
    """Collects the operators that compute something and that the counter has no formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.strip("_").removeprefix("native_").partition("_legit")[0]
        takes_tensors = any(isinstance(a, Tensor) or (isinstance(a, list) and isinstance(a[0], Tensor)) for a in args)
        if takes_tensors and not func.is_view and func.overloadpacket not in flop_registry and name not in _MOVING:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


# Memory -------------------------------------------------------------------------------------------------------------


def _loss(logits: Tensor) -> Tensor:
    target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, target)


@_usual_algorithms()
def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of a training step with the cross-entropy loss.

    Every storage counts once, however many tensors share it; parameters and buffers are left out. The same number on
    the meta device as on a CPU (but for the unused statistics of a norm that sees a single value, see `_mode`).

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
    with _mode(model, training=True), torch.no_grad():
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
    with _mode(model, training=False):
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
        field.theoretical_px: larger side of the theoretical field.
        field.theoretical_share: share of the pixels that lie in it; 1 means that it reaches every border.
        field.effective_share: smallest share of the pixels that holds 95 % of the mean absolute gradient.
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
        "field.theoretical_px": int(max(np.ptp(rows), np.ptp(columns))) + 1,
        "field.theoretical_share": round(float(inside.mean()), 4),
        "field.effective_share": round(mass_share(total), 4),
    }
    return figures, total.astype(np.float32)


def draw_fields(maps: Mapping[str, NDArray[Any]], path: Path, side: int = 240) -> None:
    """Draw effective receptive fields beside each other into a PNG: logarithmic, over five decades.

    Args:
        maps: name -> gradient sizes (H,W).
        path: the PNG.
        side: longer side of one field in pixels.
    """
    anchors = np.array([[0, 0, 4], [59, 15, 112], [140, 41, 129], [222, 73, 104], [254, 159, 109], [252, 253, 191]])
    columns = min(len(maps), 4)
    tiles = []
    for name, field in maps.items():
        decades = np.log10(np.maximum(field / field.max(), 1e-5))
        colours = np.stack([np.interp(decades, np.linspace(-5, 0, 6), anchors[:, i]) for i in range(3)], -1)
        scale = side / max(field.shape)
        shape = (round(field.shape[1] * scale), round(field.shape[0] * scale))
        picture = Image.fromarray(colours.astype(np.uint8)).resize(shape, Image.Resampling.NEAREST)
        tile = Image.new("RGB", (side + 12, picture.height + 42), "white")
        tile.paste(picture, ((side + 12 - picture.width) // 2, 36))
        text = f"{name}\n{MASS:.0%} in {mass_share(field.astype(float)):.1%} of the image"
        ImageDraw.Draw(tile).multiline_text((6, 4), text, fill="black")
        tiles.append(tile)
    height = max(tile.height for tile in tiles)
    sheet = Image.new("RGB", (columns * tiles[0].width, -(-len(tiles) // columns) * height), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * tile.width, index // columns * height))
    with replacing(path) as temporary:
        sheet.save(temporary)


# Speed --------------------------------------------------------------------------------------------------------------


def measure_speed(
    models: Mapping[str, nn.Module],
    *,
    size: Size,
    batch_size: int = 1,
    repeats: int = 10,
    warmup: int = 3,
    threads: int = 1,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> dict[str, Figures]:
    """Time forward passes and training steps, taking the models in turn within every round.

    Whatever slows a round down slows all of its models, so that ratios hold on a busy machine. Data lie on the device
    beforehand, and the device is synchronised before the clock is read.

    Args:
        models: name -> network; copies are timed.
        size: (height, width) of the input in pixels.
        batch_size: images.
        repeats: timed rounds.
        warmup: untimed rounds before them.
        threads: CPU threads.
        device: cpu, cuda, or auto: CUDA where there is a GPU.
        dtype: float32, or the type of autocast.
        channels_last: memory format of weights and images.

    Returns:
        By name: medians and interquartile ranges over the rounds of speed.latency_ms (one forward pass in inference
        mode), speed.images_per_second, speed.step_ms (forward, cross-entropy, backward; no optimiser), the protocol,
        and memory.peak_mib of the step on a GPU.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    def step(model: nn.Module, x: Tensor) -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = _loss(model(x).float())
        loss.backward()
        model.zero_grad(set_to_none=True)

    copies = {name: copy.deepcopy(model).to(device).to(memory_format=memory_format) for name, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    images = {
        name: torch.randn(batch_size, input_channels(model), *size, generator=generator)
        .to(device)
        .contiguous(memory_format=memory_format)
        for name, model in models.items()
    }
    passes: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    with _threads(threads):
        for _ in range(warmup + repeats):
            for name, model in copies.items():
                x = images[name]
                autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
                with _mode(model, training=False), torch.inference_mode(), autocast:
                    passes[name].append(timed(lambda model=model, x=x: model(x)))  # type: ignore[misc]
                with _mode(model, training=True):
                    steps[name].append(timed(lambda model=model, x=x: step(model, x)))  # type: ignore[misc]
    protocol: Figures = {
        "speed.batch_size": batch_size,
        "speed.repeats": repeats,
        "speed.warmup": warmup,
        "speed.threads": threads,
        "speed.device": device,
        "speed.dtype": str(dtype).removeprefix("torch."),
        "speed.memory_format": str(memory_format).removeprefix("torch."),
    }
    found: dict[str, Figures] = {}
    for name, model in copies.items():
        latency, latency_iqr = _median_and_spread(passes[name][warmup:])
        step_ms, step_iqr = _median_and_spread(steps[name][warmup:])
        found[name] = {
            "speed.latency_ms": latency,
            "speed.latency_iqr_ms": latency_iqr,
            "speed.images_per_second": 1e3 * batch_size / latency,
            "speed.step_ms": step_ms,
            "speed.step_iqr_ms": step_iqr,
            "memory.peak_mib": _mib(peak_bytes(model, images[name])),
            **protocol,
        }
    return found


def _median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def _mib(count: int | None) -> float | None:
    return None if count is None else count / MIB


# Records and tables -------------------------------------------------------------------------------------------------


@_usual_algorithms()
def cost(arguments: Mapping[str, Any], *, size: Size, batch_size: int = 1) -> Figures:
    """Exact figures of one network, counted and audited.

    Args:
        arguments: keyword arguments of `create_model`; weights are left out, because they change no cost.
        size: (height, width) of the input in pixels.
        batch_size: images of the input.

    Returns:
        cost.params_m: parameters in millions.
        cost.output_stride: input size over the size of the last features.
        cost.gmacs, cost.gflops: multiply-adds of a forward pass in 10^9, and twice that.
        cost.gmacs_attention: those of them that are products of activations, not of weights.
        cost.gmacs_forward_backward: of a forward and backward pass, gradients of all parameters included.
        cost.uncounted_operators: operators of the forward pass for which no counter has a formula.
        memory.saved_mib, memory.saved_mib_memory_efficient: `saved_bytes`; the second for SUNets only.
        memory.peak_mib: `peak_bytes`; None without a GPU that holds the step.

    Raises:
        ValueError: the network cannot be built, or the size is too small.
        AuditError: two ways of counting differ by more than 0.1 %.
    """
    _check_size(size)
    model = _build(arguments)
    params = sum(parameter.numel() for parameter in model.parameters())
    audit(model)

    shape = (batch_size, input_channels(model), *size)
    peak = None
    if torch.cuda.is_available():
        with contextlib.suppress(torch.OutOfMemoryError):  # a GPU too small to tell
            peak = peak_bytes(model.cuda(), torch.zeros(shape, device="cuda"))
    model = model.to("meta").eval()
    x = torch.zeros(shape, device="meta")
    uncounted = _Uncounted()
    with uncounted:
        counts = count_macs(model, x)
    _compare_with_formula(model, counts, x)
    forward = counts[""]
    gmacs = sum(forward.values()) / 1e9
    efficient = None
    if isinstance(model, SUNet):
        config = model.config
        model.config = dataclasses.replace(config, memory_efficient=True)
        efficient = _mib(saved_bytes(model, x))
        model.config = dataclasses.replace(config, memory_efficient=False)
    return {
        "cost.params_m": params / 1e6,
        "cost.output_stride": int(cast(int, model.output_stride)),
        "cost.gmacs": gmacs,
        "cost.gflops": 2 * gmacs,
        "cost.gmacs_attention": sum(n for op, n in forward.items() if op not in _CONV_AND_LINEAR) / 1e9,
        "cost.gmacs_forward_backward": sum(count_macs(model, x, backward=True)[""].values()) / 1e9,
        "cost.uncounted_operators": ", ".join(sorted(uncounted.names)),
        "memory.saved_mib": _mib(saved_bytes(model, x)),
        "memory.saved_mib_memory_efficient": efficient,
        "memory.peak_mib": _mib(peak),
    }


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(**{key: value for key, value in arguments.items() if key != "weights"})


def _check_size(size: Size) -> None:
    if min(size) < MIN_SIZE:
        raise ValueError(f"size: height and width of at least {MIN_SIZE} pixels, not {size[0]} x {size[1]}")


def profile_model(
    arguments: Mapping[str, Any], *, size: Size, batch_size: int = 1, field_seeds: int = 0, field_images: int = 2
) -> tuple[Figures, NDArray[np.float32] | None]:
    """Everything exact about one network: `cost` and, where `field_seeds` is not 0, `receptive_field` with its map.

    Args:
        arguments: keyword arguments of `create_model`.
        size: (height, width) of the input in pixels.
        batch_size: images whose multiply-adds and memory are counted.
        field_seeds: initialisations that the effective field is averaged over.
        field_images: random images per initialisation.
    """
    figures = cost(arguments, size=size, batch_size=batch_size)
    if not field_seeds:
        return figures, None
    plain = {key: value for key, value in arguments.items() if key != "weights"}
    field, gradient = receptive_field(lambda: create_model(**plain), size, seeds=field_seeds, images=field_images)
    return figures | field, gradient


def cost_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """A table for the terminal: one row a record, with `profile_model`'s and, where present, `measure_speed`'s figures.

    The caption says what was counted, how, and what no counter counts.
    """
    rows = [record["cost"] for record in records]
    table = Table(title="What the models cost", caption_justify="left", title_justify="left")
    table.add_column("model", no_wrap=True)
    columns = [c for c in _COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for record, row in zip(records, rows, strict=True):
        cells = ("" if (value := row.get(key)) is None else form.format(value) for key, _, form in columns)
        table.add_row(str(record["label"]), *cells)
    params = records[0]["params"]
    height, width = params["profile.size"]
    uncounted = sorted({name for row in rows for name in row["cost.uncounted_operators"].split(", ")})
    notes = [
        f"Input {params['profile.batch_size']} x {height} x {width}. Multiply-adds (1 GMAC = 2 GFLOPs) by torch's "
        "counter; convolutions and linear layers agree with fvcore's count and, of SUNets, with a formula, to 0.1 %.",
        f"Not counted by any of them: {', '.join(uncounted)}.",
        "Saved: what autograd keeps for the backward pass of a training step, parameters left out; mem. eff.: with "
        "memory_efficient=True.",
    ]
    if attention := [f"{r['label']} {100 * row['cost.gmacs_attention'] / row['cost.gmacs']:.1f} %"
                     for r, row in zip(records, rows, strict=True) if row["cost.gmacs_attention"]]:  # fmt: skip
        notes.append(f"Share of attention's products of activations: {', '.join(attention)}.")
    if any("field.effective_share" in row for row in rows):
        notes.append(
            "Field: larger side of the centre pixel's theoretical receptive field (up to the image's size), and the "
            f"share of the pixels that hold {MASS:.0%} of the input gradient of its logits, of fresh networks."
        )
    if timed := next((row for row in rows if "speed.latency_ms" in row), None):
        notes.append(
            f"Times: median (interquartile range) of {timed['speed.repeats']} rounds after {timed['speed.warmup']}, "
            f"models in turn; {timed['speed.device']}, {timed['speed.threads']} threads, {timed['speed.dtype']}."
        )
    table.caption = "\n".join(notes)
    return table


_COLUMNS = (
    ("cost.params_m", "M params", "{:.3f}"),
    ("cost.gmacs", "GMACs", "{:.2f}"),
    ("cost.gmacs_forward_backward", "GMACs fwd +bwd", "{:.2f}"),
    ("memory.saved_mib", "saved MiB", "{:.1f}"),
    ("memory.saved_mib_memory_efficient", "saved MiB mem. eff.", "{:.1f}"),
    ("memory.peak_mib", "peak MiB GPU", "{:.1f}"),
    ("field.theoretical_px", "field px", "{}"),
    ("field.effective_share", "95 % field", "{:.1%}"),
    ("speed.latency_ms", "latency ms", "{:.1f}"),
    ("speed.latency_iqr_ms", "(IQR)", "{:.1f}"),
    ("speed.images_per_second", "images/s", "{:.1f}"),
    ("speed.step_ms", "step ms", "{:.1f}"),
    ("speed.step_iqr_ms", "(IQR)", "{:.1f}"),
)
"""Key, heading and format of the columns of `cost_table`."""


def run_profile(
    models: Sequence[str],
    *,
    size: Size = (512, 512),
    output_stride: int | None = None,
    num_classes: int = 21,
    task: str = "segmentation",
    json_path: Path | None = None,
    csv_path: Path | None = None,
    speed: bool = False,
    speed_json_path: Path | None = None,
    field: bool = False,
    picture_path: Path | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Profile models of the zoo, print the table, write what is asked for; the command `profile`.

    Args:
        models: names of the zoo.
        size: (height, width) of the input in pixels.
        output_stride: of every model; None is each model's own.
        num_classes: channels of the logits.
        task: segmentation or classification.
        json_path: file for the exact records.
        csv_path: the same as a table, one row a model.
        speed: time the models too.
        speed_json_path: file for the timings.
        field: measure the receptive fields too.
        picture_path: PNG of the effective receptive fields.
        console: where the table is printed.

    Returns:
        The exact records.

    Raises:
        ValueError: an unknown name, a size that is too small, a model that cannot be built so.
        AuditError: two ways of counting differ.
    """
    _check_size(size)
    for name in models:
        if name not in list_models(task):
            raise ValueError(f"{name}: no model of the zoo for {task}; there are {', '.join(list_models(task))}")
    settings = ProfileConfig.model_validate({"size": size})
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=120)
    params: dict[str, Any] = {f"profile.{key}": value for key, value in settings.model_dump(mode="json").items()}
    params |= {"model.output_stride": output_stride, "model.num_classes": num_classes, "task": task}
    shared: dict[str, Any] = {"benchmark": "none", "config": params}
    origin = provenance(None, code_hash(__name__), params, command_line())
    names = list(dict.fromkeys(models))
    arguments = {
        name: {"name": name, "task": task, "num_classes": num_classes, "output_stride": output_stride} for name in names
    }
    records, maps = [], {}
    for name in names:
        with console.status(f"counting {name}"):
            figures, gradient = profile_model(
                arguments[name],
                size=size,
                batch_size=settings.batch_size,
                field_seeds=settings.field_seeds if field else 0,
                field_images=settings.field_images,
            )
        if gradient is not None:
            maps[name] = gradient
        host = environment("auto", torch.get_num_threads())
        records.append(make_record("profile", model=name, cost=figures, environment=host, provenance=origin, **shared))
    timings = []
    if speed:
        with console.status("timing"):
            measured = measure_speed(
                {name: _build(arguments[name]) for name in names},
                size=size,
                batch_size=settings.batch_size,
                repeats=settings.repeats,
                warmup=settings.warmup,
                threads=settings.threads,
            )
        host = environment("auto", settings.threads)
        timings = [
            make_record("speed", model=name, cost=figures, environment=host, provenance=origin, **shared)
            for name, figures in measured.items()
        ]
    times = {timing["model"]: timing["cost"] for timing in timings}
    shown = [record | {"cost": record["cost"] | times.get(record["model"], {})} for record in records]
    console.print(cost_table(shown))
    if json_path is not None:
        write_json(json_path, records)
    if csv_path is not None:
        write_rows(csv_path, [{"model": r["model"], **r["params"], **r["cost"]} for r in records])
    if speed_json_path is not None and timings:
        write_json(speed_json_path, timings)
    if picture_path is not None and maps:
        draw_fields(maps, picture_path)
    return records

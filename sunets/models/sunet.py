"""Stacked U-Nets (SUNets).

Shah, Ghosh, Davis, Goldstein: "Stacked U-Nets: A No-Frills Approach to Natural Image Segmentation", arXiv 1804.10343.
Small U-Nets replace the residual blocks of a ResNet. Each carries information across the image and returns features at
the resolution of its input, so that a deep stack sees the whole image without an auxiliary block.

    image -> stem (stride 4) -> stage 0 -> pool -> stage 1 -> pool -> ... -> BatchNorm -> ReLU -> head

A stage is a stack of U-Nets at one resolution. Sizes are rounded up where a stride does not divide them, so that any
height and width of at least 16 pixels works. All convolutions have a bias and are pre-activated (BatchNorm -> ReLU ->
convolution), as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields
from typing import Any, cast

import torch
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from sunets.models.structure import (
    HEADS,
    VARIANTS,
    Rates,
    SUNetConfig,
    check_choice,
    count_kept_pools,
    dilation_schedule,
)


class Unit(nn.Module):
    """BatchNorm -> ReLU -> convolution; stride 2 halves the size, rounded up."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        return cast(Tensor, self.conv(F.relu(self.norm(x), inplace=True)))


class TransposedUnit(nn.Module):
    """BatchNorm -> ReLU -> transposed 3x3 convolution, cropped to the size of a given tensor."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        # At stride 2 one row and column too many, from which both possible sizes (2n and 2n - 1) are cropped: the
        # result of output_size=, without its data-dependent branch in a traced graph.
        self.conv = nn.ConvTranspose2d(
            in_channels, out_channels, 3, stride, padding=dilation, output_padding=stride - 1, dilation=dilation
        )

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, H, W), where `like` is (B, any, H, W)."""
        y = self.conv(F.relu(self.norm(x), inplace=True))
        return _crop(y, like.shape[2], like.shape[3])


def _halve(x: Tensor) -> Tensor:
    """Average-pool 2x2 with stride 2; sizes are rounded up, and windows at the border average the pixels inside."""
    if torch.compiler.is_exporting():  # the same values; ceil_mode would fix the parity of the sizes
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2)
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    if torch.compiler.is_exporting():  # the strides of a slice would fix the parity of the sizes
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[:, :, :height, :width]


class UNet(nn.Module):
    """A pre-activated residual U-Net whose output has the size of its input.

    Each level goes down by two 3x3 convolutions and up by a transposed and a plain one. A strided level halves the
    size; a dilated one keeps it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        levels: int,
        rates: tuple[Rates, ...] | None,
        skip: str,
    ) -> None:
        super().__init__()
        self.skip = skip
        self.norm = nn.BatchNorm2d(in_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.reduce = nn.Conv2d(in_channels, width, 1)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        stride = 2 if rates is None else 1
        for level in range(levels):
            first, second = (1, 1) if rates is None else rates[level]
            joined = 2 * width if skip == "concat" and level < levels - 1 else width
            self.downs.append(
                nn.Sequential(Unit(width, width, 3, stride, first), Unit(width, width, 3, dilation=second))
            )
            self.ups.append(
                nn.ModuleList([TransposedUnit(joined, width, stride, second), Unit(width, width, 3, dilation=first)])
            )
        self.expand = Unit(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        activated = F.relu(self.norm(x), inplace=True)
        identity = x if self.shortcut is None else self.shortcut(activated)
        y = self.reduce(activated)
        inputs = []
        for down in self.downs:
            inputs.append(y)
            y = down(y)
        for level in reversed(range(len(inputs))):
            transposed, plain = cast(nn.ModuleList, self.ups[level])
            y = plain(transposed(y, like=inputs[level]))
            if level > 0:  # inputs[0], the output of the 1x1 convolution, is not joined
                y = torch.cat([y, inputs[level]], dim=1) if self.skip == "concat" else y + inputs[level]
        return cast(Tensor, identity + self.expand(y))


class Stem(nn.Module):
    """7x7 convolution and one residual block, each of stride 2."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3)
        self.norm = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels, 2 * channels, 1, stride=2)
        self.reduce = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.expand = Unit(2 * channels, 2 * channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, 2 channels, H / 4, W / 4)."""
        activated = F.relu(self.norm(self.conv(x)), inplace=True)
        return cast(Tensor, self.shortcut(activated) + self.expand(self.reduce(activated)))


def _head(config: SUNetConfig) -> nn.Module:
    """Build the head, without the pooling before it or the upsampling after it."""
    features = config.stage_channels[-1]
    if config.head == "classifier":
        return nn.Linear(features, config.num_classes)
    if config.head == "linear":
        return nn.Conv2d(features, config.num_classes, 1)
    return nn.Sequential(  # removes the gridding that dilation leaves
        nn.Conv2d(features, 512, 3, padding=2, dilation=2),
        nn.BatchNorm2d(512),
        nn.ReLU(inplace=True),
        nn.Conv2d(512, 512, 3, padding=1),
        nn.BatchNorm2d(512),
        nn.ReLU(inplace=True),
        nn.Conv2d(512, config.num_classes, 1),
    )


class SUNet(nn.Module):
    """A stack of U-Nets with a head; see `SUNetConfig`.

    Logits are (B, num_classes, H, W), of the input's size, or (B, num_classes) for classification.
    """

    head_prefixes = ("head.",)
    """Prefixes of the names of the head's parameters; the others belong to the backbone."""

    def __init__(self, config: SUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.task = config.task
        self.num_classes = config.num_classes
        self.output_stride = cast(int, config.output_stride)
        self.structure = {name: value for name, value in asdict(config).items() if name != "num_classes"}
        self.stem = Stem(config.in_channels, config.stem_channels)
        self.stages = nn.ModuleList()
        channels = 2 * config.stem_channels
        per_stage = zip(
            config.stage_channels,
            cast(tuple[int, ...], config.num_blocks),
            cast(tuple[int, ...], config.unet_depth),
            dilation_schedule(config),
            strict=True,
        )
        for out_channels, num_blocks, levels, rates in per_stage:
            blocks = nn.ModuleList()
            for _ in range(num_blocks):
                blocks.append(UNet(channels, out_channels, config.width, levels, rates, config.skip))
                channels = out_channels
            self.stages.append(blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = _head(config)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the features before the last ReLU: (B, C, H / output_stride, W / output_stride).

        Raises:
            ValueError: the input is not (B, in_channels, H, W) with H and W of at least 16.
        """
        check_input(x, self.config.in_channels)
        kept_pools = count_kept_pools(self.config)
        x = self.stem(x)
        for stage, blocks in enumerate(self.stages):
            for block in cast(nn.ModuleList, blocks):
                x = _checkpointed(block, x) if self.config.memory_efficient and torch.is_grad_enabled() else block(x)
            if stage < kept_pools:
                x = _halve(x)
        return cast(Tensor, self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, (B, num_classes, H, W) or (B, num_classes), from (B, in_channels, H, W); checks the input."""
        with _symbolic_sizes():
            features = F.relu(self.forward_features(x), inplace=True)
            if self.task == "classification":
                return cast(Tensor, self.head(features.mean(dim=(2, 3))))
            return F.interpolate(self.head(features), size=x.shape[2:], mode="bilinear", align_corners=False)


def sunet(
    name: str, *, task: str = "segmentation", num_classes: int, head: str | None = None, **overrides: Any
) -> SUNet:
    """Build a named SUNet.

    Args:
        name: key of `VARIANTS`.
        task: segmentation or classification.
        num_classes: channels of the logits.
        head: a head of that task; None is the first in `HEADS`.
        overrides: fields of `SUNetConfig`. Where `stage_channels` changes the number of stages, `num_blocks` and
            `unet_depth`, unless given too, are those of the named network, truncated or extended by their last value.

    Raises:
        ValueError: names the field and what is allowed.
    """
    check_choice("task", task, tuple(HEADS))
    head = HEADS[task][0] if head is None else head
    if head not in HEADS[task]:
        raise ValueError(f"head: one of {', '.join(HEADS[task])} for {task}, not {head!r}")
    allowed = [field.name for field in fields(SUNetConfig)]
    for key in overrides:
        if key not in allowed:
            raise ValueError(f"{key}: no field of {name}; there are {', '.join(allowed)}")
    values = VARIANTS[name] | overrides
    channels = overrides.get("stage_channels")
    if isinstance(channels, tuple | list):
        for key in ("num_blocks", "unet_depth"):
            if key not in overrides:
                named = values[key]
                values[key] = (named + named[-1:] * len(channels))[: len(channels)]
    return SUNet(SUNetConfig(num_classes=num_classes, head=head, **values))


MIN_SIZE = 16
"""Least height and width of an input in pixels."""


def check_input(x: Tensor, in_channels: int) -> None:
    """Check the shape of an input.

    Raises:
        ValueError: not (B, in_channels, H, W) with H and W of at least 16.
    """
    if x.dim() != 4:
        raise ValueError(f"input: 4 dimensions (batch, channels, height, width), not {x.dim()}")
    if x.shape[1] != in_channels:
        raise ValueError(f"input: in_channels is {in_channels}, the input has {x.shape[1]} channels")
    if torch.compiler.is_exporting():
        return  # a comparison would restrict the sizes that torch.export may leave dynamic
    if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
        raise ValueError(
            f"input: height and width of at least {MIN_SIZE} pixels, not {int(x.shape[2])} x {int(x.shape[3])}"
        )


def _symbolic_sizes() -> AbstractContextManager[None]:
    """Let torch.export accept every size; by default it assumes that no feature map is one pixel wide."""
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return cast(Any, fx_config).patch(backed_size_oblivious=True)
    return nullcontext()


def set_bn_momentum(module: nn.Module, momentum: float) -> None:
    """Set the momentum of every BatchNorm inside `module` (the authors fine-tune the backbone with 0.01)."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.momentum = momentum


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Compute `block(x)`; its activations are recomputed in the backward pass instead of being kept."""
    if torch.compiler.is_compiling():  # the compiler separates the update of the statistics itself
        return cast(Tensor, checkpoint(block, x, use_reentrant=False, preserve_rng_state=False))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _discarded_statistics(block)

    return cast(Tensor, checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts))


@contextmanager
def _discarded_statistics(block: nn.Module) -> Iterator[None]:
    """Let BatchNorm update copies of its running statistics, which the first forward pass has already updated."""
    buffers_of = {m: dict(m._buffers) for m in block.modules() if isinstance(m, _BatchNorm) and m.training}
    for module, buffers in buffers_of.items():
        module._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in buffers_of.items():
            module._buffers.update(buffers)

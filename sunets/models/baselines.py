"""Interface of the baselines, and three small ones of about sunet_tiny's parameter count; see also `libraries`.

A baseline maps (B, in_channels, H, W), with H and W of at least 16 pixels, to logits, which for segmentation have the
input's size. There are no auxiliary heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from sunets.models.sunet import check_input


class Baseline(nn.Module):
    """Base of all baselines.

    Args:
        task: segmentation or classification.
        num_classes: channels of the logits.
        in_channels: channels of the input.
        output_stride: input size over the size of the coarsest features, before any global pooling.
        head_prefixes: prefixes of the names of the head's parameters; the others belong to the backbone.
        structure: other fields of `ModelConfig` and their values.
    """

    def __init__(
        self,
        *,
        task: str,
        num_classes: int,
        in_channels: int,
        output_stride: int,
        head_prefixes: tuple[str, ...],
        structure: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.output_stride = output_stride
        self.head_prefixes = head_prefixes
        self.structure = {**(structure or {}), "in_channels": in_channels, "output_stride": output_stride}


class FullyConvolutional(Baseline):
    """A backbone, a head on its features, and bilinear upsampling to the input's size."""

    def __init__(self, backbone: nn.Module, head: nn.Module, **shared: Any) -> None:
        super().__init__(task="segmentation", head_prefixes=("head.",), **shared)
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits from (B, in_channels, H, W); raises ValueError as `check_input` does."""
        check_input(x, self.in_channels)
        return F.interpolate(self.head(self.backbone(x)), size=x.shape[2:], mode="bilinear", align_corners=False)


class SmallUNet(Baseline):
    """The classic U-Net (Ronneberger et al., arXiv 1505.04597) with BatchNorm and padded convolutions.

    Channels double at every level up to 8 times `width`.
    """

    def __init__(self, *, width: int, unet_depth: int, **shared: Any) -> None:
        super().__init__(
            task="segmentation",
            output_stride=2**unet_depth,
            head_prefixes=("head.",),
            structure={"width": width, "unet_depth": unet_depth},
            **shared,
        )
        channels = [width * 2 ** min(level, 3) for level in range(unet_depth + 1)]
        inputs = [self.in_channels, *channels[:-1]]
        self.downs = nn.ModuleList(
            nn.Sequential(*_conv_norm_relu(i, o), *_conv_norm_relu(o, o)) for i, o in zip(inputs, channels, strict=True)
        )
        self.ups, self.joins = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in reversed(list(pairwise(channels))):
            self.ups.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.joins.append(nn.Sequential(*_conv_norm_relu(2 * fine, fine), *_conv_norm_relu(fine, fine)))
        self.head = nn.Conv2d(width, self.num_classes, 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits from (B, in_channels, H, W); raises ValueError as `check_input` does."""
        check_input(x, self.in_channels)
        y, skips = x, []
        for level, down in enumerate(self.downs):
            y = down(F.max_pool2d(y, 2, ceil_mode=True) if level else y)
            skips.append(y)
        skips.pop()
        for up, join in zip(self.ups, self.joins, strict=True):
            fine = skips.pop()
            y = join(torch.cat([up(y)[:, :, : fine.shape[2], : fine.shape[3]], fine], dim=1))
        return cast(Tensor, self.head(y))


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def initialise(module: nn.Module) -> None:
    """Initialise convolutions as in He et al. (fan-out, ReLU), with biases of zero."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def choose_stride(name: str, given: int | None, allowed: tuple[int, ...]) -> int:
    """Return the given output stride, by default the first allowed one; ValueError if it is not allowed."""
    if given is not None and (type(given) is not int or given not in allowed):
        raise ValueError(f"output_stride: one of {', '.join(map(str, sorted(allowed)))} for {name}, not {given!r}")
    return allowed[0] if given is None else given


def _check_count(name: str, value: object, high: int | None = None) -> int:
    if type(value) is not int or value < 1 or (high is not None and value > high):
        allowed = "of at least 1" if high is None else f"from 1 to {high}"
        raise ValueError(f"{name}: an integer {allowed}, not {value!r}")
    return value


# Dilated residual networks


def dilate(stages: Sequence[nn.Module], removed: int) -> None:
    """Replace the strides of the last `removed` stages by dilation of their 3x3 convolutions.

    Of the first such stage, the first 3x3 convolution has rate 1 and the others 2; of the next one, 2 and 4. Each sees
    its input at the distances that it had with strides, so that published weights compute the same features on a finer
    grid. Source: ptsemseg/models/resnet.py of the authors' release (shahsohil/sunets).
    """
    for number, stage in enumerate(stages[len(stages) - removed :]):
        rate = 2**number
        for conv in stage.modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (rate, rate)
                rate = 2 ** (number + 1)


def dilated_resnet_small(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int | None = None,
    width: int = 16,
    num_blocks: int | tuple[int, ...] = (2, 3, 2),
    task: str,
) -> Baseline:
    """Build a small dilated ResNet: 3x3 stem of stride 2, three stages of basic blocks of stride 2, 1x1 head.

    Channels are width, 2 width, 4 width. The natural stride is 16; output stride 8 (the default) or 4 by `dilate`.
    """
    stride = choose_stride(name, output_stride, (8, 4, 16))
    _check_count("width", width)
    counts = tuple(num_blocks) if isinstance(num_blocks, tuple | list) else (num_blocks,) * 3
    if len(counts) != 3:
        raise ValueError(f"num_blocks: an integer, or three of them, one per stage of {name}, not {list(counts)}")
    stages: list[nn.Module] = []
    channels = width
    for stage, count in enumerate(counts):
        blocks: list[nn.Module] = []
        for block in range(_check_count("num_blocks", count)):
            out = width * 2**stage
            first = nn.Sequential(nn.Conv2d(channels, out, 1, stride=2, bias=False), nn.BatchNorm2d(out))
            blocks.append(BasicBlock(channels, out, *((2, first) if block == 0 else ())))
            channels = out
        stages.append(nn.Sequential(*blocks))
    dilate(stages, removed=(16 // stride).bit_length() - 1)
    backbone = nn.Sequential(*_conv_norm_relu(in_channels, width, stride=2), *stages)
    model = FullyConvolutional(
        backbone,
        nn.Conv2d(channels, num_classes, 1),
        num_classes=num_classes,
        in_channels=in_channels,
        output_stride=stride,
        structure={"width": width, "num_blocks": counts},
    )
    initialise(model)
    return model


# Other small networks


def plain_conv_small(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int | None = None,
    width: int = 40,
    num_blocks: int = 3,
    task: str,
) -> Baseline:
    """Build a plain stack of 3x3 convolutions: the control with a local receptive field.

    Two convolutions of stride 2 (to `width` and 2 `width` channels), `num_blocks` of stride 1, and a 1x1 head; the
    receptive field of a feature is 7 + 8 num_blocks pixels wide, 31 by default, and upsampling adds 4.
    """
    stride = choose_stride(name, output_stride, (4,))
    _check_count("width", width)
    layers = _conv_norm_relu(in_channels, width, 2) + _conv_norm_relu(width, 2 * width, 2)
    for _ in range(_check_count("num_blocks", num_blocks)):
        layers += _conv_norm_relu(2 * width, 2 * width)
    model = FullyConvolutional(
        nn.Sequential(*layers),
        nn.Conv2d(2 * width, num_classes, 1),
        num_classes=num_classes,
        in_channels=in_channels,
        output_stride=stride,
        structure={"width": width, "num_blocks": num_blocks},
    )
    initialise(model)
    return model


def unet_small(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int | None = None,
    width: int = 7,
    unet_depth: int = 4,
    task: str,
) -> Baseline:
    """Build a `SmallUNet` of `unet_depth` levels, the coarsest of stride 2^unet_depth."""
    _check_count("unet_depth", unet_depth, high=5)
    choose_stride(name, output_stride, (2**unet_depth,))
    return SmallUNet(
        width=_check_count("width", width), unet_depth=unet_depth, num_classes=num_classes, in_channels=in_channels
    )

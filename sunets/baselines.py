"""The networks that SUNets are compared with, behind one interface.

Library networks come from torchvision and segmentation-models-pytorch. The authors' own comparison, dilated ResNets,
and three small networks near sunet_tiny's parameter count are built here. Each takes (B, in_channels, H, W) with any H
and W of at least 16 pixels and returns logits alone, of the input's size for segmentation; there are no auxiliary
heads. Nothing is downloaded unless `weights` names something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from sunets.sunet import check_input, set_bn_momentum


class Baseline(nn.Module):
    """What all baselines share.

    Args:
        task: segmentation or classification.
        num_classes: channels of the logits.
        in_channels: channels of the input.
        output_stride: input size over the size of the coarsest features, global pooling aside.
        head_prefixes: beginnings of the names of the head's parameters; the rest is the backbone.
    """

    def __init__(
        self, *, task: str, num_classes: int, in_channels: int, output_stride: int, head_prefixes: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.task = task
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.output_stride = output_stride
        self.head_prefixes = head_prefixes


class LibraryModel(Baseline):
    """A network of a library, fed with sizes it can take.

    Args:
        net: the network; may return a dict with the logits under "out", as torchvision does.
        multiple: inputs are padded with zeros, right and below, to multiples of this, and the logits are cut back.
        min_size: inputs are padded in the same way to at least this height and width.
        shared: see `Baseline`.
    """

    def __init__(self, net: nn.Module, *, multiple: int = 1, min_size: int = 1, **shared: Any) -> None:
        super().__init__(**shared)
        self.net = net
        self.multiple = multiple
        self.min_size = min_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits; raises ValueError as `check_input` does."""
        check_input(x, self.in_channels)
        height, width = x.shape[2:]
        below, right = (
            max(-(-size // self.multiple) * self.multiple, self.min_size) - size for size in (height, width)
        )
        logits = self.net(F.pad(x, (0, right, 0, below)) if below or right else x)
        logits = logits["out"] if isinstance(logits, dict) else logits
        return cast(Tensor, logits if self.task == "classification" else logits[:, :, :height, :width])


class FullyConvolutional(Baseline):
    """A backbone, a head on its last features, and bilinear upsampling to the input's size."""

    def __init__(self, backbone: nn.Module, head: nn.Module, **shared: Any) -> None:
        super().__init__(task="segmentation", head_prefixes=("head.",), **shared)
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits; raises ValueError as `check_input` does."""
        check_input(x, self.in_channels)
        return F.interpolate(self.head(self.backbone(x)), size=x.shape[2:], mode="bilinear", align_corners=False)


class SmallUNet(Baseline):
    """The classic U-Net (Ronneberger et al., arXiv 1505.04597) with BatchNorm and padded convolutions.

    Channels double at every level up to 8 times `width`.
    """

    def __init__(self, *, width: int, unet_depth: int, **shared: Any) -> None:
        super().__init__(task="segmentation", output_stride=2**unet_depth, head_prefixes=("head.",), **shared)
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
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits; raises ValueError as `check_input` does."""
        check_input(x, self.in_channels)
        y, kept = x, []
        for level, down in enumerate(self.downs):
            y = down(F.max_pool2d(y, 2, ceil_mode=True) if level else y)
            kept.append(y)
        kept.pop()
        for up, join in zip(self.ups, self.joins, strict=True):
            fine = kept.pop()
            y = join(torch.cat([up(y)[:, :, : fine.shape[2], : fine.shape[3]], fine], dim=1))
        return cast(Tensor, self.head(y))


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _choose_stride(name: str, given: int | None, allowed: tuple[int, ...]) -> int:
    """The output stride: the first allowed one where none is given."""
    if given is not None and (type(given) is not int or given not in allowed):
        raise ValueError(f"output_stride: one of {', '.join(map(str, sorted(allowed)))} for {name}, not {given!r}")
    return allowed[0] if given is None else given


def _check_count(name: str, value: object, high: int | None = None) -> int:
    if type(value) is not int or value < 1 or (high is not None and value > high):
        allowed = "of at least 1" if high is None else f"from 1 to {high}"
        raise ValueError(f"{name}: an integer {allowed}, not {value!r}")
    return value


# Dilated residual networks


def _dilate(stages: Sequence[nn.Module], removed: int) -> None:
    """Remove the strides of the last `removed` stages and dilate their 3x3 convolutions, by SUNet's multi-grid idea.

    The first such stage has base D = 2, the next one 4 (SUNet's a = 2 (j - k)); the 3x3 convolutions of a stage run
    D, 2D, D, 2D, ... in their order, as the two of a SUNet level do. For basic blocks that is D, 2D in each block, for
    bottleneck blocks, which have one 3x3, D and 2D in turn. The authors' rates for ResNets are not known to us: this
    is our reading of "the same multi-grid idea".
    """
    for number, stage in enumerate(stages[len(stages) - removed :], start=1):
        seen = 0
        for conv in stage.modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                rate = 2 * number * (1 + seen % 2)
                conv.dilation = conv.padding = (rate, rate)
                seen += 1


def dilated_resnet(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int | None = None,
    weights: str | None = None,
    task: str,
) -> Baseline:
    """The authors' comparison: dilated_resnet18, -50 or -101.

    torchvision's ResNet, dilated to output stride 16 (the default here) or 8 by `_dilate`, or 32 as it is; head: 3x3
    convolution to 512 channels, BatchNorm, ReLU, dropout 0.1, 1x1 convolution; BatchNorm momentum 0.05 everywhere.
    `weights` names torchvision weights of the ResNet.
    """
    resnet_name = name.removeprefix("dilated_")
    stride = _choose_stride(name, output_stride, (16, 8, 32))
    net: Any = torchvision.models.get_model(resnet_name, weights=_torchvision_weights(weights, resnet_name, "weights"))
    _set_in_channels(net, in_channels, weights)
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    _dilate(stages, removed=(32 // stride).bit_length() - 1)
    head = nn.Sequential(
        nn.Conv2d(net.fc.in_features, 512, 3, padding=1),
        nn.BatchNorm2d(512),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(512, num_classes, 1),
    )
    _initialise(head)
    backbone = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *stages)
    model = FullyConvolutional(backbone, head, num_classes=num_classes, in_channels=in_channels, output_stride=stride)
    set_bn_momentum(model, 0.05)
    return model


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
    """A small dilated residual network: 3x3 stem of stride 2, three stages of basic blocks of stride 2, 1x1 head.

    Channels are width, 2 width, 4 width. Natural stride 16; output stride 8 (the default) or 4 by `_dilate`.
    """
    stride = _choose_stride(name, output_stride, (8, 4, 16))
    _check_count("width", width)
    counts = tuple(num_blocks) if isinstance(num_blocks, tuple | list) else (num_blocks,) * 3
    if len(counts) != 3:
        raise ValueError(f"num_blocks: an integer, or three of them, one a stage of {name}, not {list(counts)}")
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
    _dilate(stages, removed=(16 // stride).bit_length() - 1)
    backbone = nn.Sequential(*_conv_norm_relu(in_channels, width, stride=2), *stages)
    model = FullyConvolutional(
        backbone,
        nn.Conv2d(channels, num_classes, 1),
        num_classes=num_classes,
        in_channels=in_channels,
        output_stride=stride,
    )
    _initialise(model)
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
    """A plain stack of 3x3 convolutions that sees a neighbourhood only: the control without any U-Net or pyramid.

    Two convolutions of stride 2 (to `width` and 2 `width` channels), then `num_blocks` of stride 1, and a 1x1 head:
    a feature sees 7 + 8 num_blocks pixels, 31 by default.
    """
    stride = _choose_stride(name, output_stride, (4,))
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
    )
    _initialise(model)
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
    """A small classic U-Net; `unet_depth` levels, of which the coarsest has stride 2^unet_depth. See `SmallUNet`."""
    _check_count("unet_depth", unet_depth, high=5)
    _choose_stride(name, output_stride, (2**unet_depth,))
    return SmallUNet(
        width=_check_count("width", width), unet_depth=unet_depth, num_classes=num_classes, in_channels=in_channels
    )


# Libraries


def _torchvision_weights(weights: str | None, name: str, field: str, or_from: Iterable[str] = ()) -> Any:
    """The weights entry of that name in torchvision, or None.

    Raises:
        ValueError: torchvision publishes no such weights for the network `name`; lists those it does.
    """
    if weights is None:
        return None
    entries = torchvision.models.get_model_weights(name).__members__
    if weights not in entries:
        raise ValueError(f"{field}: one of {', '.join([*entries, *or_from])} for {name}, not {weights!r}")
    return entries[weights]


def _set_in_channels(net: nn.Module, in_channels: int, weights: str | None) -> None:
    """Replace the first convolution where the input has not 3 channels."""
    if in_channels == 3:
        return
    if weights is not None:
        raise ValueError(f"in_channels: 3 with published weights, not {in_channels}")
    _replace(
        net,
        lambda old: nn.Conv2d(
            in_channels,
            old.out_channels,
            cast(Any, old.kernel_size),
            cast(Any, old.stride),
            cast(Any, old.padding),
            bias=old.bias is not None,
        ),
        [next(path for path, part in net.named_modules() if isinstance(part, nn.Conv2d))],
    )


def _set_num_classes(net: nn.Module, head: nn.Module, num_classes: int, published: int) -> None:
    """New output layers in place of those that came with published weights for another number of classes."""
    inside = {id(part) for part in head.modules()}
    parts = [(path, part) for path, part in net.named_modules() if id(part) in inside]
    _replace(
        net,
        lambda old: (
            nn.Linear(old.in_features, num_classes)
            if isinstance(old, nn.Linear)
            else nn.Conv2d(old.in_channels, num_classes, 1)
        ),
        [path for path, part in parts if published in (getattr(part, k, 0) for k in ("out_features", "out_channels"))],
    )


def _replace(net: nn.Module, new: Callable[[Any], nn.Module], paths: Iterable[str]) -> None:
    for path in paths:
        parent, _, child = path.rpartition(".")
        fresh = new(net.get_submodule(path))
        _initialise(fresh)
        setattr(net.get_submodule(parent), child, fresh)


_BACKBONES = {
    "fcn_resnet50": ("resnet50", 8),
    "deeplabv3_resnet50": ("resnet50", 8),
    "deeplabv3_resnet101": ("resnet101", 8),
    "lraspp_mobilenet_v3_large": ("mobilenet_v3_large", 16),
}
"""torchvision's segmentation networks: backbone and the output stride that the library fixes."""


def torchvision_segmentation(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int | None = None,
    weights: str | None = None,
    task: str,
) -> Baseline:
    """A segmentation network of torchvision.

    `weights` names either weights of the whole network (COCO_WITH_VOC_LABELS_V1; its output layer is new where
    num_classes is another) or weights of the backbone (IMAGENET1K_V1, ...).
    """
    backbone, fixed_stride = _BACKBONES[name]
    stride = _choose_stride(name, output_stride, (fixed_stride,))
    of_backbone = torchvision.models.get_model_weights(backbone).__members__
    if weights in torchvision.models.get_model_weights(name).__members__:
        net: Any = torchvision.models.get_model(name, weights=weights, weights_backbone=None)
        if num_classes != 21:
            _set_num_classes(net, net.classifier, num_classes, published=21)
        net.aux_classifier = None
    else:
        if weights not in of_backbone:
            _torchvision_weights(weights, name, "weights", or_from=of_backbone)
        net = torchvision.models.get_model(
            name, weights=None, weights_backbone=weights, num_classes=num_classes, aux_loss=False
        )
    _set_in_channels(net, in_channels, weights)
    return LibraryModel(
        net,
        task=task,
        num_classes=num_classes,
        in_channels=in_channels,
        output_stride=stride,
        head_prefixes=("net.classifier.",),
    )


def torchvision_classification(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int | None = None,
    weights: str | None = None,
    task: str,
) -> Baseline:
    """A classifier of torchvision; ResNets of bottleneck blocks can keep more resolution by the library's own dilation.

    With `weights` and another num_classes than theirs the output layer is new.
    """
    dilates = name in ("resnet50", "resnet101")
    stride = _choose_stride(name, output_stride, (32, 16, 8) if dilates else (32,))
    options = {"replace_stride_with_dilation": [False, stride <= 8, stride <= 16]} if dilates else {}
    entry = _torchvision_weights(weights, name, "weights")
    published = num_classes if entry is None else len(entry.meta["categories"])
    net: Any = torchvision.models.get_model(name, weights=entry, num_classes=published, **options)
    head = "classifier" if name.startswith("densenet") else "fc"
    if num_classes != published:
        _set_num_classes(net, getattr(net, head), num_classes, published)
    _set_in_channels(net, in_channels, weights)
    return LibraryModel(
        net,
        min_size=32 if name.startswith("densenet") else 1,  # below, its last pool has nothing left
        task=task,
        num_classes=num_classes,
        in_channels=in_channels,
        output_stride=stride,
        head_prefixes=(f"net.{head}.",),
    )


_SMP = {
    "unet_resnet34": ("Unet", "resnet34", (32,)),
    "deeplabv3plus_resnet50": ("DeepLabV3Plus", "resnet50", (16, 8)),
    "segformer_b0": ("Segformer", "mit_b0", (32,)),
    "segformer_b2": ("Segformer", "mit_b2", (32,)),
}
"""Networks of segmentation-models-pytorch: class, encoder and possible output strides, the default first."""


def smp_segmentation(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int | None = None,
    weights: str | None = None,
    task: str,
) -> Baseline:
    """A network of segmentation-models-pytorch; `weights` is its encoder_weights, such as imagenet."""
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError:
        raise ValueError(f"{name}: needs segmentation-models-pytorch; install it with sunets[suite]") from None

    kind, encoder, strides = _SMP[name]
    stride = _choose_stride(name, output_stride, strides)
    published = smp.encoders.encoders[encoder]["pretrained_settings"]
    if weights is not None and weights not in published:
        raise ValueError(f"weights: one of {', '.join(published)} for {name}, not {weights!r}")
    options = {"encoder_output_stride": stride} if len(strides) > 1 else {}
    with torch.device("cpu"):  # its SegFormer reads values of tensors, which the meta device has not
        net = getattr(smp, kind)(
            encoder, encoder_weights=weights, in_channels=in_channels, classes=num_classes, **options
        )
    net.to(torch.get_default_device())
    return LibraryModel(
        net,
        multiple=32,
        task=task,
        num_classes=num_classes,
        in_channels=in_channels,
        output_stride=stride,
        head_prefixes=("net.decoder.", "net.segmentation_head."),
    )

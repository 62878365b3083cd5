"""Baselines from torchvision and segmentation-models-pytorch, among them dilated ResNets, the authors' comparison.

Nothing is downloaded unless `weights` is given.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sunets.models.baselines import Baseline, FullyConvolutional, choose_stride, dilate, initialise
from sunets.models.sunet import check_input, set_bn_momentum


class LibraryModel(Baseline):
    """A network of a library, with its input padded to a size that it accepts.

    Args:
        net: the network; may return a dict with the logits under "out", as torchvision's do.
        multiple: inputs are padded with zeros, right and below, to multiples of this; the logits are cropped.
        min_size: inputs are padded likewise to at least this height and width.
        shared: see `Baseline`.
    """

    def __init__(self, net: nn.Module, *, multiple: int = 1, min_size: int = 1, **shared: Any) -> None:
        super().__init__(**shared)
        self.net = net
        self.multiple = multiple
        self.min_size = min_size

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits from (B, in_channels, H, W); raises ValueError as `check_input` does."""
        check_input(x, self.in_channels)
        height, width = x.shape[2:]
        below, right = (
            max(-(-size // self.multiple) * self.multiple, self.min_size) - size for size in (height, width)
        )
        logits = self.net(F.pad(x, (0, right, 0, below)) if below or right else x)
        logits = logits["out"] if isinstance(logits, dict) else logits
        return cast(Tensor, logits if self.task == "classification" else logits[:, :, :height, :width])


def dilated_resnet(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int | None = None,
    weights: str | None = None,
    task: str,
) -> Baseline:
    """Build the authors' comparison: dilated_resnet18, -50 or -101.

    torchvision's ResNet, dilated to output stride 16 (the default) or 8 by `dilate`, or unchanged (32). Head: 3x3
    convolution to 512 channels, BatchNorm, ReLU, dropout 0.1, 1x1 convolution. BatchNorm momentum is 0.05 everywhere.
    `weights` names torchvision's weights of the ResNet.
    """
    resnet_name = name.removeprefix("dilated_")
    stride = choose_stride(name, output_stride, (16, 8, 32))
    entry = _torchvision_weights(weights, resnet_name, "weights")
    net = _build(resnet_name, entry, weights=entry)
    _set_in_channels(net, in_channels, weights)
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    dilate(stages, removed=(32 // stride).bit_length() - 1)
    head = nn.Sequential(
        nn.Conv2d(net.fc.in_features, 512, 3, padding=1, bias=False),
        nn.BatchNorm2d(512),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(512, num_classes, 1),
    )
    initialise(head)
    backbone = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *stages)
    model = FullyConvolutional(backbone, head, num_classes=num_classes, in_channels=in_channels, output_stride=stride)
    set_bn_momentum(model, 0.05)
    return model


def _torchvision_weights(weights: str | None, name: str, field: str, or_from: Iterable[str] = ()) -> Any:
    """Look up torchvision's weights of the network `name`; None for None.

    Raises:
        ValueError: torchvision publishes no such weights; lists those that it does.
    """
    if weights is None:
        return None
    entries = torchvision.models.get_model_weights(name).__members__
    if weights not in entries:
        allowed = ", ".join(dict.fromkeys([*entries, *or_from]))
        raise ValueError(f"{field}: one of {allowed} for {name}, not {weights!r}")
    return entries[weights]


def _build(name: str, entry: Any, **options: Any) -> Any:
    """Build a network of torchvision.

    Args:
        name: name of the network.
        entry: its published weights, for error messages; or None.
        options: arguments of torchvision's builder, the weights among them.

    Raises:
        ValueError: the weights cannot be downloaded or read; names their address and the path of the cached file.
    """
    try:
        return torchvision.models.get_model(name, **options)
    except Exception as error:  # a failed download, a full disk, a damaged file
        if not any(frame.f_code.co_name == "get_state_dict" for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(entry.url).path).name)
        what = f"{cached} cannot be read" if cached.exists() else "they cannot be downloaded"
        raise ValueError(
            f"weights: {entry.name} of {name}: {what} ({' '.join(str(error).split())[:200] or type(error).__name__}); "
            f"fetch {entry.url} on a machine with a network and put it at {cached}, or set TORCH_HOME to a directory "
            "that has it under hub/checkpoints"
        ) from None


def _set_in_channels(net: nn.Module, in_channels: int, weights: str | None) -> None:
    """Replace the first convolution unless the input has 3 channels."""
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
    """Replace the head's output layers, published for another number of classes."""
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
        initialise(fresh)
        setattr(net.get_submodule(parent), child, fresh)


_BACKBONES = {
    "fcn_resnet50": ("resnet50", 8),
    "deeplabv3_resnet50": ("resnet50", 8),
    "deeplabv3_resnet101": ("resnet101", 8),
    "lraspp_mobilenet_v3_large": ("mobilenet_v3_large", 16),
}
"""torchvision's segmentation networks: backbone, and the output stride that torchvision fixes."""


def torchvision_segmentation(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int | None = None,
    weights: str | None = None,
    task: str,
) -> Baseline:
    """Build a segmentation network of torchvision.

    `weights` names weights of the whole network (COCO_WITH_VOC_LABELS_V1; with another num_classes the output layer is
    new) or of the backbone (IMAGENET1K_V1, ...).
    """
    backbone, fixed_stride = _BACKBONES[name]
    stride = choose_stride(name, output_stride, (fixed_stride,))
    of_backbone = torchvision.models.get_model_weights(backbone).__members__
    if weights in torchvision.models.get_model_weights(name).__members__:
        entry = _torchvision_weights(weights, name, "weights")
        net = _build(name, entry, weights=entry, weights_backbone=None)
        if num_classes != 21:
            _set_num_classes(net, net.classifier, num_classes, published=21)
        net.aux_classifier = None
    else:
        unknown = weights is not None and weights not in of_backbone  # the error lists both kinds
        network, others = (name, of_backbone) if unknown else (backbone, ())
        entry = _torchvision_weights(weights, network, "weights", or_from=others)
        net = _build(name, entry, weights=None, weights_backbone=entry, num_classes=num_classes, aux_loss=False)
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
    """Build a classifier of torchvision; ResNets of bottleneck blocks can be dilated, by torchvision's option.

    With `weights` for another num_classes, the output layer is new.
    """
    dilates = name in ("resnet50", "resnet101")
    stride = choose_stride(name, output_stride, (32, 16, 8) if dilates else (32,))
    options = {"replace_stride_with_dilation": [False, stride <= 8, stride <= 16]} if dilates else {}
    entry = _torchvision_weights(weights, name, "weights")
    published = num_classes if entry is None else len(entry.meta["categories"])
    net = _build(name, entry, weights=entry, num_classes=published, **options)
    head = "classifier" if name.startswith("densenet") else "fc"
    if num_classes != published:
        _set_num_classes(net, getattr(net, head), num_classes, published)
    _set_in_channels(net, in_channels, weights)
    return LibraryModel(
        net,
        min_size=32 if name.startswith("densenet") else 1,  # for less, its last pool has no output
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
    """Build a network of segmentation-models-pytorch; `weights` is its encoder_weights, such as imagenet."""
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError:
        raise ValueError(f"{name}: needs segmentation-models-pytorch; install it with sunets[suite]") from None

    kind, encoder, strides = _SMP[name]
    stride = choose_stride(name, output_stride, strides)
    published = smp.encoders.encoders[encoder]["pretrained_settings"]
    if weights is not None and weights not in published:
        raise ValueError(f"weights: one of {', '.join(published)} for {name}, not {weights!r}")
    options = {"encoder_output_stride": stride} if len(strides) > 1 else {}
    try:
        with torch.device("cpu"):  # SegFormer's constructor reads tensors, which have no values on the meta device
            net = getattr(smp, kind)(
                encoder, encoder_weights=weights, in_channels=in_channels, classes=num_classes, **options
            )
    except OSError as error:  # base of huggingface_hub's errors
        if weights is None:
            raise
        hub = published[weights]
        raise ValueError(
            f"weights: {weights} of {encoder} cannot be downloaded ({' '.join(str(error).split())[:200]}); fetch "
            f"{hub['repo_id']}, revision {hub['revision']}, from the Hugging Face hub on a machine with a "
            "network, copy its cache, and set HF_HOME to it"
        ) from None
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

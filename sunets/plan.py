"""How many GPU hours and how much GPU memory a benchmark takes: counted without its data, and without a GPU."""

from __future__ import annotations

import csv
import functools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sunets.config import Config, ConfigError, DataConfig, ModelConfig, Suite, Task, TestTimeConfig
from sunets.data import iterations_per_epoch
from sunets.evaluate import window_starts
from sunets.profile import count_macs, input_channels, saved_bytes
from sunets.stages import Layout
from sunets.sunet import SUNet
from sunets.zoo import create_model

Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""

LAUNCH_SECONDS = 10e-6
"""Time that a GPU needs to start a kernel from Python."""
GIB = 2**30

PUBLISHED: dict[str, tuple[dict[str, int], int, Size]] = {
    "voc2012": (
        {"train": 1464, "val": 1449, "trainval": 2913, "test": 1456, "train_aug": 10582, "trainval_aug": 12031},
        21,
        (375, 500),
    ),
    "coco": ({"train": 118287, "val": 5000}, 21, (480, 640)),
    "cityscapes": ({"train": 2975, "val": 500, "test": 1525}, 19, (1024, 2048)),
    "camvid": ({"train": 367, "val": 101, "test": 233}, 11, (360, 480)),
    "imagefolder": ({"train": 1281167, "val": 50000}, 1000, (375, 500)),
}
"""Images of each split, classes and the usual size of an image, as published; of class folders, those of ImageNet."""

ASSUMPTIONS = """\
One GPU: an estimate from the larger of two things, the operations (2 a multiply-add) at a sustained {tflops:g} TFLOP/s
(--gpu-tflops) and {launch:g} microseconds for every operator of a pass, which is what small networks take; one training
at a time, with images read fast enough and full batches. Multiply-adds are counted, not measured.
Train: forward and backward pass of all epochs, and every scoring of the validation split; test: every test-time variant
with its scales, mirrors and padded windows, at the same rate, though it computes in float32. Both of all seeds.
Images: {images}; scored ones are taken to be {height} x {width} pixels.
Memory: what autograd keeps for the backward pass of the images of one forward pass, and weights, gradients and the
optimizer's state, in float32; mem. eff.: with memory_efficient=True. Workspaces, intermediate results and CUDA itself
come on top. It is one process's; under torchrun the processes share train.batch_size equally, the images of a forward
pass are those of a process's share at most, and what is kept for them shrinks likewise."""
AMP = (
    "With train.amp = {amp} activations are kept in 16 bits in part: what is kept is float32's, and so an upper figure."
)
COCO = "an upper figure, since only images with over 1,000 labelled pixels of a VOC class are kept"


@dataclass(frozen=True)
class PlanRow:
    """What one model of a benchmark takes."""

    model: str
    """Key under `models`."""
    trainings: int
    """One a seed."""
    size: Size
    """Of a training image."""
    gmacs_training_image: float
    """Multiply-adds (10^9) of a forward and backward pass for one image."""
    images: int
    """That one training goes through, over all epochs."""
    gpu_hours_train: float
    """Of all trainings, validation included."""
    gpu_hours_test: float
    """Of scoring the test split, all trainings and test-time variants."""
    images_per_pass: int
    """Images of a forward pass of training, one process."""
    memory_gib: float
    """Activations kept, weights, gradients and optimizer state (2^30 bytes), in float32."""
    memory_gib_efficient: float | None
    """The same with each U-Net recomputed in the backward pass; None where that does not exist."""


@dataclass(frozen=True)
class _Data:
    """What is known of a data set without its images."""

    name: str
    counts: Mapping[str, int]
    classes: int
    size: Size
    """Of an image that is not resized."""
    source: str
    """Where the counts are from, in words."""

    def images(self, key: str, split: str) -> int:
        if split not in self.counts:
            raise ConfigError(
                f"data.{key}: no images known of {self.name}'s {split!r}; there are {', '.join(self.counts)}"
            )
        return self.counts[split]


def plan_preset(suite: Suite, *, gpu_tflops: float, root: Path = Path()) -> list[PlanRow]:
    """Print an estimate of the GPU hours and memory of every model of a benchmark, and what it assumes.

    Args:
        suite: the parameters.
        gpu_tflops: rate that training sustains on a GPU, in 10^12 operations a second; above 0.
        root: of the checkout, where prepared data are looked for.

    Returns:
        A row a model.

    Raises:
        ConfigError: a model cannot be built or is too deep for its images, or the number of images is not known.
    """
    data = _data(suite.data, Layout(suite.benchmark, root).data)
    rows = []
    for key in suite.models:
        try:
            rows.append(_row(key, suite.run(key, suite.seeds[0]), len(suite.seeds), data, gpu_tflops))
        except ConfigError:
            raise
        except (ValueError, RuntimeError) as error:  # what a network says of its arguments or of its input
            raise ConfigError(f"models.{key}: {' '.join(str(error).split())}") from None
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    console.print(_table(suite.benchmark, rows))
    height, width = _scored_size(suite.run(rows[0].model, suite.seeds[0]), data)
    facts = {"tflops": gpu_tflops, "launch": 1e6 * LAUNCH_SECONDS, "images": data.source}
    console.print(ASSUMPTIONS.format(**facts, height=height, width=width))
    if amp := {suite.run(key, suite.seeds[0]).train.amp for key in suite.models} - {"none"}:
        console.print(AMP.format(amp=" or ".join(sorted(amp))))
    if suite.ablations:
        console.print("Ablation studies are not in it: python -m ablations plan.")
    return rows


def _table(benchmark: str, rows: list[PlanRow]) -> Table:
    table = Table(title=f"{benchmark}: an estimate of GPU hours and memory", title_justify="left")
    table.add_column("model", no_wrap=True)
    for heading in ("trainings", "input px", "GMACs fwd+bwd an image", "images a training", "train GPU h", "test GPU h",
                    "images a pass", "memory GiB", "mem. eff. GiB"):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        efficient = "" if row.memory_gib_efficient is None else _short(row.memory_gib_efficient)
        table.add_row(
            row.model,
            str(row.trainings),
            f"{row.size[0]} x {row.size[1]}",
            _short(row.gmacs_training_image),
            f"{row.images:,}",
            _short(row.gpu_hours_train),
            _short(row.gpu_hours_test),
            str(row.images_per_pass),
            _short(row.memory_gib),
            efficient,
        )
    table.add_section()
    train, test = sum(row.gpu_hours_train for row in rows), sum(row.gpu_hours_test for row in rows)
    largest = f"max. {_short(max(row.memory_gib for row in rows))}"
    trainings = str(sum(row.trainings for row in rows))
    table.add_row("all", trainings, "", "", "", _short(train), _short(test), "", largest, "")
    return table


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _data(data: DataConfig, folder: Path) -> _Data:
    """Numbers of images: drawn ones from the configuration, else those that were prepared, else the published ones."""
    if data.name.startswith("synthetic"):  # what was prepared may have been drawn with other settings
        drawn = data.synthetic
        counts = {"train": drawn.train, "val": drawn.val, "test": drawn.test}
        classes = 8 if data.task == "classification" else 5
        return _Data(data.name, counts, classes, (drawn.image_size, drawn.image_size), "as data.synthetic sets them")
    path = folder / "manifest.json"
    try:
        tree = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: not readable ({error}); run python -m sunets prepare again") from None
    if tree.get("name") == data.name:
        with (folder / "splits" / f"{next(iter(tree['counts']))}.csv").open(newline="") as file:
            sides = [(int(row["height"]), int(row["width"])) for row in csv.DictReader(file)]
        height, width = (round(statistics.median(side)) for side in zip(*sides, strict=True))
        return _Data(data.name, tree["counts"], len(tree["classes"]), (height, width), f"as prepared in {folder}")
    if data.name not in PUBLISHED:
        raise ConfigError(
            f"data.name: how many images the data set {data.name!r} has is known once it is prepared, and {path} does "
            "not hold it; run python -m sunets prepare first"
        )
    source = "as published" + (f" ({COCO})" if data.name == "coco" else "")
    source += " for ImageNet (prepare your own class folders first)" if data.name == "imagefolder" else ""
    return _Data(data.name, *PUBLISHED[data.name], source)


def _scored_size(config: Config, data: _Data) -> Size:
    """What `sunets.train.scoring_dataset` makes of an image."""
    crop = config.train.augment.resized_crop if config.data.task == "classification" else None
    return (crop, crop) if crop is not None else config.data.size or data.size


def _row(key: str, config: Config, seeds: int, data: _Data, tflops: float) -> PlanRow:
    train, augment = config.train, config.train.augment
    network = _Network(config.model.model_copy(update={"weights": None}), config.data.task, data.classes)
    if augment.resized_crop is not None:
        size: Size = (augment.resized_crop, augment.resized_crop)
    else:
        size = augment.crop or config.data.size or data.size
    scored = _scored_size(config, data)

    def hours(images: int, cost: tuple[int, int], batch_size: int) -> float:
        macs, operators = cost
        launches = math.ceil(images / batch_size) * operators
        return max(2 * images * macs / (tflops * 1e12), launches * LAUNCH_SECONDS) / 3600

    per_pass = min(train.micro_batch_size or train.batch_size, train.batch_size)
    trained = data.images("train_split", config.data.train_split)
    images = train.epochs * train.batch_size * iterations_per_epoch(trained, train.batch_size)
    step = _count(network, size, backward=True)
    validated = data.images("val_split", config.data.val_split)
    validations = math.ceil(train.epochs / train.validate_every)
    training = hours(images, step, per_pass)
    training += validations * hours(validated, _count(network, scored), train.batch_size)
    tested = data.images("test_split", config.data.test_split)
    testing = sum(
        hours(tested * number, _count(network, tile), config.evaluate.batch_size)
        for variant in config.evaluate.variants.values()
        for tile, number in forward_passes(variant, scored)
    )

    def memory(network: _Network) -> float:
        state = {"adamw": 2, "sgd": int(train.momentum > 0)}[train.optimizer]
        parameters = sum(p.numel() for p in _built(network).parameters())
        return (_saved(network, size, per_pass) + 4 * (2 + state) * parameters) / GIB

    efficient = None
    if isinstance(_built(network), SUNet):
        recomputing = network.model.model_copy(update={"memory_efficient": True})
        efficient = memory(_Network(recomputing, network.task, network.classes))
    return PlanRow(
        model=key,
        trainings=seeds,
        size=size,
        gmacs_training_image=step[0] / 1e9,
        images=images,
        gpu_hours_train=seeds * training,
        gpu_hours_test=seeds * testing,
        images_per_pass=per_pass,
        memory_gib=memory(network),
        memory_gib_efficient=efficient,
    )


def forward_passes(variant: TestTimeConfig, size: Size) -> list[tuple[Size, int]]:
    """What `sunets.evaluate.multi_scale_probabilities` sends through a network for one image.

    Args:
        variant: scales, mirroring, window and overlap.
        size: of the image.

    Returns:
        For every scale the size of its windows (of the scaled image, without a window) and their number, mirrors
        included.
    """
    passes = []
    for scale in variant.scales:
        scaled = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        window = variant.window or scaled
        rows, columns = (len(window_starts(scaled[i], window[i], variant.window_overlap)) for i in (0, 1))
        passes.append((window, rows * columns * (2 if variant.flip else 1)))
    return passes


# Counts: equal networks at equal sizes are counted once.


@dataclass(frozen=True)
class _Network:
    model: ModelConfig
    task: Task
    classes: int


@functools.cache
def _built(network: _Network) -> nn.Module:
    with torch.device("meta"):  # no memory, no initial weights
        return create_model(**network.model.arguments(), task=network.task, num_classes=network.classes).eval()


class Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@functools.cache
def _count(network: _Network, size: Size, backward: bool = False) -> tuple[int, int]:
    """Multiply-adds and operators of a forward pass, or a forward and backward pass, for one image."""
    model, operators = _built(network), Operators()
    x = torch.empty(1, input_channels(model), *size, device="meta")
    with operators:
        macs = sum(count_macs(model, x, backward=backward)[""].values())
    return macs, operators.count


@functools.cache
def _saved(network: _Network, size: Size, images: int) -> int:
    """Bytes that autograd keeps for the backward pass of that many images."""
    model = _built(network)
    return saved_bytes(model, torch.empty(images, input_channels(model), *size, device="meta"))

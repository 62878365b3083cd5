"""How many GPU hours and how much GPU memory a benchmark takes: counted without its data, and without a GPU."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sunets.core.config import Config, ConfigError, DataConfig, ModelConfig, Suite, Task, VariantConfig
from sunets.core.paths import BenchmarkPaths
from sunets.core.recipes import first_trial
from sunets.data.loading import iterations_per_epoch
from sunets.data.manifest import read_split, read_tree, used_splits
from sunets.data.picture import DataError
from sunets.evaluation.multi_scale import window_starts
from sunets.models.sunet import SUNet
from sunets.models.zoo import create_model
from sunets.profiling.memory import saved_bytes
from sunets.profiling.modes import input_channels
from sunets.profiling.multiply_adds import count_macs

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
NOTES = {
    "coco": " (more than are used: only images with over 1,000 labelled pixels of a VOC class are kept)",
    "imagefolder": " for ImageNet (of other class folders they are known once they are prepared)",
}
DRAWN_CLASSES: dict[Task, int] = {"segmentation": 5, "classification": 8}
"""Classes of the embedded data sets."""

ASSUMPTIONS = """\
One GPU: an estimate from the larger of two things, the operations (2 a multiply-add) at a sustained {tflops:g} TFLOP/s
(--gpu-tflops) and {launch:g} microseconds for every operator of a pass, which is what small networks take; one training
at a time, with images read fast enough and full batches. Trainings are those of all seeds and of all trials that tune
the recipe.
Train: the forward and backward passes of all epochs, and every scoring of the validation split. Test: every test-time
variant with its scales, mirrors and padded windows, at the same rate, though it computes in float32.
Images: numbers {source}.
One that is neither resized nor cropped is taken to have {height} x {width} pixels.
Memory: what autograd keeps for the backward pass of the images of one forward pass, and weights, gradients and the
optimizer's state, in float32; mem. eff.: with memory_efficient=True; all: the largest. Workspaces, intermediate results
and CUDA itself come on top. Of one process: torchrun divides train.batch_size by the number of processes, and with it
the images of a pass, unless train.micro_batch_size is smaller, and the part of the memory that is kept for them."""
AMP = "With train.amp the kept activations are mostly of 16 bits: the figure is float32's, and so an upper one."


@dataclass(frozen=True)
class PlanRow:
    """What one model of a benchmark takes."""

    model: str
    """Key under `models`."""
    trainings: int
    """One per seed, and one per trial of the tuning."""
    size: Size
    """Of a training image."""
    gmacs_training_image: float
    """Multiply-adds (10^9) of a forward and backward pass for one image."""
    images: int
    """That the training of one seed goes through, over all epochs."""
    gpu_hours_train: float
    """Of all trainings, validation included."""
    gpu_hours_test: float
    """Of scoring the test split, all seeds and test-time variants."""
    images_per_pass: int
    """Images of a forward pass of training, one process."""
    memory_gib: float
    """Activations kept, weights, gradients and optimizer state (2^30 bytes), in float32."""
    memory_gib_efficient: float | None
    """The same with each U-Net recomputed in the backward pass; None where that does not exist."""


@dataclass(frozen=True)
class Passes:
    """Images that go through a network in one way."""

    images: int
    macs: int
    """Multiply-adds of one image."""
    operators: int
    """Operators of a pass, which do not depend on the images in it."""
    batch_size: int
    times: int = 1
    """How often all of the images pass."""

    def gpu_hours(self, tflops: float) -> float:
        """Hours of a GPU: its arithmetic, or the start of every operator, whichever takes longer.

        Args:
            tflops: rate that the GPU sustains, in 10^12 operations a second; a multiply-add is two.
        """
        launches = math.ceil(self.images / self.batch_size) * self.operators
        return self.times * max(2 * self.images * self.macs / (tflops * 1e12), launches * LAUNCH_SECONDS) / 3600


@dataclass(frozen=True)
class TrainingWork:
    """All that one training and the scoring of its network send through the network."""

    size: Size
    """Of a training image."""
    train: Passes
    """Forward and backward."""
    validation: Passes
    test: tuple[Passes, ...]
    """Of every test-time variant and scale."""


@dataclass(frozen=True)
class DataFacts:
    """What is known of a data set without its images."""

    counts: Mapping[str, int]
    classes: int
    size: Size
    """Of an image, resized as `data.size` says."""
    source: str
    """Where the counts are from, in words."""


def plan_preset(suite: Suite, *, gpu_tflops: float, root: Path = Path()) -> list[PlanRow]:
    """Print an estimate of the GPU hours and memory of every model of a benchmark, and what it assumes.

    Args:
        suite: the parameters.
        gpu_tflops: rate that training sustains on a GPU, in 10^12 operations a second; above 0.
        root: of the checkout, where prepared data are looked for.

    Returns:
        A row a model.

    Raises:
        ConfigError: the number of images is not known, or a model cannot be built or does not take their size.
    """
    data = dataset_facts(suite.data, BenchmarkPaths(suite.benchmark, root).data)
    configs = {key: suite.config(key, suite.seeds[0]) for key in suite.models}
    rows = []
    for key, config in configs.items():
        try:
            row = _row(key, config, len(suite.seeds), data, gpu_tflops)
            if trials := suite.tune.trials:
                work = training_work(first_trial(suite, key), data)
                hours = trials * (work.train.gpu_hours(gpu_tflops) + work.validation.gpu_hours(gpu_tflops))
                row = replace(row, trainings=row.trainings + trials, gpu_hours_train=row.gpu_hours_train + hours)
            rows.append(row)
        except (ValueError, RuntimeError) as error:  # what a network says of its arguments or of its input
            raise ConfigError(f"models.{key}: {' '.join(str(error).split())}") from None
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    console.print(_table(suite.benchmark, rows))
    facts = {"tflops": gpu_tflops, "launch": 1e6 * LAUNCH_SECONDS, "source": data.source}
    console.print(ASSUMPTIONS.format(**facts, height=data.size[0], width=data.size[1]))
    if any(config.train.amp != "none" for config in configs.values()):
        console.print(AMP)
    if suite.ablations:
        console.print("Ablation studies are not in it: python -m ablations plan.")
    return rows


def _table(benchmark: str, rows: list[PlanRow]) -> Table:
    table = Table(title=f"{benchmark}: an estimate of GPU hours and memory", title_justify="left")
    table.add_column("model", no_wrap=True)
    headings = ("trainings", "input\npx", "fwd+bwd\nGMACs\nan image", "10^3\nimages a\ntraining", "train\nGPU h",
                "test\nGPU h", "images\na pass", "memory\nGiB", "mem. eff.\nGiB")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = (row.gmacs_training_image, row.images / 1e3, row.gpu_hours_train, row.gpu_hours_test)
        memory = (_short(row.memory_gib), _short(row.memory_gib_efficient))
        size = f"{row.size[0]}x{row.size[1]}"
        table.add_row(row.model, str(row.trainings), size, *map(_short, figures), str(row.images_per_pass), *memory)
    table.add_section()
    hours = (sum(row.gpu_hours_train for row in rows), sum(row.gpu_hours_test for row in rows))
    largest = _short(max(row.memory_gib for row in rows))
    table.add_row("all", str(sum(row.trainings for row in rows)), "", "", "", *map(_short, hours), "", largest)
    return table


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "< 0.01"


def dataset_facts(data: DataConfig, folder: Path) -> DataFacts:
    """Numbers of images: drawn ones from the configuration, else those that were prepared, else the published ones.

    Raises:
        ConfigError, DataError, RecordError: they are not known, or what was prepared is damaged; names the file.
    """
    path, splits = folder / "manifest.json", used_splits(data)
    try:
        tree = read_tree(folder, "name", "task", "counts", "classes") if path.exists() else {}
        items = read_split(folder, tree, data.test_split, Path()) if data.test_split in tree.get("counts", {}) else ()
    except DataError as error:
        raise ConfigError(str(error)) from None
    if data.name.startswith("synthetic"):  # what was prepared may have been drawn with other settings
        drawn = data.synthetic
        counts = {"train": drawn.train, "val": drawn.val, "test": drawn.test}
        classes, size = DRAWN_CLASSES[data.task], (drawn.image_size, drawn.image_size)
        source = "of data.synthetic"
    elif tree.get("name") == data.name and set(splits) <= set(tree["counts"]):
        counts, classes, source = tree["counts"], len(tree["classes"]), f"as prepared in {folder}"
        size = (round(statistics.median(i.height for i in items)), round(statistics.median(i.width for i in items)))
    elif data.name in PUBLISHED:
        (counts, classes, size), source = PUBLISHED[data.name], "as published" + NOTES.get(data.name, "")
    else:
        raise ConfigError(
            f"{path}: does not hold the data set {data.name!r} with the splits {', '.join(splits)}, whose numbers of "
            "images are not known otherwise; run python -m sunets prepare first"
        )
    if unknown := [split for split in splits if split not in counts]:
        raise ConfigError(f"split {unknown[0]!r}: {data.name} has {', '.join(counts)}; change data.*_split")
    return DataFacts(counts, classes, data.size or size, source)


def training_work(config: Config, data: DataFacts) -> TrainingWork:
    """Count what a configuration's training, validations and test send through its network.

    Raises:
        ValueError, RuntimeError: the network cannot be built, or does not take images of that size.
    """
    train, augment, evaluate = config.train, config.train.augment, config.evaluate
    square = (augment.resized_crop, augment.resized_crop) if augment.resized_crop is not None else None
    size: Size = square or augment.crop or data.size
    # As `sunets.training.recipe.scoring_dataset` has it.
    scored: Size = (square if config.data.task == "classification" else None) or data.size
    network = _network(config, data)
    trained, validated, tested = (
        data.counts[split] for split in (config.data.train_split, config.data.val_split, config.data.test_split)
    )
    images = train.epochs * train.batch_size * iterations_per_epoch(trained, train.batch_size)
    validations = math.ceil(train.epochs / train.validate_every)
    return TrainingWork(
        size=size,
        train=Passes(images, *_count(network, size, backward=True), images_per_pass(config)),
        validation=Passes(validated, *_count(network, scored), train.batch_size, times=validations),
        test=tuple(
            Passes(tested * number, *_count(network, window), evaluate.batch_size)
            for variant in evaluate.variants.values()
            for window, number in forward_passes(variant, scored)
        ),
    )


def images_per_pass(config: Config) -> int:
    """Images of a forward pass of training, one process."""
    return min(config.train.micro_batch_size or config.train.batch_size, config.train.batch_size)


def _row(key: str, config: Config, seeds: int, data: DataFacts, tflops: float) -> PlanRow:
    train, network, work = config.train, _network(config, data), training_work(config, data)

    def memory(network: _Network) -> float:
        copies = 2 + {"adamw": 2, "sgd": int(train.momentum > 0)}[train.optimizer]
        parameters = sum(p.numel() for p in _built(network).parameters())
        return (_saved(network, work.size, images_per_pass(config)) + 4 * copies * parameters) / GIB

    recomputing = replace(network, model=network.model.model_copy(update={"memory_efficient": True}))
    return PlanRow(
        model=key,
        trainings=seeds,
        size=work.size,
        gmacs_training_image=work.train.macs / 1e9,
        images=work.train.images,
        gpu_hours_train=seeds * (work.train.gpu_hours(tflops) + work.validation.gpu_hours(tflops)),
        gpu_hours_test=seeds * sum(passes.gpu_hours(tflops) for passes in work.test),
        images_per_pass=images_per_pass(config),
        memory_gib=memory(network),
        memory_gib_efficient=memory(recomputing) if isinstance(_built(network), SUNet) else None,
    )


def forward_passes(variant: VariantConfig, size: Size) -> list[tuple[Size, int]]:
    """What `sunets.evaluation.multi_scale.multi_scale_probabilities` sends through a network for one image.

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


def _network(config: Config, data: DataFacts) -> _Network:
    return _Network(config.model.model_copy(update={"weights": None}), config.data.task, data.classes)


@functools.cache
def _built(network: _Network) -> nn.Module:
    with torch.device("meta"):  # no memory, no initial weights
        return create_model(**network.model.arguments(), task=network.task, num_classes=network.classes).eval()


class _Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@functools.cache
def _count(network: _Network, size: Size, backward: bool = False) -> tuple[int, int]:
    """Multiply-adds and operators of a forward pass, or a forward and backward pass, for one image."""
    model, operators = _built(network), _Operators()
    x = torch.empty(1, input_channels(model), *size, device="meta")
    with operators:
        macs = sum(count_macs(model, x, backward=backward)[""].values())
    return macs, operators.count


@functools.cache
def _saved(network: _Network, size: Size, images: int) -> int:
    """Bytes that autograd keeps for the backward pass of that many images."""
    model = _built(network)
    return saved_bytes(model, torch.empty(images, input_channels(model), *size, device="meta"))

"""Estimates of the GPU hours and memory of a benchmark, without its data and without a GPU."""

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
from sunets.core.finalists import tuning_trainings
from sunets.core.paths import BenchmarkPaths
from sunets.core.recipes import first_trial
from sunets.data import camvid, cityscapes, coco, imagefolder, synthetic, voc
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
"""Time to launch a GPU kernel from Python."""
GIB = 2**30

PUBLISHED: dict[str, tuple[dict[str, int], int, Size]] = {
    "voc2012": (voc.COUNTS, len(voc.CLASSES), voc.IMAGE_SIZE),
    "coco": (coco.COUNTS, len(voc.CLASSES), coco.IMAGE_SIZE),
    "cityscapes": (cityscapes.COUNTS, len(cityscapes.CLASSES), cityscapes.IMAGE_SIZE),
    "camvid": (camvid.COUNTS, len(camvid.CLASSES), camvid.IMAGE_SIZE),
    "imagefolder": (imagefolder.IMAGENET_COUNTS, imagefolder.IMAGENET_CLASSES, imagefolder.IMAGENET_SIZE),
}
"""Images per split, classes and usual image size, as published; of class folders, those of ImageNet."""
NOTES = {
    "coco": " (an upper bound: only images with over 1,000 labelled pixels of a VOC class are used)",
    "imagefolder": " for ImageNet (prepare other class folders to know theirs)",
}

ASSUMPTIONS = """\
Hours: of all seeds and all tuning trials on one GPU, one training at a time. A pass takes the larger of its
operations (2 per multiply-add) at a sustained {tflops:g} TFLOP/s (--gpu-tflops) and {launch:g} microseconds per
operator, which dominates in small networks. Reading images is assumed not to limit, and batches to be full.
Train: forward and backward passes of all epochs, and all scorings of the validation split. Test: every test-time
variant with its scales, mirrors and padded windows, at the same rate, although it computes in float32.
Images: numbers {origin}; one that is neither resized nor cropped is assumed to have {height} x {width} pixels.
Memory: activations that autograd saves in one forward pass, weights, gradients and optimizer state, in float32;
mem. eff.: with memory_efficient=True; all: the largest. Workspaces, intermediate results and CUDA come on top. It is
that of one process: torchrun divides train.batch_size, and so the activations, by the number of processes, unless
train.micro_batch_size is smaller."""
AMP = "With train.amp most saved activations have 16 bits: the memory, which is that of float32, is an upper bound."


@dataclass(frozen=True)
class PlanRow:
    """Estimate for one model of a benchmark."""

    model: str
    """Key under `models`."""
    trainings: int
    """One per seed, and one per trial of the tuning."""
    size: Size
    """Size of a training image."""
    gmacs_training_image: float
    """Multiply-adds (10^9) of a forward and backward pass for one image."""
    images: int
    """Images of one training, over all epochs."""
    gpu_hours_train: float
    """GPU hours of all trainings, including validation."""
    gpu_hours_test: float
    """GPU hours of scoring the test split with all trainings and test-time variants."""
    images_per_pass: int
    """Images per forward pass of training and process."""
    memory_gib: float
    """Saved activations, weights, gradients and optimizer state in float32 (GiB)."""
    memory_gib_efficient: float | None
    """The same with `memory_efficient`; None for other networks than SUNets."""


@dataclass(frozen=True)
class Passes:
    """Passes of a set of images through a network."""

    images: int
    macs: int
    """Multiply-adds of one image."""
    operators: int
    """Operators of a pass, independent of its images."""
    batch_size: int
    times: int = 1
    """Passes over the whole set."""

    def gpu_hours(self, tflops: float) -> float:
        """Estimate GPU hours at a sustained rate of `tflops` 10^12 operations per second, two per multiply-add."""
        launches = math.ceil(self.images / self.batch_size) * self.operators
        return self.times * max(2 * self.images * self.macs / (tflops * 1e12), launches * LAUNCH_SECONDS) / 3600


@dataclass(frozen=True)
class TrainingWork:
    """All passes of one training and of the scoring of its network."""

    size: Size
    """Size of a training image."""
    train: Passes
    """Forward and backward."""
    validation: Passes
    test: tuple[Passes, ...]
    """One per test-time variant and scale."""

    def training_hours(self, tflops: float) -> float:
        """Estimate GPU hours of the training and its validations; see `Passes.gpu_hours`."""
        return self.train.gpu_hours(tflops) + self.validation.gpu_hours(tflops)

    def test_hours(self, tflops: float) -> float:
        """Estimate GPU hours of the test."""
        return sum(passes.gpu_hours(tflops) for passes in self.test)


@dataclass(frozen=True)
class DataFacts:
    """Facts about a data set that are known without its images."""

    counts: Mapping[str, int]
    classes: int
    size: Size
    """Size of an image after `data.size`."""
    origin: str
    """Origin of the counts, in words."""


def plan_preset(suite: Suite, *, gpu_tflops: float, root: Path = Path()) -> list[PlanRow]:
    """Print an estimate of the GPU hours and memory of every model of a benchmark, with its assumptions.

    `gpu_tflops` is the rate that training sustains on a GPU, in 10^12 operations per second.

    Raises:
        ConfigError: the number of images is unknown, or a model cannot be built or does not accept their size.
    """
    data = dataset_facts(suite.data, BenchmarkPaths(suite.benchmark, root).data)
    configs = {key: suite.config(key, suite.seeds[0]) for key in suite.models}
    rows = []
    for key, config in configs.items():
        try:
            row = _row(key, config, len(suite.seeds), data, gpu_tflops)
            if trials := tuning_trainings(suite.tune.trials):
                hours = trials * training_work(first_trial(suite, key), data).training_hours(gpu_tflops)
                row = replace(row, trainings=row.trainings + trials, gpu_hours_train=row.gpu_hours_train + hours)
            rows.append(row)
        except (ValueError, RuntimeError) as error:  # invalid arguments or input of a network
            raise ConfigError(f"models.{key}: {' '.join(str(error).split())}") from None
    facts = {"tflops": gpu_tflops, "launch": 1e6 * LAUNCH_SECONDS, "origin": data.origin}
    notes = [ASSUMPTIONS.format(**facts, height=data.size[0], width=data.size[1])]
    if any(config.train.amp != "none" for config in configs.values()):
        notes.append(AMP)
    if suite.ablations:
        notes.append("Not included: ablation studies (python -m ablations plan).")
    print_estimate(_table(suite.benchmark, rows), *notes)
    return rows


def print_estimate(table: Table, *notes: str) -> None:
    """Print a table and what it assumes, at a width of 120 columns where no terminal has another."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    for note in notes:
        console.print(note)


def _table(benchmark: str, rows: list[PlanRow]) -> Table:
    table = Table(title=f"{benchmark}: an estimate of GPU hours and memory", title_justify="left")
    table.add_column("model", no_wrap=True)
    headings = ("trainings", "input\npx", "fwd+bwd\nGMACs\nper image", "10^3\nimages per\ntraining", "train\nGPU h",
                "test\nGPU h", "images\nper pass", "memory\nGiB", "mem. eff.\nGiB")  # fmt: skip
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
    """Look up the numbers of images: in the configuration of drawn data, the prepared data, or published values.

    Raises:
        ConfigError, DataError, RecordError: they are unknown, or the prepared data are damaged; names the file.
    """
    path, splits = folder / "manifest.json", used_splits(data)
    try:
        tree = read_tree(folder, "name", "task", "counts", "classes") if path.exists() else {}
        items = read_split(folder, tree, data.test_split, Path()) if data.test_split in tree.get("counts", {}) else ()
    except DataError as error:
        raise ConfigError(str(error)) from None
    if data.name.startswith("synthetic"):  # prepared data may have been drawn with other settings
        drawn = data.synthetic
        counts = {"train": drawn.train, "val": drawn.val, "test": drawn.test}
        classes, size = len(synthetic.class_names(data.task)), (drawn.image_size, drawn.image_size)
        origin = "of data.synthetic"
    elif tree.get("name") == data.name and set(splits) <= set(tree["counts"]):
        counts, classes, origin = tree["counts"], len(tree["classes"]), f"as prepared in {folder}"
        size = (round(statistics.median(i.height for i in items)), round(statistics.median(i.width for i in items)))
    elif data.name in PUBLISHED:
        (counts, classes, size), origin = PUBLISHED[data.name], "as published" + NOTES.get(data.name, "")
    else:
        raise ConfigError(
            f"{path}: does not hold the data set {data.name!r} with the splits {', '.join(splits)}, so the numbers "
            "of images are unknown; run python -m sunets prepare first"
        )
    if unknown := [split for split in splits if split not in counts]:
        raise ConfigError(f"split {unknown[0]!r}: {data.name} has {', '.join(counts)}; change data.*_split")
    return DataFacts(counts, classes, data.size or size, origin)


def training_work(config: Config, data: DataFacts) -> TrainingWork:
    """Count the passes of a configuration's training, validations and test.

    Raises:
        ValueError, RuntimeError: the network cannot be built, or does not accept images of that size.
    """
    train, augment, evaluate = config.train, config.train.augment, config.evaluate
    square = (augment.resized_crop, augment.resized_crop) if augment.resized_crop is not None else None
    size: Size = square or augment.crop or data.size
    # As in `sunets.data.loading.scoring_dataset`.
    scored: Size = (square if config.data.task == "classification" else None) or data.size
    network = _network(config.model, config.data.task, data.classes)
    trained, validated, tested = (
        data.counts[split] for split in (config.data.train_split, config.data.val_split, config.data.test_split)
    )
    images = train.epochs * train.batch_size * iterations_per_epoch(trained, train.batch_size)
    images_per_pass = min(train.micro_batch_size or train.batch_size, train.batch_size)
    validations = math.ceil(train.epochs / train.validate_every)
    return TrainingWork(
        size=size,
        train=Passes(images, *_count(network, size, backward=True), images_per_pass),
        validation=Passes(validated, *_count(network, scored), train.batch_size, times=validations),
        test=tuple(
            Passes(tested * number, *_count(network, window), evaluate.batch_size)
            for variant in evaluate.variants.values()
            for window, number in forward_passes(variant, scored)
        ),
    )


def _row(key: str, config: Config, seeds: int, data: DataFacts, tflops: float) -> PlanRow:
    train, work = config.train, training_work(config, data)

    def memory(network: nn.Module) -> float:
        copies = 2 + {"adamw": 2, "sgd": int(train.momentum > 0)}[train.optimizer]
        parameters = sum(p.numel() for p in network.parameters())
        return (_saved(network, work.size, work.train.batch_size) + 4 * copies * parameters) / GIB

    network = _network(config.model, config.data.task, data.classes)
    efficient: float | None = None
    if isinstance(network, SUNet):
        recomputing = config.model.model_copy(update={"memory_efficient": True})
        efficient = memory(_network(recomputing, config.data.task, data.classes))
    return PlanRow(
        model=key,
        trainings=seeds,
        size=work.size,
        gmacs_training_image=work.train.macs / 1e9,
        images=work.train.images,
        gpu_hours_train=seeds * work.training_hours(tflops),
        gpu_hours_test=seeds * work.test_hours(tflops),
        images_per_pass=work.train.batch_size,
        memory_gib=memory(network),
        memory_gib_efficient=efficient,
    )


def forward_passes(variant: VariantConfig, size: Size) -> list[tuple[Size, int]]:
    """Count the passes of `sunets.evaluation.multi_scale.multi_scale_probabilities` for one image.

    Returns:
        Per scale, the size of its windows (without windows, of the scaled image) and their number, including mirrors.
    """
    passes = []
    for factor in variant.factors(*size):
        scaled = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
        window = variant.window or scaled
        rows, columns = (len(window_starts(scaled[i], window[i], variant.window_overlap)) for i in (0, 1))
        passes.append((window, rows * columns * (2 if variant.flip else 1)))
    return passes


# Counts, cached by network and size.


@functools.cache
def _network(model: ModelConfig, task: Task, classes: int) -> nn.Module:
    arguments = model.model_copy(update={"weights": None}).arguments()
    with torch.device("meta"):  # no memory, no initial weights
        return create_model(**arguments, task=task, num_classes=classes).eval()


class _Operators(TorchDispatchMode):
    """Counter of the operators other than views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@functools.cache
def _count(network: nn.Module, size: Size, backward: bool = False) -> tuple[int, int]:
    """Count multiply-adds and operators of a forward (and backward) pass of one image."""
    operators, x = _Operators(), torch.empty(1, input_channels(network), *size, device="meta")
    with operators:
        macs = sum(count_macs(network, x, backward=backward)[""].values())
    return macs, operators.count


@functools.cache
def _saved(network: nn.Module, size: Size, images: int) -> int:
    """Count the bytes that autograd saves for the backward pass of that many images."""
    return saved_bytes(network, torch.empty(images, input_channels(network), *size, device="meta"))

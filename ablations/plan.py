"""Estimates of the time that studies take, from a few timed training steps and multiply-adds."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.table import Table
from torch import nn

from ablations.space import MAX_CORNERS, Arm, Space, axis_values, check_study, input_size, study_config
from sunets.core.config import Config, StudyConfig, Suite
from sunets.core.hardware import default_workers
from sunets.core.paths import BenchmarkPaths
from sunets.data.loading import make_dataset
from sunets.data.manifest import Manifest, load_manifest
from sunets.data.preparation import prepare
from sunets.models.zoo import create_model
from sunets.plan import LAUNCH_SECONDS, DataFacts, TrainingWork, dataset_facts, print_estimate, training_work
from sunets.profiling.speed import measure_speed
from sunets.training.device import prepare_torch

STEP_GMACS = 20.0
"""Multiply-adds (10^9, forward and backward) of a timed step, if two images have no more."""

ASSUMPTIONS = """\
Time here: forward and backward passes of training on random images, timed just now for the base, the cheapest and the
most expensive network and interpolated by multiply-adds for the others; plus reading of images; scoring by its
multiply-adds. Assumes that the optimizer takes no time and that workers do not slow each other, and counts every
training: none is pruned, or shared with another study or the benchmark.
One GPU: the larger of the operations (2 per multiply-add) at a sustained {tflops:g} TFLOP/s (--gpu-tflops) and
{launch:g} microseconds for every operator of a step, which limits small networks; one training at a time, with images
read fast enough."""


@dataclass(frozen=True)
class Estimate:
    """Trainings, cost and time of one study."""

    points: int
    trainings: int
    """All of them, pruned or shared ones too."""
    gmacs: tuple[float, float]
    """Least and most (10^9) of a forward and backward pass for one image, at the size that is trained on."""
    hours_here: float
    """With `workers` processes at a time."""
    hours_gpu: float
    workers: int


@dataclass(frozen=True)
class _Work:
    """A setting and how often it is trained."""

    config: Config
    passes: TrainingWork
    """With the first test-time variant alone, as a trial is scored."""
    trainings: float

    @property
    def images(self) -> float:
        """Images of one training; those that are only scored count by their multiply-adds."""
        parts = (self.passes.train, self.passes.validation, *self.passes.test)
        return sum(p.times * p.images * p.macs for p in parts) / self.passes.train.macs

    def gpu_hours(self, tflops: float) -> float:
        """Return the GPU hours of all trainings."""
        return self.trainings * (self.passes.training_hours(tflops) + self.passes.test_hours(tflops))


def plan_studies(suite: Suite, names: Sequence[str], *, gpu_tflops: float, root: Path = Path()) -> dict[str, Estimate]:
    """Print the estimates of studies and what they assume.

    `gpu_tflops` is the rate that training sustains on a GPU, in 10^12 operations per second.

    Raises:
        ConfigError, DataError: a study is invalid, or the data are neither prepared nor embedded.
    """
    with _prepared(suite, root) as manifest:
        estimates = {name: estimate(suite, name, manifest, gpu_tflops, root) for name in names}
    table = Table(title=f"Ablations of {suite.benchmark}: an estimate", title_justify="left")
    for heading in ("study", "kind", "points", "trainings", "GMACs, fwd+bwd", "time here", "workers", "one GPU"):
        table.add_column(heading, justify="left" if heading in ("study", "kind") else "right")
    for name, e in estimates.items():
        gmacs = " to ".join(dict.fromkeys(f"{value:.3g}" for value in e.gmacs))
        hours = (_duration(e.hours_here), str(e.workers), _duration(e.hours_gpu))
        table.add_row(name, suite.ablations[name].kind, str(e.points), str(e.trainings), gmacs, *hours)
    table.add_section()
    trainings = sum(e.trainings for e in estimates.values())
    here, gpu = sum(e.hours_here for e in estimates.values()), sum(e.hours_gpu for e in estimates.values())
    table.add_row("all", "", "", str(trainings), "", _duration(here), "", _duration(gpu))
    print_estimate(table, ASSUMPTIONS.format(tflops=gpu_tflops, launch=1e6 * LAUNCH_SECONDS))
    return estimates


@contextlib.contextmanager
def _prepared(suite: Suite, root: Path) -> Iterator[Manifest]:
    """Yield the prepared data; an embedded set that is not prepared yet is drawn into a temporary directory."""
    folder = BenchmarkPaths(suite.benchmark, root).data
    if folder.exists() or not suite.data.name.startswith("synthetic"):
        yield load_manifest(folder, suite.data)
        return
    with tempfile.TemporaryDirectory(prefix="sunets-plan-") as temporary:
        yield prepare(suite.data, Path(temporary) / "data")


def estimate(suite: Suite, name: str, manifest: Manifest, gpu_tflops: float, root: Path = Path()) -> Estimate:
    """Estimate one study; times a few training steps on this machine.

    Raises:
        ConfigError: the study is invalid.
    """
    study = study_config(suite, name)
    space = Space(suite, name, manifest)
    points = check_study(space)
    facts = dataset_facts(suite.data, BenchmarkPaths(suite.benchmark, root).data)
    work = [_work(space.config(s), facts, n) for s, n in _trainings(study, [point.setting for point in points])]
    base = work[0]
    gmacs = [w.passes.train.macs / 1e9 for w in work]
    timed = {g: work[gmacs.index(g)] for g in (gmacs[0], min(gmacs), max(gmacs))}
    device = prepare_torch(base.config.train)
    per_image = _line({g: _step_seconds(w, manifest, device) for g, w in timed.items()})
    read = _read_seconds(base.config, manifest)
    workers = default_workers(base.config.train.threads, device.type)
    seconds = sum(w.trainings * w.images * (per_image(g) + read) for w, g in zip(work, gmacs, strict=True))
    return Estimate(
        points=len(points) if study.kind != "search" else study.confirm + 1,
        trainings=round(sum(w.trainings for w in work)),
        gmacs=(min(gmacs), max(gmacs)),
        hours_here=seconds / workers / 3600,
        hours_gpu=sum(w.gpu_hours(gpu_tflops) for w in work),
        workers=workers,
    )


def _trainings(study: StudyConfig, settings: list[Arm]) -> list[tuple[Arm, float]]:
    """List settings and how often each is trained; of a search, the mean over its space."""
    seeds = len(study.seeds)
    if study.kind != "search":
        return [(setting, study.trials * (study.kind == "tuned") + seeds) for setting in settings]
    sides = [axis_values(axis) for axis in study.axes]
    corners = list(itertools.islice(itertools.product(*sides), MAX_CORNERS))
    share = (study.trials + study.confirm * seeds) / len(corners)
    paths = [axis.path for axis in study.axes]
    return [({}, seeds), *((dict(zip(paths, corner, strict=True)), share) for corner in corners)]


def _work(config: Config, facts: DataFacts, trainings: float) -> _Work:
    name, variant = next(iter(config.evaluate.variants.items()))
    alone = config.evaluate.model_copy(update={"variants": {name: variant}})
    return _Work(config, training_work(config.model_copy(update={"evaluate": alone}), facts), trainings)


def _network(config: Config, manifest: Manifest) -> nn.Module:
    arguments = {k: v for k, v in config.model.arguments().items() if k != "weights"}
    return create_model(**arguments, task=manifest.task, num_classes=manifest.num_classes)


def _step_seconds(work: _Work, manifest: Manifest, device: torch.device) -> float:
    """Time a training step, in seconds per image: the mean of two after a warm-up."""
    config, train = work.config, work.config.train
    batch = int(np.clip(1e9 * STEP_GMACS / work.passes.train.macs, 2, max(2, train.batch_size)))
    memory_format = torch.channels_last if train.channels_last else torch.contiguous_format
    model = _network(config, manifest).to(memory_format=memory_format)
    figures = measure_speed(
        {config.model.name: model}, size=input_size(config, manifest), batch_size=batch, repeats=2, warmup=1,
        threads=train.threads, device=device.type,
    )  # fmt: skip
    return cast(float, figures[config.model.name]["speed.step_ms"]) / 1e3 / batch


def _read_seconds(config: Config, manifest: Manifest) -> float:
    """Time the reading and augmentation of images, in seconds per image."""
    dataset = make_dataset(manifest, config.data.train_split, config.data, config.train.augment, 0)
    count = min(8, len(manifest.splits[config.data.train_split]))
    started = time.perf_counter()
    for index in range(count):
        dataset[0, index]
    return (time.perf_counter() - started) / count / max(1, config.data.workers)


def _line(timed: Mapping[float, float]) -> Callable[[float], float]:
    """Fit seconds per image over multiply-adds: a line of least squares that never falls."""
    x, y = np.array(list(timed)), np.array(list(timed.values()))
    slope = max(0.0, float(np.polyfit(x, y, 1)[0])) if len(x) > 1 else 0.0
    start = float((y - slope * x).mean())
    return lambda gmacs: max(float(y.min()) / 2, start + slope * gmacs)


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else "< 1 min"

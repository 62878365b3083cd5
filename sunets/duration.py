"""How long a benchmark takes on this machine: the passes that `sunets.plan` counts, at a speed measured here."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from sunets.core.cli import GPU_TFLOPS
from sunets.core.config import Config, ModelConfig, Suite
from sunets.core.finalists import tuning_trainings
from sunets.core.hardware import default_workers, device_type, torch_threads
from sunets.core.paths import BenchmarkPaths
from sunets.core.recipes import first_trial
from sunets.data.picture import MIN_SIDE
from sunets.models.zoo import create_model
from sunets.plan import DataFacts, Size, TrainingWork, dataset_facts, training_work
from sunets.profiling.modes import input_channels, switched_mode

MEASURED_MACS = 1.6e10
"""Most multiply-adds of a measured pass, half a second on a CPU core; smaller images would understate the speed."""
MEASURING_SECONDS = 3.0
"""Seconds of measurement after which no further network is measured."""


def duration_line(suite: Suite, root: Path = Path()) -> str:
    """Estimate the time of all trainings, tuning trials and scores on this machine, in one line.

    Args:
        suite: the parameters.
        root: root of the checkout, which may hold prepared data.

    Returns:
        The line; if the estimate fails, it names the command that says why. No error is raised: work can go on.
    """
    try:
        seconds, trainings = _estimate(suite, root)
    except Exception:
        return "time: no estimate; `python -m sunets plan` says what is missing"
    studies = ", without the ablations" if suite.ablations else ""
    what = f"{trainings} trainings and their scores" if trainings > 1 else "the training and its scores"
    return (
        f"time: about {in_words(seconds)} on this machine for {what}{studies} "
        "(rough estimate; `python -m sunets plan` has GPU hours and memory)"
    )


def in_words(seconds: float) -> str:
    """Round a time to an estimate's precision: a minute, 5 minutes, an hour or a day."""
    minutes = seconds / 60
    if minutes < 1.5:
        return "1 min"
    if minutes < 90:
        return f"{round(minutes) if minutes < 10 else 5 * round(minutes / 5)} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 60 / 24:,.0f} days"


def _estimate(suite: Suite, root: Path) -> tuple[float, int]:
    """Return the seconds of a benchmark and its number of trainings; models run in turn, seeds in parallel."""
    data = dataset_facts(suite.data, BenchmarkPaths(suite.benchmark, root).data)
    speed, total = Speed(data), 0.0
    for key in suite.models:
        config = suite.config(key, suite.seeds[0])
        work = training_work(config, data)
        workers = default_workers(config.train.threads, device_type(config.train.device))
        total += math.ceil(len(suite.seeds) / workers) * speed.seconds(config, work)
        if suite.tune.trials:
            trial = replace(training_work(first_trial(suite, key), data), test=())
            again = tuning_trainings(suite.tune.trials) - suite.tune.trials
            turns = math.ceil(suite.tune.trials / min(workers, suite.tune.batch)) + math.ceil(again / workers)
            total += turns * speed.seconds(config, trial)
    return total, len(suite.models) * (len(suite.seeds) + tuning_trainings(suite.tune.trials))


class Speed:
    """Speed of this machine in the passes that `sunets.plan` counts.

    Each network is measured once; those that are left after `MEASURING_SECONDS` are assumed to run at the last rate.
    """

    def __init__(self, data: DataFacts, gpu_tflops: float = GPU_TFLOPS) -> None:
        """Take a GPU, which is not measured, to sustain `gpu_tflops` 10^12 operations per second."""
        self._data, self._gpu_tflops = data, gpu_tflops
        self._rates: dict[tuple[ModelConfig, Size], float] = {}
        self._rate = self._measuring = 0.0

    def seconds(self, config: Config, work: TrainingWork) -> float:
        """Estimate the seconds of one training, its validations and test."""
        if device_type(config.train.device) == "cuda":
            return 3600 * (work.training_hours(self._gpu_tflops) + work.test_hours(self._gpu_tflops))
        network = (config.model, work.size)
        if network not in self._rates:
            if self._measuring < MEASURING_SECONDS:
                started = time.perf_counter()
                self._rate = macs_per_second(config, work, self._data)
                self._measuring += time.perf_counter() - started
            self._rates[network] = self._rate
        macs = sum(p.times * p.images * p.macs for p in (work.train, work.validation, *work.test))
        return macs / self._rates[network]


def macs_per_second(config: Config, work: TrainingWork, data: DataFacts) -> float:
    """Measure the multiply-adds per second of forward and backward passes on the CPU, on images of random pixels.

    One thread is measured in CPU time, and the others are assumed to be as fast: the present load is not expected to
    last. Large images are measured as smaller ones, whose multiply-adds follow from their area.
    """
    height, width = work.size
    scale = min(1.0, math.sqrt(MEASURED_MACS / work.train.macs))
    sides = [max(MIN_SIDE, round(side * scale)) for side in (height, width)]
    macs = work.train.macs * (sides[0] * sides[1]) / (height * width)
    images = max(1, min(work.train.batch_size, int(MEASURED_MACS / macs)))
    arguments = config.model.model_copy(update={"weights": None}).arguments()
    model = create_model(**arguments, task=config.data.task, num_classes=data.classes)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    x = torch.rand(images, input_channels(model), *sides).to(memory_format=layout)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=config.train.amp == "bf16")
    with torch_threads(1), switched_mode(model, training=True), torch.enable_grad(), precision:
        model(x).mean().backward()  # the first pass also chooses kernels
        start = time.thread_time()
        model(x).mean().backward()
        seconds = time.thread_time() - start
    return images * macs / seconds * min(config.train.threads, os.cpu_count() or 1)

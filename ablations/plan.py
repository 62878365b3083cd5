"""Estimates of the time that studies take, from their multiply-adds and the speed of this machine."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ablations.space import MAX_CORNERS, Arm, Space, axis_values, check_study, most_jobs, study_config
from sunets.core.config import Config, ConfigError, StudyConfig, Suite
from sunets.core.hardware import default_workers, device_type
from sunets.core.paths import BenchmarkPaths
from sunets.data.manifest import Manifest, load_manifest
from sunets.data.preparation import prepare
from sunets.duration import Speed, in_words
from sunets.plan import LAUNCH_SECONDS, DataFacts, dataset_facts, print_estimate, training_work

ASSUMPTIONS = """\
Time here: the multiply-adds of all trainings and scores, at the rate of forward and backward passes on random images,
measured just now on one thread of the CPU (of the first networks, for three seconds); on a GPU, as in the last column.
Assumes that reading images takes no time and that all workers are busy and do not slow each other, and counts every
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
    """Fewest and most multiply-adds (10^9) of a forward and backward pass for one image of the training size."""
    hours_here: float
    """With `workers` processes at a time."""
    hours_gpu: float
    workers: int


def plan_studies(suite: Suite, names: Sequence[str], *, gpu_tflops: float) -> dict[str, Estimate]:
    """Print the estimates of studies and what they assume.

    `gpu_tflops` is the rate that training sustains on a GPU, in 10^12 operations per second.

    Raises:
        ConfigError, DataError: there is no study, one is invalid, or the data are neither prepared nor embedded.
    """
    if not names:
        raise ConfigError("ablations: the parameter file has no study to plan")
    with _prepared(suite) as manifest:
        data = dataset_facts(suite.data, BenchmarkPaths(suite.benchmark).data)
        speed = Speed(data, gpu_tflops)
        estimates = {name: estimate(suite, name, manifest, data, speed, gpu_tflops) for name in names}
    table = Table(title=f"Ablations of {suite.benchmark}: an estimate", title_justify="left")
    for heading in ("study", "kind", "points", "trainings", "GMACs, fwd+bwd", "time here", "workers", "one GPU"):
        table.add_column(heading, justify="left" if heading in ("study", "kind") else "right")
    for name, e in estimates.items():
        gmacs = " to ".join(dict.fromkeys(f"{value:.3g}" for value in e.gmacs))
        hours = (in_words(3600 * e.hours_here), str(e.workers), in_words(3600 * e.hours_gpu))
        table.add_row(name, suite.ablations[name].kind, str(e.points), str(e.trainings), gmacs, *hours)
    table.add_section()
    trainings = sum(e.trainings for e in estimates.values())
    here, gpu = sum(e.hours_here for e in estimates.values()), sum(e.hours_gpu for e in estimates.values())
    table.add_row("all", "", "", str(trainings), "", in_words(3600 * here), "", in_words(3600 * gpu))
    print_estimate(table, ASSUMPTIONS.format(tflops=gpu_tflops, launch=1e6 * LAUNCH_SECONDS))
    return estimates


@contextlib.contextmanager
def _prepared(suite: Suite) -> Iterator[Manifest]:
    """Yield the prepared data; an embedded set that is not prepared yet is drawn into a temporary directory."""
    folder = BenchmarkPaths(suite.benchmark).data
    if folder.exists() or not suite.data.name.startswith("synthetic"):
        yield load_manifest(folder, suite.data)
        return
    with tempfile.TemporaryDirectory(prefix="sunets-plan-") as temporary:
        yield prepare(suite.data, Path(temporary) / "data")


def estimate(suite: Suite, name: str, manifest: Manifest, data: DataFacts, speed: Speed, gpu_tflops: float) -> Estimate:
    """Estimate one study by the speed of this machine.

    Raises:
        ConfigError: the study is invalid.
    """
    study = study_config(suite, name)
    space = Space(suite, name, manifest)
    points = check_study(space)
    seconds, hours_gpu, trainings, gmacs = 0.0, 0.0, 0.0, []
    for setting, times in _trainings(study, [point.setting for point in points]):
        config = _scored_once(space.config(setting))
        work = training_work(config, data)
        seconds += times * speed.seconds(config, work)
        hours_gpu += times * (work.training_hours(gpu_tflops) + work.test_hours(gpu_tflops))
        trainings += times
        gmacs.append(work.train.macs / 1e9)
    train = space.config({}).train
    workers = min(default_workers(train.threads, device_type(train.device)), most_jobs(study, len(points)))
    return Estimate(
        points=len(points) if study.kind != "search" else study.confirm + 1,
        trainings=round(trainings),
        gmacs=(min(gmacs), max(gmacs)),
        hours_here=seconds / workers / 3600,
        hours_gpu=hours_gpu,
        workers=workers,
    )


def _trainings(study: StudyConfig, settings: list[Arm]) -> list[tuple[Arm, float]]:
    """List settings and how often each is trained; of a search, the mean over its space."""
    seeds = len(study.seeds)
    if study.kind == "tuned":
        finalists = min(study.confirm, study.trials)
        more = finalists * (seeds - 1) if finalists > 1 else 0
        return [(setting, study.trials + more + seeds) for setting in settings]
    if study.kind != "search":
        return [(setting, seeds) for setting in settings]
    sides = [axis_values(axis) for axis in study.axes]
    corners = list(itertools.islice(itertools.product(*sides), MAX_CORNERS))
    share = (study.trials + study.confirm * seeds) / len(corners)
    paths = [axis.path for axis in study.axes]
    return [({}, seeds), *((dict(zip(paths, corner, strict=True)), share) for corner in corners)]


def _scored_once(config: Config) -> Config:
    """Keep the first test-time variant, by which a trial is scored."""
    variant = dict([next(iter(config.evaluate.variants.items()))])
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"variants": variant})})

"""Training of one network: resumable at any moment, the same bytes every time, on one process or many.

Entry point: `fit`. It knows nothing of MLflow, Optuna or DVC; callers listen through `on_epoch` and `stop_early`.

What a training computes is a function of the configuration, the data and the code. Every random draw is seeded from
named parts (`derive_seed`): the initialisation from the training's seed, the order of the images from seed and epoch,
their augmentation from seed, pass and index, and what a network draws itself (dropout) from seed, iteration and
process. No generator state outlives an iteration, so a training that goes on from a checkpoint draws what it would have
drawn. Under `torchrun` the global batch is split over the processes.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sunets.core.config import Config, ConfigError, fingerprint, flatten
from sunets.core.provenance import code_hash
from sunets.data import Manifest
from sunets.training.checkpoint import atomic_save, build_network, starting_file, training_lock
from sunets.training.device import prepare_torch, select_device
from sunets.training.distributed import join_processes, world_size
from sunets.training.loop import Trainer
from sunets.training.progress import Display, Row

NOT_IN_IDENTITY = ("benchmark", "evaluate.", "data.root", "data.workers", "data.cache", "train.checkpoint_seconds")
"""Configuration that a training's result does not depend on (of the data, the digest speaks)."""


@dataclass(frozen=True)
class FitResult:
    """What a training leaves behind."""

    model: nn.Module
    """The trained network, on the training's device, in evaluation mode."""
    history: list[Row]
    """One row an epoch."""
    resumed: bool
    """Whether a checkpoint was found."""
    pruned: bool
    """Whether `stop_early` ended the training."""
    seconds: float
    """Wall time of this process, all included."""
    images_per_second: float | None
    """Training throughput of this process over all processes, without validation; None if nothing was trained."""
    weights_path: Path
    """The weights file."""


def fit(
    config: Config,
    manifest: Manifest,
    *,
    work_dir: Path,
    on_epoch: Callable[[Row], None] | None = None,
    stop_early: Callable[[Row], bool] | None = None,
    progress: bool = True,
) -> FitResult:
    """Train one network, or go on with its training, or return it if it is trained.

    Writes `work_dir/checkpoint.pt` (for itself) and `work_dir/weights.pt` (see `load_trained`), both atomically. The
    weights file has the same bytes however often the training was killed and started again with the same number of
    processes. Under `torchrun` every process calls this; the first one reads and writes the files.

    Args:
        config: the whole configuration.
        manifest: the prepared data set.
        work_dir: directory of this training alone; name it by `run_fingerprint`.
        on_epoch: called with the row of each epoch, in the first process; again for rows of a checkpoint.
        stop_early: called after `on_epoch` in the same way; True ends the training.
        progress: report on standard error: a bar on a terminal, else a line per epoch.

    Raises:
        ConfigError: the configuration does not fit the data, the machine or the number of processes.
        CheckpointError: the directory is in use, or holds the checkpoint of another training.
        TrainingError: the loss is not finite.
    """
    started = time.perf_counter()
    device = prepare_torch(config.train)
    _check_config(config, manifest)
    identity = _identity(config, manifest)
    with training_lock(work_dir), join_processes(device) as world:
        trainer = Trainer(config, manifest, identity, device, world, work_dir)
        display = Display(config, trainer.iterations, progress and world.rank == 0)
        resumed = trainer.restore()
        with display:
            display.say(f"going on after iteration {trainer.iteration}" if resumed else trainer.note)
            pruned = trainer.run(on_epoch, stop_early, display)
        if world.rank == 0:
            atomic_save(trainer.weights(), work_dir / "weights.pt")
        world.sum(torch.zeros(1, device=device))  # nobody returns before the file is there
    return FitResult(
        model=trainer.model.eval(),
        history=trainer.history,
        resumed=resumed,
        pruned=pruned,
        seconds=time.perf_counter() - started,
        images_per_second=trainer.images / trainer.seconds if trainer.images else None,
        weights_path=work_dir / "weights.pt",
    )


def check(config: Config, manifest: Manifest) -> None:
    """Find out before long work whether this training can start: data, machine, processes, network, `init_from`.

    Raises:
        ConfigError, CheckpointError, ValueError, FileNotFoundError: names the key or file and the remedy.
    """
    _check_config(config, manifest)
    build_network(config, manifest)


def run_fingerprint(config: Config, manifest: Manifest) -> str:
    """A short digest of all that decides a training: configuration, data, code, torch version, kind of device."""
    return fingerprint(_identity(config, manifest))


def _check_config(config: Config, manifest: Manifest) -> None:
    train, size = config.train, world_size()
    select_device(train.device)
    for key in ("train_split", "val_split"):
        split = getattr(config.data, key)
        if not manifest.splits.get(split):
            raise ConfigError(f"data.{key}: the data set has no split {split!r}; it has {', '.join(manifest.splits)}")
        if any(item.target is None for item in manifest.splits[split]):
            raise ConfigError(f"data.{key}: the split {split!r} has no labels; choose another")
    if train.batch_size % size:
        raise ConfigError(f"train.batch_size: a multiple of the {size} processes, not {train.batch_size}")
    share = train.batch_size // size
    if share % min(train.micro_batch_size or share, share):
        raise ConfigError(
            f"train.micro_batch_size: a divisor of each process's {share} images, not {train.micro_batch_size}"
        )
    if isinstance(train.class_weights, tuple) and len(train.class_weights) != manifest.num_classes:
        raise ConfigError(
            f"train.class_weights: {manifest.num_classes} values, one a class, not {len(train.class_weights)}"
        )


def _identity(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Dotted name -> value of all that decides a training's result."""
    flat = {k: v for k, v in flatten(config).items() if not k.startswith(NOT_IN_IDENTITY)}
    start = config.train.init_from
    return flat | {
        "digest of the data": manifest.digest,
        "digest of train.init_from": hashlib.sha256(starting_file(config).read_bytes()).hexdigest() if start else None,
        "hash of the code": _code(),
        "torch": str(torch.__version__),
        "device": select_device(config.train.device).type,
    }


@functools.cache
def _code() -> str:
    """Hash of the code that decides a training, as this process began with it."""
    return code_hash(__name__)

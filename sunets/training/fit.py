"""Training of one network: resumable at any moment, byte-identical when repeated, on one process or several.

Entry point: `fit`. It is independent of MLflow, Optuna and DVC; callers use `on_epoch` and `stop_early`.

The result is a function of configuration, data and code. Random numbers are seeded by `derive_seed`: the initialisation
from the training's seed, the order of the images from seed and epoch, their augmentation from seed, pass and index, and
dropout from seed, iteration and process. No generator state outlives an iteration, so a resumed training draws the
same numbers. Under `torchrun` the global batch is split over the processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sunets.core.config import Config, ConfigError, fingerprint
from sunets.core.executor import scheduler_address
from sunets.core.hardware import device_type
from sunets.core.lock import locked
from sunets.core.provenance import code_hash, library_versions
from sunets.data.loading import check_scoring, make_dataset
from sunets.data.manifest import Manifest
from sunets.models.device import prepare_torch, select_device
from sunets.models.initialization import build_network, has_residual_branches
from sunets.models.tensor_file import CheckpointError, atomic_save
from sunets.models.weights import START, decisions, start_digest
from sunets.training.distributed import join_processes, world_size
from sunets.training.loop import EpochRow, Trainer
from sunets.training.recipe import check_batch_norm

LOCK_SECONDS = 10.0
"""How long a training waits for the lock of its directory; a killed process may take a moment to exit."""


@dataclass(frozen=True)
class FitResult:
    """Result of a training."""

    model: nn.Module
    """The trained network, on the training's device, in evaluation mode."""
    history: list[EpochRow]
    """One row per epoch."""
    resumed: bool
    """Whether training was interrupted, and went on from a checkpoint."""
    pruned: bool
    """Whether `stop_early` ended the training."""
    seconds: float
    """Wall time of the training, in s: of all calls, if it was interrupted or had ended before."""
    images_per_second: float
    """Throughput of all processes, without validation."""
    weights_path: Path
    """The weights file."""
    init_summary: str | None
    """Which tensors `train.init_from` gave the network, in one line; None without it."""


def fit(
    config: Config,
    manifest: Manifest,
    *,
    work_dir: Path,
    on_epoch: Callable[[EpochRow], None] | None = None,
    stop_early: Callable[[EpochRow], bool] | None = None,
) -> FitResult:
    """Train one network, resume its training, or return it if it is trained.

    Writes `work_dir/checkpoint.pt`, to resume from, and `work_dir/weights.pt` (see `load_trained`), both atomically.
    The weights file has the same bytes however often the training was killed and resumed, with the same number of
    processes. Under `torchrun` every process calls this; the first one reads and writes the files.

    Args:
        config: the whole configuration.
        manifest: the prepared data set.
        work_dir: directory of this training only; name it by `run_fingerprint`.
        on_epoch: called with the row of each epoch in the first process, those of a checkpoint included.
        stop_early: called after `on_epoch` with the same row; True ends the training.

    Raises:
        ConfigError: the configuration does not fit the network, the data, the machine or the number of processes.
        CheckpointError: the directory is in use, or holds the checkpoint of another training.
        TrainingError: the loss or a weight is not finite.
    """
    device = prepare_torch(config.train)
    check_config(config, manifest)
    identity = _identity(config, manifest)
    busy = CheckpointError(f"{work_dir}: another process is training here; wait for it to end, or stop it")
    with locked(work_dir / ".lock", LOCK_SECONDS, busy), join_processes(device) as world:
        trainer = Trainer(config, manifest, identity, device, world, work_dir)
        trainer.restore()
        pruned = trainer.run(on_epoch, stop_early)
        trainer.check_finite()
        if world.rank == 0:
            atomic_save(trainer.weights(), work_dir / "weights.pt")
        seconds = trainer.wall_seconds
        world.all_reduce(torch.zeros(1, device=device))  # a barrier: no process returns before the file exists
    return FitResult(
        model=trainer.model.eval(),
        history=trainer.history,
        resumed=trainer.resumed,
        pruned=pruned,
        seconds=seconds,
        images_per_second=trainer.images / trainer.seconds,
        weights_path=work_dir / "weights.pt",
        init_summary=trainer.init_summary,
    )


def waiting_for(work_dir: Path) -> AbstractContextManager[None]:
    """Wait for the same training in another process: of another study, or of a worker considered lost."""
    return locked(work_dir / ".job.lock", seconds=-1)


def check(config: Config, manifest: Manifest) -> str | None:
    """Check before long work that this training can start and its network be scored.

    Checks data, machine, processes, network, `init_from`, the size of forward passes and the test-time variants.

    Returns:
        Which tensors `train.init_from` gives the network, in one line; None without it.

    Raises:
        ConfigError, CheckpointError, ValueError, FileNotFoundError: names the key or file and the remedy.
    """
    check_config(config, manifest)
    check_scoring(config, manifest)
    model, init_summary = build_network(config, manifest)
    check_batch_norm(model.to("meta"), config, manifest)
    return init_summary


def run_fingerprint(config: Config, manifest: Manifest) -> str:
    """Return a short digest of what determines a training: configuration, data, code, libraries, device type."""
    return fingerprint(_identity(config, manifest))


def check_config(config: Config, manifest: Manifest) -> None:
    """Check the configuration against the network, the data, the machine and the number of processes.

    Raises:
        ConfigError, DataError: names the key and what is allowed.
    """
    train, size = config.train, world_size()
    if not scheduler_address():  # whose workers check theirs
        select_device(train.device)
    for key in ("train_split", "val_split"):
        split = getattr(config.data, key)
        if not manifest.splits.get(split):
            raise ConfigError(f"data.{key}: the data set has no split {split!r}; it has {', '.join(manifest.splits)}")
        if any(item.target is None for item in manifest.splits[split]):
            raise ConfigError(f"data.{key}: the split {split!r} has no labels; choose another")
    uncached = config.data.model_copy(update={"cache": False})
    make_dataset(manifest, config.data.train_split, uncached, train.augment, 0)
    if config.model.in_channels not in (None, 3):
        raise ConfigError(f"model.in_channels: 3, as the images have, not {config.model.in_channels}")
    if train.zero_init_residual and not has_residual_branches(config.model, config.data.task):
        reason = "whose published weights it would undo" if config.model.weights else "which has no residual branch"
        raise ConfigError(f"train.zero_init_residual: false for {config.model.name}, {reason}")
    if train.batch_size % size:
        raise ConfigError(f"train.batch_size: a multiple of the {size} processes, not {train.batch_size}")
    per_process = train.batch_size // size
    if per_process % min(train.micro_batch_size or per_process, per_process):
        raise ConfigError(
            f"train.micro_batch_size: a divisor of each process's {per_process} images, not {train.micro_batch_size}"
        )
    if train.class_weights == "median_frequency" and manifest.task == "classification":
        raise ConfigError("train.class_weights: median_pixel_frequency for classification, whose images show one class")
    if isinstance(train.class_weights, tuple) and len(train.class_weights) != manifest.num_classes:
        raise ConfigError(
            f"train.class_weights: {manifest.num_classes} values, one per class, not {len(train.class_weights)}"
        )


def _identity(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Return dotted name -> value of everything that determines a training's result."""
    return decisions(config, manifest) | {
        START: start_digest(config) if config.train.init_from else None,
        "hash of the code": _code(),
        "libraries": library_versions(),
        "device": device_type(config.train.device),
    }


@functools.cache
def _code() -> str:
    """Return the hash of the training's code, cached because the files may change while this process runs."""
    return code_hash(__name__)

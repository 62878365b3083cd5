"""Training of one network: resumable at any moment, the same bytes every time, on one process or many.

Entry point: `fit`. It knows nothing of MLflow, Optuna or DVC; callers listen through `on_epoch` and `stop_early`.

What a training computes is a function of the configuration, the data and the code. Every random draw is seeded from
named parts (`derive_seed`): the initialisation from the training's seed, the order of the images from seed and epoch,
their augmentation from seed, pass and index, and what a network draws itself (dropout) from seed, iteration and
process. No generator state outlives an iteration, so a training that goes on from a checkpoint draws what it would have
drawn. Under `torchrun` the global batch is split over the processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sunets.config import IGNORE_INDEX, Config, ConfigError, ModelConfig, TrainConfig, derive_seed, fingerprint, flatten
from sunets.data import Manifest, eval_batches, iterations_per_epoch, make_dataset, train_batches
from sunets.data.loading import ImageDataset
from sunets.distributed import World, join_processes, synchronise_batch_norm, world_size
from sunets.metrics import confusion_matrix, scores_from_confusion, top_k_errors
from sunets.record import code_hash
from sunets.reference import load_reference_weights
from sunets.zoo import create_model, head_parameters

LOCK_SECONDS = 10.0
"""How long a training waits for another to leave its directory; a killed one may take a moment to go."""

NOT_IN_IDENTITY = ("benchmark", "evaluate.", "data.root", "data.workers", "data.cache", "train.checkpoint_seconds")
"""Configuration that a training's result does not depend on (of the data, the digest speaks)."""

_CALM = "lower train.lr, lengthen train.warmup_epochs or set train.clip_grad_norm"

Row = dict[str, Any]
"""One epoch: epoch, iteration, lr, train.loss, train.miou, val.loss, ...; what was not scored is absent."""


class TrainingError(RuntimeError):
    """A training that diverged: names epoch, step, learning rate and batch."""


class CheckpointError(ValueError):
    """A checkpoint or weights file that cannot be used: names the file, what is wrong and the remedy."""


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
    with _lock(work_dir), join_processes(device) as world:
        trainer = _Trainer(config, manifest, identity, device, world, work_dir)
        display = _Display(config, trainer.iterations, progress and world.rank == 0)
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
    _build(config, manifest)


def run_fingerprint(config: Config, manifest: Manifest) -> str:
    """A short digest of all that decides a training: configuration, data, code, torch version, kind of device."""
    return fingerprint(_identity(config, manifest))


def select_device(name: str) -> torch.device:
    """The device for auto, cpu or cuda; under `torchrun` each process of a machine gets its own GPU.

    Raises:
        ConfigError: cuda is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: cuda, but torch sees no GPU here; set auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(f"--nproc-per-node: at most the machine's {gpus} GPUs; a process more than that was started")
    return torch.device("cuda", local)


def prepare_torch(train: TrainConfig, device: torch.device | None = None) -> torch.device:
    """Choose the device, and make this process's torch arithmetic on it repeatable, and float32 what it says."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    device = device or select_device(train.device)
    torch.set_num_threads(train.threads)
    # A few CUDA kernels (some poolings' gradients) exist in one, unrepeatable form only: they warn.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written before it is read
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # TF32, cuDNN's default, keeps ten bits of the mantissa; who wants speed for precision sets train.amp.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def lr_factor(iteration: int, train: TrainConfig, iterations_per_epoch: int) -> float:
    """Learning rate of one iteration (from 0) as a share of the peak.

    Linear warm-up to 1, then the schedule over what is left; the drops of `step` are counted from the start.
    """
    total, warmup = train.epochs * iterations_per_epoch, round(train.warmup_epochs * iterations_per_epoch)
    if iteration < warmup:
        return (iteration + 1) / warmup
    done = (iteration - warmup) / (total - warmup)
    match train.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "poly":
            return (1 - done) ** train.poly_power
        case "step":
            return train.step_gamma ** (iteration // (train.step_epochs * iterations_per_epoch))
        case _:
            return 1.0


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """The authors' four groups, split again where norms and biases are exempt from weight decay.

    Backbone weights and biases learn at the base rate, head weights and norms at `head_lr_multiplier` times it, head
    biases at `head_bias_lr_multiplier` times it. Parameters without gradient (frozen BatchNorm) are in no group.

    Returns:
        Dicts with name, params, lr_multiplier and weight_decay, for `torch.optim`; empty groups are left out.
    """
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm)
        for p in module.parameters(recurse=False)
    }
    head = head_parameters(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bias = name.endswith("bias") and id(parameter) not in norms
        group = f"{'head' if name in head else 'backbone'}.{'biases' if bias else 'weights'}"
        multiplier = {"head.weights": train.head_lr_multiplier, "head.biases": train.head_bias_lr_multiplier}
        decay = train.decay_norm_and_bias or parameter.ndim > 1
        entry = groups.setdefault(
            group if decay else f"{group}.no_decay",
            {"params": [], "lr_multiplier": multiplier.get(group, 1.0), "weight_decay": train.weight_decay * decay},
        )
        entry["params"].append(parameter)
    return [{"name": name, **groups[name]} for name in sorted(groups)]


def class_weights(config: Config, manifest: Manifest) -> tuple[float, ...] | None:
    """Weights of the cross entropy, one a class, or None.

    `median_frequency` is the median of the classes' pixel counts (classification: images) over each class's own (after
    Eigen and Fergus, 2015, who count a class's share within the images that show it); an absent class weighs 1.
    """
    setting = config.train.class_weights
    if setting is None or isinstance(setting, tuple):
        return setting
    pixels = manifest.class_pixels[config.data.train_split]
    median = statistics.median([count for count in pixels if count] or [1])
    return tuple(median / count if count else 1.0 for count in pixels)


def scoring_dataset(manifest: Manifest, split: str, config: Config) -> ImageDataset:
    """A split as it is scored: no random change; classifiers that train on random crops see the centre crop."""
    crop = config.train.augment.resized_crop if manifest.task == "classification" else None
    return make_dataset(manifest, split, config.data, None, 0, center_crop=crop)


def load_trained(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a weights file that `fit` wrote.

    Returns:
        The network on the CPU in evaluation mode, and task, config (plain), classes, palette, mean, std, data_digest.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, or is no weights file of this package.
    """
    content = _read(Path(path), "train again, or name a weights file, such as outputs/BENCHMARK/weights/MODEL/seed0.pt")
    if not isinstance(content, dict) or not {"state_dict", "config", "classes"} <= content.keys():
        raise CheckpointError(f"{path}: no weights file of this package (those have state_dict, config and classes)")
    arguments = ModelConfig.model_validate(content["config"]["model"]).arguments()
    arguments.pop("weights", None)  # what training started from is not needed any more
    model = create_model(**arguments, task=content["task"], num_classes=len(content["classes"]))
    model.load_state_dict(content.pop("state_dict"))
    return model.eval(), content


def atomic_save(content: Any, path: Path) -> None:
    """Write with `torch.save` such that a reader, or a kill at any moment, sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:  # given a file name, torch would write it into the archive
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def waiting_for(work_dir: Path) -> Iterator[None]:
    """Wait for an equal training to leave the directory: of another study, or of a worker that was given up."""
    if int(os.environ.get("RANK", 0)) != 0:
        yield
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(work_dir / ".job.lock"):
        yield


# Everything below is private to `fit`.


@contextlib.contextmanager
def _lock(work_dir: Path) -> Iterator[None]:
    """Keep other trainings out of the directory; the system frees it when this process dies."""
    if int(os.environ.get("RANK", 0)) != 0:
        yield
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work_dir / ".lock").acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise CheckpointError(f"{work_dir}: another process is training here; wait for it to end, or stop it") from None
    with lock:
        yield


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
        "digest of train.init_from": hashlib.sha256(_start(config).read_bytes()).hexdigest() if start else None,
        "hash of the code": _code(),
        "torch": str(torch.__version__),
        "device": select_device(config.train.device).type,
    }


@functools.cache
def _code() -> str:
    """Hash of the code that decides a training, as this process began with it."""
    return code_hash(__name__)


def _start(config: Config) -> Path:
    """The file that a training starts from."""
    path = Path(str(config.train.init_from))
    if not path.is_file():
        raise FileNotFoundError(
            f"train.init_from: {path}: no such file; run the training that makes it first, name a checkpoint of the "
            "authors, or set null to start from random weights"
        )
    return path


def _read(path: Path, remedy: str) -> Any:
    """Load a file of plain values and tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; {remedy}") from None
    except Exception as error:  # a damaged file fails in the archive, the pickle or a tensor, each in its own way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not readable ({reason}); {remedy}") from None


def _build(config: Config, manifest: Manifest) -> tuple[nn.Module, str | None]:
    """The network as training starts with it, on the CPU, and a line about what it was initialised from."""
    train = config.train
    torch.manual_seed(derive_seed(config.seed, "init"))
    model = create_model(**config.model.arguments(), task=manifest.task, num_classes=manifest.num_classes)
    note = _initialise(model, config, manifest) if train.init_from else None
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if train.bn_momentum is not None:
                module.momentum = train.bn_momentum
            if train.frozen_bn:
                module.requires_grad_(False)
    return model, note


def _initialise(model: nn.Module, config: Config, manifest: Manifest) -> str:
    """Copy the backbone of `train.init_from`, and its head where the classes are the same.

    Raises:
        CheckpointError, WeightsError: not readable, or of another network; names the first tensor that does not fit.
    """
    path = _start(config)
    content = _read(path, "name a weights file of this package or a released one of the authors")
    if not isinstance(content, dict) or "classes" not in content:
        return f"train.init_from: {path}: {load_reference_weights(model, path)}"
    other, info = load_trained(path)
    state, own = other.state_dict(), model.state_dict()
    backbone, there = _backbone(model), _backbone(other)
    for name in [*(n for n in own if n in backbone), *sorted(there - backbone)]:
        theirs, ours = (list(s[name].shape) if name in s else "absent" for s in (state, own))
        if theirs != ours:
            raise CheckpointError(
                f"train.init_from: {path} holds a {info['config']['model']['name']} that does not fit "
                f"{config.model.name} as configured: {name} is {theirs} there, {ours} here; "
                "name a checkpoint of the same variant"
            )
    head = own.keys() - backbone
    same = info["classes"] == list(manifest.classes) and all(
        name in state and state[name].shape == own[name].shape for name in head
    )
    model.load_state_dict({name: state[name] for name in (own if same else backbone)}, strict=False)
    rest = "the head too, of the same classes" if same else f"{len(head)} tensors of the head kept as initialised"
    return f"train.init_from: {path}: {len(backbone)} backbone tensors loaded; {rest}"


def _backbone(model: nn.Module) -> set[str]:
    """Names of all parameters and buffers outside the head."""
    heads = {name.rpartition(".")[0] for name in head_parameters(model)}
    return {name for name in model.state_dict() if name.rpartition(".")[0] not in heads}


class _Trainer:
    """The state of one training and the loop over it."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        identity: dict[str, Any],
        device: torch.device,
        world: World,
        work_dir: Path,
    ) -> None:
        train = config.train
        self.config, self.manifest, self.device, self.world = config, manifest, device, world
        self.identity, self.path = identity, work_dir / "checkpoint.pt"
        self.augmented = make_dataset(
            manifest, config.data.train_split, config.data, train.augment, derive_seed(config.seed, "augment")
        )
        self.per_epoch = iterations_per_epoch(len(manifest.splits[config.data.train_split]), train.batch_size)
        self.iterations = train.epochs * self.per_epoch

        self.model, self.note = _build(config, manifest)
        if train.sync_bn and world.size > 1:
            self.model = synchronise_batch_norm(self.model, device)
        layout = torch.channels_last if train.channels_last else torch.contiguous_format
        self.model.to(device, memory_format=layout)  # type: ignore[call-overload]
        if train.compile:
            self.model.compile()
        self.parallel: DistributedDataParallel | None = None
        if world.size > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=ids)

        # 255 is a class like any other when images, not pixels, are classified.
        self.ignore_index = IGNORE_INDEX if manifest.task == "segmentation" else -100
        weights = class_weights(config, manifest)
        self.weights_of_classes = None if weights is None else torch.tensor(weights, device=device)
        groups = parameter_groups(self.model, train)
        self.optimizer: torch.optim.Optimizer
        if train.optimizer == "sgd":
            nesterov = train.nesterov and train.momentum > 0
            self.optimizer = torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=nesterov)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas)
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.amp == "fp16")

        self.iteration = 0
        self.history: list[Row] = []
        self.images, self.seconds, self.saved_at = 0, 0.0, time.monotonic()
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.loss_sum, self.weight_sum = 0.0, 0.0
        self.tally = self._no_tally()

    # What a checkpoint holds.

    def save(self) -> None:
        """Write the checkpoint; all processes call it."""
        self.world.sum(self.tally)  # the epoch so far, of all processes: the first one keeps it from here on
        if self.world.rank != 0:
            self.tally.zero_()
        if self.world.rank == 0:
            content = {
                "identity": self.identity,
                "iteration": self.iteration,
                "history": self.history,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "sums": {"loss": self.loss_sum, "weight": self.weight_sum, "tally": self.tally},
            }
            atomic_save(content, self.path)
        self.saved_at = time.monotonic()

    def restore(self) -> bool:
        """Go on from the checkpoint if there is one; the first process reads it for all.

        Raises:
            CheckpointError: it is damaged, or of another training.
        """
        content: Any = None
        if self.world.rank == 0 and self.path.exists():
            try:
                content = _read(self.path, "delete it to start this training anew")
                self._check_identity(content["identity"])
            except CheckpointError as error:
                content = error
        content = self.world.share(content)
        if isinstance(content, CheckpointError):
            raise content
        if content is None:
            return False
        self.iteration, self.history = content["iteration"], content["history"]
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.loss_sum, self.weight_sum = content["sums"]["loss"], content["sums"]["weight"]
        if self.world.rank == 0:
            self.tally = content["sums"]["tally"].to(self.device)
        return True

    def _check_identity(self, found: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(self.identity))
        differing = [k for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k)]
        if differing:
            key = differing[0]
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise CheckpointError(
                f"{self.path}: of another training ({fingerprint(found)}, not {fingerprint(wanted)}): "
                f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} here{more}; "
                "use another directory, or delete the file to start anew"
            )

    def weights(self) -> dict[str, Any]:
        """What the weights file holds: plain values and tensors, the same bytes for the same training."""
        plain = {
            "task": self.manifest.task,
            "config": self.config.model_dump(mode="json"),
            "classes": list(self.manifest.classes),
            "palette": [[int(v) for v in colour] for colour in self.manifest.palette],
            "mean": [float(v) for v in self.manifest.mean],
            "std": [float(v) for v in self.manifest.std],
            "data_digest": self.manifest.digest,
        }
        state = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self.model.state_dict().items()
        }
        # Pickle writes an object met twice as a reference: values made anew keep the bytes free of who shares what.
        return {"state_dict": state, **json.loads(json.dumps(plain))}

    # The loop.

    def run(
        self,
        on_epoch: Callable[[Row], None] | None,
        stop_early: Callable[[Row], bool] | None,
        display: _Display,
    ) -> bool:
        """Train to the end; returns whether `stop_early` ended it."""

        def report(row: Row) -> bool:
            stop = False
            if self.world.rank == 0:
                if on_epoch:
                    on_epoch(row)
                stop = bool(stop_early and stop_early(row))
            return bool(self.world.share(stop))

        for row in self.history:
            display.epoch(row, restored=True)
            if report(row):
                return True
        while self.iteration < self.iterations:
            self._train_epoch(display)
            row = self._row()
            self.history.append(row)
            self._start_epoch()
            self.save()
            display.epoch(row)
            if report(row):
                return True
        return False

    def _train_epoch(self, display: _Display) -> None:
        """Train to the end of the running epoch."""
        config, (epoch, done) = self.config, divmod(self.iteration, self.per_epoch)
        self.model.train()
        if config.train.frozen_bn:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        batches = self._batches(epoch, done, self.world, config.data.workers)
        clock = time.monotonic()
        for images, targets in batches:
            due = self._step(images, targets)
            self.iteration += 1
            self.images += config.train.batch_size
            display.step(self.iteration, self.loss_sum, self.weight_sum, self._live_score)
            if due and self.iteration % self.per_epoch:
                self.seconds += time.monotonic() - clock
                self.save()
                clock = time.monotonic()
        self.seconds += time.monotonic() - clock

    def _batches(self, epoch: int, start: int, world: World, workers: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
        return train_batches(
            self.augmented,
            batch_size=self.config.train.batch_size,
            seed=derive_seed(self.config.seed, "order"),
            epoch=epoch,
            start_iteration=start,
            rank=world.rank,
            world_size=world.size,
            workers=workers,
        )

    def _batch_ids(self, epoch: int, step: int) -> str:
        """The images of a global batch."""
        keys: list[tuple[int, int]] = next(iter(self._batches(epoch, step, World()).batch_sampler))  # type: ignore
        return ", ".join(self.augmented.items[index].id for _, index in keys)

    def _step(self, images: Tensor, targets: Tensor) -> bool:
        """One step of the optimiser on this process's share of the batch; returns whether a checkpoint is due.

        The gradient is that of the mean over all labelled pixels of the whole batch, of all micro-batches and
        processes, however they are spread.
        """
        config, train = self.config, self.config.train
        torch.manual_seed(derive_seed(config.seed, "step", self.iteration, self.world.rank))
        lr = train.lr * lr_factor(self.iteration, train, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        images, targets = self._move(images, targets)
        weight = self.world.sum(self._weight(targets))
        # A batch without a labelled pixel has loss 0 and gradient 0.
        share = self.world.size / torch.where(weight > 0, weight, 1.0)  # DDP averages over processes

        self.optimizer.zero_grad()
        micro = min(train.micro_batch_size or len(images), len(images))
        parts = list(zip(images.split(micro), targets.split(micro), strict=True))
        loss = torch.zeros((), device=self.device)
        for number, (image, target) in enumerate(parts, start=1):
            # Gradients travel once a step, after the last part.
            with self.parallel.no_sync() if self.parallel and number < len(parts) else contextlib.nullcontext():
                logits = self._logits(self.parallel or self.model, image)
                part = self._loss(logits, target, train.label_smoothing)
                self.scaler.scale(part * share).backward()
            loss += part.detach()
            self.tally += self._count(logits.detach(), target)
        due = self.world.rank == 0 and time.monotonic() - self.saved_at >= train.checkpoint_seconds
        summed = self.world.sum(torch.stack([loss.double(), torch.tensor(due, device=self.device).double()]))
        loss_sum, flag, weight_sum = torch.cat([summed, weight.double()[None]]).tolist()
        if not math.isfinite(loss_sum):
            epoch, step = divmod(self.iteration, self.per_epoch)
            raise TrainingError(
                f"the loss became {loss_sum} in epoch {epoch + 1}, step {step + 1} of {self.per_epoch} (iteration "
                f"{self.iteration}), at learning rate {lr:.3g}, on the images {self._batch_ids(epoch, step)}; {_CALM}"
            )
        self.loss_sum += loss_sum
        self.weight_sum += weight_sum

        if train.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return bool(flag)

    def _move(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        images = images.to(self.device, memory_format=layout, non_blocking=True)
        return images, targets.to(self.device, non_blocking=True)

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        amp = self.config.train.amp
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=amp != "none"):
            logits: Tensor = network(images)
        return logits.float()

    def _loss(self, logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Weighted sum over the labelled pixels."""
        return functional.cross_entropy(
            logits,
            target,
            weight=self.weights_of_classes,
            ignore_index=self.ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",  # CUDA's own sum is not repeatable
        ).sum()

    def _weight(self, target: Tensor) -> Tensor:
        """Total weight of the labelled pixels."""
        valid = target != self.ignore_index
        if self.weights_of_classes is None:
            return valid.sum().to(torch.float32)
        return self.weights_of_classes[target[valid]].sum()

    def _no_tally(self) -> Tensor:
        classes = self.manifest.num_classes
        shape = (classes, classes) if self.manifest.task == "segmentation" else (3,)
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def _count(self, logits: Tensor, target: Tensor) -> Tensor:
        """(K, K) confusion matrix, or for classification (3,): images, errors, errors of the five best."""
        if self.manifest.task == "segmentation":
            return confusion_matrix(logits.argmax(1), target, self.manifest.num_classes).sum(0)
        errors = [top_k_errors(logits, target, k) for k in (1, 5)]
        return torch.tensor([len(target), *errors], device=self.device)

    def _scores(self, tally: Tensor) -> dict[str, float | None]:
        if self.manifest.task == "segmentation":
            scores = scores_from_confusion(tally.cpu().numpy())
            return {"miou": scores["score.miou"], "pixel_accuracy": scores["score.pixel_accuracy"]}
        images, top1, top5 = tally.tolist()
        return {"top1_error_percent": 100 * top1 / images, "top5_error_percent": 100 * top5 / images}

    def _live_score(self) -> str:
        """This process's score of the epoch so far, in words."""
        value = next(iter(self._scores(self.tally).values()))
        if self.manifest.task == "classification":
            return f"top-1 error {value:.1f} %"
        return "" if value is None else f"mIoU {100 * value:.1f} %"

    def _row(self) -> Row:
        """The finished epoch's row; scores the validation split where its turn has come."""
        train, epoch = self.config.train, self.iteration // self.per_epoch
        name, score = next(iter(self._scores(self.world.sum(self.tally)).items()))
        row: Row = {
            "epoch": epoch,
            "iteration": self.iteration,
            "lr": train.lr * lr_factor(self.iteration - 1, train, self.per_epoch),
            "train.loss": self.loss_sum / self.weight_sum if self.weight_sum else 0.0,
            f"train.{name}": score,
        }
        if epoch % train.validate_every == 0 or epoch == train.epochs:
            row |= self._validate()
            if not math.isfinite(row["val.loss"]):
                raise TrainingError(
                    f"the validation loss became {row['val.loss']} in epoch {epoch}, after step {self.per_epoch} "
                    f"(iteration {self.iteration - 1}) at learning rate {row['lr']:.3g}; {_CALM}"
                )
        return row

    @torch.inference_mode()
    def _validate(self) -> Row:
        """Score the validation split, each process a share of it."""
        config, world = self.config, self.world
        if world.size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)
        self.model.eval()
        dataset = scoring_dataset(self.manifest, config.data.val_split, config)
        indices = range(world.rank, len(dataset), world.size)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        tally = self._no_tally()
        batch_size = max(1, config.train.batch_size // world.size)
        for _, images, targets in eval_batches(dataset, batch_size, config.data.workers, indices):
            images, targets = self._move(images, targets)
            logits = self._logits(self.model, images)
            sums += torch.stack([self._loss(logits, targets), self._weight(targets)]).double()
            tally += self._count(logits, targets)
        loss, weight = world.sum(sums).tolist()
        row: Row = {"val.loss": loss / weight if weight else 0.0}
        return row | {f"val.{name}": value for name, value in self._scores(world.sum(tally)).items()}


class _Display:
    """Progress on standard error: a bar with ETA, loss and score on a terminal, a line per epoch elsewhere."""

    def __init__(self, config: Config, iterations: int, shown: bool) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not shown)
        self.name = f"{config.model.name} seed {config.seed}"
        self.epochs, self.iterations = config.train.epochs, iterations
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[scores]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self.task = self.bar.add_task(self.name, total=iterations, scores="")
        self.started: tuple[int, float] | None = None
        self.scored_at = -math.inf

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str | None) -> None:
        """A line of its own."""
        if text:
            self.console.print(text, markup=False)

    def step(self, iteration: int, loss: float, weight: float, score: Callable[[], str]) -> None:
        """One iteration is done; `loss` over `weight` is the epoch's mean so far."""
        now = time.monotonic()
        self.started = self.started or (iteration - 1, now)
        if self.bar.disable:
            return
        self.bar.update(self.task, completed=iteration)
        if now - self.scored_at > 1 and weight:  # a score makes a GPU wait
            self.scored_at = now
            self.bar.update(self.task, scores=f"loss {loss / weight:.4f} {score()}")

    def epoch(self, row: Row, restored: bool = False) -> None:
        """An epoch is done."""
        if restored or not self.bar.disable:
            self.bar.update(self.task, completed=row["iteration"])
            return
        scores = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if "." in k and v is not None)
        first, since = self.started or (0, time.monotonic())
        left = (self.iterations - row["iteration"]) * (time.monotonic() - since) / max(1, row["iteration"] - first)
        self.say(f"{self.name} epoch {row['epoch']}/{self.epochs}: {scores}, lr {row['lr']:.3g}, {left:.0f} s to go")

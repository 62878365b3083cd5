"""State of one training, and its loop over epochs and steps; see `fit`."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sunets.core.config import IGNORE_INDEX, Config, derive_seed, fingerprint
from sunets.core.failure import machine_failure
from sunets.core.metrics import confusion_matrix, count_top_k, scores_from_confusion, scores_from_top_k
from sunets.core.record import shortened
from sunets.data.loading import eval_batches, iterations_per_epoch, make_dataset, scoring_dataset, train_batches
from sunets.data.manifest import Manifest
from sunets.models.initialization import build_network
from sunets.models.tensor_file import CheckpointError, atomic_save, check_seal, first_not_finite, read_file
from sunets.models.weights import difference
from sunets.training.distributed import World, synchronise_batch_norm
from sunets.training.recipe import class_weights, lr_factor, parameter_groups

EpochRow = dict[str, Any]
"""One epoch: epoch, iteration, lr, train.loss, train.miou, and where it was validated val.loss, ..."""
NAMED_IMAGES, NAME_LENGTH = 4, 60
"""Number of images that the error of a diverged training names, and of characters of each name."""
DIVERGENCE_HINT = "lower train.lr, lengthen train.warmup_epochs or set train.clip_grad_norm"

_RESTART = "delete it to start this training anew"


class TrainingError(RuntimeError):
    """A training diverged; names epoch, step, learning rate and images."""


class Trainer:
    """State of one training and its loop."""

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

        self.model, self.init_summary = build_network(config, manifest)
        if train.sync_bn and world.size > 1:
            self.model = synchronise_batch_norm(self.model, device)
        self.layout = torch.channels_last if train.channels_last else torch.contiguous_format
        self.model.to(device, memory_format=self.layout)  # type: ignore[call-overload]
        if train.compile:
            self.model.compile()
        self.parallel: DistributedDataParallel | None = None
        if world.size > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=ids)

        # In classification, 255 is a class.
        self.ignore_index = IGNORE_INDEX if manifest.task == "segmentation" else -100
        weights = class_weights(config, manifest)
        self.weights_of_classes = None if weights is None else torch.tensor(weights, device=device)
        groups = parameter_groups(self.model, train)
        self.optimizer: torch.optim.Optimizer
        if train.optimizer == "sgd":
            nesterov = train.nesterov and train.momentum > 0
            self.optimizer = torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=nesterov)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.amp == "fp16")

        self.iteration = 0
        self.history: list[EpochRow] = []
        self.started = self.saved_at = time.monotonic()
        self.images, self.seconds = 0, 0.0
        """Trained images, and the seconds that they took without validation."""
        self.earlier, self.resumed = 0.0, False
        """Seconds of earlier processes up to the checkpoint, and whether this or one of them went on from one."""
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.loss_sum, self.weight_sum = 0.0, 0.0
        self.counts = self._no_counts()

    # Checkpoint and weights.

    def save(self) -> None:
        """Write the checkpoint; called in all processes."""
        self.world.all_reduce(self.counts)  # the first process holds the counts of all from here on
        if self.world.rank != 0:
            self.counts.zero_()
        if self.world.rank == 0:
            content = {
                "identity": self.identity,
                "iteration": self.iteration,
                "history": self.history,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "timing": [self.images, self.seconds, self.wall_seconds, self.resumed],
                "sums": {"loss": self.loss_sum, "weight": self.weight_sum, "counts": self.counts},
            }
            atomic_save(content, self.path)
        self.saved_at = time.monotonic()

    @property
    def wall_seconds(self) -> float:
        """Seconds from the start of the training to now, without those between two processes."""
        return self.earlier + time.monotonic() - self.started

    def restore(self) -> None:
        """Restore the checkpoint, if there is one; the first process reads it for all.

        Raises:
            CheckpointError: it is damaged, or of another training.
        """
        content: Any = None
        if self.world.rank == 0 and self.path.exists():
            try:
                content = read_file(self.path, _RESTART)
                check_seal(content, self.path, _RESTART)
                self._check_identity(content.get("identity"))
            except CheckpointError as error:
                content = error
        content = self.world.broadcast(content)
        if isinstance(content, CheckpointError):
            raise content
        if content is None:
            return
        try:
            self.iteration, self.history = int(content["iteration"]), [dict(row) for row in content["history"]]
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.images, self.seconds, self.earlier, self.resumed = content["timing"]
            self.loss_sum, self.weight_sum = float(content["sums"]["loss"]), float(content["sums"]["weight"])
            if self.world.rank == 0:
                self.counts = content["sums"]["counts"].to(self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if machine_failure(error):
                raise
            fault = shortened(f"{type(error).__name__}: {error}", 200)
            raise CheckpointError(f"{self.path}: written by another version ({fault}); {_RESTART}") from None
        if self.iteration < self.iterations:
            self.resumed = True
        else:  # loading it is no training
            self.started = time.monotonic()

    def _check_identity(self, other: Any) -> None:
        if not isinstance(other, dict):
            raise CheckpointError(f"{self.path}: written by another version (it states no identity); {_RESTART}")
        if text := difference(other, self.identity):
            raise CheckpointError(
                f"{self.path}: of another training ({fingerprint(other)}, not {fingerprint(self.identity)}): {text}; "
                "use another directory, or delete the file to start anew"
            )

    def check_finite(self) -> None:
        """Check that the network is finite; without labelled pixels the loss does not show it.

        Raises:
            TrainingError: a weight or statistic is not finite.
        """
        name = self.world.broadcast(first_not_finite(self.model.state_dict()))
        if name is not None:
            raise TrainingError(f"after iteration {self.iteration}, {name} holds NaN or infinity; {DIVERGENCE_HINT}")

    def weights(self) -> dict[str, Any]:
        """Return the content of the weights file, which has the same bytes for the same training."""
        plain = {
            "task": self.manifest.task,
            "config": self.config.model_dump(mode="json"),
            "classes": list(self.manifest.classes),
            "palette": [[int(v) for v in colour] for colour in self.manifest.palette],
            "mean": [float(v) for v in self.manifest.mean],
            "std": [float(v) for v in self.manifest.std],
            "data_digest": self.manifest.digest,
            "identity": self.identity,
        }
        state = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self.model.state_dict().items()
        }
        # Pickle writes a shared object as a reference: fresh copies keep the bytes independent of sharing.
        return {"state_dict": state, **json.loads(json.dumps(plain))}

    # The loop.

    def run(
        self,
        on_epoch: Callable[[EpochRow], None] | None,
        stop_early: Callable[[EpochRow], bool] | None,
    ) -> bool:
        """Train to the end; return whether `stop_early` ended it."""

        def report(row: EpochRow) -> bool:
            stop = False
            if self.world.rank == 0:
                if on_epoch:
                    on_epoch(row)
                stop = bool(stop_early and stop_early(row))
            return bool(self.world.broadcast(stop))

        for row in self.history:
            if report(row):
                return True
        while self.iteration < self.iterations:
            self._train_epoch()
            row = self._row()
            self.history.append(row)
            self._start_epoch()
            self.save()
            if report(row):
                return True
        return False

    def _train_epoch(self) -> None:
        """Train to the end of the current epoch."""
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
        """Name the first images of a global batch, and count the others."""
        keys: list[tuple[int, int]] = next(iter(self._batches(epoch, step, World()).batch_sampler))  # type: ignore
        names = [self.augmented.items[index].id for _, index in keys[:NAMED_IMAGES]]
        shown = ", ".join(n if len(n) <= NAME_LENGTH else f"{n[: NAME_LENGTH - 3]}..." for n in names)
        return shown + (f" and {len(keys) - len(names)} more" if len(keys) > len(names) else "")

    def _step(self, images: Tensor, targets: Tensor) -> bool:
        """Make one optimiser step on this process's part of the batch; return whether a checkpoint is due.

        The gradient is that of the mean over all labelled pixels of the global batch, however they are spread over
        micro-batches and processes.
        """
        config, train = self.config, self.config.train
        torch.manual_seed(derive_seed(config.seed, "step", self.iteration, self.world.rank))
        lr = train.lr * lr_factor(self.iteration, train, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        images, targets = self._move(images, targets)
        weight = self.world.all_reduce(self._weight(targets))
        # A batch without labelled pixels has loss 0 and gradient 0.
        scale = self.world.size / torch.where(weight > 0, weight, 1.0)  # DDP averages over processes

        self.optimizer.zero_grad()
        micro = min(train.micro_batch_size or len(images), len(images))
        parts = list(zip(images.split(micro), targets.split(micro), strict=True))
        loss = torch.zeros((), device=self.device)
        for number, (image, target) in enumerate(parts, start=1):
            # Gradients are all-reduced once per step, after the last part.
            with self.parallel.no_sync() if self.parallel and number < len(parts) else contextlib.nullcontext():
                logits = self._logits(self.parallel or self.model, image)
                part = self._loss(logits, target, train.label_smoothing)
                self.scaler.scale(part * scale).backward()
            loss += part.detach()
            self.counts += self._count(logits.detach(), target)
        due = self.world.rank == 0 and time.monotonic() - self.saved_at >= train.checkpoint_seconds
        summed = self.world.all_reduce(torch.stack([loss.double(), torch.tensor(due, device=self.device).double()]))
        loss_sum, flag, weight_sum = torch.cat([summed, weight.double()[None]]).tolist()
        if not math.isfinite(loss_sum):
            epoch, step = divmod(self.iteration, self.per_epoch)
            raise TrainingError(
                f"the loss became {loss_sum} in epoch {epoch + 1}, step {step + 1} of {self.per_epoch} (iteration "
                f"{self.iteration}), at learning rate {lr:.3g}, on the images {self._batch_ids(epoch, step)}; "
                f"{DIVERGENCE_HINT}"
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
        images = images.to(self.device, memory_format=self.layout, non_blocking=True)
        return images, targets.to(self.device, non_blocking=True)

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        amp = self.config.train.amp
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=amp != "none"):
            logits: Tensor = network(images)
        return logits.float()

    def _loss(self, logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the weighted sum of the loss over the labelled pixels."""
        return functional.cross_entropy(
            logits,
            target,
            weight=self.weights_of_classes,
            ignore_index=self.ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",  # CUDA's reduction is not deterministic
        ).sum()

    def _weight(self, target: Tensor) -> Tensor:
        """Return the total weight of the labelled pixels."""
        valid = target != self.ignore_index
        if self.weights_of_classes is None:
            return valid.sum().to(torch.float32)
        return self.weights_of_classes[target[valid]].sum()

    def _no_counts(self) -> Tensor:
        classes = self.manifest.num_classes
        shape = (classes, classes) if self.manifest.task == "segmentation" else (3,)
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def _count(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the (K, K) confusion matrix, or for classification (3,): images, top-1 errors, top-5 errors."""
        if self.manifest.task == "segmentation":
            innermost = logits.contiguous(memory_format=torch.channels_last)  # ten times as fast on a CPU
            return confusion_matrix(innermost.argmax(1), target, self.manifest.num_classes).sum(0)
        return count_top_k(logits, target)

    def _scores(self, counts: Tensor) -> dict[str, float | None]:
        """Return the scores that histories show, without their prefix `score.`."""
        names: tuple[str, ...] = ("top1_error_percent", "top5_error_percent")
        scores: Mapping[str, float | None]
        if self.manifest.task == "segmentation":
            names, scores = ("miou", "pixel_accuracy"), scores_from_confusion(counts.cpu().numpy())
        else:
            scores = scores_from_top_k(counts)
        return {name: scores[f"score.{name}"] for name in names}

    def _row(self) -> EpochRow:
        """Return the finished epoch's row, with validation every `validate_every` epochs and after the last."""
        train, epoch = self.config.train, self.iteration // self.per_epoch
        name, score = next(iter(self._scores(self.world.all_reduce(self.counts)).items()))
        row: EpochRow = {
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
                    f"(iteration {self.iteration - 1}) at learning rate {row['lr']:.3g}; {DIVERGENCE_HINT}"
                )
        return row

    @torch.inference_mode()
    def _validate(self) -> EpochRow:
        """Score the validation split, a part of it in each process."""
        config, world = self.config, self.world
        if world.size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)
        self.model.eval()
        dataset = scoring_dataset(self.manifest, config.data.val_split, config)
        indices = range(world.rank, len(dataset), world.size)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        counts = self._no_counts()
        batch_size = max(1, config.train.batch_size // world.size)
        for _, images, targets in eval_batches(dataset, batch_size, config.data.workers, indices):
            images, targets = self._move(images, targets)
            logits = self._logits(self.model, images)
            sums += torch.stack([self._loss(logits, targets), self._weight(targets)]).double()
            counts += self._count(logits, targets)
        loss, weight = world.all_reduce(sums).tolist()
        row: EpochRow = {"val.loss": loss / weight if weight else 0.0}
        return row | {f"val.{name}": value for name, value in self._scores(world.all_reduce(counts)).items()}

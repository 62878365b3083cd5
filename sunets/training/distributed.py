"""The processes that `torchrun` starts to share one training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from sunets.core.hardware import torchrun_process


@dataclass(frozen=True)
class World:
    """The processes that share one training."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def world_size() -> int:
    """Return the number of processes that share a training; 1 without `torchrun`."""
    return torchrun_process()[2]


@contextlib.contextmanager
def join_processes(device: torch.device) -> Iterator[World]:
    """Join the process group, if `torchrun` started this process."""
    if world_size() == 1:
        yield World()
        return
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(rendezvous("env://"))
    except ValueError as error:
        raise ValueError(f"{error}; start the training with torchrun, or unset WORLD_SIZE") from None
    # torchrun's store outlives a training: the prefix separates its keys from those of earlier trainings and processes.
    attempt = f"sunets/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    training = (store.add(attempt, 1) - 1) // size
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(f"{attempt}/{training}", store), rank=rank, world_size=size)
    try:
        yield World(rank, size)
    finally:
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """Sum over the processes, in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes on the CPU, which `nn.SyncBatchNorm` does not support.

    Each process has the same number of images of the same size.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims, count = (0, 2, 3), dist.get_world_size() * input.numel() // input.shape[1]
        images = input.float()  # sums of 16 bits would not do
        mean = _Sum.apply(images.sum(dims)) / count
        centred = images - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dims)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        out = centred * scale[:, None, None]
        return (out if self.bias is None else out + self.bias[:, None, None]).to(input.dtype)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace every BatchNorm2d by one whose statistics are those of all processes."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                synced = _SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
                synced.__dict__.update(child.__dict__)  # the same parameters and buffers, not copies
                setattr(parent, name, synced)
    return model

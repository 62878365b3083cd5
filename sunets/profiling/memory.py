"""Memory of a training step: tensors saved by autograd, and the peak on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sunets.profiling.modes import switched_mode, usual_algorithms

MIB = 2**20


def training_loss(logits: Tensor) -> Tensor:
    """Return the cross-entropy of logits against class 0 everywhere."""
    target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, target)


@usual_algorithms()
def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Count the bytes that autograd saves for the backward pass of a training step with the cross-entropy loss.

    Every storage counts once, however many tensors share it; parameters and buffers do not count. The number is the
    same on the meta device as on a CPU (except for norms that see a single value, see `switched_mode`).

    Args:
        model: network.
        x: images (B,C,H,W).
    """
    parameters = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}  # holds the tensors, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        # On the meta device all data pointers are 0, so storages are identified by their objects.
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with switched_mode(model, training=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training_loss(model(x))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in parameters)


def peak_bytes(model: nn.Module, x: Tensor) -> int | None:
    """Measure the peak GPU memory of a training step, with weights and gradients; None on a CPU.

    Args:
        model: network on the GPU.
        x: images (B,C,H,W) on the GPU.
    """
    if x.device.type != "cuda":
        return None
    with switched_mode(model, training=True):
        for _ in range(2):  # in the first step, libraries also allocate memory to choose kernels
            torch.cuda.reset_peak_memory_stats(x.device)
            training_loss(model(x)).backward()
            model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(x.device)


def to_mib(count: int | None) -> float | None:
    """Convert bytes to MiB."""
    return None if count is None else count / MIB

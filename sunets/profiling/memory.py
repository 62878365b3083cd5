"""Memory of a training step: what autograd keeps, and the peak on a GPU."""

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
    """Bytes that autograd keeps for the backward pass of a training step with the cross-entropy loss.

    Every storage counts once, however many tensors share it; parameters and buffers are left out. The same number on
    the meta device as on a CPU (but for the unused statistics of a norm that sees a single value, see `switched_mode`).

    Args:
        model: network.
        x: images (B,C,H,W).
    """
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}  # holding the tensor keeps the address of its storage from being used again

    def pack(tensor: Tensor) -> Tensor:
        # On the meta device all data pointers are 0, so the storage object itself is the identity.
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with switched_mode(model, training=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training_loss(model(x))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)


def peak_bytes(model: nn.Module, x: Tensor) -> int | None:
    """Most memory allocated on the GPU during a training step, weights and gradients included; None on a CPU.

    Args:
        model: network on the GPU.
        x: images (B,C,H,W) on the GPU.
    """
    if x.device.type != "cuda":
        return None
    with switched_mode(model, training=True):
        for _ in range(2):  # the first step also holds what the libraries need to choose their kernels
            torch.cuda.reset_peak_memory_stats(x.device)
            training_loss(model(x)).backward()
            model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(x.device)


def to_mib(count: int | None) -> float | None:
    """Convert bytes to MiB."""
    return None if count is None else count / MIB

"""Device of a computation, and torch settings that make it deterministic."""

from __future__ import annotations

import os

import torch

from sunets.core.config import ConfigError, TrainConfig
from sunets.core.hardware import torchrun_process


def select_device(name: str) -> torch.device:
    """Return the device for auto, cpu or cuda; under `torchrun`, one GPU per process of a machine.

    Raises:
        ConfigError: no GPU for cuda, or fewer GPUs than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
        raise ConfigError(f"train.device: cuda, but torch sees no GPU here{hidden}; set auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, gpus = torchrun_process()[1], torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(f"--nproc-per-node: at most {gpus}, the number of visible GPUs; more processes were started")
    return torch.device("cuda", local)


def prepare_torch(train: TrainConfig, device: torch.device | None = None) -> torch.device:
    """Choose the device, and make torch in this process deterministic, with full float32 precision."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    device = device or select_device(train.device)
    torch.set_num_threads(train.threads)
    # A few CUDA kernels (gradients of some poolings) have no deterministic form: they warn.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # memory is written before it is read
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # TF32, cuDNN's default, has ten bits of mantissa; reduced precision is the choice of train.amp.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device

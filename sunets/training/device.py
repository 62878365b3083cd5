"""Device of a computation, and torch settings that make it repeatable."""

from __future__ import annotations

import os

import torch

from sunets.core.config import ConfigError, TrainConfig


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

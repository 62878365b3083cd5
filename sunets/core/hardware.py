"""GPUs and CPU cores of this machine."""

from __future__ import annotations

import os


def device_type(name: str) -> str:
    """Resolve `train.device` to cpu or cuda; auto is cuda where torch sees a GPU."""
    import torch

    return "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"


def visible_gpus() -> list[str]:
    """List the values of `CUDA_VISIBLE_DEVICES` that select one GPU each."""
    import torch

    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")


def default_workers(threads: int, device: str) -> int:
    """Choose the number of concurrent jobs: one per visible GPU, or as many as the CPU cores allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return len(visible_gpus()) if device == "cuda" else max(1, cores // threads)

"""What this machine has to compute with."""

from __future__ import annotations

import os


def device_type(name: str) -> str:
    """Type of device for `train.device`: cpu or cuda; auto is cuda where torch sees a GPU."""
    import torch

    return "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"


def visible_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` would be for each GPU alone."""
    if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return given.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def default_workers(threads: int, device: str) -> int:
    """Jobs at a time: one per visible GPU, or as many as the cores carry."""
    if device == "cuda":
        return max(1, len(visible_gpus()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)

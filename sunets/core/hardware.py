"""GPUs and CPU cores of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


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


def torchrun_process() -> tuple[int, int, int]:
    """Return rank, rank on this machine and number of processes, as `torchrun` states them; (0, 0, 1) without it.

    A cluster may set some of these variables for every job: a RANK alone must not silence a training.

    Raises:
        ValueError: the variables contradict each other; names them.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 0, 1
    stated = {name: os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    values = [int(text) if text.isdecimal() else -1 for text in stated.values()]
    if min(values) < 0 or values[0] >= values[2]:
        shown = ", ".join(f"{name}={text!r}" for name, text in stated.items())
        raise ValueError(f"{shown}: not what torchrun sets; start the training with torchrun, or unset them")
    return values[0], values[1], values[2]


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Temporarily set the number of torch's CPU threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Latency, throughput and step time of several models, interleaved."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sunets.core.hardware import torch_threads
from sunets.profiling.memory import peak_bytes, to_mib, training_loss
from sunets.profiling.modes import Figures, Size, full_precision, input_channels, modes_in_training


def measure_speed(
    models: Mapping[str, nn.Module],
    *,
    size: Size,
    batch_size: int = 1,
    repeats: int = 10,
    warmup: int = 3,
    threads: int = 1,
    device: str = "auto",
) -> dict[str, Figures]:
    """Time forward passes and training steps in float32, without TF32, all models once per round.

    A disturbance slows all models of a round, so ratios hold on a busy machine. Data are on the device beforehand, and
    the device is synchronised before the clock is read.

    Args:
        models: networks by name; copies are timed.
        size: (height, width) of the input in pixels.
        batch_size: images.
        repeats: timed rounds.
        warmup: untimed rounds before them.
        threads: CPU threads.
        device: cpu, cuda, or auto (CUDA if there is a GPU).

    Returns:
        By name: medians and interquartile ranges over the rounds of speed.latency_ms (a forward pass in inference
        mode) and speed.step_ms (forward, cross-entropy, backward; no optimiser), speed.images_per_second, the
        protocol, and memory.peak_mib of the step on a GPU that holds no other of the models.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    def step(model: nn.Module, x: Tensor) -> None:
        training_loss(model(x)).backward()
        model.zero_grad(set_to_none=True)

    def input_of(model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch_size, input_channels(model), *size, generator=generator).to(device)

    def peak(model: nn.Module) -> int | None:
        return None if device == "cpu" else peak_bytes(copy.deepcopy(model).to(device), input_of(model))

    passes: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    with torch_threads(threads), full_precision():
        peaks = {name: peak(model) for name, model in models.items()}  # while no other network is on the GPU
        copies = {name: copy.deepcopy(model).to(device) for name, model in models.items()}
        images = {name: input_of(model) for name, model in models.items()}
        training = {name: modes_in_training(model, images[name]) for name, model in copies.items()}
        for _ in range(warmup + repeats):
            for name, model in copies.items():
                x = images[name]
                model.eval()
                with torch.inference_mode():
                    passes[name].append(timed(lambda model=model, x=x: model(x)))  # type: ignore[misc]
                for module, mode in training[name].items():
                    module.training = mode
                steps[name].append(timed(lambda model=model, x=x: step(model, x)))  # type: ignore[misc]
    protocol: Figures = {
        "speed.batch_size": batch_size,
        "speed.repeats": repeats,
        "speed.warmup": warmup,
        "speed.threads": threads,
        "speed.device": device,
        "speed.dtype": "float32",
        "speed.memory_format": "contiguous_format",
    }
    figures: dict[str, Figures] = {}
    for name in copies:
        latency, latency_iqr = _median_and_spread(passes[name][warmup:])
        step_ms, step_iqr = _median_and_spread(steps[name][warmup:])
        figures[name] = {
            "speed.latency_ms": latency,
            "speed.latency_iqr_ms": latency_iqr,
            "speed.images_per_second": 1e3 * batch_size / latency,
            "speed.step_ms": step_ms,
            "speed.step_iqr_ms": step_iqr,
            "memory.peak_mib": to_mib(peaks[name]),
            **protocol,
        }
    return figures


def _median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low

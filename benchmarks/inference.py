"""What `optimize_for_inference` gains on this machine: a table of latencies and of differences to the plain network.

Command: `python benchmarks/inference.py` (about two minutes on two cores, most of it compiling).
Expect, with two threads on an AVX-512 processor: float32 compiled at 0.5 to 0.6 of plain eager with the same logits to
1e-4, bfloat16 at about 0.3; with one thread, whose plain convolutions lose less, 0.65 and 0.35. The variants are timed
in turn, so that the ratios hold on a busy machine; the times do not.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sunets import create_model
from sunets.core.cli import refuse_other_checkout
from sunets.core.provenance import environment
from sunets.models.inference import optimize_for_inference


def main() -> None:
    """Build, optimise, time in turn, print."""
    refuse_other_checkout()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sunet64")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    plain = create_model(arguments.model, num_classes=21).eval()
    generator = torch.Generator().manual_seed(0)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # a fresh network's statistics are 0 and 1: folding them proves nothing
            nn.init.uniform_(module.get_buffer("running_mean"), -0.2, 0.2, generator=generator)
            nn.init.uniform_(module.get_buffer("running_var"), 0.7, 1.5, generator=generator)
    image = torch.randn(1, 3, *arguments.size, generator=generator)

    bf16, off = torch.bfloat16, False
    channels_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "plain eager": plain,
        "channels_last": lambda x: channels_last(x.contiguous(memory_format=torch.channels_last)),
        "+ folded BatchNorm": optimize_for_inference(plain, image, compile=off),
        "+ compiled": optimize_for_inference(plain, image, compile=True),
        "bfloat16, folded, channels_last": optimize_for_inference(plain, image, dtype=bf16, compile=off),
        "bfloat16, + compiled": optimize_for_inference(plain, image, dtype=bf16, compile=True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        logits = {name: network(image) for name, network in variants.items()}
        for _ in range(arguments.rounds):
            for name, network in variants.items():
                start = time.perf_counter()
                network(image)
                times[name].append(1e3 * (time.perf_counter() - start))

    expected = logits["plain eager"]
    host = environment("cpu", arguments.threads)
    size = " x ".join(map(str, image.shape))
    table = Table(
        title=f"{arguments.model}, {size}, medians of {arguments.rounds} rounds",
        caption=f"{host['cpu']}, {arguments.threads} threads, torch {host['torch']}. Ratio: median over the rounds of "
        "the time over plain eager's in the same round. Difference: of the logits, over the largest.",
    )
    for heading in ("network", "ms", "ratio", "largest difference"):
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    for name, values in times.items():
        ratio = statistics.median(t / base for t, base in zip(values, times["plain eager"], strict=True))
        difference = float((logits[name] - expected).abs().max() / expected.abs().max())
        table.add_row(name, f"{statistics.median(values):.1f}", f"{ratio:.2f}", f"{difference:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""Compare batched multi-scale testing with a loop over windows and mirrors: times and probabilities in one table.

Command: `python benchmarks/test_time.py` (about a minute on two cores). The exit status is 1 if a probability differs
by more than 1e-5 or is not a number.
The batched test runs as in `sunets.evaluation.evaluate.evaluate`: channels last, with windows and mirrors in batches
where that is faster. The loop uses torch's default memory format, as the authors' code does, unless
--loop-channels-last is given.
On two cores of an AVX-512 processor, expect 0.7 to 0.8 of the loop's time by default, 0.55 with windows of 128 pixels,
and 0.85 to 0.95 with the authors' windows of 512 pixels, which are not batched (see
`sunets.evaluation.multi_scale.CPU_PASS_PIXELS`): that gain is due to the memory format, and a channels-last loop takes
0.93 of the batched time. The methods are timed alternately, so ratios hold on a busy machine; times do not.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from sunets import create_model
from sunets.core.cli import refuse_other_checkout
from sunets.core.config import TrainConfig, VariantConfig
from sunets.core.provenance import environment
from sunets.evaluation.multi_scale import multi_scale_probabilities
from sunets.models.device import prepare_torch

SCALES = (0.5, 0.75, 1.0, 1.25)
NUM_CLASSES = 21
TOLERANCE = 1e-5
LOOP = "window by window"


@torch.inference_mode()
def window_by_window(
    model: nn.Module, image: Tensor, window: tuple[int, int], scales: Sequence[float] = SCALES, flip: bool = True
) -> Tensor:
    """Run the SUNet authors' multi-scale test of one image, with one window per forward pass.

    The stride is two thirds of the window. Details that the authors do not describe are those of
    `multi_scale_probabilities`: antialiased bilinear resizing, zeros on the right and below if the image is smaller
    than the window, the last window flush with the border.

    Args:
        model: network in evaluation mode.
        image: (C, H, W) normalised, on the model's device.
        window: (height, width) of the windows.
        scales: scales of the image.
        flip: add the logits of the mirrored window, from a second forward pass.

    Returns:
        (K, H, W) class probabilities.
    """
    height, width = image.shape[1:]
    tall, wide = window
    average: Tensor | None = None
    for scale in scales:
        scaled_height, scaled_width = round(height * scale), round(width * scale)
        scaled = image[None]
        if scale != 1:
            scaled = functional.interpolate(scaled, (scaled_height, scaled_width), mode="bilinear", antialias=True)
        padded_height, padded_width = max(scaled_height, tall), max(scaled_width, wide)
        padded = image.new_zeros(1, len(image), padded_height, padded_width)
        padded[:, :, :scaled_height, :scaled_width] = scaled
        total: Tensor | None = None
        count = image.new_zeros(padded_height, padded_width)
        down, right = round(tall * 2 / 3), round(wide * 2 / 3)
        for row in range(math.ceil((padded_height - tall) / down) + 1):
            for column in range(math.ceil((padded_width - wide) / right) + 1):
                y, x = min(row * down, padded_height - tall), min(column * right, padded_width - wide)
                tile = padded[:, :, y : y + tall, x : x + wide]
                logits = model(tile)
                if flip:
                    logits = logits + model(tile.flip(3)).flip(3)
                if total is None:
                    total = logits.new_zeros(1, logits.shape[1], padded_height, padded_width)
                total[:, :, y : y + tall, x : x + wide] += logits.softmax(1)
                count[y : y + tall, x : x + wide] += 1
        assert total is not None  # there is at least one window
        probabilities = (total / count)[:, :, :scaled_height, :scaled_width]
        probabilities = functional.interpolate(probabilities, (height, width), mode="bilinear")[0]
        average = probabilities if average is None else average + probabilities
    assert average is not None  # there is at least one scale
    return average / len(scales)


def random_network(name: str, output_stride: int | None) -> nn.Module:
    """Build a network with random weights and norms, so that probabilities are neither equal nor all 0 or 1."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=NUM_CLASSES, output_stride=output_stride).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_mean"), -0.2, 0.2)
            nn.init.uniform_(module.get_buffer("running_var"), 0.7, 1.5)
    return model


def main() -> None:
    """Compare the methods, time them alternately, and print a table."""
    refuse_other_checkout()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="sunet64", help="name in the zoo")
    parser.add_argument("--output-stride", type=int, default=16, help="output stride of the network")
    parser.add_argument("--size", type=int, nargs=2, default=(188, 250), metavar=("H", "W"), help="size of the images")
    parser.add_argument("--window", type=int, nargs=2, default=(256, 256), metavar=("H", "W"), help="size of a window")
    parser.add_argument("--images", type=int, default=2, help="images per call of the batched test")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=(2, 8), help="windows and mirrors per pass of the batched test"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads; with 1, other processes disturb the processor time least"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--loop-channels-last", action="store_true", help="run the loop in channels-last format")
    arguments = parser.parse_args()
    window = tuple(arguments.window)
    device = prepare_torch(TrainConfig(threads=arguments.threads), torch.device(arguments.device))
    loop_model = random_network(arguments.model, arguments.output_stride).to(device)
    loop_images = torch.randn(arguments.images, 3, *arguments.size).to(device)
    model = copy.deepcopy(loop_model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = loop_images.contiguous(memory_format=torch.channels_last)
    if arguments.loop_channels_last:
        loop_model, loop_images = model, images
    variant = VariantConfig(scales=SCALES, flip=True, window=window)

    methods: dict[str, Callable[[], Tensor]] = {
        LOOP: lambda: torch.stack([window_by_window(loop_model, image, window) for image in loop_images])
    }
    for size in arguments.batch_sizes:
        methods[f"batches of {size}"] = partial(multi_scale_probabilities, model, images, variant, size)
    differences, expected = {}, methods[LOOP]()  # also warms up
    for name, method in methods.items():
        differences[name] = float((method() - expected).abs().max())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for turn in range(arguments.rounds):
        order = list(methods)
        for name in order if turn % 2 == 0 else reversed(order):  # a drift of the load favours neither end
            times[name].append(_seconds(methods[name], device))

    host = environment(device, arguments.threads)
    title = (
        f"{arguments.model}, output stride {arguments.output_stride}, {arguments.images} images of "
        f"{' x '.join(map(str, arguments.size))}, windows of {' x '.join(map(str, window))}, "
        f"medians of {arguments.rounds} rounds"
    )
    caption = (
        f"{host.get('gpu', host['cpu'])}, {arguments.threads} threads, torch {host['torch']}. Ratio: time relative to "
        "the loop in the same round, median and range; CPU: the same for the processor time, which other processes "
        "disturb less. Difference: largest of the probabilities."
    )
    table = Table(title=title, caption=caption)
    for heading in ("method", "s", "ratio", "CPU", "difference"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for name, seconds in times.items():
        both = [
            [value / base for value, base in zip(values, bases, strict=True)]
            for values, bases in zip(zip(*seconds, strict=True), zip(*times[LOOP], strict=True), strict=True)
        ]
        cells = [f"{statistics.median(each):.2f}, {min(each):.2f}-{max(each):.2f}" for each in both]
        table.add_row(name, f"{statistics.median(wall for wall, _ in seconds):.2f}", *cells, f"{differences[name]:.1e}")
    Console().print(table)
    if not all(difference <= TOLERANCE for difference in differences.values()):  # NaN is not <= anything
        sys.exit(f"probabilities differ by more than {TOLERANCE:.0e}")


def _seconds(method: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Measure the wall and processor time of one call."""
    start, busy = time.perf_counter(), time.process_time()
    method()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, time.process_time() - busy


if __name__ == "__main__":
    main()

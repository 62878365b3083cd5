"""Scoring of a trained network: one scale, or several with mirroring and windows; a confusion matrix an image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from sunets.config import Config, ConfigError, TestTimeConfig
from sunets.data import Manifest, eval_batches
from sunets.data.picture import MIN_SIDE
from sunets.metrics import boundary_f_score, confusion_matrix, scores_from_confusion, top_k_errors
from sunets.train import prepare_torch, scoring_dataset

CPU_PASS_PIXELS = 2**18
"""Most pixels of a forward pass on a CPU: the authors' window of 512. Beyond, tensors inside the networks pass 32 MiB,
and glibc has the system map and clear such memory anew each time: slower than passes of one window."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one network on one split with one test-time variant."""

    confusions: NDArray[np.uint32]
    """(images, K, K), rows are the truth; for classification (1, K, K), over all images."""
    image_ids: tuple[str, ...]
    """One a matrix; for classification `all`."""
    scores: dict[str, float | None]
    """score.miou, score.mean_accuracy, score.pixel_accuracy, score.boundary_f and score.iou.<class> as fractions, None
    where a class is absent; for classification score.top1_error_percent and score.top5_error_percent."""
    predictions: dict[str, NDArray[np.uint8]]
    """Image id -> (H, W) labels of the split's first images; empty for classification."""


def evaluate(
    model: nn.Module,
    manifest: Manifest,
    config: Config,
    *,
    split: str,
    variant: TestTimeConfig,
    device: torch.device | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score a network on a split, in float32.

    The scores are those of the sum of all confusion matrices, except `score.boundary_f`, the mean over the images that
    have a boundary.

    Args:
        model: from logits; moved to the device and set to evaluation mode.
        manifest: the prepared data set.
        config: batch size, boundary tolerance and number of kept predictions under `evaluate`; threads and memory
            format as in `train`.
        split: a split with labels.
        variant: scales, mirroring, window.
        device: None chooses as the training did.
        progress: a bar on standard error, on a terminal.

    Raises:
        ConfigError: no such split, or a sliding window for classification.
    """
    items = manifest.splits.get(split)
    if not items:
        raise ConfigError(f"split {split!r}: the data set has no such split; it has {', '.join(manifest.splits)}")
    if any(item.target is None for item in items):
        raise ConfigError(f"split {split!r}: it has no labels to score; choose another")
    segmentation = manifest.task == "segmentation"
    if variant.window is not None and not segmentation:
        raise ConfigError("evaluate.variants: a window is for segmentation; leave it out for classification")
    device = prepare_torch(config.train, device)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout).eval()  # type: ignore[call-overload]
    classes, batch_size = manifest.num_classes, config.evaluate.batch_size
    confusions = np.zeros((len(items) if segmentation else 1, classes, classes), dtype=np.uint32)
    boundaries: list[float | None] = [None] * len(items)
    predictions: dict[str, NDArray[np.uint8]] = {}
    wrong = {1: 0, 5: 0}

    dataset = scoring_dataset(manifest, split, config)
    order = sorted(range(len(items)), key=dataset.output_size)  # images of one size share a batch
    left = iter(order)
    with _bar(f"{config.model.name} {split}", len(items), progress) as advance:
        for ids, images, targets in eval_batches(dataset, batch_size, config.data.workers, order):
            numbers = list(islice(left, len(ids)))
            images = images.to(device, memory_format=layout)
            probabilities = multi_scale_probabilities(model, images, variant, batch_size)
            targets = targets.to(device)
            labels = probabilities.argmax(1)
            if segmentation:
                confusions[numbers] = confusion_matrix(labels, targets, classes).cpu().numpy()
                for number, found, true in zip(numbers, labels.cpu().numpy(), targets.cpu().numpy(), strict=True):
                    boundaries[number] = boundary_f_score(found, true, config.evaluate.boundary_tolerance)
                    if number < config.evaluate.num_qualitative:
                        predictions[items[number].id] = found.astype(np.uint8)
            else:
                np.add.at(confusions[0], (targets.cpu().numpy(), labels.cpu().numpy()), 1)
                for k in wrong:
                    wrong[k] += top_k_errors(probabilities, targets, k)
            advance(len(numbers))

    if not segmentation:
        percent = {f"score.top{k}_error_percent": 100 * count / len(items) for k, count in wrong.items()}
        return Evaluation(confusions, ("all",), {**percent}, {})
    scores = scores_from_confusion(confusions.sum(axis=0, dtype=np.int64), manifest.classes)
    counted = [value for value in boundaries if value is not None]
    scores["score.boundary_f"] = float(np.mean(counted)) if counted else None
    kept = {item.id: predictions[item.id] for item in items[: config.evaluate.num_qualitative]}
    return Evaluation(confusions, tuple(item.id for item in items), scores, kept)


@torch.inference_mode()
def multi_scale_probabilities(model: nn.Module, images: Tensor, variant: TestTimeConfig, batch_size: int) -> Tensor:
    """Class probabilities, averaged over scales, mirrors and overlapping windows.

    At each scale the images are resized on their device (without a window no side falls below `MIN_SIDE`) and covered
    by windows that overlap by `variant.window_overlap`; where they are smaller than the window they are padded right
    and below with zeros (the data set's mean colour). The logits of a window and of its mirror image are summed before
    the softmax; overlaps are averaged; the result is resized to the images' size and averaged over the scales. All
    windows and mirrors of all images of a scale share batches, on a CPU of at most `CPU_PASS_PIXELS`.

    Args:
        model: in evaluation mode.
        images: (B, C, H, W) normalised, on the model's device.
        variant: scales, mirroring, window and overlap.
        batch_size: most windows and mirrors per forward pass.

    Returns:
        (B, K, H, W), or (B, K) from a classifier (no window then).
    """
    size = images.shape[2:]
    total: Tensor | None = None
    smallest = 1 if variant.window is not None else MIN_SIDE  # what is smaller than a window is padded
    for scale in variant.scales:
        factor = max(scale, smallest / min(size))
        scaled_size = [max(1, round(side * factor)) for side in size]
        scaled = images
        if scaled_size != list(size):
            scaled = functional.interpolate(images, scaled_size, mode="bilinear", antialias=True)
        probabilities = _window_probabilities(model, scaled, variant, batch_size)
        if probabilities.ndim == 4 and scaled_size != list(size):
            probabilities = functional.interpolate(probabilities, size, mode="bilinear")
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None  # there is at least one scale
    return total.div_(len(variant.scales))


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows start along one side: at equal strides, the last one flush with the end."""
    last = max(0, length - window)
    return [*range(0, last, max(1, round(window * (1 - overlap)))), last]


def _window_probabilities(model: nn.Module, images: Tensor, variant: TestTimeConfig, batch_size: int) -> Tensor:
    """Probabilities at the images' own scale; without a window, one window covers the image."""
    height, width = images.shape[2:]
    window = variant.window or (height, width)
    padded = functional.pad(images, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    windows = [
        (number, slice(y, y + window[0]), slice(x, x + window[1]))
        for y in window_starts(height, window[0], variant.window_overlap)
        for x in window_starts(width, window[1], variant.window_overlap)
        for number in range(len(images))
    ]
    if images.device.type == "cpu":
        batch_size = max(1, min(batch_size, CPU_PASS_PIXELS // (window[0] * window[1])))
    at_once = max(1, batch_size // (2 if variant.flip else 1))
    total, cover = images.new_zeros(0), images.new_zeros(padded.shape[2:])
    for start in range(0, len(windows), at_once):
        chunk = windows[start : start + at_once]
        tiles = torch.stack([padded[number, :, rows, columns] for number, rows, columns in chunk])
        if padded.is_contiguous(memory_format=torch.channels_last):
            tiles = tiles.contiguous(memory_format=torch.channels_last)
        if variant.flip:
            if batch_size > 1:
                logits, mirrored = model(torch.cat([tiles, tiles.flip(3)])).float().chunk(2)
            else:
                logits, mirrored = model(tiles).float(), model(tiles.flip(3)).float()
            logits = logits.add_(mirrored.flip(3) if mirrored.ndim == 4 else mirrored)
        else:
            logits = model(tiles).float()
        probabilities = logits.softmax(1)
        if not len(total):
            spatial = padded.shape[2:] if probabilities.ndim == 4 else ()
            total = probabilities.new_zeros(len(images), probabilities.shape[1], *spatial)
        for (number, rows, columns), tile in zip(chunk, probabilities, strict=True):
            if tile.ndim == 1:
                total[number] = tile
            else:
                total[number, :, rows, columns] += tile
                cover[rows, columns] += number == 0
    return total if total.ndim == 2 else total.div_(cover)[:, :, :height, :width]


@contextlib.contextmanager
def _bar(name: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over images on a terminal; yields what advances it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)

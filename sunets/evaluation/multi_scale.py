"""Class probabilities at one scale, or at several with mirroring and windows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sunets.core.config import VariantConfig
from sunets.data.picture import MIN_SIDE

CPU_PASS_PIXELS = 2**18
"""Most pixels of a forward pass on a CPU: the authors' window of 512. Above that, tensors inside the networks exceed
32 MiB, which glibc maps and clears again for each allocation: slower than passes of one window."""


@torch.inference_mode()
def multi_scale_probabilities(model: nn.Module, images: Tensor, variant: VariantConfig, batch_size: int) -> Tensor:
    """Compute class probabilities, averaged over scales, mirrors and overlapping windows.

    At each scale the images are resized (without a window, to at least `MIN_SIDE` per side) and covered by windows that
    overlap by `variant.window_overlap`; images smaller than the window are padded right and below with zeros (the mean
    colour). The logits of a window and of its mirror image are summed before the softmax; overlaps are averaged; the
    result is resized to the images' size and averaged over the scales. Windows and mirror images of all images of a
    scale share batches, of at most `CPU_PASS_PIXELS` on a CPU.

    Args:
        model: in evaluation mode.
        images: (B, C, H, W), normalised, on the model's device.
        variant: scales, mirroring, window and overlap.
        batch_size: most windows and mirror images per forward pass.

    Returns:
        (B, K, H, W), or (B, K) from a classifier, which has no window.
    """
    size = images.shape[2:]
    total: Tensor | None = None
    smallest = 1 if variant.window is not None else MIN_SIDE  # images smaller than the window are padded
    for wanted in variant.factors(*size):
        factor = max(wanted, smallest / min(size))
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
    """Return the first pixels of the windows along one side: equal strides, the last window ending at the edge."""
    last = max(0, length - window)
    return [*range(0, last, max(1, round(window * (1 - overlap)))), last]


def _window_probabilities(model: nn.Module, images: Tensor, variant: VariantConfig, batch_size: int) -> Tensor:
    """Compute the probabilities at one scale; without a window, one covers the image."""
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

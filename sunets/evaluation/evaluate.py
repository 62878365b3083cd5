"""Scores of a trained network on a split, and one confusion matrix per image."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sunets.core.config import Config, ConfigError, VariantConfig
from sunets.core.metrics import (
    OBJECT_SIZES,
    boundary_f_score,
    confusion_by_object_size,
    confusion_matrix,
    count_top_k,
    scores_by_object_size,
    scores_from_confusion,
    scores_from_top_k,
)
from sunets.data.loading import eval_batches, scoring_dataset
from sunets.data.manifest import Manifest
from sunets.evaluation.multi_scale import multi_scale_probabilities
from sunets.models.device import prepare_torch


@dataclass(frozen=True)
class Evaluation:
    """Scores of one network on one split with one test-time variant."""

    confusions: NDArray[np.uint32]
    """(images, K, K), rows are the truth; for classification (1, K, K), over all images."""
    by_object_size: NDArray[np.int64] | None
    """(S, K, K), over all images, one matrix for each of `OBJECT_SIZES`; None for classification."""
    image_ids: tuple[str, ...]
    """One per matrix; for classification `all`."""
    scores: dict[str, float | None]
    """score.miou, score.mean_accuracy (also .small, .medium and .large), score.pixel_accuracy, score.boundary_f and
    score.iou.<class> as fractions, None if a class is absent; for classification score.top1_error_percent and
    score.top5_error_percent."""
    predictions: dict[str, NDArray[np.uint8]]
    """Image id -> (H, W) labels, for the first images of the split; empty for classification."""


def evaluate(
    model: nn.Module,
    manifest: Manifest,
    config: Config,
    *,
    split: str,
    variant: VariantConfig,
    device: torch.device | None = None,
) -> Evaluation:
    """Score a network on a split, in float32.

    Scores are computed from the sum of all confusion matrices, but `score.boundary_f` is the mean over the images that
    have a boundary.

    Args:
        model: returns logits; is moved to the device and set to evaluation mode.
        manifest: the prepared data set.
        config: batch size, boundary tolerance and number of returned predictions under `evaluate`; threads and memory
            format as in `train`.
        split: a split with labels.
        variant: scales, mirroring, window.
        device: None is that of `train.device`.

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
    by_size = np.zeros((len(OBJECT_SIZES), classes, classes), dtype=np.int64)
    boundaries: list[float | None] = [None] * len(items)
    predictions: dict[str, NDArray[np.uint8]] = {}
    top_k = torch.zeros(3, dtype=torch.int64, device=device)

    dataset = scoring_dataset(manifest, split, config)
    order = sorted(range(len(items)), key=dataset.output_size)  # images of one size share a batch
    remaining = iter(order)
    for ids, images, targets in eval_batches(dataset, batch_size, config.data.workers, order):
        numbers = list(islice(remaining, len(ids)))
        images = images.to(device, memory_format=layout)
        probabilities = multi_scale_probabilities(model, images, variant, batch_size)
        targets = targets.to(device)
        labels = probabilities.argmax(1)
        if segmentation:
            confusions[numbers] = confusion_matrix(labels, targets, classes).cpu().numpy()
            for number, predicted, true in zip(numbers, labels.cpu().numpy(), targets.cpu().numpy(), strict=True):
                boundaries[number] = boundary_f_score(predicted, true, config.evaluate.boundary_tolerance)
                by_size += confusion_by_object_size(predicted, true, classes)
                if number < config.evaluate.num_qualitative:
                    predictions[items[number].id] = predicted.astype(np.uint8)
        else:
            np.add.at(confusions[0], (targets.cpu().numpy(), labels.cpu().numpy()), 1)
            top_k += count_top_k(probabilities, targets)

    if not segmentation:
        return Evaluation(confusions, None, ("all",), dict(scores_from_top_k(top_k)), {})
    scores = scores_from_confusion(confusions.sum(axis=0, dtype=np.int64), manifest.classes)
    scores |= scores_by_object_size(by_size)
    counted = [value for value in boundaries if value is not None]
    scores["score.boundary_f"] = float(np.mean(counted)) if counted else None
    in_order = {item.id: predictions[item.id] for item in items[: config.evaluate.num_qualitative]}
    return Evaluation(confusions, by_size, tuple(item.id for item in items), scores, in_order)

"""Definitions of all scores, in numpy and scipy; torch tensors are used through their methods, without an import."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from sunets.core.config import IGNORE_INDEX, Task

if TYPE_CHECKING:
    from torch import Tensor

PRIMARY_METRIC: dict[Task, str] = {"segmentation": "score.miou", "classification": "score.top1_error_percent"}
"""Record key of the score that models are compared by and searches optimise."""

OBJECT_SIZES = {"small": 0.0, "medium": 0.02, "large": 0.1}
"""Size of an object -> its least area, as a share of the image; an object is a connected region of one class."""


def validation_column(score: str) -> str:
    """Return the column of histories that has a score on the validation split: val.miou for score or search.miou."""
    return f"val.{score.partition('.')[2]}"


def search_key(score: str) -> str:
    """Return the key of a score on the validation split in records of a sampler's trials: search.miou of score.miou."""
    return f"search.{score.partition('.')[2]}"


def higher_is_better(key: str) -> bool:
    """Return whether higher is better: false for errors, true for other scores."""
    return not key.endswith("_error_percent")


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count (true class, predicted class) pairs, one matrix per image.

    Args:
        prediction: (B, ...) integer classes 0..K-1.
        target: (B, ...) integer classes; `IGNORE_INDEX` is not counted.
        num_classes: K, at most `IGNORE_INDEX`.

    Returns:
        (B, K, K) int64 on the device of the input: rows are the truth, columns the prediction.
    """
    batch, rows = len(target), IGNORE_INDEX + 1  # ignored pixels are counted and cut off: faster than a mask
    image = (target.new_ones(batch).cumsum(0) - 1).view(-1, *[1] * (target.ndim - 1))
    index = (image * rows + target) * num_classes + prediction
    counts = index.flatten().bincount(minlength=batch * rows * num_classes)
    return counts.view(batch, rows, num_classes)[:, :num_classes]


def confusion_by_object_size(
    prediction: NDArray[np.integer], target: NDArray[np.integer], num_classes: int
) -> NDArray[np.int64]:
    """Count (true class, predicted class) pairs of one image, apart for the pixels of small, medium and large objects.

    Args:
        prediction: (H, W) classes 0..K-1.
        target: (H, W) classes; `IGNORE_INDEX` is not counted.
        num_classes: K.

    Returns:
        (S, K, K), one matrix for each of `OBJECT_SIZES`; rows are the truth.
    """
    sizes = np.zeros(target.shape, dtype=np.int64)
    for label in np.unique(target[target != IGNORE_INDEX]):
        objects, _ = ndimage.label(target == label)
        area = np.bincount(objects.flat) / target.size
        size = np.searchsorted(list(OBJECT_SIZES.values()), area, side="right") - 1
        sizes += np.where(objects > 0, size[objects], 0)
    counted = target != IGNORE_INDEX
    index = (sizes[counted] * num_classes + target[counted]) * num_classes + prediction[counted]
    shape = (len(OBJECT_SIZES), num_classes, num_classes)
    return np.bincount(index, minlength=math.prod(shape)).reshape(shape)


def scores_by_object_size(confusions: NDArray[np.integer]) -> dict[str, float | None]:
    """Compute `score.mean_accuracy.<size>` from (S, K, K) counts; None for a size that no object has."""
    scores = (scores_from_confusion(confusion)["score.mean_accuracy"] for confusion in confusions)
    return {f"score.mean_accuracy.{size}": score for size, score in zip(OBJECT_SIZES, scores, strict=True)}


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the indices of the Pareto-optimal points (higher is better), by falling first coordinate, equals once."""
    order = sorted(range(len(points)), key=lambda i: (*(-x for x in points[i]), i))
    front: list[int] = []
    for i in order:
        if not any(all(a >= b for a, b in zip(points[j], points[i], strict=True)) for j in front):
            front.append(i)
    return front


def class_iou(confusion: NDArray[np.number]) -> NDArray[np.float64]:
    """Compute the intersection over union of each class.

    Args:
        confusion: (..., K, K) counts, rows are the truth.

    Returns:
        (..., K); NaN for a class absent from truth and prediction.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    union = confusion.sum(-1) + confusion.sum(-2) - hits
    return np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)


def mean_iou(confusion: NDArray[np.number]) -> NDArray[np.float64]:
    """Average `class_iou` over the classes where it is not NaN (...); NaN if there is none."""
    iou = class_iou(confusion)
    count = np.isfinite(iou).sum(-1)
    return np.divide(np.nansum(iou, -1), count, out=np.full(count.shape, np.nan), where=count > 0)


def scores_from_confusion(
    confusion: NDArray[np.integer], classes: Sequence[str] | None = None
) -> dict[str, float | None]:
    """Compute the scores of one confusion matrix, as fractions 0..1.

    `score.miou` averages over the classes in truth or prediction, `score.mean_accuracy` over those in the truth. For
    other classes the quotient is 0/0: they are left out of the mean, and their IoU is None.

    Args:
        confusion: (K, K) counts, rows are the truth.
        classes: K names for `score.iou.<class>`; None gives no per-class scores.

    Returns:
        score.miou, score.mean_accuracy, score.pixel_accuracy and score.iou.<class>; None if nothing was counted.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    hits, truth, mean = counts.diagonal(), counts.sum(axis=1), float(mean_iou(counts))
    iou = [None if math.isnan(value) else float(value) for value in class_iou(counts)]
    accuracy = [float(h / t) for h, t in zip(hits, truth, strict=True) if t]
    scores: dict[str, float | None] = {
        "score.miou": None if math.isnan(mean) else mean,
        "score.mean_accuracy": float(np.mean(accuracy)) if accuracy else None,
        "score.pixel_accuracy": float(hits.sum() / truth.sum()) if truth.sum() else None,
    }
    return scores | {f"score.iou.{name}": value for name, value in zip(classes or (), iou, strict=classes is not None)}


def count_top_k(logits: Tensor, target: Tensor) -> Tensor:
    """Count images, top-1 errors and top-5 errors (3,); with fewer than five classes, every class is among the best.

    Args:
        logits: (B, K) logits or probabilities.
        target: (B,) classes.
    """
    errors = [
        len(target) - int((logits.topk(min(k, logits.shape[1]), dim=1).indices == target[:, None]).sum())
        for k in (1, 5)
    ]
    return target.new_tensor([len(target), *errors])


def scores_from_top_k(counts: Tensor) -> dict[str, float]:
    """Compute the scores of counts (3,) that `count_top_k` returned, or of their sum."""
    images, top1, top5 = counts.tolist()
    return {"score.top1_error_percent": 100 * top1 / images, "score.top5_error_percent": 100 * top5 / images}


def boundary_f_score(
    prediction: NDArray[np.integer], target: NDArray[np.integer], tolerance: float = 0.0075
) -> float | None:
    """Compute the boundary F-score of one image, averaged over its classes (Csurka et al., BMVC 2013).

    The boundary of a class is its pixels that have a 4-neighbour of another class. Precision is the share of predicted
    boundary pixels at most `tolerance` away from a true one of the same class; recall is the converse. Classes without
    a boundary in truth and prediction are left out; a class with a boundary in only one of them scores 0.

    Ignored pixels within the tolerance of a labelled one take the nearest label: the ignored border line that PASCAL
    VOC draws around objects would hide their boundaries. Pixels deeper in an ignored area count as outside the image,
    for truth and prediction alike.

    Args:
        prediction: (H, W) classes.
        target: (H, W) classes or `IGNORE_INDEX`.
        tolerance: distance as a share of the image diagonal, at least one pixel.

    Returns:
        A fraction 0..1, or None if no class has a boundary.
    """
    reach = max(1.0, tolerance * math.hypot(*target.shape))
    ignored = target == IGNORE_INDEX
    if ignored.all():
        return None
    if ignored.any():
        distance, nearest = ndimage.distance_transform_edt(ignored, return_indices=True)
        target, ignored = target[tuple(nearest)], distance > reach
    predicted, true = _boundary(prediction, ~ignored), _boundary(target, ~ignored)
    scores = []
    for label in np.union1d(prediction[predicted], target[true]):
        a, b = np.argwhere(predicted & (prediction == label)), np.argwhere(true & (target == label))
        precision, recall = _share_near(a, b, reach), _share_near(b, a, reach)
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return float(np.mean(scores)) if scores else None


def _boundary(labels: NDArray[np.integer], valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the valid pixels (H, W) with a valid 4-neighbour of another label."""
    edge = np.zeros(labels.shape, dtype=bool)
    across = (labels[1:] != labels[:-1]) & valid[1:] & valid[:-1]
    along = (labels[:, 1:] != labels[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    edge[1:] |= across
    edge[:-1] |= across
    edge[:, 1:] |= along
    edge[:, :-1] |= along
    return edge


def _share_near(points: NDArray[np.integer], others: NDArray[np.integer], reach: float) -> float:
    """Compute the share of points (N, 2) at most `reach` away from one of the others (M, 2)."""
    if not len(points) or not len(others):
        return 0.0
    # The bound is exclusive in scipy.
    distance, _ = cKDTree(others).query(points, distance_upper_bound=reach + 1e-9)
    return float(np.isfinite(distance).mean())

"""Scores against independent libraries and against slow computations written straight from their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as torchmetrics
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score, recall_score, top_k_accuracy_score

from sunets.core.metrics import (
    boundary_f_score,
    confusion_by_object_size,
    confusion_matrix,
    count_top_k,
    scores_by_object_size,
    scores_from_confusion,
    scores_from_top_k,
)

CLASSES = 5


def _labels(seed: int, shape: tuple[int, ...] = (4, 9, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, CLASSES, shape, generator=generator)
    right = torch.rand(shape, generator=generator) < 0.6
    prediction = torch.where(right, target, torch.randint(0, CLASSES, shape, generator=generator))
    target[torch.rand(shape, generator=generator) < 0.1] = 255
    return prediction, target


def test_confusion_matrix_per_image_is_sklearns() -> None:
    prediction, target = _labels(0)
    found = confusion_matrix(prediction, target, CLASSES)
    for image in range(len(target)):
        valid = target[image] != 255
        expected = sklearn_confusion(target[image][valid], prediction[image][valid], labels=range(CLASSES))
        np.testing.assert_array_equal(found[image], expected)


def test_confusion_matrix_with_as_many_classes_as_masks_can_hold() -> None:
    target = torch.tensor([[0, 254, 255], [254, 255, 1]])
    counts = confusion_matrix(torch.tensor([[254, 254, 254], [0, 3, 1]]), target, 255)
    assert counts.shape == (2, 255, 255)
    assert counts.nonzero().tolist() == [[0, 0, 254], [0, 254, 254], [1, 1, 1], [1, 254, 0]]


def test_confusion_matrix_of_nothing_labelled_is_zero() -> None:
    target = torch.full((2, 3, 3), 255)
    assert confusion_matrix(torch.zeros_like(target), target, CLASSES).tolist() == np.zeros((2, 5, 5)).tolist()


def test_scores_are_those_of_torchmetrics_and_sklearn() -> None:
    prediction, target = _labels(1)
    scores = scores_from_confusion(confusion_matrix(prediction, target, CLASSES).sum(0).numpy(), "abcde")
    miou = torchmetrics.multiclass_jaccard_index(prediction, target, CLASSES, ignore_index=255)
    assert scores["score.miou"] == pytest.approx(float(miou))
    valid = target != 255
    true, guessed = target[valid].numpy(), prediction[valid].numpy()
    assert [scores[f"score.iou.{c}"] for c in "abcde"] == pytest.approx(jaccard_score(true, guessed, average=None))
    assert scores["score.mean_accuracy"] == pytest.approx(recall_score(true, guessed, average="macro"))
    assert scores["score.pixel_accuracy"] == pytest.approx((true == guessed).mean())


def test_absent_classes_are_left_out() -> None:
    # a: right; b: in the truth only; c: predicted only; d: nowhere.
    target, prediction = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 2, 0]])
    scores = scores_from_confusion(confusion_matrix(prediction, target, 4).sum(0).numpy(), "abcd")
    assert scores["score.iou.d"] is None
    assert scores["score.iou.b"] == scores["score.iou.c"] == 0
    assert scores["score.miou"] == pytest.approx((2 / 4 + 0 + 0) / 3)  # the union of c is not empty
    assert scores["score.mean_accuracy"] == pytest.approx((2 / 3 + 0) / 2)  # c has no true pixel
    empty = scores_from_confusion(np.zeros((2, 2), dtype=np.int64), "ab")
    assert set(empty.values()) == {None}


def test_accuracy_by_object_size() -> None:
    target = np.zeros((100, 100), np.uint8)  # one large object of class 0
    target[:10, :19] = 1  # 190 pixels are small, 200 are medium, 1,000 are large
    target[20:30, :20] = 1  # another object of class 1
    target[50:90, 10:35] = 2
    target[20, 0] = 255
    prediction = np.where(target == 255, 0, target)
    prediction[:10, :10] = 0  # 100 of the 190
    prediction[50:90, 10:20] = 1  # 400 of the 1,000
    counts = confusion_by_object_size(prediction, target, 3)
    small, medium, large = counts
    assert small.sum() == small[1].sum() + medium.sum() == 190 + 199  # the ignored pixel makes the second one small
    assert (
        counts.sum(0) == confusion_matrix(torch.tensor(prediction)[None], torch.tensor(target)[None], 3)[0].numpy()
    ).all()
    assert large[2].tolist() == [0, 400, 600]
    assert scores_by_object_size(counts) == {
        "score.mean_accuracy.small": pytest.approx((90 + 199) / 389),
        "score.mean_accuracy.medium": None,
        "score.mean_accuracy.large": pytest.approx((1 + 0.6) / 2),
    }


def test_counts_beyond_32_bits() -> None:
    confusion = np.array([[2**40, 2**40], [0, 2**41]])
    assert scores_from_confusion(confusion)["score.miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize("classes", [4, 9])
def test_top_k_errors_are_sklearns(classes: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, target = (
        torch.randn(40, classes, generator=generator),
        torch.randint(0, classes, (40,), generator=generator),
    )
    right = [1.0 if k >= classes else top_k_accuracy_score(target, logits, k=k, labels=range(classes)) for k in (1, 5)]
    counts = count_top_k(logits, target)
    assert counts.tolist() == [40, *(round(40 * (1 - share)) for share in right)]
    percent = {f"score.top{k}_error_percent": pytest.approx(100 * (1 - s)) for k, s in zip((1, 5), right, strict=True)}
    assert scores_from_top_k(counts + counts) == percent


def _slow_boundary_f(prediction: list[list[int]], target: list[list[int]], reach: float) -> float | None:
    """The definition, pixel by pixel, for images without ignored pixels."""

    def boundary(labels: list[list[int]], label: int) -> list[tuple[int, int]]:
        points = []
        for y, row in enumerate(labels):
            for x, value in enumerate(row):
                around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
                inside = [labels[v][u] for v, u in around if 0 <= v < len(labels) and 0 <= u < len(row)]
                if value == label and any(other != label for other in inside):
                    points.append((y, x))
        return points

    scores = []
    for label in range(CLASSES):
        found, true = boundary(prediction, label), boundary(target, label)
        if not found and not true:
            continue
        near = [
            [min((math.dist(p, q) for q in others), default=math.inf) <= reach for p in points]
            for points, others in ((found, true), (true, found))
        ]
        precision, recall = (sum(n) / len(n) if n else 0.0 for n in near)
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores) if scores else None


@pytest.mark.parametrize("tolerance", [0.0075, 0.1, 0.17])
@pytest.mark.parametrize("seed", range(4))
def test_boundary_f_score_is_the_slow_one(seed: int, tolerance: float) -> None:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, CLASSES, (4, 5))
    target = coarse.repeat(4, axis=0).repeat(4, axis=1)
    prediction = np.roll(target, (seed % 3, 1), axis=(0, 1))
    prediction[2:5, 3:9] = generator.integers(0, CLASSES)
    reach = max(1.0, tolerance * math.hypot(16, 20))
    expected = _slow_boundary_f(prediction.tolist(), target.tolist(), reach)
    assert expected is not None
    assert 0 < expected < 1
    assert boundary_f_score(prediction, target, tolerance) == pytest.approx(expected)


def test_boundary_f_score_limits() -> None:
    halves = np.zeros((40, 40), dtype=np.int64)
    halves[:, 20:] = 1
    assert boundary_f_score(halves, halves) == 1
    assert boundary_f_score(np.roll(halves, 1, axis=1)[:, 1:], halves[:, 1:]) == 1  # one pixel off is within tolerance
    moved = np.zeros_like(halves)
    moved[:, 30:] = 1
    assert boundary_f_score(moved, halves) == 0
    assert boundary_f_score(np.zeros_like(halves), halves) == 0
    assert boundary_f_score(np.zeros_like(halves), np.zeros_like(halves)) is None
    assert boundary_f_score(halves, np.full_like(halves, 255)) is None


def test_boundary_behind_a_thin_ignored_line_counts_and_a_wide_ignored_area_does_not() -> None:
    target = np.zeros((60, 80), dtype=np.int64)  # diagonal 100, so 0.03 is three pixels
    target[:, 40:] = 1
    prediction = target.copy()
    target[:, 37:43] = 255  # up to three pixels from a label on either side
    assert boundary_f_score(prediction, target, 0.03) == 1
    assert boundary_f_score(np.roll(prediction, 20, axis=1), target, 0.03) == 0
    target[:, 20:60] = 255
    assert boundary_f_score(prediction, target, 0.03) is None
    prediction[:, :10] = 1  # a boundary where everything is labelled
    assert boundary_f_score(prediction, target, 0.03) == 0

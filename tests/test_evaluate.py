"""Scoring: batched windows against a plain loop, records per image, what is left out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SUNET, tiny_config, tiny_manifest
from torch import Tensor, nn
from torch.nn import functional

from sunets.core.config import ConfigError
from sunets.core.config import VariantConfig as Variant
from sunets.core.metrics import boundary_f_score
from sunets.data.manifest import Manifest
from sunets.evaluation.evaluate import evaluate
from sunets.evaluation.multi_scale import multi_scale_probabilities, window_starts
from sunets.models.zoo import create_model

MULTI_SCALE = Variant(scales=(0.5, 0.75, 1.0, 1.25), flip=True, window=(24, 32))


def _network(seed: int = 0, **values: object) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(**tiny_config(**(SUNET | values)).model.arguments(), num_classes=3).eval()


@torch.no_grad()
def _plain_loop(model: nn.Module, image: Tensor, variant: Variant) -> Tensor:
    """The protocol as it is written down: one scale, one window, one mirror at a time, for one image (C, H, W)."""
    height, width = image.shape[1:]
    average = torch.zeros(3, height, width, dtype=torch.float64)
    for scale in variant.scales:
        size = (round(height * scale), round(width * scale))
        scaled = functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0] if scale != 1 else image
        tall, wide = variant.window or size
        padded = torch.zeros(3, max(tall, size[0]), max(wide, size[1]))
        padded[:, : size[0], : size[1]] = scaled
        total = torch.zeros(3, *padded.shape[1:], dtype=torch.float64)
        count = torch.zeros(padded.shape[1:])
        step = [round(side * (1 - variant.window_overlap)) for side in (tall, wide)]
        rows = math.ceil((padded.shape[1] - tall) / step[0]) + 1
        columns = math.ceil((padded.shape[2] - wide) / step[1]) + 1
        for row in range(rows):
            for column in range(columns):
                bottom = min(row * step[0] + tall, padded.shape[1])
                right = min(column * step[1] + wide, padded.shape[2])
                tile = padded[:, bottom - tall : bottom, right - wide : right]
                logits = model(tile[None])[0]
                if variant.flip:
                    logits = logits + model(tile.flip(2)[None])[0].flip(2)
                total[:, bottom - tall : bottom, right - wide : right] += logits.double().softmax(0)
                count[bottom - tall : bottom, right - wide : right] += 1
        assert count.min() == 1
        shares = (total / count)[:, : size[0], : size[1]]
        average += functional.interpolate(shares[None], (height, width), mode="bilinear")[0] / len(variant.scales)
    return average


@pytest.mark.parametrize(
    "variant",
    [
        MULTI_SCALE,
        Variant(scales=(1.0,), window=(24, 24), window_overlap=0.0),
        Variant(scales=(0.75, 1.5), flip=True),
        Variant(scales=(1.0,), window=(96, 96), flip=True),
    ],
    ids=["spec", "disjoint", "whole", "smaller than the window"],
)
@pytest.mark.parametrize(("batch_size", "shape"), [(1, (40, 56)), (7, (40, 56)), (64, (33, 71))])
def test_batched_windows_equal_a_plain_loop(variant: Variant, batch_size: int, shape: tuple[int, int]) -> None:
    model = _network()
    images = torch.randn(2, 3, *shape)
    found = multi_scale_probabilities(model, images, variant, batch_size)
    assert found.shape == (2, 3, *shape)
    for image, probabilities in zip(images, found, strict=True):
        torch.testing.assert_close(probabilities.double(), _plain_loop(model, image, variant), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(2, *shape))
    assert found.max() - found.min() > 0.1  # a constant would equal any loop


def test_windows_cover_and_end_flush() -> None:
    assert window_starts(100, 30, 1 / 3) == [0, 20, 40, 60, 70]
    assert window_starts(30, 30, 1 / 3) == [0]
    assert window_starts(20, 30, 1 / 3) == [0]
    assert window_starts(70, 30, 1 / 3) == [0, 20, 40]


def test_whole_image_at_one_scale_is_the_networks_softmax() -> None:
    model, images = _network(), torch.randn(3, 3, 37, 41)
    found = multi_scale_probabilities(model, images, Variant(), 2)
    with torch.no_grad():
        torch.testing.assert_close(found, model(images).softmax(1))


@pytest.mark.parametrize("variant", [Variant(), MULTI_SCALE], ids=["single", "multi"])
def test_confusion_matrices_are_those_of_each_image(manifest: Manifest, variant: Variant) -> None:
    config, model = tiny_config(**SUNET), _network()
    result = evaluate(model, manifest, config, split="val", variant=variant)
    items = manifest.splits["val"]
    assert result.image_ids == tuple(item.id for item in items)
    assert result.confusions.dtype == np.uint32
    assert list(result.predictions) == [item.id for item in items[:2]]
    boundaries = []
    for item, confusion in zip(items, result.confusions, strict=True):
        pixels = torch.tensor(np.array(Image.open(item.image))).permute(2, 0, 1) / 255
        image = (pixels - torch.tensor(manifest.mean).view(3, 1, 1)) / torch.tensor(manifest.std).view(3, 1, 1)
        labels = _plain_loop(model, image, variant).argmax(0).numpy()
        assert isinstance(item.target, Path)
        mask = np.array(Image.open(item.target))
        expected = np.zeros((3, 3), dtype=int)
        np.add.at(expected, (mask[mask != 255], labels[mask != 255]), 1)
        assert np.abs(confusion - expected).sum() <= 4  # a pixel on the brink may fall to either side
        boundaries.append(boundary_f_score(labels, mask, config.evaluate.boundary_tolerance))
        if item.id in result.predictions:
            assert (result.predictions[item.id] != labels).sum() <= 2
    mean = np.mean([value for value in boundaries if value is not None])
    assert result.scores["score.boundary_f"] == pytest.approx(mean, abs=0.02)
    total = result.confusions.sum(0)
    union = total.sum(0) + total.sum(1) - total.diagonal()
    assert result.scores["score.iou.red"] == pytest.approx(total[1, 1] / union[1])


def test_scores_do_not_depend_on_the_batch_size(manifest: Manifest) -> None:
    found = [
        evaluate(
            _network(),
            manifest,
            tiny_config(**SUNET, evaluate__batch_size=size),
            split="val",
            variant=MULTI_SCALE,
        ).confusions
        for size in (1, 5)
    ]
    assert np.abs(found[0].astype(int) - found[1].astype(int)).sum() <= 4


def test_an_absent_class_is_none_and_left_out(manifest: Manifest) -> None:
    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = images.new_zeros(len(images), 4, *images.shape[2:])
            logits[:, 0] = 1
            return logits

    more = dataclasses.replace(manifest, classes=(*manifest.classes, "nowhere"), palette=((0, 0, 0),) * 4)
    scores = evaluate(Sure(), more, tiny_config(), split="val", variant=Variant(), device=torch.device("cpu")).scores
    assert scores["score.iou.nowhere"] is None
    assert scores["score.iou.red"] == 0
    assert scores["score.miou"] == pytest.approx(scores["score.iou.ground"] / 3)  # type: ignore[operator]
    assert scores["score.boundary_f"] == 0


def test_classification_errors(tmp_path: Path) -> None:
    pictures = tiny_manifest(tmp_path, task="classification")  # val: red, green, red, green, red

    class Green(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0, 2.0]).expand(len(images), 3)

    config = tiny_config(data__name="synthetic_shapes")
    for variant in (Variant(), Variant(scales=(1.0, 1.5), flip=True)):
        result = evaluate(Green(), pictures, config, split="val", variant=variant)
        assert result.scores == {"score.top1_error_percent": 60, "score.top5_error_percent": 0}
        assert result.confusions.tolist() == [[[0, 0, 0], [0, 0, 3], [0, 0, 2]]]
    with pytest.raises(ConfigError, match="a window is for segmentation"):
        evaluate(Green(), pictures, config, split="val", variant=MULTI_SCALE)


def test_splits_that_cannot_be_scored(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"split 'more': .* it has train, val, test"):
        evaluate(_network(), manifest, tiny_config(), split="more", variant=Variant())
    items = tuple(dataclasses.replace(item, target=None) for item in manifest.splits["test"])
    blind = dataclasses.replace(manifest, splits={"test": items})
    with pytest.raises(ConfigError, match=r"split 'test': it has no labels"):
        evaluate(_network(), blind, tiny_config(), split="test", variant=Variant())

"""Multi-scale testing against the window-by-window loop of benchmarks/test_time.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import SUNET, tiny_config
from torch import Tensor, nn

from sunets.core.config import VariantConfig as Variant
from sunets.evaluation.multi_scale import multi_scale_probabilities
from sunets.models.zoo import create_model

SCALES = (0.5, 0.75, 1.0, 1.25)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "test_time.py"  # a script beside the packages, not in one
    spec = importlib.util.spec_from_file_location("benchmark_test_time", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model(**tiny_config(**SUNET).model.arguments(), num_classes=4).eval()


def _loop(script: ModuleType, network: nn.Module, images: Tensor, variant: Variant) -> Tensor:
    assert variant.window is not None
    return torch.stack(
        [script.window_by_window(network, image, variant.window, variant.scales, variant.flip) for image in images]
    )


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("flip", [False, True], ids=["as it is", "flip"])
@pytest.mark.parametrize("scales", [(1.0,), SCALES], ids=["one scale", "four scales"])
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((40, 56), (24, 32)),
        ((37, 61), (33, 19)),
        ((40, 56), (40, 56)),
        ((61, 37), (31, 200)),
        ((33, 56), (96, 96)),
    ],
    ids=["smaller", "odd", "as the image", "low and wide", "larger"],
)
def test_batches_equal_the_loop(
    script: ModuleType,
    network: nn.Module,
    shape: tuple[int, int],
    window: tuple[int, int],
    scales: tuple[float, ...],
    flip: bool,
    batch_size: int,
) -> None:
    images = torch.randn(3, 3, *shape, generator=torch.Generator().manual_seed(0))
    variant = Variant(scales=scales, flip=flip, window=window)
    found = multi_scale_probabilities(network, images, variant, batch_size)
    assert found.shape == (3, 4, *shape)
    torch.testing.assert_close(found, _loop(script, network, images, variant), rtol=0, atol=1e-5)


def test_the_equality_would_notice_a_fault(script: ModuleType, network: nn.Module) -> None:
    images = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    right = Variant(scales=SCALES, flip=True, window=(24, 32))
    expected = _loop(script, network, images, right)
    torch.testing.assert_close(expected.sum(1), torch.ones(2, 40, 56))
    for fault in (
        Variant(scales=SCALES, flip=False, window=(24, 32)),
        Variant(scales=SCALES[:3], flip=True, window=(24, 32)),
        Variant(scales=SCALES, flip=True, window=(24, 31)),
        Variant(scales=SCALES, flip=True, window=(24, 32), window_overlap=0.5),
    ):
        found = multi_scale_probabilities(network, images, fault, 5)
        assert (found - expected).abs().max() > 1e-3
    assert (multi_scale_probabilities(network, images, right, 5) - expected).abs().max() < 1e-5
    assert (multi_scale_probabilities(network, images.flip(0), right, 5) - expected).abs().max() > 1e-3


def test_one_window_at_one_scale_is_the_networks_softmax(script: ModuleType, network: nn.Module) -> None:
    image = torch.randn(3, 37, 61)
    with torch.inference_mode():
        expected = network(image[None])[0].softmax(0)
    found = script.window_by_window(network, image, (37, 61), scales=(1.0,), flip=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_scales_may_refer_to_the_shorter_side(network: nn.Module) -> None:
    """As in the authors' test scripts, whatever the size of the image."""
    images = torch.rand(1, 3, 24, 36)
    relative = Variant(scales=(2.0, 3.0))
    absolute = Variant(scales=(1.0, 1.5), short_side=48)
    assert absolute.factors(24, 36) == list(relative.scales)
    found, expected = (multi_scale_probabilities(network, images, variant, 4) for variant in (absolute, relative))
    assert torch.equal(found, expected)

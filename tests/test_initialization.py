"""Starts at zero: what is set to zero, what is left alone, and that training moves all of it."""

import copy
import dataclasses
import re

import pytest
import torch
from test_zoo import MILLIONS
from tiny import SUNET, tiny_config, tiny_manifest
from torch import nn
from torch.nn import functional

from sunets.core.config import ConfigError, ModelConfig, override
from sunets.models import initialization
from sunets.models.initialization import build_network, has_residual_branches, match_normalisation_, zero_init_
from sunets.models.sunet import UNet
from sunets.models.weights import load_trained
from sunets.models.zoo import create_model
from sunets.training.fit import check, fit

SEGMENTATION = "segmentation"
NO_BRANCH = {"plain_conv_small", "unet_small", "densenet161", "densenet201"}
SUNET_TINY = ModelConfig(name="sunet_tiny", output_stride=8)
RESNET = ModelConfig(name="dilated_resnet_small")
SMALLEST = {key.replace(".", "__"): value for key, value in SUNET.items()}


def built(config, task=SEGMENTATION, *, residual=False, head=False):
    torch.manual_seed(0)
    model = create_model(**config.arguments(), task=task, num_classes=5)
    zero_init_(model, residual=residual, head=head)
    return model


def changed(config, task=SEGMENTATION, **starts):
    """Names of the parameters that the start changed; whatever changed is zero."""
    before, after = built(config, task).state_dict(), built(config, task, **starts).state_dict()
    names = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(after[name].any() for name in names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), MILLIONS)
def test_which_networks_have_residual_branches(name, task):
    assert has_residual_branches(ModelConfig(name=name), task) == (name not in NO_BRANCH)


def test_published_weights_are_not_undone():
    model = ModelConfig(name="resnet18", weights="IMAGENET1K_V1")
    assert not has_residual_branches(model, "classification")


def test_each_u_net_starts_as_its_shortcut():
    model = built(SUNET_TINY, residual=True)
    blocks = [module for module in model.modules() if isinstance(module, UNet)]
    for block in blocks:
        x = torch.randn(2, block.norm.num_features, 12, 10)
        shortcut = x if block.shortcut is None else block.shortcut(functional.relu(block.norm(x)))
        assert torch.equal(block(x), shortcut)
    assert len(blocks) == sum(model.config.num_blocks)
    assert sum(block.shortcut is None for block in blocks) == len(blocks) - 3
    assert changed(SUNET_TINY, residual=True) == {
        f"stages.{stage}.{block}.expand.conv.weight"  # biases start at zero anyway
        for stage, blocks in enumerate(model.stages)
        for block in range(len(blocks))
    }


def test_each_basic_block_starts_as_its_shortcut():
    blocks = [block for stage in built(RESNET, residual=True).backbone[3:] for block in stage]
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 12, 10)
        shortcut = x if block.downsample is None else block.downsample(x)
        assert torch.equal(block(x), functional.relu(shortcut))
    assert len(blocks) == 7
    assert len(changed(RESNET, residual=True)) == 7


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("resnet18", 8),
        ("unet_resnet34", 16),
        ("lraspp_mobilenet_v3_large", 10),
        ("segformer_b0", 16),
        pytest.param("deeplabv3_resnet50", 16, marks=pytest.mark.slow),
    ],
)
def test_branches_of_library_networks(name, branches):
    task = "classification" if name == "resnet18" else SEGMENTATION
    assert len(changed(ModelConfig(name=name), task, residual=True)) == branches


@pytest.mark.parametrize(
    ("name", "task"),
    [pytest.param(*key, marks=[pytest.mark.slow] if size > 5 else []) for key, size in MILLIONS.items()],
)
def test_logits_start_equal(name, task):
    model = built(ModelConfig(name=name), task, head=True)
    assert not model(torch.randn(2, 3, 32, 32)).any()
    layers = {parameter.rpartition(".")[0] for parameter in changed(ModelConfig(name=name), task, head=True)}
    assert len(layers) == (2 if name == "lraspp_mobilenet_v3_large" else 1)


def test_the_last_layer_alone_of_a_deep_head():
    assert changed(ModelConfig(name="sunet_tiny", head="degridding"), head=True) == {"head.6.weight"}


@pytest.mark.parametrize("model", [SUNET_TINY, RESNET], ids=lambda m: m.name)
def test_gradients_reach_everything_after_two_steps(model):
    network = built(model, residual=True, head=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    images, target = torch.randn(4, 3, 48, 48), torch.randint(5, (4, 48, 48))
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(network(images), target).backward()
        optimizer.step()
    # A bias in front of a BatchNorm has no gradient but rounding, which is not zero either.
    assert not [name for name, parameter in network.named_parameters() if not parameter.grad.any()]


@pytest.mark.parametrize("name", ["plain_conv_small", "unet_small"])
def test_a_network_without_branches_is_an_error(name, tmp_path):
    manifest = tiny_manifest(tmp_path)
    config = tiny_config(train__zero_init_residual=True, model__name=name)
    message = re.escape(f"train.zero_init_residual: false for {name}, which has no residual branch")
    with pytest.raises(ConfigError, match=message):
        check(config, manifest)
    with pytest.raises(ConfigError, match=message):
        fit(config, manifest, work_dir=tmp_path / "work")
    with pytest.raises(ValueError, match="without residual branches"):
        built(ModelConfig(name=name), residual=True)


def test_branches_frozen_at_zero_are_an_error():
    with pytest.raises(ConfigError, match="zero_init_residual: false with frozen_bn"):
        tiny_config(train__zero_init_residual=True, train__frozen_bn=True)


def test_a_training_starts_so(tmp_path):
    manifest = tiny_manifest(tmp_path)
    plain, _ = build_network(tiny_config(**SMALLEST), manifest)
    zero, _ = build_network(
        tiny_config(**SMALLEST, train__zero_init_residual=True, train__zero_init_head=True), manifest
    )
    changed = {name for name, value in plain.state_dict().items() if not torch.equal(value, zero.state_dict()[name])}
    assert changed == {"head.weight", *(f"stages.{stage}.0.expand.conv.weight" for stage in range(3))}


def test_loaded_weights_win(tmp_path):
    manifest = tiny_manifest(tmp_path)
    path = fit(tiny_config(**SMALLEST, train__epochs=1), manifest, work_dir=tmp_path / "work").weights_path
    starts = {"train__zero_init_residual": True, "train__zero_init_head": True, "train__init_from": str(path)}
    model, _ = build_network(tiny_config(**SMALLEST, **starts), manifest)
    trained, _ = load_trained(path)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())
    assert isinstance(model.head, nn.Conv2d)
    assert model.head.weight.any()


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = (0.3, 0.5, 0.7), (0.31, 0.27, 0.2)
DILATED = {"model__name": "dilated_resnet18", "model__width": None, "model__output_stride": 32}


def normalised(pixels, mean, std):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def draw_statistics_(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("dilated_resnet18", SEGMENTATION),
        ("resnet18", "classification"),
        ("lraspp_mobilenet_v3_large", SEGMENTATION),
        ("unet_resnet34", SEGMENTATION),
        ("segformer_b0", SEGMENTATION),  # its first convolution has a bias
        pytest.param("densenet201", "classification", marks=pytest.mark.slow),
        pytest.param("deeplabv3_resnet50", SEGMENTATION, marks=pytest.mark.slow),
        pytest.param("deeplabv3plus_resnet50", SEGMENTATION, marks=pytest.mark.slow),
    ],
)
def test_published_weights_find_the_features_of_images_normalised_otherwise(name, task):
    torch.manual_seed(0)
    model = create_model(name, task=task, num_classes=3).eval()
    draw_statistics_(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    features = []
    layers[layers[0].bias is None].register_forward_hook(lambda _, __, output: features.append(output.clone()))
    pixels = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        model(normalised(pixels, *IMAGENET))
        match_normalisation_(model, *OURS)
        model(normalised(pixels, *OURS))
    published, ours = (output[..., 4:-4, 4:-4] for output in features)  # without what zero padding reaches
    torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-5)


def test_published_weights_are_matched_to_the_data_once(tmp_path, monkeypatch):
    """Where a training starts from them; not where a trained network is loaded, or pre-training replaces them."""
    manifest = dataclasses.replace(tiny_manifest(tmp_path), mean=OURS[0], std=OURS[1])
    torch.manual_seed(0)
    published = create_model("dilated_resnet18", num_classes=manifest.num_classes, output_stride=32).eval()
    draw_statistics_(published)
    monkeypatch.setattr(initialization, "create_model", lambda *_, **__: copy.deepcopy(published))  # no download
    config = tiny_config(**DILATED, model__weights="IMAGENET1K_V1")
    model, _ = build_network(config, manifest)
    pixels = torch.rand(1, 3, 64, 64)
    for network in (model.eval(), published):
        network.backbone[0].padding = (0, 0)  # at the border, padding has another colour
    with torch.inference_mode():
        expected = published(normalised(pixels, *IMAGENET))
        torch.testing.assert_close(model(normalised(pixels, *OURS)), expected, rtol=1e-4, atol=1e-4)  # of 20 layers

    path = fit(override(config, {"train.epochs": 1}), manifest, work_dir=tmp_path / "work").weights_path
    trained, _ = load_trained(path)
    again, _ = build_network(override(config, {"train.init_from": str(path)}), manifest)
    assert torch.equal(
        trained.backbone[0].weight, torch.load(path, weights_only=True)["state_dict"]["backbone.0.weight"]
    )
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items())
    plain, _ = build_network(tiny_config(**DILATED), manifest)
    assert torch.equal(plain.backbone[0].weight, published.backbone[0].weight)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4)],
        [nn.Conv2d(3, 4, 3, bias=False)],
        [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False)],
        [nn.Conv2d(12, 4, 3), nn.BatchNorm2d(4)],
        [nn.Linear(3, 4)],
    ],
)
def test_published_weights_of_another_structure_are_refused(layers):
    with pytest.raises(ValueError, match=r"^weights: .* a bias or a BatchNorm after it"):
        match_normalisation_(nn.Sequential(*layers), *OURS)

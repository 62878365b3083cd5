"""Every network of the zoo behaves alike: one interface, any size, logits alone, nothing downloaded."""

import copy
import re
import socket
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sunets
from sunets import create_model, list_models
from sunets.core.config import ModelConfig, ModelEntry
from sunets.models.sunet import SUNet
from sunets.models.zoo import head_parameters, resolve

SMALL = ("unet_small", "dilated_resnet_small", "plain_conv_small")
# Parameters with 21 classes, or 1000 for classification. Where a library or a paper states a number, it is that one.
MILLIONS = {
    ("sunet64", "segmentation"): 5.906773,
    ("sunet64", "classification"): 6.910248,
    ("sunet128", "segmentation"): 22.698389,
    ("sunet128", "classification"): 24.704360,
    ("sunet7128", "segmentation"): 36.857237,
    ("sunet7128", "classification"): 39.113832,
    ("sunet_tiny", "segmentation"): 0.219429,
    ("sunet_tiny", "classification"): 0.408376,
    ("dilated_resnet18", "segmentation"): 11.176512 + 2.359296 + 0.001024 + 0.010773,
    ("dilated_resnet50", "segmentation"): 23.508032 + 9.437184 + 0.001024 + 0.010773,
    ("dilated_resnet101", "segmentation"): 42.500160 + 9.437184 + 0.001024 + 0.010773,
    ("fcn_resnet50", "segmentation"): 35.322218 - 2.365205,  # torchvision's figure holds the auxiliary head
    ("deeplabv3_resnet50", "segmentation"): 42.004074 - 2.365205,
    ("deeplabv3_resnet101", "segmentation"): 60.996202 - 2.365205,
    ("lraspp_mobilenet_v3_large", "segmentation"): 3.221538,
    ("unet_resnet34", "segmentation"): 24.439269,
    ("deeplabv3plus_resnet50", "segmentation"): 26.682725,
    ("segformer_b0", "segmentation"): 3.719541,
    ("segformer_b2", "segmentation"): 24.727509,
    ("resnet18", "classification"): 11.689512,
    ("resnet50", "classification"): 25.557032,
    ("resnet101", "classification"): 44.549160,
    ("densenet161", "classification"): 28.681000,
    ("densenet201", "classification"): 20.013928,
    ("unet_small", "segmentation"): 0.247212,
    ("dilated_resnet_small", "segmentation"): 0.194821,
    ("plain_conv_small", "segmentation"): 0.205101,
}


def count(model):
    return sum(p.numel() for p in model.parameters())


def meta_model(name, task="segmentation", num_classes=5, **options):
    with torch.device("meta"):
        return create_model(name, task=task, num_classes=num_classes, **options)


def test_the_table_above_is_the_zoo():
    assert {(name, task) for task in ("segmentation", "classification") for name in list_models(task)} == set(MILLIONS)
    assert list_models() == list(dict.fromkeys(name for name, _ in MILLIONS))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a network without weights reached for the internet")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.mark.parametrize(
    ("name", "task"),
    [pytest.param(*key, marks=[pytest.mark.slow] if size > 15 else []) for key, size in MILLIONS.items()],
)
def test_conformance(name, task, offline):
    torch.manual_seed(0)
    model = create_model(name, task=task, num_classes=5)
    assert (model.task, model.num_classes) == (task, 5)

    def expected(batch, *size):
        return (batch, 5, *size) if task == "segmentation" else (batch, 5)

    output = model(torch.randn(2, 3, 65, 49))
    assert output.shape == expected(2, 65, 49)
    target = torch.zeros(output.shape[:1] + output.shape[2:], dtype=torch.long)
    F.cross_entropy(output, target).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name

    heads = head_parameters(model)
    names = {n for n, _ in model.named_parameters()}
    assert heads
    assert heads < names

    model.eval()
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        output = model(x)
        assert output.shape == expected(2, 64, 48)
        assert output.isfinite().all()
        assert torch.equal(model(x), output)
        exact, wide = copy.deepcopy(model).double(), x.double()  # rounding depends on the batch
        torch.testing.assert_close(exact(wide[:1]), exact(wide)[:1], rtol=1e-6, atol=1e-8)
        assert model(torch.randn(1, 3, 16, 16)).shape == expected(1, 16, 16)

        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), output)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not torch.equal(twin(x), output)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), output)

    with pytest.raises(ValueError, match="at least 16 pixels"):
        model(torch.randn(1, 3, 12, 64))
    with pytest.raises(ValueError, match="in_channels is 3"):
        model(torch.randn(1, 4, 64, 64))


def coarsest(model, height, width):
    """Size of the smallest feature map outside of SUNets' U-Nets and of global pooling."""
    sizes = set()
    if isinstance(model, SUNet):
        return tuple(model.forward_features(torch.empty(1, 3, height, width, device="meta")).shape[2:])
    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.BatchNorm2d):
            part.register_forward_hook(lambda _, __, output: sizes.add(tuple(output.shape[2:])))
    model(torch.empty(1, 3, height, width, device="meta"))
    return min(sizes - {(1, 1)})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), MILLIONS)
def test_parameter_count_and_output_stride(name, task):
    model = meta_model(name, task, 21 if task == "segmentation" else 1000).eval()
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert count(model) == round(MILLIONS[name, task] * 1e6)
    assert coarsest(model, 256, 384) == (256 // model.output_stride, 384 // model.output_stride)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "strides"),
    [
        ("sunet64", "segmentation", (4, 8, 16, 32)),
        ("dilated_resnet18", "segmentation", (8, 16, 32)),
        ("dilated_resnet50", "segmentation", (8, 16, 32)),
        ("dilated_resnet_small", "segmentation", (4, 8, 16)),
        ("deeplabv3plus_resnet50", "segmentation", (8, 16)),
        ("resnet50", "classification", (8, 16, 32)),
        ("fcn_resnet50", "segmentation", (8,)),
        ("lraspp_mobilenet_v3_large", "segmentation", (16,)),
        ("segformer_b0", "segmentation", (32,)),
        ("unet_small", "segmentation", (16,)),
        ("plain_conv_small", "segmentation", (4,)),
        ("resnet18", "classification", (32,)),
        ("densenet161", "classification", (32,)),
    ],
)
def test_output_strides_on_offer(name, task, strides):
    counts = set()
    for stride in strides:
        model = meta_model(name, task, output_stride=stride).eval()
        assert model.output_stride == stride
        assert coarsest(model, 256, 256) == (256 // stride, 256 // stride)
        counts.add(count(model))
    assert len(counts) == 1
    with pytest.raises(ValueError, match=f"^output_stride: one of {', '.join(map(str, strides))} "):
        meta_model(name, task, output_stride=64)


def test_sunet_tiny_and_its_peers():
    tiny = count(meta_model("sunet_tiny", num_classes=8))
    assert tiny < 350_000
    for name in SMALL:
        assert 0.8 * tiny < count(meta_model(name, num_classes=8)) < 1.2 * tiny, name


def test_the_plain_stack_sees_a_neighbourhood_only_and_sunet_tiny_the_image():
    def reach(name):
        torch.manual_seed(0)
        model = create_model(name, num_classes=2).eval()
        x = torch.randn(1, 3, 96, 96, requires_grad=True)
        model(x)[0, :, 48, 48].sum().backward()
        rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero()
        return int(rows.max() - rows.min()) + 1

    assert 25 <= reach("plain_conv_small") <= 31 + 4  # the upsampling reads two neighbouring features
    assert reach("sunet_tiny") == 96


def test_dilated_resnets_have_the_rates_of_the_release():
    def rates(model, stage):
        return [m.dilation[0] for m in model.backbone[stage].modules() if getattr(m, "kernel_size", 0) == (3, 3)]

    basic = meta_model("dilated_resnet18", output_stride=8)
    assert [rates(basic, stage) for stage in (-3, -2, -1)] == [[1] * 4, [1, 2, 2, 2], [2, 4, 4, 4]]
    bottleneck = meta_model("dilated_resnet50")
    assert [rates(bottleneck, stage) for stage in (-2, -1)] == [[1] * 6, [1, 2, 2]]
    assert {m.momentum for m in bottleneck.modules() if isinstance(m, nn.BatchNorm2d)} == {0.05}
    assert [type(m).__name__ for m in basic.head] == ["Conv2d", "BatchNorm2d", "ReLU", "Dropout", "Conv2d"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dilated_resnet18", "dilated_resnet50", "dilated_resnet_small"])
@pytest.mark.parametrize("stride", [16, 8])
def test_dilation_computes_the_features_of_the_strides_on_a_finer_grid(name, stride):
    """Or published weights would not compute what they were trained for."""
    natural = 16 if name == "dilated_resnet_small" else 32
    if stride == natural:
        return
    torch.manual_seed(0)
    coarse = create_model(name, num_classes=2, output_stride=natural).double().eval()
    fine = create_model(name, num_classes=2, output_stride=stride).double().eval()
    fine.load_state_dict(coarse.state_dict())
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.inference_mode():
        every = natural // stride
        torch.testing.assert_close(fine.backbone(x)[..., ::every, ::every], coarse.backbone(x))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), MILLIONS)
def test_in_channels(name, task):
    model = meta_model(name, task, in_channels=4).eval()
    assert model(torch.empty(1, 4, 64, 64, device="meta")).shape[:2] == (1, 5)
    with pytest.raises(ValueError, match=r"^in_channels: an integer of at least 1"):
        meta_model(name, task, in_channels=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet_small", {"width": 4, "unet_depth": 2}),
        ("dilated_resnet_small", {"width": 8, "num_blocks": 1}),
        ("dilated_resnet_small", {"width": 8, "num_blocks": (1, 2, 1)}),
        ("plain_conv_small", {"width": 8, "num_blocks": 1}),
    ],
)
def test_small_baselines_can_be_changed(name, options):
    model = create_model(name, num_classes=3, **options)
    assert model(torch.randn(2, 3, 17, 30)).shape == (2, 3, 17, 30)
    assert count(model) < count(meta_model(name, num_classes=3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sunet", {}, "^name: one of sunet64, "),
        ("sunet64", {"task": "detection"}, "^task: segmentation or classification for sunet64"),
        ("resnet18", {}, "^task: classification for resnet18"),
        ("unet_small", {"task": "classification"}, "^task: segmentation for unet_small"),
        ("sunet_tiny", {"num_classes": 0}, "^num_classes: an integer of at least 1"),
        ("unet_small", {"num_classes": 2.0}, "^num_classes: an integer of at least 1"),
        ("unet_small", {"dilation": "none"}, "^dilation: no option of unet_small; .*in_channels, width, unet_depth"),
        ("fcn_resnet50", {"width": 8}, "^width: no option of fcn_resnet50; there are output_stride, in_channels$"),
        ("sunet_tiny", {"blocks": 8}, "^blocks: no option of sunet_tiny; .*num_blocks"),
        ("fcn_resnet50", {"head": "linear"}, "^head: chosen for SUNets only"),
        ("unet_small", {"width": 0}, "^width: an integer of at least 1"),
        ("unet_small", {"unet_depth": 6}, "^unet_depth: an integer from 1 to 5"),
        ("dilated_resnet_small", {"num_blocks": (1, 1)}, "^num_blocks: an integer, or three"),
        ("dilated_resnet_small", {"num_blocks": 0}, "^num_blocks: an integer of at least 1"),
        ("dilated_resnet_small", {"num_blocks": 2.0}, "^num_blocks: an integer of at least 1"),
        ("plain_conv_small", {"num_blocks": "2"}, "^num_blocks: an integer of at least 1"),
        ("sunet64", {"weights": "IMAGENET1K_V1"}, "^weights: none are published for sunet64.*load_reference_weights"),
        ("unet_small", {"weights": "imagenet"}, "^weights: none are published for unet_small"),
        ("dilated_resnet18", {"weights": "imagenet"}, "^weights: one of IMAGENET1K_V1, DEFAULT for resnet18"),
        ("fcn_resnet50", {"weights": "x"}, "^weights: one of COCO_WITH_VOC_LABELS_V1, .*IMAGENET1K_V2"),
        ("unet_resnet34", {"weights": "x"}, "^weights: one of imagenet for unet_resnet34"),
        ("resnet50", {"weights": "x", "task": "classification"}, "^weights: one of IMAGENET1K_V1, IMAGENET1K_V2"),
    ],
)
def test_what_cannot_be_built_is_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **({"num_classes": 2} | options))


def test_unknown_task_of_the_list():
    with pytest.raises(ValueError, match=r"^task: one of segmentation, classification"):
        list_models("detection")


@pytest.fixture
def published(monkeypatch):
    """Stands in for the download: whatever is asked for is made up, and noted."""
    asked = []

    def fetch(entry, *_, **__):
        asked.append(str(entry))
        name, label = str(entry).split(".")
        builder = name.removesuffix("_Weights").lower()
        options = {"weights": None, "num_classes": len(entry.meta["categories"])}
        if label.startswith("COCO"):
            options |= {"weights_backbone": None} | ({} if "lraspp" in builder else {"aux_loss": True})
        import torchvision

        return {k: v.fill_(0.5) for k, v in torchvision.models.get_model(builder, **options).state_dict().items()}

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", fetch)
    return asked


@pytest.mark.parametrize(
    ("name", "task", "weights", "entry", "loaded"),
    [
        ("resnet18", "classification", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "net.conv1.weight"),
        ("dilated_resnet18", "segmentation", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "backbone.0.weight"),
        (
            "lraspp_mobilenet_v3_large",
            "segmentation",
            "COCO_WITH_VOC_LABELS_V1",
            "LRASPP_MobileNet_V3_Large_Weights.COCO_WITH_VOC_LABELS_V1",
            "net.classifier.cbr.0.weight",
        ),
        (
            "lraspp_mobilenet_v3_large",
            "segmentation",
            "IMAGENET1K_V2",
            "MobileNet_V3_Large_Weights.IMAGENET1K_V2",
            "net.backbone.0.0.weight",
        ),
    ],
)
def test_weights_pass_a_published_name_through(name, task, weights, entry, loaded, published):
    model = create_model(name, task=task, num_classes=4, weights=weights).eval()
    assert published == [entry]
    state = model.state_dict()
    assert (state[loaded] == 0.5).all()
    assert [tuple(state[key].shape)[:1] for key in state if key in head_parameters(model)][-1] == (4,)
    assert model(torch.randn(1, 3, 32, 32)).shape[1] == 4
    with pytest.raises(ValueError, match=r"^in_channels: 3 with published weights"):
        create_model(name, task=task, num_classes=4, weights=weights, in_channels=1)


def test_published_output_layer_is_kept_where_the_classes_agree(published):
    model = create_model("resnet18", task="classification", num_classes=1000, weights="DEFAULT")
    assert (model.net.fc.weight == 0.5).all()


def test_smp_encoder_weights_pass_through(monkeypatch):
    import segmentation_models_pytorch as smp

    asked = {}

    def build(encoder, **options):
        asked.update(options, encoder=encoder)
        return nn.Conv2d(3, 4, 1)

    monkeypatch.setattr(smp, "Unet", build)
    create_model("unet_resnet34", num_classes=4, weights="imagenet")
    assert asked == {"encoder": "resnet34", "encoder_weights": "imagenet", "in_channels": 3, "classes": 4}


def test_configuration_reaches_the_network():
    config = ModelConfig(name="sunet_tiny", width=8, num_blocks=2, dilation=[0, 0, [2]], unet_depth=[1, 2, 1])
    model = create_model(**config.arguments(), num_classes=3)
    assert model.config.num_blocks == (2, 2, 2)
    assert model.config.dilation == (0, 0, (2,))
    assert sunets.create_model is create_model


def _no_network(*_, **__):
    raise URLError(ConnectionRefusedError(111, "Connection refused"))


@pytest.mark.parametrize(
    ("name", "task", "weights", "file"),
    [
        ("dilated_resnet18", "segmentation", "IMAGENET1K_V1", "resnet18-f37072fd.pth"),
        ("fcn_resnet50", "segmentation", "IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
        ("fcn_resnet50", "segmentation", "COCO_WITH_VOC_LABELS_V1", "fcn_resnet50_coco-1167a1af.pth"),
        ("densenet161", "classification", "IMAGENET1K_V1", "densenet161-8d451a50.pth"),
    ],
)
def test_published_weights_without_a_network(name, task, weights, file, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", _no_network)
    place = re.escape(str(tmp_path / "hub" / "checkpoints" / file))
    words = (
        rf"^weights: {weights} of \S+: they cannot be downloaded .*fetch \S+/{file} .* at {place}, or set TORCH_HOME"
    )
    with pytest.raises(ValueError, match=words):
        create_model(name, task=task, num_classes=3, weights=weights)
    (tmp_path / "hub" / "checkpoints" / file).write_bytes(b"half a file")
    with pytest.raises(ValueError, match=rf"^weights: {weights} of \S+: {place} cannot be read"):
        create_model(name, task=task, num_classes=3, weights=weights)


def test_published_weights_of_smp_without_a_network(monkeypatch):
    import segmentation_models_pytorch as smp

    def absent(*_, **__):
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", absent)
    words = (
        r"^weights: imagenet of resnet34 cannot be downloaded .*; fetch smp-hub/resnet34.imagenet, revision .*HF_HOME"
    )
    with pytest.raises(ValueError, match=words):
        create_model("unet_resnet34", num_classes=3, weights="imagenet")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), list(MILLIONS))
def test_every_parameter_of_a_network_is_told(name, task):
    """What was built says the same: a network of the values that were told has the same parameters."""
    model = resolve(ModelConfig(name=name), task)
    assert model.output_stride is not None
    assert model.in_channels == 3
    options = {"num_classes": 2, "task": task}
    with torch.device("meta"):
        plain, again = create_model(name, **options), create_model(**model.arguments(), **options)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
    assert plain.output_stride == again.output_stride == model.output_stride
    assert resolve(model, task) == model


def test_what_a_named_network_decides_is_told():
    tiny = resolve(ModelConfig(name="sunet_tiny", stage_channels=(8, 8), output_stride=4), "segmentation")
    assert (tiny.unet_depth, tiny.num_blocks, tiny.width, tiny.head) == ((2, 2), (2, 4), 16, "linear")
    assert resolve(ModelConfig(name="sunet64"), "classification").head == "classifier"
    assert resolve(ModelConfig(name="dilated_resnet_small", num_blocks=1), "segmentation").num_blocks == (1, 1, 1)
    unet = resolve(ModelConfig(name="unet_small"), "segmentation")
    assert (unet.width, unet.unet_depth, unet.output_stride, unet.dilation) == (7, 4, 16, None)
    entry = ModelEntry(name="resnet18", label="ResNet", train={"lr": 0.1}, weights="IMAGENET1K_V1")
    assert resolve(entry, "classification") == entry.model_copy(update={"output_stride": 32, "in_channels": 3})

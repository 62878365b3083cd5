"""SUNets: equal to the authors' network to the last digits, at any size, depth, dilation and block count."""

import copy
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sunets import create_model
from sunets.core.config import IGNORE_INDEX
from sunets.models.reference import load_reference_weights, reference_keys
from sunets.models.structure import SUNetConfig, dilation_schedule
from sunets.models.sunet import set_bn_momentum

GOLDEN = json.loads((Path(__file__).parent / "assets" / "golden.json").read_text())
MINIMAL = {"stage_channels": (64,), "num_blocks": 1, "unet_depth": 1}
SMALL = {"width": 8, "stage_channels": (16, 24), "num_blocks": 1, "unet_depth": (2, 1)}
SIZES = [(64, 80), (16, 16), (17, 33), (65, 49), (97, 128), (130, 21)]


def tiny(**options):
    torch.manual_seed(0)
    return create_model("sunet_tiny", num_classes=5, **options)


def image(*size, batch=2, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


# Golden values
def uniform(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers in [-1, 1) from the name: a splitmix64 of 1..n, offset by the name's CRC."""
    mix = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mix += np.uint64(zlib.crc32(name.encode()))
    mix = (mix ^ (mix >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mix = (mix ^ (mix >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mix ^= mix >> np.uint64(31)
    return torch.from_numpy((mix >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1).reshape(shape)


def golden_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that the golden file's formula gives to one of the authors' keys."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    u = uniform(key, shape)
    if key.endswith("running_var"):
        return 1 + 0.5 * u
    if key.endswith(("running_mean", "bias")):
        return 0.1 * u
    return 1 + 0.2 * u if len(shape) == 1 else u * math.sqrt(6 / math.prod(shape[1:]))


def assert_golden(tensor: torch.Tensor, expected: dict) -> None:
    flat = tensor.detach().flatten()
    assert list(tensor.shape) == expected["shape"]
    np.testing.assert_allclose(flat[expected["index"]].numpy(), expected["value"], rtol=1e-6)
    np.testing.assert_allclose(flat.mean().item(), expected["mean"], rtol=1e-6)
    np.testing.assert_allclose(flat.std(correction=0).item(), expected["std"], rtol=1e-6)


def golden_id(case: dict) -> str:
    return f"{case['variant']}-{case['task']}-{case['output_stride']}-{case.get('mode', 'eval')}"


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN, ids=golden_id)
def test_golden(case):
    batch, channels, height, width = case["input"]
    head = {"classification": None, "segmentation": "degridding" if case.get("degridding") else "linear"}[case["task"]]
    model = create_model(
        case["variant"],
        task=case["task"],
        num_classes=case["num_classes"],
        output_stride=case["output_stride"],
        head=head,
    ).double()
    theirs = reference_keys(model)
    shapes = {theirs[name]: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    load_reference_weights(model, {key: golden_weight(key, shape) for key, shape in shapes.items()})
    x = uniform("image", (batch, channels, height, width))
    if case.get("mode") != "train":
        model.eval()
        with torch.inference_mode():
            if "features" in case:
                assert_golden(model.forward_features(x), case["features"])
            assert_golden(model(x), case["output"])
        return

    for part in (model.stem, model.stages, model.norm):
        set_bn_momentum(part, 0.01)
    labels = torch.arange(batch * height * width).reshape(batch, height, width) // 7 % (case["num_classes"] + 1)
    labels[labels == case["num_classes"]] = IGNORE_INDEX
    loss = F.cross_entropy(model(x), labels, ignore_index=IGNORE_INDEX)
    loss.backward()
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    parameters = {theirs[name]: p for name, p in model.named_parameters()}
    for key, norm in case["grad_norm"].items():
        np.testing.assert_allclose(parameters[key].grad.norm().item(), norm, rtol=1e-6, atol=1e-12)
    buffers = {theirs[name]: b for name, b in model.named_buffers()}
    for key, expected in case["running"].items():
        assert_golden(buffers[key], expected)


@pytest.mark.parametrize(
    ("name", "classifier", "segmentation"),
    [
        ("sunet64", 6_910_248, 5_906_773),
        ("sunet128", 24_704_360, 22_698_389),
        ("sunet7128", 39_113_832, 36_857_237),
    ],
)
def test_parameter_counts_of_the_authors_networks(name, classifier, segmentation):
    with torch.device("meta"):
        models = (create_model(name, task="classification", num_classes=1000), create_model(name, num_classes=21))
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [classifier, segmentation]


# Structure


def schedule(**options):
    values = {"width": 8, "stem_channels": 8, "stage_channels": (8,) * 4, "num_blocks": 1, "unet_depth": (2, 2, 2, 1)}
    return dilation_schedule(SUNetConfig(num_classes=2, **(values | options)))


def test_multi_grid_is_the_authors_schedule():
    assert schedule() == (None,) * 4
    assert schedule(output_stride=16) == (None, None, None, ((2, 4),))
    assert schedule(output_stride=8) == (None, None, ((2, 4), (4, 8)), ((4, 8),))
    assert schedule(output_stride=4) == (None, ((2, 4), (4, 8)), ((4, 8), (8, 16)), ((6, 12),))


def test_other_schedules():
    assert schedule(output_stride=8, dilation="uniform") == (None, None, ((2, 2), (2, 2)), ((4, 4),))
    assert schedule(output_stride=8, dilation="none") == (None, None, ((1, 1), (1, 1)), ((1, 1),))
    assert schedule(output_stride=8, dilation="strided") == (None,) * 4
    explicit = schedule(output_stride=8, dilation=[0, 3, [1, 5], (2,)])
    assert explicit == (None, ((3, 3), (3, 3)), ((1, 2), (5, 10)), ((2, 4),))


def test_the_schedule_reaches_the_convolutions():
    unet = tiny(output_stride=8, unet_depth=2).stages[2][0]
    for level, base in enumerate((2, 4)):
        first, second = unet.downs[level]
        transposed, plain = unet.ups[level]
        assert [m.conv.dilation[0] for m in (first, second, transposed, plain)] == [base, 2 * base, 2 * base, base]
        assert {m.conv.stride for m in (first, second, transposed, plain)} == {(1, 1)}
    strided = tiny(output_stride=8, dilation="strided").stages[2][0]
    assert [m.conv.stride for m in (strided.downs[0][0], strided.ups[0][0])] == [(2, 2), (2, 2)]


@pytest.mark.parametrize("dilation", ["multi_grid", "uniform", "none", "strided", ((2, 4), 0, 3)])
@pytest.mark.parametrize("output_stride", [4, 8, 16])
def test_features_have_the_output_stride(output_stride, dilation):
    model = tiny(output_stride=output_stride, dilation=dilation).eval()
    features = model.forward_features(image(65, 49, batch=1))
    assert features.shape == (1, 192, math.ceil(65 / output_stride), math.ceil(49 / output_stride))
    assert model.output_stride == output_stride


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("unet_depth", [1, 3, 5])
def test_any_number_of_stages_and_levels(stages, unet_depth):
    model = tiny(stage_channels=[8 * (s + 1) for s in range(stages)], num_blocks=1, unet_depth=unet_depth, width=4)
    assert model.output_stride == 4 * 2 ** (stages - 1)
    assert [len(block.downs) for blocks in model.stages for block in blocks] == [unet_depth] * stages
    assert model(image(16, 16)).shape == (2, 5, 16, 16)
    assert model(image(33, 70)).shape == (2, 5, 33, 70)


def test_levels_have_weights_of_their_own_and_sums_join_at_the_width():
    deep, shallow = (sum(p.numel() for p in tiny(unet_depth=depth).parameters()) for depth in (3, 2))
    level = 2 * (9 * 16 * 16 + 16 + 32) + (9 * 16 * 16 + 16 + 32) + (9 * 32 * 16 + 16 + 64)
    assert deep - shallow == 7 * level
    summed = tiny(unet_depth=2, skip="sum")
    assert shallow - sum(p.numel() for p in summed.parameters()) == 7 * (9 * 16 * 16 + 32)
    assert summed(image(17, 16)).shape == (2, 5, 17, 16)


def test_stage_channels_alone_decides_the_number_of_stages():
    config = create_model("sunet64", num_classes=2, stage_channels=(8, 16), width=4).config
    assert (config.num_blocks, config.unet_depth, config.output_stride) == ((2, 4), (2, 2), 8)
    config = tiny(stage_channels=(8, 8, 16, 16), num_blocks=(1, 1, 1, 2), width=4).config
    assert (config.num_blocks, config.unet_depth, config.output_stride) == ((1, 1, 1, 2), (2, 2, 1, 1), 32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sunet64", {"num_blocks": (1, 2)}, "num_blocks: 2 entries, but stage_channels has 4 entries"),
        ("sunet64", {"num_blocks": (1,) * 5}, "num_blocks: 5 entries, but stage_channels has 4 entries"),
        ("sunet64", {"unet_depth": [2, 2]}, "unet_depth: 2 entries, but stage_channels has 4 entries"),
        ("sunet_tiny", {"unet_depth": (2,) * 4}, "unet_depth: 4 entries, but stage_channels has 3 entries"),
        # both of one length are no number of stages either
        (
            "sunet_tiny",
            {"num_blocks": (1, 1), "unet_depth": (1, 1)},
            "num_blocks: 2 entries, but stage_channels has 3 entries",
        ),
        (
            "sunet_tiny",
            {"stage_channels": (8, 16), "num_blocks": (1, 1, 1)},
            "num_blocks: 3 entries, but stage_channels has 2 entries",
        ),
        (
            "sunet_tiny",
            {"stage_channels": (8, 16), "dilation": (0, 0, 2)},
            "dilation: 3 entries, but stage_channels has 2 entries",
        ),
        ("sunet64", {"dilation": (0, 2)}, "dilation: 2 entries, but stage_channels has 4 entries"),
        ("sunet64", {"dilation": (0, 0, (2, 4, 8), 2)}, "dilation: 3 rates for stage 2, which has unet_depth 2"),
    ],
)
def test_a_length_that_does_not_fit_names_both_fields(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        create_model(name, num_classes=2, **options)


def test_channels_change_in_the_first_unet_of_a_stage_only():
    model = tiny(stage_channels=(32, 48, 48), num_blocks=(2, 2, 1), stem_channels=16)
    assert [[block.shortcut is not None for block in blocks] for blocks in model.stages] == [
        [False, False],
        [True, False],
        [False],
    ]


def test_initialisation_and_no_dropout():
    model = create_model("sunet64", num_classes=4, head="degridding")
    assert not [m for m in model.modules() if "Dropout" in type(m).__name__]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            fan_out = module.weight.shape[0] * module.kernel_size[0] ** 2
            if module.weight.numel() > 10_000:
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_set_bn_momentum():
    model = tiny(head="degridding")
    set_bn_momentum(model.stages, 0.01)
    assert {m.momentum for m in model.stages.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}
    assert {m.momentum for m in model.head.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize(
    ("options", "field", "allowed"),
    [
        ({"width": 0}, "width", "at least 1"),
        ({"width": 16.0}, "width", "integer"),
        ({"width": True}, "width", "integer"),
        ({"stem_channels": -1}, "stem_channels", "at least 1"),
        ({"in_channels": 0}, "in_channels", "at least 1"),
        ({"stage_channels": ()}, "stage_channels", "one to 5 stages"),
        ({"stage_channels": (8,) * 6}, "stage_channels", "one to 5 stages"),
        ({"stage_channels": 64}, "stage_channels", "a list"),
        ({"stage_channels": (8, "16", 8)}, "stage_channels", "integer"),
        ({"num_blocks": 0}, "num_blocks", "at least 1"),
        ({"num_blocks": (1, 0, 1)}, "num_blocks", "at least 1"),
        ({"num_blocks": "2"}, "num_blocks", "an integer for all"),
        ({"num_blocks": (1, 1), "stage_channels": (8, 8, 8)}, "num_blocks", "3 entries"),
        ({"unet_depth": 6}, "unet_depth", "from 1 to 5"),
        ({"unet_depth": (2, 2, 0)}, "unet_depth", "from 1 to 5"),
        ({"unet_depth": (2, 2), "num_blocks": (1, 1, 1)}, "unet_depth", "3 entries"),
        ({"output_stride": 32}, "output_stride", "4, 8, 16"),
        ({"output_stride": 12}, "output_stride", "4, 8, 16"),
        ({"output_stride": "8"}, "output_stride", "4, 8, 16"),
        ({"dilation": "multigrid"}, "dilation", "multi_grid, uniform, none, strided"),
        ({"dilation": (0, 2)}, "dilation", "3 entries"),
        ({"dilation": (0, 0, -1)}, "dilation", "at least 0"),
        ({"dilation": (0, 0, (2, 4))}, "dilation", "unet_depth 1"),
        ({"dilation": (0, (0, 2), 0)}, "dilation", "at least 1"),
        ({"dilation": 2}, "dilation", "one entry per stage"),
        ({"skip": "add"}, "skip", "concat, sum"),
        ({"head": "classifier"}, "head", "linear, degridding"),
        ({"head": "linear", "task": "classification"}, "head", "classifier"),
        ({"memory_efficient": 1}, "memory_efficient", "true or false"),
        ({"depth": 2}, "depth", "unet_depth"),
    ],
)
def test_what_cannot_be_built_is_named(options, field, allowed):
    with pytest.raises(ValueError, match=f"^{field}.*{allowed}"):
        tiny(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), "4 dimensions"),
        ((1, 4, 32, 32), "in_channels is 3, the input has 4"),
        ((1, 3, 15, 32), "at least 16 pixels, not 15 x 32"),
        ((1, 3, 32, 8), "at least 16 pixels, not 32 x 8"),
    ],
)
def test_inputs_that_no_network_takes(shape, message):
    with pytest.raises(ValueError, match=f"^input: .*{message}"):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize("size", [160, 224, 320])
def test_classification_at_any_size(size):
    model = tiny(task="classification").eval()
    assert model(image(size, size, batch=1)).shape == (1, 5)
    assert model(image(size, size + 37, batch=1)).shape == (1, 5)


# Ways to run it


def backward(model, x, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    output.float().square().mean().backward()
    return output


@pytest.mark.parametrize("autocast", [False, True])
def test_memory_efficient_changes_neither_gradients_nor_statistics(autocast):
    plain = tiny(output_stride=8)
    frugal = tiny(output_stride=8, memory_efficient=True)
    for model in (plain, frugal):
        for block in model.stages[1]:  # frozen statistics inside a network that trains
            block.downs.eval()
    for step in range(2):
        x = image(40, 33, seed=step)
        assert torch.equal(backward(plain, x, autocast), backward(frugal, x, autocast))
    assert plain.stages[0][0].norm.num_batches_tracked == 2
    assert plain.stages[1][0].downs[0][0].norm.num_batches_tracked == 0
    for (name, ours), (_, theirs) in zip(plain.named_buffers(), frugal.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    for (name, ours), (_, theirs) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_memory_efficient_keeps_less():
    def saved(model):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(image(64, 64))
        assert output.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    assert saved(tiny(memory_efficient=True)) < 0.5 * saved(tiny())


def test_channels_last():
    model = tiny(output_stride=8).eval()
    x = image(65, 49)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    output = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert model.forward_features(x.contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_bfloat16_autocast():
    model = tiny(output_stride=8).eval()
    x = image(65, 49)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    expected = model(x)
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
def test_compile():
    model = tiny(**MINIMAL).eval()
    x = image(33, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_training_recomputes_without_touching_the_statistics_twice():
    model = tiny(memory_efficient=True, **MINIMAL)
    same = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(backward(compiled, image(33, 48)), backward(same, image(33, 48)), rtol=1e-4, atol=1e-5)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), same.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    torch.testing.assert_close(model.head.weight.grad, same.head.weight.grad, rtol=1e-3, atol=1e-6)


def dynamic_sizes():
    return {
        "x": {
            0: torch.export.Dim("batch"),
            2: torch.export.Dim("height", min=16, max=4096),
            3: torch.export.Dim("width", min=16, max=4096),
        }
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 1},
        SMALL | {"output_stride": 4, "head": "degridding", "skip": "sum"},
        SMALL | {"task": "classification"},
    ],
    ids=["linear", "degridding", "classifier"],
)
def test_export_with_dynamic_sizes(options):
    model = tiny(**options).eval()
    program = torch.export.export(model, (image(64, 80),), dynamic_shapes=dynamic_sizes()).module()
    with torch.no_grad():
        for number, size in enumerate(SIZES):
            x = image(*size, batch=1 + number % 3)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_export_leaves_the_sizes_open_without_a_range():
    model = tiny(**MINIMAL).eval()
    sizes = {"x": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    program = torch.export.export(model, (image(64, 80),), dynamic_shapes=sizes).module()
    for size in SIZES:
        torch.testing.assert_close(program(image(*size)), model(image(*size)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_with_dynamic_sizes(tmp_path):
    import onnxruntime

    model = tiny(**SMALL).eval()
    program = torch.onnx.export(model, (image(64, 80),), dynamo=True, dynamic_shapes=dynamic_sizes(), verbose=False)
    program.save(tmp_path / "sunet.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "sunet.onnx")
    (name,) = (node.name for node in session.get_inputs())
    for size in SIZES:
        (output,) = session.run(None, {name: image(*size).numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(output, model(image(*size)).numpy(), rtol=1e-3, atol=1e-4)

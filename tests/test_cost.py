"""Costs against hand counts, other counters and other devices; fields against their definition."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from sunets import create_model, zoo_tables
from sunets.core.config import ConfigError
from sunets.profile import profile
from sunets.profiling import multiply_adds
from sunets.profiling.cost import measure_cost
from sunets.profiling.memory import saved_bytes
from sunets.profiling.multiply_adds import AuditError, audit, count_macs, sunet_macs
from sunets.profiling.receptive_field import (
    effective_map,
    mass_share,
    natural_noise,
    receptive_field,
    theoretical_field,
)
from sunets.profiling.speed import measure_speed

SMALL = ("sunet_tiny", "unet_small", "dilated_resnet_small", "plain_conv_small")

# Measured with the authors' code: parameters with 1000 classes and the classifier, with 21 and the linear head, and
# multiply-adds of the convolutions for 1 x 3 x 512 x 512 and 21 classes at output stride 32, 16, 8, in 10^9. The
# formula gives 38.4046 for what they have as 38.41; all others are equal to the last digit.
AUTHORS = {
    "sunet64": (6_910_248, 5_906_773, {32: 13.22, 16: 14.06, 8: 24.78}),
    "sunet128": (24_704_360, 22_698_389, {32: 38.41, 16: 41.74, 8: 84.49}),
    "sunet7128": (39_113_832, 36_857_237, {32: 53.05, 16: 57.67, 8: 130.34}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_figures(name: str) -> None:
    classifier, segmenter, gmacs = AUTHORS[name]
    with torch.device("meta"):
        model = create_model(name, task="classification", num_classes=1000)
        assert sum(p.numel() for p in model.parameters()) == classifier
        for stride, figure in gmacs.items():
            model = create_model(name, num_classes=21, output_stride=stride).eval()
            assert sum(p.numel() for p in model.parameters()) == segmenter
            counted = count_macs(model, torch.zeros(1, 3, 512, 512))[""]
            assert sum(counted.values()) / 1e9 == pytest.approx(figure, abs=0.0055)
            assert sum(counted.values()) == sunet_macs(model.config, (512, 512))[""]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"skip": "sum", "unet_depth": (3, 1, 2), "num_blocks": (1, 2, 1)},
        {"head": "degridding", "output_stride": 4},
        {"dilation": (0, 3, (2,)), "output_stride": 16, "in_channels": 4},
        {"stage_channels": (20, 20), "stem_channels": 10},
        {"task": "classification"},
    ],
)
@pytest.mark.parametrize("size", [(64, 96), (53, 71)])
def test_formula_and_counter_agree_for_any_structure(fields: dict[str, object], size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = create_model("sunet_tiny", num_classes=5, **fields).eval()
        counted = count_macs(model, torch.zeros(2, model.config.in_channels, *size))  # type: ignore[union-attr, arg-type]
    formula = sunet_macs(model.config, size, batch_size=2)  # type: ignore[arg-type]
    assert {part: sum(counted[part].values()) for part in formula} == formula


@pytest.mark.parametrize(
    ("layer", "channels", "macs"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), 4, 4 * 5 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False), 4, 8 * 10 * 4 * 9),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), 4, 8 * 10 * 4 * 3 * 9),
        (nn.Sequential(nn.Flatten(2), nn.Linear(80, 7)), 3, 3 * 80 * 7),
    ],
)
def test_counts_by_hand(layer: nn.Module, channels: int, macs: int) -> None:
    x = torch.zeros(1, channels, 8, 10)
    assert sum(count_macs(layer, x)[""].values()) == macs
    # The gradient of the weights takes as many again, and so does that of the input, which here nobody needs.
    assert sum(count_macs(layer, x, backward=True)[""].values()) == 2 * macs
    assert sum(count_macs(layer, x.requires_grad_(), backward=True)[""].values()) == 3 * macs


def test_backward_count_is_three_passes_less_the_input_gradient() -> None:
    model = create_model("sunet_tiny", num_classes=5).to("meta")
    x = torch.zeros(1, 3, 64, 64, device="meta")
    counted = count_macs(model, x)
    forward, first = (sum(counted[part].values()) for part in ("", "stem.conv"))
    assert sum(count_macs(model, x, backward=True)[""].values()) == 3 * forward - first


class TwoFaced(nn.Module):
    """Where asked for, what one counter sees differs from what the other sees."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if not self.hidden:
            return y
        return y + (self.first(x).sum() if torch.jit.is_tracing() else 0)


def test_audit_fails_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    audit(TwoFaced(hidden=False))
    with pytest.raises(AuditError, match=r"TwoFaced at 64x96: multiply-adds of first: torch's counter says 629,\d+"):
        audit(TwoFaced(hidden=True))
    monkeypatch.setattr(
        multiply_adds,
        "sunet_macs",
        lambda *_: {part: n * (1 + (part == "head") / 500) for part, n in sunet_macs(*_).items()},
    )
    with pytest.raises(AuditError, match=r"SUNet at 64x96: multiply-adds of head: .* the formula"):
        measure_cost({"name": "sunet_tiny", "num_classes": 5}, size=(64, 64))


def test_audit_leaves_the_network_as_it_is() -> None:
    model = create_model("sunet_tiny", num_classes=5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audit(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [*SMALL, "dilated_resnet18", "lraspp_mobilenet_v3_large", "deeplabv3_resnet50", "unet_resnet34", "segformer_b0"],
)
def test_saved_bytes_are_the_same_on_meta_and_cpu(name: str) -> None:
    model = create_model(name, num_classes=3)
    x = torch.randn(2, 3, 64, 64)
    real = saved_bytes(model, x)
    assert saved_bytes(model.to("meta"), x.to("meta")) == real > x.nbytes


def test_saved_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 16, 16)
    pixels = 2 * 16 * 16
    # Input, convolution, norm (the ReLU shares its storage), batch statistics, log-softmax, labels, total weight.
    expected = 4 * pixels * (3 + 8 + 8 + 4) + 2 * 4 * 8 + 8 * pixels + 4
    assert saved_bytes(model, x) == expected
    assert saved_bytes(model.to("meta"), x.to("meta")) == expected


@pytest.mark.slow
def test_memory_efficient_saves_less_and_its_inputs_count() -> None:
    figures, _ = measure_cost({"name": "sunet_tiny", "num_classes": 5}, size=(64, 64))
    plain, efficient = figures["memory.saved_mib"], figures["memory.saved_mib_memory_efficient"]
    model = create_model("sunet_tiny", num_classes=5, memory_efficient=True)
    assert efficient == saved_bytes(model, torch.zeros(1, 3, 64, 64)) / 2**20
    assert plain == measure_cost(
        {"name": "sunet_tiny", "num_classes": 5, "memory_efficient": True}, size=(64, 64)
    )[0]["memory.saved_mib"]  # fmt: skip
    inputs = 64 * 16**2 + 128 * 8**2 * 3  # of the blocks that the first stage's pool and blocks do not share
    assert 4 * inputs / 2**20 < efficient < 0.7 * plain  # type: ignore[operator]


@pytest.mark.slow
def test_attention_is_counted_apart() -> None:
    figures, _ = measure_cost({"name": "segformer_b0", "num_classes": 5}, size=(64, 64))
    assert 0 < figures["cost.gmacs_attention"] < figures["cost.gmacs"]  # type: ignore[operator]
    assert {"softmax", "layer_norm", "add"} <= set(str(figures["cost.uncounted_operators"]).split(", "))
    figures, _ = measure_cost({"name": "resnet18", "num_classes": 5, "task": "classification"}, size=(64, 64))
    assert figures["cost.gmacs_attention"] == 0
    assert figures["memory.saved_mib_memory_efficient"] is None
    assert "memory.peak_mib" not in figures, "noisy, hence among the timings"


# Receptive field


def test_theoretical_field_of_known_networks() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 5, padding=2))
    inside = theoretical_field(net, (21, 32))
    expected = np.zeros((21, 32), bool)
    expected[10 - 3 : 10 + 4, 16 - 3 : 16 + 4] = True
    np.testing.assert_array_equal(inside, expected)

    holes = theoretical_field(nn.Sequential(nn.Conv2d(1, 1, 3, padding=4, dilation=4)), (31, 31))
    assert holes.sum() == 9
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1), nn.Hardswish(), nn.Conv2d(4, 4, 1))
    assert theoretical_field(pooled, (20, 20)).sum() == 25
    # Three strided or plain 3x3 more than the 7 of the stem at stride 4: 31 pixels, and what the upsampling adds.
    local = theoretical_field(create_model("plain_conv_small", num_classes=2), (96, 96))
    assert np.ptp(np.flatnonzero(local.any(0))) + 1 == 31 + 4


def test_theoretical_field_holds_every_gradient() -> None:
    for name in SMALL:
        torch.manual_seed(1)
        model = create_model(name, num_classes=3)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        inside = theoretical_field(model, (160, 96))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        noise = natural_noise(2, 3, (160, 96), torch.Generator().manual_seed(0))
        felt = effective_map(model.double(), noise) > 0
        assert not (felt & ~inside).any(), name
        assert felt.sum() > 0.5 * inside.sum(), name


def test_effective_map_is_the_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Conv2d(5, 2, 1, bias=False)).double()
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    composed = torch.einsum("koij,ocyx->kcyx", net[1].weight, net[0].weight).sum(0).abs().sum(0)
    expected = np.zeros((9, 12))
    expected[3:6, 5:8] = composed.detach().numpy()
    np.testing.assert_allclose(effective_map(net, x), expected, atol=1e-12)


def test_mass_share() -> None:
    weights = np.zeros((10, 10))
    weights[0, :5] = [60, 20, 10, 5, 5]
    assert mass_share(weights) == 0.04
    assert mass_share(weights, 0.5) == 0.01
    assert mass_share(np.ones((10, 10))) == 0.95


def test_context_shows_in_the_field() -> None:
    shares = {}
    for name in ("sunet_tiny", "plain_conv_small"):
        build = lambda name=name: create_model(name, num_classes=3)  # noqa: E731
        shares[name], field = receptive_field(build, (96, 64), seeds=2, images=1)
        assert field.shape == (96, 64)
        again, _ = receptive_field(build, (96, 64), seeds=2, images=1)
        assert again == shares[name], "figures repeat"
    assert shares["sunet_tiny"]["receptive_field.theoretical_share"] == 1
    assert shares["sunet_tiny"]["receptive_field.theoretical_px"] == 96
    assert shares["plain_conv_small"]["receptive_field.theoretical_px"] == 35
    assert (
        shares["plain_conv_small"]["receptive_field.effective_share"]
        < 0.2
        < 0.6
        < shares["sunet_tiny"]["receptive_field.effective_share"]
    )  # type: ignore[operator]


def test_global_networks_and_classifiers_have_a_field() -> None:
    for name, task in (("lraspp_mobilenet_v3_large", "segmentation"), ("resnet18", "classification")):
        model = create_model(name, num_classes=3, task=task)
        assert theoretical_field(model, (64, 64)).all(), name


def test_natural_noise_falls_with_frequency() -> None:
    images = natural_noise(8, 3, (64, 64), torch.Generator().manual_seed(0))
    assert images.std() == pytest.approx(1)
    power = torch.fft.fft2(images).abs().mean((0, 1))
    assert power[0, 2] / power[0, 20] == pytest.approx(10, rel=0.4)


# Speed and the command


def test_speed_takes_models_in_turn_and_leaves_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Net(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.conv, self.norm = name, nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            order.append((self.name, self.training, torch.is_grad_enabled()))
            return self.norm(F.adaptive_avg_pool2d(self.conv(x), 1)).expand(-1, -1, *x.shape[2:])  # type: ignore[no-any-return]

    models = {"a": Net("a"), "b": Net("b")}
    threads = torch.get_num_threads()
    found = measure_speed(models, size=(16, 20), batch_size=1, repeats=3, warmup=2, threads=1, device="cpu")
    one_round = [("a", False, False), ("a", True, True), ("b", False, False), ("b", True, True)]
    assert order == [("a", True, False), ("b", True, False), *5 * one_round]  # at first, which norms see one value
    assert torch.get_num_threads() == threads
    for name, model in models.items():
        assert model.training
        assert model.norm.num_batches_tracked == 0
        figures = found[name]
        assert figures["speed.images_per_second"] == pytest.approx(1000 / figures["speed.latency_ms"])  # type: ignore[operator]
        assert figures["speed.step_ms"] > 0 <= figures["speed.latency_iqr_ms"]  # type: ignore[operator]
        assert (figures["speed.repeats"], figures["speed.threads"], figures["speed.dtype"]) == (3, 1, "float32")
        assert figures["memory.peak_mib"] is None


def test_no_hook_takes_part_in_a_timing() -> None:
    """One per BatchNorm would slow networks with many of them."""
    hooks = []

    class Watched(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hooks.append(
                (torch.is_grad_enabled(), [len(m._forward_pre_hooks) for m in self], [m.training for m in self])
            )
            return super().forward(x)

    # The second norm sees one value per channel, which training mode refuses.
    net = Watched(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    measure_speed({"net": net}, size=(8, 8), repeats=2, warmup=0, device="cpu")
    timed_steps = [(counts, modes) for gradients, counts, modes in hooks if gradients]
    assert timed_steps == [([0, 0, 0, 0], [True, True, True, False])] * 2


def test_a_timing_in_float32_uses_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    class Watched(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
            return super().forward(x)

    measure_speed({"net": nn.Sequential(Watched(3, 4, 3))}, size=(8, 8), repeats=2, warmup=0, device="cpu")
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
def test_the_peak_of_a_network_does_not_depend_on_the_others() -> None:
    nets = {"small": create_model("sunet_tiny", num_classes=5), "large": create_model("sunet64", num_classes=5)}
    alone = measure_speed({"small": nets["small"]}, size=(64, 64), repeats=2, warmup=0, device="cuda")
    both = measure_speed(nets, size=(64, 64), repeats=2, warmup=0, device="cuda")
    assert both["small"]["memory.peak_mib"] == pytest.approx(alone["small"]["memory.peak_mib"], rel=0.05)


def test_an_effective_field_does_not_depend_on_the_state_of_the_process() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))

    fields = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        fields.append(receptive_field(net, (16, 16), seeds=1, images=1)[1])
    assert np.array_equal(*fields)


@pytest.mark.slow
def test_run_profile_prints_and_writes(tmp_path: Path) -> None:
    screen = Console(width=160, file=io.StringIO())
    records = profile(
        ["sunet_tiny", "plain_conv_small"],
        size=(32, 48),
        num_classes=4,
        json_path=tmp_path / "exact.json",
        csv_path=tmp_path / "exact.csv",
        speed=True,
        speed_json_path=tmp_path / "speed.json",
        field=True,
        picture_path=tmp_path / "fields.png",
        console=screen,
    )
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "plain_conv_small" in text
    assert "…" not in text, "no heading is cut"
    assert "Not counted by any of them: add, avg_pool2d, batch_norm, cat, relu, upsample_bilinear2d." in text

    exact = json.loads((tmp_path / "exact.json").read_text())
    assert exact == records
    assert [r["model"] for r in exact] == ["sunet_tiny", "plain_conv_small"]
    assert not [key for r in exact for key in r["cost"] if key.startswith("speed.")], "noisy figures stay apart"
    assert exact[0]["params"]["cost.size"] == [32, 48]
    assert [r["params"]["model.output_stride"] for r in exact] == [16, 4], "as built, never null"
    assert exact[0]["params"]["model.unet_depth"] == [2, 2, 1]
    timed = json.loads((tmp_path / "speed.json").read_text())
    assert all(r["cost"]["speed.latency_ms"] > 0 for r in timed)
    with (tmp_path / "exact.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["cost.params_m"]) == exact[0]["cost"]["cost.params_m"]
    assert "memory.peak_mib" not in rows[0]
    assert timed[0]["cost"]["memory.peak_mib"] is None, "no GPU"
    with Image.open(tmp_path / "fields.png") as picture:
        assert len(picture.getcolors(1 << 20) or []) > 50

    again = profile(["sunet_tiny", "plain_conv_small"], size=(32, 48), num_classes=4, field=True, console=screen)
    assert [r["cost"] for r in again] == [r["cost"] for r in exact], "a rerun repeats to the last digit"


def test_profile_counts_all_images_of_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    one, four = (profile(["plain_conv_small"], size=(32, 32), num_classes=4, batch_size=batch)[0] for batch in (1, 4))
    assert four["params"]["cost.batch_size"] == 4, "recorded with the figures"
    for key in ("cost.gmacs", "cost.gmacs_forward_backward"):
        assert four["cost"][key] == pytest.approx(4 * one["cost"][key])
    assert "Input 4 x 32 x 32" in " ".join(capsys.readouterr().out.split())


def test_run_profile_refuses_what_cannot_be(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(ValueError, match="resnet50: no model of the zoo for segmentation"):
        profile(["sunet_tiny", "resnet50"], json_path=out)
    with pytest.raises(ValueError, match="at least 16 pixels, not 15 x 64"):
        profile(["sunet_tiny"], size=(15, 64), json_path=out)
    with pytest.raises(ValueError, match="output_stride: one of"):
        profile(["sunet_tiny"], size=(32, 32), output_stride=7, json_path=out)
    with pytest.raises(ConfigError, match=r"profile: size\.1: .* less than or equal to 16384 \(given: 20000\)"):
        profile(["sunet_tiny"], size=(64, 20000), json_path=out)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"one\.json: named for two outputs"):
        profile(["sunet_tiny"], size=(64, 64), json_path=tmp_path / "one.json", csv_path=tmp_path / "one.json")


def test_saved_bytes_do_not_depend_on_deterministic_algorithms() -> None:
    model = create_model("sunet_tiny", num_classes=3).to("meta")
    x = torch.zeros(2, 3, 64, 64, device="meta")
    usual = saved_bytes(model, x)
    torch.use_deterministic_algorithms(True)
    try:
        assert saved_bytes(model, x) == usual
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_zoo_looks_for_the_place_of_its_tables_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/cost.md").write_text("<!-- cost table: begin -->")
    monkeypatch.setattr(zoo_tables, "_record", lambda *_: pytest.fail("counted first"))
    with pytest.raises(ValueError, match=r"docs/cost\.md: the tables go between two lines that it lacks"):
        zoo_tables.zoo_stage(tmp_path)

"""Faster inference: the same logits, fewer norms, the original untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sunets import create_model
from sunets.models.inference import fold_norms, optimize_for_inference


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and weights as after training: at 0 and 1 a wrong folding would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, low, high in (("weight", 0.7, 1.3), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3)):
                getattr(module, name).data.uniform_(low, high, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 45, 70, generator=torch.Generator().manual_seed(0))


MODELS = {
    "sunet_tiny": {},
    "sunet_tiny, dilated, sum, three levels": {"output_stride": 8, "skip": "sum", "unet_depth": 3},
    "sunet_tiny, degridding": {"head": "degridding", "memory_efficient": True},
    "unet_small": {},
    "dilated_resnet_small": {},
}


@pytest.mark.parametrize("key", MODELS)
def test_same_logits_with_fewer_norms(key: str, image: Tensor) -> None:
    torch.manual_seed(0)
    model = randomize_norms(create_model(key.split(",")[0], num_classes=5, **MODELS[key])).train()
    before = copy.deepcopy(model.state_dict())
    norms = count_norms(model)

    fast = optimize_for_inference(model, image, compile=False)

    assert model.training, "the original stays in training mode"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert fast.report["folded_norms"] > norms / 2
    assert count_norms(fast) == fast.report["remaining_norms"] == norms - fast.report["folded_norms"]
    model.eval()
    with torch.no_grad():
        for size in ((45, 70), (64, 32), (17, 16)):
            x = image[:, :, : size[0], : size[1]] if size[0] < 46 else torch.nn.functional.interpolate(image, size)
            assert relative(fast(x), model(x)) < 1e-4
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert fast(image).dtype == torch.float32
        assert relative(fast(image), fast.eager(image).float()) > 0, "autocast would have changed the logits"
        inside = fast(image)
    assert relative(inside, fast(image)) == 0
    assert not fast(image).requires_grad


def test_norms_that_cannot_be_folded_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))
            self.up = nn.ConvTranspose2d(4, 4, 3, 2, 1, 1)
            self.up_norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norms[0](self.convs[0](x))  # folds
            z = self.convs[1](y)
            y = self.norms[1](z) + z  # read twice
            y = self.norms[2](torch.relu(self.convs[2](y)))  # not directly behind
            y = self.convs[3](self.norms[3](self.convs[3](y)))  # the convolution is used twice
            y = self.norms[4](self.convs[4](y)[:, :2].repeat(1, 2, 1, 1))  # other channels
            y = self.norms[5](self.convs[5](y)[:, :, 1:, :3])  # cuts rows and columns: folds
            return self.up_norm(self.up(y)[:, :, : x.shape[2]])  # type: ignore[no-any-return]  # folds

    torch.manual_seed(0)
    model = randomize_norms(Net()).eval()
    x = torch.randn(2, 4, 8, 8)
    folded, count = fold_norms(model)
    assert count == 3
    with torch.no_grad():
        assert relative(folded(x), model(x)) < 1e-5


def test_network_that_cannot_be_followed_is_copied(image: Tensor) -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.mean() > 100 else 2 * x)

    torch.manual_seed(0)
    model = randomize_norms(Net(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    fast = optimize_for_inference(model, image, compile=False)
    assert fast.report["folded_norms"] == 0
    with torch.no_grad():
        assert relative(fast(image), model(image)) < 1e-6


def test_bfloat16(image: Tensor) -> None:
    torch.manual_seed(0)
    model = randomize_norms(create_model("sunet_tiny", num_classes=5)).eval()
    fast = optimize_for_inference(model, image, dtype=torch.bfloat16, compile=False)
    kinds = {(type(m).__name__, p.dtype) for m in fast.modules() for p in m.parameters(recurse=False)}
    assert kinds == {
        ("Conv2d", torch.bfloat16),
        ("ConvTranspose2d", torch.bfloat16),
        ("BatchNorm2d", torch.float32),
    }
    with torch.no_grad():
        assert 1e-6 < relative(fast(image), model(image)) < 0.05
    with pytest.raises(ValueError, match="dtype: float32 or bfloat16, not float16"):
        optimize_for_inference(model, image, dtype=torch.float16)


@pytest.mark.slow
def test_compiled_for_the_example_and_eager_for_other_sizes(image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = create_model(
        "sunet_tiny", num_classes=3, width=8, stem_channels=4, stage_channels=(12,), num_blocks=1, unet_depth=1
    )
    randomize_norms(model).eval()
    fast = optimize_for_inference(model, image, compile=True)
    assert fast.report["compiled"]
    assert fast.report["reason"] is None
    assert set(fast.state_dict()) == {f"eager.{name}" for name in fast.eager.state_dict()}
    compiled, sizes = fast._compiled, []
    monkeypatch.setattr(fast, "_compiled", lambda x: (sizes.append(tuple(x.shape)), compiled(x))[1])
    with torch.no_grad():
        assert relative(fast(image), model(image)) < 1e-4
        assert relative(fast(image[:, :, :33]), model(image[:, :, :33])) < 1e-4
    assert sizes == [(2, 3, 45, 70)]


def test_without_a_compiler_it_goes_on_and_says_so(image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: nn.Module) -> nn.Module:
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    model = create_model("sunet_tiny", num_classes=3).eval()
    fast = optimize_for_inference(model, image)
    assert not fast.report["compiled"]
    assert fast.report["reason"] == "torch.compile failed: RuntimeError: no C++ compiler"
    with torch.no_grad():
        assert relative(fast(image), model(image)) < 1e-4
    with pytest.raises(ValueError, match="compile=True: torch"):
        optimize_for_inference(model, image, compile=True)


def test_compiled_code_that_is_wrong_or_slow_is_not_used(image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    class Wrapped(nn.Module):
        def __init__(self, eager: nn.Module, offset: float, seconds: float) -> None:
            super().__init__()
            self.eager, self.offset, self.seconds = eager, offset, seconds

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(self.seconds)
            return self.eager(x) + self.offset  # type: ignore[no-any-return]

    model = create_model("sunet_tiny", num_classes=3).eval()
    monkeypatch.setattr(torch, "compile", lambda eager: Wrapped(eager, 0.1, 0.0))
    fast = optimize_for_inference(model, image)
    assert "logits differ" in fast.report["reason"]
    monkeypatch.setattr(torch, "compile", lambda eager: Wrapped(eager, 0.0, 0.5))
    fast = optimize_for_inference(model, image)
    assert "eager is as fast" in fast.report["reason"]
    assert not fast.report["compiled"]
    with torch.no_grad():
        assert relative(fast(image), model(image)) < 1e-4

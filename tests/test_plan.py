"""Plans against counts by hand, what a network really receives, and every preset."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_manifest
from torch import Tensor, nn

from sunets import create_model
from sunets.core.config import ConfigError, DataConfig, Suite, SyntheticConfig, load, override
from sunets.core.config import VariantConfig as Variant
from sunets.data.manifest import write_manifest
from sunets.data.preparation import prepare
from sunets.data.synthetic import class_names
from sunets.evaluation.multi_scale import multi_scale_probabilities
from sunets.plan import PlanRow, forward_passes, plan_preset
from sunets.profiling.memory import saved_bytes
from sunets.profiling.multiply_adds import sunet_macs

ROOT = Path(__file__).resolve().parents[1]
SLOW = 1e-6
"""TFLOP/s at which arithmetic decides, however small the network."""
FAST = 1e9
"""TFLOP/s at which starting kernels decides."""
SMALL: dict[str, Any] = {"num_blocks": 1, "unet_depth": 1}

SUITE = Suite.model_validate(
    {
        "benchmark": "tiny",
        "seeds": [0, 1],
        "data": {"synthetic": {"image_size": 64, "train": 20, "val": 6, "test": 5}},
        "models": {"sunet": {"name": "sunet_tiny", **SMALL}, "plain": {"name": "plain_conv_small"}},
        "report": {"reference": "sunet"},
        "train": {"epochs": 4, "batch_size": 8, "validate_every": 2},
        "evaluate": {"variants": {"one": {}, "all": {"scales": [0.5, 1.0], "flip": True, "window": [48, 48]}}},
    }
)


def planned(values: dict[str, Any] | None = None, *, tflops: float = SLOW, root: Path = Path("/nowhere")) -> PlanRow:
    """The first model's row after a change of the suite."""
    return plan_preset(override(SUITE, values or {}), gpu_tflops=tflops, root=root)[0]


def test_hours_and_memory_by_hand() -> None:
    row = planned({"train.optimizer": "sgd", "train.micro_batch_size": 4})
    network = create_model("sunet_tiny", **SMALL, num_classes=5)
    forward, window = (sunet_macs(network.config, (side, side))[""] for side in (64, 48))  # type: ignore[arg-type]
    first = 32 * 32 * 3 * 7 * 7 * network.config.stem_channels  # type: ignore[operator, union-attr]
    step = 3 * forward - first  # nobody needs the gradient of the image
    hour = 3600 * SLOW * 1e12 / 2
    # 20 images fill three batches of 8, four times; validation after epochs 2 and 4.
    assert row.images == 4 * 24
    assert row.gmacs_training_image == step / 1e9
    assert row.gpu_hours_train == pytest.approx(2 * (4 * 24 * step + 2 * 6 * forward) / hour)
    # Twice mirrored: the half-size image in one padded window, the whole one in four.
    assert row.gpu_hours_test == pytest.approx(2 * 5 * (forward + 2 * (1 + 4) * window) / hour)
    parameters = sum(p.numel() for p in network.parameters())
    saved = saved_bytes(network, torch.zeros(4, 3, 64, 64))
    assert row.images_per_pass == 4
    assert row.memory_gib == (saved + 3 * 4 * parameters) / 2**30
    recomputing = create_model("sunet_tiny", **SMALL, num_classes=5, memory_efficient=True)
    saved = saved_bytes(recomputing, torch.zeros(4, 3, 64, 64))
    assert row.memory_gib_efficient == (saved + 3 * 4 * parameters) / 2**30


def test_trials_of_the_tuning_are_trainings_of_their_epochs() -> None:
    """Three trials of two epochs, each validated once and a finalist, take the time of nine seeds of that length."""
    alone, short = planned(), planned({"train.epochs": 2, "seeds": list(range(9))})
    space = [{"path": "train.lr", "low": 0.001, "high": 0.1}]
    row = planned({"tune.trials": 3, "tune.epochs": 2, "tune.space": space})
    assert row.trainings == 2 + 9
    assert row.gpu_hours_train == pytest.approx(alone.gpu_hours_train + short.gpu_hours_train)
    assert (row.gpu_hours_test, row.images) == (alone.gpu_hours_test, alone.images)


@pytest.mark.parametrize("tflops", [SLOW, FAST])
def test_hours_are_linear_in_epochs_and_seeds(tflops: float) -> None:
    base = planned(tflops=tflops)
    longer = planned({"train.epochs": 12}, tflops=tflops)
    assert longer.gpu_hours_train == pytest.approx(3 * base.gpu_hours_train)
    assert longer.gpu_hours_test == base.gpu_hours_test
    more = planned({"seeds": [0, 1, 2, 3, 4, 5]}, tflops=tflops)
    assert more.trainings == 6
    assert more.gpu_hours_train == pytest.approx(3 * base.gpu_hours_train)
    assert more.gpu_hours_test == pytest.approx(3 * base.gpu_hours_test)


def test_small_networks_take_the_time_to_start_their_kernels() -> None:
    base, halved = (planned({"train.batch_size": size, "data.synthetic.train": 16, "data.synthetic.val": 16},
                            tflops=FAST) for size in (8, 4))  # fmt: skip
    assert halved.gpu_hours_train == pytest.approx(2 * base.gpu_hours_train)
    larger = planned({"data.size": [96, 96]}, tflops=FAST)  # more multiply-adds, the same kernels
    assert larger.gpu_hours_train == planned(tflops=2 * FAST).gpu_hours_train
    assert planned({"data.size": [96, 96]}).gpu_hours_train > 2 * planned().gpu_hours_train


def test_memory_grows_with_the_images_of_a_pass() -> None:
    rows = [planned({"train.batch_size": size}) for size in (8, 16, 32)]
    fixed = [2 * row.memory_gib - double.memory_gib for row, double in itertools.pairwise(rows)]
    assert rows[0].memory_gib < rows[1].memory_gib < rows[2].memory_gib
    assert fixed[0] == pytest.approx(fixed[1])  # all but the images' share: parameters and batch statistics
    assert planned({"train.batch_size": 32, "train.micro_batch_size": 8}).memory_gib == rows[0].memory_gib
    assert planned({"train.optimizer": "sgd"}).memory_gib < rows[0].memory_gib
    assert all(row.memory_gib_efficient < row.memory_gib for row in rows)  # type: ignore[operator]


class Recorder(nn.Module):
    """Remembers the sizes of the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[tuple[int, ...]] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes[tuple(x.shape[2:])] += len(x)
        return x


@pytest.mark.parametrize(
    "variant",
    [
        Variant(),
        Variant(scales=(0.75, 1.0, 1.3), flip=True),
        Variant(scales=(0.5, 1.0, 2.0), flip=True, window=(40, 56)),
        Variant(scales=(1.25,), window=(32, 32), window_overlap=0.5),
    ],
)
def test_passes_are_those_of_the_evaluation(variant: Variant) -> None:
    network = Recorder()
    multi_scale_probabilities(network, torch.zeros(1, 3, 53, 90), variant, batch_size=4)
    counted: Counter[tuple[int, ...]] = Counter()
    for size, number in forward_passes(variant, (53, 90)):
        counted[size] += number
    assert counted == network.sizes


def test_training_sizes() -> None:
    assert planned().size == (64, 64)
    assert planned({"data.size": [48, 80]}).size == (48, 80)
    assert planned({"data.size": [48, 80], "train.augment.crop": [32, 40]}).size == (32, 40)


def test_prepared_images_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "prepared" / "tiny"
    manifest = dataclasses.replace(tiny_manifest(folder, train=10, size=48), name="folder")
    write_manifest(manifest, folder, None)
    values = {"data.root": "/absent", "data.name": "folder"}
    row = planned(values, root=tmp_path)
    assert (row.images, row.size) == (4 * 16, (48, 48))
    row = planned({**values, "data.name": "camvid"}, root=tmp_path)  # not what was prepared
    assert (row.images, row.size) == (4 * 368, (360, 480))
    with pytest.raises(ConfigError, match=r"'folder' with the splits train, val, more, .* prepare first"):
        planned({**values, "data.test_split": "more"}, root=tmp_path)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest.json: not readable .* prepare again"):
        planned(values, root=tmp_path)


def test_drawn_classes_are_those_of_the_embedded_data_sets(tmp_path: Path) -> None:
    drawn = SyntheticConfig(image_size=32, train=1, val=1, test=1)
    for name in ("synthetic", "synthetic_shapes"):
        manifest = prepare(DataConfig(name=name, synthetic=drawn), tmp_path / name)
        assert class_names(manifest.task) == list(manifest.classes)


def test_errors_name_the_key() -> None:
    with pytest.raises(ConfigError, match="split 'train_aug': synthetic has train, val, test"):
        planned({"data.train_split": "train_aug"})
    with pytest.raises(ConfigError, match=r"models\.sunet: .*at least 16 pixels"):
        planned({"evaluate.variants": {"tiny": {"scales": [0.1]}}})


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_can_be_planned(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(path.read_text().replace("root: null", "root: /absent"))
    suite = load(file)
    if suite.data.name == "folder":
        with pytest.raises(
            ConfigError, match=r"data/prepared/folder/manifest\.json: .*run python -m sunets prepare first"
        ):
            plan_preset(suite, gpu_tflops=10, root=tmp_path)
        return
    first, *_, last = [*suite.models] * 2  # as many as there is time for
    suite = suite.model_copy(update={"models": {key: suite.models[key] for key in dict.fromkeys((first, last))}})
    rows = plan_preset(suite, gpu_tflops=10, root=tmp_path)
    printed = capsys.readouterr().out
    table = [line.split("│")[1].strip() for line in printed.splitlines() if "│" in line]
    assert table == [*suite.models, "all"] == [*(row.model for row in rows), "all"]
    assert "…" not in printed
    assert all(row.gpu_hours_train > row.gpu_hours_test > 0 for row in rows)
    assert all(
        (row.memory_gib_efficient is None) == (not suite.models[row.model].name.startswith("sunet")) for row in rows
    )
    assert ("is an upper bound" in printed) == (suite.train.amp != "none")
    assert ("as published" in printed) == (not suite.data.name.startswith("synthetic"))

"""Axes become points, and what cannot be run is refused before the first trial, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage
from tiny import tiny_config

from ablations.search import Search, search
from ablations.space import Point, Space, check_study, input_size, rungs, trial_config
from sunets.core.config import AxisConfig, ConfigError, Suite
from sunets.core.executor import Job
from sunets.data.manifest import Manifest
from sunets.training.fit import fit

DEPTHS = {"path": "model.unet_depth", "values": [1, 2, 3]}
STRIDES = {"path": "model.output_stride", "values": [16, 8]}
SCHEDULES = {"path": "model.dilation", "values": ["multi_grid", "uniform", "none"]}
RATE = {"path": "train.lr", "low": 1e-4, "high": 0.1, "log": True}


def suite(model: str = "sunet_tiny", **study: Any) -> Suite:
    return Suite.model_validate(
        {
            "benchmark": "tiny",
            "data": {"name": "synthetic"},
            "models": {"net": {"name": model}},
            "report": {"reference": "net"},
            "ablations": {"study": {"kind": "one_at_a_time", "model": "net", **study}},
        }
    )


def points(manifest: Manifest, **study: Any) -> tuple[Point, ...]:
    return check_study(Space(suite(**study), "study", manifest))


def test_one_at_a_time_is_the_base_and_each_value_alone_without_what_equals_the_base(manifest: Manifest) -> None:
    axes = [{**DEPTHS, "values": [1, [2, 2, 1], 3]}, STRIDES]
    found = points(manifest, axes=axes)
    assert [p.setting for p in found] == [
        {},
        {"model.unet_depth": 1},
        {"model.unet_depth": 3},
        {"model.output_stride": 8},
    ]
    assert [p.reference for p in found] == [True, False, False, False]
    assert found[0].arm == {"model.unet_depth": [2, 2, 1], "model.output_stride": 16}
    assert found[3].arm == {"model.unet_depth": [2, 2, 1], "model.output_stride": 8}


@pytest.mark.parametrize(
    ("axis", "message"),
    [({"path": "train.augment.scale", "values": [None, [0.5, 2]]}, "needs train.augment.crop"),
     ({"path": "train.augment.resized_crop", "values": [None, 32]}, "for classification")],
)  # fmt: skip
def test_a_setting_whose_images_cannot_be_batched_is_refused(
    manifest: Manifest, axis: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"ablations\.study: {axis['path']}=.*{message}"):
        points(manifest, axes=[axis])


def test_every_setting_must_fit_the_weights_that_it_starts_from(manifest: Manifest, tmp_path: Path) -> None:
    trained = fit(tiny_config(model__width=8), manifest, work_dir=tmp_path)
    axes = [{"path": "model.width", "values": [8, 4]}]
    overrides = {"train.init_from": str(trained.weights_path), "model.width": 8}
    with pytest.raises(ConfigError, match=r"ablations\.study: model\.width=4: .*does not fit"):
        check_study(Space(suite("plain_conv_small", axes=axes, overrides=overrides), "study", manifest))


@pytest.mark.parametrize("group", ["axes", "nuisance"])
def test_a_range_of_whole_numbers_is_refused(group: str) -> None:
    axis = {"path": "train.batch_size", "low": 8, "high": 32}
    kind = {"axes": {"kind": "search", "axes": [axis]}, "nuisance": {"kind": "tuned", "axes": [DEPTHS], group: [axis]}}
    tree = suite(axes=[DEPTHS]).model_dump(mode="json")
    tree["ablations"]["study"] |= {"trials": 2, **kind[group]}
    with pytest.raises(ConfigError, match=rf"ablations\.study\.{group}: train\.batch_size: whole numbers; give values"):
        Suite.checked(tree, "file")


@pytest.mark.parametrize("kind", ["tuned", "search"])
def test_trainings_on_other_seeds_start_from_the_weights_of_the_first(kind: str) -> None:
    sections: dict[str, Any] = {"search": {"axes": [RATE]}, "tuned": {"axes": [DEPTHS], "nuisance": [RATE]}}
    made = suite(kind=kind, trials=1, seeds=[3, 4], **sections[kind])
    for overrides, path in (({}, "a/{}.pt"), ({"train.init_from": "b/{seed}.pt"}, "b/{}.pt")):
        tree = made.model_dump(mode="json")
        tree["train"]["init_from"] = "a/{seed}.pt"
        tree["ablations"]["study"]["overrides"] = overrides
        for seed, start in ((3, 3), (4, 4), (100, 3), (0, 3)):
            config = trial_config(Suite.model_validate(tree), "study", {"train.lr": 0.01}, seed)
            assert (config.seed, config.train.init_from) == (seed, path.format(start))


def test_overrides_move_the_base_even_along_an_axis(manifest: Manifest) -> None:
    found = points(manifest, axes=[STRIDES, SCHEDULES], overrides={"model.output_stride": 8})
    assert [list(p.arm.values()) for p in found] == [[8, "multi_grid"], [16, "multi_grid"], [8, "uniform"], [8, "none"]]
    assert (
        trial_config(suite(axes=[STRIDES], overrides={"model.output_stride": 8}), "study", {}, 0).model.output_stride
        == 8
    )


@pytest.mark.slow
def test_a_grid_is_the_product_and_trains_no_network_twice(manifest: Manifest) -> None:
    found = points(manifest, kind="grid", axes=[STRIDES, SCHEDULES])
    assert [list(p.arm.values()) for p in found] == [
        [16, "multi_grid"],
        [8, "multi_grid"],
        [8, "uniform"],
        [8, "none"],
    ]
    # At the natural stride no stage is dilated, whatever the schedule.
    assert [list(arm.values()) for arm in found[0].same_as] == [[16, "uniform"], [16, "none"]]
    assert [p.reference for p in found] == [True, False, False, False]
    assert len(points(manifest, kind="grid", axes=[DEPTHS, {"path": "train.lr", "values": [0.1, 0.01]}])) == 6


@pytest.mark.slow
def test_a_grid_without_the_base_is_compared_to_what_is_nearest_to_it(manifest: Manifest) -> None:
    found = points(manifest, kind="grid", axes=[DEPTHS, {"path": "train.batch_size", "values": [4, 16]}])
    assert [list(p.arm.values()) for p in found if p.reference] == [[1, 16]]


@pytest.mark.slow
def test_any_path_of_model_or_recipe_is_an_axis(manifest: Manifest) -> None:
    axes = [
        {"path": "model.skip", "values": ["sum"]},
        {"path": "model.head", "values": ["degridding"]},
        {"path": "model.width", "values": [8]},
        {"path": "train.augment.flip", "values": [False]},
        {"path": "train.betas", "values": [[0.8, 0.99]]},
    ]
    found = points(manifest, axes=axes)
    assert len(found) == 6
    assert trial_config(suite(axes=axes), "study", found[5].setting, 3).train.betas == (0.8, 0.99)


def test_a_search_space_has_the_base_as_its_one_point(manifest: Manifest) -> None:
    found = points(manifest, kind="search", trials=3, axes=[DEPTHS, {**RATE}])
    assert [(p.setting, p.reference) for p in found] == [({}, True)]
    assert found[0].arm == {"model.unet_depth": [2, 2, 1], "train.lr": 3e-3}


def test_identity_looks_at_what_is_trained_and_not_at_how_it_is_written(manifest: Manifest) -> None:
    space = Space(suite(axes=[DEPTHS]), "study", manifest)
    same: list[dict[str, Any]] = [
        {},
        {"model.unet_depth": [2, 2, 1]},
        {"model.dilation": "none"},
        {"model.output_stride": 16},
    ]
    assert len({space.identity(s) for s in same}) == 1
    assert space.identity({"model.skip": "sum"}) != space.identity({})


LEVELS = {"path": "model.unet_depth", "values": [[1, 1, 1], [2, 2, 2]]}
LARGE = {"model.unet_depth": 1, "train.augment": {"crop": [64, 64]}}
IMAGES = {"path": "train.micro_batch_size", "values": [None, 1]}


@pytest.mark.parametrize("kind", ["search", "tuned"])
def test_a_combination_that_cannot_be_trained_is_drawn_anew(kind: str, manifest: Manifest) -> None:
    # With one image, two levels leave a BatchNorm of the last stage a single value per channel; each alone is possible.
    shared: dict[str, Any] = {"trials": 8, "overrides": LARGE}
    sections: dict[str, Any] = {"search": {"axes": [LEVELS, IMAGES]}, "tuned": {"axes": [LEVELS], "nuisance": [IMAGES]}}
    space = Space(suite(kind=kind, **shared, **sections[kind]), "study", manifest)
    if kind == "tuned":
        check_study(space)
    impossible = {"model.unet_depth": [2, 2, 2], "train.micro_batch_size": 1, "seed": 100}
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: with one image per forward pass"):
        space.identity(impossible)
    axes = {axis["path"]: AxisConfig.model_validate(axis) for axis in (LEVELS, IMAGES)}
    spec = Search("s", {"score": "maximize"}, axes, fixed={"seed": 100}, trials=8, batch=8, seed=0)
    jobs = next(search(spec, InMemoryStorage(), lambda n, setting, until: Job("j", "m:f", setting, {}), space.identity))
    assert len(jobs) == 3, "those of the four combinations that can be trained"
    assert impossible not in [job.arguments for job in jobs]


def test_an_arm_that_no_recipe_fits_is_refused_before_any_training(manifest: Manifest) -> None:
    study: dict[str, Any] = {"kind": "tuned", "trials": 1, "overrides": LARGE, "axes": [LEVELS]}
    with pytest.raises(
        ConfigError, match=r"ablations\.study: model\.unet_depth=\[2, 2, 2\].*no other value of nuisance"
    ):
        points(manifest, **study, nuisance=[{**IMAGES, "values": [1]}])
    assert len(points(manifest, **study, nuisance=[{**IMAGES, "values": [1, 2]}])) == 2


def test_drawn_recipes_read_the_weights_they_start_from_once(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = fit(tiny_config(model__width=8), manifest, work_dir=tmp_path)
    overrides = {"train.init_from": str(trained.weights_path), "model.width": 8}
    axes = [{"path": "train.lr", "values": [0.1, 0.2]}]
    space, read = Space(suite("plain_conv_small", axes=axes, overrides=overrides), "study", manifest), []
    monkeypatch.setattr("ablations.space.check", lambda *arguments: read.append(arguments))
    assert len({space.identity({"train.lr": rate}) for rate in (0.1, 0.2)}) == 2
    assert len(read) == 1


def test_a_network_of_the_baselines_written_out_is_the_base(manifest: Manifest) -> None:
    made = suite("dilated_resnet_small", axes=[{"path": "model.width", "values": [16, 24]}])
    found = check_study(Space(made, "study", manifest))
    assert [p.arm["model.width"] for p in found] == [16, 24]


def test_the_smallest_image_counts(manifest: Manifest) -> None:
    def size(**augment: Any) -> tuple[int, int]:
        config = trial_config(suite(axes=[DEPTHS], overrides={"train.augment": augment}), "study", {}, 0)
        return input_size(config, manifest)

    assert size() == (32, 32)
    assert size(crop=[24, 48]) == (24, 48)
    assert size(resized_crop=64) == (64, 64)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            {"axes": [{**DEPTHS, "values": [1, 5]}]},
            r"ablations\.study: model\.unet_depth=5: cannot be built sensibly for 32 x 32 pixels: level 5 .* single "
            r"feature \(1 x 1; the first receives 8 .*largest useful unet_depth is 3",
        ),
        ({"axes": [{**DEPTHS, "values": [[2, 2, 4]]}]}, r"unet_depth=\[2, 2, 4\]: .*largest useful unet_depth is 1"),
        ({"axes": [{**DEPTHS, "values": [6]}]}, r"model\.unet_depth=6: unet_depth: an integer from 1 to 5, not 6"),
        ({"axes": [{"path": "model.unet_deph", "values": [1]}]}, r"study: .*unknown key 'model\.unet_deph'"),
        ({"axes": [{"path": "train.lr", "values": [-1]}]}, r"ablations\.study: train\.lr=-1: .*greater than 0"),
        ({"axes": [{"path": "data.seed", "values": [1]}]}, r"study\.axes: data\.seed: .* below model or train"),
        ({"axes": [DEPTHS], "overrides": {"seed": 1}}, r"ablations\.study\.overrides: seed"),
        ({"axes": [DEPTHS], "overrides": {"train.epoch": 1}}, r"ablations\.study: overrides: .*'train\.epoch'"),
        (
            {"kind": "tuned", "axes": [DEPTHS], "nuisance": [{**RATE, "path": "train.beta", "high": 2}], "trials": 1},
            r"ablations\.study: train\.beta=0\.0001: .*unknown key",
        ),
        (
            {"kind": "tuned", "axes": [{"path": "train.lr", "values": [1]}], "nuisance": [RATE], "trials": 1},
            r"nuisance: train\.lr: is an axis already",
        ),
        ({"axes": [DEPTHS], "overrides": {"train.augment": {"crop": [15, 64]}}}, r"ablations\.study: .*or equal to 16"),
        ({"axes": [DEPTHS], "overrides": {"train.class_weights": [1, 2]}}, r"train\.class_weights: 3 values"),
        ({"axes": [{"path": "train.class_weights", "values": [[1, 2]]}]}, r"train\.class_weights=.*: 3 values, one"),
        (
            {"axes": [{"path": "train.micro_batch_size", "values": [1, 2]}]},
            r"ablations\.study: train\.micro_batch_size=1: train\.micro_batch_size: with one image per forward pass",
        ),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_by_name(study: dict[str, Any], message: str, manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=message):
        points(manifest, **study)


TUNED: dict[str, Any] = {"kind": "tuned", "axes": [DEPTHS], "nuisance": [RATE], "trials": 1}


@pytest.mark.parametrize(
    ("overrides", "given", "expected"),
    [
        ({"train.epochs": 6}, {}, (3,)),
        ({"train.epochs": 6, "train.warmup_epochs": 2.5}, {}, (4,)),
        ({"train.epochs": 6, "train.validate_every": 4}, {}, (4,)),
        ({"train.epochs": 6, "train.validate_every": 3}, {}, (3,)),
        ({"train.epochs": 3, "train.validate_every": 3}, {}, ()),
        ({"train.epochs": 1}, {}, ()),
        ({"train.epochs": 9}, {"rungs": [2, 4]}, (2, 4)),
        ({"train.epochs": 9}, {"rungs": []}, ()),
        ({"train.epochs": 9}, {"pruning": False}, ()),
    ],
)
def test_rungs_are_validated_epochs_after_the_warm_up(
    overrides: dict[str, Any], given: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert rungs(suite(**TUNED, overrides=overrides, **given), "study", {}) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "given", "message"),
    [
        ({"train.epochs": 6}, [6], r"ablations\.study\.rungs: 6: .* before the last, .* warm-up: 1, 2, 3, 4, 5$"),
        ({"train.epochs": 6, "train.warmup_epochs": 1}, [1], r"rungs: 1: .*: 2, 3, 4, 5$"),
        ({"train.epochs": 6, "train.validate_every": 2}, [3], r"rungs: 3: .*: 2, 4$"),
        ({"train.epochs": 1}, [1], "rungs: 1: .*there is none here$"),
    ],
)
def test_rungs_that_cannot_be_are_refused_before_any_training(
    overrides: dict[str, Any], given: list[int], message: str, manifest: Manifest
) -> None:
    with pytest.raises(ConfigError, match=message):
        points(manifest, **TUNED, overrides=overrides, rungs=given)


@pytest.mark.parametrize("given", [[2, 1], [0, 1], [2, 2]])
def test_rungs_rise(given: list[int]) -> None:
    with pytest.raises(ValueError, match=r"rungs: rising epochs from 1"):
        suite(**TUNED, rungs=given)


def test_an_empty_axis_and_an_unknown_study_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=r"(?s)ablations\.study\.axes\.0.*model\.width: the axis is empty"):
        suite(axes=[{"path": "model.width", "values": []}])
    with pytest.raises(ConfigError, match="depth: no such study; there are study"):
        check_study(Space(suite(axes=[DEPTHS]), "depth", manifest))


def test_depths_that_see_more_than_one_feature_somewhere_are_allowed(manifest: Manifest) -> None:
    # Natural stride 16 at 32 pixels: stages of 8, 4 and 2 features a side; three levels are useful in the first.
    assert len(points(manifest, axes=[{**DEPTHS, "values": [1, 2, 3]}])) == 4
    # A dilated stage keeps its side of 8, so that no level of it is ever left with a single feature.
    deep = {"path": "model.unet_depth", "values": [5]}
    overrides = {"model.output_stride": 4, "model.dilation": "none"}
    assert len(points(manifest, axes=[deep], overrides=overrides)) == 2

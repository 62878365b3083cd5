"""Points of a study's axes, each checked before the first trial.

An axis is a dotted path and its values. One check depends on the meaning of an axis: U-Net levels that receive a single
feature are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sunets.core.config import AxisConfig, Config, ConfigError, StudyConfig, Suite, fingerprint
from sunets.data.manifest import Manifest
from sunets.models.structure import SUNetConfig, count_kept_pools, dilation_schedule
from sunets.models.sunet import SUNet
from sunets.models.zoo import create_model, resolve_config
from sunets.training.fit import check, check_config
from sunets.training.recipe import check_batch_norm, input_size

Size = tuple[int, int]
Arm = dict[str, Any]
"""Dotted path of every axis -> value."""

SECTIONS = ("model.", "train.")
"""What may vary within a study: the data are prepared once, and all trials are scored alike."""
MAX_CORNERS = 256
"""Most settings of a sampled space that are checked before the search, which draws anew where another is impossible."""


@dataclass(frozen=True)
class Point:
    """One setting of the axes."""

    setting: Arm
    """Paths that differ from the study's base, and their values."""
    arm: Arm
    """Value of every axis, as the network is built."""
    same_as: tuple[Arm, ...] = ()
    """Other settings of the axes that are the same training, and are therefore not run."""
    reference: bool = False
    """Whether differences are taken to this point: the base, or the point nearest to it."""


def study_config(suite: Suite, name: str) -> StudyConfig:
    """Look up a study.

    Raises:
        ConfigError: there is no study of that name.
    """
    if name not in suite.ablations:
        known = ", ".join(suite.ablations) or "none; add one under `ablations` in the parameter file"
        raise ConfigError(f"{name}: no such study; there are {known}")
    return suite.ablations[name]


def trial_config(suite: Suite, name: str, setting: Arm, seed: int) -> Config:
    """Build the configuration of one trial.

    `{seed}` in `train.init_from` is replaced by the first of the study's seeds where the seed is none of them, as those
    of tuning, of which no file exists.

    Raises:
        ConfigError: an unknown path or a value that is not allowed; names the study.
    """
    study = study_config(suite, name)
    values = {**study.overrides, **setting}
    try:
        if seed not in study.seeds:
            values["train.init_from"] = suite.config(study.model, study.seeds[0], values).train.init_from
        return suite.config(study.model, seed, values)
    except ConfigError as error:
        raise ConfigError(f"ablations.{name}: {_shown(setting) or 'overrides'}: {error}") from None


def check_study(space: Space) -> tuple[Point, ...]:
    """Check a study and list its points.

    Returns:
        one_at_a_time: the base, and each value of each axis alone. grid, tuned: the product of all axes. search: the
        base. Settings that are the same training are one point.

    Raises:
        ConfigError: an unknown path, a value that is not allowed, a network that cannot be built or would have useless
            levels; names study, key and value.
    """
    study, name = space.study, space.name
    for group in ("axes", "nuisance"):
        for axis in getattr(study, group):
            if not axis.path.startswith(SECTIONS):
                raise ConfigError(f"ablations.{name}.{group}: {axis.path}: an axis is a path below model or train")
    if clash := {a.path for a in study.axes} & {a.path for a in study.nuisance}:
        raise ConfigError(f"ablations.{name}.nuisance: {', '.join(sorted(clash))}: is an axis already")
    for path in study.overrides:
        if not path.startswith((*SECTIONS, "evaluate.")):
            raise ConfigError(f"ablations.{name}.overrides: {path}: a path below model, train or evaluate is expected")

    check(space.config({}), space.manifest)
    for axis in [*study.axes, *study.nuisance]:
        for value in axis_values(axis):  # each alone first: an error then names one key
            space.run_once({axis.path: value})
    if study.kind == "search":
        sides = [axis_values(axis) for axis in study.axes]
        for corner in itertools.islice(itertools.product(*sides), MAX_CORNERS):
            space.check_recipe(_setting(study.axes, corner))
        return (Point({}, space.arm({}), reference=True),)

    settings: Iterable[Arm]
    if study.kind == "one_at_a_time":
        settings = [{}, *({axis.path: value} for axis in study.axes for value in axis.values)]
    else:
        settings = (_setting(study.axes, values) for values in itertools.product(*(a.values for a in study.axes)))
    points: dict[str, Point] = {}
    for setting in settings:
        rungs(space.suite, name, setting)
        arm, key = space.arm(setting), space.identity(setting)
        if study.kind == "tuned":
            _check_tuned(space, setting)
        if key not in points:
            points[key] = Point(setting, arm)
        elif arm != points[key].arm:
            points[key] = dataclasses.replace(points[key], same_as=(*points[key].same_as, arm))
    return _with_reference(points, space.identity({}), space.arm({}))


def rungs(suite: Suite, name: str, setting: Arm) -> tuple[int, ...]:
    """List the epochs at which the trials of a tuned arm are compared, and poor ones stopped.

    Raises:
        ConfigError: an epoch that is not validated, is too close to the warm-up, or differs within the arm.
    """
    study, train = suite.ablations[name], trial_config(suite, name, setting, 0).train
    if study.kind != "tuned" or not study.pruning:
        return ()
    possible = [
        e for e in range(train.validate_every, train.epochs, train.validate_every) if e >= train.warmup_epochs + 1
    ]
    if {"train.epochs", "train.warmup_epochs", "train.validate_every"} & {axis.path for axis in study.nuisance}:
        possible = []
    if study.rungs is None:
        return tuple(e for e in possible if 2 * e >= train.epochs)[:1]
    if invalid := [rung for rung in study.rungs if rung not in possible]:
        raise ConfigError(
            f"ablations.{name}.rungs: {invalid[0]}: a rung is a validated epoch before the last, a whole epoch after "
            f"the warm-up: {', '.join(map(str, possible)) or 'there is none here'}"
        )
    return study.rungs


def most_jobs(study: StudyConfig, points: int) -> int:
    """Return how many trainings of a study can run at a time, in the phase that has most."""
    seeds, batch = len(study.seeds), min(study.batch, study.trials)
    if study.kind == "search":
        return max(batch, (1 + study.confirm) * seeds)
    if study.kind == "tuned":
        return points * max(batch, min(study.confirm, study.trials) * (seeds - 1), seeds)
    return points * seeds


def axis_values(axis: AxisConfig) -> tuple[Any, ...]:
    """Return an axis's values; of a range, its ends."""
    return axis.values or (axis.low, axis.high)


@dataclass(frozen=True)
class Space:
    """Settings of a study as configurations, and as networks without memory (on the meta device)."""

    suite: Suite
    name: str
    manifest: Manifest
    built: dict[str, nn.Module] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)
    """Networks whose weights of `train.init_from` were found to fit, so that no draw reads them again."""

    @property
    def study(self) -> StudyConfig:
        """Return the study's parameters."""
        return study_config(self.suite, self.name)

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        """Return the training seeds by which recipes are chosen: as many as the study's seeds, and none of them."""
        fresh = (seed for seed in itertools.count(self.study.tuning_seed) if seed not in self.study.seeds)
        return tuple(itertools.islice(fresh, len(self.study.seeds)))

    def config(self, setting: Arm) -> Config:
        """Build the configuration of a setting, whose key `seed` (default 0) is that of the training."""
        paths = {path: value for path, value in setting.items() if path != "seed"}
        return trial_config(self.suite, self.name, paths, setting.get("seed", 0))

    def network(self, setting: Arm) -> nn.Module:
        """Build a setting's network.

        Raises:
            ConfigError: it cannot be built, or has useless levels.
        """
        config = self.config(setting)
        key = fingerprint(config.model, input_size(config, self.manifest))
        if key not in self.built:
            with self._naming(setting), torch.device("meta"), _WithoutDrawing():
                model = create_model(
                    **{k: v for k, v in config.model.arguments().items() if k != "weights"},
                    task=self.manifest.task,
                    num_classes=self.manifest.num_classes,
                )
                if isinstance(model, SUNet):
                    _refuse_useless_levels(model.config, input_size(config, self.manifest))
            self.built[key] = model
        return self.built[key]

    def run_once(self, setting: Arm) -> None:
        """Run a setting's network on an image of the data's size, without computing anything.

        Raises:
            ConfigError: the forward pass fails.
        """
        self.check_recipe(setting)
        model, config = self.network(setting).eval(), self.config(setting)
        with self._naming(setting), torch.no_grad():
            model(torch.empty(1, config.model.in_channels or 3, *input_size(config, self.manifest), device="meta"))

    def check_recipe(self, setting: Arm) -> None:
        """Check a setting's recipe against the data, the machine and its network.

        Raises:
            ConfigError: the setting cannot be trained.
        """
        config, network = self.config(setting), self.network(setting)
        start = fingerprint(config.model, config.train.init_from)
        with self._naming(setting):
            if config.train.init_from and start not in self.started:
                check(config, self.manifest)
                self.started.add(start)
            else:  # the same without its network's weights
                check_config(config, self.manifest)
                check_batch_norm(network, config, self.manifest)

    @contextlib.contextmanager
    def _naming(self, setting: Arm) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"ablations.{self.name}: {_shown(setting) or 'the base'}: {reason}") from None

    def arm(self, setting: Arm) -> Arm:
        """Return the value of every axis in a setting."""
        return self._values(setting, self.study.axes)

    def recipe_of_base(self) -> Arm | None:
        """Return the base's values of what is tuned within each arm; None where one lies outside its axis."""
        recipe = self._values({}, self.study.nuisance)
        return recipe if all(_on_axis(axis, recipe[axis.path]) for axis in self.study.nuisance) else None

    def _values(self, setting: Arm, axes: Iterable[AxisConfig]) -> Arm:
        """Return the values of paths in a setting; one of the network that is not given, as the network is built."""
        tree, structure = self.config(setting).model_dump(mode="json"), cast(Any, self.network(setting)).structure
        values = {}
        for axis in axes:
            value = _at(tree, axis.path)
            if value is None and axis.path.startswith("model."):
                value = structure.get(axis.path.removeprefix("model."))
            values[axis.path] = list(value) if isinstance(value, tuple) else value
        return values

    def identity(self, setting: Arm) -> str:
        """Return the digest of a setting's training; settings of the same network and recipe have the same.

        Raises:
            ConfigError: the setting cannot be trained.
        """
        self.check_recipe(setting)
        tree, network = self.config(setting).model_dump(mode="json"), self.network(setting)
        if isinstance(network, SUNet):
            structure = dataclasses.asdict(network.config) | {"dilation": dilation_schedule(network.config)}
            tree["model"] = {"sunet": structure, "weights": tree["model"]["weights"]}
        else:
            tree["model"] = resolve_config(self.config(setting)).model.model_dump(mode="json")
        return fingerprint(tree)


class _WithoutDrawing(TorchFunctionMode):
    """Skips the drawing of initial weights, which has no effect on the meta device and takes most of the time."""

    drawing = (Tensor.normal_, Tensor.uniform_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.drawing else func(*args, **(kwargs or {}))


def _check_tuned(space: Space, setting: Arm) -> None:
    """Check that an arm has a recipe to draw, at least where few values tell.

    Raises:
        ConfigError: the network can be trained with none.
    """
    corners = itertools.product(*(axis_values(axis) for axis in space.study.nuisance))
    faults = []
    for corner in itertools.islice(corners, MAX_CORNERS):
        try:
            space.check_recipe(setting | _setting(space.study.nuisance, corner))
            break
        except ConfigError as error:
            faults.append(error)
    else:
        # Of more, others may be possible, which the draws find out.
        if next(corners, None) is None:
            raise ConfigError(f"{faults[0]}; no other value of nuisance is possible there either")


def _with_reference(points: dict[str, Point], base_key: str, base_arm: Arm) -> tuple[Point, ...]:
    def nearness(key: str) -> int:
        return sum(points[key].arm[path] == value for path, value in base_arm.items())

    chosen = base_key if base_key in points else max(points, key=nearness)
    reference = dataclasses.replace(points[chosen], reference=True)
    if chosen == base_key:  # written as the base is, it has the fingerprint of the benchmark's training
        reference = dataclasses.replace(reference, setting={})
    if base_arm in reference.same_as:  # several settings are the base: name it as the base does
        others = [arm for arm in (reference.arm, *reference.same_as) if arm != base_arm]
        reference = dataclasses.replace(reference, arm=base_arm, same_as=tuple(others))
    return tuple(reference if key == chosen else point for key, point in points.items())


def _setting(axes: Sequence[AxisConfig], values: Sequence[Any]) -> Arm:
    return {axis.path: value for axis, value in zip(axes, values, strict=True)}


def _shown(setting: Arm) -> str:
    return ", ".join(f"{path}={list(v) if isinstance(v, tuple) else v}" for path, v in setting.items())


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def _on_axis(axis: AxisConfig, value: Any) -> bool:
    if axis.values:
        return value in axis.values
    return isinstance(value, int | float) and cast(float, axis.low) <= value <= cast(float, axis.high)


def _refuse_useless_levels(config: SUNetConfig, size: Size) -> None:
    """Refuse a depth whose last level receives a single feature in every stage that has it.

    Raises:
        ValueError: names the level and the largest useful depth.
    """
    depths = cast(tuple[int, ...], config.unet_depth)
    kept_pools = count_kept_pools(config)
    stages = []  # (side of the features, whether levels halve it) of each stage
    for stage, rates in enumerate(dilation_schedule(config)):
        halvings = 2 + min(stage, kept_pools)
        stages.append((-(-max(size) // 2**halvings), rates is None))

    def side(stage: int, level: int) -> int:
        """Return the longer side of what a level of a stage receives."""
        features, strided = stages[stage]
        return -(-features // 2**level) if strided else features

    for depth in sorted(set(depths) - {1}):
        deep = [stage for stage, levels in enumerate(depths) if levels >= depth]
        if all(side(stage, depth - 1) == 1 for stage in deep):
            useful = max(sum(side(stage, level) > 1 for level in range(depth)) for stage in deep)
            raise ValueError(
                f"cannot be built sensibly for {size[0]} x {size[1]} pixels: level {depth} of its U-Nets receives a "
                f"single feature (1 x 1; the first receives {stages[deep[0]][0]} on the longer side) and computes "
                f"nothing spatial; the largest useful unet_depth is {max(1, useful)}"
            )

"""Sections of the parameter file that search: the tuning of recipes and the ablation studies."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sunets.core.sections import Section, Seed


class AxisConfig(Section):
    """One axis of an ablation: a dotted path of the configuration and its values."""

    path: str
    """Dotted path, such as model.unet_depth."""
    values: tuple[Any, ...] = ()
    """Settings to compare (a grid), or the choices of a sampled parameter."""
    low: float | None = None
    """Lower bound of a sampled continuous parameter."""
    high: float | None = None
    """Upper bound of a sampled continuous parameter."""
    log: bool = False
    """Sample on a logarithmic scale."""

    @model_validator(mode="after")
    def _values_or_range(self) -> Self:
        if self.values and (self.low is not None or self.high is not None):
            raise ValueError(f"values: {self.path}: give either values or low and high, not both")
        if not self.values:
            if self.low is None or self.high is None:
                raise ValueError(f"values: {self.path}: the axis is empty; give values, or low and high")
            if not self.low < self.high:
                raise ValueError(f"low: less than high ({self.high}), not {self.low}")
            if self.log and self.low <= 0:
                raise ValueError(f"low: above 0 on a logarithmic scale, not {self.low}")
        if len({json.dumps(v) for v in self.values}) < len(self.values):
            raise ValueError(f"values: {self.path}: a value occurs twice")
        return self


class TuneConfig(Section):
    """Tuning of every model's recipe before its trainings, with equal effort, on the validation split."""

    trials: int = Field(0, ge=0, le=1_000_000)
    """Recipes tried per model: that of the parameter file, its other combinations of the axes with values if all fit,
    then drawn ones; 0 disables tuning."""
    epochs: int | None = Field(None, ge=1, le=1_000_000)
    """Epochs of a trial; None takes those of the training."""
    batch: int = Field(4, ge=1, le=10_000)
    """Recipes drawn at once, from the results of earlier batches; see `batch` of a study."""
    seed: Seed = 0
    """Seed of the sampler, from which the training seed that all trials share is derived."""
    space: tuple[AxisConfig, ...] = ()
    """Sampled axes, with paths below `train`; a key set in a model's `train` is not tuned for that model."""

    @model_validator(mode="after")
    def _space_is_a_recipe(self) -> Self:
        paths = [axis.path for axis in self.space]
        if self.trials and not paths:
            raise ValueError("space: at least one axis, or trials: 0")
        if len(set(paths)) < len(paths):
            raise ValueError("space: a path occurs twice")
        for path in paths:
            if not path.startswith("train.") or path in ("train.epochs", "train.init_from"):
                raise ValueError(f"space: a path below train, neither epochs nor init_from, not {path}")
        return self


class StudyConfig(Section):
    """One ablation study."""

    kind: Literal["one_at_a_time", "grid", "tuned", "search"]
    """one_at_a_time, grid: every point once per seed. tuned: nuisances sampled per arm. search: two objectives."""
    model: str
    """Key under `models` that every point starts from."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted paths fixed for the whole study, such as train.epochs."""
    axes: tuple[AxisConfig, ...]
    """Axes that are varied."""
    nuisance: tuple[AxisConfig, ...] = ()
    """tuned: axes sampled within each arm, such as train.lr."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Training seeds of every point (grids) or of the confirmation (tuned, search)."""
    trials: int = Field(0, ge=0, le=1_000_000)
    """tuned: trials per arm; search: trials in all."""
    batch: int = Field(4, ge=1, le=10_000)
    """tuned, search: settings drawn at once, from the results of earlier batches. Unlike the number of workers, it
    affects the trials: a larger batch keeps more workers busy, a smaller one lets the sampler learn more often."""
    search_seed: Seed = 0
    """Seed of the sampler."""
    tuning_seed: Seed = 100
    """Training seed of trials that search; never one of `seeds`. Recipes of tuned arms are chosen by it and the ones
    after it."""
    confirm: int = Field(3, ge=1)
    """tuned: best recipes of an arm that are trained on as many tuning seeds as there are `seeds`; the one with the
    best mean validation score is trained again on `seeds`. 1 lets one seed choose. search: best points that are trained
    again on `seeds`."""
    pruning: bool = True
    """tuned: stop trials whose validation score at a rung is below the median of all that got there."""
    rungs: tuple[int, ...] | None = None
    """tuned: epochs at which trials are pruned; each is validated and at least one epoch after the warm-up. None takes
    the first such epoch of the second half."""

    @model_validator(mode="after")
    def _kind_fits(self) -> Self:
        if not self.axes:
            raise ValueError("axes: at least one axis")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError("seeds: at least one, each once")
        for group in ("axes", "nuisance"):
            paths = [a.path for a in getattr(self, group)]
            if len(set(paths)) < len(paths):
                raise ValueError(f"{group}: a path occurs twice")
        if self.kind in ("one_at_a_time", "grid", "tuned") and any(not a.values for a in self.axes):
            raise ValueError(f"axes: kind {self.kind} needs values on every axis")
        if self.kind in ("tuned", "search"):
            if self.trials < 1:
                raise ValueError(f"trials: kind {self.kind} needs at least 1")
            if self.tuning_seed in self.seeds:
                raise ValueError("tuning_seed: not one of seeds, or the confirmation would reuse it")
        if self.rungs is not None and list(self.rungs) != sorted({r for r in self.rungs if r > 0}):
            raise ValueError(f"rungs: rising epochs from 1, not {list(self.rungs)}")
        if (self.kind == "tuned") != bool(self.nuisance):
            raise ValueError("nuisance: given for kind tuned, and for no other kind")
        return self

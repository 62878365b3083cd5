"""`params.yaml` as a `Suite`, and the `Config` of one training: read, check, override, flatten, fingerprint.

A `Suite` holds all models, seeds and studies; `Suite.config` narrows it to the `Config` of one training. A YAML key is
a field of a class in `sections`, and the same dotted name is the MLflow parameter, the Optuna parameter, the key in a
record and the column of a table. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sunets.core.names import overlap, printable
from sunets.core.search_sections import AxisConfig, StudyConfig, TuneConfig
from sunets.core.sections import (
    IGNORE_INDEX,
    AugmentConfig,
    CostConfig,
    DataConfig,
    DataName,
    EvaluateConfig,
    ModelConfig,
    ModelEntry,
    Names,
    ReportConfig,
    Section,
    Seed,
    SyntheticConfig,
    Task,
    TrainConfig,
    TuningEffort,
    VariantConfig,
)

__all__ = [
    "IGNORE_INDEX",
    "NOT_IN_IDENTITY",
    "AugmentConfig",
    "AxisConfig",
    "Config",
    "ConfigError",
    "CostConfig",
    "DataConfig",
    "DataName",
    "EvaluateConfig",
    "ModelConfig",
    "ModelEntry",
    "Names",
    "ReportConfig",
    "Section",
    "Seed",
    "StudyConfig",
    "Suite",
    "SyntheticConfig",
    "Task",
    "TrainConfig",
    "TuneConfig",
    "TuningEffort",
    "VariantConfig",
    "derive_seed",
    "fingerprint",
    "flatten",
    "load",
    "override",
    "parse_yaml",
    "read_yaml",
]


NOT_IN_IDENTITY = (
    "benchmark", "evaluate.", "tune.", "data.root", "data.workers", "data.cache", "train.checkpoint_seconds",
    "train.device",
)  # fmt: skip
"""Parameters that a training's result does not depend on; the data are identified by their digest, the device by what
`train.device` resolves to."""


class ConfigError(ValueError):
    """A configuration that cannot be used: says which file and dotted key, and what is allowed."""


S = TypeVar("S", bound=Section)


class Config(Section):
    """Everything that determines one training."""

    benchmark: str
    """Name of the directory under results/ and of the MLflow experiment."""
    seed: int
    """Seed of this training: initialisation, order, augmentation."""
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    tune: TuningEffort = TuningEffort()
    """How the recipe under `train` was chosen."""


class Suite(Section):
    """The whole of `params.yaml`."""

    benchmark: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Name of the directory under results/ and of the MLflow experiment."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    """Training seeds, the same for every model, so that differences are paired."""
    data: DataConfig
    models: Annotated[dict[str, ModelEntry], Names]
    """The networks that are compared, by key."""
    train: TrainConfig = TrainConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cost: CostConfig = CostConfig()
    report: ReportConfig = ReportConfig()
    ablations: Annotated[dict[str, StudyConfig], Names] = Field({})
    """Studies by name."""
    watch: dict[Literal["files"], Literal[True]] = Field({})
    """{files: true} makes `dvc repro` look each time for changed files of `data.root` and of `train.init_from`."""
    _recipes: dict[str, tuple[dict[str, Any], TuningEffort]] = PrivateAttr({})
    _options: tuple[str, ...] = PrivateAttr(())
    _read_from: tuple[Path, tuple[str, ...]] | None = PrivateAttr(None)

    @property
    def options(self) -> tuple[str, ...]:
        """Options --params and --set with which a command reads these parameters again; empty for the defaults."""
        return self._options

    @property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Key of each model whose tuned recipe is known -> dotted path below `train` -> value."""
        return {model: dict(recipe) for model, (recipe, _) in self._recipes.items()}

    def changes(self, names: Sequence[str]) -> list[str]:
        """List the parameters of which the file has other values now than when it was read.

        Args:
            names: dotted paths, such as train or models.sunet64.

        Raises:
            ConfigError: the file cannot be read any more, or is not valid.
        """
        if self._read_from is None:  # not from a file
            return []
        now = load(*self._read_from)
        return [name for name in names if _part(self, name) != _part(now, name)]

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if not self.models:
            raise ValueError("models: at least one model")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: at least one, each once")
        if self.report.reference not in self.models:
            raise ValueError(f"report.reference: one of {', '.join(self.models)}, not {self.report.reference!r}")
        for name, study in self.ablations.items():
            if study.model not in self.models:
                raise ValueError(f"ablations.{name}.model: one of {', '.join(self.models)}, not {study.model!r}")
        searches = {"tune": self.tune.trials} | {f"ablations.{name}": s.trials for name, s in self.ablations.items()}
        if self.data.val_split == self.data.test_split and (chosen := next(filter(searches.get, searches), None)):
            raise ValueError(
                f"data.test_split: another split than val_split ({self.data.val_split}), on which {chosen} chooses; "
                f"hold images out, or set {chosen}.trials to 0"
            )
        return self

    @classmethod
    def checked(cls, tree: Any, source: str) -> Self:
        """Check the content of a parameter file as a whole, each model's and each study's own values included.

        Args:
            tree: plain values, as YAML gives them.
            source: what to call it in an error.

        Raises:
            ConfigError: one line per fault.
        """
        suite = _validate(cls, tree, source)
        seed = suite.seeds[0]
        for model in suite.models:
            suite.config(model, seed, source=f"{source}: models.{model}")
            suite._check_tuning(model, source)
        for name, study in suite.ablations.items():
            for group, axes in (("axes", study.axes), ("nuisance", study.nuisance)):
                for axis in axes:
                    for value in axis.values or (axis.low, axis.high):
                        values = study.overrides | {axis.path: value}
                        where = f"{source}: ablations.{name}.{group}"
                        _check_range(axis, suite.config(study.model, seed, values, source=where), where)
        return suite

    def config(
        self, model: str, seed: int, overrides: Mapping[str, Any] | None = None, *, source: str | None = None
    ) -> Config:
        """Return the configuration of one training.

        Later ones win: `train`, the recipe that the model's tuning chose (once `sunets.core.recipes.tuned` has read
        it), the model's own `train`, overrides.

        Args:
            model: key under `models`.
            seed: training seed.
            overrides: dotted paths of `Config` and their values, such as {"train.lr": 0.1}.
            source: where the overrides stand, for an error; the model by default.

        Raises:
            ConfigError: unknown key, unknown path or a value that is not allowed.
        """
        if model not in self.models:
            raise ConfigError(f"models.{model}: no such key; there are {', '.join(self.models)}")
        entry = self.models[model]
        recipe, effort = self._recipes.get(model, ({}, TuningEffort()))
        config = Config(
            benchmark=self.benchmark,
            seed=seed,
            data=self.data,
            model=ModelConfig(**{k: getattr(entry, k) for k in ModelConfig.model_fields}),
            train=self.train,
            evaluate=self.evaluate,
            tune=effort,
        )
        values = recipe | {f"train.{k}": v for k, v in entry.train.items()} | dict(overrides or {})
        start = values.get("train.init_from", self.train.init_from)
        if isinstance(start, str):
            values["train.init_from"] = start.replace("{model}", model).replace("{seed}", str(seed))
        return override(config, values, source=source or f"models.{model}")

    def with_recipe(self, model: str, recipe: Mapping[str, Any], effort: TuningEffort) -> Self:
        """Return a copy whose trainings of a model have a tuned recipe.

        Args:
            model: key under `models`.
            recipe: dotted paths below `train` and their values.
            effort: what was spent on it.
        """
        copy = self.model_copy()
        copy._recipes = {**self._recipes, model: (dict(recipe), effort)}
        return copy

    def free_axes(self, model: str) -> list[AxisConfig]:
        """Return the axes of `tune.space` whose value the model's own `train` leaves open."""
        fixed = tuple(f"train.{key}." for key in self.models[model].train)
        return [axis for axis in self.tune.space if not f"{axis.path}.".startswith(fixed)]

    def _check_tuning(self, model: str, source: str) -> None:
        """Check the values of a model's tuning.

        Raises:
            ConfigError: a value is not allowed, or the recipe of the parameter file, which is tried first, lies outside
                of the space.
        """
        if not self.tune.trials:
            return
        epochs = {"train.epochs": self.tune.epochs} if self.tune.epochs else {}
        base = flatten(self.config(model, 0, epochs, source=f"{source}: models.{model}, with tune.epochs"))
        for axis in self.free_axes(model):
            ends = [epochs | {axis.path: value} for value in axis.values or (axis.low, axis.high)]
            configs = [self.config(model, 0, end, source=f"{source}: tune.space") for end in ends]
            _check_range(axis, configs[0], f"{source}: tune.space")
            allowed = [flatten(config) for config in configs]
            if axis.path not in base:
                raise ConfigError(f"{source}: tune.space: {axis.path}: a section, not a value; name a key of it")
            value, values = base[axis.path], [tree[axis.path] for tree in allowed]
            if value not in values and (axis.values or value is None or not values[0] < value < values[1]):
                raise ConfigError(
                    f"{source}: tune.space: {axis.path}: {value}, with which models.{model} is tried first, lies "
                    "outside; widen the space, leave the key out of it, or set tune.trials to 0"
                )


def _check_range(axis: AxisConfig, config: Config, source: str) -> None:
    """Refuse a range of whole numbers, of which a sampler would draw fractions."""
    value = flatten(config).get(axis.path)
    if axis.low is not None and isinstance(value, int):
        raise ConfigError(f"{source}: {axis.path}: whole numbers; give values instead of low and high")


def override(config: S, values: Mapping[str, Any], *, source: str = "override") -> S:
    """Return a copy of `config` with values replaced by dotted path, checked again as a whole.

    Raises:
        ConfigError: the path does not exist, or the value is not allowed; names both.
    """
    tree = config.model_dump(mode="json")
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node: Any = tree
        for depth, key in enumerate(parents):
            if not isinstance(node, dict) or key not in node:
                raise ConfigError(f"{source}: {'.'.join(parents[: depth + 1])!r} in {path!r} is no key")
            node = node[key]
        if not isinstance(node, dict) or leaf not in node:
            allowed = ", ".join(sorted(node)) if isinstance(node, dict) else "none"
            raise ConfigError(f"{source}: unknown key {path!r}; there are {allowed}")
        node[leaf] = value
    return _validate(type(config), tree, source)


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file as DVC reads it: UTF-8, YAML 1.2, no key twice in one mapping.

    Returns:
        Dicts, lists and scalars.

    Raises:
        ConfigError: names the file, the line and the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such file; run from the root of the checkout, or name one with --params")
    if not path.is_file():
        raise ConfigError(f"{path}: not a regular file; name a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text by the rules of `read_yaml`.

    Args:
        text: the YAML.
        source: what to call it in an error.

    Raises:
        ConfigError: names the source, the line and the remedy.
    """
    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        key = re.search(r'duplicate key "(.*?)"', error.problem)
        raise ConfigError(
            f"{source}: line {line}: the key {key[1] if key else ''!r} occurs twice in one mapping; remove one of them"
        ) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{source}: {where}not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    _check_plain(tree, source, [])
    return tree


def _check_plain(node: Any, source: str, above: list[int]) -> None:
    """Refuse what JSON cannot hold (dates, sets) and an alias inside its own value: no walk over such a tree ends."""
    if id(node) in above:
        raise ConfigError(f"{source}: an alias stands inside the value that it names; write the value out")
    if isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str):
                raise ConfigError(
                    f"{source}: the key {key!r} is no text; use a name that is not a number, such as resnet18, or put "
                    "it in quotes"
                )
            _check_plain(key, source, above)
            _check_plain(value, source, [*above, id(node)])
    elif isinstance(node, list):
        for value in node:
            _check_plain(value, source, [*above, id(node)])
    elif isinstance(node, str):
        if re.search(r"[\0\ud800-\udfff]", node):
            raise ConfigError(
                f"{source}: the text {printable(node[:70])!r} has NUL or half of a character, which no file can hold; "
                "write it again"
            )
    elif not isinstance(node, int | float | None):
        raise ConfigError(f"{source}: {str(node)!r} is read as a {type(node).__name__}; put it in quotes")


def load(path: str | Path = "params.yaml", settings: Sequence[str] = ()) -> Suite:
    """Read and check a parameter file.

    Args:
        path: the YAML file.
        settings: `a.b=value` items as a command line gives them; values are YAML.

    Raises:
        ConfigError: names the file, the dotted key and the remedy.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a mapping of sections is expected, not {type(tree).__name__}")
    for item in settings:  # before the check: a setting may be what makes the file complete, such as data.root
        key, sign, text = item.partition("=")
        if not sign:
            raise ConfigError(f"--set {item}: expected a.b=value")
        *parents, leaf = key.split(".")
        node: Any = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"--set {item}: {'.'.join(parents)!r} is a value, not a section")
        node[leaf] = parse_yaml(text, f"--set {item}")
    suite = Suite.checked(tree, f"{path} with --set {' '.join(settings)}" if settings else str(path))
    if suite.data.root is not None and (fault := overlap(suite.data.root)):
        raise ConfigError(f"{path}: data.root: {fault}")
    named = [] if Path(path) == Path("params.yaml") else ["--params", str(path)]
    suite._read_from = Path(path).absolute(), tuple(settings)
    suite._options = (*named, *(part for item in settings for part in ("--set", item)))
    return suite


def _part(suite: Suite, path: str) -> Any:
    """Return the plain value at a dotted path; None where there is none."""
    node: Any = suite.model_dump(mode="json")
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _validate(kind: type[S], tree: Any, source: str) -> S:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            where = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                lines.append(f"{source}: unknown key {where!r}; remove it or check its spelling")
            else:
                given = f" (given: {item['input']!r})" if not isinstance(item["input"], dict | Section) else ""
                message = item["msg"].removeprefix("Value error, ")
                lines.append(f"{source}: {where + ': ' if where else ''}{message}{given}")
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def flatten(config: Section) -> dict[str, Any]:
    """Map dotted name -> plain value; the one form in which records, MLflow and Optuna see a configuration."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else key, value)
        else:
            flat[prefix] = node

    walk("", config.model_dump(mode="json"))
    return flat


def fingerprint(*parts: Any) -> str:
    """Return a short digest (16 hexadecimal digits) of plain values, equal exactly where they are equal."""
    plain = [p.model_dump(mode="json") if isinstance(p, Section) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def derive_seed(*parts: int | str) -> int:
    """Return a seed below 2**63 that depends on the named parts only, never on the order in which runs happen."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1

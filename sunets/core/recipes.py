"""The recipe that a model's tuning chose: read from its record, and refused where it was tuned for something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sunets.core.config import NOT_IN_IDENTITY, Config, ConfigError, Suite, TuningEffort, derive_seed, flatten
from sunets.core.config import fingerprint as digest_of
from sunets.core.paths import BenchmarkPaths
from sunets.core.record import Record, parameters, read_records, write_json, write_rows

COLUMNS = ("number", "status", "reason", "duplicate_of")
"""First columns of the table of a tuning's trials."""


def tuned(suite: Suite, paths: BenchmarkPaths, models: Iterable[str], data_digest: str | None = None) -> Suite:
    """Give trainings the recipes that `tune` chose; every stage that resolves a training's configuration calls this.

    Args:
        suite: as the parameter file has it; with tune.trials 0 it is returned as it is, and nothing is read.
        paths: of the benchmark.
        models: keys of the models whose trainings are wanted.
        data_digest: digest of the prepared data; None does not compare it.

    Returns:
        The suite, whose `config` now gives the tuned trainings of these models.

    Raises:
        ConfigError: a model was not tuned yet, or with other parameters or data, or in vain; names what differs.
        RecordError: the record is damaged.
    """
    if not suite.tune.trials:
        return suite
    for model in (model for model in models if model not in suite.recipes):
        record = tune_record(suite, paths, model, data_digest)
        effort = TuningEffort(trials=suite.tune.trials, epochs=record["params"]["train.epochs"], seed=suite.tune.seed)
        suite = suite.with_recipe(model, record["chosen"], effort)
    return suite


def tune_record(suite: Suite, paths: BenchmarkPaths, model: str, data_digest: str | None = None) -> Record:
    """Read and check the record of a model's tuning; see `tuned` for arguments and errors."""
    base = first_trial(suite, model)
    path, remedy = paths.records / "tune" / f"{model}.json", f"run `python -m ablations tune {model}` first"
    try:
        records = read_records(path, "tune")
    except FileNotFoundError:
        records = []
    if not records:
        raise ConfigError(f"models.{model}: its recipe is not tuned (no record in {path}); {remedy}")
    (record,) = records
    if record["fingerprint"] != fingerprint(suite, base):
        changes = _changes(record["params"], parameters(base) | tune_parameters(suite)) or f"of models.{model}"
        raise ConfigError(f"models.{model}: its recipe was tuned with other parameters: {changes}; {remedy}")
    if data_digest not in (None, record["provenance"]["data_digest"]):
        raise ConfigError(f"models.{model}: its recipe was tuned on other data; {remedy}")
    if record["status"] == "failed":
        raise ConfigError(f"models.{model}: {record['reason']}")
    return record


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which parameters differ; the record states those of the network as it is built, so that they are left out."""
    ignored = (*(name for name in NOT_IN_IDENTITY if name != "tune."), "model.")
    names = [k for k in sorted(now) if now[k] != then.get(k) and not k.startswith(ignored)]
    shown = [k if isinstance(now[k], list) else f"{k} {then.get(k)} / {now[k]}" for k in names]
    return "; ".join(shown[:3]) + (f" and {len(shown) - 3} more" if shown[3:] else "")


def first_trial(suite: Suite, model: str) -> Config:
    """The training of a tuning's first trial, the recipe of the parameter file; the others have other values of axes.

    `{seed}` in `train.init_from` stands for the first of `seeds`: a file of the trials' seed does not exist.
    """
    start = suite.config(model, suite.seeds[0]).train.init_from
    values: dict[str, Any] = {"train.init_from": start} if start else {}
    if suite.tune.epochs:
        values["train.epochs"] = suite.tune.epochs
    return suite.config(model, derive_seed("tune", suite.tune.seed) % (1 << 31), values)


def tune_parameters(suite: Suite) -> dict[str, Any]:
    """The section `tune` under dotted names, as the record of a tuning keeps it."""
    return {f"tune.{name}": value for name, value in suite.tune.model_dump(mode="json").items()}


def fingerprint(suite: Suite, first: Config) -> str:
    """A digest of all that decides the recipe that is chosen, but for data and code."""
    return digest_of({k: v for k, v in flatten(first).items() if not k.startswith(NOT_IN_IDENTITY)}, suite.tune)


def write_tuning(
    paths: BenchmarkPaths,
    model: str,
    record: Record | None,
    trials: Iterable[Mapping[str, Any]],
    history: Iterable[Mapping[str, Any]],
) -> None:
    """Write what a tuning leaves behind.

    Args:
        paths: of the benchmark.
        model: key of the model.
        record: of what was chosen; None where nothing was tried.
        trials: rows of the table of trials, in order of drawing.
        history: rows per trial and epoch.
    """
    folder = paths.records / "tune"
    write_rows(folder / f"{model}.csv", trials, COLUMNS)
    write_rows(folder / f"{model}.history.csv", history, ("number", "epoch"))
    write_json(folder / f"{model}.json", [record] if record else [])


def skip_tuning(suite: Suite, model: str, root: Path = Path()) -> None:
    """Write that a model was not tuned: DVC wants the files of the stage all the same.

    Raises:
        ConfigError: there is no such model.
    """
    suite.config(model, suite.seeds[0])
    write_tuning(BenchmarkPaths(suite.benchmark, root), model, None, (), ())

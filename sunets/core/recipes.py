"""Tuned recipes: read from their records, and refused if tuned with other parameters or data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sunets.core.config import NOT_IN_IDENTITY, Config, ConfigError, Suite, TuningEffort, derive_seed, flatten
from sunets.core.config import fingerprint as digest_of
from sunets.core.history import write_history
from sunets.core.paths import BenchmarkPaths
from sunets.core.record import Record, parameters, read_records, write_rows
from sunets.core.trials import COLUMNS, check_chosen


def tuned(suite: Suite, paths: BenchmarkPaths, models: Iterable[str], data_digest: str | None = None) -> Suite:
    """Apply the recipes that `tune` chose; every stage that resolves the configuration of a training calls this.

    Args:
        suite: content of the parameter file; with tune.trials 0 it is returned unchanged, and nothing is read.
        paths: paths of the benchmark.
        models: keys of the models to train.
        data_digest: digest of the prepared data; None skips its comparison.

    Returns:
        The suite, whose `config` returns the tuned configuration of these models.

    Raises:
        ConfigError: a model is not tuned, was tuned with other parameters or data, or all its trials failed.
        RecordError: a damaged record.
    """
    if not suite.tune.trials:
        return suite
    for model in (model for model in models if model not in suite.recipes):
        record = tune_record(suite, paths, model, data_digest)
        effort = TuningEffort(
            trials=suite.tune.trials, epochs=first_trial(suite, model).train.epochs, seed=suite.tune.seed
        )
        suite = suite.with_recipe(model, record["chosen"], effort)
    return suite


def tune_record(suite: Suite, paths: BenchmarkPaths, model: str, data_digest: str | None = None) -> Record:
    """Read and check the tuning record of a model; see `tuned` for arguments and errors."""
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
    free = {axis.path for axis in suite.free_axes(model)}
    fixed = {path for path, why in record["left_out"].items() if why.startswith("fixed by")}
    if moved := sorted(record["chosen"].keys() - free | fixed & free):
        now = "free" if moved[0] in free else f"fixed by models.{model}.train"
        raise ConfigError(f"models.{model}: its recipe was tuned before {moved[0]} was {now}; {remedy}")
    if data_digest not in (None, record["provenance"]["data_digest"]):
        raise ConfigError(f"models.{model}: its recipe was tuned on other data; {remedy}")
    if record["status"] == "failed":
        raise ConfigError(f"models.{model}: {record['reason']}")
    check_chosen(record, path)
    return record


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List the parameters that differ, except `model.*`, which the record states as built."""
    ignored = (*(name for name in NOT_IN_IDENTITY if name != "tune."), "model.")
    names = [k for k in sorted(now) if now[k] != then.get(k) and not k.startswith(ignored)]
    shown = [k if isinstance(now[k], list) else f"{k} {then.get(k)} / {now[k]}" for k in names]
    return "; ".join(shown[:3]) + (f" and {len(shown) - 3} more" if shown[3:] else "")


def first_trial(suite: Suite, model: str) -> Config:
    """Return the configuration of the first trial, with the recipe of the parameter file; others differ in the axes.

    `{seed}` in `train.init_from` is replaced by the first of `seeds`, since no file of the trials' seed exists.
    """
    start = suite.config(model, suite.seeds[0]).train.init_from
    values: dict[str, Any] = {"train.init_from": start} if start else {}
    if suite.tune.epochs:
        values["train.epochs"] = suite.tune.epochs
    return suite.config(model, derive_seed("tune", suite.tune.seed) % (1 << 31), values)


def tune_parameters(suite: Suite) -> dict[str, Any]:
    """Return the section `tune` with dotted names, as in tuning records."""
    return {f"tune.{name}": value for name, value in suite.tune.model_dump(mode="json").items()}


def fingerprint(suite: Suite, first: Config) -> str:
    """Hash the parameters that determine the chosen recipe; not data, code or the content of `train.init_from`."""
    return digest_of({k: v for k, v in flatten(first).items() if not k.startswith(NOT_IN_IDENTITY)}, suite.tune)


def write_tuning(
    paths: BenchmarkPaths,
    model: str,
    record: Record | None,
    trials: Iterable[Mapping[str, Any]],
    history: Iterable[Mapping[str, Any]],
) -> None:
    """Write the record and tables of a tuning.

    Args:
        paths: paths of the benchmark.
        model: key of the model.
        record: record of the chosen recipe; None if the model is not tuned.
        trials: rows of the table of trials, in order of drawing.
        history: rows per trial and epoch.
    """
    folder = paths.records / "tune"
    write_rows(folder / f"{model}.csv", trials, COLUMNS)
    write_history(folder / f"{model}.history.csv", history, [record] if record else [], folder / f"{model}.json")


def skip_tuning(suite: Suite, model: str) -> None:
    """Write the empty files of a model that is not tuned, since DVC requires the outputs of the stage.

    Raises:
        ConfigError: no such model.
    """
    suite.config(model, suite.seeds[0])
    write_tuning(BenchmarkPaths(suite.benchmark), model, None, (), ())

"""Stages `cost` (exact figures of one model) and `speed` (noisy figures of all models, interleaved)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import numpy as np

from sunets.core.config import Suite
from sunets.core.paths import BenchmarkPaths
from sunets.core.provenance import environment, provenance, stage_command
from sunets.core.record import make_record, write_arrays, write_json
from sunets.core.stage import stage
from sunets.data.manifest import load_manifest
from sunets.profiling.cost import build, cost_parameters, measure_cost
from sunets.profiling.speed import measure_speed


def _arguments(suite: Suite, key: str, paths: BenchmarkPaths) -> tuple[dict[str, Any], str]:
    """Return the keyword arguments of `create_model` for a model, and the digest of the data that determine them."""
    manifest = load_manifest(paths.data, suite.data)
    arguments = suite.models[key].arguments() | {"task": manifest.task, "num_classes": manifest.num_classes}
    return arguments, manifest.digest


def cost_stage(suite: Suite, key: str) -> dict[str, Any]:
    """Count `models.<key>` at `cost.size`; write the record and the map of its effective receptive field.

    Raises:
        ConfigError, ValueError: the model cannot be built.
        AuditError: two counts differ.
    """
    paths = BenchmarkPaths(suite.benchmark)
    suite.config(key, suite.seeds[0])
    arguments, digest = _arguments(suite, key, paths)
    params = ("benchmark", "data", "cost", f"models.{key}")
    with stage(f"cost@{key}", paths, __name__, suite=suite, params=params, data_digest=digest) as code:
        record_of = _recorder("cost", suite, key, code, stage_command(suite, "cost", key))
        figures, field = measure_cost(
            arguments,
            size=suite.cost.size,
            batch_size=suite.cost.batch_size,
            receptive_field_seeds=suite.cost.receptive_field_seeds,
            receptive_field_images=suite.cost.receptive_field_images,
        )
        record = record_of(cost=figures, environment=environment("cpu", 1))
        # receptive_field_seeds is at least 1
        write_arrays(paths.records / "cost" / f"{key}.npz", {"field": cast(np.ndarray, field)})
        write_json(paths.records / "cost" / f"{key}.json", record)
    return record


def speed_stage(suite: Suite) -> list[dict[str, Any]]:
    """Time all models of the benchmark in one run at `cost.size`; write and return the records."""
    paths = BenchmarkPaths(suite.benchmark)
    arguments = {key: _arguments(suite, key, paths) for key in suite.models}
    digest = next(digest for _, digest in arguments.values())
    params = ("benchmark", "data", "cost", "models")
    with stage("speed", paths, __name__, suite=suite, params=params, data_digest=digest) as code:
        command = stage_command(suite, "speed")
        recorders = {key: _recorder("speed", suite, key, code, command) for key in suite.models}
        measured = measure_speed(
            {key: build(options) for key, (options, _) in arguments.items()},
            size=suite.cost.size,
            batch_size=suite.cost.batch_size,
            repeats=suite.cost.repeats,
            warmup=suite.cost.warmup,
            threads=suite.cost.threads,
        )
        host = environment("auto", suite.cost.threads)
        records = [recorders[key](cost=figures, environment=host) for key, figures in measured.items()]
        write_json(paths.records / "speed.json", records)
    return records


def _recorder(
    kind: Literal["cost", "speed"], suite: Suite, key: str, code: str, command: str
) -> Callable[..., dict[str, Any]]:
    """Make a function from `cost` and `environment` to a record, whose provenance is taken now, before measuring."""
    params = cost_parameters(suite.cost.model_dump(mode="json"), suite.models[key], suite.data.task)
    return partial(
        make_record,
        kind,
        benchmark=suite.benchmark,
        task=suite.data.task,
        model=key,
        label=suite.models[key].label,
        config=params,
        provenance=provenance(None, code, params, command),
    )

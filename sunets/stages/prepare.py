"""Stage `prepare`: check a data set, or draw the embedded one, and write its manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sunets.core.config import Suite
from sunets.core.names import overlap
from sunets.core.paths import BenchmarkPaths
from sunets.core.record import write_json
from sunets.core.stage import stage
from sunets.data.changes import FILES
from sunets.data.manifest import Manifest
from sunets.data.picture import DataError
from sunets.data.preparation import prepare

START = "train.init_from"


def prepare_stage(suite: Suite) -> Manifest:
    """Prepare the benchmark's data in `data/prepared/<benchmark>/`; returns at once if nothing has changed.

    Raises:
        DataError: lists all faults with file names; nothing is written.
    """
    paths = BenchmarkPaths(suite.benchmark)
    if suite.data.root is not None and (fault := overlap(suite.data.root)):
        raise DataError(f"data.root: {fault}")
    with stage("prepare", paths, __name__, suite=suite, params=("benchmark", "data")):
        # DVC requires the inputs of `ablation_report` to exist, even in a benchmark without studies.
        (paths.records / "ablations").mkdir(parents=True, exist_ok=True)
        manifest = prepare(suite.data, paths.data, min_side=_min_side(suite))
        # A dependency of DVC's stages `prepare`, `train` and `ablate`, which run again when these files change.
        if suite.watch:
            weights = {path: _digest(Path(path)) for path in _initial_weights(suite)}
            write_json(paths.watched, {"files_sha256": _digest(paths.data / FILES), "init_from_sha256": weights})
        else:
            paths.watched.unlink(missing_ok=True)
    return manifest


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if it does not exist yet."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _initial_weights(suite: Suite) -> list[str]:
    """List the files that trainings of the benchmark and its studies start from."""
    configs = [suite.config(key, seed) for key in suite.models for seed in suite.seeds]
    for study in suite.ablations.values():
        starts = [v for axis in (*study.axes, *study.nuisance) if axis.path == START for v in axis.values]
        settings = [study.overrides, *(study.overrides | {START: start} for start in starts)]
        configs += [suite.config(study.model, seed, setting) for seed in study.seeds for setting in settings]
    return sorted({config.train.init_from for config in configs if config.train.init_from})


def _min_side(suite: Suite) -> int | None:
    """Return the minimum side of an image: 1 if every training resizes it by its crops, None for the default."""
    crops = [suite.config(key, suite.seeds[0]).train.augment.resized_crop for key in suite.models]
    return 1 if suite.data.task == "classification" and None not in crops else None

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


def prepare_stage(suite: Suite, root: Path = Path()) -> Manifest:
    """Prepare the benchmark's data under `data/prepared/<benchmark>/`; ends at once where nothing has changed.

    Raises:
        DataError: every fault found, with file names; nothing is written then.
    """
    paths = BenchmarkPaths(suite.benchmark, root)
    if suite.data.root is not None and (fault := overlap(suite.data.root, root)):
        raise DataError(f"data.root: {fault}")
    with stage("prepare", paths, __name__, suite=suite, params=("benchmark", "data")):
        # DVC wants the inputs of `ablation_report` to exist, in a benchmark without studies too.
        (paths.records / "ablations").mkdir(parents=True, exist_ok=True)
        manifest = prepare(suite.data, paths.data, min_side=_min_side(suite))
        # What DVC's stages `prepare`, `train` and `ablate` follow: they run again where other files were seen.
        if suite.watch:
            weights = {path: _digest(root / path) for path in _started_from(suite)}
            seen = {"files_sha256": _digest(paths.data / FILES), "init_from_sha256": weights}
            write_json(paths.watched, seen)
        else:
            paths.watched.unlink(missing_ok=True)
    return manifest


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None where it is not there yet."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _started_from(suite: Suite) -> list[str]:
    """Paths of the files that trainings of the benchmark and of its studies start from."""
    configs = [suite.config(key, seed) for key in suite.models for seed in suite.seeds]
    configs += [suite.config(s.model, seed, s.overrides) for s in suite.ablations.values() for seed in s.seeds]
    return sorted({config.train.init_from for config in configs if config.train.init_from})


def _min_side(suite: Suite) -> int | None:
    """Least side of an image: 1 where every training resizes it by its crops."""
    crops = [suite.config(key, suite.seeds[0]).train.augment.resized_crop for key in suite.models]
    return 1 if suite.data.task == "classification" and None not in crops else None

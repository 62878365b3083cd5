"""Lock of a running stage, and the check that its code, parameters and data did not change meanwhile."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sunets.core.config import ConfigError, Suite
from sunets.core.hardware import torchrun_process
from sunets.core.lock import locked
from sunets.core.paths import BenchmarkPaths
from sunets.core.process import STARTED
from sunets.core.provenance import SOURCE_ROOT, code_hash, module_closure

LOCK_SECONDS = 20.0
"""Timeout of the lock: a process of a killed pipeline may take a moment to end."""


class StageError(RuntimeError):
    """A stage that cannot vouch for its outputs; no finished work is lost."""


@contextlib.contextmanager
def stage(
    name: str, paths: BenchmarkPaths, *modules: str, suite: Suite, params: Sequence[str], data_digest: str | None = None
) -> Iterator[str]:
    """Hold the lock of a stage, which processes of `torchrun` share; yields the hash of its code.

    DVC hashes a stage's dependencies after its command: outputs of a stage during which one was edited would be
    credited to the edited file.

    Args:
        name: stage and item, such as train@sunet64.
        paths: of the lock and the prepared data.
        modules: modules whose import closure is hashed.
        suite: parameters of the stage.
        params: dotted paths of those it depends on, as in dvc.yaml.
        data_digest: digest of the prepared data it read; None if it read none.

    Raises:
        StageError: the stage is already running, or its code, parameters or data changed while it ran; or torchrun
            started it, which shares a training between processes and nothing else.
    """
    if torchrun_process()[2] > 1 and not name.startswith("train@"):
        raise StageError(f"{name}: torchrun is for `sunets train` alone; start this without it, or unset WORLD_SIZE")
    busy = StageError(f"{name}: already running in this checkout; wait for it, or stop it")
    with locked(paths.work / f"{paths.benchmark}.{name}.lock", LOCK_SECONDS, busy):
        before = code_hash(*modules)
        saved = ((SOURCE_ROOT / path).stat().st_mtime for path in module_closure(*modules))
        if any(STARTED < when <= time.time() for when in saved):  # imported before; a date to come says nothing
            raise StageError(f"{name}: its code was edited while it started; run it again")
        yield before
        if code_hash(*modules) != before:
            raise StageError(_changed(name, "its code", "the new code"))
        try:
            edited = suite.changes(params)
        except ConfigError as error:
            raise StageError(f"{_changed(name, 'the parameter file', 'other parameters')} ({error})") from None
        if edited:
            raise StageError(_changed(name, f"{', '.join(edited)} in the parameter file", "other parameters"))
        if data_digest is not None and _digest(paths.data / "manifest.json") != data_digest:
            raise StageError(_changed(name, f"the prepared data ({paths.data})", "other data"))


def _changed(name: str, what: str, credited: str) -> str:
    return (
        f"{name}: {what} changed while it ran, so the outputs would be credited to {credited}. "
        "Undo the edit and run again to reuse the finished work in .work/, or run again to repeat it"
    )


def _digest(manifest: Path) -> str | None:
    try:
        return str(json.loads(manifest.read_bytes())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

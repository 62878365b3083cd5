"""What happens when a stage starts and ends: its lock, and a check that what it depends on did not change meanwhile."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from sunets.core.config import ConfigError, Suite
from sunets.core.paths import BenchmarkPaths
from sunets.core.provenance import code_hash

LOCK_SECONDS = 20.0
"""How long a stage waits for another one's lock: a killed pipeline's process may take a moment to go."""


class StageError(RuntimeError):
    """A stage that cannot vouch for its outputs; nothing already computed is lost."""


@contextlib.contextmanager
def stage(
    name: str, paths: BenchmarkPaths, *modules: str, suite: Suite, params: Sequence[str], data_digest: str | None = None
) -> Iterator[str]:
    """Run one stage at a time under this name; yields the hash of the code it runs.

    DVC looks at the files that a stage depends on after its command: outputs of a stage during which one was edited
    would be credited to what stands in the file now.

    Args:
        name: stage and item, such as train@sunet64.
        paths: where the lock and the prepared data lie.
        modules: modules whose import closure the hash covers.
        suite: the parameters that the stage runs with.
        params: dotted paths of those that it depends on, as dvc.yaml lists them.
        data_digest: digest of the prepared data that it read; None if it read none.

    Raises:
        StageError: the same stage runs already, or its code, parameters or data changed while it ran.
    """
    paths.work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(paths.work / f"{paths.benchmark}.{name}.lock").acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise StageError(f"{name}: already running in this checkout; wait for it, or stop it") from None
    with lock:
        before = code_hash(*modules)
        yield before
        if code_hash(*modules) != before:
            raise StageError(_changed(name, "its source", "the wrong code"))
        try:
            edited = suite.changes(params)
        except ConfigError as error:
            raise StageError(f"{_changed(name, 'the parameter file', 'other parameters')} ({error})") from None
        if edited:
            raise StageError(_changed(name, f"{', '.join(edited)} in the parameter file", "other parameters"))
        if data_digest is not None and _digest(paths.data / "manifest.json") != data_digest:
            raise StageError(_changed(name, f"the prepared data ({paths.data})", "other data"))


def _changed(name: str, what: str, wrong: str) -> str:
    return (
        f"{name}: {what} changed while it ran, so the outputs would be credited to {wrong}. "
        "Undo the edit and run again to reuse the finished work in .work/, or run again to repeat it"
    )


def _digest(manifest: Path) -> str | None:
    try:
        return str(json.loads(manifest.read_bytes())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""The stages of `dvc.yaml`: each reads `params.yaml` and earlier stages' files and writes its own.

Here is what they share: where things lie, and what happens when a stage starts and ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sunets.names import PREPARED
from sunets.record import code_hash

LOCK_SECONDS = 20.0
"""How long a stage waits for another one's lock: a killed pipeline's process may take a moment to go."""


class StageError(RuntimeError):
    """A stage that cannot vouch for its outputs; nothing already computed is lost."""


@dataclass(frozen=True)
class Layout:
    """Where a benchmark's files lie below the root of the checkout."""

    benchmark: str
    root: Path = Path()

    @property
    def data(self) -> Path:
        """What `prepare` wrote: manifest, split lists, drawn images, converted masks."""
        return self.root / PREPARED / self.benchmark

    @property
    def results(self) -> Path:
        """Tables, figures and the page."""
        return self.root / "results" / self.benchmark

    @property
    def records(self) -> Path:
        """What the tables are made of."""
        return self.results / "records"

    def weights(self, model: str, seed: int) -> Path:
        """Trained weights of one model and seed."""
        return self.root / "outputs" / self.benchmark / "weights" / model / f"seed{seed}.pt"

    def predictions(self, model: str) -> Path:
        """Label images of the qualitative test images, first seed."""
        return self.root / "outputs" / self.benchmark / "predictions" / model

    @property
    def watched(self) -> Path:
        """What stage `watch` last saw of the data set's files."""
        return self.root / ".watch" / "files.json"

    @property
    def work(self) -> Path:
        """Checkpoints, results of jobs and locks, never committed; safe to delete when nothing runs."""
        return self.root / ".work"

    @property
    def job_results(self) -> Path:
        """Results of jobs, each under the fingerprint of what decides it."""
        return self.work / "results"


@contextlib.contextmanager
def stage(name: str, layout: Layout, *modules: str) -> Iterator[str]:
    """Run one stage at a time under this name; yields the hash of the code it runs.

    Args:
        name: stage and item, such as train@sunet64.
        layout: where the lock lies.
        modules: modules whose import closure the hash covers.

    Raises:
        StageError: the same stage runs already, or its code changed while it ran.
    """
    layout.work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(layout.work / f"{layout.benchmark}.{name}.lock").acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise StageError(f"{name}: already running in this checkout; wait for it, or stop it") from None
    with lock:
        before = code_hash(*modules)
        yield before
        if code_hash(*modules) != before:
            raise StageError(
                f"{name}: its source changed while it ran, so the outputs would be credited to the wrong code. "
                "Undo the edit and run again to reuse the finished work in .work/, or run again to repeat it"
            )

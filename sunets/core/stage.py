"""What happens when a stage starts and ends: its lock, and the hash of its code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from filelock import FileLock, Timeout

from sunets.core.paths import Layout
from sunets.core.provenance import code_hash

LOCK_SECONDS = 20.0
"""How long a stage waits for another one's lock: a killed pipeline's process may take a moment to go."""


class StageError(RuntimeError):
    """A stage that cannot vouch for its outputs; nothing already computed is lost."""


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

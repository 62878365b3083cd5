"""Locks of files, which the operating system frees when their holder ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sunets.core.hardware import torchrun_process


@contextlib.contextmanager
def locked(file: Path, seconds: float, busy: Exception | None = None) -> Iterator[None]:
    """Hold the lock of a file; of the processes that `torchrun` started, the first one holds it for all.

    Args:
        file: created, with its directory, if absent.
        seconds: timeout; -1 waits without limit.
        busy: raised where another process holds the lock.
    """
    if torchrun_process()[0] != 0:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(file).acquire(timeout=seconds)
    except Timeout as error:
        raise busy or error from None
    with lock:
        yield

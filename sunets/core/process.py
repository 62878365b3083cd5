"""Ends of a process: signals, a killed pipeline, errors.

Imports the standard library only, so that `die_with_pipeline` runs before slow imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import opcode
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

_PR_SET_PDEATHSIG = 1
STARTED = time.time()
"""Seconds since 1970 before the first slow import."""


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP, as an exception that neither `except Exception` nor a command-line library catches."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum
        """Exit status by the convention of shells."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread on SIGINT, SIGTERM and SIGHUP; a second signal ends the process at once."""

    def stop(signum: int, frame: Any) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(signum)

    # Ignored signals stay ignored (nohup, a shell's background jobs).
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signals = [each for each in ends if signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def die_with_pipeline() -> None:
    """End this process when the `dvc` that started it ends or has ended (Linux).

    Call it before slow imports: until then, a stage outlives its killed pipeline.
    """
    if sys.platform != "linux" or "DVC_STAGE" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The kernel sends no signal for a parent that ended before this call; then a process of another process group has
    # adopted this one.
    try:
        orphan = os.getpgid(os.getppid()) != os.getpgrp()
    except ProcessLookupError:
        orphan = True
    if orphan:
        os.kill(os.getpid(), signal.SIGTERM)


def is_ours(error: BaseException) -> bool:
    """Return whether a `raise` statement of this package raised an error, with a message for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    module = trace.tb_frame.f_globals.get("__name__", "")
    # `int("x")` raises in a frame of this package too, and is a bug.
    raised = opcode.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    return raised and module.split(".")[0] in ("sunets", "ablations", "__main__")

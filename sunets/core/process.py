"""How a process of this package ends: on signals, together with a killed pipeline, and on errors.

Only the standard library is imported, so that `die_with_pipeline` runs before anything that takes time.
"""

from __future__ import annotations

import contextlib
import ctypes
import opcode
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """SIGINT or SIGTERM; no `except Exception` and no command-line library takes it for an error."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum
        """Exit status that a shell expects."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread on SIGINT and SIGTERM; a second signal ends the process at once."""

    def stop(signum: int, frame: Any) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(signum)

    # What is ignored stays ignored (nohup, a shell's background jobs).
    signals = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def die_with_pipeline() -> None:
    """End this process when the `dvc` that started it ends, or has ended already (Linux).

    Call it first of all: a stage whose pipeline is killed while it imports torch would go on without it.
    """
    if sys.platform != "linux" or "DVC_STAGE" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The kernel does not tell of a parent that ended before that call: by now another process, of another process
    # group, has adopted this one.
    try:
        orphan = os.getpgid(os.getppid()) != os.getpgrp()
    except ProcessLookupError:
        orphan = True
    if orphan:
        os.kill(os.getpid(), signal.SIGTERM)


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by a `raise` of this package, in words made for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    module = trace.tb_frame.f_globals.get("__name__", "")
    # `int("x")` in our code raises in our frame too, and is a bug.
    raised = opcode.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    return raised and module.split(".")[0] in ("sunets", "ablations", "__main__")

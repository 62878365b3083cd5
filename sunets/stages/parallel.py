"""Independent jobs side by side on one machine, each in a process of its own with its own thread count."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from sunets.stages import StageError

Send = Callable[[Any], None]

_queue: Any = None


def _start(queue: Any) -> None:
    global _queue
    _queue = queue
    threading.Thread(target=_end_with_stage, daemon=True).start()


def _end_with_stage() -> None:
    """Wait for the stage's process to end, and end with it: a killed stage leaves no trainer behind.

    The system's own signal for that would not do: it speaks of the fork server, which lives as long as its children.
    """
    if (stage := multiprocessing.parent_process()) is not None:
        stage.join()
        os._exit(1)


def _run(job: Callable[[Any, Send], Any], index: int, argument: Any) -> Any:
    return job(argument, lambda message: _queue.put((index, message)))


def default_workers(threads: int, device: str) -> int:
    """As many jobs at once as the cores carry; one where a GPU does the work."""
    if device == "cuda":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def run_jobs(
    job: Callable[[Any, Send], Any],
    arguments: Sequence[Any],
    *,
    workers: int,
    preload: Sequence[str],
    on_message: Callable[[int, Any], None] = lambda index, message: None,
) -> list[Any]:
    """Run `job(argument, send)` for every argument and return the results in that order.

    Args:
        job: a module-level function; what it passes to `send` reaches `on_message(index, message)` here, in a thread.
        arguments: one argument a job; picklable.
        workers: processes at a time; 1 runs the jobs here, one after another.
        preload: modules that the processes share, imported once.
        on_message: receives what the jobs send.

    Raises:
        StageError: a process was killed; the others have finished.
    """
    if workers == 1 or len(arguments) == 1:
        return [job(argument, partial(on_message, index)) for index, argument in enumerate(arguments)]
    # forkserver: imports are paid once, and unlike fork it starts without torch's threads or a CUDA context.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    queue = context.Queue()

    def listen() -> None:
        while (item := queue.get()) is not None:
            on_message(*item)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    results: list[Any] = [None] * len(arguments)
    errors: list[BaseException] = []
    try:
        with ProcessPoolExecutor(
            min(workers, len(arguments)), mp_context=context, initializer=_start, initargs=(queue,)
        ) as pool:
            futures = {pool.submit(_run, job, i, argument): i for i, argument in enumerate(arguments)}
            for future in as_completed(futures):
                if error := future.exception():
                    errors.append(error)
                else:
                    results[futures[future]] = future.result()
    finally:
        queue.put(None)
        listener.join()
    for error in errors:
        if isinstance(error, BrokenProcessPool):
            raise StageError(
                "a worker process was killed (out of memory?); run again to go on from its last checkpoint, "
                "with fewer --workers if memory is short"
            ) from error
        raise error
    return results

"""Jobs in this process, in processes of this machine, or on a Dask cluster, with the same results in each.

A job is a pure function of plain values, the prepared data and the code. Its result is stored under the fingerprint of
these, so a driver (the process that calls `Pool.drive`) that was killed repeats no finished job. A diverged training is
a result, returned by the job's function; a job that ends without a result stops the driver with an error.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import pkgutil
import queue
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sunets.core.config import fingerprint
from sunets.core.failure import line_for_user
from sunets.core.hardware import default_workers, device_type, torchrun_process, visible_gpus
from sunets.core.provenance import SOURCE_ROOT, file_hash, library_versions, module_closure
from sunets.core.record import read_values, write_values

SCHEDULER = "DASK_SCHEDULER_ADDRESS"
"""Environment variable with the address of a Dask scheduler, on whose workers jobs run if it is set."""
CONNECT_SECONDS = 10
"""Timeout of the connection to the scheduler."""
_LOST = {
    "BrokenProcessPool": "a worker process was killed (out of memory?); run again to go on, with fewer --workers",
    "KilledWorker": "each worker that ran it was killed (out of memory?); run again to go on",
    "CancelledError": "the Dask scheduler is gone; start it and run again to go on",
}
"""Exceptions of an executor that lost a worker or its scheduler: what happened, and the remedy."""
_OTHER_DEVICE = {
    "cuda": "but the driver found no worker with `--resources GPU=1`; start such workers and run again, or set "
    "train.device to cpu",
    "cpu": "since torch sees no GPU, but cuda for the driver; check the GPU and CUDA_VISIBLE_DEVICES here, or start "
    "this worker without `--resources GPU=1`",
}
"""Device that auto is on a worker: why that is not the driver's, and the remedy."""
Result = dict[str, Any]
"""Plain values, and numpy arrays at the top level."""
Send = Callable[[Any], None]
T = TypeVar("T")


class JobError(RuntimeError):
    """A job or worker that ended without a result: says which, where and why. No finished job is lost."""


@dataclass(frozen=True)
class Job:
    """A call of a pure function; equal jobs share one result."""

    name: str
    """Name in messages and errors."""
    function: str
    """`module:function`, called as `function(arguments, send)`; what it sends reaches the driver."""
    arguments: Mapping[str, Any]
    """Plain values that, with data and code, determine the result."""
    paths: Mapping[str, str]
    """Further arguments: directories on the worker, which do not change the result."""


Plan = Generator[list[Job], Any, T]
"""Yields jobs that may run concurrently, is sent their results in the same order, and returns a value."""


def at_once(jobs: Sequence[Job]) -> Plan[list[Result]]:
    """Plan independent jobs; returns their results."""
    return (yield list(jobs))


# Worker --------------------------------------------------------------------------------------------------------------

_messages: Any = None
"""Queue of (job name, message) to the driver; None on a cluster, whose scheduler passes messages on."""
_one_job = threading.Lock()  # torch's generator, threads and flags belong to the process, not to a thread


def _call(name: str, function: str, arguments: dict[str, Any], needs: dict[str, Any]) -> Result:
    """Run a job. Raises JobError, naming the host, where the machine or the user's input is at fault."""
    with _one_job:
        try:
            _check(needs)
            result: Result = pkgutil.resolve_name(function)(arguments, functools.partial(_send, needs["topic"], name))
            return result
        except Exception as error:
            if (line := line_for_user(error)) is None:
                raise
            raise JobError(f"{name} on {socket.gethostname()}: {' '.join(line.split())}") from error


def _send(topic: str, name: str, message: Any) -> None:
    """Send a message to the driver; on a cluster, end the job if the driver has dropped it."""
    if _messages is not None:
        _messages.put((name, message))
        return
    from distributed import get_worker

    task = (worker := get_worker()).state.tasks.get(worker.get_current_task())
    if task is None or task.state != "executing":
        raise JobError("its driver has ended or was stopped")
    worker.log_event(topic, (name, message))


def _check(needs: dict[str, Any]) -> None:
    """Raise JobError where code, libraries, data or device differ from the driver's; it names the file or the value."""
    manifest = Path(needs["data"], "manifest.json").absolute()
    if not manifest.is_file():
        raise JobError(f"{manifest}: no such file; prepare the data there, and start workers in the checkout")
    try:
        digest = json.loads(manifest.read_bytes())["digest"]
    except (ValueError, KeyError, TypeError):
        raise JobError(f"{manifest}: damaged; run `python -m sunets prepare` there") from None
    compared = {str(SOURCE_ROOT / file): (_file_digest(file), there) for file, there in needs["code"].items()} | {
        str(manifest): (digest, needs["digest"]),
        **{name: (library_versions()[name], there) for name, there in needs["libraries"].items()},
    }
    for name, (here, there) in compared.items():
        if here != there:
            raise JobError(
                f"{name} differs from the driver's ({here} here, {there} there); fix that, restart workers, run again"
            )
    if (here := device_type(needs["train.device"])) != needs["device"]:
        raise JobError(f"train.device: auto is {here} here, {_OTHER_DEVICE[here]}")


@functools.cache
def _file_digest(file: str) -> str | None:
    """Hash a source file once per process: an edit does not change what was imported before it."""
    path = SOURCE_ROOT / file
    return file_hash(path) if path.is_file() else None


def _start_process(messages: Any, gpus: Any) -> None:
    """Initialise a process of the pool: it sees one GPU and dies with its driver."""
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the driver decides
    if gpu := gpus.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA starts
    threading.Thread(target=_die_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _die_with(driver: Any) -> None:
    driver.join()
    os.kill(os.getpid(), signal.SIGKILL)


# Driver --------------------------------------------------------------------------------------------------------------


class _Inline(Executor):
    """Runs each call on submission."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Pool:
    """Workers that run jobs, and the directory of results."""

    executor: Executor
    messages: Any
    """Queue of (job name, message)."""
    needs: dict[str, Any]
    """Code, libraries, data and device that a worker must have."""
    workers: int
    """Most concurrent jobs."""
    results: Path | None
    """None stores nothing."""

    @property
    def device(self) -> str:
        """Type of the device that jobs run on: cpu or cuda."""
        return str(self.needs["device"])

    def drive(
        self, plans: Sequence[Plan[T]], on_message: Callable[[str, Any], None] = lambda *_: None, reuse: bool = True
    ) -> list[T]:
        """Run plans and return what each returns; a plan advances as soon as its own jobs have ended.

        Args:
            plans: independent of each other.
            on_message: receives, in a thread, the name of a job and each message that it sends.
            reuse: take the stored result of a job instead of running it again.

        Raises:
            JobError: a job ended without a result, or the workers are gone.
            RecordError: a stored result is damaged; names the file.
        """
        returned: dict[int, T] = {}
        answers: dict[int, list[Any]] = {}
        waiting: deque[tuple[int, int, Job]] = deque()
        running: dict[Future[Result], tuple[int, int, Job]] = {}

        def listen() -> None:
            warned = False
            while (item := self.messages.get()) is not None:
                try:
                    on_message(*item)
                except Exception as error:  # such as a full disk: jobs must not wait for what shows their progress
                    if not warned:
                        with contextlib.suppress(OSError):
                            print(f"progress is not shown: {error}", file=sys.stderr)
                    warned = True

        def advance(plan: int, results: Any) -> None:
            while results is None or None not in results:
                try:
                    jobs = plans[plan].send(results)
                except StopIteration as stop:
                    returned[plan] = stop.value
                    return
                answers[plan] = results = [_stored(self.path(job)) if reuse else None for job in jobs]
                waiting.extend((plan, n, job) for n, job in enumerate(jobs) if results[n] is None)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        for plan in range(len(plans)):
            advance(plan, None)
        while waiting or running:
            while waiting and len(running) < self.workers:
                plan, slot, job = waiting.popleft()
                plain = json.loads(json.dumps(dict(job.arguments, **job.paths)))  # no code travels
                try:
                    future = self.executor.submit(_call, job.name, job.function, plain, self.needs)
                except BrokenExecutor as error:  # a worker died after the last wait
                    future = Future()
                    future.set_exception(error)
                running[future] = plan, slot, job
            ended = wait(running, return_when=FIRST_COMPLETED).done
            # Results first, since an error ends the loop.
            for future in sorted(ended, key=lambda each: each.cancelled() or bool(each.exception())):
                plan, slot, job = running.pop(future)
                result, path = _result(future, job), self.path(job)
                answers[plan][slot] = write_values(path, result) if path else result
                advance(plan, answers[plan])
        self.messages.put(None)
        listener.join()  # not after an error: a killed process may have left half a message
        return [returned[plan] for plan in range(len(plans))]

    def path(self, job: Job) -> Path | None:
        """File of the result of a job."""
        inputs = [self.needs[name] for name in ("code", "libraries", "digest", "device")]
        return self.results and self.results / f"{fingerprint(job.function, dict(job.arguments), inputs)}.npz"


def _stored(path: Path | None) -> Result | None:
    return read_values(path) if path and path.exists() else None


def _result(future: Future[Result], job: Job) -> Result:
    try:
        return future.result()
    except Exception as error:
        if reason := _LOST.get(type(error).__name__):
            raise JobError(f"{job.name}: {reason}") from error
        if isinstance(error, JobError):  # raised in a worker: here it is the user's
            raise JobError(*error.args) from error
        raise


def scheduler_address() -> str | None:
    """Return the address of the scheduler on whose workers jobs run; None if they run here, as under `torchrun`."""
    return None if torchrun_process()[2] > 1 else os.environ.get(SCHEDULER) or None


@contextlib.contextmanager
def open_pool(
    modules: Sequence[str], data: Path, digest: str, *, device: str, threads: int, jobs: int, results: Path,
    workers: int | None = None,
) -> Iterator[Pool]:  # fmt: skip
    """Open the Dask cluster of `DASK_SCHEDULER_ADDRESS`, or processes of this machine; an error ends the jobs.

    Args:
        modules: modules of the jobs' functions; with their imports, the code that determines the results.
        data: directory of the prepared data, on workers too.
        digest: digest of the prepared data.
        device: `train.device`.
        threads: CPU threads of a job.
        jobs: most jobs that can run at a time.
        results: directory of stored results.
        workers: most concurrent jobs. None: one per GPU or as many as the CPU cores allow; no limit on a cluster.

    Raises:
        JobError: the cluster does not answer.
    """
    global _messages
    code = {path.as_posix(): _file_digest(path.as_posix()) for path in module_closure(*modules)}
    needs: dict[str, Any] = {"code": code, "libraries": library_versions(), "data": str(data), "digest": digest}
    needs |= {"train.device": device, "topic": ""}
    torchrun = torchrun_process()[2] > 1  # all of its processes run the same training at the same time
    with contextlib.ExitStack() as stack:
        if address := scheduler_address():
            count = workers or sys.maxsize
            executor, messages = stack.enter_context(_cluster(address, needs))
        else:
            needs["device"] = device_type(device)
            count = 1 if torchrun else min(jobs, workers or default_workers(threads, needs["device"]))
            if count > 1:
                executor, messages = stack.enter_context(_processes(count, needs["device"], modules))
            else:
                executor, messages = _Inline(), queue.SimpleQueue()
                _messages = messages
        yield Pool(executor, messages, needs, count, None if torchrun else results)


@contextlib.contextmanager
def _processes(count: int, device: str, modules: Sequence[str]) -> Iterator[tuple[Executor, Any]]:
    # forkserver imports once for all processes, and unlike fork copies neither torch's threads nor a CUDA context.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules])
    # The server learns this process's sys.path only after these imports, and a relative PYTHONPATH may differ.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
    # glibc would give the memory of a training step back to the system and fault it in again: 7 % of a SUNet's step.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**33))
    messages, gpus = context.SimpleQueue(), context.SimpleQueue()
    visible = visible_gpus() if device == "cuda" else [""]
    for number in range(count):
        gpus.put(visible[number % len(visible)])
    executor = ProcessPoolExecutor(count, context, _start_process, (messages, gpus))
    try:
        yield executor, messages
        executor.shutdown()
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        executor.shutdown(wait=False, cancel_futures=True)
        raise


@contextlib.contextmanager
def _cluster(address: str, needs: dict[str, Any]) -> Iterator[tuple[Executor, Any]]:
    """Connect to a cluster; sets the device and the topic of the messages in `needs`."""
    try:
        from distributed import Client

        for name in [name for name in logging.root.manager.loggerDict if name.startswith(("distributed", "tornado"))]:
            logging.getLogger(name).setLevel(logging.CRITICAL)  # an error is one line of this package
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except ImportError:
        raise JobError(f"{SCHEDULER} is set, but distributed is not installed; run `make env`") from None
    except (OSError, ValueError, TypeError):  # the last for tls:// without certificates
        remedy = "start `dask scheduler`, or unset the variable"
        raise JobError(f"{SCHEDULER}: no answer from {address}; {remedy}") from None
    try:
        on_gpu = _on_gpu(client, needs["train.device"], address)
        needs |= {"device": "cuda" if on_gpu else "cpu", "topic": f"sunets-{client.id}"}
        messages: Any = queue.SimpleQueue()
        client.subscribe_topic(needs["topic"], lambda event: messages.put(event[1]))
        yield client.get_executor(pure=False, resources={"GPU": 1} if on_gpu else None), messages  # pure merges calls
    finally:
        client.close(timeout=2)


def _on_gpu(client: Any, device: str, address: str) -> bool:
    """Return whether jobs need a worker's GPU; for auto, waits for the first worker, which decides it."""

    def have_gpu() -> list[bool]:
        """Return whether each of the connected workers has a GPU as a resource."""
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        return ["GPU" in worker.get("resources", {}) for worker in workers]

    gpus = have_gpu()
    if not (any(gpus) if device == "cuda" else gpus):
        which = " with `--resources GPU=1`" if device == "cuda" else ""
        print(f"{address}: waiting for a worker{which}", file=sys.stderr)
    if device != "auto":
        return device == "cuda"
    try:
        while not gpus:
            client.wait_for_workers(1)
            gpus = have_gpu()
    except OSError:
        raise JobError(f"{SCHEDULER}: {address}: {_LOST['CancelledError']}") from None
    return any(gpus)

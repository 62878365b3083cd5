"""Jobs in this process, in processes of this machine, or on a Dask cluster: the same results in each.

A job is a pure function of plain values, the prepared data and the code. Its result is kept under the fingerprint of
these, so that a driver (the process that calls `Pool.drive`) that was killed at any moment repeats nothing that
finished. A job that ends without a result is an error of the driver and never a result; a training that diverged is a
result, which the job's function returns.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import math
import multiprocessing
import os
import queue
import signal
import socket
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from sunets.core.failure import line_for_user
from sunets.core.hardware import default_workers, device_type, visible_gpus
from sunets.core.provenance import SOURCE_ROOT, module_closure
from sunets.core.results import ResultStore

SCHEDULER = "DASK_SCHEDULER_ADDRESS"
"""Environment variable with the address of a Dask scheduler; where it is set, jobs run on its workers."""
CONNECT_SECONDS = 10
"""How long the scheduler may take to answer."""
Result = dict[str, Any]
"""Plain values, and numpy arrays at the first level."""
Send = Callable[[Any], None]
Hear = Callable[[str, Any], None]
T = TypeVar("T")


class JobError(RuntimeError):
    """A job or worker that ended without a result: says which, where and why. Nothing that finished is lost."""


@dataclass(frozen=True)
class Job:
    """One call of a function, which equal jobs make once."""

    name: str
    """What messages and errors call it."""
    function: str
    """`module:function`, called as `function(arguments, send)`; what it sends reaches the driver."""
    arguments: Mapping[str, Any]
    """Plain values that, with data and code, decide the result."""
    paths: Mapping[str, str]
    """More arguments: where the worker finds and leaves files, which does not change the result."""


Plan = Generator[list[Job], Any, T]
"""Yields jobs that may run at once, is sent their results in the same order, and returns what comes of them."""


def at_once(jobs: Sequence[Job]) -> Plan[list[Result]]:
    """The plan of jobs that do not depend on each other; returns their results."""
    return (yield list(jobs))


# On the worker -------------------------------------------------------------------------------------------------------

_messages: Any = None
_one_job = threading.Lock()  # torch's generator, threads and flags belong to the process, not to a thread of it


def _call(name: str, function: str, arguments: dict[str, Any], needs: dict[str, Any]) -> Result:
    """Run a job.

    Raises:
        JobError: the machine or an input of the user is at fault; names the host. A bug is raised as it is.
    """
    with _one_job:
        try:
            _check(needs)
            module, _, attribute = function.partition(":")
            result: Result = getattr(importlib.import_module(module), attribute)(
                arguments, functools.partial(_send, needs["topic"], name)
            )
            return result
        except Exception as error:
            if (line := line_for_user(error)) is None:
                raise
            raise JobError(f"{name} on {socket.gethostname()}: {' '.join(line.split())}") from error


def _send(topic: str | None, name: str, message: Any) -> None:
    """Tell the driver something; on a cluster, end the job if the driver wants its result no more."""
    if topic is None:
        _messages.put((name, message))
        return
    from distributed import get_worker

    task = (worker := get_worker()).state.tasks.get(worker.get_current_task())
    if task is None or task.state != "executing":
        raise JobError("its driver has ended or was stopped")
    worker.log_event(topic, (name, message))


def _check(needs: dict[str, Any]) -> None:
    """Refuse to compute with other code, data, torch or hardware than the driver counts on.

    Raises:
        JobError: names the file, or what differs.
    """
    for file, digest in needs["code"].items():
        if _file_digest(file) != digest:
            raise JobError(f"{SOURCE_ROOT / file} differs from the driver's; update it and restart this worker")
    manifest = Path(needs["data"], "manifest.json").absolute()
    if not manifest.is_file():
        raise JobError(f"{manifest}: no such file; prepare the data there, and start workers in the checkout")
    there = {"digest": json.loads(manifest.read_bytes())["digest"], "torch": version("torch")}
    there["device"] = device_type("auto") if needs["device_is_auto"] else needs["device"]
    for what, source in (("digest", f"{manifest}: "), ("torch", ""), ("device", "train.device: auto: ")):
        if there[what] != needs[what]:
            raise JobError(f"{source}{what} is {there[what]} here, and {needs[what]} for the driver; make them equal")


@functools.cache
def _file_digest(file: str) -> str | None:
    """Digest of a source file as this process met it first: what it has imported does not change afterwards."""
    path = SOURCE_ROOT / file
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _start_process(messages: Any, gpus: Any, driver: Connection) -> None:
    """Prepare a process of the pool: it has one GPU, and ends when the driver ends or closes the pipe."""
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the driver decides
    if gpu := gpus.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA starts

    def end_with_driver() -> None:
        driver.poll(None)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_driver, daemon=True).start()


# On the driver -------------------------------------------------------------------------------------------------------


class _Inline(Executor):
    """Makes each call where it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Pool:
    """Where jobs run."""

    executor: Executor
    messages: Any
    """Queue of (name of a job, message)."""
    needs: dict[str, Any]
    """What a worker has to have."""
    capacity: float
    """Jobs submitted at a time."""
    store: ResultStore

    @property
    def device(self) -> str:
        """Type of device that jobs compute on: cpu or cuda."""
        return str(self.needs["device"])

    def drive(self, plans: Sequence[Plan[T]], hear: Hear = lambda name, message: None, reuse: bool = True) -> list[T]:
        """Run the jobs of several plans, each of which goes on as soon as its own jobs have ended.

        Args:
            plans: independent of each other.
            hear: receives the name of a job and what it sends, in a thread.
            reuse: whether a job whose result is kept does not run again.

        Returns:
            What each plan returned.

        Raises:
            JobError: a job ended without a result, or the workers are gone.
        """
        returned: dict[int, T] = {}
        answers: dict[int, list[Any]] = {}
        waiting: deque[tuple[int, int, Job]] = deque()
        running: dict[Future[Result], tuple[int, int, Job]] = {}

        def advance(plan: int, results: Any) -> None:
            while results is None or None not in results:
                try:
                    jobs = plans[plan].send(results)
                except StopIteration as stop:
                    returned[plan] = stop.value
                    return
                answers[plan] = results = [self.store.get(job, self.needs) if reuse else None for job in jobs]
                waiting.extend((plan, n, job) for n, job in enumerate(jobs) if results[n] is None)

        with _listening(self.messages, hear):
            for plan in range(len(plans)):
                advance(plan, None)
            while waiting or running:
                while waiting and len(running) < self.capacity:
                    plan, slot, job = waiting.popleft()
                    plain = json.loads(json.dumps(dict(job.arguments, **job.paths)))  # nothing but values travels
                    future = self.executor.submit(_call, job.name, job.function, plain, self.needs)
                    running[future] = plan, slot, job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    plan, slot, job = running.pop(future)
                    answers[plan][slot] = self.store.put(job, self.needs, _result(future, job))
                    advance(plan, answers[plan])
        return [returned[plan] for plan in range(len(plans))]


def _result(future: Future[Result], job: Job) -> Result:
    again = "run again to go on"
    try:
        return future.result()
    except JobError as error:
        raise error.with_traceback(None) from error.__cause__
    except BrokenProcessPool as error:
        raise JobError(
            f"a worker process was killed (out of memory?); {again}, perhaps with fewer --workers"
        ) from error
    except CancelledError:
        raise JobError(f"{job.name}: the Dask scheduler is gone; start it and {again}") from None
    except Exception as error:
        if type(error).__name__ != "KilledWorker":  # of `distributed`, which may not be installed
            raise
        raise JobError(f"{job.name}: each worker that ran it was killed (out of memory?); {again}") from error


@contextlib.contextmanager
def _listening(messages: Any, hear: Hear) -> Iterator[None]:
    """Hand messages on until the block ends; those of a job before its result."""

    def listen() -> None:
        while (item := messages.get()) is not None:
            hear(*item)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    yield  # after an error nobody waits for the thread: a killed process may have left half a message
    messages.put(None)
    thread.join()


@contextlib.contextmanager
def open_pool(
    modules: Sequence[str], data: Path, digest: str, *, device: str, threads: int, jobs: int, results: Path,
    workers: int | None = None,
) -> Iterator[Pool]:  # fmt: skip
    """Open the Dask cluster of `DASK_SCHEDULER_ADDRESS`, or processes of this machine; an error ends the jobs.

    Args:
        modules: modules of the jobs' functions; with all that they import, the code that decides the results.
        data: directory of the prepared data, on workers too.
        digest: digest of the prepared data.
        device: `train.device`.
        threads: CPU threads of a job.
        jobs: most jobs that there will be at a time.
        results: directory that keeps results.
        workers: jobs at a time. None: one per GPU, or as many as the cores carry; of a cluster, as many as it takes.

    Raises:
        JobError: the cluster does not answer.
    """
    files = [path.as_posix() for path in module_closure(*modules)]
    code = {file: hashlib.sha256((SOURCE_ROOT / file).read_bytes()).hexdigest() for file in files}
    needs: dict[str, Any] = {"code": code, "torch": version("torch"), "data": str(data), "digest": digest}
    needs |= {"device_is_auto": device == "auto", "topic": None}
    with contextlib.ExitStack() as stack:
        if "WORLD_SIZE" in os.environ:  # torchrun: all its processes work on one training at a time, and repeat it
            pool = _inline(needs | {"device": device_type(device)}, ResultStore(None))
        elif address := os.environ.get(SCHEDULER):
            pool = stack.enter_context(_cluster(address, device, needs, ResultStore(results), workers or math.inf))
        else:
            needs["device"] = device_type(device)
            count = min(jobs, workers or default_workers(threads, needs["device"]))
            if count <= 1:
                pool = _inline(needs, ResultStore(results))
            else:
                pool = stack.enter_context(_processes(needs, ResultStore(results), count, modules))
        yield pool


def _inline(needs: dict[str, Any], store: ResultStore) -> Pool:
    global _messages
    _messages = queue.SimpleQueue()
    return Pool(_Inline(), _messages, needs, 1, store)


@contextlib.contextmanager
def _processes(needs: dict[str, Any], store: ResultStore, count: int, modules: Sequence[str]) -> Iterator[Pool]:
    # forkserver: imports are paid once, and unlike fork it starts without torch's threads or a CUDA context.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules])
    # Its server is told this process's path only after these are imported, and a relative PYTHONPATH may mean another.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
    messages, gpus = context.SimpleQueue(), context.SimpleQueue()
    visible = visible_gpus() if needs["device"] == "cuda" else [""]
    for number in range(count):
        gpus.put(visible[number % len(visible)])
    driver, held = context.Pipe(duplex=False)  # `held` closes with this process, however that ends
    executor = ProcessPoolExecutor(count, context, _start_process, (messages, gpus, driver))
    with held:
        try:
            yield Pool(executor, messages, needs, math.inf, store)
            executor.shutdown()
        except BaseException:
            held.close()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _cluster(address: str, device: str, needs: dict[str, Any], store: ResultStore, capacity: float) -> Iterator[Pool]:
    try:
        from distributed import Client

        for name in ("distributed.client", "distributed.core", "distributed.comm", "tornado.application"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # an error is one line, and ours
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except ImportError:
        raise JobError(f"{SCHEDULER} is set, but distributed is not installed: pip install 'sunets[cluster]'") from None
    except (OSError, ValueError):
        raise JobError(
            f"{SCHEDULER}: no answer from {address}; start `dask scheduler`, or unset the variable"
        ) from None
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    gpus = any("GPU" in worker.get("resources", {}) for worker in workers)
    needs |= {"topic": f"sunets-{uuid.uuid4().hex}"}
    needs |= {"device": "cuda" if device == "cuda" or (device == "auto" and gpus) else "cpu"}
    if not workers:
        print(f"{address}: waiting for a worker", file=sys.stderr)
    messages: Any = queue.SimpleQueue()
    client.subscribe_topic(needs["topic"], lambda event: messages.put(event[1]))
    resources = {"GPU": 1} if needs["device"] == "cuda" else None
    executor = client.get_executor(pure=False, resources=resources)  # pure: equal calls would be one
    try:
        yield Pool(executor, messages, needs, capacity, store)
    finally:
        with contextlib.suppress(Exception):  # the scheduler may be gone
            executor.shutdown(wait=False)
        client.close(timeout=2)

"""Real Dask clusters on this machine, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from distributed import Client

ROOT = Path(__file__).resolve().parents[1]


NO_SERVER = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""Disables tracking, which takes seconds and is not under test."""


def environment(**extra: str) -> dict[str, str]:
    """Environment of a process that imports this checkout and its tests, without the user's cluster and storage."""
    users = ("DASK_SCHEDULER_ADDRESS", "OPTUNA_STORAGE", "MLFLOW_TRACKING_URI")
    clean = {key: value for key, value in os.environ.items() if key not in users}
    made = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return clean | made | extra


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Cluster:
    """A scheduler and workers of one thread each, all separate processes."""

    address: str
    scheduler: subprocess.Popen[bytes]
    preload: str
    """A module that workers import before they connect, not in their first job."""
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add_worker(self, folder: Path, *options: str, **env: str) -> subprocess.Popen[bytes]:
        command = ["-m", "distributed.cli.dask_worker", self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        command += ["--preload", self.preload]
        worker = subprocess.Popen(
            [sys.executable, *command, "--memory-limit", "0", "--local-directory", str(folder / ".dask"), *options],
            cwd=folder, env=environment(**env), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.workers.append(worker)
        return worker


@contextlib.contextmanager
def cluster(
    folder: Path, workers: int, *options: str, preload: str = "sunets.core.executor", **env: str
) -> Iterator[Cluster]:
    """Start a scheduler and workers in a directory, wait until all are connected, and kill them in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    scheduler = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    made = Cluster(f"tcp://127.0.0.1:{port}", scheduler, preload)
    try:
        for _ in range(workers):
            made.add_worker(folder, *options, **env)
        until(lambda: answers(port))
        if workers:  # a late one would find no job left
            with Client(made.address, set_as_default=False) as client:
                client.wait_for_workers(workers, timeout=90)
        yield made
    finally:
        for process in (scheduler, *made.workers):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()

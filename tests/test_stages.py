"""What the stages share: parallel jobs, locks, and stopping when they should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sunets.stages.parallel import Send, run_jobs

from sunets.core.paths import Layout
from sunets.core.stage import StageError, stage


def square(number: int, send: Send) -> int:
    send(f"got {number}")
    return number**2


def die(number: int, send: Send) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def linger(folder: str, send: Send) -> None:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(120)


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_return_in_order_and_speak(workers: int) -> None:
    heard: list[Any] = []
    results = run_jobs(
        square, [3, 1, 2], workers=workers, preload=[], on_message=lambda index, text: heard.append((index, text))
    )
    assert results == [9, 1, 4]
    assert sorted(heard) == [(0, "got 3"), (1, "got 1"), (2, "got 2")]


def test_killed_worker_is_an_error_with_a_remedy() -> None:
    with pytest.raises(StageError, match="run again"):
        run_jobs(die, [0, 1, 2], workers=2, preload=[])


def test_no_worker_outlives_a_killed_stage(tmp_path: Path) -> None:
    script = (
        "from sunets.stages.parallel import run_jobs; from tests.test_stages import linger;"
        f"run_jobs(linger, [{str(tmp_path)!r}] * 2, workers=2, preload=[])"
    )
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, env=os.environ | {"PYTHONPATH": "."})
    deadline = time.monotonic() + 60
    while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_stage_runs_once_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sunets.core.stage.LOCK_SECONDS", 0.1)
    layout = Layout("smoke", tmp_path)
    with (
        stage("train@x", layout, "sunets.core.config"),
        pytest.raises(StageError, match="already running"),
        stage("train@x", layout, "sunets.core.config"),
    ):
        pass


def test_edited_source_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter(["before", "after"])
    monkeypatch.setattr("sunets.core.stage.code_hash", lambda *_: next(hashes))
    with (
        pytest.raises(StageError, match="source changed"),
        stage("train@x", Layout("smoke", tmp_path), "sunets.core.config"),
    ):
        pass

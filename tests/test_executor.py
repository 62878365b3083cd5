"""Jobs in processes and on a cluster: order, messages, kept results, what a worker must have, deaths and signals."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cluster
import numpy as np
import pytest
import torch
from cluster import until

from sunets.core import executor
from sunets.core.executor import Job, JobError, at_once, open_pool
from sunets.core.failure import line_for_user
from sunets.core.hardware import default_workers

HERE = Path(__file__).resolve()


# Functions of jobs.


def square(arguments: dict[str, Any], send: Any) -> dict[str, Any]:
    with Path(arguments["log"]).open("a") as file:
        file.write(f"{arguments['number']}\n")
    send(f"got {arguments['number']}")
    return {"square": arguments["number"] ** 2, "array": np.arange(arguments["number"]), "third": 1 / 3}


def fail(arguments: dict[str, Any], send: Any) -> dict[str, Any]:
    match arguments["number"]:
        case 0:
            raise OSError(28, "No space left on device")
        case 1:
            raise KeyError("a bug")
        case 2:
            return {"number": int("no number")}  # a ValueError that Python raises is a bug
        case 3:
            os.kill(os.getpid(), signal.SIGKILL)
        case 4:
            marker = Path(arguments["log"])
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
    return {"number": arguments["number"]}


def talk(arguments: dict[str, Any], send: Any) -> dict[str, Any]:
    for _ in range(200):
        send("x" * 1000)  # more than a pipe holds
    return {"number": arguments["number"]}


def linger(arguments: dict[str, Any], send: Any) -> dict[str, Any]:
    folder = Path(arguments["log"])
    (folder / f"{os.getpid()}.pid").touch()
    for number in range(1200):
        time.sleep(0.1)
        send(number)
    return {}


def gpu(arguments: dict[str, Any], send: Any) -> dict[str, Any]:
    time.sleep(0.5)
    return {"visible": os.environ.get("CUDA_VISIBLE_DEVICES")}


def job(function: str, number: int, log: Path, **more: Any) -> Job:
    return Job(f"job {number}", f"test_executor:{function}", {"number": number, **more}, {"log": str(log)})


def opened(folder: Path, workers: int = 2, **options: Any) -> Any:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (data / "manifest.json").write_text(json.dumps({"digest": "d"}))
    defaults = {"device": "cpu", "threads": 1, "jobs": 9, "results": folder / "results", "workers": workers}
    return open_pool(["sunets.core.record"], data, "d", **(defaults | options))


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(executor.SCHEDULER, raising=False)


# Processes of this machine -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_return_in_order_and_speak_and_run_once(workers: int, tmp_path: Path) -> None:
    heard: list[Any] = []
    log = tmp_path / "log"
    jobs = [job("square", number, log) for number in (3, 1, 2)]
    with opened(tmp_path, workers) as pool:
        (results,) = pool.drive([at_once(jobs)], lambda name, message: heard.append((name, message)))
        assert [r["square"] for r in results] == [9, 1, 4]
        assert [r["array"].tolist() for r in results] == [[0, 1, 2], [0], [0, 1]]
        assert sorted(heard) == [("job 1", "got 1"), ("job 2", "got 2"), ("job 3", "got 3")]
    with opened(tmp_path, 3 - workers) as pool:  # another driver finds them
        (again,) = pool.drive([at_once([*jobs, job("square", 4, log)])])
        assert [r["square"] for r in again] == [9, 1, 4, 16]
        assert again[0]["third"] == results[0]["third"] == 1 / 3
        assert sorted(log.read_text().split()) == ["1", "2", "3", "4"]
        pool.drive([at_once(jobs[:1])], reuse=False)
        assert sorted(log.read_text().split()) == ["1", "2", "3", "3", "4"]


def test_results_of_other_code_data_or_arguments_are_not_taken(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with opened(tmp_path, 1) as pool:
        pool.drive([at_once([job("square", 3, log)])])
        pool.drive([at_once([job("square", 3, log, more=1)])])
        for name, value in (("code", {}), ("libraries", {}), ("digest", "e"), ("device", "cuda")):
            other = dataclasses.replace(pool, needs=pool.needs | {name: value})
            assert pool.path(job("square", 3, log)).exists()
            assert not other.path(job("square", 3, log)).exists()
    assert log.read_text().split() == ["3", "3"]


def test_results_outlast_an_edited_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "SOURCE_ROOT", tmp_path)
    codes = ["x = 1\n", "# One.\nx = 1\n", "x = 2\n"]
    digests = []
    for code in codes:
        (tmp_path / "module.py").write_text(code)
        executor._file_digest.cache_clear()
        digests.append(executor._file_digest("module.py"))
    executor._file_digest.cache_clear()
    assert digests[0] == digests[1] != digests[2]


def test_a_result_is_stored_before_the_error_of_another_job_is_raised(tmp_path: Path) -> None:
    class Ended(Executor):
        """All jobs end at the same time; the first one fails."""

        def submit(self, fn: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
            future: Future[Any] = Future()
            if arguments[0] == "job 0":
                future.set_exception(JobError("it failed"))
            else:
                future.set_result({"number": 1})
            return future

    jobs = [job("square", number, tmp_path) for number in range(8)]
    with opened(tmp_path, 1) as inline:
        pool = dataclasses.replace(inline, executor=Ended(), workers=8)
        with pytest.raises(JobError, match="it failed"):
            pool.drive([at_once(jobs)])
        assert [pool.path(each).exists() for each in jobs] == [False] + [True] * 7


@pytest.mark.slow
def test_plans_go_on_each_when_their_own_jobs_have_ended(tmp_path: Path) -> None:
    def count(start: int) -> executor.Plan[list[int]]:
        got = []
        for number in range(start, start + 3):
            results = yield [job("square", number, tmp_path / "log"), job("square", number + 100, tmp_path / "log")]
            got += [r["square"] for r in results]
        nothing = yield []
        assert nothing == []
        return got

    with opened(tmp_path) as pool:
        found = pool.drive([count(1), count(11)])
    assert found == [[n**2 for k in range(s, s + 3) for n in (k, k + 100)] for s in (1, 11)]


def test_only_values_travel(tmp_path: Path) -> None:
    with opened(tmp_path) as pool, pytest.raises(TypeError, match="not JSON serializable"):
        pool.drive([at_once([job("square", 1, tmp_path, code=lambda: None)])])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_machine_s_fault_is_one_line_and_a_bug_is_itself(workers: int, tmp_path: Path) -> None:
    host = socket.gethostname()
    with opened(tmp_path, workers) as pool, pytest.raises(JobError) as caught:
        pool.drive([at_once([job("fail", 0, tmp_path)])])
    assert str(caught.value).startswith(f"job 0 on {host}: No space left on device; make room on the disk, then run")
    assert (line := line_for_user(caught.value)) is not None, "it would be shown as a traceback"
    assert line.startswith("job 0 on ")
    with opened(tmp_path, workers) as pool, pytest.raises(KeyError, match="a bug"):
        pool.drive([at_once([job("fail", 1, tmp_path)])])
    with opened(tmp_path, workers) as pool, pytest.raises(ValueError, match="invalid literal") as caught_value:
        pool.drive([at_once([job("fail", 2, tmp_path)])])
    assert not isinstance(caught_value.value, JobError)
    assert not list((tmp_path / "results").glob("*")), "a failure was kept as a result"


@pytest.mark.slow
def test_jobs_do_not_wait_for_a_listener_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Such as one that prints to a full disk, or to a pipe that nobody reads."""

    def hear(name: str, message: Any) -> None:
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as pool:
        results = pool.drive([at_once([job("talk", number, tmp_path / "log") for number in range(2)])], hear)
    assert [result["number"] for result in results[0]] == [0, 1]
    assert capfd.readouterr().err.count("progress is not shown: [Errno 28] No space left on device") == 1


def test_one_process_of_a_launcher_is_no_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with opened(tmp_path, 2) as pool:
        assert (pool.workers, pool.results) == (2, tmp_path / "results")


@pytest.mark.slow
def test_a_killed_worker_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with opened(tmp_path) as pool, pytest.raises(JobError, match=r"was killed .* run again"):
        pool.drive([at_once([job("fail", number, tmp_path) for number in (5, 3, 6)])])


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    with opened(tmp_path, 1) as pool:
        pool.drive([at_once([job("square", 3, tmp_path / "log")])])
        (path,) = (tmp_path / "results").glob("*.npz")
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(ValueError, match=f"{path}: no readable archive .* delete it"):
            pool.drive([at_once([job("square", 3, tmp_path / "log")])])


@pytest.mark.slow
def test_each_gpu_has_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert default_workers(1, "cuda") == 2
    with opened(tmp_path, device="cuda", workers=None) as pool:
        assert pool.device == "cuda"
        (results,) = pool.drive([at_once([job("gpu", number, tmp_path) for number in range(4)])])
    assert {r["visible"] for r in results} == {"2", "5"}


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (
            {"code": {"sunets/core/record.py": "0"}},
            r"sunets/core/record\.py differs from the driver's \(\w+ here, 0 there",
        ),
        ({"digest": "e"}, r"data/manifest\.json differs from the driver's \(d here, e there\); fix that, restart"),
        ({"data": "/nowhere"}, r"/nowhere/manifest\.json: no such file; prepare the data there"),
        ({"libraries": {"torch": "0.4"}}, r"torch differs from the driver's \([\d.+a-z]+ here, 0\.4 there\)"),
        (
            {"device": "cuda", "train.device": "auto"},
            r"train\.device: auto is cpu here, since torch sees no GPU, but cuda for the driver; check the GPU",
        ),
    ],
)
def test_a_worker_that_differs_is_named(needs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with opened(tmp_path, 1) as pool:
        pool.needs.update(needs)
        with pytest.raises(JobError, match=f"job 3 on {socket.gethostname()}: .*{message}"):
            pool.drive([at_once([job("square", 3, tmp_path / "log")])])
    assert not (tmp_path / "log").exists()


def test_a_worker_with_a_gpu_that_nobody_was_told_of_learns_how_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, 1, device="auto") as pool:
        monkeypatch.setattr(executor, "device_type", lambda _: "cuda")
        with pytest.raises(JobError, match=r"auto is cuda here, .* no worker with `--resources GPU=1`; start such"):
            pool.drive([at_once([job("square", 3, tmp_path / "log")])])


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "7", '"digest"', "\xff"])
def test_a_worker_s_damaged_manifest_is_named(content: str, tmp_path: Path) -> None:
    with opened(tmp_path, 1) as pool:
        path = tmp_path / "data/manifest.json"
        path.write_text(content, encoding="latin-1")
        with pytest.raises(JobError, match=rf"job 3 on .*: {path}: damaged; run `python -m sunets prepare` there"):
            pool.drive([at_once([job("square", 3, tmp_path / "log")])])


# Ends ----------------------------------------------------------------------------------------------------------------


def driver(folder: Path, function: str, count: int, device: str = "cpu", **env: str) -> subprocess.Popen[str]:
    """A process that runs jobs as a command does."""
    code = (
        # A shell's background jobs, such as this test run may be, ignore SIGINT.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import typer; from pathlib import Path; from sunets.core.cli import run; import test_executor as t\n"
        f"folder = Path({str(folder)!r})\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def go():\n"
        f"    with t.opened(folder, {count}, device={device!r}) as pool:\n"
        f"        jobs = [t.job({function!r}, number, folder) for number in range({count})]\n"
        "        pool.drive([t.at_once(jobs)])\n"
        "run(app)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], env=cluster.environment(**env), stderr=subprocess.PIPE, text=True
    )


def pids(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_worker_outlives_its_driver(sign: signal.Signals, code: int, workers: int, tmp_path: Path) -> None:
    process = driver(tmp_path, "linger", workers)
    until(lambda: len(pids(tmp_path)) == workers)
    process.send_signal(sign)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    if sign != signal.SIGKILL:
        assert errors == "stopped; run again to go on\n"
    until(lambda: not any(map(alive, pids(tmp_path))), 5)
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_a_stage_ends_with_the_pipeline_that_started_it(tmp_path: Path) -> None:
    """Killed at once, while the stage imports, or later: it neither goes on nor begins."""
    stage = "import os, pathlib, time\npathlib.Path('started.pid').write_text(str(os.getpid()))\n{wait}\n" + (
        "from sunets.core.process import die_with_pipeline\ndie_with_pipeline()\n"
        "pathlib.Path('working').touch()\ntime.sleep(60)"
    )
    for wait, works in (("time.sleep(1)", False), ("", True)):
        (tmp_path / "started.pid").unlink(missing_ok=True)
        (tmp_path / "stage.py").write_text(stage.format(wait=wait))
        pipeline = subprocess.Popen(
            [sys.executable, "-c", f"import subprocess; subprocess.run([{sys.executable!r}, 'stage.py'])"],
            cwd=tmp_path, env=cluster.environment(DVC_STAGE="train@x"), start_new_session=True,
        )  # fmt: skip
        until(lambda works=works: (tmp_path / ("working" if works else "started.pid")).exists())
        until(lambda: (tmp_path / "started.pid").read_text())
        pipeline.kill()
        pipeline.wait()
        pid = int((tmp_path / "started.pid").read_text())
        until(lambda pid=pid: not alive(pid), 20)
        assert (tmp_path / "working").exists() == works


# A Dask cluster ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[cluster.Cluster], Any]:
    def use(made: cluster.Cluster) -> Any:
        monkeypatch.setenv(executor.SCHEDULER, made.address)
        return opened(tmp_path, workers=None)

    return use


@pytest.mark.slow
def test_a_cluster_gives_the_same_and_survives_a_killed_worker(
    tmp_path: Path, on_cluster: Callable[[cluster.Cluster], Any]
) -> None:
    heard: list[Any] = []
    with cluster.cluster(tmp_path, 4) as made, on_cluster(made) as pool:
        jobs = [job("square", number, tmp_path / "log") for number in (3, 1, 2)]
        (results,) = pool.drive([at_once(jobs)], lambda name, message: heard.append((name, message)))
        assert [r["array"].tolist() for r in results] == [[0, 1, 2], [0], [0, 1]]
        assert sorted(heard) == [("job 1", "got 1"), ("job 2", "got 2"), ("job 3", "got 3")]
        again = [job("fail", number, tmp_path / "marker") for number in (4, 5, 6)]
        assert [r["number"] for r in pool.drive([at_once(again)])[0]] == [4, 5, 6]
        until(lambda: sum(worker.poll() is not None for worker in made.workers) == 1)


@pytest.mark.slow
def test_a_job_that_kills_its_workers_is_one_line(tmp_path: Path, on_cluster: Callable[[cluster.Cluster], Any]) -> None:
    with cluster.cluster(tmp_path, 4) as made, on_cluster(made) as pool, pytest.raises(JobError, match="was killed"):
        pool.drive([at_once([job("fail", 3, tmp_path / "marker")])])


@pytest.mark.slow
def test_a_killed_scheduler_is_one_line_and_a_stopped_driver_stops_its_jobs(
    tmp_path: Path, on_cluster: Callable[[cluster.Cluster], Any]
) -> None:
    with cluster.cluster(tmp_path, 2) as made:
        process = driver(tmp_path, "linger", 2, DASK_SCHEDULER_ADDRESS=made.address)
        until(lambda: len(pids(tmp_path)) == 2)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (143, "stopped; run again to go on\n")
        # The workers live, and are free again at the next message of their job.
        with on_cluster(made) as pool:
            assert pool.drive([at_once([job("square", 5, tmp_path / "log")])])[0][0]["square"] == 25
        for path in tmp_path.glob("*.pid"):
            path.unlink()
        process = driver(tmp_path, "linger", 2, DASK_SCHEDULER_ADDRESS=made.address)
        until(lambda: len(pids(tmp_path)) == 2)
        made.scheduler.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert errors.startswith("error: job ")
        assert errors.endswith(": the Dask scheduler is gone; start it and run again to go on\n")
        assert errors.count("\n") == 1


@pytest.mark.slow
def test_a_gpu_is_a_resource_of_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with cluster.cluster(tmp_path, 1) as made:
        monkeypatch.setenv(executor.SCHEDULER, made.address)
        with opened(tmp_path, device="cuda", workers=None):
            assert capfd.readouterr().err == f"{made.address}: waiting for a worker with `--resources GPU=1`\n"
        for visible in "37":
            made.add_worker(tmp_path, "--resources", "GPU=1", CUDA_VISIBLE_DEVICES=visible)
        jobs = [job("gpu", number, tmp_path) for number in range(6)]
        with opened(tmp_path, device="cuda", workers=None) as pool:
            (results,) = pool.drive([at_once(jobs)])
        assert {r["visible"] for r in results} == {"3", "7"}


@pytest.mark.slow
def test_the_first_worker_decides_the_device_of_a_command_that_started_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = io.StringIO()
    with cluster.cluster(tmp_path, 0) as made, ThreadPoolExecutor() as starter:
        monkeypatch.setenv(executor.SCHEDULER, made.address)
        monkeypatch.setattr(sys, "stderr", errors)

        def connect() -> None:
            until(errors.getvalue)
            made.add_worker(tmp_path, "--resources", "GPU=1")

        started = starter.submit(connect)
        with opened(tmp_path, device="auto", workers=None) as pool:
            assert pool.device == "cuda"
        started.result()
    assert errors.getvalue() == f"{made.address}: waiting for a worker\n"


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["driver", "scheduler"])
def test_waiting_for_a_worker_ends_with_the_driver_or_its_scheduler(ends: str, tmp_path: Path) -> None:
    with cluster.cluster(tmp_path, 0) as made:
        process = driver(tmp_path, "linger", 1, device="auto", DASK_SCHEDULER_ADDRESS=made.address)
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == f"{made.address}: waiting for a worker\n"
            if ends == "driver":
                process.send_signal(signal.SIGTERM)
            else:
                made.scheduler.kill()
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    if ends == "driver":
        assert (process.returncode, errors) == (143, "stopped; run again to go on\n")
    else:
        gone = f"DASK_SCHEDULER_ADDRESS: {made.address}: the Dask scheduler is gone; start it and run again to go on"
        assert (process.returncode, errors) == (2, f"error: {gone}\n")


@pytest.mark.slow
def test_a_worker_of_another_checkout_is_named_with_its_file(
    tmp_path: Path, on_cluster: Callable[[cluster.Cluster], Any]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(cluster.ROOT / "sunets", elsewhere / "sunets")
    edited = elsewhere / "sunets/core/record.py"
    edited.write_text(edited.read_text() + "EDITED = True\n")
    with cluster.cluster(elsewhere, 1, PYTHONPATH=f"{elsewhere}:{HERE.parent}") as made, on_cluster(made) as pool:
        expected = f"job 3 on {socket.gethostname()}: {elsewhere}/sunets/core/record.py differs from the driver's"
        with pytest.raises(JobError, match=expected):
            pool.drive([at_once([job("square", 3, tmp_path / "log")])])


@pytest.mark.slow
def test_no_scheduler_is_one_line(free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (f"tcp://127.0.0.1:{free_port}", "nonsense://x", f"tls://127.0.0.1:{free_port}"):
        monkeypatch.setenv(executor.SCHEDULER, address)
        monkeypatch.setattr(executor, "CONNECT_SECONDS", 1)
        with pytest.raises(JobError, match=f"DASK_SCHEDULER_ADDRESS: no answer from {address}"), opened(tmp_path):
            pass


@pytest.mark.slow
def test_the_benchmark_of_the_engine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE.parents[1] / "benchmarks")
    monkeypatch.delenv(executor.SCHEDULER, raising=False)
    engine = importlib.import_module("engine")
    assert engine.trials_per_hour(workers=1, trials=2, epochs=1) > 0
    assert 0 < engine.seconds_per_job(workers=1, jobs=2) < 1

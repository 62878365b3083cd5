"""No fault of MLflow costs a training: servers that do not answer, files that are no database."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from tracked import Pipeline, by_name, make_suite, points, row, runs

from sunets.core.record import RecordError
from sunets.tracking import address, store
from sunets.tracking import live as tracking_live
from sunets.tracking import sync as tracking_sync
from sunets.tracking.address import TrackingError
from sunets.tracking.live import Tracker
from sunets.tracking.store import PARENT
from sunets.tracking.sync import sync, sync_or_warn

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_unreachable_server_costs_no_training(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    start = time.monotonic()
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    pipeline.train("unet_small")
    sync_or_warn(pipeline.results, "bench")
    assert time.monotonic() - start < 30
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "http://127.0.0.1:9" in message
    assert "python -m sunets mlflow-sync" in message
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9"):
        sync(pipeline.results)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{db}")
    assert sync(pipeline.results).created == 8  # the remedy works


@pytest.mark.parametrize("name", ["", "*", "../results", "/tmp", "a**b"])
def test_a_benchmark_is_a_name_and_no_pattern(name: str, tmp_path: Path) -> None:
    (tmp_path / "results/bench/records").mkdir(parents=True)
    with pytest.raises(ValueError, match="use letters, digits, _ and -"):
        sync(tmp_path / "results", name)


@pytest.mark.slow
def test_server_that_fails_midway_costs_no_training(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    tracker.log_epoch(0, row(1, 0))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", fail)
        tracker.log_epoch(0, row(2, 0))
    tracker.log_epoch(0, row(3, 0))
    tracker.finish(0, pipeline.record("sunet_tiny", 0, [row(3, 0)]))
    tracker.close()
    assert capsys.readouterr().err.count("the disk is full") == 1
    pipeline.train("sunet_tiny", live=False)
    sync(pipeline.results)
    assert points(by_name()["SUNet-tiny, seed 0"], "curves/train.loss") == [
        (e, row(e, 0)["train.loss"]) for e in (1, 2, 3)
    ]
    assert {run.info.status for run in runs()} == {"FINISHED"}


def test_machine_without_mlflow_can_train(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    assert "mlflow is not installed" in capsys.readouterr().err
    with pytest.raises(TrackingError, match="mlflow is not installed"):
        sync(pipeline.results)


def test_only_the_first_process_of_torchrun_writes(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    Pipeline(tmp_path).train("sunet_tiny")
    assert runs() == []


def test_two_processes_do_not_sync_at_once(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    monkeypatch.setattr("sunets.tracking.sync.CREATION_LIMIT", 0.1)
    with FileLock(f"{db}.lock.sync"), pytest.raises(TrackingError, match="another process is syncing; wait for it"):
        sync(pipeline.results)
    assert sync(pipeline.results).created == 0


def test_sync_leaves_a_damaged_benchmark_out_and_names_it(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    damaged = pipeline.results / "old/records/train/net.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("[{")
    (line,) = sync(pipeline.results).left_out
    assert line.startswith("old is left out: ")
    assert str(damaged) in line
    with pytest.raises(RecordError, match="not valid JSON"):
        sync(pipeline.results, "old")


def test_an_error_is_not_its_own_cause() -> None:
    with pytest.raises(TrackingError) as error, address.explained(), address.explained():
        raise TimeoutError("no answer")
    assert isinstance(error.value.__cause__, TimeoutError)


def test_sync_without_records_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results.nowhere.records: no records; run `dvc repro` first"):
        sync(tmp_path / "results", "nowhere")


RACER = """
import sys
from sunets.core.config import load
from sunets.core.record import make_record
from sunets.core.provenance import provenance
from sunets.tracking import address, store
from sunets.tracking import live as tracking_live
from sunets.tracking import sync as tracking_sync
from sunets.tracking.address import TrackingError
from sunets.tracking.live import Tracker
suite, number = load(sys.argv[1]), int(sys.argv[2])
config = suite.config("sunet_tiny", number)
source = provenance("d" * 64, "c" * 16, config, "x")
print("ready", flush=True)
sys.stdin.readline()
tracker = Tracker("trial", suite, "depth")
tracker.plan(number, config, source, phase="grid", arm={})
for epoch in (1, 2, 3):
    tracker.log_epoch(number, {"epoch": epoch, "train.loss": epoch + number / 8})
tracker.finish(number, make_record("trial", task="segmentation", benchmark="bench", model="sunet_tiny", seed=number,
    config=config,
    provenance=source, study="depth", number=number, phase="grid", arm={}))
tracker.close()
"""


@pytest.mark.slow
def test_processes_racing_for_a_cold_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: a process killed while it creates the database leaves nothing behind that hurts."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    environ = os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)}
    make_suite(tmp_path)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path / "params.yaml"), str(number)],
            env=environ,
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        victim = racers.pop()
        assert victim.stdin is not None
        victim.stdin.write("\n")
        victim.stdin.flush()
        end = time.monotonic() + 60
        while not list(tmp_path.glob("mlflow.db.*.tmp")) and time.monotonic() < end:
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        assert not (tmp_path / "mlflow.db").exists()
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        for racer in racers:
            _, errors = racer.communicate(timeout=120)
            assert racer.returncode == 0, errors
            assert not errors
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    shown = by_name("bench/ablations")
    assert sorted(shown) == ["#0, seed 0", "#1, seed 1", "#2, seed 2", "depth"]
    assert len(runs("bench/ablations")) == 4
    for number in range(3):
        run = shown[f"#{number}, seed {number}"]
        assert run.data.tags[PARENT] == shown["depth"].info.run_id
        assert points(run, "curves/train.loss") == [(e, e + number / 8) for e in (1, 2, 3)]


def fails_once(pipeline: Pipeline, capsys: pytest.CaptureFixture[str], *reasons: str) -> None:
    """A training, a second one and the report: one note within the limit, then one error of mlflow-sync."""
    capsys.readouterr()
    start = time.monotonic()
    pipeline.train("sunet_tiny")
    pipeline.train("unet_small")
    first = time.monotonic() - start
    sync_or_warn(pipeline.results, "bench")
    assert first < address.LIMIT + 5  # and the trackers ask once
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("MLflow is not tracking: ")
    assert "python -m sunets mlflow-sync" in message
    assert any(reason in message for reason in reasons)
    with pytest.raises(TrackingError) as error:
        sync(pipeline.results)
    assert "\n" not in str(error.value)
    assert any(reason in str(error.value) for reason in reasons)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["http://127.0.0.1:{}", "postgresql+psycopg://user:secret@127.0.0.1:{}/x"])
def test_server_that_never_answers_costs_one_limit(
    uri: str,
    silent_port: int,
    db: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(address, "LIMIT", 2.0)
    monkeypatch.setattr(store, "LIMIT", 2.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(silent_port))
    pipeline = Pipeline(tmp_path)
    fails_once(pipeline, capsys, f"127.0.0.1:{silent_port}")
    start = time.monotonic()
    with pytest.raises(TrackingError, match="no answer within 2 s") as error:
        sync(pipeline.results)
    assert time.monotonic() - start < 6
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("password", ["secret", "se/cret", "se@cret", "se:cr@e/t"])
def test_no_password_is_shown(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+psycopg://user:{password}@host:5432/x")
    assert str(address.failure(OSError("no"))) == "postgresql+psycopg://user:***@host:5432/x: no"


COMMIT = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("create table experiments (name text)")
connection.execute("insert into experiments values ('kept')")
connection.commit()
connection.execute("pragma cache_size = 1")
connection.executemany("insert into experiments values (?)", [("lost" * 1000,)] * 100)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_commit_does_not_end_tracking(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    subprocess.run([sys.executable, "-c", COMMIT, str(file)], check=False)
    assert file.with_name("mlflow.db-journal").exists()
    assert address.check_file(file)
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("select name from experiments").fetchall() == [("kept",)]


def test_a_damaged_record_is_no_fault_of_mlflow(db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", live=False)
    (pipeline.records / "train/sunet_tiny.json").write_text("{")
    sync_or_warn(pipeline.results, "bench")
    message = capsys.readouterr().err
    assert message.startswith("MLflow is not brought up to date: ")
    assert "sunet_tiny.json: " in message
    assert "sqlite" not in message


def test_limit_is_ten_seconds() -> None:
    assert address.LIMIT == 10


def test_database_server_that_refuses_is_not_asked_again(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://user@127.0.0.1:9/x")
    fails_once(Pipeline(tmp_path), capsys, "127.0.0.1")


@pytest.mark.slow
def test_server_that_stops_answering_midway(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline(tmp_path)
    tracker = Tracker("train", pipeline.suite, "sunet_tiny", pipeline.plan("sunet_tiny"))
    tracker.log_epoch(0, row(1, 0))
    monkeypatch.setattr(address, "LIMIT", 1.0)
    released = threading.Event()
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: released.wait(60))
    start = time.monotonic()
    for epoch in (2, 3):
        tracker.log_epoch(0, row(epoch, 0))
    tracker.close()
    assert time.monotonic() - start < 4
    released.set()
    assert capsys.readouterr().err.count("no answer within 1 s") == 1


def not_a_database(file: Path) -> str:
    file.write_text("something else" * 100)
    return "file is not a database"


def a_directory(file: Path) -> str:
    file.mkdir()
    return "this is not a file"


def of_another_program(file: Path) -> str:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("create table studies (number int)")
        connection.commit()
    return "another program"


def below_a_file(file: Path) -> str:
    file.parent.rmdir()
    file.parent.write_text("")
    return "exists"


def cut_short(file: Path) -> str:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("create table experiments (number int)")
        connection.executemany("insert into experiments values (?)", [(i,) for i in range(10_000)])
        connection.commit()
    with file.open("r+b") as stream:
        stream.truncate(8192)
    return ""


@pytest.mark.parametrize("damage", [not_a_database, a_directory, of_another_program, below_a_file, cut_short])
def test_file_that_is_no_database_of_mlflow(
    damage: Callable[[Path], str],
    db: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "own" / "mlflow.db"
    file.parent.mkdir()
    reason = damage(file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("own*") if path.is_file()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    fails_once(Pipeline(tmp_path), capsys, reason)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("uri", ["ftp://nowhere", "sqlite", "mysql://host/x", "postgresql://[bad", "/a/folder"])
def test_address_that_mlflow_cannot_use(
    uri: str, db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    fails_once(Pipeline(tmp_path), capsys, "")


@pytest.mark.slow
@pytest.mark.parametrize("options", ["?timeout=60", "?timeout=60&check_same_thread=false"])
def test_database_address_with_options(
    options: str, template: Path, db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "with options" / "own.db"
    file.parent.mkdir()
    shutil.copy(template, file)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}{options}")
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny")
    assert len(runs()) == 4
    assert sync(pipeline.results).unchanged == 4
    assert not list(file.parent.glob("*?*=*"))


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///a.db", "a.db"),
        ("sqlite:////x/a b.db?timeout=60", "/x/a b.db"),
        ("sqlite+pysqlite:///a.db", "a.db"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("postgresql+psycopg://u@h/db", None),
        ("http://h:5000", None),
    ],
)
def test_file_of_an_address(uri: str, file: str | None) -> None:
    assert address.database_file(uri) == (Path(file) if file else None)


def test_bug_in_tracking_costs_no_stage(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", live=False)

    def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(tracking_live, "model_run", fail)
    monkeypatch.setattr(tracking_sync, "model_run", fail)
    pipeline.train("unet_small")
    sync_or_warn(pipeline.results, "bench")
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(KeyError, match="a bug"):
        sync(pipeline.results)


WITHOUT_HOME = """
import pwd
def getpwuid(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
import os
from pathlib import Path
from sunets.tracking.sync import sync
print(sync(Path("results")))
assert "HOME" not in os.environ
"""


@pytest.mark.slow
def test_user_without_home_directory(db: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.train("sunet_tiny", live=False)
    environ = {k: v for k, v in os.environ.items() if k != "HOME"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HOME], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "MLflow: 4 runs created, 0 updated, 0 unchanged\n"
    assert not done.stderr


@pytest.mark.slow
def test_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "results/bench/records").mkdir(parents=True)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-m", "sunets", "mlflow-sync"], env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: MLflow: sqlite:///{tmp_path}: this is not a file; ")
    assert done.stderr.count("\n") == 1

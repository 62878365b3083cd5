"""What tests share before any of them imports torch: one thread per process, servers, and a count of what used them."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from checkout import finished_clone

if TYPE_CHECKING:
    from sunets.data.manifest import Manifest

os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other on few cores are slow

REQUIRE_POSTGRES = os.environ.get("SUNETS_REQUIRE_POSTGRES", "") not in ("", "0")
"""Whether a missing PostgreSQL server is a failure, as in CI, rather than a skip."""


def _hides_gpus(config: pytest.Config) -> bool:
    """Return whether a run sees no GPU: all do, except that of the tests that need one (`make test-gpu`)."""
    return bool(config.option.markexpr != "gpu")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from tests that compare with figures of a CPU, so that they run alike on every machine."""
    if _hides_gpus(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs PostgreSQL so that xdist reports it; put files whose tests are mostly slow first.

    Two workers that take files in this order end at about the same time: the longest file does not start last. What
    needs a hidden GPU is skipped.
    """
    for item in items:
        if "postgres" in getattr(item, "fixturenames", ()):
            item.user_properties.append(("postgres", True))
        if _hides_gpus(config) and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: `make test-gpu`"))
    slow, tests = Counter[Path](), Counter[Path]()
    for item in items:
        tests[item.path] += 1
        slow[item.path] += item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: -slow[item.path] / tests[item.path])


def _postgres_reports(config: pytest.Config, *outcomes: str) -> list[pytest.TestReport]:
    stats = config.pluginmanager.get_plugin("terminalreporter").stats
    reports = [report for outcome in outcomes for report in stats.get(outcome, [])]
    return [report for report in reports if dict(getattr(report, "user_properties", ())).get("postgres")]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that has to use PostgreSQL and did not, whatever took its tests away."""
    if not REQUIRE_POSTGRES or hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    if session.exitstatus == pytest.ExitCode.OK and not _postgres_reports(session.config, "passed", "failed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(config: pytest.Config) -> None:
    """Say how many tests ran against PostgreSQL, how many did not, and why."""
    ran = _postgres_reports(config, "passed", "failed")
    reasons = (str(report.longrepr[2]) for report in _postgres_reports(config, "skipped"))
    skipped = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    broken = _postgres_reports(config, "error")
    if not (ran or skipped or broken or REQUIRE_POSTGRES):
        return
    lines = [f"{len(ran)} tests ran against a server"]
    lines += [f"{number} skipped ({reason})" for reason, number in skipped.items()]
    lines += [f"{len(broken)} could not start"] if broken else []
    lines += ["SUNETS_REQUIRE_POSTGRES is set, so that this run fails"] if REQUIRE_POSTGRES and not ran else []
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line(f"PostgreSQL: {'; '.join(lines)}", yellow=bool(skipped), red=not ran and REQUIRE_POSTGRES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which the smoke benchmark has run, for one module of tests."""
    own = tmp_path_factory.getbasetemp()  # of this worker, where there are several
    return finished_clone(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own, tmp_path_factory.mktemp("clone"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command of `python -m sunets` in this process, which imports torch once, with another checkout's files.

    `app` is another command line, such as that of the ablations.

    For a checkout whose code is of the same bytes; where code was edited, the command needs a process: `checkout.run`.
    """
    from sunets import __main__ as commands
    from sunets.core import cli

    def run(root: Path, *arguments: str, code: int = 0, app: Any = commands.app) -> str:
        monkeypatch.chdir(root)
        monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
        monkeypatch.setattr(cli, "refuse_other_checkout", lambda: None)
        monkeypatch.setattr(sys, "argv", ["sunets", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(app)
        output = "".join(capsys.readouterr())
        assert (ended.value.code or 0) == code, output
        return output

    return run


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The tiny data set for segmentation; tests that write into it make their own."""
    from tiny import tiny_manifest  # imports torch

    return tiny_manifest(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow: making one takes seconds, copying it none."""
    from mlflow import MlflowClient

    from sunets.tracking import store

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    store._create_database(file, MlflowClient)
    return file


@pytest.fixture
def fresh(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Makes another empty database the one in use."""
    numbers = iter(range(100))

    def switch() -> Path:
        file = tmp_path / f"db{next(numbers)}" / "mlflow.db"
        file.parent.mkdir()
        shutil.copy(template, file)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        return file

    return switch


@pytest.fixture
def db(fresh: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The database in use, empty; trackers end with the test."""
    from sunets.tracking import live

    registered: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(live, "_warned", threading.Event())
    yield fresh()
    for close in registered:
        close()


def _postgres_binaries() -> Path | None:
    """Directory of the newest PostgreSQL's programs; None where it is not installed."""
    found = [Path(p) for p in sorted(Path("/usr/lib/postgresql").glob("*/bin")) if (p / "initdb").exists()]
    if not found and (which := shutil.which("initdb")):
        found = [Path(which).resolve().parent]
    return found[-1] if found else None


def _without_postgres(reason: str) -> NoReturn:
    """Skip the test, or fail it where a server is required."""
    if REQUIRE_POSTGRES:
        pytest.fail(f"{reason}, and SUNETS_REQUIRE_POSTGRES is set", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server for these tests alone, run by an unprivileged user."""
    bin_dir, as_user = _postgres_binaries(), []
    if bin_dir is None:
        _without_postgres("PostgreSQL is not installed: no initdb in /usr/lib/postgresql/*/bin or on PATH")
    home = Path(tempfile.mkdtemp(prefix="sunets-postgres-"))  # pytest's own directories are closed to other users
    if os.geteuid() == 0:
        if not shutil.which("runuser") or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            _without_postgres("PostgreSQL refuses root, and there is no user `postgres` to run it as")
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(home, "postgres")
    data = home / "data"

    def run(*command: str) -> None:
        done = subprocess.run([*as_user, *command], cwd=home, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    run(str(bin_dir / "initdb"), "-D", str(data), "-U", "sunets", "-A", "trust", "--no-sync")
    options = f"-c listen_addresses='' -k {home} -c fsync=off"
    run(str(bin_dir / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(home / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg://sunets@/postgres?host={home}"
    finally:
        run(str(bin_dir / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(home)

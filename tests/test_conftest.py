"""The closing lines of a test run: tests against PostgreSQL are counted, and do not vanish where they are required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TESTS = """
import conftest
import pytest

{setup}

def test_one(postgres): pass

def test_two(postgres): pass

def test_elsewhere(): pass
"""
MISSING = "conftest._postgres_binaries = lambda: None"
PRESENT = "@pytest.fixture\ndef postgres(): return 'address'"


@pytest.mark.parametrize(
    ("setup", "required", "workers", "code", "words"),
    [
        (PRESENT, False, "2", 0, "2 tests ran against a server"),
        (PRESENT, True, "0", 0, "2 tests ran against a server"),
        (MISSING, False, "2", 0, "0 tests ran against a server; 2 skipped (PostgreSQL is not installed: no initdb in"),
        (MISSING, True, "2", 1, "0 tests ran against a server; 2 could not start; SUNETS_REQUIRE_POSTGRES is set"),
        (MISSING, True, "0", 1, "0 tests ran against a server; 2 could not start; SUNETS_REQUIRE_POSTGRES is set"),
    ],
    ids=["present", "present, required", "missing", "missing, required", "missing, required, one process"],
)
def test_postgresql_is_counted(tmp_path: Path, setup: str, required: bool, workers: str, code: int, words: str) -> None:
    done = _run(tmp_path, TESTS.format(setup=setup), required, "--numprocesses", workers)
    assert done.returncode == code, done.stdout
    assert f"PostgreSQL: {words}" in done.stdout


def test_a_run_that_must_use_postgresql_and_selects_none_of_its_tests_fails(tmp_path: Path) -> None:
    done = _run(tmp_path, TESTS.format(setup=PRESENT), True, "-k", "elsewhere")
    assert done.returncode == 1, done.stdout
    assert "PostgreSQL: 0 tests ran against a server; SUNETS_REQUIRE_POSTGRES is set" in done.stdout
    assert _run(tmp_path, TESTS.format(setup=PRESENT), False, "-k", "elsewhere").returncode == 0


def _run(folder: Path, tests: str, required: bool, *options: str) -> subprocess.CompletedProcess[str]:
    for name in ("conftest.py", "checkout.py"):
        shutil.copy(HERE / name, folder)
    (folder / "test_it.py").write_text(tests)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SUNETS_"))}
    environment |= {"SUNETS_REQUIRE_POSTGRES": "1"} if required else {}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options, str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

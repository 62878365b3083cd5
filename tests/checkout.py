"""Fresh checkouts for tests that run commands as a user does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "DVC_", "MLFLOW_", "OPTUNA_"))} | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": ".",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_CONFIG_GLOBAL": os.devnull,
}


def clone(target: Path) -> Path:
    """Make a repository of what a commit of this checkout would hold, with the bytes of the smoke preset in place."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if not name.startswith(("results/", "docs/")) and not name.endswith("dvc.lock") and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    shutil.copyfile(ROOT / "presets" / "smoke.yaml", target / "params.yaml")
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=target, env=ENV, check=True)
    return target


def replace_once(path: Path, old: str, new: str) -> None:
    """Replace the first occurrence of a text in a file, which must have it."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


MADE = (".dvc/cache", ".work", "data", "dvc.lock", "mlflow.db", "outputs", "results")
"""What `dvc repro` of the smoke benchmark makes."""


def finished_clone(base: Path, target: Path) -> Path:
    """Copy a clone in which `dvc repro` has run the smoke benchmark; the first caller of a test run makes it.

    With SUNETS_SMOKE_CLONE, the path of a clone in which it has run already, what it made is taken from there.

    Args:
        base: directory that the workers of this test run share.
        target: where the copy goes; an empty directory.
    """
    made = base / "finished clone"
    with FileLock(base / "finished.lock"):
        if not (made / "repro.log").exists():
            clone(made)
            if other := os.environ.get("SUNETS_SMOKE_CLONE"):
                for name in MADE:  # where its code is of the same bytes, DVC finds nothing to run
                    copy = shutil.copytree if Path(other, name).is_dir() else shutil.copy
                    copy(Path(other, name), made / name)
            output = run(made, "dvc", "repro")
            (made / "repro.log").write_text(output)
    shutil.copytree(made, target, symlinks=True, dirs_exist_ok=True)
    (target / "repro.log").unlink()
    return target


def _keep_to_one_core() -> None:
    """Give each worker of pytest-xdist one core for the commands that it starts.

    A pipeline with one core trains in its stages' own processes: with all cores taken by workers, a pool of processes
    would only import torch once more per stage.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


def edit(path: Path, changes: dict[str, str]) -> None:
    """Replace the first match of each pattern in a file; every other byte stays as it is committed.

    A file that is read and dumped anew would lose the faults that DVC or a reader must see, such as a key that stands
    twice.

    Raises:
        AssertionError: a pattern does not occur.
    """
    text = path.read_bytes().decode()
    for pattern, replacement in changes.items():
        text, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
        assert count, f"{path}: {pattern} does not occur"
    path.write_bytes(text.encode())


def start(root: Path, *command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=root,
        env=ENV | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_keep_to_one_core,
    )


def run(root: Path, *command: str, code: int = 0, env: dict[str, str] | None = None) -> str:
    process = start(root, *command, env=env)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output
    return output


def start_shell(root: Path, command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command line as the README has it, in a process group for itself; `make` takes this environment."""
    if not (root / ".venv").exists():  # by a link: a target of make cannot have a space in its path
        (root / ".venv").symlink_to(sys.prefix)
    make = 'make() { command make --assume-old=.venv/.stamp "$@"; }\n'
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", make + command],
        cwd=root,
        env={k: v for k, v in ENV.items() if not k.startswith(("PYTEST_", "SUNETS_", "MAKE", "MFLAGS"))} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_keep_to_one_core,
    )


def shell(root: Path, command: str, env: dict[str, str] | None = None, timeout: float = 500) -> str:
    """Run what `start_shell` starts to its end; returns what it printed."""
    process = start_shell(root, command, env)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{command}\n{output}"
    return output


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)

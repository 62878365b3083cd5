"""The job file that `docs/slurm.py` gives SLURM."""

from __future__ import annotations

import os
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[1] / "docs" / "slurm.py"


@pytest.fixture
def slurm() -> Any:
    pytest.importorskip("dask_jobqueue")
    return SimpleNamespace(**runpy.run_path(str(PATH)))


@pytest.mark.parametrize("gpu", [True, False])
def test_a_worker_gets_one_job_s_share_and_runs_in_this_checkout(
    gpu: bool, slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "it's mine; $(touch x)"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    given = ["--queue", "fast", "--walltime", "12:00:00", "--cpus", "6", "--memory", "20GiB", *["--gpu"] * gpu]
    options = slurm.parse([*given, "--", "dvc", "repro", "--dry"])
    assert options.command == ["dvc", "repro", "--dry"]
    with slurm.slurm_cluster(options) as cluster:
        *head, last = cluster.job_script().strip().splitlines()
    for line in ("-p fast", "-n 1", "--cpus-per-task=6", "--mem=20G", "-t 12:00:00"):
        assert f"#SBATCH {line}" in head
    assert ("#SBATCH --gres=gpu:1" in head) == gpu
    assert ["cd", str(checkout)] in [shlex.split(line) for line in head if line.startswith("cd ")]
    words = last.split()
    assert words[words.index("--nthreads") + 1] == "1"
    assert "--no-nanny" in words
    assert ("GPU=1" in words) == gpu
    assert any(word.startswith("tcp://") for word in words)


STOPPED = """
import argparse, contextlib, importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("slurm", sys.argv[1])
slurm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slurm)

@contextlib.contextmanager
def cluster(options):
    yield argparse.Namespace(adapt=lambda **bounds: None, scheduler_address="tcp://nowhere")
    print("cancelled", flush=True)

slurm.slurm_cluster = cluster
sys.argv[1:] = sys.argv[2:]
sys.exit(slurm.main())
"""
COMMAND = """
import signal, sys, time
def end(*_):
    time.sleep(1)  # a stage writes its checkpoint
    print("ended in its own time", flush=True)
    sys.exit(3)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_command_and_cancels_the_workers(number: int, tmp_path: Path) -> None:
    pytest.importorskip("dask_jobqueue")
    arguments = [sys.executable, "-c", STOPPED, str(PATH), "--", sys.executable, "-c", COMMAND]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "started\n"
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # as Ctrl-C on a terminal
        else:
            run.send_signal(number)
        rest = run.stdout.read()
    assert rest == "ended in its own time\ncancelled\n"
    assert run.returncode == 3

"""The job file that `docs/slurm.py` gives SLURM."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[1] / "docs" / "slurm.py"


@pytest.fixture
def slurm() -> Any:
    pytest.importorskip("dask_jobqueue")
    spec = importlib.util.spec_from_file_location("slurm", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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

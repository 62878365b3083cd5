"""Paths of a benchmark's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sunets.core.names import PREPARED


@dataclass(frozen=True)
class BenchmarkPaths:
    """Paths of a benchmark's files below the root of the checkout."""

    benchmark: str
    root: Path = Path()

    @property
    def data(self) -> Path:
        """Prepared data: manifest, split lists, drawn images, converted masks."""
        return self.root / PREPARED / self.benchmark

    @property
    def results(self) -> Path:
        """Tables, figures and page."""
        return self.root / "results" / self.benchmark

    @property
    def records(self) -> Path:
        """Records, from which the tables are made."""
        return self.results / "records"

    def weights(self, model: str, seed: int) -> Path:
        """Trained weights of one model and seed."""
        return self.root / "outputs" / self.benchmark / "weights" / model / f"seed{seed}.pt"

    def predictions(self, model: str) -> Path:
        """Label images of the qualitative test images, first seed."""
        return self.root / "outputs" / self.benchmark / "predictions" / model

    @property
    def watched(self) -> Path:
        """Digests of the data set's files and of `train.init_from`, as stage `watch` last saw them."""
        return self.root / ".watch" / "files.json"

    @property
    def work(self) -> Path:
        """Checkpoints, results of jobs and locks: never committed, safe to delete when nothing runs."""
        return self.root / ".work"

    @property
    def job_results(self) -> Path:
        """Results of jobs, each under the fingerprint of its inputs."""
        return self.work / "results"

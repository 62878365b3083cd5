"""Stage `prepare`: check a data set, or draw the embedded one, and write its manifest."""

from __future__ import annotations

from pathlib import Path

from sunets.config import Suite
from sunets.data import Manifest, prepare
from sunets.stages import Layout, stage


def prepare_stage(suite: Suite, root: Path = Path()) -> Manifest:
    """Prepare the benchmark's data under `data/<benchmark>/`.

    Raises:
        DataError: every fault found, with file names; nothing is written then.
    """
    layout = Layout(suite.benchmark, root)
    with stage("prepare", layout, __name__):
        # DVC wants the inputs of `ablation_report` to exist, in a benchmark without studies too.
        (layout.records / "ablations").mkdir(parents=True, exist_ok=True)
        return prepare(suite.data, layout.data)

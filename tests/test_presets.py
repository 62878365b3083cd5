"""Committed parameter files as DVC reads them: their own bytes, never a copy that these tests have dumped anew."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from checkout import ROOT, clone, ran, run
from dvc.utils.serialize import load_yaml

PRESETS = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
FILES = [*PRESETS, ROOT / "dvc.yaml"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("presets"))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_dvc_can_read(path: Path) -> None:
    assert load_yaml(str(path)) == yaml.safe_load(path.read_bytes())


def test_every_committed_yaml_file_is_read_here() -> None:
    """Of those that DVC or a command reads; dvc.lock files are DVC's own."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    found = {name for name in listed.stdout.splitlines() if name.endswith((".yaml", ".yml"))}
    assert {_name(path) for path in FILES} == {name for name in found if (ROOT / name).exists()}


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=_name)
def test_dvc_plans_every_stage_of_a_fresh_clone(path: Path, checkout: Path) -> None:
    shutil.copyfile(path, checkout / "params.yaml")
    params = yaml.safe_load(path.read_bytes())
    stages = {"prepare", "speed", "report", "ablation_report"}
    stages |= {f"{stage}@{model}" for stage in ("tune", "train", "evaluate", "cost") for model in params["models"]}
    stages |= {f"ablate@{study}" for study in params["ablations"]}
    stages |= {f"watch@{key}" for key in params.get("watch", {})}
    # Without --force, DVC looks for what it could restore of a stage that is not in dvc.lock, and hashes absent data.
    planned = ran(run(checkout, "dvc", "repro", "--dry", "--force"))
    assert sorted(planned) == sorted(stages)

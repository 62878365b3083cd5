"""Fresh checkouts for tests that run commands as a user does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "DVC_", "MLFLOW_", "OPTUNA_"))} | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": ".",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_CONFIG_GLOBAL": os.devnull,
}


def clone(target: Path) -> Path:
    """What a commit of this checkout would hold, as a repository of its own, with a tiny preset in place."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if not name.startswith(("results/", "docs/")) and not name.endswith("dvc.lock") and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    params = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
    params["models"]["sunet_tiny"]["width"] = 4
    (target / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=target, env=ENV, check=True)
    return target


def start(root: Path, *command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=root,
        env=ENV | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(root: Path, *command: str, code: int = 0, env: dict[str, str] | None = None) -> str:
    process = start(root, *command, env=env)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output
    return output


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)

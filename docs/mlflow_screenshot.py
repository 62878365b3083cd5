"""Picture of MLflow's view of a benchmark, for the README: `python docs/mlflow_screenshot.py [BENCHMARK] [FILE]`.

Needs a Chromium on the PATH (Debian: `apt-get install chromium`) and the benchmark's runs in mlflow.db.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from mlflow import MlflowClient


def main(benchmark: str = "synthetic", picture: str = "docs/mlflow.png") -> None:
    """Serve mlflow.db on a free local port, open the comparison of the benchmark's models, save what it shows."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium on the PATH; install one")
    database = f"sqlite:///{Path('mlflow.db').resolve()}"
    client = MlflowClient(database)
    experiment = client.get_experiment_by_name(benchmark)
    if experiment is None:
        sys.exit(f"mlflow.db has no experiment {benchmark!r}; run `dvc repro` or `python -m sunets mlflow-sync` first")
    runs = client.search_runs([experiment.experiment_id], "tags.`sunets.current` = 'true'", max_results=1000)
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags and "score.miou.mean" in r.data.metrics]
    ids = ",".join(f'"{run.info.run_id}"' for run in parents)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--port", str(port), "--backend-store-uri", database],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        base = f"http://127.0.0.1:{port}"
        _wait_for(f"{base}/health")
        url = f'{base}/#/compare-runs?runs=[{ids}]&experiments=["{experiment.experiment_id}"]'
        with tempfile.TemporaryDirectory() as profile:
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
            options += ["--disable-background-networking", f"--user-data-dir={profile}", "--window-size=1500,1100"]
            options += ["--virtual-time-budget=30000", f"--screenshot={Path(picture).resolve()}"]
            subprocess.run([chromium, *options, url], check=True, capture_output=True, timeout=180)
    finally:
        server.terminate()
        server.wait()
    print(picture)


def _wait_for(url: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"{url} did not answer")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Pictures of the tools' pages for docs/: `python docs/screenshots.py [BENCHMARK] [STUDY]`.

As the pages open, nothing selected: `mlflow_runs.png` has the table of runs at the link of `make ui`, `mlflow.png`
compares the benchmark's models, `mlflow_ablation.png` the trials of a study; `report_html.png` is the page of
`python -m sunets report --html`, `optuna_dashboard.png` the tuning of the first model. Needs Chromium and its driver on
the PATH (Debian: `apt-get install chromium chromium-driver`) and the benchmark's runs in the database: that of
`MLFLOW_TRACKING_URI`, or mlflow.db. The last two pictures are left out without their file, or without optuna-dashboard.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from sunets.tracking.address import tracking_uri
from sunets.tracking.store import CURRENT_RUNS, Store


def main(benchmark: str = "synthetic", study: str = "dilation") -> None:
    """Serve the database and a journal on free local ports, open the pages, save what they show."""
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        sys.exit("no Chromium or no chromedriver on the PATH; install them")
    models = _runs(benchmark, "tags.kind = 'model'")
    trials = _runs(f"{benchmark}/ablations", f"tags.kind = 'trial' and tags.study = '{study}'")
    # Trials that tune an arm have another score, on the validation split.
    trials = [run for run in trials if run.data.tags.get("phase") not in ("tuning", "search")]
    models.sort(key=lambda run: run.info.start_time)
    trials.sort(key=lambda run: int(run.data.tags["number"]))
    web = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--backend-store-uri", tracking_uri(), "--port"]
    with _serve(web, "/health") as mlflow, _serve([driver, "--port"], "/status", joined=True) as browser:
        session = _Session(browser, chromium)
        try:
            session.open(mlflow)
            # MLflow opens its assistant on the first visit, beside what the picture is about.
            session.run("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
            session.run("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")
            session.open("about:blank")  # else only the fragment would change
            session.open(Store().link(benchmark, mlflow))
            session.wait_for("[row-id]")
            session.save("docs/mlflow_runs.png", height=780)
            for runs, picture in ((models, "docs/mlflow.png"), (trials, "docs/mlflow_ablation.png")):
                ids = json.dumps([run.info.run_id for run in runs])
                session.open("about:blank")
                session.open(
                    f"{mlflow}/#/compare-runs?runs={ids}&experiments={json.dumps([runs[0].info.experiment_id])}"
                )
                session.wait_for(".pcp-plot .axis-title")
                session.save(picture)
            if (page := Path(f"results/{benchmark}/report.html")).exists():
                session.open(page.resolve().as_uri())
                session.wait_for("figure img")
                session.save("docs/report_html.png")
            journals = Path(f".work/tune/{benchmark}").glob(f"{models[0].data.tags['model']}-*.journal")
            journal = max(journals, key=lambda path: path.stat().st_mtime, default=None)
            if journal is not None and (command := shutil.which("optuna-dashboard")):
                with _serve([command, str(journal), "--port"], "/api/studies") as dashboard:
                    session.open(f"{dashboard}/dashboard/studies/0")
                    session.wait_for(".js-plotly-plot .scatterlayer")
                    session.save("docs/optuna_dashboard.png")
        finally:
            session.call("DELETE", "")


def _runs(experiment: str, query: str) -> list[Any]:
    client = MlflowClient(tracking_uri())
    found = client.get_experiment_by_name(experiment)
    query += f" and {CURRENT_RUNS}"
    runs = list(client.search_runs([found.experiment_id], query, max_results=1000)) if found else []
    if not runs:
        sys.exit(f"no such runs of {experiment!r} in MLflow; run `python -m sunets mlflow-sync` first")
    return runs


@contextmanager
def _serve(command: list[str], health: str, *, joined: bool = False) -> Iterator[str]:
    """A server on a free local port, which is the last argument; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(
        [*command[:-1], f"{command[-1]}={port}"] if joined else [*command, port],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}{health}")
        yield address
    finally:
        server.terminate()
        server.wait()


def _wait_for(url: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"{url} did not answer")


class _Session:
    """A window of the browser: the few commands of the WebDriver protocol that a picture needs."""

    def __init__(self, driver: str, chromium: str) -> None:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1440,1100"]
        options = {"binary": chromium, "args": [*arguments, "--enable-unsafe-swiftshader"]}  # the plots need WebGL
        self.address = f"{driver}/session"
        answer = self.call("POST", "", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self.address += f"/{answer['sessionId']}"

    def call(self, method: str, command: str, content: dict[str, Any] | None = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + command, body, header, method=method)
        with urllib.request.urlopen(request, timeout=180) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def save(self, picture: str, height: int = 1100) -> None:
        self.call("POST", "/window/rect", {"width": 1440, "height": height})
        time.sleep(1)
        Path(picture).write_bytes(base64.b64decode(self.call("GET", "/screenshot")))
        self.call("POST", "/window/rect", {"width": 1440, "height": 1100})
        print(picture)

    def wait_for(self, selector: str) -> None:
        for _ in range(120):
            if self.run(f"return document.querySelector('{selector}') !== null"):
                time.sleep(3)  # until the lines are drawn
                return
            time.sleep(0.5)
        sys.exit(f"the page did not show {selector}")


if __name__ == "__main__":
    main(*sys.argv[1:])

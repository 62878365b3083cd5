"""Reading and writing of runs in one MLflow server or database."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from sunets.core.config import fingerprint
from sunets.tracking.view import Run

CURRENT, KEY, SLOT, DIGEST = "sunets.current", "sunets.key", "sunets.slot", "sunets.digest"
PARENT = "mlflow.parentRunId"

NOTE = """\
One parent run per {item}; filter with ``tags.`sunets.current` = 'true'`` to hide runs of earlier configurations.
The score that runs are compared by is NaN until it is measured; `aim/` repeats it, so that plots open on it.
Rebuilt from the records by `python -m sunets mlflow-sync`: deleting the database loses nothing but system metrics."""


class TrackingError(ValueError):
    """MLflow cannot be reached or used; says where and what to do."""


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the file mlflow.db in the current directory: the root of the checkout in a pipeline."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


class Store:
    """Reads and writes runs of one MLflow server or database."""

    def __init__(self) -> None:
        # Before the import: telemetry starts there. A server that does not answer shall not hold up a training.
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would tear the progress bars
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        }.items():
            os.environ.setdefault(name, value)
        import mlflow  # here and not above, so that a machine without it can train

        for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.entities: Any = mlflow.entities
        self.uri = tracking_uri()
        file = Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None
        # Find-or-create is not atomic in MLflow: a user's processes on one machine take turns.
        elsewhere = Path(tempfile.gettempdir()) / f"sunets-mlflow-{fingerprint(self.uri, str(Path.home()))}.lock"
        self.lock = FileLock(f"{file}.lock" if file else elsewhere)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        with self.lock:
            if file is not None and not file.exists():
                _create_database(file, mlflow.MlflowClient)
            self.client: Any = mlflow.MlflowClient(self.uri)
            self.client.search_experiments(max_results=1)  # fails here, once, if it fails
        self._artifacts = file and file.resolve().parent / "mlruns"
        self._experiments: dict[str, str] = {}

    def experiment(self, name: str, *, create: bool = True) -> str | None:
        """Id of an experiment."""
        if name not in self._experiments:
            with self.lock:
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    if not create:
                        return None
                    # Absolute, or the artifacts would follow the working directory; a server has its own place.
                    place = self._artifacts and (self._artifacts / name).as_uri()
                    note = NOTE.format(item="study" if name.endswith("/ablations") else "model")
                    tags = {"mlflow.note.content": note}
                    self._experiments[name] = self.client.create_experiment(name, place, tags)
                    return self._experiments[name]
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(found.experiment_id)
                self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def search(self, experiment: str, tag: str, value: str) -> list[Any]:
        """All runs of an experiment with this tag, newest first."""
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment(experiment)], f"tags.`{tag}` = '{value}'", max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found

    def open(self, run: Run, parent: str | None, compatible: Callable[[Any], bool]) -> tuple[Any, bool]:
        """The MLflow run under this key, created where there is none, current and alone so in its slot.

        Args:
            run: what it should look like; its name, tags, parameters and data set are written.
            parent: id of the parent run.
            compatible: whether a run of the same key may be taken; its curves may differ on another machine.

        Returns:
            The run as it was before, and whether it is new.
        """
        tags = {**run.tags, KEY: run.key, SLOT: run.slot, CURRENT: "true"} | ({PARENT: parent} if parent else {})
        with self.lock:
            same = self.search(run.experiment, KEY, run.key)
            same.sort(key=lambda found: found.data.tags.get(CURRENT) != "true")
            chosen = next(filter(compatible, same), None)
            created = chosen is None
            if chosen is None:
                start = int(1000 * (run.seconds[0] if run.seconds else time.time()))
                chosen = self.client.create_run(self.experiment(run.experiment), start, tags, run.name)
            for other in self.search(run.experiment, SLOT, run.slot):
                if other.info.run_id != chosen.info.run_id and other.data.tags.get(CURRENT) == "true":
                    self.retire(other)
        self._write(chosen, run, tags)
        return chosen, created

    def retire(self, run: Any) -> None:
        """Mark a run as one of an earlier configuration; one that looks as if it still ran was interrupted."""
        self.client.set_tag(run.info.run_id, CURRENT, "false")
        if run.info.status == "RUNNING":
            self.client.set_terminated(run.info.run_id, "KILLED")

    def _write(self, found: Any, run: Run, tags: Mapping[str, str]) -> None:
        params = [self.entities.Param(k, v) for k, v in run.params.items() if k not in found.data.params]
        new = [self.entities.RunTag(k, v) for k, v in tags.items() if found.data.tags.get(k) != v]
        for start in range(0, max(len(params), len(new)), 100):  # MLflow's limit per call
            self.client.log_batch(found.info.run_id, params=params[start : start + 100], tags=new[start : start + 100])
        if run.dataset and not (found.inputs and found.inputs.dataset_inputs):
            name, digest = run.dataset
            source = json.dumps({"tags": {"mlflow.source.name": "python -m sunets prepare"}})
            dataset = self.entities.Dataset(name, digest[:36], "code", source)
            context = [self.entities.InputTag("mlflow.data.context", "training")]
            self.client.log_inputs(found.info.run_id, [self.entities.DatasetInput(dataset, context)])

    def log(self, run_id: str, points: Mapping[tuple[str, int], float], millis: int | None = None) -> None:
        """Write points of curves.

        Args:
            run_id: the run.
            points: (metric, step) -> value.
            millis: time stamp; None makes it from the step, so that a point written twice is kept once.
        """
        metrics = [
            self.entities.Metric(name, value, 1000 * step if millis is None else millis, step)
            for (name, step), value in points.items()
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit per call
            self.client.log_batch(run_id, metrics=metrics[start : start + 1000])

    def curve(self, run_id: str, name: str) -> dict[int, float]:
        """Step -> value of one metric."""
        return {point.step: point.value for point in self.client.get_metric_history(run_id, name)}

    def finish(self, run: Run, parent: str | None = None) -> tuple[str, str]:
        """Make the run look as wanted, whatever of it is there.

        Returns:
            The run's id, and "created", "updated" or "unchanged".
        """
        digest = run.digest
        probe = next((name for name, _ in run.points if name == "train.loss"), next((n for n, _ in run.points), None))
        wanted = {step: value for (name, step), value in run.points.items() if name == probe}

        def compatible(found: Any) -> bool:
            if found.data.tags.get(DIGEST) == digest:
                return True
            agrees = all(run.params.get(name, value) == value for name, value in found.data.params.items())
            return agrees and (probe is None or self.curve(found.info.run_id, probe).items() <= wanted.items())

        found, created = self.open(run, parent, compatible)
        run_id, tags = found.info.run_id, found.data.tags
        if not created and tags.get(DIGEST) == digest and found.info.status == run.status:
            return run_id, "unchanged" if tags.get(CURRENT) == "true" and tags.get(PARENT) == parent else "updated"
        first = run.first if created else {}
        self.log(run_id, first | dict(run.points))
        known = found.data.metrics | {name: value for (name, _), value in first.items()}
        latest = {name: value for name, value in run.values.items() if known.get(name) != value}
        self.log(run_id, {(name, 0): value for name, value in latest.items()}, int(1000 * time.time()))
        for path, folder in run.files:
            self.client.log_artifact(run_id, str(path), folder)
        if found.info.status != run.status:
            self.client.set_terminated(run_id, run.status, run.seconds and int(1000 * run.seconds[1]))
        self.client.set_tag(run_id, DIGEST, digest)  # last: what was cut short is written again
        return run_id, "created" if created else "updated"


def _create_database(file: Path, client: Callable[[str], Any]) -> None:
    """Create MLflow's tables beside `file` and move them into place: a kill meanwhile leaves no broken database."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        client(f"sqlite:///{temporary}").search_experiments(max_results=1)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)

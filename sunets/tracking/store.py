"""Reading and writing runs on one MLflow server or database."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from sunets.core.config import fingerprint
from sunets.tracking import address
from sunets.tracking.address import CREATION_LIMIT, LIMIT, within
from sunets.tracking.view import CURVES, Network, Run

CURRENT, KEY, SLOT, DIGEST = "sunets.current", "sunets.key", "sunets.slot", "sunets.digest"
EXTERNAL = "mlflow.model.isExternal"
"""MLflow's mark of a model whose files it does not hold; loading one raises an error that says so."""
PARENT, PROCESS = "mlflow.parentRunId", "sunets.process"
VIEW = "sunets"
"""Key of the shared view of the run table in MLflow's links."""
_LEFT = ("attributes.`Run Name`", "runDateAndNestInfo")
"""Columns of MLflow's run table that it keeps first."""

CURRENT_RUNS = f"tags.`{CURRENT}` = 'true'"
"""Filter that hides runs of earlier configurations."""
NOTE = f"""\
One parent run per {{item}}; the filter ``{CURRENT_RUNS}`` hides runs of earlier configurations.
The headline score is NaN until it is measured; `aim/` repeats it, so that plots open on it.
`python -m sunets mlflow-sync` rebuilds the runs from the records: deleting the database loses only system metrics."""


class Store:
    """Client of one MLflow server or database."""

    def __init__(self) -> None:
        """Connect to the server or database.

        Raises:
            TrackingError: MLflow is not installed, or the server or database does not answer or cannot be used.
        """
        # Before the import, which starts the telemetry. Short retries end calls that `within` has given up.
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would break the progress bars
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        }.items():
            os.environ.setdefault(name, value)
        self.uri = address.tracking_uri()
        self._experiments: dict[str, str] = {}
        self._views: dict[str, list[str]] = {}
        with address.explained():
            mlflow = _import_mlflow()
            self.entities: Any = mlflow.entities
            file = address.database_file(self.uri)
            # Find-or-create is not atomic in MLflow: processes of a user on one machine take turns.
            name = f"sunets-mlflow-{fingerprint(self.uri, os.getuid())}.lock"
            self.lock = FileLock(f"{file}.lock" if file else Path(tempfile.gettempdir()) / name, timeout=CREATION_LIMIT)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            elif "sql" in self.uri.partition(":")[0]:
                address.check_server(self.uri)
            with self.lock:
                if file is not None and not address.check_file(file):
                    _create_database(file, mlflow.MlflowClient)
                client = mlflow.MlflowClient(self.uri)
                # The first call creates the tables of a database.
                limit = LIMIT if self.uri.startswith("http") else CREATION_LIMIT
                within(limit, client.search_experiments, max_results=1)
        self.client: Any = address.Limited(client)
        self._artifacts = file and file.resolve().parent / "mlruns"

    def experiment(self, name: str, *, create: bool = True) -> str | None:
        """Find or create an experiment and return its id; None if it does not exist and may not be created."""
        if name not in self._experiments:
            with self.lock:
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    if not create:
                        return None
                    # Absolute: a relative path would follow the working directory. A server chooses the path itself.
                    artifacts = self._artifacts and (self._artifacts / name).as_uri()
                    note = NOTE.format(item="study" if name.endswith("/ablations") else "model")
                    tags = {"mlflow.note.content": note}
                    self._experiments[name] = self.client.create_experiment(name, artifacts, tags)
                    return self._experiments[name]
                if experiment.lifecycle_stage == "deleted":
                    self.client.restore_experiment(experiment.experiment_id)
                self._experiments[name] = experiment.experiment_id
        return self._experiments[name]

    def search(self, experiment: str, tag: str, value: str) -> list[Any]:
        """Return all runs of an experiment with this tag, newest first."""
        runs: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment(experiment)], f"tags.`{tag}` = '{value}'", max_results=1000, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def open(self, run: Run, parent: str | None, *, fresh: bool = False) -> Any:
        """Find or create the MLflow run with this key, describe it, and mark it as running in this process.

        An existing run is not continued if a `fresh` one is wanted, since its curves come from another machine.

        Returns:
            The run as it was before.
        """

        def compatible(existing: Any) -> bool:
            return not fresh and all(run.params.get(k, v) == v for k, v in existing.data.params.items())

        tags = _all_tags(run, parent) | {PROCESS: process_name()}
        chosen, created = self._choose(run, tags, compatible)
        self._write(chosen, run, tags)
        self._show(run)
        if created:
            self.log(chosen.info.run_id, run.first)
        if chosen.info.status != "RUNNING":
            self.client.update_run(chosen.info.run_id, "RUNNING")
        return chosen

    def _choose(self, run: Run, tags: Mapping[str, str], compatible: Callable[[Any], bool]) -> tuple[Any, bool]:
        """Find or create the run with this key, and make it the only current one in its slot."""
        with self.lock:
            same_key = self.search(run.experiment, KEY, run.key)
            same_key.sort(key=lambda r: r.data.tags.get(CURRENT) != "true")
            chosen = next(filter(compatible, same_key), None)
            created = chosen is None
            if chosen is None:
                start = int(1000 * (run.seconds[0] if run.seconds else time.time()))
                chosen = self.client.create_run(self.experiment(run.experiment), start, tags, run.name)
            for other in self.search(run.experiment, SLOT, run.slot):
                if other.info.run_id != chosen.info.run_id and other.data.tags.get(CURRENT) == "true":
                    self.retire(other)
        return chosen, created

    def _show(self, run: Run) -> None:
        """Store the columns of an experiment's run table, which `link` opens; MLflow's default shows no score."""
        known = self._views.setdefault(run.experiment, [])
        new = [column for column in run.columns if column not in known]
        if new:
            known += new
            shown = [*known]
            while len(state := _view_state(shown)) > 5000:  # characters that MLflow keeps
                shown.pop()
            self.client.set_experiment_tag(self.experiment(run.experiment), f"mlflow.sharedViewState.{VIEW}", state)

    def link(self, experiment: str, base: str) -> str:
        """Return the address of an experiment's run table, below that of the MLflow UI.

        Without `workflowType` MLflow shows traces of agents.
        """
        query = f"?workflowType=machine_learning&viewStateShareKey={VIEW}"
        return f"{base.rstrip('/')}/#/experiments/{self.experiment(experiment)}/runs{query}"

    def retire(self, run: Any) -> None:
        """Mark a run and its models as not current, and the run as killed if it is running without a process."""
        self.client.set_tag(run.info.run_id, CURRENT, "false")
        self._retire_models(self._models(run))
        if run.info.status == "RUNNING" and not _written_elsewhere(run):
            self.client.set_terminated(run.info.run_id, "KILLED")

    def end(self, run_id: str, status: str) -> None:
        """Terminate a run, unless another living process writes to it."""
        if not _written_elsewhere(self.client.get_run(run_id)):
            self.client.set_terminated(run_id, status)

    def _write(self, existing: Any, run: Run, tags: Mapping[str, str]) -> None:
        run_id = existing.info.run_id
        params = [self.entities.Param(k, v) for k, v in run.params.items() if k not in existing.data.params]
        new = [self.entities.RunTag(k, v) for k, v in tags.items() if existing.data.tags.get(k) != v]
        for start in range(0, max(len(params), len(new)), 100):  # MLflow's limit per call
            self.client.log_batch(run_id, params=params[start : start + 100], tags=new[start : start + 100])
        if run.dataset and not (existing.inputs and existing.inputs.dataset_inputs):
            name, digest = run.dataset
            source = json.dumps({"tags": {"mlflow.source.name": "python -m sunets prepare"}})
            dataset = self.entities.Dataset(name, digest[:36], "code", source)
            context = [self.entities.InputTag("mlflow.data.context", "training")]
            self.client.log_inputs(run_id, [self.entities.DatasetInput(dataset, context)])

    def log(self, run_id: str, points: Mapping[tuple[str, int], float], millis: int | None = None) -> None:
        """Write points of curves, (metric, step) -> value, at a time in ms since 1970.

        By default the time is made from the step, so that MLflow stores a repeated point once.
        """
        metrics = [
            self.entities.Metric(name, value, 1000 * step if millis is None else millis, step)
            for (name, step), value in points.items()
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit per call
            self.client.log_batch(run_id, metrics=metrics[start : start + 1000])

    def curve(self, run_id: str, name: str) -> dict[int, float]:
        """Return step -> value of one metric."""
        return {point.step: point.value for point in self.client.get_metric_history(run_id, name)}

    def _models(self, run: Any) -> list[Any]:
        """Return the logged models of a run."""
        where = f"source_run_id = '{run.info.run_id}'"
        return list(self.client.search_logged_models([run.info.experiment_id], where, max_results=100))

    def _retire_models(self, models: Iterable[Any]) -> None:
        for model in models:
            if model.tags.get(CURRENT) == "true":
                self.client.set_logged_model_tags(model.model_id, {CURRENT: "false"})

    def _register(self, existing: Any, run: Run) -> None:
        """Register the network of a run as a logged model, or complete what is missing of it."""
        if run.network is None:
            return
        run_id, key, tags = existing.info.run_id, run.network.key, {**run.network.tags, CURRENT: "true"}
        known = self._models(existing)
        model = next((m for m in known if m.tags.get(KEY) == key), None)
        self._retire_models(m for m in known if m is not model)
        if model is None:
            model = self.client.create_logged_model(
                existing.info.experiment_id, run.network.name, run_id, {KEY: key, **tags}, dict(run.network.params)
            )
        if model.status != self.entities.LoggedModelStatus.READY:
            with tempfile.TemporaryDirectory() as folder:
                _specification(run.network, model).save(str(Path(folder, "MLmodel")))
                self.client.log_model_artifacts(model.model_id, folder)
            self.client.finalize_logged_model(model.model_id, "READY")
        linked = [m.model_id for m in existing.outputs.model_outputs] if existing.outputs else []
        if model.model_id not in linked:
            last = max((epoch for _, epoch in run.points), default=0)
            self.client.log_outputs(run_id, [self.entities.LoggedModelOutput(model.model_id, last)])
        if any(model.tags.get(name) != value for name, value in tags.items()):
            self.client.set_logged_model_tags(model.model_id, tags)

    def finish(self, run: Run, parent: str | None = None) -> tuple[str, str]:
        """Create the run, or complete what is missing of it; return its id, and "created", "updated" or "unchanged"."""
        digest = run.digest
        probe = min((name for name, _ in run.points), key=lambda name: name != f"{CURVES}train.loss", default=None)
        wanted = {step: value for (name, step), value in run.points.items() if name == probe}

        def compatible(existing: Any) -> bool:
            if existing.data.tags.get(DIGEST) == digest:
                return True
            agrees = all(run.params.get(name, value) == value for name, value in existing.data.params.items())
            return agrees and (probe is None or self.curve(existing.info.run_id, probe).items() <= wanted.items())

        wanted_tags = _all_tags(run, parent)
        existing, created = self._choose(run, wanted_tags, compatible)
        run_id, tags = existing.info.run_id, existing.data.tags
        if not created and _written_elsewhere(existing):
            return run_id, "unchanged"
        self._write(existing, run, wanted_tags)
        self._show(run)
        self._register(existing, run)
        if not created and tags.get(DIGEST) == digest and existing.info.status == run.status:
            return run_id, "unchanged" if tags.get(CURRENT) == "true" and tags.get(PARENT) == parent else "updated"
        first = run.first if created else {}
        self.log(run_id, first | dict(run.points))
        known = existing.data.metrics | {name: value for (name, _), value in first.items()}
        latest = {name: value for name, value in run.values.items() if known.get(name) != value}
        self.log(run_id, {(name, 0): value for name, value in latest.items()}, int(1000 * time.time()))
        for path, folder in run.files:
            self.client.log_artifact(run_id, str(path), folder)
        if existing.info.status != run.status:
            self.client.set_terminated(run_id, run.status, run.seconds and int(1000 * run.seconds[1]))
        self.client.set_tag(run_id, DIGEST, digest)  # last, so that an interrupted write is repeated
        return run_id, "created" if created else "updated"


def _specification(network: Network, model: Any) -> Any:
    """Make the content of the file `MLmodel` of a logged model: its signature."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(*shape: int) -> Schema:
        return Schema([TensorSpec(np.dtype(np.float32), shape)])

    return Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        model_id=model.model_id,
        run_id=model.source_run_id,
        signature=ModelSignature(schema(-1, 3, -1, -1), schema(*network.output)),
        metadata={EXTERNAL: True},
    )


def _view_state(columns: Sequence[str]) -> str:
    """Return the state of MLflow's run table; unless ordered, it has metrics, parameters, tags, each by name."""
    widths = {c: 260 if c.startswith("tags") else 34 + 6 * len(c.partition("`")[2]) for c in columns}
    order = [*_LEFT, *columns]
    state = {"searchFilter": CURRENT_RUNS, "selectedColumns": columns, "columnOrder": order, "columnWidths": widths}
    return json.dumps(state)


def _all_tags(run: Run, parent: str | None) -> dict[str, str]:
    return {**run.tags, KEY: run.key, SLOT: run.slot, CURRENT: "true"} | ({PARENT: parent} if parent else {})


def process_name() -> str:
    """Return host, process namespace and process id: containers may share a host name, and by chance an id."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # macOS
        namespace = 0
    return f"{socket.gethostname()}/{namespace}:{os.getpid()}"


def is_alive(run: Any) -> bool:
    """Return whether the process that writes a run may be alive; on another machine it is taken to be."""
    namespace, _, number = run.data.tags.get(PROCESS, "").rpartition(":")
    if run.info.status != "RUNNING" or not namespace:
        return False
    if namespace != process_name().rpartition(":")[0]:
        return True
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _written_elsewhere(run: Any) -> bool:
    return is_alive(run) and run.data.tags.get(PROCESS) != process_name()


def _import_mlflow() -> Any:
    """Import MLflow, whose import fails for a user without a home directory, as in containers with --user."""
    missing = "HOME" not in os.environ
    if missing:
        try:
            Path.home()
        except RuntimeError:
            os.environ["HOME"] = "/nonexistent"  # Debian's value for such users
    try:
        import mlflow  # not at module level: a machine without it can train
    finally:
        if missing:
            os.environ.pop("HOME", None)
    # They repeat what `TrackingError` says.
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    return mlflow


def _create_database(file: Path, client: Callable[[str], Any]) -> None:
    """Create MLflow's tables in a temporary file and rename it, so that a kill leaves no broken database."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()  # fails at once where MLflow would retry for minutes
        within(CREATION_LIMIT, client(f"sqlite:///{temporary}").search_experiments, max_results=1)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)

"""MLflow: a live view of the runs, which the records can rebuild at any time. The only module that imports mlflow.

An experiment per benchmark holds a parent run per model, with the mean and interval of its scores, and a child run per
seed, with its curves; `<benchmark>/ablations` holds a parent per study, with the parameters that its trials share, and
a child per trial, with those that vary. Parameters and metrics carry the dotted names of `params.yaml` and of the
records.

MLflow chooses what a comparison of runs opens on (read in the pages of release 3.17.2): parallel coordinates on the
first stored of the metrics that all runs have, and on the first three, by name, of the parameters that differ; scatter
and contour plots on the first names, whether they differ or not, and a contour only on numbers. Hence a run starts with
its headline score, NaN until it is measured, which plots and filters pass over; the score is there again under `aim/`,
before all other names; and what a study does not vary stands in tags of its trials, not among their parameters.
PostgreSQL returns what was stored last at the end: there the order holds in rebuilt runs only.

MLflow gives a run a random id, so every run here carries a key made of what it is (its slot: benchmark, model, seed)
and of what made it (configuration, data, code). A run that is opened again under the same key goes on; another
configuration makes a new run in the same slot, and the older one stays with the tag `sunets.current` = false. Points of
a curve have time stamps made from their epoch, since MLflow keeps a point twice only where its time stamp differs.

Nothing here may cost a training: without mlflow, or without its server, `Tracker` says so once and does nothing.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import logging
import math
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from filelock import FileLock

from sunets.config import Config, DataConfig, Suite, fingerprint
from sunets.names import PREPARED
from sunets.record import Record, make_record, read_json, read_rows

REMEDY = "python -m sunets mlflow-sync"
CURRENT, KEY, SLOT, DIGEST = "sunets.current", "sunets.key", "sunets.slot", "sunets.digest"
PARENT = "mlflow.parentRunId"
HEADLINE = {"segmentation": "score.miou", "classification": "score.top1_error_percent"}
"""Task -> the score that runs are compared by."""
STATUS = {"finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}
NOTE = """\
One parent run per {item}; filter with ``tags.`sunets.current` = 'true'`` to hide runs of earlier configurations.
The score that runs are compared by is NaN until it is measured; `aim/` repeats it, so that plots open on it.
Rebuilt from the records by `python -m sunets mlflow-sync`: deleting the database loses nothing but system metrics."""


class TrackingError(ValueError):
    """MLflow cannot be reached or used; says where and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# What a run should look like: made from records alone, by the live tracker and by `sync` alike.


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The wanted content of one MLflow run."""

    experiment: str
    slot: str
    """What the run is, such as train/camvid/sunet64/seed0: one run in a slot is current."""
    identity: str
    """Digest of what made it: configuration, data, code."""
    name: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """(metric, epoch) -> value: the curves."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Single values; a later one takes the place of an earlier one."""
    headline: str = ""
    """The metric that runs are compared by."""
    status: str = "RUNNING"
    seconds: tuple[float, float] | None = None
    """Start and end in seconds since 1970, where known."""
    dataset: tuple[str, str] | None = None
    """Name and digest."""
    files: tuple[tuple[Path, str | None], ...] = ()
    """Artifacts, each with the folder it goes to."""

    @property
    def key(self) -> str:
        return f"{self.slot}/{self.identity}"

    @property
    def first(self) -> dict[tuple[str, int], float]:
        """What a new run starts with: the headline score, or NaN to keep its place until it is measured."""
        return {(self.headline, 0): self.metrics.get(self.headline, math.nan)} if self.headline else {}

    @property
    def values(self) -> dict[str, float]:
        """The metrics, and the headline score once more under the name that sorts first."""
        aim = {f"aim/{self.headline}": self.metrics[self.headline]} if self.headline in self.metrics else {}
        return aim | dict(self.metrics)

    @property
    def digest(self) -> str:
        """Equal exactly where the content is."""
        files = [(path.name, folder, hashlib.sha256(path.read_bytes()).hexdigest()) for path, folder in self.files]
        points = sorted((name, step, value) for (name, step), value in self.points.items())
        content = [dict(self.params), dict(self.tags), points, self.values, self.status, self.name]
        return fingerprint(content, self.dataset, files)


def _slot(kind: str, benchmark: str, item: str, child: str = "") -> str:
    return "/".join(quote(part, safe="") for part in (kind, benchmark, item, child) if part)


def _text(value: Any) -> str:
    """The value as MLflow gets it; without spaces, since its parallel coordinates show ten characters."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers, by names that MLflow accepts."""
    return {
        re.sub(r"[^\w\-. :/]", "_", prefix + name, flags=re.ASCII): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _points(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """The curves in rows of a history."""
    places = ("epoch", "iteration", "seed", "number")
    return {
        (name, int(row["epoch"])): value
        for row in rows
        for name, value in _numbers({k: v for k, v in row.items() if k not in places}).items()
    }


def _ends(points: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """`final/` and `best/` of each curve: MLflow's tables and charts show a curve's last value only."""
    found = {}
    for name in dict.fromkeys(name for name, _ in points if name.startswith(("train.", "val."))):
        values = [value for (_, _), value in sorted((p, v) for p, v in points.items() if p[0] == name)]
        found[f"final/{name}"] = values[-1]
        if name.startswith("val."):
            found[f"best/{name}"] = min(values) if re.search("loss|error", name) else max(values)
    return found


def _tags(record: Mapping[str, Any]) -> dict[str, str]:
    """What a run can be filtered by."""
    own = ("kind", "status", "reason", "benchmark", "model", "label", "seed", "study", "number", "phase")
    tags = {name: record[name] for name in own if record.get(name) is not None}
    for group in ("provenance", "environment"):
        tags |= {f"{group}.{name}": value for name, value in record[group].items() if value is not None}
    if record.get("reason"):
        tags["mlflow.note.content"] = f"{record['status']}: {record['reason']}"
    tags["mlflow.source.type"] = "LOCAL"
    tags["mlflow.source.name"] = record["provenance"].get("command")
    tags["mlflow.source.git.commit"] = record["provenance"].get("git_commit")
    return {name: _text(value) for name, value in tags.items() if value is not None}


def _params(record: Mapping[str, Any]) -> dict[str, str]:
    """Parameters of a training. How it is tested may change later and stands in tags: MLflow's parameters cannot."""
    return {name: _text(value) for name, value in record["params"].items() if not name.startswith("evaluate.")}


def _varied(record: Mapping[str, Any], name: str) -> bool:
    """Whether a parameter may differ between the trials of a study.

    Args:
        record: one trial: its arm has every axis, `tuned` every parameter that is tuned within an arm.
        name: of the parameter, which may stand below such a path.
    """
    paths = ("seed", *(record.get("arm") or {}), *(record.get("tuned") or {}))
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _headline(record: Mapping[str, Any]) -> str:
    """The score that the runs of a benchmark are compared by; a sampler's trials have it under another name."""
    task = DataConfig.model_construct(name=record["params"].get("data.name", "")).task  # unchecked: the name decides
    sampled = record.get("phase") in ("tuning", "search")
    return HEADLINE[task].replace("score.", "search.") if sampled else HEADLINE[task]


def _common(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The parameters that trainings share."""
    every = [_params(record) for record in records]
    return {k: v for k, v in every[0].items() if k != "seed" and all(p.get(k) == v for p in every)}


def _dataset(record: Mapping[str, Any]) -> tuple[str, str] | None:
    digest = record["provenance"].get("data_digest")
    return (str(record["params"].get("data.name", record["benchmark"])), digest) if digest else None


def _made_by(record: Mapping[str, Any]) -> list[Any]:
    return [record["provenance"].get(name) for name in ("data_digest", "code_hash")]


def _child(record: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] = (), *, ended: bool = True) -> _Run:
    """The run of one training or trial.

    Args:
        record: its record; of a run in progress, a record without results.
        rows: its history.
        ended: whether the record tells the outcome.
    """
    points = _points(rows)
    curves = {name for name, _ in points}
    single = _numbers(record["scores"]) | _numbers(record["cost"])
    tags, params = _tags(record), _params(record)
    if record["kind"] == "trial":
        experiment = f"{record['benchmark']}/ablations"
        slot = _slot("trial", record["benchmark"], record["study"], f"{record['number']}")
        arm = dict(sorted((record.get("arm") or {}).items()))  # as in the file of records
        axes = [f"{path.removeprefix('model.')}={_text(value)}" for path, value in arm.items()]
        name = ", ".join([f"#{record['number']}", *axes, f"seed {record['seed']}"])
        tags |= {f"arm.{path}": _text(value) for path, value in arm.items()}
        tags |= {k: _text(v) for k, v in record["params"].items() if v is not None and not _varied(record, k)}
        # An axis has its values of the arm, as in tables: a null among numbers would make words of them all.
        params = {k: _text(arm.get(k, v)) for k, v in record["params"].items() if _varied(record, k)}
    else:
        experiment = record["benchmark"]
        slot = _slot("train", record["benchmark"], record["model"], f"seed{record['seed']}")
        name = f"{record['label']}, seed {record['seed']}"
    if not ended:
        tags = {name: value for name, value in tags.items() if name != "status"}
    return _Run(
        experiment=experiment,
        slot=slot,
        identity=fingerprint(record["provenance"].get("config_hash"), *_made_by(record)),
        name=name,
        params=params,
        tags=tags,
        points=points,
        metrics={k: v for k, v in single.items() if k not in curves} | (_ends(points) if ended else {}),
        headline=_headline(record),
        status=STATUS[record["status"]] if ended else "RUNNING",
        dataset=_dataset(record),
    )


def _model(records: Sequence[Mapping[str, Any]], *, ended: bool = True) -> _Run:
    """The parent run of a model, from the records of its trainings."""
    first, common = records[0], _common(records)
    shared = ("benchmark", "model", "label", "provenance", "params")
    whole = {name: first[name] for name in shared} | {"kind": "model", "environment": {}}
    tags = {k: v for k, v in _tags(whole).items() if k != "provenance.config_hash"}
    return _Run(
        experiment=first["benchmark"],
        slot=_slot("model", first["benchmark"], first["model"]),
        identity=fingerprint(common, *_made_by(first)),
        name=first["label"],
        params=common,
        tags=tags,
        headline=f"{_headline(first)}.mean",
        status=_outcome(records) if ended else "RUNNING",
        dataset=_dataset(first),
    )


def _study(records: Sequence[Mapping[str, Any]], *, ended: bool = True) -> _Run:
    """The parent run of a study, from the records of its trials."""
    first = records[0]
    fixed = {name: value for name, value in _common(records).items() if not _varied(first, name)}
    counts = {
        f"trials.{status}": float(sum(record["status"] == status for record in records))
        for status in ("finished", "pruned", "failed")
    }
    return _Run(
        experiment=f"{first['benchmark']}/ablations",
        slot=_slot("study", first["benchmark"], first["study"]),
        identity=fingerprint(fixed),
        name=first["study"],
        params=fixed,
        tags={"kind": "study", **{name: first[name] for name in ("benchmark", "study", "model")}},
        metrics=counts if ended else {},
        headline="trials.finished",
        status=_outcome(records) if ended else "RUNNING",
    )


def _outcome(records: Sequence[Mapping[str, Any]]) -> str:
    return "FAILED" if records and all(r["status"] == "failed" for r in records) else "FINISHED"


# ----------------------------------------------------------------------------------------------------------------------
# The database.


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the file mlflow.db in the current directory: the root of the checkout in a pipeline."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


class _Store:
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

    def open(self, run: _Run, parent: str | None, compatible: Callable[[Any], bool]) -> tuple[Any, bool]:
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

    def _write(self, found: Any, run: _Run, tags: Mapping[str, str]) -> None:
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

    def finish(self, run: _Run, parent: str | None = None) -> tuple[str, str]:
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


# ----------------------------------------------------------------------------------------------------------------------
# Live.

_warned = threading.Event()


def _warn(error: BaseException) -> None:
    """Say once a process that tracking has stopped, and what to do."""
    if not _warned.is_set():
        _warned.set()
        print(f"MLflow is not tracking: {_reason(error)}. Nothing is lost; afterwards: {REMEDY}", file=sys.stderr)


def _reason(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{tracking_uri()}: {lines[0][:300].rstrip('.')}"


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """A method of `Tracker` that, once MLflow failed, does nothing."""

    @functools.wraps(method)
    def guarded(self: Tracker, *arguments: Any, **options: Any) -> None:
        with self._lock:
            if self._store is None:
                return
            try:
                method(self, *arguments, **options)
            except Exception as error:  # whatever it is: a training is worth more than its log
                self._store = None
                _warn(error)

    return guarded


@dataclass
class _Live:
    """A child run in progress."""

    run_id: str
    logged: dict[tuple[str, int], float]
    rows: list[Mapping[str, Any]] = field(default_factory=list)


class Tracker:
    """MLflow runs of one stage while it works: a parent run, and a child per training.

    One process of a stage writes; its threads may share a tracker. No method raises for MLflow's sake. A child appears
    with its first epoch. What is not finished when the process ends is marked as interrupted, and goes on under the
    same run when the same configuration, data and code are tracked again.
    """

    def __init__(
        self,
        kind: Literal["train", "trial"],
        suite: Suite,
        item: str,
        runs: Sequence[tuple[Config, Mapping[str, Any]]] = (),
    ) -> None:
        """Open the parent run.

        Args:
            kind: train (a model's seeds) or trial (a study's trials).
            suite: the benchmark.
            item: key of the model, or name of the study.
            runs: train: configuration and provenance of each seed.
        """
        self._suite, self._item = suite, item
        self._lock = threading.RLock()
        self._records: dict[int, Record] = {}
        self._live: dict[int, _Live] = {}
        self._parent = ""
        self._monitor: Any = None
        self._store: _Store | None = None
        self._planned = {
            config.seed: make_record(
                "train",
                benchmark=suite.benchmark,
                model=item,
                label=suite.models[item].label,
                seed=config.seed,
                config=config,
                provenance=source,
            )
            for config, source in runs
        }
        if int(os.environ.get("RANK", 0)) != 0:  # torchrun: the first process speaks for all
            return
        if kind == "train":
            parent = _model(list(self._planned.values()), ended=False)
        else:
            study = suite.ablations[item]
            trials = [self._trial(suite.run(study.model, seed, study.overrides)) for seed in study.seeds]
            parent = _study(trials, ended=False)
        try:
            self._store = _Store()
        except Exception as error:
            _warn(error)
        self._begin(parent)
        atexit.register(self.close)

    @_harmless
    def _begin(self, parent: _Run) -> None:
        self._parent = self._run(parent).info.run_id
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                self._parent, sampling_interval=5, resume_logging=True, tracking_uri=self._open_store.uri
            )
            self._monitor.start()
        except ImportError:  # psutil
            self._monitor = None

    @property
    def _open_store(self) -> _Store:
        assert self._store is not None
        return self._store

    def _run(self, run: _Run, *, fresh: bool = False) -> Any:
        store = self._open_store
        tags = {**run.tags, "sunets.process": f"{socket.gethostname()}:{os.getpid()}"}

        def compatible(found: Any) -> bool:
            return not fresh and all(run.params.get(k, v) == v for k, v in found.data.params.items())

        found, created = store.open(replace(run, tags=tags), self._parent or None, compatible)
        if created:
            store.log(found.info.run_id, run.first)
        if found.info.status != "RUNNING":
            store.client.update_run(found.info.run_id, "RUNNING")
        return found

    def _child(self, child: int, *, fresh: bool = False) -> _Live:
        if fresh or child not in self._live:
            found = self._run(_child(self._planned[child], ended=False), fresh=fresh)
            logged = {
                (name, step): value
                for name in found.data.metrics
                for step, value in self._open_store.curve(found.info.run_id, name).items()
            }
            self._live[child] = _Live(found.info.run_id, logged)
        return self._live[child]

    def plan(self, number: int, config: Config, provenance: Mapping[str, Any], **extra: Any) -> None:
        """Tell what a trial is, before its first epoch.

        Args:
            number: its number in the study.
            config: its configuration.
            provenance: what `record.provenance()` returned.
            extra: phase and arm, as in its record.
        """
        self._planned[number] = self._trial(config, provenance=provenance, number=number, **extra)

    def _trial(self, config: Config, **extra: Any) -> Record:
        study = self._suite.ablations[self._item]
        varied = {
            "arm": {axis.path: None for axis in study.axes},
            "tuned": {axis.path: None for axis in study.nuisance},
        }
        return make_record(
            "trial",
            benchmark=self._suite.benchmark,
            model=study.model,
            label=self._suite.models[study.model].label,
            seed=config.seed,
            config=config,
            study=self._item,
            **varied | extra,
        )

    @_harmless
    def log_epoch(self, child: int, row: Mapping[str, Any]) -> None:
        """Write one row of a history; one that is there already is left out.

        Args:
            child: seed, or number of the trial.
            row: epoch and dotted metrics.
        """
        live = self._child(child)
        points = _points([row])
        if any(live.logged.get(point, value) != value for point, value in points.items()):
            # Trained again with other numbers (another machine, a GPU): an epoch has one value in a run.
            rows, live = live.rows, self._child(child, fresh=True)
            live.rows = rows
            points |= _points(rows)
        live.rows.append(row)
        new = {point: value for point, value in points.items() if point not in live.logged}
        self._open_store.log(live.run_id, new)
        live.logged |= new

    @_harmless
    def finish(self, child: int, record: Record, rows: Iterable[Mapping[str, Any]] | None = None) -> None:
        """End a child run as its record tells: finished, failed or pruned.

        Args:
            child: seed, or number of the trial.
            record: its record.
            rows: its whole history, where `log_epoch` did not see it all.
        """
        live = self._child(child)
        self._open_store.finish(_child(record, live.rows if rows is None else rows), self._parent)
        self._records[child] = record

    @_harmless
    def close(self) -> None:
        """End the parent run; children without a record were interrupted."""
        if self._monitor is not None:
            self._monitor.finish()
        store = self._open_store
        interrupted = [live.run_id for child, live in self._live.items() if child not in self._records]
        for run_id in interrupted:
            store.client.set_terminated(run_id, "KILLED")
        records = list(self._records.values())
        if records and records[0]["kind"] == "train" and len(records) == len(self._planned):
            store.finish(_model(records))
        else:
            done = bool(records) and records[0]["kind"] == "trial" and not interrupted
            store.client.set_terminated(self._parent, "FINISHED" if done else "KILLED")
        self._store = None
        atexit.unregister(self.close)


# ----------------------------------------------------------------------------------------------------------------------
# From the records.


@dataclass(frozen=True)
class Synced:
    """How many runs `sync` made, completed, and found as they should be."""

    created: int
    updated: int
    unchanged: int

    def __str__(self) -> str:
        return f"MLflow: {self.created} runs created, {self.updated} updated, {self.unchanged} unchanged"


def sync(results: Path, benchmark: str | None = None) -> Synced:
    """Make MLflow show what the records say; a second call changes nothing.

    Args:
        results: the directory `results/`.
        benchmark: one benchmark; None takes all.

    Raises:
        FileNotFoundError: there are no records.
        TrackingError: MLflow cannot be reached or refuses.
    """
    found = sorted(path.parent for path in results.glob(f"{benchmark or '*'}/records"))
    if not found:
        raise FileNotFoundError(f"{results / (benchmark or '*') / 'records'}: no records; run `dvc repro` first")
    wanted = {folder.name: [*_models(folder), *_studies(folder), *_report(folder)] for folder in found}
    counts: Counter[str] = Counter()
    try:
        store = _Store()
        for name, families in wanted.items():
            kept = set()
            for parent, children in families:
                parent_id, change = store.finish(parent)
                kept.add(parent_id)
                counts[change] += 1
                for child in children:
                    run_id, change = store.finish(child, parent_id)
                    kept.add(run_id)
                    counts[change] += 1
            for experiment in (name, f"{name}/ablations"):
                if store.experiment(experiment, create=False) is None:
                    continue
                for run in store.search(experiment, CURRENT, "true"):
                    if run.info.run_id not in kept and not _is_alive(run):
                        store.retire(run)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) or type(error).__module__.split(".")[0] in ("mlflow", "sqlalchemy"):
            raise TrackingError(f"MLflow: {_reason(error)}; see MLFLOW_TRACKING_URI, then: {REMEDY}") from error
        raise
    return Synced(counts["created"], counts["updated"], counts["unchanged"])


def sync_or_warn(results: Path, benchmark: str) -> None:
    """`sync` at the end of a stage, whose work does not hang on MLflow: says once what is wrong."""
    try:
        sync(results, benchmark)
    except TrackingError as error:
        _warn(error.__cause__ or error)


def _is_alive(run: Any) -> bool:
    """Whether the process that writes a run may still be there; of another machine one cannot know."""
    host, _, pid = run.data.tags.get("sunets.process", "").rpartition(":")
    if run.info.status != "RUNNING" or not host:
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return host != socket.gethostname()
    except OSError:
        return True
    return True


def _records(path: Path) -> list[Record]:
    if not path.exists():
        return []
    content = read_json(path)
    return content if isinstance(content, list) else [content]


def _items(folder: Path, suffix: str) -> list[str]:
    return sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))


def _models(folder: Path) -> list[tuple[_Run, list[_Run]]]:
    """Parent and children of every model of a benchmark.

    Args:
        folder: results/BENCHMARK.
    """
    base = folder / "records"
    speed = _records(base / "speed.json")
    families = []
    for model in sorted({name for kind in ("train", "evaluate", "profile") for name in _items(base / kind, ".json")}):
        trained, tested, profiled, timed = (
            _records(base / kind / f"{model}.json") for kind in ("train", "evaluate", "profile", "timing")
        )
        path = base / "history" / f"{model}.csv"
        rows = read_rows(path) if path.exists() else []
        children = []
        for record in trained:
            seed = record["seed"]
            child = _child(record, [row for row in rows if row["seed"] == seed])
            timing = next((t for t in timed if t["seed"] == seed), {})
            noisy = {k: v for k, v in timing.items() if k in ("seconds", "images_per_second")}
            scores = [r for r in tested if r["seed"] == seed]
            metrics = {k: v for r in scores for k, v in _numbers(r["scores"], _prefix(r, tested)).items()}
            children.append(
                replace(
                    child,
                    metrics={**child.metrics, **_numbers(noisy, "timing."), **metrics},
                    tags={**child.tags, **_test_settings(scores)},
                    seconds=_period(timing),
                )
            )
        parent = _model(trained or tested or profiled)
        exact = [r for r in [*profiled, *(r for r in speed if r["model"] == model)] if r["status"] == "finished"]
        periods = [child.seconds for child in children if child.seconds]
        parent = replace(
            parent,
            metrics=_summary(tested) | {k: v for r in exact for k, v in _numbers(r["cost"]).items()},
            tags={**parent.tags, **_test_settings(tested)},
            seconds=(min(p[0] for p in periods), max(p[1] for p in periods)) if periods else None,
            files=_figures(folder, model),
        )
        families.append((parent, children))
    return families


def _prefix(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Scores of the first test-time variant have their plain names, the others' stand under the variant's name."""
    return "" if record["variant"] == records[0]["variant"] else f"{record['variant']}/"


def _test_settings(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    params = records[0]["params"] if records else {}
    return {name: _text(value) for name, value in params.items() if name.startswith("evaluate.")}


def _summary(tested: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean and interval of each score over the seeds."""
    from sunets.report.statistics import mean_interval  # its package needs pandas, which live tracking does without

    values: dict[str, list[float]] = {}
    for record in tested:
        for name, value in _numbers(record["scores"], _prefix(record, tested)).items():
            values.setdefault(name, []).append(value)
    found: dict[str, float | None] = {}
    for name, seeds in values.items():
        estimate = mean_interval(seeds)
        found |= {f"{name}.mean": estimate.mean, f"{name}.seeds": estimate.n}
        if ".iou." not in name:  # a hundred classes would drown the rest
            found |= {f"{name}.ci95_low": estimate.low, f"{name}.ci95_high": estimate.high}
    return _numbers(found)


def _period(timing: Mapping[str, Any]) -> tuple[float, float] | None:
    if not timing.get("started"):
        return None
    start = datetime.fromisoformat(timing["started"]).timestamp()
    return start, start + (timing.get("seconds") or 0.0)


def _studies(folder: Path) -> list[tuple[_Run, list[_Run]]]:
    """Parent and children of every study of a benchmark."""
    base = folder / "records" / "ablations"
    families = []
    for study in _items(base, ".json"):
        records = _records(base / f"{study}.json")
        if not records:
            continue
        path = base / f"{study}.history.csv"
        rows = read_rows(path) if path.exists() else []
        parent = _study(records)
        children = [_child(r, [row for row in rows if row["number"] == r["number"]]) for r in records]
        families.append((replace(parent, files=_figures(folder, study)), children))
    return families


def _figures(folder: Path, item: str) -> tuple[tuple[Path, str | None], ...]:
    """Figures whose file name names the model or study."""
    word = re.compile(rf"(?<![a-z0-9]){re.escape(item)}(?![a-z0-9])")
    return tuple((path, "figures") for path in sorted((folder / "figures").glob("*.png")) if word.search(path.stem))


def _report(folder: Path) -> list[tuple[_Run, list[_Run]]]:
    """One run that holds the benchmark's page, tables and figures, and the samples of its data."""
    files: list[tuple[Path, str | None]] = [(path, None) for path in folder.glob("README.md")]
    for pattern in ("tables/*.md", "tables/*.csv", "figures/*.png"):
        files += [(path, path.parent.name) for path in sorted(folder.glob(pattern))]
    files += [(path, "data") for path in (folder.parent.parent / PREPARED / folder.name).glob("samples.png")]
    if not files:
        return []
    run = _Run(
        experiment=folder.name,
        slot=_slot("report", folder.name, "report"),
        identity="report",
        name="report",
        tags={"kind": "report", "benchmark": folder.name},
        status="FINISHED",
        files=tuple(files),
    )
    return [(run, [])]

"""MLflow runs of a stage in progress."""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sunets.core.config import Config, Suite
from sunets.core.hardware import torchrun_process
from sunets.core.record import Record, make_record
from sunets.tracking.address import LIMIT, failure, within
from sunets.tracking.store import Store
from sunets.tracking.view import Run, child_run, curve_points, model_run, study_run

REMEDY = "python -m sunets mlflow-sync"

_warned = threading.Event()


def warn_once(error: BaseException) -> None:
    """Print once per process that tracking has stopped, and the remedy."""
    if not _warned.is_set():
        _warned.set()
        print(
            f"MLflow is not tracking: {failure(error)}. Nothing is lost; to catch up later, run {REMEDY}",
            file=sys.stderr,
        )


def _never_raises(method: Callable[..., None]) -> Callable[..., None]:
    """Make a method of `Tracker` report a failure of MLflow once, and do nothing afterwards."""

    @functools.wraps(method)
    def guarded(self: Tracker, *arguments: Any, **options: Any) -> None:
        with self._lock:
            if self._store is None:
                return
            try:
                method(self, *arguments, **options)
            except Exception as error:  # tracking must not fail a training
                self._store = None
                warn_once(error)

    return guarded


@dataclass
class _Child:
    """A child run in progress."""

    run_id: str
    logged: dict[tuple[str, int], float]
    rows: list[Mapping[str, Any]] = field(default_factory=list)


class Tracker:
    """MLflow runs of one stage in progress: a parent run, and a child per training.

    One process per stage writes; its threads may share a tracker. Failures of MLflow are printed, not raised. A child
    run is created with its first epoch. At the end of the process unfinished runs are marked as killed; they are
    continued when the same configuration, data and code are tracked again.
    """

    def __init__(
        self, kind: Literal["train", "trial"], suite: Suite, item: str, runs: Iterable[tuple[Config, Record]] = ()
    ) -> None:
        """Open the parent run.

        `item` is the key of a model, whose seeds are trained ("train"), or the name of a study ("trial"); `runs` holds
        configuration and provenance per seed of a model.
        """
        self._kind: Literal["train", "trial"] = kind
        self._suite, self._item = suite, item
        self._lock = threading.RLock()
        self._records: dict[int, Record] = {}
        self._children: dict[int, _Child] = {}
        self._parent = ""
        self._monitor: Any = None
        self._store: Store | None = None
        self._planned: dict[int, Record] = {}
        if torchrun_process()[0] != 0:  # torchrun: only the first process writes
            return
        try:
            if kind == "train":
                self._planned = {config.seed: self._record(config, provenance=source) for config, source in runs}
                parent = model_run(list(self._planned.values()), ended=False)
            else:
                from sunets.models.zoo import resolve_config  # imports torch, which `sync` must not

                study = suite.ablations[item]
                configs = [resolve_config(suite.config(study.model, seed, study.overrides)) for seed in study.seeds]
                for axis in (*study.axes, *study.nuisance):
                    for value in axis.values:  # the width of a named network follows `model.name`: no trials share it
                        with contextlib.suppress(ValueError):  # impossible without a value of another axis
                            changed = {**study.overrides, axis.path: value}
                            configs.append(resolve_config(suite.config(study.model, study.seeds[0], changed)))
                parent = study_run([self._record(config) for config in configs], ended=False)
            self._store = Store()
        except Exception as error:
            warn_once(error)
            return
        self._begin(parent)
        atexit.register(self.close)

    def _record(self, config: Config, **extra: Any) -> Record:
        """Make the record of a training or trial before its first epoch."""
        study = self._suite.ablations[self._item] if self._kind == "trial" else None
        model = study.model if study else self._item
        if study:
            arm, tuned = (dict.fromkeys(axis.path for axis in axes) for axes in (study.axes, study.nuisance))
            extra = {"study": self._item, "arm": arm, "tuned": tuned} | extra
        return make_record(
            self._kind,
            benchmark=self._suite.benchmark,
            task=self._suite.data.task,
            model=model,
            label=self._suite.models[model].label,
            seed=config.seed,
            config=config,
            **extra,
        )

    @_never_raises
    def _begin(self, parent: Run) -> None:
        self._parent = self._open_store.open(parent, None).info.run_id
        with contextlib.suppress(ImportError):  # psutil
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            uri, options = self._open_store.uri, {"sampling_interval": 5, "resume_logging": True}
            self._monitor = within(LIMIT, SystemMetricsMonitor, self._parent, tracking_uri=uri, **options)
            self._monitor.start()

    @property
    def _open_store(self) -> Store:
        assert self._store is not None  # `_never_raises` has looked
        return self._store

    def _child(self, number: int, *, fresh: bool = False) -> _Child:
        if fresh or number not in self._children:
            planned = child_run(self._planned[number], ended=False)
            run = self._open_store.open(planned, self._parent, fresh=fresh)
            logged = {
                (name, step): value
                for name in run.data.metrics
                for step, value in self._open_store.curve(run.info.run_id, name).items()
            }
            self._children[number] = _Child(run.info.run_id, logged)
        return self._children[number]

    @_never_raises
    def plan(self, number: int, config: Config, provenance: Mapping[str, Any], **extra: Any) -> None:
        """Describe a trial before its first epoch; `extra` has phase and arm, as in its record."""
        self._planned[number] = self._record(config, provenance=provenance, number=number, **extra)

    @_never_raises
    def log_epoch(self, child: int, row: Mapping[str, Any]) -> None:
        """Write one row of a history, epoch and dotted metrics, of a seed or trial, unless it is already logged."""
        run = self._child(child)
        points = curve_points([row])
        if any(run.logged.get(point, value) != value for point, value in points.items()):
            # Trained again with other results (another machine, a GPU): a run has one value per epoch.
            rows, run = run.rows, self._child(child, fresh=True)
            run.rows = rows
            points |= curve_points(rows)
        run.rows.append(row)
        new = {point: value for point, value in points.items() if point not in run.logged}
        self._open_store.log(run.run_id, new)
        run.logged |= new

    @_never_raises
    def finish(self, child: int, record: Record, rows: Iterable[Mapping[str, Any]] | None = None) -> None:
        """End the run of a seed or trial with the status of its record: finished, failed or pruned.

        `rows` is its whole history, if `log_epoch` did not get all of it.
        """
        run = self._child(child)
        self._open_store.finish(child_run(record, run.rows if rows is None else rows), self._parent)
        self._records[child] = record

    @_never_raises
    def close(self) -> None:
        """End the parent run, and mark children without a record as killed."""
        if self._monitor is not None:
            within(LIMIT, self._monitor.finish)
        store = self._open_store
        for child, run in self._children.items():
            if child not in self._records:
                store.end(run.run_id, "KILLED")
        records = list(self._records.values())
        complete = bool(records) and len(records) == len(self._planned)
        if complete and self._kind == "train":
            store.finish(model_run(records))
        else:
            store.end(self._parent, "FINISHED" if complete else "KILLED")
        self._store = None
        atexit.unregister(self.close)

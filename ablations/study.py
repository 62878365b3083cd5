"""Trials of one ablation study, resumed after a kill, and their records.

A trial is one training (`sunets.training.fit.fit`) and one scoring: of grids and confirmations on the test split
(`score.*`), of a sampler's trials on the validation split (`search.*`), so that the two never share a column. Trainings
live in `.work/<fingerprint>`: a killed one goes on, and equal ones of several studies, or of a study and the benchmark,
are one, whichever runs first (`benchmark_training` in the record).

    one_at_a_time, grid    every point on every seed
    tuned                  equal trials for each arm, the base's recipe first; then its best few recipes on more
                           tuning seeds; then the one with the best mean on every seed
    search                 sampled trials for two objectives; then the base and points of the front on every seed
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.progress import TaskID

from ablations.choice import confirmed, finalists, without_seed
from ablations.search import (
    STORAGE,
    BaseStorage,
    Direction,
    MakeJob,
    Search,
    Setting,
    Trial,
    open_storage,
    repeat,
    search,
)
from ablations.space import Arm, Point, Space, check_study, most_jobs, rungs, study_config
from sunets.core.config import Config, CostConfig, Suite, fingerprint
from sunets.core.executor import Job, Send, open_pool
from sunets.core.executor import Plan as PlanOf
from sunets.core.history import write_history
from sunets.core.lock import locked
from sunets.core.metrics import PRIMARY_METRIC, higher_is_better, search_key, validation_column
from sunets.core.paths import BenchmarkPaths
from sunets.core.progress import progress_bar
from sunets.core.provenance import code_hash, environment, library_versions, provenance, stage_command
from sunets.core.recipes import tuned
from sunets.core.record import (
    Record,
    make_record,
    parameters,
    parameters_hash,
    read_values,
    write_rows,
    write_values,
)
from sunets.core.stage import stage
from sunets.core.trials import trial_row
from sunets.data.manifest import Manifest, load_manifest
from sunets.evaluation.evaluate import evaluate
from sunets.models.device import select_device
from sunets.models.zoo import resolve_config
from sunets.profiling.cost import measure_cost
from sunets.training.fit import fit, run_fingerprint, waiting_for
from sunets.training.loop import TrainingError

Kind = Literal["grid", "tuning", "search", "confirmation"]
FINAL = ("grid", "confirmation")
"""Kinds that are scored on the test split."""


@dataclass(frozen=True, kw_only=True)
class _Plan(Space):
    """A checked study."""

    points: tuple[Point, ...]
    paths: BenchmarkPaths
    fingerprint: str
    origin: Record
    """Provenance of the study, to which each trial adds the hash of its configuration."""

    @cached_property
    def first(self) -> Arm | None:
        """Recipe of the base, which every tuned arm tries first; None where it lies outside the nuisance axes."""
        return self.recipe_of_base()

    @cached_property
    def benchmark_trainings(self) -> set[str]:
        """Return the fingerprints of the trainings of stage `train`; a trial that has one shares its directory.

        Those whose file of `train.init_from` is absent are no trial's, since a trial has read its own.
        """
        configs = [self.suite.config(self.study.model, seed) for seed in self.suite.seeds]
        return {
            run_fingerprint(config, self.manifest)
            for config in configs
            if not config.train.init_from or Path(config.train.init_from).is_file()
        }

    @property
    def direction(self) -> Direction:
        return "maximize" if higher_is_better(PRIMARY_METRIC[self.manifest.task]) else "minimize"

    def objectives(self, kind: Kind) -> dict[str, Direction]:
        """Return the objectives of a phase and their directions."""
        score = PRIMARY_METRIC[self.manifest.task]
        if kind in FINAL:
            return {score: self.direction}
        sampled: dict[str, Direction] = {search_key(score): self.direction}
        return sampled if kind == "tuning" else {**sampled, "cost.gmacs": "minimize"}

    def title(self, kind: Kind, arm: Arm | None = None) -> str:
        """Name of the Optuna study of a phase."""
        values = ", ".join(f"{path} {json.dumps(value)}" for path, value in (arm or {}).items())
        return f"{self.suite.benchmark}, {self.name}: {kind}{values and f' of {values}'} ({self.fingerprint})"

    def job(self, kind: Kind, number: int, setting: Setting, until: int | None) -> Job:
        """Make the job that trains a trial up to an epoch; None trains to the end and scores."""
        config = self.config(setting)
        arguments = {
            "config": config.model_dump(mode="json"),
            # Holds the content of `train.init_from`, of which `config` has the path alone.
            "training": run_fingerprint(config, self.manifest),
            "cost": self.suite.cost.model_dump(mode="json"),
            "until": until,
            "final": kind in FINAL,
            "objectives": list(self.objectives(kind)),
            "variant": next(iter(config.evaluate.variants)),  # of equal variants in another order, another
        }
        paths = {"data": str(self.paths.data), "work": str(self.paths.work)}
        return Job(f"{self.name} trial {number}", f"{__name__}:{run_trial.__name__}", arguments, paths)


# One trial -----------------------------------------------------------------------------------------------------------


def run_trial(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Train one setting up to an epoch, or to the end and score it; runs in a worker process.

    Args:
        arguments: config and cost (plain), training (the driver's `run_fingerprint`, which tells results apart), until
            (last epoch or None), final (scored on the test split, as score.*, rather than on the validation split, as
            search.*), objectives, variant (the test-time variant that is scored), data and work (directories).
        send: takes the row of each epoch.

    Returns:
        status, reason, values (by objective), curve, scores, cost, history and environment.

    Raises:
        ValueError: the split that is scored has no labelled pixel.
    """
    config = Config.model_validate(arguments["config"])
    manifest = load_manifest(Path(arguments["data"]), config.data)
    work, until = Path(arguments["work"]), arguments["until"]
    score = PRIMARY_METRIC[manifest.task]
    row_score = validation_column(score)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "status": "finished", "reason": None, "values": {}, "scores": {}, "cost": {}, "history": rows,
        "environment": environment(select_device(config.train.device), config.train.threads),
    }  # fmt: skip

    def stop_early(row: dict[str, Any]) -> bool:
        rows.append(row)
        send(row)
        return until is not None and bool(row["epoch"] >= until)

    work_dir = work / run_fingerprint(config, manifest)  # of this device, not the driver's
    try:
        with waiting_for(work_dir):
            trained = fit(config, manifest, work_dir=work_dir, stop_early=stop_early)
    except TrainingError as error:  # only a diverged training is a result
        result |= {"status": "failed", "reason": str(error)}
    result["curve"] = [[row["epoch"], row[row_score]] for row in rows if row.get(row_score) is not None]
    if result["status"] == "failed":
        return result
    if until is not None:
        values = {objective: rows[-1].get(row_score) for objective in arguments["objectives"]}
    else:
        split = config.data.test_split if arguments["final"] else config.data.val_split
        variant = config.evaluate.variants[arguments["variant"]]
        scores = evaluate(trained.model, manifest, config, split=split, variant=variant).scores
        result["scores"] = scores if arguments["final"] else {search_key(k): value for k, value in scores.items()}
        result["cost"] = _cost(CostConfig.model_validate(arguments["cost"]), config, manifest, work)
        values = {name: (result["scores"] | result["cost"])[name] for name in arguments["objectives"]}
    if None in values.values():
        raise ValueError(f"{score}: the split that is scored has no labelled pixel; choose another")
    return result | {"values": values}


def _cost(settings: CostConfig, config: Config, manifest: Manifest, work: Path) -> dict[str, Any]:
    """Return the exact costs of a trial's network, counted once for all trials that have it."""
    arguments = config.model.arguments() | {"task": manifest.task, "num_classes": manifest.num_classes}
    protocol: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("size", "batch_size", "receptive_field_seeds", "receptive_field_images")
    }
    key = fingerprint(arguments, protocol, code_hash("sunets.profiling.cost"), library_versions())
    path = work / "cost" / f"{key}.npz"
    with locked(path.with_suffix(".lock"), seconds=-1):
        if not path.exists():
            write_values(path, measure_cost(arguments, **protocol)[0])
        return read_values(path)


# The study -----------------------------------------------------------------------------------------------------------


def run_study(suite: Suite, name: str, *, workers: int | None = None, fresh: bool = False) -> list[Record]:
    """Run a study, or what is left of it, and write its records.

    Writes `results/<benchmark>/records/ablations/<study>.json`, `.csv` (a flat table) and `.history.csv`, atomically.

    Args:
        suite: the parameters.
        name: of the study.
        workers: most concurrent jobs. None: one per GPU, or as many as the CPU cores allow. The records do not depend
            on it.
        fresh: score and tell all trials again; finished trainings are kept.

    Returns:
        One record per trial, in a fixed order.

    Raises:
        ConfigError, ValueError: the study is invalid, the model's recipe is not tuned yet, or another driver runs the
            study; raised before the first trial.
        JobError: a trial ended without a result; run again to go on.
        StageError: the study runs already, or the code was changed meanwhile.
    """
    paths = BenchmarkPaths(suite.benchmark)
    study = study_config(suite, name)
    manifest = load_manifest(paths.data, suite.data)
    suite = tuned(suite, paths, [study.model], manifest.digest)
    space = Space(suite, name, manifest)
    points = check_study(space)
    base = space.config({})
    with (
        stage(
            f"ablate@{name}", paths, __name__, suite=suite, data_digest=manifest.digest,
            params=(
                "benchmark", "seeds", "data", "train", "tune", "evaluate", "cost", f"models.{study.model}",
                f"ablations.{name}",
            ),
        ) as code,
        open_pool(
            [__name__], paths.data, manifest.digest, device=base.train.device, threads=base.train.threads,
            jobs=most_jobs(study, len(points)), results=paths.job_results, workers=workers,
        ) as pool,
    ):  # fmt: skip
        headline = next(iter(suite.evaluate.variants))
        made_by = (manifest.digest, code, library_versions(), pool.device)
        decides = fingerprint(study, base, headline, suite.cost, *made_by)
        origin = provenance(manifest.digest, code, base, stage_command(suite, "run", name, package="ablations"))
        plan = _Plan(**vars(space), points=points, paths=paths, fingerprint=decides, origin=origin)
        journal = paths.work / "ablations" / suite.benchmark / f"{name}-{plan.fingerprint}.journal"
        with (
            open_storage(os.environ.get(STORAGE) or str(journal), f"{suite.benchmark}/{name}") as storage,
            _Listener(plan) as listener,
        ):

            def each(kind: Kind, settings: Sequence[Arm], seeds: Sequence[int] = study.seeds) -> list[Trial]:
                """Train settings on every seed."""
                cells = [{**setting, "seed": seed} for setting in settings for seed in seeds]
                make_job = listener.expect(kind, plan.title(kind), len(cells))
                plans = repeat(plan.title(kind), plan.objectives(kind), cells, storage, make_job, listener.end)
                return pool.drive(plans, listener.on_message, reuse=not fresh)

            if study.kind in ("one_at_a_time", "grid"):
                trials = each("grid", [point.setting for point in points])
            else:
                searches = _searches(plan, listener, storage)
                trials = [t for part in pool.drive(searches, listener.on_message, reuse=not fresh) for t in part]
                if best := finalists(study, plan.direction, trials):
                    trials += each("tuning", best, plan.tuning_seeds[1:])
                if chosen := confirmed(study, plan.direction, trials, plan.identity):
                    trials += each("confirmation", chosen)
            records = [listener.record(trial) for trial in trials]
            rows = [listener.rows(trial) for trial in trials]
            folder = paths.records / "ablations"
            write_rows(folder / f"{name}.csv", map(trial_row, records))
            history = (row for part in rows for row in part)
            write_history(folder / f"{name}.history.csv", history, records, folder / f"{name}.json")
    return records


def _searches(plan: _Plan, listener: _Listener, storage: BaseStorage) -> list[PlanOf[list[Trial]]]:
    """Make the searches of a study: one per arm, or the only one of kind search."""
    study = plan.study
    kind: Kind = "search" if study.kind == "search" else "tuning"
    axes = study.axes if kind == "search" else study.nuisance

    def of(point: Point) -> PlanOf[list[Trial]]:
        fixed = {} if kind == "search" else point.setting
        spec = Search(
            plan.title(kind, None if kind == "search" else point.arm),
            plan.objectives(kind),
            {axis.path: axis for axis in axes},
            trials=study.trials,
            batch=study.batch,
            seed=study.search_seed,
            rungs=rungs(plan.suite, plan.name, fixed),
            fixed=fixed | {"seed": study.tuning_seed},
            first=(plan.first,) if kind == "tuning" and plan.first is not None else (),
        )
        return search(spec, storage, listener.expect(kind, spec.name, spec.trials), plan.identity, listener.end)

    return [of(point) for point in plan.points]


# Records -------------------------------------------------------------------------------------------------------------


class _Listener:
    """Follows the trials: progress on the terminal, live runs in MLflow, and their records."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.bar = progress_bar()
        self.phases: dict[str, tuple[Kind, int]] = {}
        """Optuna study -> kind, and number of its first trial in this study."""
        self.tasks: dict[Kind, TaskID] = {}
        self.expected = 0
        self.numbers: dict[str, int] = {}
        """Job -> number of its trial."""
        self.lock, self.ended = threading.Lock(), set[int]()

    def __enter__(self) -> _Listener:
        from sunets.tracking.live import Tracker

        self.tracker = Tracker("trial", self.plan.suite, self.plan.name)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.tracker.close()

    def expect(self, kind: Kind, study: str, size: int) -> MakeJob:
        """Number the trials of the Optuna study that comes next; returns the function that makes their jobs."""
        first = self.expected
        self.phases[study] = kind, first
        self.expected += size
        if kind not in self.tasks:
            self.tasks[kind] = self.bar.add_task(f"{self.plan.name}: {kind}", total=0, last="")
        task = self.bar.tasks[self.tasks[kind]]
        self.bar.update(task.id, total=size + (task.total or 0))

        def make_job(number: int, setting: Setting, until: int | None) -> Job:
            job = self.plan.job(kind, first + number, setting, until)
            if job.name not in self.numbers:
                self.numbers[job.name] = first + number
                self._announce(first + number, kind, setting)
            return job

        return make_job

    def _announce(self, number: int, kind: Kind, setting: Setting) -> None:
        config = resolve_config(self.plan.config(setting))
        point, arm = self._point(setting)
        origin = self.plan.origin | {"config_hash": parameters_hash(parameters(config))}
        self.tracker.plan(number, config, origin, phase=kind, arm=arm, reference=point.reference)

    def on_message(self, name: str, row: Record) -> None:
        """Log the row of an epoch, from a thread; drop one that arrives after the trial's result, which holds it."""
        with self.lock:
            if (number := self.numbers[name]) not in self.ended:
                self.tracker.log_epoch(number, row)

    def end(self, trial: Trial) -> None:
        """Log and show a trial that has ended."""
        record = self.record(trial)
        if trial.duplicate_of is not None:
            self._announce(record["number"], record["phase"], trial.setting)
        with self.lock:
            self.ended.add(record["number"])
            self.tracker.finish(record["number"], record, self.rows(trial))
        score = next((f"{k} {v:.4f}" for k, v in record["scores"].items() if v is not None), record["reason"])
        if self.bar.disable:
            arm = ", ".join(f"{path}={value}" for path, value in {**record["arm"], **record["tuned"]}.items())
            position = f"{self.plan.name} {record['phase']} {record['number'] + 1}/{self.expected}"
            text = f"{position}: {arm}, seed {record['seed']}: {record['status']}, {score}"
            self.bar.console.print(text, markup=False)
        else:
            self.bar.update(self.tasks[record["phase"]], advance=1, last=score)

    def _point(self, setting: Setting) -> tuple[Point, Arm]:
        """Return the point that a trial belongs to, and the values of the axes."""
        axes = [axis.path for axis in self.plan.study.axes]
        on_axes = {path: value for path, value in setting.items() if path in axes}
        for point in self.plan.points:
            if point.setting == on_axes:
                return point, point.arm
        return Point(on_axes, on_axes), on_axes

    def record(self, trial: Trial) -> Record:
        """Make the record of one trial."""
        plan, result = self.plan, trial.result
        config = resolve_config(plan.config(trial.setting))
        point, arm = self._point(trial.setting)
        kind, first = self.phases[trial.study]
        return make_record(
            "trial",
            benchmark=plan.suite.benchmark,
            task=plan.manifest.task,
            model=plan.study.model,
            label=plan.suite.models[plan.study.model].label,
            status=trial.status,
            reason=trial.reason,
            seed=config.seed,
            variant=next(iter(config.evaluate.variants)),
            config=config,
            scores=result["scores"],
            cost=result["cost"],
            environment=result["environment"],
            provenance=plan.origin | {"config_hash": parameters_hash(parameters(config))},
            study=plan.name,
            number=first + trial.number,
            duplicate_of=None if trial.duplicate_of is None else first + trial.duplicate_of,
            phase=kind,
            split=config.data.test_split if kind in FINAL else config.data.val_split,
            setting=without_seed(trial.setting),
            arm=arm,
            tuned=(recipe := {axis.path: trial.setting[axis.path] for axis in plan.study.nuisance}),
            recipe_of_base=recipe == plan.first if recipe else None,
            reference=point.reference,
            same_as=list(point.same_as),
            benchmark_training=run_fingerprint(config, plan.manifest) in plan.benchmark_trainings,
        )

    def rows(self, trial: Trial) -> list[Record]:
        """Return the rows of a trial's history."""
        kind, first = self.phases[trial.study]
        head = {"number": first + trial.number, "phase": kind, "seed": trial.setting["seed"]}
        return [{**head, **row} for row in trial.result["history"]]

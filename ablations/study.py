"""One ablation study: its trials, run wherever they were left, and the records of them.

A trial is one training (`sunets.train.fit`) and one scoring. Grids and confirmations are scored on the test split, what
a sampler looks at on the validation split, under other names (`score.*` and `search.*`), so that the two never share a
column. Trainings live in `.work/<fingerprint>`, so a killed one goes on, and equal ones of several studies are one.

    one_at_a_time, grid    every point once a seed
    tuned                  for each arm as many sampled trials; then the arm's best setting on every seed
    search                 sampled trials for two objectives; then the base and points of the front on every seed
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import optuna
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ablations.engine import Event, Finished, Outcome, Phase, Setting, close_storage, distribution, open_storage
from ablations.engine import run_phases as run_trials
from ablations.space import Arm, Point, check_study, identity, study_config, trial_config
from sunets.config import AxisConfig, Config, StudyConfig, Suite, fingerprint
from sunets.data import Manifest, load_manifest
from sunets.evaluate import evaluate
from sunets.profile import profile_model
from sunets.record import (
    Record,
    code_hash,
    environment,
    make_record,
    provenance,
    read_json,
    stage_command,
    write_json,
    write_rows,
)
from sunets.stages import Layout, stage
from sunets.stages.parallel import default_workers
from sunets.train import fit, run_fingerprint, select_device

STORAGE = "OPTUNA_STORAGE"
"""Environment variable with the address of a storage that several machines share."""
NOT_REPRODUCIBLE = (
    "{name}: several workers share {what}, so what is sampled depends on which of them is faster: this study is not "
    "bit-reproducible. Grids and confirmations are, and so are tuned studies with at most one worker an arm."
)
T = TypeVar("T")
Kind = Literal["grid", "tuning", "search", "confirmation"]

_SCORES = {
    "segmentation": ("score.miou", "val.miou"),
    "classification": ("score.top1_error_percent", "val.top1_error_percent"),
}
"""Task -> headline score of an evaluation, and what stands for it in a training's rows."""


def headline(task: str) -> str:
    """Key of the score that a study maximises (mIoU) or minimises (top-1 error)."""
    return _SCORES[task][0]


@dataclass(frozen=True)
class _Plan:
    """A study whose points have been checked."""

    suite: Suite
    name: str
    study: StudyConfig
    manifest: Manifest
    points: tuple[Point, ...]
    fingerprint: str
    workers: int
    exclusive: bool

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "maximize" if self.manifest.task == "segmentation" else "minimize"

    def title(self, kind: Kind, part: int | None = None) -> str:
        """Name of the Optuna study of a phase."""
        shared = "" if self.exclusive or kind in ("grid", "confirmation") else "-shared"
        whole = f"{self.suite.benchmark}/{self.name}-{self.fingerprint}/{kind}{shared}"
        return whole if part is None else f"{whole}/{part}"

    def sampled(self) -> list[Phase]:
        """The phases of a tuned study (one an arm) or of a search."""
        study = self.study
        common: dict[str, Any] = {
            "trials": study.trials,
            "seed": study.search_seed,
            "exclusive": self.exclusive,
            "startup": min(10, max(3, study.trials // 3)),
        }
        if study.kind == "search":
            return [
                Phase(
                    self.title("search"), (self.direction, "minimize"), space=_space(study.axes),
                    fixed={"seed": study.tuning_seed}, **common,
                )
            ]  # fmt: skip
        return [
            Phase(
                self.title("tuning", number), (self.direction,), space=_space(study.nuisance),
                fixed={**point.setting, "seed": study.tuning_seed}, pruning=study.pruning, **common,
            )
            for number, point in enumerate(self.points)
        ]  # fmt: skip

    def cells(self, kind: Kind, settings: Sequence[Arm]) -> Phase:
        """The phase that runs settings on every seed."""
        cells = tuple({**setting, "seed": seed} for setting in settings for seed in self.study.seeds)
        return Phase(self.title(kind), (self.direction,), cells=cells)


def _space(axes: Sequence[AxisConfig]) -> dict[str, tuple[optuna.distributions.BaseDistribution, tuple[Any, ...]]]:
    return {axis.path: (distribution(axis.values, axis.low, axis.high, axis.log), axis.values) for axis in axes}


# One trial -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Training:
    """The objective: trains and scores one setting in a worker process."""

    suite: Suite
    name: str
    layout: Layout
    source: Record
    """Provenance of the study; a trial's own configuration is put in."""

    def __call__(self, phase: str, setting: Setting, report: Callable[[int, float | None, Any], bool]) -> Outcome:
        config = _config(self.suite, self.name, setting)
        manifest = load_manifest(self.layout.data, config.data)
        final = _kind(phase) in ("grid", "confirmation")
        score, row_score = _SCORES[manifest.task]
        rows: list[dict[str, Any]] = []
        content: dict[str, Any] = {
            "environment": environment(select_device(config.train.device), config.train.threads),
            "provenance": self.source | {"config_hash": fingerprint(config)},
            "history": rows,
            "split": config.data.test_split if final else config.data.val_split,
        }

        def stop_early(row: dict[str, Any]) -> bool:
            rows.append(row)
            return report(row["epoch"], row.get(row_score), row)

        try:
            work_dir = self.layout.work / run_fingerprint(config, manifest)
            work_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(work_dir / "trial.lock"):  # an equal trial of another study, or a killed worker's last moment
                result = fit(config, manifest, work_dir=work_dir, stop_early=stop_early, progress=False)
            if result.pruned:
                return Outcome(None, content, pruned=True)
            content["cost"] = _cost(self.suite, config, manifest, self.layout.work)
            variant = next(iter(config.evaluate.variants.values()))
            scores = evaluate(
                result.model, manifest, config, split=content["split"], variant=variant, progress=False
            ).scores
        except Exception as error:  # a trial that fails is a result
            return Outcome(None, content, failure=" ".join(f"{type(error).__name__}: {error}".split()))
        values = [scores[score]]
        if _kind(phase) == "search":
            values.append(content["cost"]["cost.gmacs"])
        content["scores"] = scores if final else {f"search.{k.removeprefix('score.')}": v for k, v in scores.items()}
        if any(value is None for value in values):
            return Outcome(None, content, failure="the score is absent: no labelled pixel")
        return Outcome(tuple(float(value) for value in values if value is not None), content)


def _config(suite: Suite, name: str, setting: Setting) -> Config:
    return trial_config(suite, name, {k: v for k, v in setting.items() if k != "seed"}, setting["seed"])


def _kind(phase: str) -> Kind:
    kind: Any = phase.split("/")[2].removesuffix("-shared")
    return kind


def _cost(suite: Suite, config: Config, manifest: Manifest, work: Path) -> dict[str, Any]:
    """Exact figures of a trial's network; counted once, whatever the number of trials that have it."""
    arguments = config.model.arguments() | {"task": manifest.task, "num_classes": manifest.num_classes}
    profile = suite.profile
    protocol: dict[str, Any] = {
        name: getattr(profile, name) for name in ("size", "batch_size", "field_seeds", "field_images")
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    key = fingerprint(arguments, protocol, device, code_hash("sunets.profile"), torch.__version__)
    path = work / "cost" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            write_json(path, profile_model(arguments, **protocol)[0])
        return dict(read_json(path))


# The study -----------------------------------------------------------------------------------------------------------


def run_study(
    suite: Suite, name: str, *, workers: int | None = None, fresh: bool = False, root: Path = Path()
) -> list[Record]:
    """Run a study, or what is left of it, and write its records.

    Writes `results/<benchmark>/records/ablations/<study>.json`, `.csv` (a flat table) and `.history.csv`, each as a
    whole.

    Args:
        suite: the parameters.
        name: of the study.
        workers: processes at a time. None: as many as the cores carry, one on a GPU; while a search samples, one; while
            a tuned study samples, at most one an arm.
        fresh: forget the trials of this study in the storage, failed ones above all; finished trainings are kept.
        root: of the checkout.

    Returns:
        One record a trial, in a fixed order.

    Raises:
        ConfigError, ValueError: something is wrong with the study; before the first trial.
        StageError: the study runs already, or the code was changed meanwhile.
    """
    layout = Layout(suite.benchmark, root)
    study = study_config(suite, name)
    manifest = load_manifest(layout.data, suite.data)
    points = check_study(suite, name, manifest)
    shared_storage = os.environ.get(STORAGE)
    # Machines that share a storage may share the directory too: then each has a lock of its own.
    own = f"@{socket.gethostname()}.{os.getpid()}" if shared_storage else ""
    with stage(f"ablate@{name}{own}", layout, __name__) as code:
        base = trial_config(suite, name, {}, 0)
        device = select_device(base.train.device)
        carried = default_workers(base.train.threads, device.type)
        sampling = {"tuned": len(points), "search": 1}.get(study.kind, carried)
        plan = _Plan(
            suite, name, study, manifest, points,
            fingerprint(study, base, suite.profile, manifest.digest, code, torch.__version__, device.type),
            workers or carried,
            exclusive=(workers or 1) <= sampling,
        )  # fmt: skip
        address = shared_storage or str(
            layout.work / "ablations" / suite.benchmark / f"{name}-{plan.fingerprint}.journal"
        )
        source = provenance(manifest.digest, code, base, stage_command(suite, "run", name, package="ablations"))
        with _Listener(plan, source, environment(device, base.train.threads)) as listener:
            if not plan.exclusive:
                what = "an arm" if study.kind == "tuned" else "the search"
                listener.say(NOT_REPRODUCIBLE.format(name=name, what=what))
            if fresh:
                _forget(plan, address)

            def run(phases: Sequence[Phase], workers: int) -> list[Finished]:
                listener.expect(phases)
                done = run_trials(
                    phases,
                    _Training(suite, name, layout, source),
                    address,
                    workers=workers,
                    preload=[__name__],
                    on_event=listener.hear,
                )
                return [trial for phase in done for trial in phase]

            if study.kind in ("one_at_a_time", "grid"):
                trials = run([plan.cells("grid", [point.setting for point in points])], plan.workers)
            else:
                trials = run(plan.sampled(), workers or min(carried, sampling))
                if chosen := confirmed(plan, trials):
                    trials += run([plan.cells("confirmation", chosen)], plan.workers)
            records = [listener.record(trial) for trial in trials]
            rows = [listener.rows(trial) for trial in trials]
            folder = layout.records / "ablations"
            write_rows(folder / f"{name}.history.csv", (row for part in rows for row in part), ["number", "epoch"])
            write_rows(folder / f"{name}.csv", map(_flat, records))
            write_json(folder / f"{name}.json", records)
            listener.finish(records, rows)
    return records


def confirmed(plan: _Plan, trials: Sequence[Finished]) -> list[Arm]:
    """The settings that a sampled study trains again on fresh seeds: each arm's best, or the base and the front's."""
    finished = [t for t in trials if t.status == "finished" and t.values is not None]
    sign = -1 if plan.direction == "minimize" else 1

    def score(trial: Finished) -> float:
        assert trial.values is not None
        return sign * trial.values[0]

    if plan.study.kind == "tuned":
        arms: dict[str, Finished] = {}
        for trial in finished:  # of equal scores, the earlier trial's
            if trial.phase not in arms or score(trial) > score(arms[trial.phase]):
                arms[trial.phase] = trial
        return [_setting(trial) for trial in arms.values()]
    front = pareto_front([(score(t), -t.values[1]) for t in finished if t.values is not None])
    chosen = spread([finished[i] for i in front], plan.study.confirm)
    settings = {identity(plan.suite, plan.name, plan.manifest, s): s for s in ({}, *map(_setting, chosen))}
    return list(settings.values())


def _setting(trial: Finished) -> Arm:
    return {path: value for path, value in trial.setting.items() if path != "seed"}


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Places of the points that no other is better than in every coordinate, by falling first coordinate, each once."""
    order = sorted(range(len(points)), key=lambda i: (*(-x for x in points[i]), i))
    front: list[int] = []
    for i in order:
        if not any(all(a >= b for a, b in zip(points[j], points[i], strict=True)) for j in front):
            front.append(i)
    return front


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items at about equal distances, the first and the last among them."""
    if count >= len(items):
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def _forget(plan: _Plan, address: str) -> None:
    storage = open_storage(address)
    prefix = plan.title("grid").rpartition("/")[0]
    for summary in optuna.get_all_study_summaries(storage, include_best_trial=False):
        if summary.study_name.startswith(prefix + "/"):
            optuna.delete_study(study_name=summary.study_name, storage=storage)
    close_storage(storage)


# Records -------------------------------------------------------------------------------------------------------------


class _Listener:
    """Follows the trials: a line or bar for the reader, live runs in MLflow, and in the end the records."""

    def __init__(self, plan: _Plan, source: Record, host: Record) -> None:
        self.plan, self.source, self.host = plan, source, host
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[last]}"),
            TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.first: dict[str, int] = {}
        """Phase -> number of its first trial in the study."""
        self.tasks: dict[str, Any] = {}
        self.expected = 0
        self.tracked: set[int] = set()

    def __enter__(self) -> _Listener:
        from sunets.tracking import Tracker

        self.tracker = Tracker("trial", self.plan.suite, self.plan.name)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.tracker.close()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def expect(self, phases: Sequence[Phase]) -> None:
        """Number the trials of phases that come next."""
        for phase in phases:
            self.first[phase.name] = self.expected
            self.expected += phase.size
        kind = _kind(phases[0].name)
        task = self.bar.add_task(f"{self.plan.name}: {kind}", total=sum(p.size for p in phases), last="")
        self.tasks |= {phase.name: task for phase in phases}

    def hear(self, event: Event) -> None:
        """Take what a worker says."""
        number = self.first[event.phase] + event.number
        # Workers that share a phase cannot know their trials' final numbers: those reach MLflow in the end.
        live = self.plan.exclusive or _kind(event.phase) in ("grid", "confirmation")
        if event.kind == "started" and live:
            config = _config(self.plan.suite, self.plan.name, event.setting)
            self._plan_run(number, config, event.phase, event.setting)
        elif event.kind == "reported" and live:
            self.tracker.log_epoch(number, event.message)
        elif event.kind == "ended":
            record = self.record(event.message)
            self._show(record, event.phase)
            if live:
                self.tracker.finish(number, record, self.rows(event.message))
                self.tracked.add(number)

    def _plan_run(self, number: int, config: Config, phase: str, setting: Setting) -> None:
        point, arm = self._place(phase, setting)
        source = self.source | {"config_hash": fingerprint(config)}
        self.tracker.plan(number, config, source, phase=_kind(phase), arm=arm, reference=point.reference)

    def finish(self, records: Sequence[Record], rows: Sequence[Sequence[Record]]) -> None:
        """Bring to MLflow what other machines or earlier runs did."""
        for record, history in zip(records, rows, strict=True):
            if (number := record["number"]) not in self.tracked:
                config = _config(self.plan.suite, self.plan.name, {**record["setting"], "seed": record["seed"]})
                self.tracker.plan(
                    number, config, record["provenance"],
                    **{k: record[k] for k in ("phase", "arm", "reference")},
                )  # fmt: skip
                self.tracker.finish(number, record, history)

    def _show(self, record: Record, phase: str) -> None:
        score = next((f"{k} {v:.4f}" for k, v in record["scores"].items() if v is not None), record["reason"])
        if self.bar.disable:
            arm = ", ".join(f"{path}={value}" for path, value in {**record["arm"], **record["tuned"]}.items())
            place = f"{self.plan.name} {record['phase']} {record['number'] + 1}/{self.expected}"
            self.say(f"{place}: {arm}, seed {record['seed']}: {record['status']}, {score}")
        else:
            self.bar.update(self.tasks[phase], advance=1, last=score)

    def _place(self, phase: str, setting: Setting) -> tuple[Point, Arm]:
        """The point that a trial belongs to, and the values of the axes."""
        axes = [axis.path for axis in self.plan.study.axes]
        own = {path: value for path, value in setting.items() if path in axes}
        for point in self.plan.points:
            if point.setting == own:
                return point, point.arm
        return Point(own, own), own

    def record(self, trial: Finished) -> Record:
        """The record of one trial."""
        plan, content = self.plan, trial.content
        config = _config(plan.suite, plan.name, trial.setting)
        point, arm = self._place(trial.phase, trial.setting)
        final = _kind(trial.phase) in ("grid", "confirmation")
        return make_record(
            "trial",
            benchmark=plan.suite.benchmark,
            model=plan.study.model,
            label=plan.suite.models[plan.study.model].label,
            status=trial.status,
            reason=trial.reason,
            seed=config.seed,
            variant=next(iter(config.evaluate.variants)),
            config=config,
            scores=content.get("scores"),
            cost=content.get("cost"),
            environment=content.get("environment", self.host),
            provenance=content.get("provenance", self.source | {"config_hash": fingerprint(config)}),
            study=plan.name,
            number=self.first[trial.phase] + trial.number,
            phase=_kind(trial.phase),
            split=config.data.test_split if final else config.data.val_split,
            setting=_setting(trial),
            arm=arm,
            tuned={axis.path: trial.setting[axis.path] for axis in plan.study.nuisance},
            reference=point.reference,
            same_as=list(point.same_as),
        )

    def rows(self, trial: Finished) -> list[Record]:
        """The history of one trial."""
        head = {
            "number": self.first[trial.phase] + trial.number,
            "phase": _kind(trial.phase),
            "seed": trial.setting["seed"],
        }
        return [{**head, **row} for row in trial.content.get("history", [])]


def _flat(record: Record) -> Record:
    """A trial as a row of a table."""
    head = ("number", "phase", "status", "reason", "model", "seed", "split", "reference")
    arm = {path: str(value) if isinstance(value, list) else value for path, value in record["arm"].items()}
    return {k: record[k] for k in head} | arm | record["tuned"] | record["scores"] | record["cost"]

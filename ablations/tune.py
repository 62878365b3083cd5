"""Stage `tune`: the recipe of one model, chosen on the validation split with the same effort as every other's.

The first trial has the recipe of the parameter file, so that the chosen one is never worse on the validation split. The
next ones have the other combinations of the axes with `values`, such as the starts, if all fit into the trials; Optuna
draws the rest from `tune.space`, anew where a recipe cannot be trained. All trials of a benchmark train with one seed;
the first recipe and the best others then train with more, and the best mean is chosen. No row of a table of scores has
these seeds. An axis that a model does not have, or that its own `train` fixes, is left out of its space; the record
says so.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ablations.search import STORAGE, Direction, Search, Setting, Trial, open_storage, repeat, search
from sunets.core import recipes
from sunets.core.config import AxisConfig, Config, ConfigError, Suite, derive_seed, flatten, override
from sunets.core.config import fingerprint as digest_of
from sunets.core.executor import Job, Send, open_pool
from sunets.core.finalists import FINALISTS, TUNING_SEEDS, tuning_trainings
from sunets.core.metrics import PRIMARY_METRIC, higher_is_better, validation_column
from sunets.core.paths import BenchmarkPaths
from sunets.core.progress import progress_bar, scores_text
from sunets.core.provenance import library_versions, provenance, stage_command
from sunets.core.record import Record, make_record, parameters
from sunets.core.stage import StageError, stage
from sunets.data.manifest import Manifest, load_manifest
from sunets.models.initialization import build_network, has_residual_branches
from sunets.models.zoo import create_model, resolve_config
from sunets.stages.train import train_one
from sunets.training.fit import check, check_config, run_fingerprint
from sunets.training.recipe import check_batch_norm, input_size

STARTS = ("train.zero_init_residual", "train.zero_init_head")


def run_trial(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Train one recipe and take the validation score of its last epoch, in a worker process.

    Args:
        arguments: as of `sunets.stages.train.train_one`, and score (column of the history).
        send: takes the row of each epoch.

    Returns:
        status, reason, values and curve (of the score), history and environment.

    Raises:
        ValueError: the validation split has no labelled pixel.
    """
    score = arguments["score"]
    outcome = train_one(arguments, send)
    rows = outcome["rows"]
    result = {k: outcome[k] for k in ("status", "reason", "environment")} | {"history": rows, "values": {}}
    result["curve"] = [[row["epoch"], row[score]] for row in rows if row.get(score) is not None]
    if outcome["status"] == "finished":
        if rows[-1].get(score) is None:
            raise ValueError(f"{score}: the validation split has no labelled pixel; choose another data.val_split")
        result["values"] = {score: rows[-1][score]}
    return result


@dataclass(frozen=True)
class _Tuning:
    """Plan of one model's tuning."""

    suite: Suite
    key: str
    manifest: Manifest
    paths: BenchmarkPaths
    base: Config
    """Of the first trial."""
    space: dict[str, AxisConfig]
    left_out: dict[str, str]
    """Path of an axis that the model does not have -> why."""
    network: nn.Module
    """The model's, without memory (on the meta device); the same in every trial."""

    @property
    def score(self) -> str:
        """Column of the history that recipes are chosen by."""
        return validation_column(PRIMARY_METRIC[self.manifest.task])

    @property
    def direction(self) -> Direction:
        return "maximize" if higher_is_better(self.score) else "minimize"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds that recipes are chosen by; the first is that of all trials."""
        more = (derive_seed("tune", self.suite.tune.seed, n) % (1 << 31) for n in range(1, TUNING_SEEDS))
        return (self.base.seed, *more)

    def config(self, setting: Setting) -> Config:
        return override(self.base, setting, source=f"models.{self.key}: tuning")

    def identity(self, setting: Setting) -> str:
        """Return the digest of a recipe.

        Raises:
            ConfigError: the model cannot be trained by it.
        """
        config = self.config(setting)
        self._check(config)
        return digest_of(config)

    def check_space(self) -> None:
        """Check each value of each axis alone, of a range its ends; a combination that is impossible is drawn anew.

        Raises:
            ConfigError: names axis and value.
        """
        for path, axis in self.space.items():
            for value in axis.values or (axis.low, axis.high):
                try:
                    config = self.config({path: value})
                    self._check(config)
                    if (size := input_size(config, self.manifest)) != input_size(self.base, self.manifest):
                        with torch.no_grad():
                            self.network(torch.empty(1, config.model.in_channels or 3, *size, device="meta"))
                except (ValueError, RuntimeError) as error:
                    reason = " ".join(str(error).split())
                    raise ConfigError(f"tune.space: {path}={value}: models.{self.key}: {reason}") from None

    def _check(self, config: Config) -> None:
        """Check what differs between the trials: as `sunets.training.fit.check` does, without initial weights."""
        try:
            check_config(config, self.manifest)
            check_batch_norm(self.network, config, self.manifest)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def job(self, number: int, setting: Setting, until: int | None) -> Job:
        config = self.config(setting)
        arguments = {
            "config": config.model_dump(mode="json"),
            # Holds the content of `train.init_from`, of which `config` has the path alone.
            "training": run_fingerprint(config, self.manifest),
            "score": self.score,
        }
        paths = {"data": str(self.paths.data), "work": str(self.paths.work)}
        name = f"{self.key} finalist, training {number}" if "seed" in setting else f"{self.key} trial {number}"
        return Job(name, f"{__name__}:{run_trial.__name__}", arguments, paths)

    def finalists(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the first trial and the best others, of different recipes; none if there is one recipe."""
        finished = [t for t in trials if t.status == "finished" and t.duplicate_of is None]
        others = sorted(finished, key=lambda t: (t.number > 0, -self._score(t)))
        best = sorted(others[:FINALISTS], key=lambda t: t.number)
        return best if len(best) > 1 else []

    def _score(self, trial: Trial) -> float:
        """Return the score of a finished trial, so that larger is better."""
        score = float(trial.result["values"][self.score])
        return score if self.direction == "maximize" else -score

    def best(self, trials: Sequence[Trial]) -> list[Trial | None]:
        """Return the best trial so far after each; of equal scores the earlier one, None where all have diverged."""
        best: list[Trial | None] = []
        for trial in trials:
            last = best[-1] if best else None
            better = trial.status == "finished" and (last is None or self._score(trial) > self._score(last))
            best.append(trial if better else last)
        return best


def plan_tuning(suite: Suite, key: str, manifest: Manifest, paths: BenchmarkPaths) -> _Tuning:
    """Determine what is tried for `models.<key>`, and check it before the first trial.

    Raises:
        ConfigError, CheckpointError, ValueError, FileNotFoundError: the model cannot be trained as configured.
    """
    base = recipes.first_trial(suite, key)
    check(base, manifest)
    free = {axis.path: axis for axis in suite.free_axes(key)}
    left_out = {axis.path: f"fixed by models.{key}.train" for axis in suite.tune.space if axis.path not in free}
    path = STARTS[0]
    if path in free and not has_residual_branches(base.model, manifest.task):
        del free[path]
        left_out[path] = "no residual branches, or published weights" if base.model.weights else "no residual branches"
    for path in (path for path in STARTS if path in free and base.train.init_from):
        if _same_start(base, manifest, path):
            del free[path]
            left_out[path] = "replaced by train.init_from"
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        arguments = {name: value for name, value in base.model.arguments().items() if name != "weights"}
        network = create_model(**arguments, task=manifest.task, num_classes=manifest.num_classes).eval()
    tuning = _Tuning(suite, key, manifest, paths, base, free, left_out, network)
    tuning.check_space()
    return tuning


def _same_start(base: Config, manifest: Manifest, path: str) -> bool:
    """Return whether a network starts from the same weights with a start and without it."""
    starts = [build_network(override(base, {path: on}), manifest)[0].state_dict() for on in (False, True)]
    return all(torch.equal(values, starts[1][name]) for name, values in starts[0].items())


def tune_stage(suite: Suite, key: str, *, workers: int | None = None) -> Record:
    """Tune the recipe of `models.<key>`, or resume its tuning; write its record, table of trials and histories.

    A trial that diverges is a result, the worst; one that ends without a result is an error, and no trial. A recipe
    that was drawn before is not trained again.

    Args:
        suite: the parameters; tune.trials is at least 1.
        key: of the model.
        workers: most concurrent trainings. None: one per GPU, or as many as the CPU cores allow. The files do not
            depend on it.

    Returns:
        The record.

    Raises:
        ConfigError, ValueError: the model cannot be trained as configured, or another driver tunes it.
        JobError: a trial ended without a result; run again to go on.
        StageError: all trials diverged: the files are written, and no training takes a recipe from them. Or the stage
            runs already, or its code, parameters or data changed meanwhile.
    """
    paths = BenchmarkPaths(suite.benchmark)
    manifest = load_manifest(paths.data, suite.data)
    tuning = plan_tuning(suite, key, manifest, paths)
    params = ("benchmark", "data", "train", "tune", f"models.{key}")
    with stage(f"tune@{key}", paths, __name__, suite=suite, params=params, data_digest=manifest.digest) as code:
        head = _record_head(tuning, code)
        train, tune = tuning.base.train, suite.tune
        with open_pool(
            [__name__], paths.data, manifest.digest, device=train.device, threads=train.threads,
            jobs=max(min(tune.batch, tune.trials), tuning_trainings(tune.trials) - tune.trials),
            results=paths.job_results, workers=workers,
        ) as pool:  # fmt: skip
            decides = (head["fingerprint"], manifest.digest, code, library_versions(), pool.device)
            spec = _search(tuning, f"{suite.benchmark}, tuning of {key} ({digest_of(*decides)})")
            journal = paths.work / "tune" / suite.benchmark / f"{key}-{digest_of(*decides)}.journal"
            with (
                open_storage(os.environ.get(STORAGE) or str(journal), f"{suite.benchmark}/tune/{key}") as storage,
                _Progress(tuning) as progress,
            ):
                plan = search(spec, storage, tuning.job, tuning.identity, progress.end)
                (trials,) = pool.drive([plan], progress.on_message)
                finalists = tuning.finalists(trials)
                cells = [{**trial.setting, "seed": seed} for trial in finalists for seed in tuning.seeds[1:]]
                progress.expect(len(cells))
                again = repeat(
                    f"{spec.name}, finalists", spec.objectives, cells, storage, tuning.job, progress.end_finalist
                )
                scores = _Scores(tuning, finalists, pool.drive(again, progress.on_message) if cells else [])
        record = make_record("tune", **head, **_outcome(tuning, trials, scores))
        best = tuning.best(trials)
        rows = [_row(tuning, trial, so_far, scores) for trial, so_far in zip(trials, best, strict=True)]
        history = [{"number": trial.number, **row} for trial in trials for row in trial.result["history"]]
        recipes.write_tuning(paths, key, record, rows, history)
    if record["status"] == "failed":
        raise StageError(f"models.{key}: {record['reason']}")
    values = ", ".join(f"{path}={value}" for path, value in record["chosen"].items())
    score = record["scores"][tuning.score]
    print(f"{key}: trial {record['trial']} of {len(trials)} chosen: {values}: {tuning.score} {score:.4f}", flush=True)
    return record


def _search(tuning: _Tuning, name: str) -> Search:
    tune, base = tuning.suite.tune, flatten(tuning.base)
    return Search(
        name,
        {tuning.score: tuning.direction},
        tuning.space,
        fixed={},
        trials=tune.trials,
        batch=tune.batch,
        seed=tune.seed,
        first=_first_recipes(tuning.space, base, tune.trials),
    )


def _first_recipes(space: Mapping[str, AxisConfig], base: Mapping[str, Any], trials: int) -> tuple[Setting, ...]:
    """Return the recipe `base` and its variants with every other combination of the axes that have values.

    A few random draws would leave some combinations out, and give luck a say in which network gets its best start.
    Where not all fit into the trials, the recipe goes first alone: the first of them by order would be no fair choice.
    """
    choices = {path: axis.values for path, axis in space.items() if axis.values}
    recipe = {path: base[path] for path in space}
    if math.prod(map(len, choices.values())) > trials:
        return (recipe,)
    variants = [recipe | dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return (recipe, *(variant for variant in variants if variant != recipe))


def _record_head(tuning: _Tuning, code: str) -> Record:
    """Return the keys of the record that are known before the first trial."""
    suite, key = tuning.suite, tuning.key
    params = parameters(resolve_config(tuning.base)) | recipes.tune_parameters(suite)
    command = stage_command(suite, "tune", key, package="ablations")
    return {
        "benchmark": suite.benchmark,
        "task": tuning.manifest.task,
        "model": key,
        "label": suite.models[key].label,
        "seed": tuning.base.seed,
        "config": params,
        "provenance": provenance(tuning.manifest.digest, code, params, command),
        "space": [axis.model_dump(mode="json") for axis in tuning.space.values()],
        "left_out": tuning.left_out,
        "fingerprint": recipes.fingerprint(suite, tuning.base),
    }


@dataclass
class _Scores:
    """Scores of the finalists over the tuning seeds."""

    tuning: _Tuning
    finalists: Sequence[Trial]
    again: Sequence[Trial]
    """Their trainings on the seeds after the first, a finalist after the other."""
    by_seed: dict[int, dict[int, float]] = field(init=False)
    """Number of a finalist -> seed -> score of the trainings that finished."""

    def __post_init__(self) -> None:
        first, *more = self.tuning.seeds
        trainings = iter(self.again)
        self.by_seed = {
            finalist.number: {
                seed: trial.result["values"][self.tuning.score]
                for seed, trial in ((first, finalist), *((seed, next(trainings)) for seed in more))
                if trial.status == "finished"
            }
            for finalist in self.finalists
        }

    def seeds_of(self, trial: Trial) -> dict[int, float]:
        """Return the scores of a finalist by seed, or of a trial that repeats one."""
        return self.by_seed.get(trial.number if trial.duplicate_of is None else trial.duplicate_of, {})

    def of(self, trial: Trial) -> float | None:
        """Return the score that a trial's recipe is chosen by: of a finalist, the mean over the seeds.

        Of several finalists, those that diverged on more seeds than others have none, nor have the other trials.
        """
        if not self.finalists:
            return trial.result["values"].get(self.tuning.score)
        scores = self.seeds_of(trial)
        most = max(map(len, self.by_seed.values()))
        return statistics.fmean(scores.values()) if len(scores) == most else None


def _outcome(tuning: _Tuning, trials: Sequence[Trial], scores: _Scores) -> Record:
    """Return the keys of the record that the trials decide."""
    sign = 1 if tuning.direction == "maximize" else -1
    chosen = [(sign * score, trial) for trial in trials if (score := scores.of(trial)) is not None]
    best = max(chosen, key=lambda pair: pair[0], default=(0.0, None))[1]  # of equal scores, the first
    if best is None:
        remedy = "lower the learning rates of tune.space and of train, and run `python -m ablations tune` again"
        return {
            "status": "failed",
            "reason": f"not tuned: all {len(trials)} trials diverged ({trials[0].reason}); {remedy}",
            "trial": None,
            "chosen": {},
            "environment": trials[0].result["environment"],
        }
    return {
        "trial": best.number,
        "chosen": best.setting,
        "scores": {tuning.score: scores.of(best)},
        "environment": best.result["environment"],
    }


def _row(tuning: _Tuning, trial: Trial, best: Trial | None, scores: _Scores) -> Record:
    """Return a trial as a row of the table.

    `val.*` is what recipes are chosen by, `first` the score of the first seed, `best` the best of those so far;
    `seed N` are a finalist's scores on the other seeds.
    """
    head = {name: getattr(trial, name) for name in recipes.COLUMNS}
    values = {k: str(v) if isinstance(v, list) else v for k, v in trial.setting.items()}
    first = trial.result["values"].get(tuning.score)
    row = head | values | {tuning.score: scores.of(trial), "first": first}
    row["best"] = None if best is None else best.result["values"][tuning.score]
    of_seeds = scores.seeds_of(trial)
    return row | {f"seed {seed}": of_seeds.get(seed) for seed in tuning.seeds[1:] if scores.finalists}


@dataclass
class _Progress:
    """One bar of trials on a terminal; elsewhere a line per epoch, and one per trial that has ended."""

    tuning: _Tuning

    def __post_init__(self) -> None:
        self._bars = progress_bar()
        self._total = self.tuning.suite.tune.trials
        self._task = self._bars.add_task(f"{self.tuning.key}: tuning", total=self._total, last="")

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def on_message(self, name: str, row: Record) -> None:
        """Take the row of an epoch of a trial."""
        epoch = f"epoch {row['epoch']}/{self.tuning.base.train.epochs}"
        self._say(f"{name} {epoch}: {scores_text(row)}", last=f"{name} {epoch}")

    def expect(self, trainings: int) -> None:
        """Add the trainings of the finalists."""
        self._finalists = trainings
        self._bars.update(self._task, total=self._total + trainings)

    def end(self, trial: Trial) -> None:
        """Take a trial that has ended."""
        self._end(f"trial {trial.number} of {self._total}", trial)

    def end_finalist(self, trial: Trial) -> None:
        """Take a training of a finalist that has ended."""
        self._end(f"finalist, training {trial.number} of {self._finalists}", trial)

    def _end(self, name: str, trial: Trial) -> None:
        values = ", ".join(f"{path}={value}" for path, value in trial.setting.items())
        outcome = trial.reason or scores_text(trial.result["values"])
        self._say(f"{self.tuning.key} {name}: {values}: {outcome}", last=outcome)
        self._bars.update(self._task, advance=1)

    def _say(self, line: str, last: str) -> None:
        if self._bars.disable:
            print(line, flush=True)
        else:
            self._bars.update(self._task, last=last)

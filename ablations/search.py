"""Optuna searches in synchronous batches: the same trials with any number of workers, killed or not.

A search draws a batch of settings from a seed and the results of earlier batches, and tells Optuna their results in the
order of drawing. From one rung (an epoch) to the next, a trial is one job, which resumes from the checkpoint of the job
before; pruning is decided when the whole batch has reached the rung. So nothing depends on which job ends first.
Optuna's storage is written, and never read for a decision: a restarted driver draws the same trials again and finds
their results by fingerprint.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from sunets.core.config import AxisConfig, ConfigError, derive_seed
from sunets.core.executor import Job, Plan
from sunets.core.lock import locked
from sunets.core.names import printable
from sunets.core.trials import startup_trials

optuna.logging.set_verbosity(optuna.logging.WARNING)

STORAGE = "OPTUNA_STORAGE"
"""Environment variable with the address of the storage that Optuna's studies are written to."""
REDRAWS = 50
"""Draws after which a finite space is enumerated for a new setting."""
ENUMERATED = 2000
"""Most settings that are enumerated."""
STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
Direction = Literal["minimize", "maximize"]
Setting = dict[str, Any]
"""Dotted path of the configuration -> value, of one trial."""
Status = Literal["finished", "failed", "pruned"]


@dataclass(frozen=True)
class Search:
    """One Optuna study: space, number of trials, objectives."""

    name: str
    """Name of the study; contains a fingerprint of all that determines its trials."""
    objectives: Mapping[str, Direction]
    """Names in the job's `values`; pruning needs a single one."""
    space: Mapping[str, AxisConfig]
    """Dotted path -> values or range to draw from."""
    fixed: Setting
    """Further values, the same in every setting."""
    trials: int
    batch: int
    """Settings drawn at once."""
    seed: int
    rungs: tuple[int, ...] = ()
    """Epochs at which trials below the median of those that reached them are stopped."""
    first: tuple[Setting, ...] = ()
    """Settings of the first trials, instead of drawn ones."""


@dataclass(frozen=True)
class Trial:
    """One trial that has ended."""

    study: str
    number: int
    """Index in the study."""
    setting: Setting
    status: Status
    reason: str | None
    result: dict[str, Any]
    """What its last job returned."""
    duplicate_of: int | None = None
    """The earlier trial of the same setting, whose result it takes, where the space had no new setting left."""


MakeJob = Callable[[int, Setting, int | None], Job]
"""Number of the trial, its setting and the epoch to train to (None: to the end, and score it) -> the job.

The job returns status (finished or failed), reason, values (objective -> value, at a rung too) and curve (pairs of
epoch and value of a single objective).
"""


def search(
    spec: Search,
    storage: BaseStorage,
    make_job: MakeJob,
    identity: Callable[[Setting], str],
    on_end: Callable[[Trial], None] = lambda trial: None,
) -> Plan[list[Trial]]:
    """Draw, run and prune the trials of a search.

    Args:
        spec: the search.
        storage: where the study is written.
        make_job: the job of a trial up to a rung.
        identity: equal for settings that are the same training; raises ConfigError for an impossible one.
        on_end: receives each trial when its batch has ended.
    """
    study = _Study(storage, spec.name, spec.objectives, {p: _distribution(axis) for p, axis in spec.space.items()})
    (first, direction), *_ = spec.objectives.items()
    sign = 1 if direction == "maximize" else -1
    identity = _remembered(identity)
    reached: dict[int, list[float]] = {rung: [] for rung in spec.rungs}
    seen: dict[str, int] = {}
    done: list[Trial] = []
    while (start := len(done)) < spec.trials:
        drawn = _draw(spec, study.told, min(spec.batch, spec.trials - start), identity, seen)
        batch = dict(enumerate((setting for setting, _ in drawn), start))
        copies = {number: original for number, (_, original) in zip(batch, drawn, strict=True) if original is not None}
        ended: dict[int, Trial] = {}
        for rung in (*spec.rungs, None):
            alive = [number for number in batch if number not in ended and number not in copies]
            results = dict(zip(alive, (yield [make_job(n, batch[n], rung) for n in alive]), strict=True))
            for number, result in results.items():
                if rung is None or result["status"] == "failed":
                    ended[number] = Trial(spec.name, number, batch[number], result["status"], result["reason"], result)
            if rung is not None:
                scores = {n: sign * r["values"][first] for n, r in results.items() if n not in ended}
                reached[rung] += scores.values()
                for number in (n for n, score in scores.items() if score < statistics.median(reached[rung])):
                    reason = f"below the median of {len(reached[rung])} trials after epoch {rung}"
                    ended[number] = Trial(spec.name, number, batch[number], "pruned", reason, results[number])
        for number in batch:
            if (original := copies.get(number)) is not None:
                ended[number] = replace(
                    ended.get(original) or done[original], number=number, setting=batch[number], duplicate_of=original
                )
            study.tell(ended[number])
            on_end(ended[number])
            done.append(ended[number])
    return done


def repeat(
    name: str,
    objectives: Mapping[str, Direction],
    settings: Sequence[Setting],
    storage: BaseStorage,
    make_job: MakeJob,
    on_end: Callable[[Trial], None] = lambda trial: None,
) -> list[Plan[Trial]]:
    """Run given settings to the end, each as a separate plan."""
    values: dict[str, dict[Any, None]] = {}
    for path, value in (item for setting in settings for item in setting.items()):
        values.setdefault(path, {})[_choice(value)] = None
    study = _Study(storage, name, objectives, {path: CategoricalDistribution([*v]) for path, v in values.items()})
    ended: dict[int, Trial] = {}

    def plan(number: int) -> Plan[Trial]:
        (result,) = yield [make_job(number, settings[number], None)]
        ended[number] = Trial(name, number, settings[number], result["status"], result["reason"], result)
        on_end(ended[number])
        while (following := ended.get(len(study.told))) is not None:
            study.tell(following)
        return ended[number]

    return [plan(number) for number in range(len(settings))]


# Drawing -------------------------------------------------------------------------------------------------------------


def _choice(value: Any) -> bool | int | float | str | None:
    """Return a value as Optuna's storages keep it: a list becomes text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _distribution(axis: AxisConfig) -> BaseDistribution:
    if axis.values:
        return CategoricalDistribution([_choice(value) for value in axis.values])
    assert axis.low is not None
    assert axis.high is not None
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _remembered(identity: Callable[[Setting], str]) -> Callable[[Setting], str]:
    """Check each setting once: where a space is small, the same ones are drawn again and again."""
    answers: dict[str, str | ConfigError] = {}

    def remembered(setting: Setting) -> str:
        written = json.dumps(setting, sort_keys=True)
        if written not in answers:
            try:
                answers[written] = identity(setting)
            except ConfigError as error:
                answers[written] = error
        if isinstance(answer := answers[written], ConfigError):
            raise answer.with_traceback(None)
        return answer

    return remembered


def _ranked(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as the sampler ranks it: a diverged one last, behind pruned ones, rather than not at all."""
    if trial.state != TrialState.FAIL:
        return trial
    # Without intermediate values, whatever it reached before it diverged.
    return create_trial(state=TrialState.PRUNED, params=trial.params, distributions=trial.distributions)


def _draw(
    spec: Search, told: Sequence[FrozenTrial], size: int, identity: Callable[[Setting], str], seen: dict[str, int]
) -> list[tuple[Setting, int | None]]:
    """Draw the settings of a batch, each with the earlier trial that has the same (None: it is new, and now in `seen`).

    Raises:
        ConfigError: no setting of the space can be trained.
    """
    seed = derive_seed(spec.seed, len(told)) % (1 << 32)
    # The sampler draws near the best tenth of the trials; while diverged ones are among them, draws are random.
    learns = 10 * sum(trial.state != TrialState.FAIL for trial in told) >= len(told)
    startup = startup_trials(spec.trials) if learns else len(told) + 1
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
    study = optuna.create_study(directions=list(spec.objectives.values()), sampler=sampler)
    study.add_trials([_ranked(trial) for trial in told])
    space = {path: _distribution(axis) for path, axis in spec.space.items()}
    values = {path: {_choice(value): value for value in axis.values} for path, axis in spec.space.items()}

    def settings() -> Iterator[Setting]:
        """Yield draws; then, of a finite space, its settings in random order."""
        for _ in range(REDRAWS):
            trial = study.ask(space)
            yield spec.fixed | {path: values[path].get(drawn, drawn) for path, drawn in trial.params.items()}
            study.tell(trial, state=TrialState.FAIL)  # the sampler ignores it
        sides = [axis.values for axis in spec.space.values()]
        if all(sides):
            every = list(itertools.islice(itertools.product(*sides), ENUMERATED))
            for choice in random.Random(seed).sample(every, len(every)):
                yield spec.fixed | dict(zip(spec.space, choice, strict=True))

    batch: list[tuple[Setting, int | None]] = []
    for number in range(len(told), len(told) + size):
        copy: tuple[Setting, int] | None = None
        fault: ConfigError | None = None
        given = [spec.fixed | setting for setting in spec.first[number : number + 1]]
        for setting in itertools.chain(given, settings()):
            try:
                key = identity(setting)
            except ConfigError as error:
                fault = error
                continue
            if key not in seen:
                seen[key] = number
                batch.append((setting, None))
                break
            copy = copy or (setting, seen[key])
        else:
            if copy is None:
                assert fault is not None
                raise fault
            batch.append(copy)
    return batch


# Storage -------------------------------------------------------------------------------------------------------------


@dataclass
class _Study:
    """The trials told so far, and the study in a storage that shows them."""

    storage: BaseStorage
    name: str
    objectives: Mapping[str, Direction]
    space: Mapping[str, BaseDistribution]
    told: list[FrozenTrial] = field(default_factory=list)

    def tell(self, trial: Trial) -> None:
        """Add the next trial."""
        result, complete = trial.result, trial.status == "finished"
        told = {"setting": trial.setting, "reason": trial.reason, "duplicate_of": trial.duplicate_of}
        self.told.append(
            create_trial(
                state=STATES[trial.status],
                values=[result["values"][name] for name in self.objectives] if complete else None,
                params={path: _choice(value) for path, value in trial.setting.items() if path in self.space},
                distributions={path: self.space[path] for path in trial.setting if path in self.space},
                intermediate_values=dict(result["curve"]) if len(self.objectives) == 1 else {},
                user_attrs={key: value for key, value in told.items() if value is not None},
            )
        )
        study = optuna.create_study(
            storage=self.storage, study_name=self.name, directions=[*self.objectives.values()], load_if_exists=True
        )
        stored = [(t.params, t.state, t.values) for t in study.get_trials(deepcopy=False)]
        if any(a != (b.params, b.state, b.values) for a, b in zip(stored, self.told, strict=False)):
            # Trials of a machine whose results differ.
            optuna.delete_study(study_name=self.name, storage=self.storage)
            study = optuna.create_study(
                storage=self.storage, study_name=self.name, directions=[*self.objectives.values()]
            )
            stored = []
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            study.set_metric_names([*self.objectives])
        study.add_trials(self.told[len(stored) :])


@contextlib.contextmanager
def open_storage(address: str, name: str) -> Iterator[BaseStorage]:
    """Connect to a storage, as the only driver of a study.

    Args:
        address: path of a journal file; a database URL such as postgresql+psycopg://user@host/name; or grpc://host:port
            of Optuna's proxy in front of such a database.
        name: of the study; another driver of the same name is refused (behind a proxy, one of this checkout).

    Raises:
        ValueError: the address cannot be used, the journal is damaged, or another driver runs the study; without the
            password of the address.
    """
    scheme, separator, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    busy = ValueError(f"{name}: another driver runs this study; wait for it to end, or stop it")
    with contextlib.ExitStack() as stack:
        storage: BaseStorage
        if not separator:
            stack.enter_context(locked(Path(f"{address}.{derive_seed(name)}.lock"), 0, busy))
            storage = _open_journal(address)
        elif scheme == "grpc" and host and port.isdecimal():
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                storage = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
            stack.callback(storage.close)
            try:
                storage.wait_server_ready(timeout=10)
            except ConnectionError:
                raise ValueError(f"OPTUNA_STORAGE: no answer from {address} within 10 s") from None
        elif scheme.startswith("postgresql"):
            import sqlalchemy

            try:
                database = RDBStorage(address, engine_kwargs={"poolclass": sqlalchemy.pool.NullPool})
                held = stack.enter_context(database.engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
            except (sqlalchemy.exc.DatabaseError, sqlalchemy.exc.ArgumentError, ImportError) as error:
                text = str(error).splitlines()[0].replace(address, f"{scheme}://...")
                raise ValueError(f"OPTUNA_STORAGE: cannot use {scheme}://...: {text}") from None
            if not held.scalar(sqlalchemy.text(f"SELECT pg_try_advisory_lock({derive_seed(name)})")):
                raise busy
            storage = optuna.storages.get_storage(database)
        else:
            raise ValueError(
                f"OPTUNA_STORAGE: {scheme}://...: the path of a journal file, postgresql+psycopg://user@host/name or "
                "grpc://host:port is expected"
            )
        yield storage


def _open_journal(address: str) -> JournalStorage:
    """Open a journal, or create it.

    Raises:
        ValueError: it is damaged, or no regular file.
    """
    path, remedy = Path(address), "run again: the trials' results are kept apart from it"
    if path.exists() and not path.is_file():  # a FIFO would be waited for
        raise ValueError(f"{address}: not a regular file; move it away and {remedy}")
    path.touch()
    lock = _JournalLock(address)
    try:
        lock.acquire()
        lock.release()
        for line in path.read_bytes().splitlines():  # Optuna fails on a damaged last line only when more follow
            json.loads(line)
        return JournalStorage(JournalFileBackend(address, lock_obj=lock))
    except OSError:
        raise
    except Exception as error:  # Optuna fails on a damaged line in as many ways as there are damages
        fault = f"{type(error).__name__}: {printable(str(error)[:200])}"
        raise ValueError(f"{address}: damaged ({fault}); delete it and {remedy}") from None


class _JournalLock(JournalFileOpenLock):
    """Lock of a journal file that the kernel frees when its holder is killed.

    Optuna's locks are files that a killed process leaves behind. Taking this one also cuts off a last line that a
    killed writer did not finish, which no reader could parse.
    """

    def __init__(self, journal: str) -> None:
        self._journal, self._lock = Path(journal), FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        with self._journal.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()

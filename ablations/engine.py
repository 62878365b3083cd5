"""Trials over one Optuna storage, by any number of processes and machines, killed at any moment.

A `Phase` is one Optuna study. It either has *cells*, settings that are each run once in any order, or a *space*, from
which a sampler draws a number of trials. `run_phases` is the launcher: it starts worker processes, listens to them, and
gives back the trials of dead ones, its own and those of launchers that have died, here or elsewhere.

What makes it exact:

* A worker takes a cell, or the next draw, by writing a running trial with its name on it, in one step, and looking
  again: where two have taken the same, the trial with the lower number keeps it.
* A sampler is made anew for every trial, seeded by the phase's seed and the number of trials that have finished, and
  an exclusive phase runs one trial at a time, whoever asks: what trial n is depends on the n before it, on nothing
  else. A trial that was killed counts as never started.
* A trial that fails (an error, a score that is no number) has finished: it stays, with its reason. A trial whose
  process died is repeated; the launcher that saw it die fails it for good after `MAX_CRASHES` times.

Whether a worker is dead is decided by its launcher's process on the same host, and by a heartbeat that has stopped on
others; only its change is looked at, so that clocks may differ. Nothing here knows what a trial does.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

optuna.logging.set_verbosity(optuna.logging.WARNING)

MAX_CRASHES = 3
"""Deaths of its process, seen by a living launcher, after which a trial has failed: most likely out of memory."""
BEAT_SECONDS = 20.0
"""Time between two heartbeats of a worker."""
DEAD_SECONDS = 120.0
"""Silence after which a worker on another host is dead."""
POLL_SECONDS = 1.0
"""Longest time that a launcher waits before it looks at the storage again."""

RUNNING, FAIL = TrialState.RUNNING, TrialState.FAIL
Setting = dict[str, Any]
"""Dotted path of the configuration -> value, of one trial."""
Status = Literal["finished", "failed", "pruned"]


@dataclass(frozen=True)
class Phase:
    """One Optuna study: what is tried, and how."""

    name: str
    """Name of the Optuna study; carries a fingerprint of all that decides its trials."""
    directions: tuple[Literal["minimize", "maximize"], ...]
    """One an objective."""
    cells: tuple[Setting, ...] | None = None
    """Settings to run once each; None draws them from `space`."""
    space: Mapping[str, tuple[BaseDistribution, tuple[Any, ...]]] = field(default_factory=dict)
    """Dotted path -> what to draw, and the values that a categorical one's choices stand for."""
    fixed: Setting = field(default_factory=dict)
    """What every drawn setting has besides."""
    trials: int = 0
    """Settings to draw."""
    seed: int = 0
    """Seed of the sampler."""
    exclusive: bool = True
    """One trial at a time (reproducible), or as many as there are workers (not reproducible); for a space."""
    pruning: bool = False
    """Stop trials that fall behind the median of the finished ones; for one objective."""
    startup: int = 5
    """Trials drawn at random before the sampler learns, and finished before any is pruned."""

    @property
    def size(self) -> int:
        """Trials in all."""
        return self.trials if self.cells is None else len(self.cells)


@dataclass(frozen=True)
class Outcome:
    """What an objective returns."""

    values: tuple[float, ...] | None
    """One value an objective of the phase; None for a pruned or failed trial."""
    content: dict[str, Any]
    """Plain values to keep with the trial."""
    pruned: bool = False
    failure: str | None = None
    """Why the trial failed, if it did; an exception fails it too, and keeps nothing."""


class Objective(Protocol):
    """Runs one trial in a worker process; an exception is the trial's failure."""

    def __call__(self, phase: str, setting: Setting, report: Callable[[int, float | None, Any], bool]) -> Outcome:
        """Run it.

        Args:
            phase: name of the phase.
            setting: what to try.
            report: takes step, the value to prune by and anything to tell the launcher; True asks to stop.
        """


@dataclass(frozen=True)
class Finished:
    """One trial that counts."""

    phase: str
    number: int
    """Place in the phase, from 0: of the cell, or in the order of drawing. Killed trials have none."""
    setting: Setting
    status: Status
    reason: str | None
    values: tuple[float, ...] | None
    content: dict[str, Any]
    """What the objective kept; empty where it raised an exception or its process died."""


@dataclass(frozen=True)
class Event:
    """What a worker tells its launcher."""

    kind: Literal["started", "reported", "ended"]
    phase: str
    number: int
    """Of the trial; of a phase that is not exclusive, what it is likely to be in the end."""
    setting: Setting
    message: Any = None
    """Of `report`; of an end, the `Finished`."""


class TrialTakenError(RuntimeError):
    """The trial was given to another worker while this one was silent."""


# Storage -------------------------------------------------------------------------------------------------------------


def open_storage(address: str, *, prepared: bool = False) -> BaseStorage:
    """Connect to a storage.

    Args:
        address: path of a journal file; a database URL such as postgresql+psycopg://user@host/name; or grpc://host:port
            of Optuna's proxy in front of such a database.
        prepared: a database has its tables, of this version of Optuna: a launcher has connected before.

    Raises:
        ValueError: the address cannot be used; says why, without the password that it may hold.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(address, lock_obj=_JournalLock(address)))
    if scheme == "grpc":
        host, _, port = rest.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError("OPTUNA_STORAGE: grpc://host:port is expected")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
        try:
            proxy.wait_server_ready(timeout=30)
        except ConnectionError:
            raise ValueError(f"OPTUNA_STORAGE: no answer from grpc://{host}:{port} within 30 s") from None
        return proxy
    if scheme.startswith("sqlite"):  # it has no row locks
        raise ValueError("OPTUNA_STORAGE: SQLite gives one trial to two workers; name a journal file or PostgreSQL")
    import sqlalchemy

    last: Exception | None = None
    for attempt in range(5):  # two machines that create the tables at once disturb each other
        try:
            # No pool: workers would hold idle connections for hours, and meet dead ones after.
            storage = RDBStorage(
                address,
                engine_kwargs={"poolclass": sqlalchemy.pool.NullPool},
                skip_compatibility_check=prepared,
                skip_table_creation=prepared,
            )
            return optuna.storages.get_storage(storage)
        except (sqlalchemy.exc.DatabaseError, sqlalchemy.exc.ArgumentError, ImportError) as error:
            last = error
            if not isinstance(error, sqlalchemy.exc.DatabaseError):
                break
            time.sleep(0.5 * (attempt + 1))
    text = str(last).splitlines()[0].replace(address, f"{scheme}://...")
    raise ValueError(f"OPTUNA_STORAGE: cannot open {scheme}://...: {text}") from None


def close_storage(storage: BaseStorage) -> None:
    """Close the connections to a database or proxy; a journal has none."""
    storage.remove_session()
    if isinstance(storage, optuna.storages.GrpcStorageProxy):
        storage.close()


class _JournalLock(JournalFileOpenLock):
    """Lock of a journal file that the kernel frees when its holder is killed.

    Optuna's own are files that a killed process leaves behind, and that others wait for. The next holder also cuts off
    a last line that a killed writer did not finish, which no reader could pass.
    """

    def __init__(self, journal: str) -> None:
        self._journal, self._lock = Path(journal), FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        with self._journal.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
                start = max(0, end - (1 << 22))
                file.seek(start)
                file.truncate(start + file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()


def distribution(values: Sequence[Any], low: float | None, high: float | None, log: bool) -> BaseDistribution:
    """What Optuna draws from for an axis: one of its values, or a number of its range.

    Lists become text, because a database gives them back as something else.
    """
    if values:
        return CategoricalDistribution([_choice(value) for value in values])
    assert low is not None
    assert high is not None
    return FloatDistribution(low, high, log=log)


def _choice(value: Any) -> bool | int | float | str | None:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


# State of a phase ----------------------------------------------------------------------------------------------------


def _key(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


class _Claim(NamedTuple):
    """A trial that a worker has taken."""

    trial: Trial
    number: int
    setting: Setting


class _Study:
    """One phase in one storage."""

    def __init__(self, phase: Phase, storage: BaseStorage) -> None:
        self.phase, self.storage = phase, storage
        pruners = optuna.pruners
        self.study = optuna.create_study(
            storage=storage,
            study_name=phase.name,
            directions=list(phase.directions),
            load_if_exists=True,
            pruner=pruners.MedianPruner(n_startup_trials=phase.startup) if phase.pruning else pruners.NopPruner(),
        )
        self.id = storage.get_study_id_from_name(phase.name)

    def trials(self) -> list[FrozenTrial]:
        return self.storage.get_all_trials(self.id, deepcopy=False)

    def trial_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.id, number)

    @staticmethod
    def counts(trial: FrozenTrial) -> bool:
        """Whether the trial has finished in its own right: not killed, not a duplicate."""
        if not trial.state.is_finished() or "end" not in trial.user_attrs:
            return False
        # A worker that was given up too early may have written its result just before its trial was failed.
        return (trial.state == FAIL) == (trial.user_attrs["end"]["status"] == "failed")

    def finished(self) -> list[Finished]:
        """The trials that count, in order."""
        counted = [t for t in self.trials() if self.counts(t)]
        if self.phase.cells is not None:
            first: dict[str, FrozenTrial] = {}
            for trial in counted:
                first.setdefault(trial.user_attrs["key"], trial)
            places = [(n, first[_key(c)]) for n, c in enumerate(self.phase.cells) if _key(c) in first]
        else:
            places = list(enumerate(counted[: self.phase.trials]))
        found = []
        for number, trial in places:
            end = trial.user_attrs["end"]
            values = None if end["values"] is None else tuple(end["values"])
            found.append(
                Finished(
                    self.phase.name, number, trial.user_attrs["setting"], end["status"], end["reason"], values,
                    end["content"],
                )
            )  # fmt: skip
        return found

    def complete(self) -> bool:
        return len(self.finished()) >= self.phase.size

    def open_cells(self, trials: Sequence[FrozenTrial]) -> list[tuple[int, Setting]]:
        """The cells that nobody has run or runs, with their places."""
        taken = {t.user_attrs["key"] for t in trials if t.state == RUNNING or self.counts(t)}
        return [(n, cell) for n, cell in enumerate(self.phase.cells or ()) if _key(cell) not in taken]

    def claimable(self) -> int:
        """How many workers could take a trial now."""
        trials = self.trials()
        if self.phase.cells is not None:
            return len(self.open_cells(trials))
        running = sum(t.state == RUNNING for t in trials)
        left = self.phase.trials - sum(map(self.counts, trials))
        return min(1, left) * (not running) if self.phase.exclusive else max(0, left - running)

    # Taking a trial.

    def claim(self, worker: dict[str, Any]) -> _Claim | None:
        """Take the next trial, or None if there is none to take now."""
        return self._claim_cell(worker) if self.phase.cells is not None else self._draw(worker)

    def _start(self, attributes: dict[str, Any], params: dict[str, Any] | None = None) -> tuple[int, int]:
        """Write a running trial, its owner with it, in one step; returns id and number.

        Between Optuna's own `ask` and a note of the owner, a kill would leave a trial that nobody can judge.
        """
        template = optuna.trial.create_trial(
            state=RUNNING,
            params=params or {},
            distributions={path: CategoricalDistribution(self.choices[path]) for path in params or {}},
            user_attrs=attributes,
        )
        trial_id = self.storage.create_new_trial(self.id, template)
        return trial_id, self.storage.get_trial(trial_id).number

    @cached_property
    def choices(self) -> dict[str, list[Any]]:
        """Every value of each path of the cells."""
        found: dict[str, list[Any]] = {}
        for path, value in ((p, _choice(v)) for cell in self.phase.cells or () for p, v in cell.items()):
            if value not in found.setdefault(path, []):
                found[path].append(value)
        return found

    def _claim_cell(self, worker: dict[str, Any]) -> _Claim | None:
        while cells := self.open_cells(self.trials()):
            place, cell = cells[0]
            key = _key(cell)
            attributes = {"key": key, "setting": cell, "worker": worker}
            trial_id, number = self._start(attributes, {path: _choice(value) for path, value in cell.items()})
            earlier = (t for t in self.trials() if t.number < number and t.user_attrs["key"] == key)
            if not any(t.state == RUNNING or self.counts(t) for t in earlier):
                return _Claim(Trial(self.study, trial_id), place, cell)
            self.storage.set_trial_state_values(trial_id, FAIL)
        return None

    def _draw(self, worker: dict[str, Any]) -> _Claim | None:
        phase = self.phase
        trials = self.trials()
        before = sum(map(self.counts, trials))
        running = sum(t.state == RUNNING for t in trials)
        if before >= phase.trials or (running and phase.exclusive) or before + running >= phase.trials:
            return None
        trial_id, number = self._start({"slot": before, "worker": worker})
        earlier = [t for t in self.trials() if t.number < number]
        counted, others = sum(map(self.counts, earlier)), sum(t.state == RUNNING for t in earlier)
        # Somebody else may have drawn since we looked, or have ended a trial: who draws next looks again.
        if (others or counted != before) if phase.exclusive else counted + others >= phase.trials:
            self.storage.set_trial_state_values(trial_id, FAIL)
            return None
        self.study.sampler = optuna.samplers.TPESampler(
            # Workers that share a search and draw at the same moment must not draw the same.
            seed=_sampler_seed(phase.seed, before) if phase.exclusive else None,
            n_startup_trials=phase.startup,
            multivariate=True,
            constant_liar=True,
        )
        trial = Trial(self.study, trial_id)
        setting = dict(phase.fixed)
        for path, (drawn, values) in phase.space.items():
            if isinstance(drawn, CategoricalDistribution):
                setting[path] = values[drawn.choices.index(trial.suggest_categorical(path, drawn.choices))]
            elif isinstance(drawn, FloatDistribution):
                setting[path] = trial.suggest_float(path, drawn.low, drawn.high, log=drawn.log)
        trial.set_user_attr("setting", setting)
        return _Claim(trial, counted + others, setting)

    # Ending a trial.

    def end(self, number: int, end: Finished) -> None:
        """Write a trial's result.

        First all of it in one step, then the state: who finds a dead worker's trial between the two completes it.

        Raises:
            TrialTakenError: somebody has given the trial away meanwhile.
        """
        content = {"status": end.status, "reason": end.reason, "values": end.values, "content": end.content}
        try:
            self.storage.set_trial_user_attr(self.trial_id(number), "end", content)
        except UpdateFinishedTrialError:
            raise TrialTakenError(f"trial {number} of {self.phase.name} was given to another worker") from None
        self._settle(number, end.status, end.values)

    def _settle(self, number: int, status: Status, values: Sequence[float] | None) -> None:
        state = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": FAIL}[status]
        with contextlib.suppress(UpdateFinishedTrialError):  # somebody else did so at the same moment
            self.study.tell(number, values, state=state, skip_if_finished=True)

    def give_back(self, trial: FrozenTrial, crash: str | None = None) -> None:
        """Fail the trial of a dead worker so that it is repeated; or complete it, if its result is there.

        Args:
            trial: running, by nobody.
            crash: how its process died, if its launcher lives and saw it.
        """
        trial_id = self.trial_id(trial.number)
        with contextlib.suppress(UpdateFinishedTrialError, TrialTakenError):  # others may see the same death
            if "end" in trial.user_attrs:
                self._settle(trial.number, trial.user_attrs["end"]["status"], trial.user_attrs["end"]["values"])
                return
            if crash is not None:
                self.storage.set_trial_user_attr(trial_id, "crash", crash)
                same = "key" if self.phase.cells is not None else "slot"
                crashes = 1 + sum(
                    "crash" in t.user_attrs and t.user_attrs.get(same) == trial.user_attrs.get(same)
                    for t in self.trials()
                    if t.state == FAIL
                )
                if crashes >= MAX_CRASHES and "setting" in trial.user_attrs:
                    reason = f"its process died {crashes} times, at last by {crash} (out of memory?)"
                    setting = trial.user_attrs["setting"]
                    self.end(trial.number, Finished(self.phase.name, -1, setting, "failed", reason, None, {}))
                    return
            self.storage.set_trial_state_values(trial_id, FAIL)


def _sampler_seed(seed: int, trial: int) -> int:
    """Seed of the sampler that draws one trial; the same for all phases, so that their first draws are the same."""
    return (seed * 1_000_003 + trial) % (1 << 32)


# Workers -------------------------------------------------------------------------------------------------------------


def _host() -> str:
    """This host, as far as process numbers mean the same: another container or a reboot is another host."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(str(Path(path).readlink()) if path.endswith("pid") else Path(path).read_text().strip())
    return "|".join(parts)


def _born(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since the boot; None if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # not Linux: the number must do
        os.kill(pid, 0)
    except OSError:
        return None
    return 0


class _Vigil(threading.Thread):
    """Writes a worker's heartbeat, and ends the worker when its launcher is gone."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address, self.trial_id = address, None

    trial_id: int | None

    def run(self) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        storage, beat = None, 0
        while not wait([parent.sentinel], timeout=BEAT_SECONDS):
            if (trial_id := self.trial_id) is not None:
                with contextlib.suppress(Exception):  # the trial has just ended, or the storage is away for a while
                    storage = storage or open_storage(self.address, prepared=True)
                    storage.set_trial_user_attr(trial_id, "beat", beat := beat + 1)
        os.kill(os.getpid(), signal.SIGKILL)  # no trace of this process may outlive its launcher


def _work(phase: Phase, objective: Objective, address: str, launcher: dict[str, Any], launcher_end: Connection) -> None:
    """A worker process: run trials of the phase until there is none to take."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides
    vigil = _Vigil(address)
    vigil.start()
    study = _Study(phase, open_storage(address, prepared=True))
    while (claimed := study.claim({"launcher": launcher, "pid": os.getpid()})) is not None:
        vigil.trial_id = study.trial_id(claimed.trial.number)
        _tell(launcher_end, Event("started", phase.name, claimed.number, claimed.setting))
        end = _run_trial(study, claimed, objective, launcher_end)
        with contextlib.suppress(TrialTakenError):
            study.end(claimed.trial.number, end)
            _tell(launcher_end, Event("ended", phase.name, claimed.number, claimed.setting, end))
        vigil.trial_id = None


def _tell(launcher: Connection, event: Event) -> None:
    try:
        launcher.send(event)
    except OSError:  # it is gone; raised in a trial, this would become the trial's failure
        os.kill(os.getpid(), signal.SIGKILL)


def _run_trial(study: _Study, claimed: _Claim, objective: Objective, launcher: Connection) -> Finished:
    phase, (trial, number, setting) = study.phase, claimed

    def report(step: int, value: float | None, message: Any) -> bool:
        _tell(launcher, Event("reported", phase.name, number, setting, message))
        if not phase.pruning or value is None:
            return False
        trial.report(value, step)
        return trial.should_prune()

    status: Status = "finished"
    reason = None
    outcome = Outcome(None, {})
    try:
        outcome = objective(phase.name, setting, report)
        if outcome.failure is not None:
            status, reason = "failed", outcome.failure
        elif outcome.pruned:
            status, reason = "pruned", "below the median of the finished trials"
        elif outcome.values is None or not all(map(math.isfinite, outcome.values)):
            status, reason = "failed", "the score is not a number"
    except Exception as error:  # whatever a trial dies of is its result
        status, reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())
    values = outcome.values if status == "finished" else None
    return Finished(phase.name, number, setting, status, reason, values, outcome.content)


# Launcher ------------------------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    phase: str


def run_phases(
    phases: Sequence[Phase],
    objective: Objective,
    address: str,
    *,
    workers: int = 1,
    preload: Sequence[str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
    dead_seconds: float = DEAD_SECONDS,
) -> list[list[Finished]]:
    """Run phases until every trial has finished, here or on another machine that shares the storage.

    Args:
        phases: independent of each other; of exclusive ones, up to `workers` run at once.
        objective: picklable; runs a trial in a worker process.
        address: see `open_storage`.
        workers: processes at a time.
        preload: modules that the workers share, imported once.
        on_event: is told what this launcher's workers do.
        dead_seconds: silence after which a worker on another host is dead.

    Returns:
        The trials of each phase.

    Raises:
        RuntimeError: workers die before they can take a trial.
    """
    storage = open_storage(address)
    studies = {phase.name: _Study(phase, storage) for phase in phases}
    # forkserver: imports are paid once, and unlike fork it starts without torch's threads or a CUDA context.
    context = multiprocessing.get_context("forkserver")
    database = ["sqlalchemy.dialects.postgresql.psycopg", "alembic.command"] if "://" in address else []
    context.set_forkserver_preload([__name__, *database, *preload])
    me = {"host": _host(), "pid": os.getpid(), "born": _born(os.getpid())}
    pool: list[_Worker] = []
    silent: dict[tuple[str, int], tuple[Any, float]] = {}
    useless = 0

    def drain(worker: _Worker) -> None:
        with contextlib.suppress(EOFError, OSError):  # a killed worker's last message may be cut
            while worker.connection.poll():
                on_event(worker.connection.recv())

    def reap() -> None:
        nonlocal useless
        for worker in [w for w in pool if not w.process.is_alive()]:
            drain(worker)
            worker.process.join()
            pool.remove(worker)
            worker.connection.close()
            code = worker.process.exitcode or 0
            died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            study = studies[worker.phase]
            mine = [
                t for t in study.trials() if t.user_attrs.get("worker") == {"launcher": me, "pid": worker.process.pid}
            ]
            for trial in mine:
                if trial.state == RUNNING:
                    study.give_back(trial, crash=died)
            useless = 0 if mine or not code else useless + 1
            if useless == MAX_CRASHES:
                raise RuntimeError(f"workers end with {died} before they take a trial; their messages are above")

    def recover(study: _Study) -> None:
        """Give back the trials of launchers that have died."""
        for trial in study.trials():
            if trial.state != RUNNING:
                continue
            owner = trial.user_attrs.get("worker")
            if owner is not None and owner["launcher"]["host"] == me["host"]:
                dead = owner["launcher"]["born"] != _born(owner["launcher"]["pid"])
            else:
                place, sign = (study.phase.name, trial.number), (owner, trial.user_attrs.get("beat"))
                if silent.get(place, (None, 0.0))[0] != sign:
                    silent[place] = (sign, time.monotonic())
                dead = time.monotonic() - silent[place][1] > dead_seconds
            if dead:
                study.give_back(trial)

    def start(study: _Study) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(study.phase, objective, address, me, theirs))
        process.start()
        theirs.close()
        pool.append(_Worker(process, ours, study.phase.name))

    try:
        while True:
            reap()
            for study in studies.values():
                recover(study)
            open_studies = [s for s in studies.values() if not s.complete()]
            if not open_studies and not pool:
                return [study.finished() for study in studies.values()]
            for study in _shared_out(open_studies, workers, pool):
                start(study)
            ready = wait([*(w.process.sentinel for w in pool), *(w.connection for w in pool)], timeout=POLL_SECONDS)
            for worker in pool:
                if worker.connection in ready:
                    drain(worker)
    finally:  # reached with workers only on an error or an interrupt
        for worker in pool:
            worker.process.kill()
            worker.process.join()
        for study in studies.values():
            for trial in study.trials() if pool else ():
                if trial.state == RUNNING and trial.user_attrs.get("worker", {}).get("launcher") == me:
                    study.give_back(trial)
        close_storage(storage)


def _shared_out(studies: Sequence[_Study], workers: int, pool: Sequence[_Worker]) -> Iterator[_Study]:
    """The phases that free workers should turn to: each in turn, as long as one has a trial to take."""
    busy = {worker.phase for worker in pool}
    places = {
        s.phase.name: 0 if s.phase.cells is None and s.phase.exclusive and s.phase.name in busy else s.claimable()
        for s in studies
    }
    free = workers - len(pool)
    while free > 0 and any(places.values()):
        for study in studies:
            if free > 0 and places[study.phase.name] > 0:
                places[study.phase.name] -= 1
                free -= 1
                yield study

"""Trials over one storage: real processes, killed at any moment, on a journal, PostgreSQL and Optuna's proxy.

Run as a program, this file is one launcher: `python tests/test_ablations_engine.py STORAGE LOG OUT KIND WORKERS`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from ablations.engine import Finished, Outcome, Phase, Setting, close_storage, distribution, open_storage
from optuna.trial import TrialState

from ablations import engine

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve()
# A process has one fork server, and the first launch decides what it has imported: tests of whole studies follow.
run_phases = functools.partial(engine.run_phases, preload=() if __name__ == "__main__" else ("ablations.study",))


@dataclass(frozen=True)
class Fast:
    """A few sleeping epochs; the score is a function of the setting, as a training's is. Logs every start."""

    log: Path
    epochs: int = 3
    seconds: float = 0.03

    def __call__(self, phase: str, setting: Setting, report: Callable[[int, float | None, Any], bool]) -> Outcome:
        with self.log.open("a") as file:
            file.write(json.dumps([phase, setting, os.getpid()]) + "\n")
        x = float(setting.get("train.lr", 0.01))
        noise = int(hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:4], 16) / 65536
        score = 1 - (math.log10(x) + 2) ** 2 / 4 + 0.1 * noise
        for epoch in range(1, self.epochs + 1):
            time.sleep(self.seconds)
            if report(epoch, score * epoch / self.epochs, {"epoch": epoch}):
                return Outcome(None, {"epochs": epoch}, pruned=True)
        values = (score, float(setting["width"])) if phase.startswith("search") else (score,)
        return Outcome(values, {"epochs": self.epochs})


def fragile(phase: str, setting: Setting, report: Callable[[int, float | None, Any], bool]) -> Outcome:
    """Fails, or kills its own process, as the setting says."""
    report(1, 0.5, None)
    marker = Path(setting["marker"])
    match setting["do"]:
        case "raise":
            raise ZeroDivisionError("no\nsuch luck")
        case "nan":
            return Outcome((math.nan,), {})
        case "die once" if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
    return Outcome((1.0,), {"kept": [1, None, "a"]})


RATES: dict[str, Any] = {
    "train.lr": (distribution((), 1e-4, 1.0, log=True), ()),
    "train.betas": (distribution(([0.9, 0.99], [0.9, 0.999]), None, None, log=False), ([0.9, 0.99], [0.9, 0.999])),
}


def phases(kind: str) -> list[Phase]:
    match kind:
        case "grid":
            cells = tuple({"model.unet_depth": d, "seed": s} for d in (1, [2, 2, 1], None) for s in range(4))
            return [Phase("grid", ("maximize",), cells=cells)]
        case "tuned":
            arms = [{"model.unet_depth": d, "seed": 100} for d in (1, 2)]
            return [
                Phase(f"arm{i}", ("maximize",), space=RATES, fixed=arm, trials=7, pruning=True, startup=3)
                for i, arm in enumerate(arms)
            ]
        case "search":
            widths = (4, 8, 16)
            space = {"width": (distribution(widths, None, None, log=False), widths), **RATES}
            return [Phase("search", ("maximize", "minimize"), space=space, trials=9, startup=3)]
    return [Phase(kind, ("maximize",), cells=tuple({"seed": s} for s in range(int(kind.removeprefix("cells ")))))]


def launch(address: str, log: Path, kind: str, workers: int, **options: Any) -> list[list[Finished]]:
    return run_phases(phases(kind), Fast(log), address, workers=workers, **options)


def plain(results: list[list[Finished]]) -> Any:
    return json.loads(json.dumps([[asdict(trial) for trial in phase] for phase in results]))


def starts(log: Path) -> list[Any]:
    return [json.loads(line)[:2] for line in log.read_text().splitlines()] if log.exists() else []


def program(address: str, log: Path, out: Path, kind: str, workers: int = 1) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, str(HERE), address, str(log), str(out), kind, str(workers)]
    return subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return str(tmp_path / "studies" / "a.journal")


# Killed at any moment ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grid", "tuned", "search"])
def test_a_study_killed_again_and_again_equals_one_left_alone(kind: str, journal: str, tmp_path: Path) -> None:
    expected = plain(launch(str(tmp_path / "other.journal"), tmp_path / "other.log", kind, 1))
    assert [len(phase) for phase in expected] == [phase.size for phase in phases(kind)]
    log, out = tmp_path / "log", tmp_path / "out"
    # While the first trials run, in the middle of one, just as one ends, before the first claim of a rerun.
    for started, delay in ((1, 0.01), (2, 0.05), (3, 0.1), (0, 0.4)):
        wanted = len(starts(log)) + started
        with program(journal, log, out, kind) as process:
            until(lambda n=wanted: len(starts(log)) >= n)  # type: ignore[misc]
            time.sleep(delay)
            process.kill()
    assert not out.exists(), "the study ended before it was killed; the test shows nothing"
    with program(journal, log, out, kind) as process:
        assert process.wait(timeout=120) == 0
    assert json.loads(out.read_text()) == expected
    assert len(starts(log)) > sum(map(len, expected)), "no kill hit a trial"


def test_a_finished_study_is_not_run_again(journal: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = launch(journal, log, "grid", 2)
    assert sorted(map(str, starts(log))) == sorted(str(["grid", cell]) for cell in phases("grid")[0].cells or ())
    before = log.read_text()
    assert launch(journal, log, "grid", 2) == first
    assert log.read_text() == before


def test_arms_at_once_equal_arms_in_turn(journal: str, tmp_path: Path) -> None:
    in_turn = launch(str(tmp_path / "b.journal"), tmp_path / "log", "tuned", 1)
    at_once = launch(journal, tmp_path / "log", "tuned", 2)
    assert at_once == in_turn
    assert {trial.status for arm in at_once for trial in arm} >= {"finished", "pruned"}
    assert [t.setting["train.lr"] for t in at_once[0][:3]] == [t.setting["train.lr"] for t in at_once[1][:3]]
    assert isinstance(at_once[0][0].setting["train.betas"], list)


def test_a_shared_search_has_exactly_its_trials(journal: str, tmp_path: Path) -> None:
    phase = Phase("shared", ("maximize",), space=RATES, trials=7, exclusive=False)
    (trials,) = run_phases([phase], Fast(tmp_path / "log", seconds=0.005), journal, workers=3)
    assert [t.number for t in trials] == list(range(7))
    assert len({t.setting["train.lr"] for t in trials}) == 7


# Dead workers, failed trials -----------------------------------------------------------------------------------------


def test_failures_are_rows_and_the_study_goes_on(journal: str, tmp_path: Path) -> None:
    deeds = ("raise", "nan", "die once", "die", "nothing")
    cells = tuple({"do": do, "marker": str(tmp_path / "marker")} for do in deeds)
    told: list[str] = []
    (trials,) = run_phases(
        [Phase("fragile", ("maximize",), cells=cells)], fragile, journal, workers=2,
        on_event=lambda event: told.append(f"{event.kind} {event.setting['do']}"),
    )  # fmt: skip
    assert [t.setting["do"] for t in trials] == list(deeds)
    assert [t.status for t in trials] == ["failed", "failed", "finished", "failed", "finished"]
    assert trials[0].reason == "ZeroDivisionError: no such luck"
    assert trials[1].reason == "the score is not a number"
    assert trials[3].reason == "its process died 3 times, at last by SIGKILL (out of memory?)"
    assert trials[4].values == (1.0,)
    assert trials[4].content == {"kept": [1, None, "a"]}
    assert told.count("started die") == engine.MAX_CRASHES
    assert "ended nothing" in told


class Unloadable:
    """Cannot be received by a worker."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_a_worker_killed_between_result_and_state_loses_nothing(
    journal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (phase,) = phases("cells 2")
    study = engine._Study(phase, open_storage(journal))
    for status, values in (("pruned", None), ("finished", (3.0,))):
        claimed = study.claim({"launcher": {"host": engine._host(), "pid": 2**22 + 1, "born": 1}, "pid": 2})
        assert claimed is not None
        monkeypatch.setattr(study, "_settle", lambda *_: None)  # here the kill
        study.end(claimed.trial.number, Finished("", 0, claimed.setting, status, "why", values, {"kept": 1}))  # type: ignore[arg-type]
    (trials,) = run_phases([phase], Fast(tmp_path / "log"), journal)
    assert [(t.status, t.reason, t.values, t.content) for t in trials] == [
        ("pruned", "why", None, {"kept": 1}), ("finished", "why", (3.0,), {"kept": 1}),
    ]  # fmt: skip
    assert starts(tmp_path / "log") == []


def test_workers_that_cannot_start_are_an_error(journal: str) -> None:
    with pytest.raises(RuntimeError, match="workers end with exit code 1 before they take a trial"):
        run_phases([Phase("p", ("maximize",), cells=({"a": 1},))], Unloadable(), journal)  # type: ignore[arg-type]


def test_a_silent_worker_elsewhere_loses_its_trial_and_a_beating_one_keeps_it(journal: str, tmp_path: Path) -> None:
    phase = Phase("grid", ("maximize",), cells=({"seed": 0}, {"seed": 1}))
    study = engine._Study(phase, open_storage(journal))
    owner = {"launcher": {"host": "elsewhere", "pid": 1, "born": 1}, "pid": 2}
    silent, beating = study.claim(owner), study.claim(owner)
    assert silent is not None
    assert beating is not None
    over = threading.Event()

    def beat() -> None:
        for number in range(15):
            time.sleep(0.2)
            beating.trial.set_user_attr("beat", number)
        assert not over.is_set()
        study.end(beating.trial.number, Finished("grid", 1, beating.setting, "finished", None, (7.0,), {}))

    thread = threading.Thread(target=beat)
    thread.start()
    (trials,) = run_phases([phase], Fast(tmp_path / "log"), journal, dead_seconds=1.0)
    over.set()
    thread.join()
    assert starts(tmp_path / "log") == [["grid", {"seed": 0}]]
    assert trials[1].values == (7.0,)
    with pytest.raises(engine.TrialTakenError):  # the silent worker wakes up
        study.end(silent.trial.number, Finished("grid", 0, silent.setting, "finished", None, (9.0,), {}))


def test_a_line_that_a_killed_writer_left_unfinished_is_cut(journal: str, tmp_path: Path) -> None:
    first = launch(journal, tmp_path / "log", "grid", 1)
    with Path(journal).open("ab") as file:
        file.write(b'{"op_code": 4, "study')
    open_storage(journal).create_new_study([optuna.study.StudyDirection.MINIMIZE], "another")
    assert launch(journal, tmp_path / "log", "grid", 1) == first


# Several launchers on one storage ------------------------------------------------------------------------------------


def shared_by_two(address: str, tmp_path: Path, kind: str = "cells 16") -> None:
    """Two launchers with two workers each share a study; one is killed with all its workers."""
    (phase,) = phases(kind)
    cells = phase.cells or ()
    log, outs = tmp_path / "log", [tmp_path / "out0", tmp_path / "out1"]
    with program(address, log, outs[0], kind, 2) as first, program(address, log, outs[1], kind, 2) as second:
        try:
            until(lambda: log.exists() and len({json.loads(text)[2] for text in log.read_text().splitlines()}) >= 4)
        finally:
            first.kill()
        assert second.wait(timeout=120) == 0
    assert not outs[0].exists()
    (trials,) = json.loads(outs[1].read_text())
    assert [t["setting"] for t in trials] == list(cells)
    assert {t["status"] for t in trials} == {"finished"}
    storage = open_storage(address)
    done = storage.get_all_trials(storage.get_study_id_from_name(phase.name), states=(TrialState.COMPLETE,))
    close_storage(storage)
    assert len(done) == len(cells), "a trial is lost or there twice"
    assert len(starts(log)) <= len(cells) + 2, "only the dead launcher's two trials are run again"


@pytest.mark.slow
def test_two_launchers_share_a_journal(journal: str, tmp_path: Path) -> None:
    shared_by_two(journal, tmp_path)


@pytest.mark.slow
def test_two_launchers_share_postgresql(postgres: str, tmp_path: Path) -> None:
    shared_by_two(postgres, tmp_path)


@pytest.mark.slow
def test_two_launchers_share_a_proxy(postgres: str, free_port: int, tmp_path: Path) -> None:
    code = (
        "import optuna, warnings; warnings.simplefilter('ignore')\n"
        f"optuna.storages.run_grpc_proxy_server(optuna.storages.get_storage({postgres!r}), port={free_port})"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        shared_by_two(f"grpc://localhost:{free_port}", tmp_path, "cells 17")
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("grpc://nohost", "grpc://host:port is expected"),
        ("sqlite:///a.db", "SQLite gives one trial to two workers"),
        ("nosuchdb://user:secret@host/name", "cannot open nosuchdb"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_storage(address)
    assert "secret" not in str(caught.value)


def main(address: str, log: str, out: str, kind: str, workers: str) -> None:
    results = run_phases(
        phases(kind), Fast(Path(log), seconds=0.1 if kind.startswith("cells") else 0.03), address, workers=int(workers)
    )
    temporary = Path(out).with_suffix(".tmp")
    temporary.write_text(json.dumps(plain(results)))
    temporary.replace(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

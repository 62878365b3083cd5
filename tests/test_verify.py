"""`verify`: what is printed and refused where results do not belong to the code and the parameters beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkout import replace_once, run

from sunets.core.provenance import code_hash
from sunets.core.record import parameters_hash, read_json, write_json
from sunets.verify import code_of_records, record_files


def test_counts_and_timings_of_the_zoo_are_judged_too(tmp_path: Path) -> None:
    made = {"kind": "cost", "provenance": {"code_hash": code_hash("sunets.profiling.cost")}}
    write_json(tmp_path / "zoo/records.json", [made])
    of_counts = code_hash("sunets.profiling.cost")  # does not cover the timing
    timed = {"kind": "speed", "provenance": {"code_hash": of_counts, "git_commit": "abc"}}
    write_json(tmp_path / "zoo/speed.json", [timed])
    assert code_of_records(record_files(tmp_path)) == {"zoo": {"cost": None, "speed": "abc"}}


def test_code_of_records_names_the_commit_of_other_code(tmp_path: Path) -> None:
    for benchmark, code in (("same", code_hash("sunets.stages.train")), ("old", "0" * 16)):
        source = {"code_hash": code, "git_commit": "abc"}
        write_json(tmp_path / benchmark / "records" / "train" / "net.json", [{"kind": "train", "provenance": source}])
        write_json(tmp_path / benchmark / "records" / "timing" / "net.json", [{"seconds": 1}])
    assert code_of_records(record_files(tmp_path)) == {"same": {"train": None}, "old": {"train": "abc"}}


@pytest.fixture(scope="module")
def fresh(finished: Path) -> Path:
    """The finished clone without what a fresh clone of its results lacks."""
    for folder in ("data", "outputs", ".work", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(finished / folder)
    return finished


@pytest.fixture
def root(fresh: Path) -> Iterator[Path]:
    """The finished clone; whatever a test edits in it is put back."""
    kept = {p: p.read_bytes() for p in fresh.rglob("*") if p.is_file() and ".git" not in p.parts}
    yield fresh
    for path in [p for p in fresh.rglob("*") if p.is_file() and ".git" not in p.parts]:
        if path not in kept:
            path.unlink()
    for path, content in kept.items():
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


RECORD = "results/smoke/records/train/sunet_tiny.json"


@pytest.mark.slow
def test_a_fresh_clone_of_finished_results_passes(root: Path) -> None:
    assert (
        run(root, "sunets", "verify")
        == "smoke: records of trial, cost, evaluate, speed, train, tune were made by this code\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "code", "words"),
    [
        ("params.yaml", "benchmark:", "benchmark: twice\nbenchmark:", 2, ["params.yaml", "'benchmark'", "twice"]),
        ("dvc.yaml", "stages:", "stages: [", 1, ["`dvc status` fails", "dvc.yaml"]),
        ("sunets/report/figures.py", '"""Figures', '"""The figures', 1, ["would run report"]),
        (
            "sunets/training/fit.py",
            "LOCK_SECONDS = 10.0",
            "LOCK_SECONDS = 11.0",
            1,
            ["would run tune@", "train@", "other code"],
        ),
        ("params.yaml", "lr: 0.003", "lr: 0.004", 1, ["would run tune@", "train.lr 0.003 / 0.004"]),
        ("dvc.yaml", "-m sunets report", "-m sunets  report", 1, ["would run report (changed command)"]),
        (RECORD, '"train.epochs": 2', '"train.epochs": 3', 1, [RECORD, "config_hash"]),
        (RECORD, '"status": "finished"', '"status": "failed"', 1, [f"would run train@sunet_tiny ({RECORD} modified)"]),
        (RECORD, "[", "", 2, [RECORD, "not valid JSON"]),
    ],
    ids=[
        "duplicate key",
        "dvc.yaml",
        "report code",
        "training code",
        "parameter",
        "command",
        "record",
        "status",
        "JSON",
    ],
)
def test_each_fault_is_refused(
    root: Path, call: Callable[..., str], file: str, old: str, new: str, code: int, words: list[str]
) -> None:
    replace_once(root / file, old, new)
    if file == "sunets/training/fit.py":  # its hash is that of the code that runs
        output = run(root, "sunets", "verify", code=code)
    else:
        output = call(root, "verify", code=code)
    assert "Traceback" not in output
    assert [word for word in words if word not in output] == []
    assert sum(line.startswith("error: ") for line in output.splitlines()) in (1, 2)


@pytest.mark.slow
def test_another_structure_is_refused(root: Path, call: Callable[..., str]) -> None:
    """Records state what the name decides, and so does the comparison."""
    records = read_json(root / RECORD)
    assert records[0]["params"]["model.unet_depth"] == [2, 2, 1]
    for value in (None, [2, 2, 2]):
        params = records[0]["params"] | {"model.unet_depth": value}
        records[0]["params"], records[0]["provenance"]["config_hash"] = params, parameters_hash(params)
        write_json(root / RECORD, records)
        output = call(root, "verify", "--allow-earlier-code", code=1)
        assert f"model.unet_depth is {value} in the record and [2, 2, 1] in params.yaml" in output


@pytest.mark.slow
def test_an_edited_trial_is_refused(root: Path, call: Callable[..., str]) -> None:
    path = "results/smoke/records/ablations/unet_depth.json"
    replace_once(root / path, '"train.momentum": 0.9', '"train.momentum": 0.8')
    assert f"{path}: model sunet_tiny" in call(root, "verify", "--allow-earlier-code", code=1)


@pytest.mark.slow
def test_a_missing_record_is_refused(root: Path, call: Callable[..., str]) -> None:
    (root / RECORD).unlink()
    assert f"would run train@sunet_tiny ({RECORD} deleted)" in call(root, "verify", code=1)


@pytest.mark.slow
def test_without_records_there_is_nothing_to_vouch_for(root: Path, call: Callable[..., str]) -> None:
    for path in (root / "results" / "smoke").rglob("*.json"):
        path.unlink()
    shutil.rmtree(root / "results" / "smoke" / "records")
    assert "results/ holds no records of it" in call(root, "verify", code=1)


@pytest.mark.slow
def test_another_benchmark_of_earlier_code_is_listed(root: Path, call: Callable[..., str]) -> None:
    records = read_json(root / RECORD)
    for record in records:
        record["benchmark"] = "older"
        record["provenance"] |= {"code_hash": "0" * 16, "git_commit": "abcdef"}
    write_json(root / "results" / "older" / "records" / "train" / "net.json", records)
    assert "older: records of train were made by other code, of commit abcdef" in call(root, "verify")
    shutil.rmtree(root / "results" / "older")


@pytest.mark.slow
def test_records_of_a_model_that_was_removed_say_what_to_do(root: Path, call: Callable[..., str]) -> None:
    records = read_json(root / RECORD)
    for record in records:
        record["model"] = "removed"
    write_json(root / RECORD.replace("sunet_tiny", "removed"), records)
    assert "no such model in params.yaml; delete its records" in call(root, "verify", code=1)


@pytest.mark.slow
def test_earlier_code_may_be_allowed_but_nothing_else(root: Path, call: Callable[..., str]) -> None:
    replace_once(root / "sunets/training/fit.py", "LOCK_SECONDS = 10.0", "LOCK_SECONDS = 11.0")
    assert "other code" in run(root, "sunets", "verify", "--allow-earlier-code")
    replace_once(root / "dvc.yaml", "stages:", "stages: [")
    assert "`dvc status` fails" in call(root, "verify", "--allow-earlier-code", code=1)


@pytest.mark.slow
def test_code_of_another_checkout_is_refused(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other clone"
    (other / "sunets").mkdir(parents=True)
    (other / "sunets" / "__init__.py").touch()
    output = run(other, "sunets", "list", code=2, env={"PYTHONSAFEPATH": "1", "PYTHONPATH": str(root)})
    assert str(other) in output
    assert str(root) in output

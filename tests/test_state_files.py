"""A damaged file that the stages left is read, or one line says which file it is and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_report import MODELS, fabricate, make_suite

from sunets.core.config import Suite
from sunets.core.failure import line_for_user
from sunets.core.history import read_history, write_history
from sunets.core.names import PREPARED
from sunets.core.record import (
    RecordError,
    read_arrays,
    read_json,
    read_records,
    read_rows,
    read_values,
    write_arrays,
    write_values,
)
from sunets.report import build
from sunets.report.explain import explain
from sunets.report.page import index_page
from sunets.report.records import find_records, load_records
from sunets.tracking.sync import _models
from sunets.verify import code_of_records, record_files

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Suite]:
    root = tmp_path_factory.mktemp("made")
    suite = make_suite(dict(list(MODELS.items())[:2]), SEEDS)
    fabricate(root, suite)
    tables = root / "results/toy/tables"
    tables.mkdir()
    for table in build._tables(suite, load_records(suite, root)):
        build.write.write(table, tables)
    (root / "results/toy/README.md").write_text("# Toy\n", encoding="utf-8")
    return root, suite


def read_all(root: Path, suite: Suite) -> None:
    """Everything that reads what the stages left."""
    results = root / "results"
    for records in (load_records(suite, root), find_records(results, "toy")):
        for table in (records.evaluated, records.cost, records.speed, records.timing, records.history):
            assert isinstance(table, pd.DataFrame)
        for model in records.labels:
            records.confusions(model)
            records.effective_field(model)
    build._tables(suite, load_records(suite, root))
    build._examples(suite, load_records(suite, root), root)
    code_of_records(record_files(results))
    _models(results / "toy")
    index_page(results)
    explain(results, "toy", "accuracy", "sunet_tiny", "score.miou")


FILES = (
    "results/toy/records/train/sunet_tiny.json", "results/toy/records/evaluate/sunet_tiny.json",
    "results/toy/records/cost/sunet_tiny.json", "results/toy/records/timing/sunet_tiny.json",
    "results/toy/records/speed.json", "results/toy/records/history/sunet_tiny.csv",
    "results/toy/records/confusion/sunet_tiny.npz", "results/toy/records/cost/sunet_tiny.npz",
    "results/toy/tables/accuracy.csv", f"{PREPARED}/toy/manifest.json", f"{PREPARED}/toy/splits/test.csv",
    f"{PREPARED}/toy/images/t0.png", f"{PREPARED}/toy/masks/t0.png", "outputs/toy/predictions/sunet_tiny/t0.png",
)  # fmt: skip


def bytes_of(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(damage(path.read_bytes())) and None


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": bytes_of(lambda old: b""),
    "cut": bytes_of(lambda old: old[: len(old) * 2 // 3]),
    "cut early": bytes_of(lambda old: old[:9]),
    "zeros": bytes_of(lambda old: bytes(len(old))),
    "zeros within": bytes_of(lambda old: old[:300] + bytes(64) + old[364:]),
    "null": bytes_of(lambda old: b"null"),
    "list": bytes_of(lambda old: b"[]"),
    "mapping": bytes_of(lambda old: b"{}"),
    "list of null": bytes_of(lambda old: b"[null, 1]"),
    "text": bytes_of(lambda old: b'"abc"'),
    "not UTF-8": bytes_of(lambda old: b'["\xff"]'),
    "deep": bytes_of(lambda old: b"[" * 100_000),
    "garbage": bytes_of(lambda old: b"a,b\n1,2,3\n"),
    "quote": bytes_of(lambda old: old.replace(b",", b',"', 1)),
    "names swapped": bytes_of(lambda old: old.replace(b"seed", b"deed").replace(b"model", b"motel")),
    "numbers as text": bytes_of(lambda old: old.replace(b"0.", b"zero.")),
    "directory": directory,
    "FIFO": fifo,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_read_or_named(made: tuple[Path, Suite], file: str, damage: str, tmp_path: Path) -> None:
    root, suite = made
    if damage == "FIFO" and "/records/" not in file and "/tables/" not in file:
        pytest.skip("the data's files are looked at by `prepare` and every training")
    for folder in ("results", "data", "outputs"):
        shutil.copytree(root / folder, tmp_path / folder)
    DAMAGES[damage](tmp_path / file)
    error = None
    try:
        read_all(tmp_path, suite)
    except Exception as caught:
        error = caught
    if error is not None:
        line = line_for_user(error)
        assert line is not None, repr(error)  # a traceback
        named = Path(file).name in line or "no records of any model" in line
        assert named or "has another size" in line, line
        assert "\n" not in line
        assert len(line) < 1000


@pytest.mark.slow
def test_the_whole_is_read(made: tuple[Path, Suite]) -> None:
    read_all(*made)


def record(**fields: Any) -> dict[str, Any]:
    return {
        "kind": "train", "task": "segmentation", "status": "finished", "reason": None, "benchmark": "b", "model": "m",
        "label": "M", "seed": 0, "variant": None, "params": {}, "scores": {"score.miou": 0.5},
        "cost": {"cost.uncounted_operators": "cat"},
        "environment": {},
        "provenance": {"git_commit": None, "git_dirty": None, "data_digest": None, "code_hash": "c",
                       "config_hash": "d", "command": "python"},
    } | fields  # fmt: skip


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([record(), record(status="done")], "record 1: status: Input should be 'finished', 'failed' or 'pruned'"),
        ([record(seed="0")], "record 0: seed: Input should be a valid integer"),
        ([record(scores={"score.miou": "0.5"})], "record 0: scores.score.miou: Input should be a valid number"),
        ([record(params=[])], "record 0: params: Input should be a valid dictionary"),
        ([record(provenance={})], "record 0 lacks provenance.git_commit, provenance.git_dirty"),
        ([record(), {"kind": "train"}], "record 1 lacks status, reason, benchmark, task"),
        ([record(kind="evaluate")], "record 0 is of kind evaluate, not train"),
        ([1], "record 0: Input should be a valid dictionary"),
        ("text", "record 0: Input should be a valid dictionary"),
    ],
)
def test_a_record_that_is_none_is_named_with_its_fault(content: Any, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RecordError) as caught:
        read_records(path, "train")
    assert str(caught.value).startswith(f"{path}: {fault}")
    assert str(caught.value).endswith("; delete it and run its stage again")


def test_good_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(record()), encoding="utf-8")
    assert read_records(path) == read_records(path, "train") == [record()]
    path.write_text("[]", encoding="utf-8")
    assert read_records(path) == []
    path = tmp_path / "h.csv"
    path.write_text("\n", encoding="utf-8")  # of trainings that all diverged in the first epoch
    assert read_history(path, "seed") == []
    np.savez(tmp_path / "none.npz")
    assert read_arrays(tmp_path / "none.npz") == {}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("seed,epoch\n0,1\n0,2,3\n", "line 3 has 3 cells instead of 2"),
        ("seed,epoch,train.loss\n0,1,abc\n", "line 2: train.loss is no number"),
        ("seed,epoch,train.loss\n0,,0.1\n", "line 2 lacks seed or epoch"),
        ("seed,train.loss\n0,0.1\n", "no column epoch"),
        ('seed,epoch\n0,"1\n', "no readable table"),
    ],
)
def test_a_history_that_is_none_is_named_with_its_line(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=fault):
        read_history(path, "seed")


@pytest.mark.parametrize(
    ("history", "records", "key"),
    [("history/m.csv", "train/m.json", "seed"), ("tune/m.history.csv", "tune/m.json", "number")],
)
def test_an_edited_history_contradicts_its_records(history: str, records: str, key: Any, tmp_path: Path) -> None:
    path = tmp_path / history
    write_history(path, [{key: 0, "epoch": 1, "val.miou": 0.4}], [record()], tmp_path / records)
    assert read_history(path, key)[0]["val.miou"] == 0.4
    path.write_text(path.read_text().replace("0.4", "0.9"))
    with pytest.raises(RecordError, match=rf"{path.name}: not the table of \S+/{records}: one of the two"):
        read_history(path, key)
    (tmp_path / records).write_text(json.dumps([record()]))  # of an earlier version
    assert read_history(path, key)[0]["val.miou"] == 0.9


def test_an_archive_that_holds_code_is_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    np.savez(tmp_path / "a.npz", a=np.array([Code()], dtype=object))
    with pytest.raises(RecordError, match=r"a\.npz: no readable archive of arrays"):
        read_arrays(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_values_of_another_file_are_refused(tmp_path: Path) -> None:
    """As a copy of another job's result under this one's name would be."""
    write_values(tmp_path / "one.npz", {"miou": 0.5, "matrix": np.eye(2)})
    assert read_values(tmp_path / "one.npz")["miou"] == 0.5
    shutil.copy(tmp_path / "one.npz", tmp_path / "two.npz")
    with pytest.raises(RecordError, match=r"two\.npz.*the values of another file, one"):
        read_values(tmp_path / "two.npz")
    write_arrays(tmp_path / "three.npz", {"matrix": np.eye(2)})
    with pytest.raises(RecordError, match=r"three\.npz.*no plain values in it"):
        read_values(tmp_path / "three.npz")


@pytest.mark.parametrize("read", [read_json, read_records, read_rows, read_arrays])
def test_an_absent_file_says_so(read: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent: no such file; run its stage first"):
        read(tmp_path / "absent")


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"seed0.single_scale": np.zeros((24, 5))}, "no confusion matrices"),
        ({"seed0.single_scale": np.zeros((24, 5, 5))}, "no confusion matrices"),  # no counts
        ({"seed0.single_scale": np.zeros((23, 5, 5), np.uint32)}, "not one per image"),
        ({"seed0.single_scale": np.zeros((24, 5, 4), np.uint32)}, "not one per image"),
    ],
)
def test_matrices_that_are_none_are_refused(made: Any, arrays: dict[str, Any], fault: str, tmp_path: Path) -> None:
    root, suite = made
    shutil.copytree(root / "results", tmp_path / "results")
    path = tmp_path / "results/toy/records/confusion/sunet_tiny.npz"
    np.savez(path, images=np.array([f"t{i}" for i in range(24)]), **arrays)
    with pytest.raises(RecordError, match=rf"sunet_tiny\.npz: .*{fault}"):
        load_records(suite, tmp_path).confusions("sunet_tiny")


def test_predictions_of_two_sizes_are_refused(made: tuple[Path, Suite], tmp_path: Path) -> None:
    root, suite = made
    for folder in ("results", "data", "outputs"):
        shutil.copytree(root / folder, tmp_path / folder)
    Image.new("L", (20, 30)).save(tmp_path / "outputs/toy/predictions/unet_small/t0.png")
    with pytest.raises(RecordError, match=r"predictions of t0: .* has another size"):
        build._examples(suite, load_records(suite, tmp_path), tmp_path)

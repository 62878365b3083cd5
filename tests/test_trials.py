"""Records of trials and the tables beside them: an edit of one of the two is noticed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from sunets.core.record import Record, RecordError, read_json, write_json, write_rows
from sunets.core.trials import check_chosen, check_trials, trial_row

TUNED: Record = {
    "status": "finished",
    "trial": 1,
    "chosen": {"train.lr": 0.02, "train.zero_init_head": True},
    "scores": {"val.miou": 0.41},
    "space": [{"path": "train.lr"}, {"path": "train.zero_init_head"}],
}
ROWS = [
    {"number": n, "status": "finished", "train.lr": lr, "train.zero_init_head": n == 1, "val.miou": score}
    for n, lr, score in [(0, 0.01, 0.3), (1, 0.02, 0.41), (2, 0.03, 0.4)]
]
TRIALS: list[Record] = [
    {"number": n, "phase": "grid", "status": "finished", "reason": None, "model": "net", "seed": n, "split": "test",
     "reference": True, "arm": {"model.unet_depth": [1, n]}, "tuned": {}, "scores": {"score.miou": 0.5 + n / 7},
     "cost": {"cost.gmacs": 1e-7}}
    for n in range(2)
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"chosen": {"train.lr": 0.03, "train.zero_init_head": True}}, {}),
        ({"chosen": {"train.lr": 0.02}}, {}),
        ({"trial": 2}, {}),
        ({"scores": {"val.miou": 0.91}}, {}),
        ({"space": [{}]}, {}),
        ({}, {"val.miou": 0.46}),
    ],
)
def test_a_recipe_that_is_not_that_of_the_best_trial_is_refused(changes: Any, row: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    check_chosen(TUNED, path)  # without a table
    write_rows(tmp_path / "net.csv", ROWS)
    check_chosen(TUNED, path)
    write_rows(tmp_path / "net.csv", [*ROWS[:2], ROWS[2] | row])
    with pytest.raises(RecordError, match=r"net\.json: .* best trial in net\.csv: .* run `.* tune net` again"):
        check_chosen(TUNED | changes, path)


@pytest.mark.parametrize(
    "content", ["number,status\n", "number,val.other\n0,0.5\n", "number,status,val.miou\n1,finished,\n"]
)
def test_a_table_of_trials_without_scores_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "net.csv").write_text(content)
    with pytest.raises(RecordError, match=r"net\.csv: (no column status|one of the two)"):
        check_chosen(TUNED, tmp_path / "net.json")


@pytest.mark.parametrize("file", ["json", "csv"])
def test_an_edited_record_or_row_of_a_study_is_refused(file: str, tmp_path: Path) -> None:
    path = tmp_path / "depth.json"
    write_json(path, TRIALS)
    write_rows(tmp_path / "depth.csv", map(trial_row, TRIALS))
    check_trials(read_json(path), path)
    edited = copy.deepcopy(TRIALS)
    edited[1]["scores"]["score.miou"] += 0.1
    if file == "json":
        write_json(path, edited)
    else:
        write_rows(tmp_path / "depth.csv", map(trial_row, edited))
    with pytest.raises(RecordError, match=r"depth\.json: trial 1 is not that of depth\.csv: .* run depth` again"):
        check_trials(read_json(path), path)

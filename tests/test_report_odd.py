"""Reports of what is rare: labels that markup takes for something else, no scores, networks that agree."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from test_report import MODELS, SEEDS, fabricate, make_suite

from sunets.core.config import Suite
from sunets.core.record import RecordError
from sunets.report import style, tables
from sunets.report.build import build_report
from sunets.report.comparison import joint_note
from sunets.report.explain import explain
from sunets.report.latex import Paper, latex_table
from sunets.report.page import findings, limits
from sunets.report.records import Records, find_records, load_records

ODD = {"sunet_tiny": "3x3 | SUNet <tiny>", "unet_small": "5x5 net", "plain_conv_small": "5x5 net"}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Suite]:
    """Labels that begin with a digit and hold markup; two are equal."""
    root, suite = tmp_path_factory.mktemp("odd"), make_suite(ODD, SEEDS)
    fabricate(root, suite)
    build_report(suite, root)
    return root, suite


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Records:
    root, suite = tmp_path_factory.mktemp("plain"), make_suite(MODELS, SEEDS)
    fabricate(root, suite)
    return load_records(suite, root)


def with_scores(records: Records, score: float | None) -> Records:
    """The same records, whose evaluations all have this mIoU."""
    raw = {
        name: [r | {"scores": r["scores"] | {"score.miou": score}} for r in rows] if "evaluate/" in name else rows
        for name, rows in records.raw.items()
    }
    return dataclasses.replace(records, raw=raw)


def test_no_label_breaks_a_page(odd: tuple[Path, Suite]) -> None:
    page = (odd[0] / "results/toy/README.md").read_text()
    assert "<tiny>" not in page
    assert r"3x3 \| SUNet &lt;tiny> [sunet_tiny]" in page
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_no_label_loses_its_column_or_its_key_in_latex(odd: tuple[Path, Suite]) -> None:
    folder = odd[0] / "results/toy/tables"
    for name in ("accuracy", "cost", "per_class"):
        text = (folder / f"{name}.tex").read_text()
        assert "Model" in text or name == "per_class"
        for key in (r"unet\_small", r"plain\_conv\_small"):
            assert key in text, name


def test_results_of_all_benchmarks_tell_equal_labels_apart(odd: tuple[Path, Suite]) -> None:
    root, suite = odd
    found = find_records(root / "results", "toy")
    assert found.labels == load_records(suite, root).labels
    assert len({*found.labels.values()}) == 3


def test_a_note_is_left_out_with_its_column_alone() -> None:
    view = pd.DataFrame({"Model": ["A"], **{f"saved for a thing {i} (MiB)": ["1.5"] for i in range(12)}})
    text = latex_table(Paper(view), "A caption.", ["A: failed (cannot be built).", "saved for a thing 11: note."], "t")
    assert "cannot be built" in text
    assert "thing 11: note" not in text


def test_a_page_of_many_figures_warns_of_nothing() -> None:
    with warnings.catch_warnings(action="error"), plt.rc_context(style.STYLE):
        for _ in range(25):
            plt.figure()
        plt.close("all")


def test_without_a_labelled_pixel_the_page_says_why_nothing_is_scored(plain: Records) -> None:
    suite = make_suite(MODELS, SEEDS)
    assert findings(suite, with_scores(plain, None)) == [
        "No model has been scored: no pixel of the test split is labelled."
    ]


def test_several_budgets_are_not_called_one(plain: Records) -> None:
    raw = dict(plain.raw)
    raw["train/unet_small.json"] = [
        r | {"params": r["params"] | {"train.epochs": 60}} for r in raw["train/unet_small.json"]
    ]
    assert any("several budgets (9 and 60 epochs)" in s for s in limits(dataclasses.replace(plain, raw=raw)))
    assert any("one budget (9 epochs)" in s for s in limits(plain))


def test_seeds_that_agree_have_an_interval_over_the_images(plain: Records) -> None:
    """As of networks that collapsed to the background."""
    notes = tables.accuracy(with_scores(plain, 0.4), "sunet_tiny").notes
    assert not [note for note in notes if note.startswith("No interval")]


def test_the_note_names_the_networks_whose_interval_is_over_the_seeds_alone(tmp_path: Path) -> None:
    suite = make_suite(MODELS, SEEDS)
    fabricate(tmp_path, suite)
    records = load_records(suite, tmp_path)
    (records.directory / "confusion/unet_small.npz").unlink()
    note = joint_note(records, ["score.miou"])
    assert note.startswith("In brackets: 95 % interval over seeds and test images together")
    assert note.endswith("Over the seeds alone: mIoU of U-Net (small).")
    assert "Over the seeds alone" not in joint_note(load_records(suite, tmp_path), [])


def test_a_tuning_whose_table_is_missing_names_it(plain: Records) -> None:
    raw = dict(plain.raw) | {"tune/unet_small.json": [{"model": "unet_small", "kind": "tune"}]}
    with pytest.raises((RecordError, FileNotFoundError), match=r"tune/unet_small\.csv"):
        dataclasses.replace(plain, raw=raw).trials("unet_small")
    assert plain.trials("unet_small").empty


@pytest.mark.parametrize("heading", ["Verdict", "Wins", "Seeds", "Difference from 3x3 | SUNet <tiny> [sunet_tiny]"])
def test_explain_takes_every_heading_of_the_page(odd: tuple[Path, Suite], heading: str) -> None:
    assert "seed" in explain(odd[0] / "results", "toy", "accuracy", "unet_small", heading)

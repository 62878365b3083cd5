"""What DVC shows: one line per model, matrices in percent, a few numbers; dvc.yaml and templates agree with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from checkout import ROOT
from matplotlib import colormaps
from test_report import MODELS, SEEDS, cost_of, fabricate, make_suite, record, write

from sunets.report import build, images, style
from sunets.report.images import ink
from sunets.report.records import Records, load_records
from sunets.report.summary import curves, summary, write_summary

STORED = {"curves": ["model", "epoch", "train_loss", "validation_score"],
          "confusion": ["model", "true", "predicted", "percent"]}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records]:
    """Results of a toy benchmark, and what DVC shows of them."""
    root, suite = tmp_path_factory.mktemp("site"), make_suite(MODELS, SEEDS)
    fabricate(root, suite)
    records = load_records(suite, root)
    write_summary(records, root / "results/toy")
    return root / "results/toy", records


def test_curves_are_means_over_the_seeds(site: tuple[Path, Records]) -> None:
    out, _ = site
    shown = pd.read_csv(out / "plots/curves.csv")
    assert list(shown.columns) == STORED["curves"]
    assert list(zip(shown.model, shown.epoch, strict=True)) == [(m, e) for m in MODELS.values() for e in range(1, 10)]
    history = pd.read_csv(out / "records/history/unet_small.csv")
    (row,) = shown[(shown.model == "U-Net (small)") & (shown.epoch == 6)].to_dict("records")
    assert row["train_loss"] == pytest.approx(history["train.loss"][history.epoch == 6].mean())
    assert row["validation_score"] == pytest.approx(100 * history["val.miou"][history.epoch == 6].mean())
    assert shown.validation_score[shown.epoch % 3 != 0].isna().all(), "was not scored then"


def test_confusion_is_in_percent_of_the_true_class(site: tuple[Path, Records]) -> None:
    out, records = site
    shown = pd.read_csv(out / "plots/confusion.csv")
    assert list(shown.columns) == STORED["confusion"]
    assert len(shown) == len(MODELS) * 25
    assert shown.groupby(["model", "true"]).percent.sum().to_numpy() == pytest.approx(100)
    counts = sum(matrices.sum(0) for matrices in records.confusions("sunet_tiny")[0])
    (cell,) = shown[
        (shown.model == "SUNet-tiny") & (shown.true == "disc dark") & (shown.predicted == "background")
    ].percent
    assert cell == pytest.approx(100 * counts[2, 0] / counts[2].sum())


def test_summary_has_three_numbers_per_model(site: tuple[Path, Records]) -> None:
    out, records = site
    shown = json.loads((out / "summary.json").read_text())
    assert set(shown) == set(MODELS.values())
    for model, label in MODELS.items():
        assert shown[label].keys() == {"miou_percent", "params_m", "gmacs"}
        assert shown[label]["miou_percent"] == pytest.approx(100 * np.mean([*records.scores(model).values()]))
    assert shown["U-Net (small)"]["params_m"] == cost_of(1)["cost.params_m"]


def test_what_a_model_does_not_have_is_left_out(tmp_path: Path) -> None:
    suite = make_suite({"resnet18": None, "resnet50": None}, (0, 1), data={"name": "synthetic_shapes"})
    rows: list[dict[str, Any]] = [
        record("evaluate", "resnet18", "resnet18", seed=seed, variant="single_scale",
               scores={"score.top1_error_percent": 20.0 + seed, "score.top5_error_percent": 5.0})
        for seed in (0, 1)
    ]  # fmt: skip
    write(tmp_path / "results/toy/records/evaluate/resnet18.json", rows)
    write(tmp_path / "results/toy/records/cost/resnet50.json", [record("cost", "resnet50", "", cost=cost_of(0))])
    records, out = load_records(suite, tmp_path), tmp_path / "results/toy"
    assert summary(records) == {
        "resnet18": {"top1_error_percent": 20.5},
        "resnet50": {"params_m": cost_of(0)["cost.params_m"], "gmacs": cost_of(0)["cost.gmacs"]},
    }
    assert curves(records).empty
    (out / "plots").mkdir()
    (out / "plots/confusion.csv").write_text("of an earlier run")
    assert {path.name for path in write_summary(records, out)} == {"summary.json", "curves.csv"}
    assert not (out / "plots/confusion.csv").exists()


def test_confusion_of_many_classes_is_left_out(site: tuple[Path, Records], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_CLASSES", 4)
    assert images.confusion_shares(site[1]) == ({}, [])


def _plots() -> list[Any]:
    plots: list[Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    return plots


def test_plots_of_dvc_take_columns_and_figures_that_there_are() -> None:
    for entry in _plots():
        if isinstance(entry, str):
            folder, name = entry.removeprefix("results/${benchmark}/").split("/")
            assert folder == "figures"
            assert name.removesuffix(".png") in build.FIGURES
            continue
        ((title, plot),) = entry.items()
        ((path, y),) = plot["y"].items()
        columns = STORED[Path(path).stem]
        template = (ROOT / ".dvc/plots" / f"{plot['template']}.json").read_text()
        assert path == f"results/${{benchmark}}/plots/{Path(path).stem}.csv"
        assert {plot["x"], y} <= set(columns), title
        assert set(re.findall(r'"field": "(\w+)"', template)) <= {*columns, "rev", "number"}, title


def test_templates_have_the_colours_of_the_figures() -> None:
    template = json.loads((ROOT / ".dvc/plots/curves.json").read_text())
    assert tuple(template["encoding"]["color"]["scale"]["range"]) == style.PALETTE
    confusion = json.loads((ROOT / ".dvc/plots/confusion.json").read_text())
    dark = confusion["spec"]["layer"][1]["encoding"]["color"]
    limit = float(dark["condition"]["test"].partition(">")[2])
    cividis = colormaps["cividis"]
    assert ink(cividis(limit / 100 - 0.01)) == dark["value"] == "white"
    assert ink(cividis(limit / 100 + 0.01)) == dark["condition"]["value"] == "black"
    # With "sort": [], as in DVC's own template, Vega-Lite 5.2 puts matrices of two revisions under others' names.
    assert all(facet.get("sort") != [] for facet in confusion["facet"].values())

"""Quoted numbers: each is what its source says, and ours are judged against them as described."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_report import make_suite, record, write

from sunets.report import published as module
from sunets.report.published import QUOTES, family, published, published_everywhere, verdict
from sunets.report.records import load_records
from sunets.report.statistics import Estimate

TORCHVISION = [q for q in QUOTES if q.source.startswith("torchvision ")]


@pytest.mark.parametrize("quote", TORCHVISION, ids=lambda q: f"{q.model}-{q.metric}")
def test_quotes_of_torchvision_are_what_its_metadata_say(quote) -> None:
    enum, member = re.fullmatch(r"torchvision [\d.]+ (\w+)\.(\w+)\.meta", quote.source).groups()
    models = importlib.import_module("torchvision.models")
    weights = getattr(models, enum, None) or getattr(models.segmentation, enum)
    (metrics,) = weights[member].meta["_metrics"].values()
    name = {"score.top1_error_percent": "acc@1", "score.top5_error_percent": "acc@5", "score.miou": "miou"}[
        quote.metric
    ]
    expected = metrics[name] if quote.metric == "score.miou" else 100 - metrics[name]
    assert quote.percent == pytest.approx(expected, abs=1e-9)
    assert enum.removesuffix("_Weights").lower() == quote.model


def test_every_quote_has_a_source_or_says_that_it_has_none() -> None:
    assert len(TORCHVISION) == 14
    for quote in QUOTES:
        assert quote.source
        assert (quote.percent is None) == quote.source.startswith("not quoted: no source opened")
        if quote.percent is not None and quote not in TORCHVISION:
            assert "https://" in quote.source
    assert len({(q.data, q.model, q.metric) for q in QUOTES}) == len(QUOTES)


@pytest.mark.parametrize(
    ("ours", "higher", "mark", "expected"),
    [
        (Estimate(24.2, None, None, 1), False, False, "reproduced"),
        (Estimate(25.0, 23.5, 26.5, 3), False, False, "reproduced"),
        (Estimate(25.0, 24.9, 25.1, 3), False, False, "not reproduced (worse)"),
        (Estimate(22.0, None, None, 1), False, False, "not reproduced (better)"),
        (Estimate(22.0, None, None, 1), True, False, "not reproduced (worse)"),
        (Estimate(23.8, None, None, 1), True, True, "not reached"),
        (Estimate(24.0, None, None, 1), True, True, "reached"),
        (Estimate(23.0, 22.0, 24.0, 3), True, True, "reached within noise"),
    ],
)
def test_verdicts(ours, higher, other_network, expected) -> None:
    assert verdict(ours, 23.87, higher_is_better=higher, other_network=other_network) == expected


def _benchmark(root: Path, benchmark: str, models: dict[str, float | None], key: str, data: str) -> tuple:
    suite = make_suite(dict.fromkeys(models), (0,), benchmark=benchmark, data={"name": data, "root": "elsewhere"})
    for model, value in models.items():
        row = record("evaluate", model, model, seed=0, variant="single_scale", scores={key: value})
        if value is None:
            row |= {"status": "failed", "reason": "out of memory", "scores": {}}
        write(root / f"results/{benchmark}/records/evaluate/{model}.json", [row])
    return load_records(suite, root), {k: e.name for k, e in suite.models.items()}


def test_ours_stand_beside_the_published_ones_of_the_same_data(tmp_path) -> None:
    records, names = _benchmark(
        tmp_path, "imagenet-gpu", {"resnet18": 30.3, "resnet50": 27.0, "densenet161": None, "sunet64": 29.0},
        "score.top1_error_percent", "imagefolder",
    )  # fmt: skip
    data = published(records, names).data
    top1 = data[data.metric == "score.top1_error_percent"].set_index("published_model")
    assert top1.verdict["resnet18"] == "reproduced"
    assert top1.difference_percent["resnet50"] == pytest.approx(27.0 - 23.87)
    assert top1.verdict["resnet50"] == "not reproduced (worse)"
    assert top1.verdict["densenet161"] == "failed: out of memory"
    assert top1.verdict["resnet101"] == "not run: not among this benchmark's models"
    assert top1.verdict["sunet64"] == "not quoted"
    assert pd.isna(top1.difference_percent["sunet64"])
    assert published(replace(records, benchmark="synthetic"), names) is None


def test_a_mark_is_held_against_every_model_in_percent(tmp_path) -> None:
    records, names = _benchmark(tmp_path, "camvid", {"sunet64": 0.672, "unet_resnet34": 0.61}, "score.miou", "camvid")
    table = published(records, names)
    miou = table.data[table.data.metric == "score.miou"].set_index("our_model")
    assert miou["ours_percent.mean"].to_dict() == pytest.approx({"sunet64": 67.2, "unet_resnet34": 61.0})
    assert miou.verdict.to_dict() == {"sunet64": "reached", "unet_resnet34": "not reached"}
    from sunets.report.write import write as write_files

    write_files(table, tmp_path / "results/camvid/tables")
    everywhere = published_everywhere(tmp_path / "results").view
    assert set(everywhere[everywhere.Data == "camvid"]["Our model"]) == {"sunet64", "unet_resnet34"}
    assert set(everywhere[everywhere.Data == "imagenet"]["Verdict"]) == {"not run: no records on imagenet"}
    assert everywhere.notna().all(axis=None)


def test_family_is_the_first_word_of_the_benchmark() -> None:
    assert [family(n) for n in ("camvid", "camvid_full", "voc-stride8")] == ["camvid", "camvid", "voc"]
    assert {q.data for q in module.QUOTES} == {"imagenet", "coco", "camvid", "voc"}

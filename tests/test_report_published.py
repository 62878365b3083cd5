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
from sunets.report.published import QUOTES, Quote, family, published, published_everywhere, verdict
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
    assert quote.value == pytest.approx(expected, abs=1e-9)
    assert enum.removesuffix("_Weights").lower() == quote.model


def test_every_quote_has_a_source_or_says_that_it_has_none() -> None:
    assert len(TORCHVISION) == 14
    for quote in QUOTES:
        assert quote.source
        assert (quote.value is None) == quote.source.startswith("not quoted: no source opened")
        if quote.value is not None and quote not in TORCHVISION:
            assert "https://" in quote.source
    assert len({(q.data, q.name, q.metric) for q in QUOTES}) == len(QUOTES)


@pytest.mark.parametrize(
    ("ours", "higher", "other_network", "expected"),
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
    metric = "score.miou" if higher else "score.top1_error_percent"
    assert verdict(ours, Quote("d", "m", metric, 23.87, "s", other_network=other_network)) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(6.91, "reproduced"), (6.96, "reproduced"), (7.0, "not reproduced (more)"), (6.8, "not reproduced (fewer)")],
)
def test_a_count_of_parameters_is_compared_to_a_percent(count, expected) -> None:
    assert verdict(Estimate(count, None, None, 1), Quote("d", "m", "cost.params_m", 6.9, "s")) == expected


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
    assert top1.difference["resnet50"] == pytest.approx(27.0 - 23.87)
    assert top1.verdict["resnet50"] == "not reproduced (worse)"
    assert top1.verdict["densenet161"] == "failed: out of memory"
    assert top1.verdict["resnet101"] == "not run: not among this benchmark's models"
    assert top1.verdict["sunet64"] == "not quoted"
    assert pd.isna(top1.difference["sunet64"])
    assert published(replace(records, benchmark="synthetic"), names) is None


def test_another_networks_value_is_held_against_every_model(tmp_path) -> None:
    scores = {"sunet64": 0.672, "unet_resnet34": 0.61, "dilated_resnet18": 0.69}
    records, names = _benchmark(tmp_path, "camvid", scores, "score.miou", "camvid")
    table = published(records, names)
    rows = table.data[(table.data.metric == "score.miou") & (table.data.published_model == "FC-DenseNet103")]
    miou = rows.set_index("our_model")
    assert miou["ours.mean"].to_dict() == pytest.approx({k: 100 * v for k, v in scores.items()})
    assert miou.verdict.to_dict() == {
        "sunet64": "reached", "unet_resnet34": "not reached", "dilated_resnet18": "reached"
    }  # fmt: skip
    assert set(miou.published_params_m) == {9.4}
    shown = table.view[table.view["Published network"] == "FC-DenseNet103"]
    assert set(shown["Our network"]) == {"sunet64", "dilated_resnet18"}, "the SUNets and the best"
    everywhere = published_everywhere([records], []).view
    assert set(everywhere[everywhere.Benchmark == "camvid"]["Our network"]) == {"sunet64", "dilated_resnet18"}
    assert set(everywhere[everywhere.Benchmark == "imagenet"]["Verdict"]) == {"not run: no records on imagenet"}
    assert everywhere.notna().all(axis=None)


def test_second_hand_values_say_what_was_opened(tmp_path) -> None:
    view = published_everywhere([], []).view
    rows = view[view["Published network"].str.startswith("sunet64 (") & (view.Benchmark == "voc")]
    assert set(rows["Published network"]) == {"sunet64 (pre-trained)", "sunet64 (from scratch)"}
    assert rows.Source.str.contains("second-hand, opened: visualisation.ipynb of https://").all()


def test_parameters_are_compared_with_the_counts_of_the_zoo() -> None:
    counts = {"sunet64": 6.909608, "sunet128": 24.704392, "sunet7128": 39.11372}
    zoo = [
        record("cost", f"classification-{k}", k, task="classification", cost={"cost.params_m": v})
        for k, v in counts.items()
    ]
    data = published_everywhere([], zoo).data
    rows = data[data.metric == "cost.params_m"].set_index("our_model")
    assert rows["ours.mean"].to_dict() == counts
    assert rows.verdict.to_dict() == {
        "sunet64": "reproduced", "sunet128": "reproduced", "sunet7128": "not reproduced (more)"
    }  # fmt: skip
    assert rows.difference["sunet7128"] == pytest.approx(1.41, abs=0.005)
    assert rows.second_hand.all()


def _voc(root: Path, init_from: str | None) -> pd.DataFrame:
    records, names = _benchmark(root, "voc", {"sunet64": 0.66, "dilated_resnet101": 0.62}, "score.miou", "voc2012")
    params = {"model.name": "sunet64", "train.init_from": init_from}
    write(root / "results/voc/records/train/sunet64.json", [record("train", "sunet64", "S", seed=0, params=params)])
    records = replace(records, raw=load_records(make_voc_suite(), root).raw)
    return published(records, names).data.set_index("published_model")


def make_voc_suite():
    return make_suite(
        {"sunet64": None, "dilated_resnet101": None}, (0,), benchmark="voc", data={"name": "voc2012", "root": "x"}
    )


@pytest.mark.parametrize("start", [None, "weights.pt"])
def test_a_score_is_compared_with_one_of_the_same_start(tmp_path, start) -> None:
    verdicts = _voc(tmp_path, start).verdict.to_dict()
    same, other = ("(from scratch)", "(pre-trained)") if start is None else ("(pre-trained)", "(from scratch)")
    assert verdicts[f"sunet64 {same}"] == "not reproduced (better)"
    assert verdicts[f"sunet64 {other}"] == f"not comparable: {same.strip('()')} here"


def test_a_published_difference_is_compared_with_ours(tmp_path) -> None:
    row = _voc(tmp_path, None).loc["sunet64 minus dilated_resnet101"]
    assert row["ours.mean"] == pytest.approx(4.0)
    assert row.verdict == "reproduced"


def test_family_is_the_first_word_of_the_benchmark() -> None:
    assert [family(n) for n in ("camvid", "camvid_full", "voc-stride8")] == ["camvid", "camvid", "voc"]
    assert {q.data for q in module.QUOTES} == {"imagenet", "coco", "camvid", "voc"}

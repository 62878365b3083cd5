"""Tables, figures and sentences of ablations, from records of known effects."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection

from ablations.report import importance as importances
from ablations.report import page as report_page
from ablations.report.figures import axes_figure, history_figure, interaction_figure, pareto_figure
from ablations.report.importance import decompose, importance, variance_shares, variance_table
from ablations.report.page import build_ablation_report, findings
from ablations.report.results import Study, axis_name
from ablations.report.tables import (
    axes_table,
    object_size_table,
    pareto_table,
    recipes_table,
    sampled_table,
    settings_table,
)
from sunets.core.config import ReportConfig, StudyConfig, Suite
from sunets.core.record import Record, RecordError, make_record, parameters_hash, read_rows, write_json
from sunets.core.stage import StageError
from sunets.report.claims import Results
from sunets.report.explain import Explainer, explain
from sunets.report.html import _Traces
from sunets.report.records import ReportError
from sunets.report.statistics import mean_interval
from sunets.report.write import value_text, write

HERE = Path(__file__).resolve().parent
BASE = {"model.unet_depth": [2, 2, 1], "model.num_blocks": 2, "model.output_stride": 16}
PARAMS = {
    "train.epochs": 5, "train.batch_size": 16, "train.optimizer": "adamw", "train.lr": 0.003,
    "train.weight_decay": 0.01, "data.name": "synthetic", "data.test_split": "test",
}  # fmt: skip


def trial(
    number: int, arm: dict[str, Any], seed: int, score: float | None, phase: str = "grid", **extra: Any
) -> Record:
    depth = arm.get("model.unet_depth", 2)
    deep = sum(depth) / 3 if isinstance(depth, list) else depth
    gmacs = 0.02 * deep + 0.01 * float(arm.get("model.num_blocks", 2))
    key = "score.miou" if phase in ("grid", "confirmation") else "search.miou"
    return make_record(
        "trial",
        task="segmentation",
        benchmark="synthetic",
        model="sunet_tiny",
        label="SUNet-tiny",
        status="finished" if score is not None else extra.pop("status", "failed"),
        reason=None if score is not None else "TrainingError: the loss became nan",
        seed=seed,
        config=PARAMS,
        scores={} if score is None else {key: score},
        cost={
            "cost.params_m": 0.1 * deep,
            "cost.gmacs": gmacs,
            "memory.saved_mib": 12.3,
            "receptive_field.effective_share": 0.4,
        },
        environment={"cpu": "a processor"},
        provenance={
            "command": "python -m ablations run s",
            "data_digest": "d",
            "code_hash": "c",
            "config_hash": parameters_hash(PARAMS),
            "git_commit": "0123456789abcdef",
            "git_dirty": False,
        },
        study="s",
        number=number,
        phase=phase,
        split="test" if phase in ("grid", "confirmation") else "val",
        setting=arm,
        arm=arm,
        tuned=extra.pop("tuned", {}),
        reference=extra.pop("reference", False),
        same_as=extra.pop("same_as", []),
    )


def noise(*place: int) -> float:
    return float(np.random.default_rng([7, *place]).normal(0, 0.004))


def config(kind: str, axes: Mapping[str, Sequence[Any]], **values: Any) -> StudyConfig:
    listed = [{"path": path, "values": list(v)} for path, v in axes.items()]
    return StudyConfig.model_validate({"kind": kind, "model": "sunet_tiny", "axes": listed, **values})


def one_at_a_time() -> tuple[StudyConfig, list[Record]]:
    """unet_depth 1 is worse by 5 points, output stride 8 makes no difference; one seed of depth 3 failed."""
    axes = {"model.unet_depth": (1, 3), "model.output_stride": (8,)}
    base = {path: BASE[path] for path in axes}
    arms = [base, *({**base, path: v} for path, values in axes.items() for v in values)]
    effect = [0.40, 0.35, 0.43, 0.40]
    records = [
        trial(4 * place + seed, arm, seed, mean + noise(seed) + noise(place, seed) / 4, reference=place == 0)
        for place, (arm, mean) in enumerate(zip(arms, effect, strict=True))
        for seed in range(4)
    ]
    records[11] = trial(11, arms[2], 3, None)
    return config("one_at_a_time", axes, seeds=[0, 1, 2, 3]), records


def grid() -> tuple[StudyConfig, list[Record]]:
    """Depth adds 3 points a level, blocks 1 a block, the schedule nothing; at output stride 16 both are one."""
    axes: dict[str, Sequence[Any]] = {
        "model.unet_depth": (1, 2, 3),
        "model.num_blocks": (1, 2, 4),
        "model.output_stride": (16, 8),
        "model.dilation": ("none", "multi_grid"),
    }
    records: list[Record] = []
    for depth, blocks, stride, dilation in itertools.product(*axes.values()):
        arm = dict(zip(axes, (depth, blocks, stride, dilation), strict=True))
        if (stride, dilation) == (16, "multi_grid"):
            continue
        same = [{**arm, "model.dilation": "multi_grid"}] if stride == 16 else []
        for seed in range(3):
            score = 0.3 + 0.03 * depth + 0.01 * blocks + noise(seed) + noise(len(records)) / 4
            records.append(
                trial(len(records), arm, seed, score, same_as=same, reference=(depth, blocks, stride) == (2, 2, 16))
            )
    return config("grid", axes, seeds=[0, 1, 2]), records


def grid_without_a_partner() -> tuple[StudyConfig, list[Record]]:
    """The grid whose deepest network with the most blocks has failed."""
    settings, records = grid()
    for record in records:
        if record["arm"]["model.unet_depth"] == 3 and record["arm"]["model.num_blocks"] == 4:
            record |= {"scores": {}, "status": "failed", "reason": "lost"}
    return settings, records


def tuned() -> tuple[StudyConfig, list[Record]]:
    """Both depths are equal once tuned; the learning rate matters, the weight decay does not."""
    records: list[Record] = []
    rng = np.random.default_rng(3)
    for depth in (1, 2):
        for n in range(10):
            lr, decay = float(10 ** rng.uniform(-4, -1)), float(10 ** rng.uniform(-4, -1))
            score = 0.4 - 0.05 * (np.log10(lr) + 2.5) ** 2
            pruned = n > 4 and score < 0.35
            arm, rates = {"model.unet_depth": depth}, {"train.lr": lr, "train.weight_decay": decay}
            value = None if pruned else score
            records.append(trial(len(records), arm, 100, value, "tuning", status="pruned", tuned=rates))
    for depth in (1, 2):
        for seed in range(3):
            records.append(
                trial(
                    len(records), {"model.unet_depth": depth}, seed, 0.4 + noise(seed, depth), "confirmation",
                    reference=depth == 2, tuned={"train.lr": 0.003, "train.weight_decay": 0.01},
                )
            )  # fmt: skip
    space = [{"path": p, "low": 1e-4, "high": 0.1, "log": True} for p in ("train.lr", "train.weight_decay")]
    return config("tuned", {"model.unet_depth": (1, 2)}, nuisance=space, trials=10, seeds=[0, 1, 2]), records


def search() -> tuple[StudyConfig, list[Record]]:
    axes = {"model.unet_depth": (1, 2, 3, 4), "model.num_blocks": (1, 2, 4, 7)}
    rng = np.random.default_rng(4)
    records: list[Record] = []
    for n in range(24):
        depth, blocks = int(rng.integers(1, 5)), int(rng.choice((1, 2, 4, 7)))
        score = 0.45 - 0.1 / depth - 0.04 / blocks + noise(n)
        arm = {"model.unet_depth": depth, "model.num_blocks": blocks}
        records.append(trial(n, arm, 100, None if n == 5 else score, "search"))
    confirmed: list[tuple[Any, int, float]] = [([2, 2, 1], 2, 1.7), (1, 1, 1), (3, 2, 3), (4, 7, 4)]
    for given, blocks, deep in confirmed:
        for seed in range(3):
            score = 0.44 - 0.1 / deep - 0.04 / blocks + noise(seed) + noise(seed, len(records)) / 8
            arm = {"model.unet_depth": given, "model.num_blocks": blocks}
            records.append(trial(len(records), arm, seed, score, "confirmation", reference=deep == 1.7))
    return config("search", axes, trials=24, seeds=[0, 1, 2]), records


MADE: dict[str, Callable[[], tuple[StudyConfig, list[Record]]]] = {
    "depth": one_at_a_time, "joint": grid, "tuned": tuned, "pareto": search,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "RESAMPLES", 6)
    monkeypatch.setattr(importances, "RESAMPLES", 6)


def study(name: str) -> Study:
    settings, records = MADE[name]()
    return Study(name, settings, records, "SUNet-tiny")


def suite(**studies: StudyConfig) -> Suite:
    return Suite.model_validate(
        {
            "benchmark": "synthetic",
            "data": {"name": "synthetic"},
            "models": {"sunet_tiny": {"name": "sunet_tiny"}},
            "report": {"reference": "sunet_tiny", "title": "Embedded"},
            "ablations": studies,
        }
    )


def build(root: Path, *names: str) -> list[Path]:
    for name in names:
        write_json(root / f"results/synthetic/records/ablations/{name}.json", MADE[name]()[1])
    return build_ablation_report(suite(**{name: make()[0] for name, make in MADE.items() if name in names}), root)


def test_one_at_a_time_says_what_differs_and_what_does_not() -> None:
    depth, stride = findings(study("depth"))
    assert re.search(
        r"U-Net depth.*reference 2, 2, 1\): 1: worse, -5\.\d\d \[-5\.\d\d, -4\.\d\d\] points; 3: better", depth
    )
    assert (
        "Output stride** (`model.output_stride`, reference 16): 8: equivalent, -0.01 [-0.18, +0.16] points." in stride
    )


def test_an_undecided_difference_says_what_the_seeds_could_have_shown() -> None:
    strict = replace(study("depth"), report=ReportConfig(equivalence_margin_percent=0))
    _, stride = findings(strict)
    assert "no difference shown between 16 and 8; the largest, -0.01 [-0.18, +0.16] points, is undecided" in stride
    assert re.search(r"\(4 seeds would detect 0\.[1-3] points with 80 % power\)", stride)


def test_an_arm_of_another_budget_is_not_compared() -> None:
    made = study("depth")
    for r in made.records:
        if r["arm"]["model.unet_depth"] == 1:
            r["params"] |= {"train.epochs": 30}
    table = settings_table(made)
    assert list(table.view.Verdict) == [
        "reference", "not comparable: train.epochs 30 / 5", "better", "equivalent"
    ]  # fmt: skip
    assert "1: not comparable: train.epochs 30 / 5;" in findings(made)[0]


def test_a_forged_parameter_of_a_trial_is_an_error(tmp_path: Path) -> None:
    settings, records = MADE["depth"]()
    records[3]["params"]["train.epochs"] = 30
    write_json(tmp_path / "results/synthetic/records/ablations/depth.json", records)
    with pytest.raises(RecordError, match=r"depth\.json: .*, seed 3: config_hash is \w+, but that of its params is"):
        build_ablation_report(suite(depth=settings), tmp_path)


def test_a_table_has_a_row_a_setting_with_failures_and_the_same_seeds() -> None:
    table = settings_table(study("depth"))
    data = table.data.set_index("model.unet_depth", drop=False)
    assert list(table.data["model.unet_depth"]) == ["2, 2, 1", "1", "3", "2, 2, 1"]
    assert data.loc["3", "n_seeds"] == 3
    assert data.loc["3", "status"] == "3 of 4 seeds"
    assert data.loc["1", "score.miou.difference.verdict"] == "worse"
    base = {r["seed"]: r["scores"]["score.miou"] for r in MADE["depth"]()[1][:4]}
    ones = {r["seed"]: r["scores"]["score.miou"] for r in MADE["depth"]()[1][4:8]}
    expected = np.mean([ones[s] - base[s] for s in base])
    assert data.loc["1", "score.miou.difference.mean"] == pytest.approx(expected)
    assert list(table.view.columns) == [
        "U-Net depth", "Output stride", "Seeds", "mIoU (%)", "Difference", "Wins", "Verdict", "Parameters (M)",
        "Multiply-adds (G)", "Saved for backward (MiB)", "Effective field (% of image)",
    ]  # fmt: skip
    assert list(table.view.Verdict) == ["reference", "worse", "better", "equivalent"]
    assert list(table.view.Wins)[:3] == ["", "0/4", "3/3"]


def test_settings_that_had_not_settled_are_marked() -> None:
    made = study("depth")
    gains = {r["number"]: 0.1 if r["arm"]["model.unet_depth"] == 3 else 0.01 for r in made.records}
    rows = [{"number": n, "epoch": e, "val.miou": 0.3 + gain * e} for n, gain in gains.items() for e in (3, 4, 5)]
    table = settings_table(replace(made, history=rows))
    assert list(table.view.Budget) == ["", "", "still improving (+10.00)", ""]
    assert any("validation mIoU of 1 setting changed by 2 points or more" in note for note in table.notes)
    sentence = findings(replace(made, history=rows))[-1]
    assert sentence.endswith("may change the verdict: U-Net depth 3, Output stride 16 still improving (+10.00).")
    assert len(findings(made)) == 2
    assert table.data["val.miou.last_fifth"].tolist() == pytest.approx([0.01, 0.01, 0.1, 0.01])


def test_scores_by_object_size_have_a_table(tmp_path: Path) -> None:
    made = study("depth")
    assert object_size_table(made) is None
    for r in (r for r in made.records if r["scores"]):
        r["scores"] |= {f"score.mean_accuracy.{size}": 0.9 for size in ("small", "medium", "large")}
        if r["arm"]["model.unet_depth"] == 1:
            r["scores"]["score.mean_accuracy.small"] = 0.1 + 0.01 * r["seed"]
    table = object_size_table(made)
    assert table is not None
    assert table.view.iloc[1, -3] == "11.50 [9.45, 13.55]"
    assert table.data.iloc[1]["score.mean_accuracy.small.mean"] == pytest.approx(0.115)
    write_json(tmp_path / "synthetic/records/ablations/depth.json", made.records)
    write(table, tmp_path / "synthetic/ablations")
    text = explain(tmp_path, "synthetic", "ablations/depth_object_size", "1/16", "Small objects")
    assert trials_of(text) == [4, 5, 6, 7]
    assert "score.mean_accuracy.small = 0.13" in text


def test_arms_tuned_with_fewer_trials_are_not_compared() -> None:
    made = study("tuned")
    assert "not comparable" not in str(list(settings_table(made).view.Verdict))
    fewer = Study("tuned", made.config, made.records[3:], made.label)
    assert list(settings_table(fewer).view.Verdict) == ["not comparable: tuning trials 7 / 10", "reference"]
    assert variance_shares(fewer) is None


def test_a_training_with_several_names_was_tuned_as_often_as_others() -> None:
    """Stride 16 is one training, whatever its dilation: one arm with trials beside two of stride 8."""
    axes = {"model.output_stride": (16, 8), "model.dilation": ("none", "multi_grid")}
    arms = [dict(zip(axes, values, strict=True)) for values in ((16, "none"), (8, "none"), (8, "multi_grid"))]
    tunings = [trial(n, arm, 100, 0.4, "tuning") for n, arm in enumerate(a for a in arms for _ in range(3))]
    finals = [
        trial(
            20 + 4 * place + seed, arm, seed, 0.4 + 0.1 * place + noise(seed, place), "confirmation",
            reference=place == 2, same_as=[{**arm, "model.dilation": "multi_grid"}] if place == 0 else [],
        )
        for place, arm in enumerate(arms)
        for seed in range(3)
    ]  # fmt: skip
    rates = [{"path": "train.lr", "low": 0.001, "high": 0.1, "log": True}]
    settings = config("tuned", axes, nuisance=rates, trials=3, seeds=[0, 1, 2])
    made = Study("twins", settings, [*tunings, *finals], "SUNet-tiny")
    assert "not comparable" not in str(findings(made))


def test_what_cannot_be_compared_is_marked_in_every_figure() -> None:
    made = study("joint")
    for r in made.records:
        if r["arm"]["model.unet_depth"] == 3:
            r["params"] |= {"train.epochs": 30}
    assert variance_shares(made) is None
    assert interaction_figure(made) is None
    figure = axes_figure(made)
    assert figure is not None
    assert "3\n(not comparable)" in [text.get_text() for text in figure.axes[0].get_xticklabels()]
    front = study("pareto")
    for r in front.final[-3:]:
        r["params"] |= {"train.epochs": 30}
    figure = pareto_figure(front)
    assert figure is not None
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    marked = [name for name in names if "not comparable" in name]
    assert marked == ["U-Net depth 4, U-Nets per stage 7 (not comparable)"]
    plt.close("all")


def test_no_interval_of_a_figure_leaves_the_range_of_a_score() -> None:
    figure = axes_figure(depth_study([0.99, 0.90, 0.05, 0.01]))
    assert figure is not None
    bars = [line for line in figure.axes[0].collections if isinstance(line, LineCollection)]
    ends = [end for bar in bars for _, end in bar.get_segments()[0]]
    assert len(ends) == 4
    assert (min(ends), max(ends)) == (0, 100)
    plt.close(figure)


def test_marginals_compare_on_equal_terms_and_use_every_name_of_a_training() -> None:
    joint = study("joint")
    schedule = joint.marginal("model.dilation")
    assert set(schedule) == {"none", "multi_grid"}
    assert abs(np.mean(list(schedule["none"].values())) - np.mean(list(schedule["multi_grid"].values()))) < 0.005
    depth = joint.marginal("model.unet_depth")
    rise = [np.mean(list(depth[v].values())) for v in ("1", "2", "3")]
    assert np.diff(rise) == pytest.approx([0.03, 0.03], abs=0.003)
    sentences = findings(joint)
    assert "1: worse, -3." in sentences[0]
    assert "on average over the other axes" in sentences[0]
    assert "(`model.dilation`, reference none, on average over the other axes where it changes" in sentences[3]
    assert "multi_grid: equivalent, -0.01" in sentences[3]


def test_settings_at_which_an_axis_changes_nothing_do_not_dilute_its_effect() -> None:
    settings, records = grid()
    for r in records:  # the schedule costs 4 points at output stride 8; at 16 both are one training
        r["scores"]["score.miou"] -= 0.04 * (r["arm"]["model.dilation"] == "multi_grid")
    made = Study("joint", settings, records, "SUNet-tiny")
    effect = made.effects("model.dilation")["multi_grid"]
    assert effect.difference is not None
    assert effect.difference.mean == pytest.approx(-0.04, abs=0.003)
    table = axes_table(made)
    assert table is not None
    assert "Left out: settings of the other axes at which Dilation schedule changes nothing." in table.notes
    one = made.contexts("model.output_stride")
    assert (len(one[0]), one[1]) == (18, 0)  # of a training with two names, each counts


def test_an_axis_that_acts_in_one_setting_of_the_others_names_it() -> None:
    settings, records = grid()
    few = settings.model_copy(update={"axes": settings.axes[2:]})
    arms = [r for r in records if (r["arm"]["model.unet_depth"], r["arm"]["model.num_blocks"]) == (2, 2)]
    for r in arms:
        for arm in (r["arm"], *r["same_as"]):
            del arm["model.unet_depth"], arm["model.num_blocks"]
    schedule = findings(Study("dilation", few, arms, "SUNet-tiny"))[1]
    assert "(`model.dilation`, reference none, at output stride 8): multi_grid:" in schedule


@pytest.mark.parametrize("name", ["depth", "joint", "tuned", "pareto"])
def test_a_study_whose_scores_are_all_equal_has_a_page(name: str, tmp_path: Path) -> None:
    """At a tiny budget every network may predict the background alone."""
    settings, records = MADE[name]()
    for r in records:
        r["scores"] = dict.fromkeys(r["scores"], 0.2)
    write_json(tmp_path / f"results/synthetic/records/ablations/{name}.json", records)
    build_ablation_report(suite(**{name: settings}), tmp_path)
    assert "no difference shown" in (tmp_path / "results/synthetic/ablations.md").read_text()


def test_a_search_whose_points_all_diverged_has_a_page(tmp_path: Path) -> None:
    settings, records = search()
    for r in records:
        if r["phase"] == "confirmation":
            r |= {"scores": {}, "status": "failed", "reason": "the loss became nan"}
    write_json(tmp_path / "results/synthetic/records/ablations/pareto.json", records)
    build_ablation_report(suite(pareto=settings), tmp_path)
    assert "The reference has no score" in (tmp_path / "results/synthetic/ablations.md").read_text()


def test_a_tuned_study_whose_trials_all_diverged_has_a_page(tmp_path: Path) -> None:
    settings, records = tuned()
    records = [r | {"scores": {}, "status": "failed", "reason": "nan"} for r in records if r["phase"] == "tuning"]
    write_json(tmp_path / "results/synthetic/records/ablations/rates.json", records)
    build_ablation_report(suite(rates=settings), tmp_path)
    page = (tmp_path / "results/synthetic/ablations.md").read_text()
    assert "No trial has been trained on the seeds yet." in page
    assert "were stopped" not in page, "none was pruned"
    records[-1] |= {"status": "pruned"}
    assert "were stopped" in report_page.what_was_run(Study("rates", settings, records, "SUNet-tiny"))


def test_no_label_or_reason_breaks_the_page(tmp_path: Path) -> None:
    settings, records = one_at_a_time()
    records = [r | {"label": "a|b <c", "reason": r["reason"] and "lr > 1 | <nan>"} for r in records]
    write_json(tmp_path / "results/synthetic/records/ablations/depth.json", records)
    build_ablation_report(suite(depth=settings), tmp_path)
    page = (tmp_path / "results/synthetic/ablations.md").read_text()
    assert "a\\|b &lt;c, one axis at a time" in page
    assert "lr > 1 \\| &lt;nan>" in page
    assert not re.search(r"(?<!\\)\|b|<c|<nan", page)


def test_tuned_values_may_be_lists() -> None:
    settings, records = tuned()
    crops = [[64, 64], [96, 96], [128, 128]]
    for r in records:
        r["tuned"] = {"train.lr": r["tuned"]["train.lr"], "train.augment.crop": crops[r["number"] % 3]}
    shares = importance(Study("tuned", settings, records, "SUNet-tiny"))
    assert shares is not None
    assert "train.augment.crop" in shares


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, records = grid()
    write_json(tmp_path / "results/synthetic/records/ablations/joint.json", records)
    build_ablation_report(suite(joint=settings), tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}

    def broken(study: Study) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(report_page.DRAWN, "axes", broken)
    with pytest.raises(ZeroDivisionError):
        build_ablation_report(suite(joint=settings), tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()} == before


def test_a_missing_score_takes_its_partners_out_of_a_marginal() -> None:
    settings, records = grid_without_a_partner()
    blocks = Study("joint", settings, records, "SUNet-tiny").marginal("model.num_blocks")
    # Depth 3 is left out for all, or four blocks would look worse for want of the best depth.
    assert np.mean(list(blocks["4"].values())) - np.mean(list(blocks["1"].values())) == pytest.approx(0.03, abs=0.003)


def test_the_page_names_what_the_base_is_and_how_it_was_trained() -> None:
    settings, records = one_at_a_time()
    moved = settings.model_copy(update={"overrides": {"model.output_stride": 8, "train.epochs": 5}})
    text = report_page.what_was_run(Study("depth", moved, records, "SUNet-tiny"))
    assert text.startswith("SUNet-tiny with model.output_stride 8, one axis at a time from the default: U-Net depth (")
    assert "5 epochs, batch 16, adamw, learning rate 0.003, weight decay 0.01; seeds 0, 1, 2, 3" in text
    sampled = study("tuned")
    sampled.records[0]["status"] = "pruned"
    assert "scored on the val split only; those below the median" in report_page.what_was_run(sampled)


def test_the_page_says_which_trainings_are_the_benchmarks_and_which_recipe_came_first() -> None:
    made = study("tuned")
    assert "shared with it" not in report_page.what_was_run(made)
    records = [
        r | {"benchmark_training": r["reference"] and r["seed"] < 2, "recipe_of_base": r["number"] in (0, 10)}
        for r in made.records
    ]
    text = report_page.what_was_run(Study("tuned", made.config, records, made.label))
    assert "the first with the recipe of the base, 3 at random and 6 by Optuna's TPE (multivariate) (sampler" in text
    few = Study("tuned", made.config.model_copy(update={"trials": 3}), records, made.label)
    text = report_page.what_was_run(few)
    assert "the first with the recipe of the base and 2 at random (sampler seed 0); 3 at a time" in text
    assert "TPE" not in text
    assert "by the same recipe on 2 seeds (0, 1): where one machine runs both, one training serves both" in text


def test_the_page_and_the_table_tell_which_trials_repeat_a_setting() -> None:
    plain = study("tuned")
    assert "different settings" not in report_page.what_was_run(plain)
    records = [r | {"duplicate_of": {4: 0, 14: 12}.get(r["number"])} for r in plain.records]
    repeated = Study("tuned", plain.config, records, plain.label)
    text = report_page.what_was_run(repeated)
    assert "; 4 at a time, with training seed" in text
    assert "Only 18 of them have different settings, all that exist: the others repeat" in text
    table = sampled_table(repeated)
    assert table is not None
    shown = dict(zip(table.view["Trial"], table.view["Same as trial"], strict=True))
    assert {trial: same for trial, same in shown.items() if same} == {"4": "0", "14": "12"}
    assert table.data.set_index("number").duplicate_of[14] == 12


def test_the_table_states_by_how_much_each_recipe_won() -> None:
    """A recipe that won by a hundredth of a point on one seed may lose on others: the reader must see it."""
    made = study("tuned")
    for depth, lead in ((1, 0.0012), (2, 0.3)):
        finished = [r for r in made.sampled if r["arm"] == {"model.unet_depth": depth} and r["status"] == "finished"]
        for r, score in zip(finished, (0.5, 0.8, 0.8 + lead, *[0.1] * 9), strict=False):
            r["scores"][made.search_key] = score
    note = next(note for note in settings_table(made).notes if note.startswith("Lead of the chosen recipe"))
    assert "in points: 0.12 (U-Net depth 1; 1 seed); 30.00 (U-Net depth 2; 1 seed)." in note


def test_the_page_shows_the_recipes_that_each_arm_was_chosen_from() -> None:
    """A mean over the tuning seeds chooses; its lead is shown with an interval, and no other table has these seeds."""
    plain = study("tuned")
    rates = [{"train.lr": lr, "train.weight_decay": 0.01} for lr in (0.003, 0.03)]
    records = [r for r in plain.records if r["phase"] != "tuning"]
    means = {1: (0.4, 0.3), 2: (0.5, 0.45)}
    for seed in (100, 101, 102):
        for depth, scores in means.items():
            for values, mean in zip(rates, scores, strict=True):
                arm, place = {"model.unet_depth": depth}, len(records)
                diverged = (depth, seed, values["train.lr"]) == (2, 102, 0.03)
                score = None if diverged else mean + 0.01 * (seed - 101)
                records.append(trial(place, arm, seed, score, "tuning", tuned=values))
    made = Study("tuned", plain.config, records, plain.label)
    assert {r["seed"] for r in made.sampled} == {100}
    assert [made.trials_of([setting]) for setting in made.settings] == [2, 2]
    table = recipes_table(made)
    assert table is not None
    shown = table.view[["U-Net depth", "Learning rate", "Seeds", "Chosen"]].values.tolist()
    assert shown == [
        ["1", "0.003", "3", "yes"],
        ["1", "0.03", "3", ""],
        ["2", "0.003", "3", "yes"],
        ["2", "0.03", "2", ""],
    ]
    assert table.data["search.miou.mean"].tolist() == pytest.approx([0.4, 0.3, 0.5, 0.445])
    note = next(note for note in settings_table(made).notes if note.startswith("Lead of the chosen recipe"))
    assert "in points: +10.00 (U-Net depth 1; 3 seeds); +5.00 (U-Net depth 2; 2 seeds)." in note, (
        "no spread, no interval"
    )
    text = report_page.what_was_run(made)
    assert "at most 3, were trained on 2 more tuning seeds (101, 102); the one with the best mean" in text
    assert recipes_table(plain) is None


def test_a_recipe_that_diverged_on_a_seed_is_behind_the_others(tmp_path: Path) -> None:
    records = [r for r in study("tuned").records if r["phase"] != "tuning" and r["arm"] == {"model.unet_depth": 2}]
    for rate, mean in ((0.003, 0.4), (0.01, 0.38), (0.03, 0.5)):
        for seed in (100, 101, 102):
            score = None if (rate, seed) == (0.03, 102) else mean
            rates = {"train.lr": rate, "train.weight_decay": 0.01}
            records.append(trial(len(records), {"model.unet_depth": 2}, seed, score, "tuning", tuned=rates))
    settings = study("tuned").config
    write_json(tmp_path / "results/synthetic/records/ablations/rates.json", records)
    build_ablation_report(suite(rates=settings), tmp_path)
    results = tmp_path / "results"
    rows = read_rows(results / "synthetic/ablations/rates_recipes.csv")
    traces = _Traces(suite(rates=settings), results, Results({}, [], [], {}))
    for (name,) in traces._rows("rates_recipes", rows, rows):
        assert "seed 101" in explain(results, "synthetic", "ablations/rates_recipes", name, "search.miou")
    made = Study("rates", settings, records, "SUNet-tiny")
    assert [r.records[0]["tuned"]["train.lr"] for r in made.recipes] == [0.003, 0.01, 0.03]
    table = settings_table(made)
    assert table is not None
    assert any("+2.00 (U-Net depth 2; 3 seeds)" in note for note in table.notes)


def test_sentences_and_table_have_the_same_verdicts() -> None:
    made = study("depth")
    told = {arm: c for path in made.axes for arm, c in made.effects(path).items()}
    assert len(told) == 3
    assert {id(c) for c in told.values()} == {id(c) for c in made.compared.values()}


def test_axes_that_cannot_be_averaged_have_no_table() -> None:
    axes: dict[str, Sequence[Any]] = {"model.unet_depth": (1, 2), "model.num_blocks": (1, 2)}
    arms = [{"model.unet_depth": d, "model.num_blocks": n} for d in (1, 2) for n in (1, 2)]
    records = [
        trial(n, arm, 0, 0.4 if len({*arm.values()}) == 1 else None, reference=n == 0) for n, arm in enumerate(arms)
    ]
    assert axes_table(Study("joint", config("grid", axes, seeds=[0]), records, "SUNet-tiny")) is None


def test_the_page_states_no_value_of_what_a_study_varies() -> None:
    axes: dict[str, list[Any]] = {"train.lr": [0.0001, 0.01], "train.batch_size": [4, 8]}
    grid = config("grid", axes, seeds=[0])
    records: list[Record] = []
    for arm in ({"train.lr": lr, "train.batch_size": n} for lr in axes["train.lr"] for n in axes["train.batch_size"]):
        made = trial(len(records), arm, 0, 0.5, reference=not records)
        records.append(made | {"params": made["params"] | arm})
    text = report_page.what_was_run(Study("rates", grid, records, "SUNet-tiny"))
    assert "Every training: 5 epochs, adamw, weight decay 0.01; seeds 0, the same" in text
    moved = [r | {"params": r["params"] | {"train.epochs": 3 + n}} for n, r in enumerate(records)]
    text = report_page.what_was_run(Study("rates", grid, moved, "SUNet-tiny"))
    assert "Every training: adamw, weight decay 0.01;" in text  # what came with an axis is not stated either
    nowhere = [r | {"provenance": r["provenance"] | {"git_commit": None}} for r in records]
    text = report_page.what_was_run(Study("rates", grid, nowhere, "SUNet-tiny"))
    assert "The commit of some records (trial) is unknown" in text


def depth_study(scores: Sequence[float | None]) -> Study:
    """Depth 2, the reference, and depth 1, each on two seeds."""
    records = [
        trial(n, {"model.unet_depth": 2 - n // 2}, n % 2, score, reference=n < 2) for n, score in enumerate(scores)
    ]
    return Study("d", config("grid", {"model.unet_depth": [2, 1]}, seeds=[0, 1]), records, "SUNet-tiny")


def test_a_setting_that_diverged_on_every_seed_says_so() -> None:
    view = settings_table(depth_study([0.5, 0.51, None, None])).view
    assert view[view["U-Net depth"] == "1"]["mIoU (%)"].tolist() == ["diverged (2 of 2)"]


def test_settings_that_differ_by_the_same_amount_on_every_seed_are_not_tested() -> None:
    (sentence,) = findings(depth_study([0.43, 0.43, 0.4, 0.4]))
    assert sentence.endswith("1: no difference shown, the seeds do not differ in it (-3.00 points).")


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        ({"arm": {}}, r"model\.unet_depth"),
        ({"scores": {}}, r"score\.miou"),
        ({"cost": {}}, r"cost\.gmacs"),
    ],
)
def test_records_that_lack_what_the_page_shows_are_named(edit: dict[str, Any], fault: str, tmp_path: Path) -> None:
    whole = depth_study([0.5, 0.51, 0.4, 0.42])
    whole.check(tmp_path / "d.json")
    records = [*whole.records[:3], whole.records[3] | edit]
    with pytest.raises(RecordError, match=rf"d\.json: record 3 lacks {fault}; run its study again"):
        Study("d", whole.config, records, "SUNet-tiny").check(tmp_path / "d.json")


def test_one_seed_shows_no_difference() -> None:
    settings, records = one_at_a_time()
    alone = Study("depth", settings, [r for r in records if r["seed"] == 0], "SUNet-tiny")
    for sentence in findings(alone):
        assert "no difference shown, one seed has no interval" in sentence


def test_the_decomposition_is_exact_and_its_shares_add_up() -> None:
    a, b, c = np.arange(3) * 2.0, np.array([0.0, 1.0]), np.array([0.0, 3.0, 1.0, 0.5])
    both = np.array([[1.0, -1.0], [0.0, 0.0], [-1.0, 1.0]])
    scores = a[:, None, None] + b[:, None] + c + both[..., None]
    parts = {(0,): a.var(), (1,): b.var(), (2,): c.var(), (0, 1): both.var()}
    shares = decompose(scores)
    assert sum(shares.values()) == pytest.approx(1)
    for chosen, share in shares.items():
        assert share == pytest.approx(parts.get(chosen, 0.0) / scores.var(), abs=1e-12), chosen


def test_a_complete_grid_has_exact_shares_with_equal_trainings_filled_in() -> None:
    joint = study("joint")
    shares = variance_shares(joint)
    assert shares is not None
    assert sum(shares.values()) == pytest.approx(1)
    assert len(shares) == 2**4 - 1 + 2
    levels = {"model.unet_depth": [0.03, 0.06, 0.09], "model.num_blocks": [0.01, 0.02, 0.04]}
    total = np.var([r["scores"]["score.miou"] for r in joint.records for _ in (r["arm"], *r["same_as"])])
    for path, effects in levels.items():
        assert shares[(path,)] == pytest.approx(np.var(effects) / total, rel=0.05)
    assert shares[("model.dilation",)] < 0.01
    assert shares[("seed",)] > 0
    assert importance(joint) is None, "nothing is left to estimate"
    trials = [
        trial(n, {"model.unet_depth": depth}, 100, 0.3 + 0.01 * n, "tuning", tuned={"train.lr": rate})
        for n, (depth, rate) in enumerate(itertools.product((1, 2, 3, 4), (0.01, 0.003, 0.001)))
    ]
    nuisance = [{"path": "train.lr", "low": 0.001, "high": 0.01, "log": True}]
    rates = config("tuned", {"model.unet_depth": (1, 2, 3, 4)}, nuisance=nuisance, trials=3, seeds=[0])
    assert importance(Study("rates", rates, trials, "SUNet-tiny")) is None, "all arms tried the same rates"
    lost = Study("joint", joint.config, joint.records[:-1], "SUNet-tiny")
    assert variance_shares(lost) is None
    assert variance_shares(study("pareto")) is None


@pytest.mark.slow
def test_a_forest_tells_what_matters_in_a_sampled_study_and_its_spread() -> None:
    sampled = importance(study("tuned"))
    assert sampled is not None
    assert sampled["train.lr"][0] > 5 * sampled["train.weight_decay"][0]
    settings, records = grid()
    incomplete = importance(Study("joint", settings, records[:-1], "SUNet-tiny"))
    assert incomplete is not None
    assert list(incomplete)[:2] == ["model.unet_depth", "model.num_blocks"]
    assert incomplete["model.unet_depth"][0] > 0.7
    assert incomplete["seed"][0] < 0.1
    assert all(low <= high for _, low, high in [*incomplete.values(), *sampled.values()])
    assert importance(study("depth")) is None


def test_values_stand_in_their_natural_order() -> None:
    axes: dict[str, list[Any]] = {"model.unet_depth": [4, [2, 2, 1], 1], "model.dilation": ["uniform", "none"]}
    arms = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    records = [trial(n, arm, 0, 0.1, reference=n == 0) for n, arm in enumerate(arms)]
    shuffled = Study("s", config("grid", axes, seeds=[0]), records, "SUNet-tiny")
    assert list(shuffled.marginal("model.unet_depth")) == ["1", "2, 2, 1", "4"]
    assert list(shuffled.marginal("model.dilation")) == ["uniform", "none"]
    view = settings_table(shuffled).view
    assert list(view["U-Net depth"]) == ["1", "1", "2, 2, 1", "2, 2, 1", "4", "4"]
    assert list(view["Dilation schedule"]) == ["uniform", "none"] * 3
    assert list(view["Verdict"]).index("reference") == 4


TABLES = """
import hashlib, test_ablations_report as t
from ablations.report.importance import variance_table
from ablations.report.tables import axes_table, sampled_table, settings_table
for name in t.MADE:
    for make in (settings_table, axes_table, variance_table, sampled_table):
        if (table := make(t.study(name))) is not None:
            print(table.name, hashlib.sha256(table.data.to_csv().encode()).hexdigest())
"""


@pytest.mark.slow
def test_tables_do_not_depend_on_the_hash_seed() -> None:
    def tables(seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent)))}
        return subprocess.run(
            [sys.executable, "-c", TABLES], env=env, capture_output=True, text=True, check=True
        ).stdout

    first = tables("1")
    assert "joint_axes" in first
    assert first == tables("2") == tables("3")


@pytest.mark.slow
def test_search_and_confirmed_scores_share_no_column(tmp_path: Path) -> None:
    build(tmp_path, "tuned", "pareto")
    for name in ("tuned", "pareto"):
        final = pd.read_csv(tmp_path / f"results/synthetic/ablations/{name}.csv")
        seen = pd.read_csv(tmp_path / f"results/synthetic/ablations/{name}_trials.csv")
        assert not [c for c in final if c.startswith("search.")]
        assert not [c for c in seen if c.startswith("score.")]
        assert seen["search.miou"].notna().any()
    page = (tmp_path / "results/synthetic/ablations.md").read_text()
    assert "U-Net depth** (`model.unet_depth`, reference 2): no difference shown between 2 and 1" in page
    assert re.search(r"- U-Net depth 4, U-Nets per stage 7: better, .* against the default, at 2\.\d\d times", page)


@pytest.mark.slow
def test_the_whole_report_is_written_whole_and_the_same_again(tmp_path: Path) -> None:
    first = build(tmp_path, *MADE)
    bytes_of = {path: path.read_bytes() for path in first}
    folder = tmp_path / "results/synthetic"
    assert sorted(p.stem for p in (folder / "ablations").glob("*.png")) == [
        "depth_axes", "joint_axes", "joint_interaction", "joint_variance", "pareto_history", "pareto_importance",
        "pareto_pareto", "tuned_axes", "tuned_history", "tuned_importance", "tuned_variance",
    ]  # fmt: skip
    page = (folder / "ablations.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (folder / link).exists(), link
    assert "nan" not in page.replace("the loss became nan", "")
    assert "trial 11 (U-Net depth 3, Output stride 16, seed 3): TrainingError: the loss became nan" in page
    stale = folder / "ablations/gone_axes.png"
    stale.touch()
    assert build(tmp_path, *MADE) == first
    assert {path: path.read_bytes() for path in first} == bytes_of
    assert not stale.exists()


def test_without_records_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="records/ablations: no records; run `dvc repro` first"):
        build_ablation_report(suite(depth=one_at_a_time()[0]), tmp_path)
    assert "no study" in build_ablation_report(suite(), tmp_path)[-1].read_text()


def test_values_are_shown_as_people_write_them() -> None:
    shown = [value_text(v) for v in ([2, 2, 1], 0.00123456, True, None, "none", [[0, 1], 2])]
    assert shown == ["2, 2, 1", "0.00123", "yes", "default", "none", "0, 1, 2"]
    assert [value_text(v) for v in (0.99, 0.9999, 0.99999, 1.0)] == ["0.99", "0.9999", "0.99999", "1"]


def test_close_values_of_an_axis_are_not_merged() -> None:
    values = (0.9995, 0.9999, 0.99999)
    axis = {"path": "train.momentum", "values": values}
    settings = StudyConfig.model_validate({"kind": "grid", "model": "sunet_tiny", "seeds": [0], "axes": [axis]})
    records = [trial(n, {"train.momentum": v}, 0, 0.4 + 0.1 * n, reference=n == 0) for n, v in enumerate(values)]
    scores = Study("momentum", settings, records, "SUNet-tiny").marginal("train.momentum")
    assert [score[0] for score in scores.values()] == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize("end", ["axes", "variance", "trials", "history", "recipes", "object_size"])
def test_a_study_whose_files_another_one_has_is_refused_before_anything_is_deleted(end: str, tmp_path: Path) -> None:
    page = tmp_path / "results/synthetic/ablations/depth_axes.md"
    page.parent.mkdir(parents=True)
    page.write_text("of the last report")
    settings, records = MADE["depth"]()
    studies = dict.fromkeys(("depth", f"depth_{end}"), settings)
    for name in studies:
        write_json(tmp_path / f"results/synthetic/records/ablations/{name}.json", records)
    with pytest.raises(ReportError, match=rf"ablations\.depth_{end}: files of the study depth have this name; rename"):
        build_ablation_report(suite(**studies), tmp_path)
    assert page.read_text() == "of the last report"


def test_two_reports_at_once_do_not_delete_each_other_s_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sunets.core.stage.LOCK_SECONDS", 0.1)

    def second(*_: Any, **__: Any) -> None:
        build_ablation_report(suite(), tmp_path)

    (tmp_path / "results/synthetic/ablations").mkdir(parents=True)
    monkeypatch.setattr(report_page.shutil, "rmtree", second)
    with pytest.raises(StageError, match="ablation_report: already running in this checkout; wait for it"):
        build_ablation_report(suite(), tmp_path)


# --- back to the trials ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of results with records and tables of every kind of study; tests only read it."""
    root = tmp_path_factory.mktemp("traced")
    for name, make in MADE.items():
        write_json(root / f"synthetic/records/ablations/{name}.json", make()[1])
        for table in (settings_table, axes_table, variance_table, pareto_table, sampled_table):
            if (made := table(study(name))) is not None:
                write(made, root / "synthetic/ablations")
    return root


def trials_of(text: str) -> list[int]:
    """Numbers of the trials behind a number, without those that it is compared with or was chosen by."""
    return [int(n) for n in re.findall(r"(?m)^  trial (\d+), ", text.partition("git commit")[0])]


@pytest.mark.parametrize(
    ("table", "row", "column", "which"),
    [
        ("depth", "1/16", "score.miou", lambda r: r["arm"] == {"model.unet_depth": 1, "model.output_stride": 16}),
        ("joint", "3/4/8/none", "Multiply-adds (G)", lambda r: list(r["arm"].values()) == [3, 4, 8, "none"]),
        ("joint_axes", "model.unet_depth/3", "mIoU (%)", lambda r: r["arm"]["model.unet_depth"] == 3),
        ("joint_axes", "model.dilation/multi_grid", "score.miou.mean",
         lambda r: r["arm"]["model.dilation"] == "multi_grid"),
        ("joint_variance", "seed", "share", lambda r: True),
        ("tuned", "1", "score.miou.difference.mean",
         lambda r: r["phase"] == "confirmation" and r["arm"]["model.unet_depth"] == 1),
        ("tuned_trials", "3", "search.miou", lambda r: r["number"] == 3),
        ("pareto", "4/7", "n_seeds",
         lambda r: r["phase"] == "confirmation" and list(r["arm"].values()) == [4, 7]),
        ("pareto_trials", "5", "status", lambda r: r["number"] == 5),
    ],
)  # fmt: skip
def test_explain_leads_from_every_table_of_a_study_to_its_trials(
    table: str, row: str, column: str, which: Callable[[Record], bool], traced: Path
) -> None:
    text = explain(traced, "synthetic", f"ablations/{table}", row, column)
    records = MADE[table.partition("_")[0]]()[1]
    used = [r for r in records if which(r)]
    assert trials_of(text) == [r["number"] for r in used]
    for r in used:
        assert f"trial {r['number']}, {r['phase']}, seed {r['seed']}, " in text
        values = {**r["scores"], **r["cost"]} if r["status"] == "finished" else {}
        key = "cost.gmacs" if column.startswith("Multiply") else "search.miou" if "_trials" in table else "score.miou"
        assert (f": {key} = {values[key]}\n" if values else f": {r['status']}: {r['reason']}\n") in text
    for part in ("git commit: 0123456789abcdef", "data digest: d", "code hash: c", "command: python -m ablations run s",
                 f"records/ablations/{table.partition('_')[0]}.json"):  # fmt: skip
        assert part in text


def test_the_trials_that_explain_names_make_the_mean_of_the_table(tmp_path: Path) -> None:
    """Of an axis, over those settings alone whose partners have scores too."""
    settings, records = grid_without_a_partner()
    write_json(tmp_path / "synthetic/records/ablations/joint.json", records)
    table = axes_table(Study("joint", settings, records, "SUNet-tiny"))
    assert table is not None
    write(table, tmp_path / "synthetic/ablations")
    text = explain(tmp_path, "synthetic", "ablations/joint_axes", "model.num_blocks/1", "score.miou")
    stated = float(re.findall(r"score\.miou\.mean = (\S+)", text)[0])
    trials = [line for line in text.partition("git commit")[0].splitlines() if line.startswith("  trial ")]
    scores = [float(line.rpartition(" = ")[2]) for line in trials]
    # At stride 16 a training counts under both names of its schedule.
    weights = [2 if "model.output_stride = 16" in line else 1 for line in trials]
    assert np.average(scores, weights=weights) == pytest.approx(stated, abs=1e-12)


def test_explain_shows_the_learning_rates_that_a_setting_was_chosen_from_and_its_reference(traced: Path) -> None:
    text = explain(traced, "synthetic", "ablations/tuned", "1", "score.miou")
    chosen, compared = text.split("the sampler's trials with this setting, scored on the val split:")[1].split(
        "difference from "
    )
    tried = re.findall(r"trial (\d+), tuning, seed 100, model\.unet_depth = \d, train\.lr = 0\.\d+, train\.w", chosen)
    assert tried == [str(n) for n in range(10)]
    for r in tuned()[1][:10]:
        assert (f": search.miou = {r['scores']['search.miou']}\n" if r["scores"] else ": pruned: Tr") in chosen
    assert compared.startswith("U-Net depth 2, paired by seed:\n  trial 23, confirmation, seed 0")


@pytest.mark.parametrize(
    ("table", "row", "column", "message"),
    [
        ("deep", "1", "share", "ablations/deep: no such table in .*; there are ablations/depth, .*, claims$"),
        ("depth", "5/16", "share", "5/16: no row of table ablations/depth; there are 2, 2, 1/16, 1/16, 3/16, "),
        ("depth", "1/16", "loss", "loss: no column of table ablations/depth; there are study, .*, score.miou, "),
    ],
)
def test_explain_names_what_a_study_has(table: str, row: str, column: str, message: str, traced: Path) -> None:
    with pytest.raises(ReportError, match=message):
        explain(traced, "synthetic", f"ablations/{table}", row, column)


@pytest.mark.parametrize("name", MADE)
def test_rows_of_a_table_for_a_paper_keep_the_names_of_their_settings(name: str, traced: Path) -> None:
    head = (traced / f"synthetic/ablations/{name}.tex").read_text().partition(r"\midrule")[0]
    shown = [axis_name(axis.path).split()[0] for axis in MADE[name]()[0].axes]
    assert len(shown) == head.partition(r"\toprule")[2].partition("mIoU")[0].count("&")
    assert all(word in head for word in shown)


def front(records: Sequence[Record]) -> list[Record]:
    """Finished trials of a search that no other beats in score at as few multiply-adds, equals once."""
    seen = [r for r in records if r["phase"] == "search" and r["scores"]]
    points = [(r["scores"]["search.miou"], -r["cost"]["cost.gmacs"]) for r in seen]
    beaten = [any(p != q and p[0] <= q[0] and p[1] <= q[1] for q in points) for p in points]
    return [r for r, lost in zip(seen, beaten, strict=True) if not lost]


def test_a_pareto_front_leads_to_its_trials_and_to_those_that_were_trained_again(traced: Path) -> None:
    records = search()[1]
    table = pareto_table(study("pareto"))
    assert table is not None
    assert sorted(table.data.number) == [r["number"] for r in front(records)]
    assert table.data["cost.gmacs"].is_monotonic_increasing
    confirmed = [r for r in front(records) if list(r["arm"].values()) == [4, 7]]
    (r,) = confirmed
    text = explain(traced, "synthetic", "ablations/pareto_pareto", str(r["number"]), "search.miou")
    assert trials_of(text) == [r["number"]]
    assert f"seed 100, model.num_blocks = 7, model.unet_depth = 4: search.miou = {r['scores']['search.miou']}\n" in text
    again = text.partition("trained again on every seed:")[2]
    assert re.findall(r"confirmation, seed (\d), .*: score\.miou = ", again) == ["0", "1", "2"]
    dominated = next(t["number"] for t in records if t["phase"] == "search" and t not in front(records))
    with pytest.raises(ReportError, match=rf"{dominated}: no row of table ablations/pareto_pareto; there are "):
        explain(traced, "synthetic", "ablations/pareto_pareto", str(dominated), "search.miou")
    assert pareto_table(study("tuned")) is None


def test_one_explainer_reads_each_file_once(traced: Path, tmp_path: Path) -> None:
    shutil.copytree(traced, tmp_path, dirs_exist_ok=True)
    explainer = Explainer(tmp_path)
    first = explainer.explain("synthetic", "ablations/depth", "1/16", "score.miou")
    for path in tmp_path.rglob("depth.*"):
        path.write_text('"damaged')
    assert explainer.explain("synthetic", "ablations/depth", "1/16", "score.miou") == first
    with pytest.raises(RecordError, match=r"depth\.json: not valid JSON"):
        explain(tmp_path, "synthetic", "ablations/depth", "1/16", "score.miou")


def test_the_legend_of_many_arms_stays_on_the_figure() -> None:
    settings, records = tuned()
    for record in records:
        record["arm"] = {"model.unet_depth": record["number"] % 8, "model.dilation": "a schedule of a long name"}
    values = {"model.unet_depth": range(8), "model.dilation": ("a schedule of a long name",)}
    many = config("tuned", values, nuisance=settings.nuisance, trials=2, seeds=[0, 1, 2])
    fig = history_figure(Study("many", many, records, "SUNet-tiny"))
    assert fig is not None
    fig.draw_without_rendering()
    box = fig.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= fig.bbox.x1
    assert box.y0 >= 0


def test_cells_of_an_interaction_average_the_same_settings_of_the_other_axes() -> None:
    settings, records = grid()
    for record in records:
        depth, blocks, *others = record["arm"].values()
        if others == [8, "none"]:  # a poor setting, which one cell lacks
            lost = {"scores": {}, "status": "failed", "reason": "lost"}
            record |= lost if (depth, blocks) == (1, 1) else {"scores": {"score.miou": 0.1}}
    fig = interaction_figure(Study("grid", settings, records, "SUNet-tiny"))
    assert fig is not None
    shown = [float(text.get_text()) for text in fig.axes[0].texts]
    expected = [30 + 3 * depth + blocks for depth, blocks in itertools.product((1, 2, 3), (1, 2, 4))]
    assert shown == pytest.approx(expected, abs=1.0)


def test_colours_of_an_interaction_span_the_noise_of_its_cells() -> None:
    made = study("joint")
    for setting in made.settings:  # equal means: all that differs is noise
        setting.scores.update({seed: 0.5 + 0.1 * seed + 0.001 * len(str(setting.arm)) for seed in range(3)})
    fig = interaction_figure(made)
    assert fig is not None
    low, high = fig.axes[0].collections[0].get_clim()
    estimate = mean_interval([50.0, 60.0, 70.0])
    assert high - low == pytest.approx(2 * (estimate.half_width or 0), rel=0.01)


def test_a_table_older_than_its_records_is_named(traced: Path, tmp_path: Path) -> None:
    shutil.copytree(traced, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / "synthetic/records/ablations/depth.json", one_at_a_time()[1][:7])
    with pytest.raises(
        RecordError, match=r"depth\.csv: trial 7 is not in .*depth\.json; run .*ablations report` again"
    ):
        explain(tmp_path, "synthetic", "ablations/depth", "1/16", "score.miou")

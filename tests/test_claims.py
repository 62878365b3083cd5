"""What the paper claims, judged on records made up here: one case for each verdict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_report import record, write

from sunets.core.record import RecordError, parameters_hash
from sunets.report import claims, tables
from sunets.report.claims import Finding, claims_table, findings, judge, read_results
from sunets.report.explain import explain
from sunets.report.page import index_page
from sunets.report.records import ReportError, speed_rows
from sunets.report.write import Table
from sunets.report.write import write as write_table

NOISE = (0.0, 0.004, -0.003)
"""What the seeds differ by: small against the margin of two points."""


def made(kind: str, model: str, **fields: Any) -> dict[str, Any]:
    """A record whose fingerprint is that of its parameters."""
    row = record(kind, fields.pop("key", model), model, **fields)
    row["params"] = row["params"] | {"model.name": model} | fields.get("params", {})
    row["provenance"] = row["provenance"] | {"config_hash": parameters_hash(row["params"])}
    return row


def benchmark(results: Path, name: str, models: dict[str, tuple[float, float]], **other: Any) -> None:
    """Write a benchmark: model -> (mIoU, million parameters).

    `boundary` and `field` give boundary F and theoretical field by model; `epochs` those of a model that differ;
    `spread` is what the seeds' differences grow by from model to model.
    """
    for index, (model, (score, params_m)) in enumerate(models.items()):
        boundary, spread = other.get("boundary", {}).get(model, 0.5), other.get("spread", 1 / 9) * index
        params = {"train.epochs": other.get("epochs", {}).get(model, 9)}
        rows = [
            made("evaluate", model, benchmark=name, seed=seed, variant="single_scale", params=params,
                 scores={"score.miou": score + noise + spread * noise, "score.boundary_f": boundary + spread * noise})
            for seed, noise in enumerate(NOISE)
        ]  # fmt: skip
        write(results / name / "records/evaluate" / f"{model}.json", rows)
        figures = {
            "cost.params_m": params_m, "receptive_field.effective_share": 0.9,
            "receptive_field.theoretical_px": other.get("field", {}).get(model, 96),
        }  # fmt: skip
        row = made("cost", model, benchmark=name, cost=figures, params={"cost.size": [96, 96]})
        write(results / name / "records/cost" / f"{model}.json", row)


def zoo(
    results: Path, saved: dict[tuple[str, int], tuple[float, float]], steps: dict[str, tuple[float, float]]
) -> None:
    """Write the zoo: (model, stride) -> (million parameters, MiB saved); model -> (step in ms, interquartile range)."""
    rows = [
        made("cost", model, benchmark="zoo", cost={"cost.params_m": params, "memory.saved_mib": mib,
             "cost.output_stride": stride, "cost.uncounted_operators": "relu, cat" if model[0] == "s" else "relu"})
        for (model, stride), (params, mib) in saved.items()
    ]  # fmt: skip
    write(results / "zoo/records.json", rows)
    timed = [made("speed", m, cost={"speed.step_ms": ms, "speed.step_iqr_ms": iqr}) for m, (ms, iqr) in steps.items()]
    write(results / "zoo/speed.json", timed)


def found(results: Path, claim: tuple[str, str], name: str = "") -> Finding:
    rows = [f for f in findings(read_results(results)) if f.claim == claim and name in ("", f.benchmark)]
    (finding,) = rows
    return finding


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([True, True], "shown"), ([True, None], "not shown"), ([True, False], "not shown"), ([None], "not shown"),
        ([False, None], "not shown"), ([False, False], "refuted"), ([], "not tested here: nothing comparable"),
    ],
)  # fmt: skip
def test_verdict_of_several_comparisons(outcomes, verdict) -> None:
    assert judge(outcomes) == verdict


@pytest.mark.parametrize(
    ("models", "verdict"),
    [
        ({"sunet64": (0.70, 6.0), "dilated_resnet18": (0.60, 13.0), "resnet": (0.701, 20.0)}, "shown"),
        ({"sunet64": (0.70, 6.0), "dilated_resnet18": (0.60, 13.0), "unet": (0.80, 1.0)}, "not shown"),
        ({"sunet64": (0.70, 6.0), "dilated_resnet18": (0.80, 13.0), "unet": (0.60, 1.0)}, "refuted"),
        ({"sunet64": (0.70, 6.0), "unet": (0.80, 1.0)}, "refuted"),
        ({"sunet64": (0.70, 6.0), "unet": (0.60, 1.0)}, "not tested here: nothing comparable"),
    ],
)
def test_accuracy_is_held_against_networks_with_more_parameters(tmp_path: Path, models, verdict) -> None:
    benchmark(tmp_path, "camvid", models)
    finding = found(tmp_path, claims.ACCURACY, "camvid")
    assert finding.verdict == verdict
    assert "mIoU of sunet64 (6.000 M): 70.03 [69.13, 70.92] %; compared with it, " in finding.measured
    assert "], worse" in finding.measured or "better" in finding.measured
    assert finding.table == "camvid/tables/accuracy.md"


def test_what_is_undecided_against_fewer_parameters_does_not_show_accuracy(tmp_path: Path) -> None:
    models = {"sunet64": (0.70, 6.0), "unet": (0.715, 1.0), "dilated_resnet18": (0.30, 13.0)}
    benchmark(tmp_path, "camvid", models, spread=2)
    finding = found(tmp_path, claims.ACCURACY, "camvid")
    assert "undecided" in finding.measured
    assert finding.verdict == "not shown"


def test_a_claim_says_what_its_table_says(tmp_path: Path) -> None:
    """The local network is compared as one of three: alone it is surely worse, and of three undecided."""
    models = {"sunet_tiny": (0.70, 0.2), "plain_conv_small": (0.68, 0.2), "unet_small": (0.69, 0.3), "b": (0.69, 0.3)}
    benchmark(tmp_path, "synthetic", models, field={"plain_conv_small": 27}, spread=1.5)
    records = read_results(tmp_path).benchmarks["synthetic"]
    verdict = tables.accuracy(records, "sunet_tiny").view.set_index("Model").Verdict["plain_conv_small"]
    assert re.fullmatch(r"undecided \(worse before Holm; \d\.\d points detectable\)", verdict)
    finding = found(tmp_path, claims.GLOBAL)
    assert verdict in finding.measured
    assert finding.verdict == "not shown"


def test_accuracy_of_another_budget_decides_nothing(tmp_path: Path) -> None:
    models = {"sunet64": (0.70, 6.0), "dilated_resnet18": (0.60, 13.0)}
    benchmark(tmp_path, "camvid", models, epochs={"dilated_resnet18": 60})
    finding = found(tmp_path, claims.ACCURACY, "camvid")
    assert finding.verdict == "not tested here: nothing comparable"
    assert "not comparable: train.epochs" in finding.measured


def test_a_benchmark_of_which_nothing_was_scored_stops_no_other(tmp_path: Path) -> None:
    benchmark(tmp_path, "camvid", {"sunet64": (0.70, 6.0), "dilated_resnet18": (0.60, 13.0)})
    timed = [made("speed", "net", cost={"speed.step_ms": 1.0})]
    counted = made("cost", "net", benchmark="counted", cost={"cost.params_m": 1.0})
    write(tmp_path / "timed/records/speed.json", timed)
    write(tmp_path / "counted/records/cost/net.json", counted)
    assert [*read_results(tmp_path).benchmarks] == ["camvid", "counted"]
    assert "camvid" in index_page(tmp_path)


def test_a_model_that_was_removed_makes_no_claim(tmp_path: Path) -> None:
    benchmark(tmp_path, "camvid", {"sunet64": (0.70, 6.0), "dilated_resnet18": (0.60, 13.0), "old": (0.9, 20.0)})
    write(tmp_path / "camvid/tables/report.json", {"models": ["sunet64", "dilated_resnet18"]})
    assert "old" not in found(tmp_path, claims.ACCURACY, "camvid").measured


def test_claims_take_the_differences_that_a_benchmark_declares(tmp_path: Path) -> None:
    models = {"sunet64": (0.70, 6.0), "dilated_resnet18": (0.60, 13.0)}
    benchmark(tmp_path, "camvid", models, epochs={"dilated_resnet18": 60})
    settings = tmp_path / "camvid/tables/report.json"
    write(settings, {"reference": "sunet64", "declared_differences": ["train.epochs"]})
    assert found(tmp_path, claims.ACCURACY, "camvid").verdict == "shown"
    write(settings, {"margin": 1})
    assert "report.json" in read_results(tmp_path).unreadable["camvid"]


def test_a_damaged_table_of_another_benchmark_is_named(tmp_path: Path) -> None:
    benchmark(tmp_path, "camvid", {"sunet64": (0.7, 6.0)})
    (tmp_path / "camvid/README.md").write_text("# CamVid\n")
    (tmp_path / "camvid/tables").mkdir()
    (tmp_path / "camvid/tables/accuracy.csv").write_text("model,n_seeds\n<<<<<<< HEAD\n")
    assert f"Not counted: {tmp_path}/camvid/tables/accuracy.csv" in index_page(tmp_path)


def test_a_benchmark_of_sunets_alone_has_no_row(tmp_path: Path) -> None:
    benchmark(tmp_path, "camvid", {"sunet64": (0.70, 6.0), "sunet128": (0.75, 22.0)})
    benchmark(tmp_path, "other", {"sunet64": (0.70, 6.0), "dilated_resnet18": (0.60, 13.0)})
    rows = [f.benchmark for f in findings(read_results(tmp_path)) if f.claim == claims.ACCURACY]
    assert "other" in rows
    assert "camvid" not in rows


def test_data_of_the_paper_that_have_not_been_run_say_so(tmp_path: Path) -> None:
    benchmark(tmp_path, "voc_small", {"sunet64": (0.7, 6.0), "dilated_resnet18": (0.6, 13.0)})
    assert found(tmp_path, claims.ACCURACY, "imagenet").verdict == "not run"
    with pytest.raises(ValueError):
        found(tmp_path, claims.ACCURACY, "voc")
    for claim in (claims.MEMORY, claims.SPEED):
        assert found(tmp_path, claim).verdict == "not run"


@pytest.mark.parametrize(
    ("control", "verdict"), [(0.3, "shown"), (0.701, "refuted"), (0.9, "refuted"), (None, "not run")]
)
def test_global_information_is_held_against_a_network_that_sees_a_neighbourhood(tmp_path, control, verdict) -> None:
    models = {"sunet_tiny": (0.7, 0.2), "unet_small": (0.2, 0.3)}
    if control is not None:
        models["plain_conv_small"] = (control, 0.2)
    benchmark(tmp_path, "synthetic", models, field={"plain_conv_small": 27})
    finding = found(tmp_path, claims.GLOBAL)
    assert finding.verdict == verdict
    if control is not None:
        assert "unet_small" not in finding.measured
        assert "95 % of the untrained network's input gradient: sunet_tiny 90.0 %" in finding.measured


@pytest.mark.parametrize(
    ("boundary", "verdict"),
    [
        ({"sunet_tiny": 0.6, "a": 0.4, "b": 0.601}, "shown"),
        ({"sunet_tiny": 0.6, "a": 0.4, "b": 0.8}, "not shown"),
        ({"sunet_tiny": 0.6, "a": 0.9, "b": 0.8}, "refuted"),
    ],
)
def test_resolution_is_held_against_networks_that_see_the_whole_image(tmp_path, boundary, verdict) -> None:
    models = {"sunet_tiny": (0.7, 0.2), "a": (0.7, 0.3), "b": (0.7, 0.3), "plain": (0.2, 0.2)} | {
        "unmeasured": (0.2, 0.2)
    }
    benchmark(tmp_path, "synthetic", models, boundary=boundary | {"plain": 0.99, "unmeasured": 0.99},
              field={"plain": 27, "unmeasured": None})  # fmt: skip
    assert found(tmp_path, claims.RESOLUTION).verdict == verdict


SUNET, BIG, SMALL = ("sunet64", 8), ("deeplabv3_resnet101", 8), ("unet_small", 8)


@pytest.mark.parametrize(
    ("saved", "verdict", "words"),
    [
        ({SUNET: (6, 500), BIG: (58, 1000), SMALL: (0.3, 1)}, "shown", "0.50 to 0.50 times"),
        ({SUNET: (6, 500), BIG: (58, 1000), ("dilated_resnet18", 8): (13, 250)}, "not shown",
         "not smaller in 1: sunet64 / dilated_resnet18 at stride 8 (2.00)"),
        ({SUNET: (6, 500), BIG: (58, 400)}, "refuted", "not smaller in 1"),
        ({SUNET: (6, 500), ("deeplabv3_resnet101", 16): (58, 1000)}, "not run", ""),
    ],
)  # fmt: skip
def test_memory_is_held_against_larger_networks_at_the_same_stride(tmp_path, saved, verdict, words) -> None:
    zoo(tmp_path, saved, {})
    finding = found(tmp_path, claims.MEMORY)
    assert finding.verdict == verdict
    assert words in finding.measured


def test_memory_states_the_measured_peak_or_that_there_is_none(tmp_path: Path) -> None:
    zoo(tmp_path, {SUNET: (6, 500), BIG: (58, 1000)}, {"sunet64": (50, 1), "deeplabv3_resnet101": (90, 1)})
    assert found(tmp_path, claims.MEMORY).measured.endswith("; no peak measured, which needs a GPU")
    timed = read_results(tmp_path).zoo_speed
    write(
        tmp_path / "zoo/speed.json",
        [r | {"cost": r["cost"] | {"memory.peak_mib": 100 * n}} for n, r in enumerate(timed, 2)],
    )
    assert "; measured peak 0.67 to 0.67 times that of the larger network" in found(tmp_path, claims.MEMORY).measured


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [
        ({"sunet64": (50, 1), "deeplabv3_resnet101": (90, 1)}, "shown"),
        ({"sunet64": (90, 1), "deeplabv3_resnet101": (50, 1)}, "refuted"),
        ({"sunet64": (50, 10), "deeplabv3_resnet101": (52, 10)}, "not shown"),
    ],
)
def test_speed_is_held_against_larger_networks_of_the_same_run(tmp_path, steps, verdict) -> None:
    zoo(tmp_path, {SUNET: (6, 500), BIG: (58, 1000)}, steps)
    finding = found(tmp_path, claims.SPEED)
    assert finding.verdict == verdict
    assert "A CPU, 1 thread" in finding.measured
    close = "within the noise of the rounds in 1: sunet64 / deeplabv3_resnet101 (0.96)"
    assert (close in finding.measured) == ("noise" in finding.measured) == (verdict == "not shown")


def test_what_no_record_measures_is_not_tested(tmp_path: Path) -> None:
    zoo(tmp_path, {SUNET: (6, 500), BIG: (58, 1000)}, {})
    finding = found(tmp_path, claims.SIMPLE)
    assert finding.verdict.startswith("not tested here: no record measures it")
    assert "2 operators besides convolution and linear layers (cat, relu)" in finding.measured
    assert "no other network needs cat" in finding.measured


def test_results_open_with_the_claims(tmp_path: Path) -> None:
    benchmark(tmp_path, "camvid", {"sunet64": (0.7, 6.0), "dilated_resnet18": (0.6, 13.0)})
    page = index_page(tmp_path)
    assert page.startswith("# Results\n\n**What the paper claims about SUNets, and what the records here say.**")
    text = claims_table(read_results(tmp_path))
    for claim in (claims.ACCURACY, claims.GLOBAL, claims.RESOLUTION, claims.MEMORY, claims.SPEED, claims.SIMPLE):
        assert text.count(f"| {claim[0]} ") == 1
    assert "[accuracy](camvid/tables/accuracy.md)" in text
    assert "**shown**" in text


def test_a_benchmark_of_another_version_is_left_out_by_name(tmp_path: Path) -> None:
    benchmark(tmp_path, "camvid", {"sunet64": (0.7, 6.0)})
    write(tmp_path / "old/records/evaluate/sunet64.json", [{"kind": "evaluate"}])
    write(tmp_path / "zoo/records.json", [{"kind": "profile"}])
    (tmp_path / "empty/records").mkdir(parents=True)
    read = read_results(tmp_path)
    assert set(read.benchmarks) == {"camvid"}
    assert set(read.unreadable) == {"old", "zoo"}
    page = index_page(tmp_path)
    assert "Left out, since its records cannot be read: old (" in page
    assert "evaluate/sunet64.json: record 0 lacks status" in page


@pytest.mark.parametrize(
    ("row", "column", "parts"),
    [
        ("Accuracy with few parameters/camvid", "verdict",
         ("Verdict = shown", "table: camvid/tables/accuracy.md", "would be shown by: At least as accurate",
          "from 8 records in {root}/camvid/records:", "sunet64, evaluate, seed 1, variant single_scale: score.miou = ",
          "dilated_resnet18, cost: cost.params_m = 13.0", "(of sunet64)", "git commit: 0123456789abcdef0123")),
        ("Low memory", "Measured",
         ("0.50 to 0.50 times", "from 2 records in {root}/zoo:", "memory.saved_mib = 500", "memory.saved_mib = 1000")),
        ("Fast training", "Verdict", ("Verdict = shown", "speed.step_ms = 50, speed.step_iqr_ms = 1")),
        ("Simple and portable", "Verdict", ("not tested here", "cost.uncounted_operators = relu, cat")),
        ("Global information ...", "Verdict", ("Verdict = not run", "no record: it has not been run")),
    ],
)  # fmt: skip
def test_explain_leads_from_a_claim_to_the_records_compared(tmp_path: Path, row, column, parts) -> None:
    benchmark(tmp_path, "camvid", {"sunet64": (0.70, 6.0), "dilated_resnet18": (0.60, 13.0)})
    zoo(tmp_path, {SUNET: (6, 500), BIG: (58, 1000)}, {"sunet64": (50, 1), "deeplabv3_resnet101": (90, 1)})
    text = explain(tmp_path, "camvid", "claims", row, column)
    assert text.startswith(f"table claims, row {row}\n")
    for part in parts:
        assert part.format(root=tmp_path) in text


def test_explain_names_the_claims_and_their_columns(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"Speed: no row of table claims; there are Accuracy .*/imagenet, .*Fast tr"):
        explain(tmp_path, "camvid", "claims", "Speed", "Verdict")
    with pytest.raises(ReportError, match="Accuracy with few parameters: several rows of table claims"):
        explain(tmp_path, "camvid", "claims", claims.ACCURACY[0], "Verdict")
    with pytest.raises(ReportError, match=r"mean: no column of table claims; there are Claim, .*, Verdict, Table"):
        explain(tmp_path, "camvid", "claims", claims.MEMORY[0], "mean")


def test_explain_knows_the_tables_of_the_zoo(tmp_path: Path) -> None:
    zoo(tmp_path, {SUNET: (6, 500), BIG: (58, 1000)}, {"sunet64": (50, 1)})
    records = read_results(tmp_path).zoo
    write_table(Table("cost_segmentation", "Cost", *tables.cost_frames(records)), tmp_path / "zoo")
    text = explain(tmp_path, "camvid", "zoo/cost_segmentation", "sunet64", "cost.params_m")
    assert f"from 1 record in {tmp_path}/zoo/records.json:\n  cost: cost.params_m = 6\n" in text
    timed = read_results(tmp_path).zoo_speed
    write_table(tables.speed_table("Speed", speed_rows(timed), timed[0]), tmp_path / "zoo")
    text = explain(tmp_path, "camvid", "zoo/speed", "sunet64", "Training step (ms)")
    assert f"from 1 record in {tmp_path}/zoo/speed.json:\n  speed: speed.step_ms = 50\n" in text
    write(tmp_path / "zoo/records.json", records[1:])
    with pytest.raises(
        RecordError, match=r"records\.json: has no record of sunet64, a row of .*; run `make zoo` again"
    ):
        explain(tmp_path, "camvid", "zoo/cost_segmentation", "sunet64", "cost.params_m")

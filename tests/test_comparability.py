"""Rows that differ in more than their network are not compared: edited records, declared differences, tuned recipes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from test_report import fabricate, make_suite, record, write

from sunets.core.config import ConfigError, Suite, load
from sunets.core.record import RecordError, parameters_hash, write_rows
from sunets.report import figures, tables
from sunets.report.comparison import differing_settings, estimate_columns, estimate_text
from sunets.report.page import findings
from sunets.report.records import Records, Runs, find_records, load_records, quantity
from sunets.report.statistics import Estimate

SUNET, OTHER = "sunet_tiny", "plain_conv_small"


@pytest.fixture
def suite() -> Suite:
    return make_suite({SUNET: None, OTHER: None}, (0, 1, 2))


def edited(root: Path, suite: Suite, edit: Callable[[dict[str, Any]], Any], kinds: str = "train evaluate") -> Records:
    """The records of made-up results, those of one model changed by somebody who keeps the fingerprints right."""
    fabricate(root, suite)
    for kind in kinds.split():
        path = root / f"results/toy/records/{kind}/{OTHER}.json"
        rows = json.loads(path.read_text())
        for row in rows:
            edit(row)
            row["provenance"]["config_hash"] = parameters_hash(row["params"])
        path.write_text(json.dumps(rows))
    return load_records(suite, root)


def verdict(records: Records) -> str:
    table = tables.accuracy(records, SUNET)
    return str(table.data.set_index("model").loc[OTHER, "score.miou.difference.verdict"])


def parameter(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda r: r["params"].update({key: value})


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "data": (lambda r: r["provenance"].update(data_digest="ab" * 8), "data_digest abababababababab / d1d1d1d1d1d1d1d1"),
    "code": (lambda r: r["provenance"].update(code_hash="beef"), "code_hash of evaluate beef / c0dec0dec0dec0de"),
    "epochs": (parameter("train.epochs", 60), "train.epochs 60 / 9"),
    "batch": (parameter("train.batch_size", 8), "train.batch_size 8 / 16"),
    "crop": (parameter("train.augment.crop", [64, 64]), "train.augment.crop [64, 64] / absent"),
    "split": (parameter("data.test_split", "train"), "data.test_split train / test"),
    "scale": (parameter("evaluate.variants.single_scale.scales", [0.5]), "evaluate.variants.scales [0.5] / absent"),
    "augmentation": (parameter("train.augment.flip", True), "train.augment.flip true / absent"),
    "precision": (parameter("train.amp", "bf16"), "train.amp bf16 / absent"),
    "scoring": (parameter("evaluate.boundary_tolerance", 0.1), "evaluate.boundary_tolerance 0.1 / absent"),
    "recipe": (parameter("train.lr", 0.01), "train.lr 0.01 / 0.003"),
    "tuning": (parameter("tune.trials", 30), "tune.trials 30 / absent"),
    "start": (parameter("train.zero_init_head", True), "train.zero_init_head true / absent"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_record_is_not_compared(name, suite, tmp_path) -> None:
    edit, difference = EDITS[name]
    records = edited(tmp_path, suite, edit)
    found = verdict(records)
    assert found.startswith(f"not comparable: {difference}")
    table = tables.accuracy(records, SUNET)
    row = table.data.set_index("model").loc[OTHER]
    assert row[["score.miou.difference.mean", "score.miou.difference.p", "score.miou.difference.p_holm"]].isna().all()
    assert found in table.view.iloc[1].tolist()
    marked = f"{OTHER} (not comparable)"
    assert marked in tables.row_labels(records).values()
    for made in (tables.per_class(records), tables.object_size(records)):
        assert marked in made.view.Model.tolist()
    for draw in (figures.per_class, figures.training_curves, figures.confusion):
        shown = draw(records)
        texts = [text.get_text().replace("\n", " ") for text in shown.findobj(Text)]
        assert marked in texts, draw.__name__
        figures.plt.close(shown)
    sentences = findings(suite, records)
    assert f"({found})" in sentences[0]
    assert f"Compared with sunet_tiny, {found}: plain_conv_small." in sentences


def test_figures_name_rows_that_are_not_comparable(suite, tmp_path) -> None:
    records = edited(tmp_path, suite, parameter("train.epochs", 60))
    labels = [t.get_text() for t in figures.accuracy(records).axes[0].get_yticklabels()]
    assert labels == [SUNET, f"{OTHER} (not comparable)"]
    (legend,) = figures.accuracy_cost(records).legends
    assert [t.get_text() for t in legend.get_texts()] == labels
    figures.plt.close("all")


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_one_edited_kind_of_record_is_enough(kind, suite, tmp_path) -> None:
    assert "train.epochs" in verdict(edited(tmp_path, suite, parameter("train.epochs", 60), kind))


def test_records_of_the_same_protocol_are_compared(suite, tmp_path) -> None:
    for edit in (
        parameter("model.output_stride", 8),
        parameter("train.threads", 7),
        parameter("data.root", "elsewhere"),
        lambda r: r["params"].update({"train.init_from": f"outputs/a/{r['model']}/seed{r['seed']}.pt"}),
    ):
        records = edited(tmp_path, suite, edit)
        if "train.init_from" in records.raw[f"train/{OTHER}.json"][0]["params"]:
            for r in (*records.raw[f"train/{SUNET}.json"], *records.raw[f"evaluate/{SUNET}.json"]):
                edit(r)
        assert verdict(records) == "worse"


def test_one_seed_of_another_budget_is_named(suite, tmp_path) -> None:
    records = edited(tmp_path, suite, lambda r: r["params"].update({"train.epochs": 9 if r["seed"] else 6}))
    assert verdict(records) == "not comparable: train.epochs 6 / 9"


def test_several_differences_are_counted_and_the_code_goes_last(suite, tmp_path) -> None:
    def edit(r: dict[str, Any]) -> None:
        r["params"].update({"train.lr": 1.0, "train.epochs": 6})
        r["provenance"]["code_hash"] = "beef"

    assert verdict(edited(tmp_path, suite, edit)) == "not comparable: train.epochs 6 / 9 and 3 more"


def test_what_equal_tuning_chose_is_no_obstacle(suite, tmp_path) -> None:
    fabricate(tmp_path, suite)
    fabricate_tuning(tmp_path, suite)
    records = load_records(suite, tmp_path)
    assert verdict(records) == "worse"
    for kind, key, value, expected in (
        ("train", "tune.trials", 9, "not comparable: tune.trials 4, 9 / 4"),
        ("train", "train.warmup_epochs", 3, "not comparable: train.warmup_epochs 3 / absent"),
        ("tune", "tune.epochs", 2, "not comparable: tune.epochs 2, 3 / 3"),
    ):
        other = load_records(suite, tmp_path)
        for r in other.raw[f"{kind}/{OTHER}.json"]:
            r["params"][key] = value
        assert verdict(other) == expected
    for left_out, expected in (
        ({"train.lr": "no such thing"}, "worse"),
        ({"train.lr": "fixed by models.plain_conv_small.train"}, "not comparable: train.lr 0.01 / 0.02"),
    ):
        other = load_records(suite, tmp_path)
        other.raw[f"tune/{OTHER}.json"][0]["chosen"] = {}
        other.raw[f"tune/{OTHER}.json"][0]["left_out"] |= left_out
        assert verdict(other) == expected


def test_a_row_without_the_others_tuning_is_not_compared(suite, tmp_path) -> None:
    fabricate(tmp_path, suite)
    fabricate_tuning(tmp_path, suite, [SUNET])
    assert verdict(load_records(suite, tmp_path)).startswith("not comparable: tune.trials absent / 4 and ")


def test_the_table_of_tuning_says_what_was_chosen_and_what_it_gained(suite, tmp_path) -> None:
    fabricate(tmp_path, suite)
    records = load_records(suite, tmp_path)
    assert tables.tuning(records) is None
    assert figures.tuning(records) is None
    fabricate_tuning(tmp_path, suite)
    records = load_records(suite, tmp_path)
    table = tables.tuning(records)
    row = table.data.set_index("model").loc[OTHER]
    assert row[["trials", "diverged", "train.epochs", "trial", "train.lr"]].tolist() == [4, 1, 3, 2, 0.01]
    assert (row["val.miou.default"], row["val.miou"]) == (0.3, 0.41)
    assert table.view.iloc[1].to_dict() == {
        "Model": OTHER, "Trials": "4", "Drawn": "3", "Diverged": "1", "Epochs": "3", "Learning rate": "0.01",
        "Zero-init head": "no",
        "Default recipe (%)": "30.00", "Chosen (%)": "41.00",
    }  # fmt: skip
    assert "Not tuned: Zero-init head of plain_conv_small (no such layer)." in table.notes
    axes = figures.tuning(records).axes[0]
    assert axes.lines[1].get_xydata()[:, 0].tolist() == [0, 1, 2, 3]
    assert axes.lines[1].get_ydata() == pytest.approx([30, 30, 41, 41])
    figures.plt.close("all")


def test_a_tuning_in_vain_is_a_row_with_its_reason(suite, tmp_path) -> None:
    fabricate(tmp_path, suite)
    fabricate_tuning(tmp_path, suite)
    records = load_records(suite, tmp_path)
    records.raw[f"tune/{OTHER}.json"][0].update(status="failed", reason="all trials diverged", chosen={}, trial=None)
    assert tables.tuning(records).view.Trials.tolist() == ["4", "failed: all trials diverged"]


def fabricate_tuning(root: Path, suite: Suite, models: Sequence[str] = (SUNET, OTHER)) -> None:
    """What tuning would leave, and trainings with what it chose."""
    effort = {"tune.trials": 4, "tune.epochs": 3, "tune.seed": 0}
    space = [{"path": path} for path in ("train.lr", "train.zero_init_head")]
    folder = root / "results/toy/records"
    for model in models:
        chosen = {"train.lr": 0.02, "train.zero_init_head": True} if model == SUNET else {"train.lr": 0.01}
        left_out = {} if model == SUNET else {"train.zero_init_head": "no such layer"}
        for kind in ("train", "evaluate"):
            rows = json.loads((folder / kind / f"{model}.json").read_text())
            for r in rows:
                r["params"] |= effort | {"train.zero_init_head": False} | chosen
                r["provenance"]["config_hash"] = parameters_hash(r["params"])
            write(folder / kind / f"{model}.json", rows)
        params = effort | {"train.epochs": 3, "train.lr": 0.003, "train.zero_init_head": False}
        made = record("tune", model, model, seed=77, params=params, scores={"val.miou": 0.41}) | {
            "trial": 2, "chosen": chosen, "space": space[: len(chosen)], "left_out": left_out, "fingerprint": "f",
        }  # fmt: skip
        write(folder / "tune" / f"{model}.json", [made])
        trials = [(0, "finished", 0.3, 0.3), (1, "failed", None, 0.3), (2, "finished", 0.41, 0.41),
                  (3, "finished", 0.39, 0.41)]  # fmt: skip
        rows = [{"number": n, "status": s, **chosen, "val.miou": v, "best": b} for n, s, v, b in trials]
        write_rows(folder / "tune" / f"{model}.csv", rows)


@pytest.mark.parametrize("key", ["train.lr", "train"])
def test_a_declared_difference_is_compared_and_stated(key, tmp_path) -> None:
    report = {"reference": SUNET, "declared_differences": [key]}
    records = edited(
        tmp_path, make_suite({SUNET: None, OTHER: None}, (0, 1, 2), report=report), parameter("train.lr", 0.01)
    )
    assert verdict(records) == "worse"
    (note,) = [n for n in tables.accuracy(records, SUNET).notes if n.startswith("Declared")]
    assert note == (
        "Declared differences from the reference (report.declared_differences): plain_conv_small train.lr 0.01 / 0.003."
    )


def test_rows_that_are_not_comparable_do_not_count_in_the_adjustment(tmp_path) -> None:
    suite = make_suite({SUNET: None, "unet_small": None, "dilated_resnet_small": None}, (0, 1, 2))
    fabricate(tmp_path, suite)
    records = load_records(suite, tmp_path)

    def p_values() -> tuple[float, float]:
        row = tables.accuracy(records, SUNET).data.set_index("model").loc["dilated_resnet_small"]
        return row["score.miou.difference.p"], row["score.miou.difference.p_holm"]

    alone, adjusted = p_values()
    assert adjusted == pytest.approx(2 * alone)
    for r in records.raw["train/unet_small.json"]:
        r["params"]["train.epochs"] = 60
    assert p_values() == (alone, alone)


def test_trials_on_two_splits_are_not_compared() -> None:
    def trial(split: str) -> dict[str, Any]:
        return record("trial", SUNET, SUNET, seed=0) | {"split": split}

    validation, test = (Runs({0: 0.5}, [trial(split)]) for split in ("val", "test"))
    assert differing_settings(validation, test) == ("not comparable: split val / test", ())
    assert differing_settings(validation, validation) == ("", ())


def test_no_interval_leaves_the_range_of_a_score() -> None:
    wide = Estimate(0.5, -0.1, 1.2, 3)
    assert estimate_text(quantity("score.miou"), wide) == "50.00 [0.00, 100.00]"
    columns = estimate_columns("score.top1_error_percent", Estimate(50.0, -10.0, 120.0, 3))
    assert list(columns.values()) == [50.0, 0.0, 100.0]
    assert estimate_text(quantity("cost.gmacs"), Estimate(1.0, -1.0, 3.0, 3)) == "1.000 [-1.000, 3.000]"


def test_variants_of_one_network_are_compared_unless_more_differs(suite, tmp_path) -> None:
    def edit(r: dict[str, Any]) -> None:
        r["params"] |= {"evaluate.variants.single_scale.scales": [1.0], "evaluate.variants.multi_scale_flip.flip": True}
        if r["variant"] == "multi_scale_flip":
            r["params"]["data.test_split"] = "train"

    frame = tables.test_time(edited(tmp_path, suite, edit)).data.set_index(["model", "variant"])
    verdicts = frame["score.miou.difference.verdict"]
    assert verdicts[OTHER, "multi_scale_flip"] == "not comparable: data.test_split test, train / test"
    assert not verdicts[SUNET, "multi_scale_flip"].startswith("not comparable")


# --- records that contradict themselves ------------------------------------------------------------------------------


def change(root: Path, kind: str, edit: Callable[[dict[str, Any]], Any], seed: int = 1) -> None:
    path = root / f"results/toy/records/{kind}/{OTHER}.json"
    rows = json.loads(path.read_text())
    edit(next(r for r in rows if r["seed"] == seed))
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    "key",
    ["score.miou", "score.pixel_accuracy", "score.mean_accuracy", "score.mean_accuracy.small", "score.iou.disc_dark"],
)
@pytest.mark.parametrize("forged", [0.99, None])
def test_a_forged_score_is_an_error_that_names_it(key, forged, suite, tmp_path) -> None:
    fabricate(tmp_path, suite)
    true = json.loads((tmp_path / f"results/toy/records/evaluate/{OTHER}.json").read_text())[2]["scores"][key]
    change(tmp_path, "evaluate", lambda r: r["scores"].update({key: forged}))
    message = (
        rf"evaluate/{OTHER}\.json: {OTHER}, seed 1, single_scale: {re.escape(key)} is {forged}, but its confusion "
        rf"matrices give {true}"
    )
    with pytest.raises(RecordError, match=message):
        load_records(suite, tmp_path)
    if "iou." not in key:  # class names are known from the prepared data alone
        with pytest.raises(RecordError, match=message):
            find_records(tmp_path / "results", "toy")


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_forged_parameter_is_an_error_that_names_it(kind, suite, tmp_path) -> None:
    fabricate(tmp_path, suite)
    change(tmp_path, kind, parameter("train.epochs", 60))
    with pytest.raises(
        RecordError, match=rf"{kind}/{OTHER}\.json: {OTHER}, seed 1: config_hash is \w+, but that of its"
    ):
        load_records(suite, tmp_path)


def test_a_score_without_its_matrices_is_an_error_and_without_the_file_a_note(suite, tmp_path) -> None:
    fabricate(tmp_path, suite)
    path = tmp_path / f"results/toy/records/confusion/{OTHER}.npz"
    with np.load(path) as arrays:
        kept = {name: values for name, values in arrays.items() if not name.startswith("seed1.")}
    np.savez(path, **kept)
    with pytest.raises(RecordError, match=rf"seed 1, single_scale: .*{OTHER}\.npz has no matrices of it"):
        load_records(suite, tmp_path)
    path.unlink()
    notes = tables.accuracy(load_records(suite, tmp_path), SUNET).notes
    assert f"Scores not checked, since there are no confusion matrices: {OTHER}." in notes


def test_matrices_by_object_size_are_those_of_the_images(suite, tmp_path) -> None:
    fabricate(tmp_path, suite)
    path = tmp_path / f"results/toy/records/confusion/{OTHER}.npz"
    with np.load(path) as arrays:
        kept = dict(arrays)
    kept["by_object_size.seed1.single_scale"] = kept["by_object_size.seed0.single_scale"]
    np.savez(path, **kept)
    with pytest.raises(RecordError, match="seed 1, single_scale: the matrices by object size do not add up"):
        load_records(suite, tmp_path)
    kept["by_object_size.seed1.single_scale"] = kept["by_object_size.seed1.single_scale"][:2]
    np.savez(path, **kept)
    with pytest.raises(RecordError, match=rf"{OTHER}\.npz: its matrices by object size are not 3"):
        load_records(suite, tmp_path)


def test_top1_errors_are_checked_too(tmp_path) -> None:
    suite = make_suite({"resnet18": None}, (0,), data={"name": "synthetic_shapes"})
    folder = tmp_path / "results/toy/records"
    counts = np.array([[[6, 2], [1, 7]]], np.uint32)  # 3 of 16 are errors
    variants = ("single_scale", "multi_scale_flip")
    rows = [
        record("evaluate", "resnet18", "resnet18", seed=0, variant=v, task="classification",
               scores={"score.top1_error_percent": 18.75})
        for v in variants
    ]  # fmt: skip
    write(folder / "evaluate/resnet18.json", rows)
    (folder / "confusion").mkdir()
    np.savez(folder / "confusion/resnet18.npz", images=["all"], **{f"seed0.{v}": counts for v in variants})
    load_records(suite, tmp_path)
    rows[0]["scores"]["score.top1_error_percent"] = 12.0
    write(folder / "evaluate/resnet18.json", rows)
    with pytest.raises(RecordError, match=r"score.top1_error_percent is 12.0, but its confusion matrices give 18.75"):
        load_records(suite, tmp_path)


def test_a_declared_difference_that_is_no_key_is_an_error(tmp_path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        "benchmark: x\ndata: {name: synthetic}\nmodels: {sunet_tiny: {name: sunet_tiny}}\n"
        "report: {declared_differences: [train.learning_rate]}\n"
    )
    with pytest.raises(ConfigError, match=r"report\.declared_differences: train\.learning_rate: no key of data, train"):
        load(path)

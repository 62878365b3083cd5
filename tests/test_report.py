"""Records made up here -> the whole report: numbers by hand, bytes, failures, pages, explanations."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from checkout import ROOT
from PIL import Image
from scipy import stats

from sunets.core.config import Suite
from sunets.core.metrics import scores_by_object_size, scores_from_confusion
from sunets.core.names import PREPARED
from sunets.core.record import RecordError, parameters_hash, write_rows
from sunets.report import figures, style, tables
from sunets.report import images as report_images
from sunets.report.build import build_report
from sunets.report.comparison import joint_estimate, video_blocks
from sunets.report.explain import explain
from sunets.report.page import _cost_findings, limits
from sunets.report.records import Records, ReportError, find_records, load_records
from sunets.report.statistics import holm
from sunets.report.write import Table
from sunets.report.write import write as write_table

CLASSES = ("background", "disc_light", "disc_dark", "square_light", "square_dark")
PALETTE = [[70, 70, 70], [230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167]]
SKILL = {"sunet_tiny": 0.55, "unet_small": 0.54, "dilated_resnet_small": 0.47, "plain_conv_small": 0.36}
LABELS = {"sunet_tiny": "SUNet-tiny", "unet_small": "U-Net (small)", "plain_conv_small": "Plain & local_conv 100%"}


def make_suite(models: dict[str, str | None], seeds: tuple[int, ...], **other: Any) -> Suite:
    """A suite of zoo models by key; `other` replaces sections."""
    tree: dict[str, Any] = {
        "benchmark": "toy",
        "seeds": list(seeds),
        "data": {"name": "synthetic"},
        "models": {key: {"name": key, "label": label} for key, label in models.items()},
        "evaluate": {"variants": {"single_scale": {}, "multi_scale_flip": {"scales": [0.75, 1.0], "flip": True}}},
        "report": {"reference": next(iter(models)), "title": "Toy benchmark"},
    }
    return Suite.model_validate(tree | other)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, sort_keys=True))


def record(kind: str, model: str, label: str, **fields: Any) -> dict[str, Any]:
    """One record as the contract has it."""
    content = {
        "kind": kind, "status": "finished", "reason": None, "benchmark": "toy", "task": "segmentation",
        "model": model, "label": label, "seed": None, "variant": None, "scores": {}, "cost": {},
        "params": {"train.epochs": 9, "train.batch_size": 16, "train.optimizer": "adamw", "train.lr": 0.003,
                   "data.test_split": "test", "cost.size": [96, 96], "cost.batch_size": 1},
        "environment": {"python": "3.11.7", "torch": "2.14.1", "torchvision": "0.29.1", "platform": "Linux",
                        "cpu": "A CPU", "cpu_count": 2, "threads": 1, "device": "cpu"},
        "provenance": {"git_commit": "0123456789abcdef0123", "git_dirty": False, "data_digest": "d1" * 8,
                       "code_hash": "c0de" * 4, "command": f"python -m sunets {kind} {model}"},
    } | fields  # fmt: skip
    content["params"] = content["params"] | {"seed": content["seed"]}
    content["provenance"]["config_hash"] = parameters_hash(content["params"])
    return content


def confusion(rng: np.random.Generator, skill: float, images: int = 24) -> np.ndarray:
    """(images, K, K) counts of a model that is right with about this probability."""
    k = len(CLASSES)
    truth = rng.multinomial(2000, [0.6, 0.1, 0.1, 0.1, 0.1], size=images)
    p = np.full((k, k), (1 - skill) / (k - 1)) + np.eye(k) * (skill - (1 - skill) / (k - 1))
    p[0] = [0.9, 0.025, 0.025, 0.025, 0.025]
    p /= p.sum(1, keepdims=True)
    return np.stack([[rng.multinomial(n, p[i]) for i, n in enumerate(row)] for row in truth]).astype(np.uint32)


def fabricate(root: Path, suite: Suite, skills: dict[str, float] = SKILL) -> None:
    """All that the stages would leave for a suite on drawn images, with made-up results."""
    records = root / "results" / suite.benchmark / "records"
    data = root / PREPARED / suite.benchmark
    outputs = root / "outputs" / suite.benchmark / "predictions"
    for folder in (data / "images", data / "masks", data / "splits"):
        folder.mkdir(parents=True, exist_ok=True)
    write(
        data / "manifest.json",
        {"name": "synthetic", "task": "segmentation", "classes": CLASSES, "palette": PALETTE, "digest": "d1" * 8},
    )
    draw = np.random.default_rng(7)
    masks = {}
    with (data / "splits" / "test.csv").open("w") as file:
        file.write("id,image,target,height,width\n")
        for i in range(4):
            mask = np.zeros((48, 48), np.uint8)
            for label in range(1, 5):
                y, x = draw.integers(0, 34, 2)
                mask[y : y + 14, x : x + 14] = label
            picture = (np.array(PALETTE)[mask] * 0.7 + draw.integers(0, 70, (48, 48, 3))).clip(0, 255).astype(np.uint8)
            mask[:2] = 255
            Image.fromarray(picture).save(data / "images" / f"t{i}.png")
            Image.fromarray(mask).save(data / "masks" / f"t{i}.png")
            masks[f"t{i}"] = mask
            file.write(f"t{i},out/images/t{i}.png,out/masks/t{i}.png,48,48\n")
    speed = []
    for index, (key, entry) in enumerate(suite.models.items()):
        label, skill = entry.label or key, skills[key]
        rng = np.random.default_rng(index)
        train, evaluate, arrays, rows, timing = [], [], {}, [], []
        for seed in suite.seeds:
            train.append(record("train", key, label, seed=seed))
            timing.append({"model": key, "seed": seed, "started": "2026-01-01T00:00:00Z", "seconds": 40.0 + seed,
                           "resumed": False, "device": "cpu", "threads": 1})  # fmt: skip
            for variant, gain in (("single_scale", 0.0), ("multi_scale_flip", 0.02)):
                counts = confusion(rng, skill + gain + rng.normal(0, 0.012))
                arrays[f"seed{seed}.{variant}"] = counts
                by_size = counts[:18].reshape(3, 6, 5, 5).sum(1) + counts[18:].reshape(3, 2, 5, 5).sum(1)
                arrays[f"by_object_size.seed{seed}.{variant}"] = by_size
                scores = scores_from_confusion(counts.sum(0), CLASSES) | scores_by_object_size(by_size)
                scores["score.boundary_f"] = 0.5 * skill
                evaluate.append(record("evaluate", key, label, seed=seed, variant=variant, scores=scores))
            for epoch in range(1, 10):
                loss = (1.6 - skill) * np.exp(-epoch / 4) + 0.4 + rng.normal(0, 0.02)
                score = skill * (1 - np.exp(-epoch / 3))
                rows.append({"model": key, "seed": seed, "epoch": epoch, "iteration": 50 * epoch, "lr": 0.003,
                             "train.loss": loss, "train.miou": score,
                             "val.miou": score + rng.normal(0, 0.01) if epoch % 3 == 0 else ""})  # fmt: skip
        write(records / "train" / f"{key}.json", train)
        write(records / "evaluate" / f"{key}.json", evaluate)
        write(records / "timing" / f"{key}.json", timing)
        write(records / "cost" / f"{key}.json", record("cost", key, label, cost=cost_of(index)))
        (records / "history").mkdir(exist_ok=True)
        with (records / "history" / f"{key}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (records / "confusion").mkdir(exist_ok=True)
        np.savez(records / "confusion" / f"{key}.npz", images=np.array([f"t{i}" for i in range(24)]), **arrays)
        y, x = np.mgrid[-48:48, -48:48]
        field = np.exp(-(np.abs(x) + np.abs(y)) / (4 + 9 * (len(suite.models) - index))) * rng.uniform(0.5, 1, x.shape)
        np.savez(records / "cost" / f"{key}.npz", field=field)
        speed.append(record("speed", key, label, cost=speed_of(index)))
        (outputs / key).mkdir(parents=True, exist_ok=True)
        for name, mask in masks.items():
            wrong = rng.random(mask.shape) > skill + 0.3
            guess = np.where(wrong, rng.integers(0, 5, mask.shape), np.where(mask == 255, 0, mask)).astype(np.uint8)
            Image.fromarray(guess).save(outputs / key / f"{name}.png")
    write(records / "speed.json", speed)


def cost_of(index: int) -> dict[str, Any]:
    """Made-up exact figures."""
    return {
        "cost.params_m": 0.21 + 0.013 * index, "cost.gmacs": 0.35 * 1.4**index, "memory.saved_mib": 21.5 - index,
        "cost.gmacs_forward_backward": 1.05 * 1.4**index, "cost.uncounted_operators": "relu, cat",
        "memory.saved_mib_memory_efficient": 9.5 if index == 0 else None,
        "receptive_field.theoretical_px": 96 - 9 * index,
        "receptive_field.effective_share": round(0.62 / (index + 1), 4), "cost.output_stride": 16,
    }  # fmt: skip


def speed_of(index: int) -> dict[str, Any]:
    """Made-up timings."""
    return {
        "speed.latency_ms": 12.5 + index, "speed.latency_iqr_ms": 0.25, "speed.images_per_second": 80.0 - index,
        "speed.step_ms": 41.0, "speed.step_iqr_ms": 1.5, "speed.batch_size": 1, "speed.repeats": 10, "speed.warmup": 3,
        "speed.dtype": "float32", "speed.memory_format": "contiguous_format",
    }  # fmt: skip


# --- the whole report ------------------------------------------------------------------------------------------------

MODELS = {"sunet_tiny": "SUNet-tiny", "unet_small": "U-Net (small)", "plain_conv_small": "Plain & local_conv 100%"}
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Suite, list[Path]]:
    """A checkout with made-up results and its report; tests only read it."""
    root = tmp_path_factory.mktemp("site")
    suite = make_suite(MODELS, SEEDS)
    fabricate(root, suite)
    (root / "results" / "toy" / "tables").mkdir()
    (root / "results" / "toy" / "tables" / "published.md").write_text("left by an older report")
    (root / "results" / "toy" / "tables" / "ablation_unet_depth.md").write_text("somebody else's")
    return root, suite, build_report(suite, root)


def _scores(root: Path, model: str, key: str = "score.miou", variant: str = "single_scale") -> list[float]:
    records = json.loads((root / f"results/toy/records/evaluate/{model}.json").read_text())
    return [r["scores"][key] for r in records if r["variant"] == variant and r["status"] == "finished"]


@pytest.mark.slow
def test_report_writes_each_table_and_figure_and_removes_only_its_own_stale_files(site) -> None:
    root, _, paths = site
    tables_dir, figures_dir = root / "results/toy/tables", root / "results/toy/figures"
    names = {"cost", "accuracy", "per_class", "object_size", "test_time", "speed", "training_time"}
    assert {p.name for p in tables_dir.iterdir()} == {f"{n}{s}" for n in names for s in (".md", ".tex", ".csv")} | {
        "ablation_unet_depth.md",
        "report.json",
    }
    drawn = {
        "accuracy", "accuracy_cost", "training_curves", "per_class", "object_size", "confusion", "receptive_field",
        "qualitative",
    }  # fmt: skip
    assert {p.name for p in figures_dir.iterdir()} == {f"{n}{s}" for n in drawn for s in (".png", ".pdf")}
    assert all(p.stat().st_size > 100 for p in paths)
    for path in figures_dir.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width >= 900
    assert root / "results/toy/README.md" in paths
    assert root / "results/toy/paper.tex" in paths
    assert root / "results/README.md" in paths


@pytest.mark.slow
def test_accuracy_table_holds_the_means_intervals_and_paired_differences_of_the_records(site) -> None:
    root, _, _ = site
    frame = pd.read_csv(root / "results/toy/tables/accuracy.csv").set_index("model")
    ours, reference = np.array(_scores(root, "plain_conv_small")), np.array(_scores(root, "sunet_tiny"))
    row = frame.loc["plain_conv_small"]
    half = 4.302652729911275 * ours.std(ddof=1) / np.sqrt(3)  # t quantile of 2 degrees of freedom
    assert row["score.miou.mean"] == pytest.approx(ours.mean(), abs=1e-12)
    assert row["score.miou.ci95_low"] == pytest.approx(ours.mean() - half, abs=1e-12)
    test = stats.ttest_rel(ours, reference)
    low, high = test.confidence_interval(0.95)
    assert row["score.miou.difference.ci95_low"] == pytest.approx(low, abs=1e-12)
    assert row["score.miou.difference.ci95_high"] == pytest.approx(high, abs=1e-12)
    assert row["score.miou.difference.p"] == pytest.approx(test.pvalue)
    assert row["score.miou.difference.verdict"] == "worse"
    assert row["n_seeds"] == row["score.miou.difference.n_seeds"] == 3
    assert pd.isna(frame.loc["sunet_tiny", "score.miou.difference.mean"])
    shown = (root / "results/toy/tables/accuracy.md").read_text()
    assert row["score.miou.joint_ci95_low"] < ours.mean() < row["score.miou.joint_ci95_high"]
    low, high = (100 * row[f"score.miou.joint_ci95_{end}"] for end in ("low", "high"))
    assert f"{100 * ours.mean():.2f} [{low:.2f}, {high:.2f}]" in shown
    assert row["score.miou.difference.wins"] == "0/3"
    assert f"{100 * test.statistic * (ours - reference).std(ddof=1) / np.sqrt(3):+.2f} [" in shown


@pytest.mark.slow
def test_every_file_is_the_same_to_the_byte_on_a_rerun(site, tmp_path) -> None:
    root, suite, paths = site
    for folder in ("results/toy/records", "data", "outputs"):
        shutil.copytree(root / folder, tmp_path / folder)
    again = build_report(suite, tmp_path)
    assert [p.relative_to(tmp_path) for p in again] == [p.relative_to(root) for p in paths]
    differ = [p.name for p in again if p.read_bytes() != (root / p.relative_to(tmp_path)).read_bytes()]
    assert not differ


def test_noisy_numbers_stay_in_their_own_files(site, tmp_path) -> None:
    root, suite, _ = site
    records = root / "results/toy/records"
    shutil.copytree(records, tmp_path / "results/toy/records")
    shutil.copytree(root / "data", tmp_path / "data")
    path = tmp_path / "results/toy/records/speed.json"
    path.write_text(path.read_text().replace("12.5", "99.5"))
    old, new = load_records(suite, root), load_records(suite, tmp_path)
    for table in (tables.cost, tables.per_class, tables.test_time, lambda r: tables.accuracy(r, "sunet_tiny")):
        pd.testing.assert_frame_equal(table(old).data, table(new).data)
    assert "99.50 (0.25)" in tables.speed(new).view.to_string()
    page = (root / "results/toy/README.md").read_text()
    assert "tables/speed.md" in page
    assert "12.50" not in page


def test_page_tells_findings_in_the_words_of_the_statistics(site) -> None:
    page = (site[0] / "results/toy/README.md").read_text()
    assert page.startswith("# Toy benchmark\n")
    for part in ("## Findings", "## What was run", "## Limits", "## How it was made", "python -m sunets train MODEL",
                 "torch 2.14.1", "`d1d1d1d1d1d1d1d1`", "`0123456789abcdef`", "0, 1, 2", "A CPU"):  # fmt: skip
        assert part in page
    assert "Compared with SUNet-tiny, worse: Plain & local_conv 100%" in page
    assert re.search(r"; next is U-Net \(small\) \(-.*\], undecided; 3 seeds would detect \d\.\d points with", page)
    undecided = (
        r"Compared with SUNet-tiny, undecided: U-Net \(small\) \(.*\]; 3 seeds would detect \d\.\d points with 80 %"
    )
    assert re.search(undecided, page)
    assert "3 seeds: the intervals are wide" in page
    for link in ("figures/accuracy.png", "figures/qualitative.png", "tables/accuracy.tex", "records/evaluate/"):
        assert f"({link})" in page
        assert (site[0] / "results/toy" / link).exists()
    index = (site[0] / "results/README.md").read_text()
    assert "[Toy benchmark](toy/README.md)" in index
    assert "not run: no records on imagenet" in index


@pytest.mark.parametrize(
    ("trials", "words"), [(8, "tuned for each model with 8 trials"), (0, "not tuned for each model")]
)
def test_page_says_whether_recipes_were_tuned(site, trials, words) -> None:
    root, suite, _ = site
    records = load_records(suite, root)
    rows = [r | {"params": r["params"] | {"tune.trials": trials}} for r in records.all("train")]
    raw = records.raw | {f"train/{m}.json": [r for r in rows if r["model"] == m] for m in records.labels}
    sentences = limits(dataclasses.replace(records, raw=raw))
    assert any(f"Recipes were {words}." in sentence for sentence in sentences)


def test_latex_is_booktabs_and_escaped(site) -> None:
    text = (site[0] / "results/toy/tables/accuracy.tex").read_text()
    assert r"Plain \& local\_conv \\ 100\%" in text
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 4
    assert text.isascii()


def test_a_written_table_escapes_markdown_and_keeps_full_precision(tmp_path) -> None:
    frame = pd.DataFrame({"model": ["a|b"], "cost.gmacs": [1 / 3], "note": ["x\ny"], "n_seeds": [None]})
    view = frame.assign(**{"cost.gmacs": "0.3333"})
    paths = write_table(Table("t", "A | caption", frame, view), tmp_path / "deep")
    assert [p.name for p in paths] == ["t.md", "t.tex", "t.csv"]
    shown = paths[0].read_text()
    assert r"a\|b" in shown
    assert "x y" in shown
    assert "0.3333 " in shown
    assert pd.read_csv(paths[2])["cost.gmacs"][0] == 1 / 3


@pytest.mark.slow
def test_tables_do_not_depend_on_the_hash_seed(site, tmp_path) -> None:
    root, suite, _ = site
    (tmp_path / "params.yaml").write_text(json.dumps(suite.model_dump(mode="json")))
    for folder in ("results/toy/records", "data"):
        shutil.copytree(root / folder, tmp_path / folder)
    script = (
        "from pathlib import Path; from sunets.core.config import load; from sunets.report import build, write\n"
        "suite = load(); tables = build._tables(suite, build.load_records(suite, Path()))\n"
        "for table in tables: write.write(table, Path('out'))\n"
    )
    made = []
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
        made.append({p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()})
        shutil.rmtree(tmp_path / "out")
    assert made[0] == made[1]
    assert made[0]["accuracy.csv"] == (root / "results/toy/tables/accuracy.csv").read_bytes()


def test_video_is_resampled_in_blocks_of_consecutive_frames(tmp_path) -> None:
    ids = [f"{sequence}_{frame:06}" for sequence, count in (("A", 45), ("B_x", 20)) for frame in range(count)]
    assert [video_blocks(ids, 20).count(i) for i in range(5)] == [20, 20, 5, 20, 0]
    assert video_blocks(["a_1", "a_2"], 1) == [0, 1]
    suite = make_suite(MODELS, SEEDS, data={"name": "camvid", "root": "elsewhere"})
    fabricate(tmp_path, suite)
    records = load_records(suite, tmp_path)
    single = joint_estimate(records, "sunet_tiny", "score.miou")
    for path in (tmp_path / "results/toy/records").glob("*/*.json"):
        rows = json.loads(path.read_text())
        if path.parent.name in ("train", "evaluate"):
            for row in rows:
                row["params"]["data.name"] = "camvid"
                row["provenance"]["config_hash"] = parameters_hash(row["params"])
            path.write_text(json.dumps(rows))
    records = load_records(suite, tmp_path)
    assert "blocks of 20 consecutive frames of a sequence" in tables.accuracy(records, "sunet_tiny").notes[0]
    assert joint_estimate(records, "sunet_tiny", "score.miou") != single


def test_a_table_says_which_intervals_cover_the_seeds_alone(tmp_path) -> None:
    suite = make_suite(MODELS, SEEDS)
    fabricate(tmp_path, suite)
    records = load_records(suite, tmp_path)
    made = tables.accuracy(records, "sunet_tiny")
    assert made.notes[0].endswith("Over the seeds alone: Boundary F.")
    columns = made.data.filter(like="joint_ci95_low").notna().any()
    assert columns["score.miou.joint_ci95_low"]
    assert not columns["score.boundary_f.joint_ci95_low"]
    for path in (tmp_path / "results/toy/records/confusion").iterdir():
        path.unlink()
    records = load_records(suite, tmp_path)
    assert "over the seeds alone" in tables.accuracy(records, "sunet_tiny").notes[0]
    assert "bootstrap" not in tables.per_class(records).notes[0]


def test_a_row_whose_validation_score_still_rises_is_marked(site, tmp_path) -> None:
    root, suite, _ = site
    shutil.copytree(root / "results/toy/records", tmp_path / "results/toy/records")
    curves = {
        "sunet_tiny": ((3, 0.30), (6, 0.40), (9, 0.44)),  # 7.2 of 9 epochs: 0.416, that is 2.4 points before the end
        "unet_small": ((3, 0.30), (6, 0.40), (9, 0.43)),  # 1.8 points
        "plain_conv_small": ((3, 0.50), (6, 0.50), (9, 0.45)),  # -3.0 points
    }

    def write_curve(model: str, points: tuple[tuple[int, float], ...]) -> None:
        rows = [f"{model},{seed},{epoch},{value}" for seed in SEEDS for epoch, value in points]
        text = "\n".join(["model,seed,epoch,val.miou", *rows]) + "\n"
        (tmp_path / f"results/toy/records/history/{model}.csv").write_text(text)

    for model, points in curves.items():
        write_curve(model, points)
    table = tables.accuracy(load_records(suite, tmp_path), "sunet_tiny")
    assert table.data["val.miou.last_fifth"].tolist() == pytest.approx([0.024, 0.018, -0.03])
    assert table.view.Budget.tolist() == ["still improving (+2.40)", "", "still getting worse (-3.00)"]
    assert any("validation mIoU of 2 networks changed by 2 points or more" in note for note in table.notes)
    for model in curves:
        write_curve(model, curves["unet_small"])
    table = tables.accuracy(load_records(suite, tmp_path), "sunet_tiny")
    assert "Budget" not in table.view
    assert any("validation mIoU of every network changed by less than 2 points" in note for note in table.notes)
    for model in curves:
        write_curve(model, ((9, 0.43),))
    assert not any("last fifth" in note for note in tables.accuracy(load_records(suite, tmp_path), "sunet_tiny").notes)


# --- runs that failed, or never were ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Suite]:
    """One seed lost in one model, all seeds failed in another, a third never run; somebody else's pictures."""
    root = tmp_path_factory.mktemp("broken")
    models = {"sunet_tiny": None, "unet_small": None, "plain_conv_small": None, "dilated_resnet_small": None}
    suite = make_suite(models, SEEDS, data={"name": "folder", "root": str(root / "pictures")})
    fabricate(root, suite)
    records = root / "results/toy/records"
    reason = "loss is NaN in epoch 2, step 7, learning rate 0.003"
    for model, lost in (("unet_small", {2}), ("plain_conv_small", {0, 1, 2})):
        path = records / "evaluate" / f"{model}.json"
        rows = json.loads(path.read_text())
        for row in rows:
            if row["seed"] in lost:
                row.update(status="failed", reason=reason, scores={})
        path.write_text(json.dumps(rows))
    for kind in ("train", "evaluate", "cost", "timing"):
        (records / kind / "dilated_resnet_small.json").unlink()
    (records / "history/dilated_resnet_small.csv").unlink()
    for kind in ("confusion", "cost"):
        (records / kind / "dilated_resnet_small.npz").unlink()
    (records / "speed.json").unlink()
    build_report(suite, root)
    return root, suite


@pytest.mark.slow
def test_failed_and_missing_runs_stay_rows_with_their_reason(broken) -> None:
    root, _ = broken
    frame = pd.read_csv(root / "results/toy/tables/accuracy.csv").set_index("model")
    assert frame.loc["unet_small", "n_seeds"] == 2
    assert frame.loc["unet_small", "score.miou.mean"] == pytest.approx(np.mean(_scores(root, "unet_small")))
    assert frame.loc["unet_small", "score.miou.difference.n_seeds"] == 2  # paired over the common seeds only
    assert frame.loc["plain_conv_small", "status"] == "failed"
    assert frame.loc["dilated_resnet_small", "status"] == "not run"
    assert frame.loc[["plain_conv_small", "dilated_resnet_small"], "score.miou.mean"].isna().all()
    shown = (root / "results/toy/tables/accuracy.md").read_text()
    assert "failed: loss is NaN in epoch 2" in shown
    assert "not run" in shown
    assert "unet_small, seed 2: failed (loss is NaN in epoch 2" in shown
    page = (root / "results/toy/README.md").read_text()
    assert (
        "dilated_resnet_small, seeds 0, 1, 2: not run (no record in records/evaluate/dilated_resnet_small.json)" in page
    )
    assert "Cost of dilated_resnet_small: not run" in page
    assert not (root / "results/toy/tables/speed.md").exists()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that diverged on every seed, one that did on a seed, one that collapsed; one image, no commit."""
    root = tmp_path_factory.mktemp("odd")
    models = {"sunet_tiny": None, "unet_small": None, "plain_conv_small": None, "dilated_resnet_small": "Collapsed"}
    suite = make_suite(models, SEEDS)
    fabricate(root, suite)
    records = root / "results/toy/records"

    def change(kind: str, model: str, edit: Any) -> None:
        path = records / kind / f"{model}.json"
        rows = json.loads(path.read_text())
        for row in rows if isinstance(rows, list) else [rows]:
            edit(row)
        path.write_text(json.dumps(rows))

    for model, lost in (("unet_small", {1}), ("plain_conv_small", {0, 1, 2})):

        def diverge(row: dict[str, Any], lost: set[int] = lost) -> None:
            if row["seed"] in lost:
                row.update(status="failed", reason=f"the loss became nan on seed {row['seed']}", scores={})

        change("train", model, diverge)
        change("evaluate", model, diverge)
    for kind in ("train", "cost"):
        change(kind, "sunet_tiny", lambda row: row["provenance"].update(git_commit=None, git_dirty=None))
    for path in (records / "confusion").glob("*.npz"):
        with np.load(path) as arrays:
            first = {name: values[:1] for name, values in arrays.items() if not name.startswith("by_object_size")}
        if path.stem == "dilated_resnet_small":
            first |= {name: first["seed0.single_scale"] for name in first if name.startswith("seed")}
        np.savez(path, **first)
        counts = {name: scores_from_confusion(values[0], CLASSES) for name, values in first.items() if name != "images"}
        change("evaluate", path.stem, lambda row, c=counts: row["status"] == "finished" and row["scores"].update(
            c[f"seed{row['seed']}.{row['variant']}"]))  # fmt: skip
    path = root / PREPARED / "toy/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": ["class 'x': no labelled pixel"]}))
    build_report(suite, root)
    return root


def _shown(root: Path, table: str = "accuracy") -> str:
    return (root / f"results/toy/tables/{table}.md").read_text()


def _row_of(text: str, model: str) -> str:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {model} ")][:1]
    return re.sub(" +", " ", row)


@pytest.mark.slow
def test_a_network_that_diverged_on_every_seed_says_so_in_place_of_numbers(odd: Path) -> None:
    frame = pd.read_csv(odd / "results/toy/tables/accuracy.csv").set_index("model")
    assert frame.loc["plain_conv_small", "status"] == "diverged (3 of 3)"
    assert frame.loc["unet_small", "status"] == "2 of 3 seeds"
    for table in ("accuracy", "per_class", "test_time"):
        assert "| diverged (3 of 3) |" in _row_of(_shown(odd, table), "plain_conv_small")
    assert "plain_conv_small, seed 2: diverged (the loss became nan on seed 2)." in _shown(odd)
    page = (odd / "results/toy/README.md").read_text()
    assert "- unet_small, seed 1: diverged (the loss became nan on seed 1)." in page


@pytest.mark.slow
def test_seeds_that_agree_and_a_single_image_have_no_interval(odd: Path) -> None:
    frame = pd.read_csv(odd / "results/toy/tables/accuracy.csv").set_index("model")
    collapsed = _scores(odd, "dilated_resnet_small")
    assert frame.loc["dilated_resnet_small", "score.miou.mean"] == pytest.approx(collapsed[0])
    assert pd.isna(frame.loc["dilated_resnet_small", "score.miou.ci95_low"])
    assert pd.isna(frame.loc["dilated_resnet_small", "score.miou.joint_ci95_low"])
    assert "No interval, since all seeds have the same score: Collapsed." in _shown(odd)
    assert f"| {100 * collapsed[0]:.2f} |" in _row_of(_shown(odd), "Collapsed")


def test_page_tells_what_is_odd_of_the_data_and_that_a_commit_is_unknown(odd: Path) -> None:
    page = (odd / "results/toy/README.md").read_text()
    limits = page.partition("## Limits")[2].partition("## ")[0]
    assert "- Data: class 'x': no labelled pixel." in limits
    assert "- The commit of some records (train and cost) is unknown: git was absent or refused" in limits
    assert "`unknown`, `0123456789abcdef`" in page
    text = explain(odd / "results", "toy", "cost", "sunet_tiny", "cost.gmacs")
    assert "git commit: unknown" in text


@pytest.mark.slow
def test_pixels_of_a_data_set_that_is_not_ours_stay_out_of_results(broken) -> None:
    root, _ = broken
    assert not list((root / "results").rglob("qualitative*"))
    assert (root / "outputs/toy/figures/qualitative.png").exists()
    assert "outputs/toy/figures/qualitative.png" in (root / "results/toy/README.md").read_text()


def test_a_report_without_predictions_keeps_the_picture_beside_its_records(site, tmp_path) -> None:
    """A fresh clone has the records and the committed picture, but no predictions to draw it from."""
    root, suite, _ = site
    for folder in ("results/toy", "data"):
        shutil.copytree(root / folder, tmp_path / folder)
    build_report(suite, tmp_path)
    for name in ("README.md", "paper.tex", "figures/qualitative.png", "figures/qualitative.pdf"):
        path = Path("results/toy") / name
        assert (tmp_path / path).read_bytes() == (root / path).read_bytes()
    (tmp_path / "results/toy/figures/qualitative.png").unlink()
    build_report(suite, tmp_path)
    assert "No qualitative figure: no predictions" in (tmp_path / "results/toy/README.md").read_text()
    assert not (tmp_path / "results/toy/figures/qualitative.pdf").exists()


def test_test_time_verdicts_are_adjusted_over_the_whole_table(site) -> None:
    root, suite, _ = site
    table = tables.test_time(load_records(suite, root))
    p, adjusted = (table.data[f"score.miou.difference.{name}"].dropna() for name in ("p", "p_holm"))
    assert len(p) > 1
    assert adjusted.tolist() == holm(p.tolist())
    assert f"adjusted for {len(p)} comparisons" in table.notes[0]


def test_one_seed_is_reported_without_intervals_and_without_a_test(tmp_path) -> None:
    suite = make_suite(MODELS, (4,))
    fabricate(tmp_path, suite)
    records = load_records(suite, tmp_path)
    table = tables.accuracy(records, "sunet_tiny")
    row = table.data.set_index("model").loc["unet_small"]
    assert pd.isna(row["score.miou.ci95_low"])
    assert row["score.miou.difference.verdict"] == "not tested (1 seed)"
    assert row["score.miou.joint_ci95_low"] < row["score.miou.mean"] < row["score.miou.joint_ci95_high"]
    assert "with one seed, over the images alone" in table.notes[0]
    for draw in figures.DRAWN.values():
        figures.plt.close(draw(records))
    assert tables.training_time(records).data.seconds.tolist() == [44.0] * 3


def test_a_resumed_training_is_left_out_of_the_time_to_train(tmp_path) -> None:
    suite = make_suite({"sunet_tiny": None}, (0, 1, 2))
    fabricate(tmp_path, suite)
    path = tmp_path / "results/toy/records/timing/sunet_tiny.json"
    rows = json.loads(path.read_text())
    rows[0].update(resumed=True, seconds=1.0)
    path.write_text(json.dumps(rows))
    table = tables.training_time(load_records(suite, tmp_path))
    assert table.view.iloc[0].to_dict() == {
        "Model": "sunet_tiny", "Trainings": "3", "Resumed": "1", "Median time (s)": "41.5", "Device": "cpu"
    }  # fmt: skip


def test_classification_reports_errors_and_lower_is_better(tmp_path) -> None:
    suite = make_suite({"resnet18": None, "resnet50": None}, (0, 1, 2), data={"name": "synthetic_shapes"})
    for key, error in (("resnet18", 20.0), ("resnet50", 10.0)):
        rows = [
            record("evaluate", key, key, seed=s, variant="single_scale",
                   scores={"score.top1_error_percent": error * (1 + s / 100), "score.top5_error_percent": error / 4})
            for s in (0, 1, 2)
        ]  # fmt: skip
        write(tmp_path / f"results/toy/records/evaluate/{key}.json", rows)
        write(tmp_path / f"results/toy/records/cost/{key}.json", [record("cost", key, key, cost=cost_of(0))])
    records = load_records(suite, tmp_path)
    table = tables.accuracy(records, "resnet18")
    assert list(table.view.columns[2:4]) == ["Top-1 error (%)", "Top-5 error (%)"]
    assert table.view.loc[1, "Verdict"] == "better"
    assert table.data.loc[1, "score.top1_error_percent.difference.mean"] == pytest.approx(-10.1)
    assert tables.per_class(records) is None
    ax = figures.accuracy_cost(records).axes[0]
    assert ax.yaxis_inverted()
    figures.plt.close("all")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: shutil.rmtree(r / "results/toy/records"), "no records of any model; run `dvc repro`"),
        (lambda r: (r / "results/toy/records/evaluate/sunet_tiny.json").write_text("[{"),
         "sunet_tiny.json: not valid JSON"),
        (lambda r: (r / "results/toy/records/train/sunet_tiny.json").write_text('[{"kind": "train"}]'),
         "train/sunet_tiny.json: record 0 lacks status"),
    ],
)  # fmt: skip
def test_unusable_records_are_one_clear_error_and_leave_the_old_report(tmp_path, spoil, message) -> None:
    suite = make_suite({"sunet_tiny": None}, (0,))
    fabricate(tmp_path, suite)
    old = tmp_path / "results/toy/tables/accuracy.md"
    old.parent.mkdir()
    old.write_text("old")
    spoil(tmp_path)
    with pytest.raises((FileNotFoundError, RecordError), match=message):
        build_report(suite, tmp_path)
    assert old.read_text() == "old"


def test_images_named_by_numbers_are_found(tmp_path) -> None:
    suite = make_suite({"sunet_tiny": None}, (0,))
    fabricate(tmp_path, suite)
    listing = tmp_path / PREPARED / "toy/splits/test.csv"
    rows = listing.read_text().splitlines()
    number, old = "000139", rows[1].partition(",")[0]
    listing.write_text("\n".join([rows[0], rows[1].replace(old, number, 1), *rows[2:]]) + "\n")
    for path in (tmp_path / "outputs/toy/predictions/sunet_tiny").glob("*.png"):
        path.rename(path.with_stem(number)) if path.stem == old else path.unlink()
    build_report(suite, tmp_path)
    assert (tmp_path / "results/toy/figures/qualitative.png").exists()


# --- figures ---------------------------------------------------------------------------------------------------------


def test_models_keep_one_look_and_no_two_share_one() -> None:
    keys = [f"m{i}" for i in range(40)]
    styles = style.model_styles(keys)
    assert len({(s.color, s.marker) for s in styles.values()}) == 40
    assert style.model_styles(keys[:3])["m2"] == styles["m2"]
    small = [style.model_styles(order) for order in (("m0", "unet_small", "m1"), ("unet_small", "sunet_tiny"))]
    assert small[0]["unet_small"] == small[1]["unet_small"], "whatever its position"
    assert len({look.color for look in small[0].values()}) == 3


def test_equal_costs_are_said_to_be_equal() -> None:
    cost = pd.DataFrame({"label": ["A", "B"], "cost.params_m": [0.2, 0.2], "cost.gmacs": [2.0, 1.0]})
    assert _cost_findings(cast(Records, SimpleNamespace(cost=cost))) == [
        "Parameters: the same in all (0.200 M).",
        "B has the fewest multiply-adds (1.000 G), A the most (2.000 G).",
    ]


@pytest.mark.parametrize("count", [4, 8])
def test_cost_figure_names_every_model_outside_its_panels(tmp_path, count) -> None:
    names = {f"model_{i}": f"A network with number {i}" for i in range(count)}
    suite = make_suite(names, (0, 1, 2))
    fabricate(tmp_path, suite, {k: 0.5 + 0.02 * (i % 3) for i, k in enumerate(names)})
    fig = figures.accuracy_cost(load_records(suite, tmp_path))
    fig.draw_without_rendering()
    (legend,) = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == list(names.values())
    looks = {(h.get_color(), h.get_marker()) for h in legend.legend_handles}
    assert len(looks) == count
    box, page = legend.get_window_extent(), fig.bbox
    assert page.x0 <= box.x0
    assert box.x1 <= page.x1
    assert page.y0 <= box.y0
    for ax in fig.axes:
        assert len(ax.containers) == count
        assert box.y1 <= ax.get_tightbbox().y0 + 1
    figures.plt.close(fig)


def test_confusion_panels_show_shares_of_the_true_class(site) -> None:
    root, suite, _ = site
    records = load_records(suite, root)
    matrices, ids = records.confusions("unet_small")
    total = np.sum([m.sum(0, dtype=np.int64) for m in matrices], axis=0)
    fig = report_images.confusion(records)
    shown = fig.axes[1].images[0].get_array()
    np.testing.assert_allclose(np.asarray(shown), 100 * total / total.sum(1, keepdims=True))
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [c.replace("_", " ") for c in CLASSES]
    assert len(ids) == 24
    figures.plt.close(fig)


def test_colorize_paints_ignored_pixels_white() -> None:
    shown = report_images.colorize(np.array([[0, 1, 255]], np.uint8), np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
    assert shown.tolist() == [[[1, 2, 3], [4, 5, 6], [255, 255, 255]]]


@pytest.mark.slow
def test_architecture_figure_is_drawn_twice_alike(tmp_path) -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "architecture.py"))["architecture"]
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert [p.suffix for p in first] == [".png", ".pdf"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


# --- back to the records ---------------------------------------------------------------------------------------------


def _config_hash(root: Path, model: str) -> str:
    records = json.loads((root / f"results/toy/records/evaluate/{model}.json").read_text())
    return str(records[0]["provenance"]["config_hash"])


def test_explain_leads_from_a_number_to_its_runs(site) -> None:
    root, _, _ = site
    text = explain(root / "results", "toy", "accuracy", "unet_small", "score.miou")
    values = _scores(root, "unet_small")
    for seed, value in zip(SEEDS, values, strict=True):
        assert f"evaluate, seed {seed}, single_scale: score.miou = {value}" in text.replace("variant ", "")
    for part in ("git commit: 0123456789abcdef0123", f"data digest: {'d1' * 8}", f"code hash: {'c0de' * 4}",
                 f"config hash: {_config_hash(root, 'unet_small')} (seed 0)",
                 "command: python -m sunets evaluate unet_small", "torch 2.14.1",
                 "records/evaluate/unet_small.json", "difference from sunet_tiny"):  # fmt: skip
        assert part in text
    assert f"seed 1: score.miou = {_scores(root, 'sunet_tiny')[1]}" in text
    assert (
        explain(root / "results", "toy", "accuracy", "U-Net (small)", "mIoU (%)").splitlines()[1:]
        == text.splitlines()[1:]
    )


@pytest.mark.parametrize(
    ("table", "row", "column", "part"),
    [
        ("cost", "sunet_tiny", "cost.gmacs", "cost: cost.gmacs = 0.35"),
        ("per_class", "sunet_tiny", "disc_dark", "score.iou.disc_dark = "),
        ("object_size", "sunet_tiny", "Small objects (%)", "score.mean_accuracy.small = "),
        ("test_time", "sunet_tiny/multi_scale_flip", "score.miou.mean", "variant multi_scale_flip"),
        ("speed", "sunet_tiny", "Latency (ms)", "speed: speed.latency_ms = 12.5"),
        ("training_time", "sunet_tiny/1", "seconds", "resumed = False, seconds = 41.0, seed = 1, "),
    ],
)
def test_explain_knows_every_table(site, table, row, column, part) -> None:
    assert part in explain(site[0] / "results", "toy", table, row, column)


def test_explain_lists_the_recipes_that_a_tuning_tried(site, tmp_path: Path) -> None:
    shutil.copytree(site[0] / "results", tmp_path, dirs_exist_ok=True)
    rates = [{"number": n, "status": "finished", "reason": None, "duplicate_of": None, "train.lr": 0.01 * (n + 1),
              "val.miou": 0.3 + 0.1 * (n == 1), "best": 0.3 + 0.1 * (n > 0)} for n in range(3)]  # fmt: skip
    made = record("tune", "sunet_tiny", "SUNet-tiny", seed=7, scores={"val.miou": 0.4}, trial=1, left_out={},
                  chosen={"train.lr": 0.02}, space=[{"path": "train.lr"}], fingerprint="f")  # fmt: skip
    write_rows(tmp_path / "toy/records/tune/sunet_tiny.csv", rates)
    write(tmp_path / "toy/records/tune/sunet_tiny.json", [])  # as without tuning
    find_records(tmp_path, "toy")
    write(tmp_path / "toy/records/tune/sunet_tiny.json", [made, made])
    with pytest.raises(RecordError, match=r"sunet_tiny\.json: 2 records instead of one"):
        find_records(tmp_path, "toy")
    write(tmp_path / "toy/records/tune/sunet_tiny.json", [made])
    records = find_records(tmp_path, "toy")
    assert 7 not in records.seeds  # that of the tuning
    table = tables.tuning(records)
    write_table(table, tmp_path / "toy/tables")
    text = explain(tmp_path, "toy", "tuning", "sunet_tiny", "train.lr")
    assert "tune, seed 7: " in text
    tried = text.partition("tune/sunet_tiny.csv:\n")[2].splitlines()
    assert tried == [
        "  number = 0, status = finished, train.lr = 0.01, val.miou = 0.3, best = 0.3",
        "  number = 1, status = finished, train.lr = 0.02, val.miou = 0.4, best = 0.4, chosen = yes",
        "  number = 2, status = finished, train.lr = 0.03, val.miou = 0.3, best = 0.4",
    ]
    recipe = "recipe: trial 1 of its tuning, see `sunets explain tuning sunet_tiny trial`"
    assert recipe in explain(tmp_path, "toy", "accuracy", "sunet_tiny", "score.miou")
    assert "trial = 1" in explain(tmp_path, "toy", "tuning", "sunet_tiny", "trial")


@pytest.mark.parametrize(
    ("table", "row", "column", "message"),
    [
        ("acuracy", "x", "y", "acuracy: no such table in .*; there are accuracy, cost"),
        ("accuracy", "unet", "score.miou", "unet: no row of table accuracy; there are sunet_tiny, unet_small"),
        ("accuracy", "unet_small", "miou", "miou: no column of table accuracy; there are .*score.miou"),
    ],
)
def test_explain_names_what_there_is(site, table, row, column, message) -> None:
    if column == "miou":  # the name in words is accepted
        assert "score.miou.mean" in explain(site[0] / "results", "toy", table, row, column)
        column, message = "mious", message.replace("miou:", "mious:")
    with pytest.raises(ReportError, match=message):
        explain(site[0] / "results", "toy", table, row, column)


def test_cost_frames_take_records_of_any_benchmark() -> None:
    one = record("cost", "sunet64_16", "sunet64", params={"model.output_stride": 16}, cost={"cost.params_m": 5.906773})
    two = record("cost", "net", "Net", status="failed", reason="cannot be built")
    data, view = tables.cost_frames([one, two])
    assert data["cost.params_m"].tolist()[0] == 5.906773
    assert view.to_dict("list") == {
        "Model": ["sunet64", "Net"], "Output stride": ["16", "failed: cannot be built"], "Parameters (M)": ["5.907", ""]
    }  # fmt: skip

"""Records made up here -> the whole report: numbers by hand, bytes, failures, pages, explanations."""

from __future__ import annotations

import ast
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from sunets.config import Suite
from sunets.metrics import scores_from_confusion
from sunets.report import build_report, explain, figures, tables
from sunets.report.records import ReportError, load_records, quantity
from sunets.report.tables import latex_escape, write_table

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
    return {
        "kind": kind, "status": "finished", "reason": None, "benchmark": "toy", "model": model, "label": label,
        "seed": None, "variant": None, "scores": {}, "cost": {},
        "params": {"train.epochs": 9, "train.batch_size": 16, "train.optimizer": "adamw", "train.lr": 0.003,
                   "data.test_split": "test", "profile.size": [96, 96], "profile.batch_size": 1},
        "environment": {"python": "3.11.7", "torch": "2.14.1", "torchvision": "0.29.1", "platform": "Linux",
                        "cpu": "A CPU", "cpu_count": 2, "threads": 1, "device": "cpu"},
        "provenance": {"git_commit": "0123456789abcdef0123", "git_dirty": False, "data_digest": "d1" * 8,
                       "code_hash": "c0de" * 4, "config_hash": f"cafe{fields.get('seed')}", "command": f"python -m sunets {kind} {model}"},
    } | fields  # fmt: skip


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
    data = root / "data" / suite.benchmark
    outputs = root / "outputs" / suite.benchmark / "predictions"
    for folder in (data / "images", data / "masks", data / "splits"):
        folder.mkdir(parents=True, exist_ok=True)
    write(data / "manifest.json", {"name": "synthetic", "task": "segmentation", "classes": CLASSES, "palette": PALETTE, "digest": "d1" * 8})
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
                scores = scores_from_confusion(counts.sum(0), CLASSES) | {"score.boundary_f": 0.5 * skill}
                evaluate.append(record("evaluate", key, label, seed=seed, variant=variant, scores=scores))
            for epoch in range(1, 10):
                validated = epoch % 3 == 0
                rows.append({"model": key, "seed": seed, "epoch": epoch, "iteration": 50 * epoch, "lr": 0.003 * (1 - epoch / 10),
                             "train.loss": (1.6 - skill) * np.exp(-epoch / 4) + 0.4 + rng.normal(0, 0.02),
                             "train.miou": skill * (1 - np.exp(-epoch / 3)),
                             "val.miou": skill * (1 - np.exp(-epoch / 3)) + rng.normal(0, 0.01) if validated else ""})  # fmt: skip
        write(records / "train" / f"{key}.json", train)
        write(records / "evaluate" / f"{key}.json", evaluate)
        write(records / "timing" / f"{key}.json", timing)
        write(records / "profile" / f"{key}.json", record("profile", key, label, cost=cost_of(index)))
        (records / "history").mkdir(exist_ok=True)
        with (records / "history" / f"{key}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (records / "confusion").mkdir(exist_ok=True)
        np.savez(records / "confusion" / f"{key}.npz", images=np.array([f"t{i}" for i in range(24)]), **arrays)
        y, x = np.mgrid[-48:48, -48:48]
        field = np.exp(-(np.abs(x) + np.abs(y)) / (4 + 9 * (len(suite.models) - index))) * rng.uniform(0.5, 1, x.shape)
        np.savez(records / "profile" / f"{key}.npz", field=field)
        speed.append(record("speed", key, label, cost={"speed.latency_ms": 12.5 + index, "speed.images_per_second": 80.0 - index}))
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
        "memory.peak_mib": None,
    }  # fmt: skip

"""Stage `evaluate`: score every trained seed of one model on the test split, and keep each image's confusion matrix."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sunets.config import Config, Suite
from sunets.data import load_manifest
from sunets.evaluate import Evaluation
from sunets.evaluate import evaluate as score
from sunets.record import environment, make_record, provenance, read_json, stage_command, write_json
from sunets.stages import Layout, stage
from sunets.stages.parallel import Send, default_workers, run_jobs
from sunets.train import load_trained, select_device


@dataclass(frozen=True)
class Job:
    """The scoring of one seed, as a worker process receives it."""

    config: Config
    data: Path
    weights: Path


def evaluate_one(job: Job, send: Send) -> dict[str, Evaluation]:
    """Score one seed with every test-time variant."""
    manifest = load_manifest(job.data, job.config.data)
    device = select_device(job.config.train.device)
    model, _ = load_trained(job.weights)
    results = {}
    for name, variant in job.config.evaluate.variants.items():
        results[name] = score(
            model,
            manifest,
            job.config,
            split=job.config.data.test_split,
            variant=variant,
            device=device,
            progress=False,
        )
        send(name)
    return results


def evaluate_stage(suite: Suite, key: str, *, workers: int | None = None, root: Path = Path()) -> list[dict[str, Any]]:
    """Score `models.<key>` on the test split: records, per-image confusion matrices, label images for the figure.

    Returns:
        The records, one a seed and variant; a training that failed gives a failed record with its reason.
    """
    layout = Layout(suite.benchmark, root)
    manifest = load_manifest(layout.data, suite.data)
    trained = read_json(layout.records / "train" / f"{key}.json")
    failures = {r["seed"]: r["reason"] for r in trained if r["status"] == "failed"}
    configs = {seed: suite.run(key, seed) for seed in suite.seeds}
    with stage(f"evaluate@{key}", layout, __name__) as code:
        jobs = [Job(c, layout.data, layout.weights(key, seed)) for seed, c in configs.items() if seed not in failures]
        first = configs[suite.seeds[0]].train
        device = select_device(first.device)
        results = run_jobs(
            evaluate_one,
            jobs,
            workers=workers or default_workers(first.threads, device.type),
            preload=["sunets.stages.evaluate"],
            on_message=lambda index, name: print(f"{key} seed {jobs[index].config.seed}: {name} scored", flush=True),
        )
        by_seed = {job.config.seed: result for job, result in zip(jobs, results, strict=True)}
        records, arrays = [], {}
        for seed, config in configs.items():
            for variant in suite.evaluate.variants:
                result = by_seed[seed][variant] if seed in by_seed else None
                records.append(
                    make_record(
                        "evaluate",
                        benchmark=suite.benchmark,
                        model=key,
                        label=suite.models[key].label or key,
                        seed=seed,
                        variant=variant,
                        config=config,
                        status="finished" if result else "failed",
                        reason=None if result else f"not scored, since its training failed: {failures[seed]}",
                        scores=result.scores if result else {},
                        environment=environment(device, config.train.threads),
                        provenance=provenance(manifest.digest, code, config, stage_command(suite, "evaluate", key)),
                    )
                )
                if result:
                    arrays[f"seed{seed}.{variant}"] = result.confusions
                    arrays["images"] = np.array(result.image_ids)
        folder = layout.predictions(key)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        headline = next(iter(suite.evaluate.variants))
        if by_seed:
            for name, labels in next(iter(by_seed.values()))[headline].predictions.items():
                Image.fromarray(labels).save(folder / f"{name}.png")
        confusion = layout.records / "confusion" / f"{key}.npz"
        confusion.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(confusion, **arrays)
        write_json(layout.records / "evaluate" / f"{key}.json", records)
        finished = [r["scores"] for r in records if r["status"] == "finished" and r["variant"] == headline]
        means = {
            name: float(np.mean([s[name] for s in finished]))
            for name in (finished[0] if finished else {})
            if all(isinstance(s.get(name), float) for s in finished)
        }
        write_json(layout.results / "metrics" / f"{key}.json", means)
    return records

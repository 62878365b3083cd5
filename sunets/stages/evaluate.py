"""Stage `evaluate`: score every seed of one model on the test split, with a confusion matrix per image."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sunets.core.config import NOT_IN_IDENTITY, Config, Suite
from sunets.core.executor import Job, Send, at_once, open_pool
from sunets.core.paths import BenchmarkPaths
from sunets.core.provenance import environment, provenance, stage_command
from sunets.core.recipes import tuned
from sunets.core.record import make_record, parameters, read_records, write_arrays, write_json
from sunets.core.stage import stage
from sunets.data.loading import check_scoring
from sunets.data.manifest import Manifest, load_manifest
from sunets.evaluation.evaluate import evaluate as score
from sunets.models.device import select_device
from sunets.models.weights import check_weights, difference, load_trained
from sunets.models.zoo import resolve_config


def evaluate_one(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Score one seed with every test-time variant, in a worker process.

    Args:
        arguments: config (plain values), weights (content of the file, base64) and data (directory).
        send: receives the name of each variant after it was scored.

    Returns:
        environment; scores and image_ids by variant; confusions.VARIANT and by_object_size.VARIANT; label.IMAGE of the
        first variant.
    """
    config = Config.model_validate(arguments["config"])
    manifest = load_manifest(Path(arguments["data"]), config.data)
    device = select_device(config.train.device)
    with tempfile.TemporaryDirectory() as folder:  # the machine of the worker may not have the file
        weights = Path(folder, "weights.pt")
        weights.write_bytes(base64.b64decode(arguments["weights"]))
        model, _ = load_trained(weights)
    result: dict[str, Any] = {
        "environment": environment(device, config.train.threads),
        "scores": {},
        "image_ids": {},
    }
    for name, variant in config.evaluate.variants.items():
        scored = score(
            model,
            manifest,
            config,
            split=config.data.test_split,
            variant=variant,
            device=device,
        )
        result["scores"][name] = scored.scores
        result["image_ids"][name] = list(scored.image_ids)
        result[f"confusions.{name}"] = scored.confusions
        if scored.by_object_size is not None:
            result[f"by_object_size.{name}"] = scored.by_object_size
        if name == arguments["headline"]:
            result |= {f"label.{image}": labels for image, labels in scored.predictions.items()}
        send(name)
    return result


def evaluate_stage(suite: Suite, key: str, *, workers: int | None = None) -> list[dict[str, Any]]:
    """Score `models.<key>` on the test split; write records, confusion matrices per image, and label images.

    Returns:
        The records, one per seed and variant; a failed training gives a failed record with its reason.

    Raises:
        ConfigError: the test split cannot be scored so, or the model's recipe is not tuned yet.
        FileNotFoundError, CheckpointError: weights that are missing, damaged, or of another training.
        ValueError: a failed training of other parameters.
        JobError, StageError: as of `train_stage`.
    """
    paths = BenchmarkPaths(suite.benchmark)
    manifest = load_manifest(paths.data, suite.data)
    suite = tuned(suite, paths, [key], manifest.digest)
    trained = read_records(paths.records / "train" / f"{key}.json", "train")
    configs = {seed: suite.config(key, seed) for seed in suite.seeds}
    failed = [r for r in trained if r["status"] == "failed" and r["seed"] in configs]
    failures = {r["seed"]: r["reason"] for r in failed}
    for record in failed:
        _check_failure(record, configs[record["seed"]], manifest)
    check_scoring(configs[suite.seeds[0]], manifest)
    params = ("benchmark", "seeds", "data", "train", "tune", "evaluate", f"models.{key}")
    with stage(f"evaluate@{key}", paths, __name__, suite=suite, params=params, data_digest=manifest.digest) as code:
        stated = {seed: resolve_config(config) for seed, config in configs.items()}
        command = stage_command(suite, "evaluate", key)
        sources = {seed: provenance(manifest.digest, code, config, command) for seed, config in stated.items()}
        trained_seeds = [seed for seed in configs if seed not in failures]
        jobs = [_job(key, configs[seed], paths, manifest) for seed in trained_seeds]
        first = configs[suite.seeds[0]].train
        with open_pool(
            [__name__], paths.data, manifest.digest, device=first.device, threads=first.threads, jobs=len(jobs),
            results=paths.job_results, workers=workers,
        ) as pool:  # fmt: skip
            (results,) = pool.drive(
                [at_once(jobs)], lambda name, variant: print(f"{name}: {variant} scored", flush=True)
            )
        by_seed = dict(zip(trained_seeds, results, strict=True))
        here = "cpu" if first.device == "cpu" else "auto"  # a login node may have no GPU
        host = next(iter(results), {}).get("environment") or environment(here, first.threads)
        records, arrays = [], {}
        for seed, config in stated.items():
            for variant in suite.evaluate.variants:
                result = by_seed.get(seed)
                records.append(
                    make_record(
                        "evaluate",
                        benchmark=suite.benchmark,
                        task=manifest.task,
                        model=key,
                        label=suite.models[key].label or key,
                        seed=seed,
                        variant=variant,
                        config=config,
                        status="finished" if result else "failed",
                        reason=None if result else f"not scored, since its training failed: {failures[seed]}",
                        scores=result["scores"][variant] if result else {},
                        environment=result["environment"] if result else host,
                        provenance=sources[seed],
                    )
                )
                if result:
                    arrays[f"seed{seed}.{variant}"] = result[f"confusions.{variant}"]
                    if (by_size := result.get(f"by_object_size.{variant}")) is not None:
                        arrays[f"by_object_size.seed{seed}.{variant}"] = by_size
                    arrays["images"] = np.array(result["image_ids"][variant])
        folder = paths.predictions(key)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        if by_seed:
            for name, labels in next(iter(by_seed.values())).items():
                if name.startswith("label."):
                    Image.fromarray(labels).save(folder / f"{name.removeprefix('label.')}.png")
        write_arrays(paths.records / "confusion" / f"{key}.npz", arrays)
        write_json(paths.records / "evaluate" / f"{key}.json", records)
    return records


def _check_failure(record: Mapping[str, Any], config: Config, manifest: Manifest) -> None:
    """Refuse to report the failure of a training with other parameters or data.

    Raises:
        ValueError: names the difference.
    """
    made_by, wanted = (
        {k: v for k, v in (params | {"digest of the data": digest}).items() if not k.startswith(NOT_IN_IDENTITY)}
        for params, digest in (
            (record["params"], record["provenance"]["data_digest"]),
            (parameters(resolve_config(config)), manifest.digest),
        )
    )
    if text := difference(made_by, wanted):
        raise ValueError(
            f"records of train: {record['model']}, seed {record['seed']}: another training failed: {text}; "
            f"train {record['model']} again"
        )


def _job(key: str, config: Config, paths: BenchmarkPaths, manifest: Manifest) -> Job:
    path = paths.weights(key, config.seed)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; train {key} first")
    check_weights(path, config, manifest, f"train {key} again, or put its own file back")
    weights = base64.b64encode(path.read_bytes()).decode()
    headline = next(iter(config.evaluate.variants))
    arguments = {"config": config.model_dump(mode="json"), "headline": headline, "weights": weights}
    name = f"{key} seed {config.seed}"
    return Job(name, f"{__name__}:{evaluate_one.__name__}", arguments, {"data": str(paths.data)})

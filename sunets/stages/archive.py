"""Stage `archive`: predicted labels of a VOC split in an archive for the PASCAL VOC server."""

from __future__ import annotations

from pathlib import Path

from sunets.core.config import ConfigError, Suite
from sunets.core.names import name_fault, printable
from sunets.core.paths import BenchmarkPaths
from sunets.core.recipes import tuned
from sunets.core.stage import stage
from sunets.data.manifest import load_manifest
from sunets.data.preparation import prepare
from sunets.predict import write_server_archive
from sunets.training.fit import check_weights


def archive_stage(
    suite: Suite,
    key: str,
    *,
    split: str = "test",
    variant: str | None = None,
    seed: int | None = None,
    root: Path = Path(),
) -> Path:
    """Segment a split, which needs no labels, and write and check the archive.

    The competition is comp6 (data other than VOC's were used) if training started from published or earlier weights or
    used SBD's labels, else comp5.

    Args:
        suite: parameters of a PASCAL VOC benchmark.
        key: key under `models`.
        split: split of VOC; the server scores `test`, whose labels are not public.
        variant: test-time variant; None takes the last one of `evaluate.variants`, the most thorough by convention.
        seed: training seed of the weights; None takes the first.
        root: root of the checkout.

    Returns:
        The archive in `outputs/<benchmark>/archives/<key>/`.

    Raises:
        ConfigError: a data set other than VOC, or no such variant or seed.
        DataError: the data lack the split, or the finished archive fails its check.
        CheckpointError, FileNotFoundError: the weights cannot be used.
    """
    if suite.data.name != "voc2012":
        raise ConfigError(f"data.name: the server scores PASCAL VOC (voc2012), not {suite.data.name}")
    variants = suite.evaluate.variants
    variant = variant or list(variants)[-1]
    if variant not in variants:
        raise ConfigError(f"--variant {variant}: no such variant; evaluate.variants has {', '.join(variants)}")
    if fault := name_fault(split):
        raise ConfigError(f"--split {printable(split)}: {fault}; name a split of PASCAL VOC")
    seed = suite.seeds[0] if seed is None else seed
    if seed not in suite.seeds:
        raise ConfigError(f"--seed {seed}: not trained; seeds are {', '.join(map(str, suite.seeds))}")
    paths = BenchmarkPaths(suite.benchmark, root)
    suite = tuned(suite, paths, [key])
    config = suite.config(key, seed)
    weights = paths.weights(key, seed)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; train {key} first")
    params = ("benchmark", "seeds", "data", "train", "tune", "evaluate", f"models.{key}")
    with stage(f"archive@{key}", paths, __name__, suite=suite, params=params):
        check_weights(weights, config, load_manifest(paths.data, suite.data), f"train {key} again")
        if split in (suite.data.train_split, suite.data.val_split, suite.data.test_split):
            manifest = load_manifest(paths.data, suite.data)
        else:  # prepared in another directory, so that the benchmark's data stay unchanged
            held_out = suite.data.val_split
            data = suite.data.model_copy(update={"train_split": held_out, "test_split": split})
            manifest = prepare(data, paths.data.with_name(f"{paths.data.name}.{split}"))
        outside = bool(config.train.init_from or config.model.weights or suite.data.train_split.endswith("_aug"))
        return write_server_archive(
            weights,
            manifest,
            root / "outputs" / suite.benchmark / "archives" / key,
            split=split,
            variant=variants[variant],
            outside_data=outside,
            batch_size=config.evaluate.batch_size,
            device=config.train.device,
        )

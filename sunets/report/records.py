"""The records of a benchmark as tidy tables, checked on loading, and how each quantity in them is shown.

Failed and missing runs stay visible: they are rows whose `status` is not "finished" and whose `reason` says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from sunets.core.config import ReportConfig, Suite, Task
from sunets.core.history import read_history
from sunets.core.metrics import (
    OBJECT_SIZES,
    PRIMARY_METRIC,
    scores_by_object_size,
    scores_from_confusion,
    validation_column,
)
from sunets.core.names import PREPARED
from sunets.core.record import (
    REMEDY,
    Kind,
    Record,
    RecordError,
    json_files,
    parameters_hash,
    read_arrays,
    read_json,
    read_records,
    read_rows,
)
from sunets.core.trials import check_chosen

M = TypeVar("M", bound=BaseModel)

FINISHED, FAILED, DIVERGED, NOT_RUN = "finished", "failed", "diverged", "not run"
SETTINGS = Path("tables/report.json")
"""File of a benchmark that holds its section `report` and its models, for what reads several benchmarks."""


class ReportError(ValueError):
    """A question that the results cannot answer; names what they do have."""


@dataclass(frozen=True)
class Quantity:
    """How a number of the records is shown; CSV files keep the unit of the records."""

    name: str
    """In words, without the unit."""
    unit: str = ""
    """As shown; empty for counts and ratios."""
    scale: float = 1.0
    """Shown value over recorded value."""
    digits: int = 2
    """Digits after the point when shown."""

    @property
    def heading(self) -> str:
        """Column heading or axis label."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def difference_unit(self) -> str:
        """Unit of a difference."""
        return "points" if self.unit == "%" else self.unit

    def text(self, value: float | None, *, sign: bool = False) -> str:
        """Format a recorded value; empty where there is none."""
        if value is None or pd.isna(value):
            return ""
        shown = round(self.scale * value, self.digits) + 0.0  # + 0.0 turns -0.0 into 0.0
        return f"{shown:{'+' if sign else ''},.{self.digits}f}"


QUANTITIES: dict[str, Quantity] = {
    "score.miou": Quantity("mIoU", "%", 100),
    "score.pixel_accuracy": Quantity("Pixel accuracy", "%", 100),
    "score.mean_accuracy": Quantity("Mean class accuracy", "%", 100),
    "score.boundary_f": Quantity("Boundary F", "%", 100),
    **{f"score.mean_accuracy.{size}": Quantity(f"{size.capitalize()} objects", "%", 100) for size in OBJECT_SIZES},
    "score.top1_error_percent": Quantity("Top-1 error", "%"),
    "score.top5_error_percent": Quantity("Top-5 error", "%"),
    "cost.params_m": Quantity("Parameters", "M", digits=3),
    "cost.gmacs": Quantity("Multiply-adds", "G", digits=3),
    "cost.gmacs_forward_backward": Quantity("Forward and backward", "G", digits=3),
    "cost.output_stride": Quantity("Output stride", digits=0),
    "memory.saved_mib": Quantity("Saved for backward", "MiB", digits=1),
    "memory.saved_mib_memory_efficient": Quantity("Saved, recomputing", "MiB", digits=1),
    "memory.peak_mib": Quantity("Peak on GPU", "MiB", digits=1),
    "receptive_field.theoretical_px": Quantity("Theoretical field", "px", digits=0),
    "receptive_field.effective_share": Quantity("Effective field", "% of image", 100, digits=1),
    "speed.latency_ms": Quantity("Latency", "ms"),
    "speed.images_per_second": Quantity("Throughput", "images/s", digits=1),
    "speed.step_ms": Quantity("Training step", "ms"),
}
"""Record key -> how it is shown. Other numbers of a record are in the CSV files only, under their key."""

SCORES: dict[Task, tuple[str, ...]] = {
    "segmentation": ("score.miou", "score.pixel_accuracy", "score.mean_accuracy", "score.boundary_f"),
    "classification": ("score.top1_error_percent", "score.top5_error_percent"),
}
"""Scores of the accuracy table."""


def quantity(key: str) -> Quantity:
    """Look up how a record key is shown; class scores and unknown keys included."""
    if key.startswith("score.iou."):
        return Quantity(key.removeprefix("score.iou."), "%", 100)
    return QUANTITIES.get(key, Quantity(key))


@dataclass(frozen=True)
class Runs:
    """The runs behind one row: what they scored, and the records that say how."""

    scores: Mapping[int, float]
    """Seed -> score of the finished runs."""
    records: Sequence[Record] = field(repr=False)
    """Of the trainings and evaluations of these seeds, and of the tuning before them."""
    trials: float = 0
    """Tuning trials of a study behind the recipe; those of a benchmark stand in its records."""


@dataclass(frozen=True, eq=False)
class Records:
    """All records of one benchmark."""

    benchmark: str
    directory: Path
    """results/<benchmark>/records."""
    labels: dict[str, str]
    """Model key -> name in tables and figures, in the order of `params.yaml`."""
    seeds: tuple[int, ...]
    variants: tuple[str, ...]
    """Test-time variants; the first is the headline."""
    task: Task
    raw: dict[str, list[dict[str, Any]]] = field(repr=False)
    """Path below `directory` -> its records as read."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """What may differ between compared rows, and the margin of equivalence."""
    classes: tuple[str, ...] = ()
    """Class names in label order; empty where no manifest is at hand."""
    palette: tuple[tuple[int, int, int], ...] = ()
    """Colour of each class, 0..255."""
    data_warnings: tuple[str, ...] = ()
    """What `prepare` found unusual in the data."""

    @property
    def headline(self) -> str:
        """Key of the score that models are compared by."""
        return PRIMARY_METRIC[self.task]

    @property
    def validation(self) -> str:
        """Column of the histories with the headline score on the validation split."""
        return validation_column(self.headline)

    @property
    def data_name(self) -> str | None:
        """Name of the data set, as the records have it."""
        return next((str(r["params"].get("data.name")) for r in [*self.all("evaluate"), *self.all("train")]), None)

    @cached_property
    def evaluated(self) -> pd.DataFrame:
        """One row per model, seed and variant: model, label, seed, variant, status, reason and every score.*."""
        rows = []
        for model, label in self.labels.items():
            done = {(r["seed"], r["variant"]): r for r in self.all("evaluate", model)}
            trained = {r["seed"]: r for r in self.all("train", model)}
            for seed in self.seeds:
                for variant in self.variants:
                    row: dict[str, Any] = {"model": model, "label": label, "seed": seed, "variant": variant}
                    if (record := trained.get(seed)) and record["status"] == FAILED:  # no other training is recorded
                        row |= {"status": DIVERGED, "reason": record["reason"]}
                    elif record := done.get((seed, variant)):
                        row |= {"status": record["status"], "reason": record["reason"], **record["scores"]}
                    else:
                        row |= {"status": NOT_RUN, "reason": f"no record in records/evaluate/{model}.json"}
                    rows.append(row)
        frame = pd.DataFrame(rows)
        frame[[key for key in SCORES[self.task] if key not in frame]] = np.nan
        return _numbers(frame, "score.")

    @cached_property
    def cost(self) -> pd.DataFrame:
        """One row per model: model, label, status, reason and every cost.*, memory.* and receptive_field.*."""
        missing = {"status": NOT_RUN, "scores": {}, "cost": {}, "params": {}}
        rows = []
        for model, label in self.labels.items():
            reason = f"no record in records/cost/{model}.json"
            record = next(iter(self.all("cost", model)), missing | {"reason": reason})
            rows.append(record | {"model": model, "label": label})
        return cost_rows(rows)

    @cached_property
    def speed(self) -> pd.DataFrame:
        """One row per timed model: model, label, status, reason, every speed.* and memory.*; empty if never timed."""
        return speed_rows([r | {"label": self.labels[r["model"]]} for r in self.all("speed")])

    @cached_property
    def timing(self) -> pd.DataFrame:
        """One row per model and seed: how long training took, on what; noisy, and empty if never timed."""
        return pd.DataFrame([{"model": r["model"], "label": self.labels[r["model"]]} | r for r in self.all("timing")])

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row per model, seed and epoch: model, label, seed, epoch and every train.* and val.* number."""
        frames = []
        for model, label in self.labels.items():
            path = self.directory / "history" / f"{model}.csv"
            if path.exists() and (rows := read_history(path, "seed")):
                frame = pd.DataFrame(rows)
                frame.insert(1, "label", label)
                frames.append(frame)
        columns = ["model", "label", "seed", "epoch"]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)

    def scores(self, model: str, key: str | None = None, variant: str | None = None) -> dict[int, float]:
        """Map seed -> score of one model's finished runs; the headline of the first test-time variant by default."""
        e, key = self.evaluated, key or self.headline
        if key not in e:
            return {}
        rows = e[(e.model == model) & (e.variant == (variant or self.variants[0])) & (e.status == FINISHED)]
        return {int(s): float(v) for s, v in zip(rows.seed, rows[key], strict=True) if pd.notna(v)}

    def runs(self, model: str, key: str | None = None, variant: str | None = None) -> Runs:
        """Return the runs behind a model's row; arguments as of `scores`."""
        variant = variant or self.variants[0]
        evaluated = (r for r in self.all("evaluate", model) if r["variant"] == variant)
        made = [*self.all("tune", model), *self.all("train", model), *evaluated]
        return Runs(self.scores(model, key, variant), made)

    def trials(self, model: str) -> pd.DataFrame:
        """Return one row per trial of a model's tuning, in order: number, status, values, score and the best so far."""
        path = self.directory / "tune" / f"{model}.csv"
        made = path.exists() or self.all("tune", model)
        frame = pd.DataFrame(read_rows(path, ("number", "best")) if made else [])
        return _numbers(frame, "val.", "best", "first", "seed ") if len(frame) else frame

    def confusions(self, model: str, variant: str | None = None) -> tuple[list[NDArray], list[str]]:
        """Return each finished seed's (n_images, K, K) counts, rows are the truth, and the ids of the images."""
        arrays, _, images = _read_confusions(self.directory, model)
        names = [f"seed{seed}.{variant or self.variants[0]}" for seed in self.scores(model, variant=variant)]
        counts = [arrays[name] for name in names if name in arrays]
        return counts, images if counts else []

    def effective_field(self, model: str) -> NDArray | None:
        """Return (H, W) mean absolute input gradient of a centre logit, or None."""
        path = self.directory / "cost" / f"{model}.npz"
        if not path.exists():
            return None
        field = read_arrays(path).get("field")
        if field is not None and (field.ndim != 2 or field.dtype.kind != "f" or not np.isfinite(field).all()):
            raise RecordError(f"{path}: field is not a map of finite numbers; run the stage cost again")
        return field

    def all(self, kind: str, model: str | None = None) -> list[Record]:
        """Return every record of a kind, of one model or of all in `labels`."""
        models = self.labels if model is None else [model]
        paths = ["speed.json"] if kind == "speed" else [f"{kind}/{model}.json" for model in models]
        return [r for path in paths for r in self.raw.get(path, []) if r["model"] in self.labels]


def cost_rows(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Make a tidy table of cost records: model, label, status, reason, every cost.*, memory.*, receptive_field.*."""
    rows = [
        {k: r[k] for k in ("model", "label", "status", "reason")}
        # As configured, where the record does not state that of the network.
        | {"cost.output_stride": r["params"].get("model.output_stride"), "cost.params_m": None, "cost.gmacs": None}
        | r["cost"]
        for r in records
    ]
    return _numbers(pd.DataFrame(rows), "cost.", "memory.", "receptive_field.")


def speed_rows(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Make a tidy table of timings: model, label, status, reason and every speed.* and memory.*."""
    rows = [{k: r[k] for k in ("model", "label", "status", "reason")} | r["cost"] for r in records]
    return _numbers(pd.DataFrame(rows, columns=None if rows else ["model"]), "speed.", "memory.")


def load_records(suite: Suite, root: Path) -> Records:
    """Load the records of a suite's benchmark below `root`.

    Raises:
        FileNotFoundError: there is no record at all.
        RecordError: a file is damaged, a record lacks a field, or it contradicts its parameters or confusion matrices.
    """
    directory = root / "results" / suite.benchmark / "records"
    labels = _distinct({key: entry.label or key for key, entry in suite.models.items()})
    manifest = _read(_Manifest, root / PREPARED / suite.benchmark / "manifest.json")
    return Records(
        benchmark=suite.benchmark,
        directory=directory,
        labels=labels,
        seeds=suite.seeds,
        variants=tuple(suite.evaluate.variants),
        task=suite.data.task,
        raw=_read_all(directory, labels, manifest.classes),
        report=suite.report,
        classes=manifest.classes,
        palette=manifest.palette,
        data_warnings=manifest.warnings,
    )


def find_records(results: Path, benchmark: str) -> Records:
    """Load the records of a benchmark as its files alone tell, without `params.yaml`.

    Raises:
        FileNotFoundError: no such benchmark, or it has no record.
        RecordError: a file is damaged, or a record lacks a field.
    """
    directory = results / benchmark / "records"
    settings = _read(_Settings, results / benchmark / SETTINGS)
    found = sorted({p.stem for kind in ("train", "evaluate", "cost") for p in json_files(directory / kind)})
    names = [name for name in found if settings.models is None or name in settings.models]
    if not names:
        raise FileNotFoundError(f"{directory}: no model was trained, scored or counted; run `dvc repro` first")
    raw = _read_all(directory, dict.fromkeys(names, ""))
    records = [r for name, rows in raw.items() if not name.startswith("timing/") for r in rows]
    evaluated = [r for r in records if r["kind"] == "evaluate"]
    return Records(
        benchmark=benchmark,
        directory=directory,
        labels=_distinct({name: next((r["label"] for r in records if r["model"] == name), name) for name in names}),
        seeds=tuple(dict.fromkeys(r["seed"] for r in records if r["seed"] is not None and r["kind"] != "tune")) or (0,),
        variants=tuple(dict.fromkeys(r["variant"] for r in evaluated)) or ("single_scale",),
        task=records[0]["task"],
        raw=raw,
        report=ReportConfig.model_validate(settings.model_dump(exclude={"models"})),
    )


def _distinct(labels: dict[str, str]) -> dict[str, str]:
    """Add its key to each label if two models share one: tables and figures must not merge them."""
    shared = len(set(labels.values())) < len(labels)
    return {key: f"{label} [{key}]" if shared else label for key, label in labels.items()}


class _Settings(ReportConfig):
    """Content of the file `SETTINGS`."""

    models: tuple[str, ...] | None = None
    """Keys of the models that the benchmark has: records of one that was removed may still be there."""


def read_checked(path: Path, kind: Kind) -> list[Record]:
    """Read a file of records, whose parameters must be those that they were made with.

    Raises:
        FileNotFoundError: no such file.
        RecordError: the file is damaged, or a record's config_hash is not that of its parameters.
    """
    records = read_records(path, kind)
    for r in records:
        stated, computed = r["provenance"]["config_hash"], parameters_hash(r["params"])
        if stated != computed:
            raise RecordError(
                f"{path}: {r['model']}, seed {r['seed']}: config_hash is {stated}, but that of its params is "
                f"{computed}; {REMEDY}"
            )
    return records


def _check_scores(directory: Path, model: str, records: Sequence[Record], classes: Sequence[str]) -> None:
    """Check the scores of evaluations against the confusion matrices beside them, where there are any."""
    path = directory / "evaluate" / f"{model}.json"
    arrays, by_size, _ = _read_confusions(directory, model)
    for r in records if arrays else ():
        if r["status"] != FINISHED:
            continue
        counts = arrays.get(f"seed{r['seed']}.{r['variant']}")
        who = f"{path}: {model}, seed {r['seed']}, {r['variant']}"
        if counts is None:
            raise RecordError(f"{who}: records/confusion/{model}.npz has no matrices of it; {REMEDY}")
        total = counts.sum(0, dtype=np.int64)
        computed: dict[str, float | None]
        if r["task"] == "classification":
            computed = {"score.top1_error_percent": 100 * (1 - float(total.trace() / total.sum()))}
        else:
            computed = scores_from_confusion(total, classes if len(classes) == len(total) else None)
            if (sizes := by_size.get(f"seed{r['seed']}.{r['variant']}")) is not None:
                if (sizes.sum(0) != total).any():
                    raise RecordError(f"{who}: the matrices by object size do not add up to those by image; {REMEDY}")
                computed |= scores_by_object_size(sizes)
        for key, value in computed.items():
            stated = r["scores"].get(key)
            if (stated is None) != (value is None) or not math.isclose(stated or 0.0, value or 0.0, rel_tol=1e-9):
                raise RecordError(f"{who}: {key} is {stated}, but its confusion matrices give {value}; {REMEDY}")


def _read_confusions(directory: Path, model: str) -> tuple[dict[str, NDArray], dict[str, NDArray], list[str]]:
    """Read `seedN.VARIANT` -> (n_images, K, K) counts, rows are the truth; the same by object size; the image ids.

    Empty without a file.
    """
    path = directory / "confusion" / f"{model}.npz"
    if not path.exists():
        return {}, {}, []
    arrays = read_arrays(path)
    images = arrays.pop("images", np.empty(0, str))
    prefix = "by_object_size."
    by_size = {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}
    shapes = {a.shape for a in arrays.values()} | {(len(images), *a.shape[1:]) for a in by_size.values()}
    counts = [*arrays.values(), *by_size.values()]
    if len(shapes) > 1 or any(a.ndim != 3 or a.dtype.kind not in "ui" for a in counts):
        raise RecordError(f"{path}: holds no confusion matrices of equal shape; run the stage evaluate again")
    if any(a.shape != (len(images), a.shape[1], a.shape[1]) for a in arrays.values()):
        raise RecordError(f"{path}: its matrices are not one per image; run the stage evaluate again")
    if any(len(a) != len(OBJECT_SIZES) for a in by_size.values()):
        raise RecordError(f"{path}: its matrices by object size are not {len(OBJECT_SIZES)}; {REMEDY}")
    return arrays, by_size, [str(i) for i in images]


def _read_all(
    directory: Path, models: Mapping[str, str], classes: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    kinds: tuple[Kind, ...] = ("train", "evaluate", "cost", "tune")
    wanted: dict[str, Kind] = {f"{kind}/{model}.json": kind for model in models for kind in kinds}
    wanted["speed.json"] = "speed"
    raw = {name: read_checked(directory / name, kind) for name, kind in wanted.items() if (directory / name).exists()}
    for model in models:
        name = f"timing/{model}.json"
        if (directory / name).exists():
            raw[name] = read_records(directory / name, "timing")
        if evaluated := raw.get(f"evaluate/{model}.json"):
            _check_scores(directory, model, evaluated, classes)
        for record in raw.get(f"tune/{model}.json", []):
            check_chosen(record, directory / "tune" / f"{model}.json")
    if not raw:
        raise FileNotFoundError(f"{directory}: no records of any model; run `dvc repro` first")
    return raw


class _Manifest(BaseModel):
    """What a report shows of the prepared data."""

    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    warnings: tuple[str, ...] = ()


def _read(content: type[M], path: Path) -> M:
    """Read a JSON file; the default content where there is none."""
    try:
        return content.model_validate(read_json(path) if path.exists() else {})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise RecordError(f"{path}: {where or 'content'}: {fault['msg']}; {REMEDY}") from None


def _numbers(frame: pd.DataFrame, *prefixes: str) -> pd.DataFrame:
    """Replace None, which JSON has for "no value", with NaN, so that the columns are numeric."""
    for column in frame.columns[frame.columns.str.startswith(prefixes)]:
        if not frame[column].map(lambda v: isinstance(v, str)).any():
            frame[column] = pd.to_numeric(frame[column])
    return frame

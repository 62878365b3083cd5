"""The wanted content of MLflow runs, built from records by the live tracker and by `sync` alike."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sunets.core.config import fingerprint
from sunets.core.metrics import PRIMARY_METRIC, higher_is_better, search_key, validation_column

SIZE = ("cost.params_m", "cost.gmacs")
"""Costs of a trial's run."""
COSTS = (
    *SIZE, "cost.gmacs_forward_backward", "receptive_field.effective_share", "memory.saved_mib", "memory.peak_mib",
    "speed.latency_ms", "speed.step_ms", "speed.images_per_second",
)  # fmt: skip
"""Costs of a model's run; its trainings, which share them, show none."""
CURVES, SUMMARY, VARIANTS = "curves/", "summary/", "variants/"
"""Groups of metrics; MLflow sorts them by name and puts metrics without a slash last."""
NAMES = 2
"""Version of the metrics' names. MLflow cannot rename a metric, so a run with older names is not continued."""
RECIPE = ("lr", "weight_decay", "zero_init_residual", "zero_init_head", "optimizer", "batch_size", "epochs")
"""Keys of section `train` in the run table."""
STRUCTURE = ("model.name", "model.output_stride")
"""Structure parameters of a model's run. The others are tags: networks of another kind lack them, and MLflow's
comparison would plot axes of nulls."""
LONGEST_VALUE = 5000
"""Characters of a parameter or tag; above 6000 MLflow warns."""
LONGEST_NAME = 220
"""Characters of a name; MLflow allows 250, with prefixes and suffixes such as summary/ and .mean.best."""
STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True, kw_only=True)
class Network:
    """The trained network of a run, which MLflow shows as a logged model; its weights stay in their file."""

    name: str
    params: Mapping[str, str]
    """What cannot change: MLflow has no way to write a parameter twice."""
    tags: Mapping[str, str]
    output: tuple[int, ...]
    """Shape of the logits; -1 is any size."""

    @property
    def key(self) -> str:
        """Digest of what cannot change; another one makes another logged model."""
        return fingerprint(self.name, dict(self.params), self.output)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The wanted content of one MLflow run."""

    experiment: str
    slot: str
    """Name of the training, such as train/camvid/sunet64/seed0; one run per slot is current."""
    identity: str
    """Digest of configuration, data and code."""
    name: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """(metric, epoch) -> value: the curves."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Single values; a later one replaces an earlier one."""
    headline: str = ""
    """The metric that runs are compared by."""
    columns: tuple[str, ...] = ()
    """Columns of the run table in MLflow's notation; empty for runs that add none."""
    status: str = "RUNNING"
    seconds: tuple[float, float] | None = None
    """Start and end in seconds since 1970, where known."""
    dataset: tuple[str, str] | None = None
    """Name and digest."""
    files: tuple[tuple[Path, str | None], ...] = ()
    """Artifacts and their folders."""
    network: Network | None = None

    @property
    def key(self) -> str:
        """Slot, identity and version of the names: equal for equal runs."""
        return f"{self.slot}/{self.identity}/{NAMES}"

    @property
    def first(self) -> dict[tuple[str, int], float]:
        """The first metric of a new run: the headline score, NaN until it is measured."""
        return {(self.headline, 0): self.metrics.get(self.headline, math.nan)} if self.headline else {}

    @property
    def values(self) -> dict[str, float]:
        """The metrics, with the headline score repeated under the name that sorts first."""
        aim = {f"aim/{self.headline}": self.metrics[self.headline]} if self.headline in self.metrics else {}
        return aim | dict(self.metrics)

    @property
    def digest(self) -> str:
        """Digest of the content."""
        files = [(path.name, folder, hashlib.sha256(path.read_bytes()).hexdigest()) for path, folder in self.files]
        points = sorted((name, step, value) for (name, step), value in self.points.items())
        content = [dict(self.params), dict(self.tags), points, self.values, self.status, self.name]
        network = [self.network.key, dict(self.network.tags)] if self.network else []
        return fingerprint(content, self.dataset, files, *network)


def make_slot(kind: str, benchmark: str, item: str, child: str = "") -> str:
    """Return the name of a run's slot."""
    return "/".join(quote(part, safe="") for part in (kind, benchmark, item, child) if part)


def plain_text(value: Any) -> str:
    """Return a value as text for MLflow, without spaces, since its parallel coordinates show ten characters."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    text = text.encode(errors="replace").decode().replace("\0", "?")  # databases refuse both
    return shorten(text, LONGEST_VALUE)


def shorten(text: str, length: int) -> str:
    """Return the text, or its beginning and digest, so that different texts stay different."""
    return text if len(text) <= length else f"{text[: length - 12]}... {_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def legal_names(names: Iterable[str]) -> dict[str, str]:
    """Map names to names that MLflow accepts: letters of all alphabets, digits, spaces and ``_-.:/``.

    Names that would collide get a digest, except one that needed no replacement.
    """
    legal_by_name = {}
    for name in dict.fromkeys(names):
        legal = re.sub(r"[^\w\-. :/]", "_", unicodedata.normalize("NFC", name))
        if posixpath.normpath(legal) != legal or legal.startswith(("/", "..")):  # MLflow checks it as a path
            legal = re.sub(r"^\.+|/", "_", legal)
        legal_by_name[name] = shorten(legal, LONGEST_NAME)
    counts = Counter(legal_by_name.values())
    return {k: f"{v} {_digest(k)}" if counts[v] > 1 and v != k else v for k, v in legal_by_name.items()}


def legal(values: Mapping[str, str]) -> dict[str, str]:
    """Rename parameters or tags to names that MLflow accepts."""
    names = legal_names(values)
    return {names[name]: value for name, value in values.items()}


def finite_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers, under names that MLflow accepts."""
    names = legal_names(values)
    return {
        prefix + names[name]: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def curve_points(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """Return the curves in rows of a history."""
    coordinates = ("epoch", "iteration", "seed", "number")
    return {
        (name, int(row["epoch"])): value
        for row in rows
        for name, value in finite_numbers({k: v for k, v in row.items() if k not in coordinates}, CURVES).items()
    }


def _ends(points: Mapping[tuple[str, int], float], headline: str) -> dict[str, float]:
    """Return the final and best headline score on validation: MLflow's tables show only the last value."""
    name = validation_column(headline)
    values = [value for (curve, _), value in sorted(points.items()) if curve == CURVES + name]
    ends = {"final": values[-1], "best": (max if higher_is_better(headline) else min)(values)} if values else {}
    return {f"{SUMMARY}{name}.{end}": value for end, value in ends.items()}


def overall(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out scores of a class or an object size, such as score.iou.car, which only runs of trainings show."""
    return {name: value for name, value in scores.items() if name.count(".") == 1}


def _tags(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of a run, to filter runs by."""
    names = ("kind", "status", "reason", "benchmark", "model", "label", "seed", "study", "number", "phase")
    tags = {name: record.get(name) for name in names}
    for group in ("provenance", "environment"):
        tags |= {f"{group}.{name}": value for name, value in record[group].items()}
    if record.get("reason"):
        tags["mlflow.note.content"] = f"{record['status']}: {record['reason']}"
    tags["mlflow.source.type"] = "LOCAL"
    tags["mlflow.source.name"] = record["provenance"].get("command")
    tags["mlflow.source.git.commit"] = record["provenance"].get("git_commit")
    return {name: plain_text(value) for name, value in tags.items() if value is not None}


def _params(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters of a training; those of `evaluate` are tags, since MLflow's parameters cannot change."""
    return legal({k: plain_text(value) for k, value in record["params"].items() if not k.startswith("evaluate.")})


def _varied(record: Mapping[str, Any], name: str) -> bool:
    """Return whether a parameter, or a section that it is in, may differ between the trials of a study."""
    paths = ("seed", *(record.get("arm") or {}), *(record.get("tuned") or {}))
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _headline(record: Mapping[str, Any]) -> str:
    """Return the name of the headline score, which differs for the trials of a sampler."""
    key = PRIMARY_METRIC[record["task"]]
    return search_key(key) if record.get("phase") in ("tuning", "search") else key


def _common(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the parameters that trainings share."""
    params = [_params(record) for record in records]
    return {k: v for k, v in params[0].items() if k != "seed" and all(p.get(k) == v for p in params)}


def _dataset(record: Mapping[str, Any]) -> tuple[str, str] | None:
    digest = record["provenance"].get("data_digest")
    return (str(record["params"].get("data.name", record["benchmark"])), digest) if digest else None


def _made_by(record: Mapping[str, Any]) -> list[Any]:
    return [record["provenance"].get(name) for name in ("data_digest", "code_hash")]


def child_run(record: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] = (), *, ended: bool = True) -> Run:
    """Build the run of one training or trial from its record, which has no outcome before it ended, and its history."""
    points = curve_points(rows)
    metrics = _ends(points, _headline(record)) if ended else {}
    tags, params = _tags(record), _params(record)
    if record["kind"] == "trial":
        experiment = f"{record['benchmark']}/ablations"
        slot = make_slot("trial", record["benchmark"], record["study"], f"{record['number']}")
        arm = dict(sorted((record.get("arm") or {}).items()))  # as in the records file
        axes = [f"{path.removeprefix('model.')}={plain_text(value)}" for path, value in arm.items()]
        name = ", ".join([f"#{record['number']}", *axes, f"seed {record['seed']}"])
        tags |= {f"arm.{path}": plain_text(value) for path, value in arm.items()}
        tags |= {k: plain_text(v) for k, v in record["params"].items() if v is not None and not _varied(record, k)}
        metrics |= finite_numbers(overall(record["scores"]) | {k: record["cost"].get(k) for k in SIZE})
        # Axes have the arm's values, as in tables: one null would make MLflow treat all values as text.
        params = {k: plain_text(arm.get(k, v)) for k, v in record["params"].items() if _varied(record, k)}
    else:
        experiment = record["benchmark"]
        slot = make_slot("train", record["benchmark"], record["model"], f"seed{record['seed']}")
        name = f"{record['label']}, seed {record['seed']}"
    if not ended:
        tags.pop("status")
    return Run(
        experiment=experiment,
        slot=slot,
        identity=fingerprint(record["provenance"].get("config_hash"), *_made_by(record)),
        name=shorten(name, 250),
        params=legal(params),
        tags=legal(tags),
        points=points,
        metrics=metrics,
        headline=_headline(record),
        status=STATUS[record["status"]] if ended else "RUNNING",
        dataset=_dataset(record),
    )


def model_run(records: Sequence[Mapping[str, Any]], *, ended: bool = True) -> Run:
    """Build the parent run of a model from the records of its trainings."""
    first, common = records[0], _common(records)
    shared = ("benchmark", "model", "label", "provenance", "params")
    record = {name: first[name] for name in shared} | {"kind": "model", "environment": {}}
    tags = {k: v for k, v in _tags(record).items() if k != "provenance.config_hash"}
    return Run(
        experiment=first["benchmark"],
        slot=make_slot("model", first["benchmark"], first["model"]),
        identity=fingerprint(common, *_made_by(first)),
        name=shorten(first["label"] or first["model"], 250),
        params={k: v for k, v in common.items() if k in STRUCTURE or not k.startswith("model.")},
        tags={**tags, **{k: v for k, v in common.items() if k.startswith("model.") and k not in STRUCTURE}},
        headline=f"{_headline(first)}.mean",
        columns=(
            *(f"metrics.`{_headline(first)}.{k}`" for k in ("mean", "ci95_low", "ci95_high")),
            *(f"params.`train.{k}`" for k in RECIPE),
            *(f"metrics.`{k}`" for k in (*SIZE, _headline(first))),
        ),
        status=_outcome(records) if ended else "RUNNING",
        dataset=_dataset(first),
    )


def study_run(records: Sequence[Mapping[str, Any]], *, ended: bool = True) -> Run:
    """Build the parent run of a study from the records of its trials."""
    first = records[0]
    fixed = {name: value for name, value in _common(records).items() if not _varied(first, name)}
    counts = {f"trials.{status}": float(sum(r["status"] == status for r in records)) for status in STATUS}
    best, arm = _best(records) if ended else ({}, {})
    return Run(
        experiment=f"{first['benchmark']}/ablations",
        slot=make_slot("study", first["benchmark"], first["study"]),
        identity=fingerprint(fixed),
        name=first["study"],
        params=fixed,
        tags={"kind": "study", **{name: first[name] for name in ("benchmark", "study", "model")}} | arm,
        metrics=counts | best if ended else {},
        headline="trials.finished",
        columns=(
            *(f"metrics.`{k}`" for k in (f"{SUMMARY}{_headline(records[-1])}.mean.best", _headline(records[-1]))),
            "tags.`best.setting`",
            *(f"params.`{path}`" for path in {**(first.get("arm") or {}), **(first.get("tuned") or {})}),
            *(f"metrics.`{k}`" for k in SIZE),
        ),
        status=_outcome(records) if ended else "RUNNING",
    )


def _best(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the best mean score over the seeds of a setting as a metric, and the setting as a tag.

    Scores of a sampler's trials count only if a study has no others: on the validation split they are optimistic.
    """
    name = min(_headline(record) for record in records)  # score. before search.
    settings: dict[str, list[float]] = {}
    for record in records:
        value = record["scores"].get(name)
        if record["status"] == "finished" and value is not None and math.isfinite(value):
            chosen = {**(record.get("arm") or {}), **(record.get("tuned") or {})}
            settings.setdefault(plain_text(dict(sorted(chosen.items()))), []).append(value)
    if not settings:
        return {}, {}
    means = {setting: sum(values) / len(values) for setting, values in settings.items()}
    best = (max if higher_is_better(name) else min)(means, key=means.__getitem__)
    return {f"{SUMMARY}{name}.mean.best": means[best]}, {"best.setting": best}


def _outcome(records: Sequence[Mapping[str, Any]]) -> str:
    return "FAILED" if records and all(r["status"] == "failed" for r in records) else "FINISHED"

"""MLflow runs rebuilt from the records."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from sunets.core.config import parse_yaml
from sunets.core.history import read_history
from sunets.core.metrics import PRIMARY_METRIC
from sunets.core.names import PREPARED, check_name
from sunets.core.paths import BenchmarkPaths
from sunets.core.record import Kind, Record, RecordError, json_files, read_json, read_records, read_rows
from sunets.tracking.address import CREATION_LIMIT, TrackingError, failure
from sunets.tracking.live import REMEDY, warn_once
from sunets.tracking.store import CURRENT, EXTERNAL, Store, is_alive
from sunets.tracking.view import (
    COSTS,
    CURVES,
    SUMMARY,
    VARIANTS,
    Network,
    Run,
    child_run,
    finite_numbers,
    legal,
    make_slot,
    model_run,
    overall,
    plain_text,
    shorten,
    study_run,
)

Family = tuple[Run, list[Run]]
"""A parent run and its children."""


@dataclass(frozen=True)
class Synced:
    """Numbers of runs that `sync` created, completed and left unchanged."""

    created: int
    updated: int
    unchanged: int
    links: tuple[str, ...] = field(default=(), compare=False)
    """Address of the run table of each experiment."""
    left_out: tuple[str, ...] = field(default=(), compare=False)
    """Benchmarks whose records cannot be read, and why."""

    def __str__(self) -> str:
        return f"MLflow: {self.created} runs created, {self.updated} updated, {self.unchanged} unchanged"


def sync(results: Path, benchmark: str | None = None, pages: str = "") -> Synced:
    """Rebuild the runs in MLflow from the records of one benchmark or all; a second call changes nothing.

    `pages` is the address of the MLflow UI, for the links. Of all benchmarks, those whose records cannot be read are
    left out.

    Raises:
        FileNotFoundError: there are no records at all.
        RecordError, FileNotFoundError: a file of the one benchmark is damaged or missing.
        ValueError: `benchmark` cannot be a name.
        TrackingError: MLflow cannot be reached or refuses.
    """
    name = "*" if benchmark is None else check_name(benchmark)
    folders = sorted(path.parent for path in results.glob(f"{name}/records"))
    if not folders:
        raise FileNotFoundError(f"{results / name / 'records'}: no records; run `dvc repro` first")
    wanted: dict[str, list[Family]] = {}
    left_out = []
    for folder in folders:
        try:
            wanted[folder.name] = [*_models(folder), *_tunings(folder), *_studies(folder), *_report(folder)]
        except (RecordError, FileNotFoundError) as error:
            if benchmark is not None:
                raise
            left_out.append(f"{folder.name} is left out: {error}")
    try:
        store = Store()
        # Two processes writing the same runs at once would duplicate them or break the database's constraints.
        with FileLock(f"{store.lock.lock_file}.sync", timeout=CREATION_LIMIT):
            return replace(_write(store, wanted, pages), left_out=tuple(left_out))
    except Timeout:
        raise TrackingError(f"MLflow: another process is syncing; wait for it to end, then: {REMEDY}") from None
    except (TrackingError, OSError) as error:
        raise TrackingError(f"MLflow: {failure(error)}; see MLFLOW_TRACKING_URI, then: {REMEDY}") from error


def _write(store: Store, wanted: Mapping[str, list[Family]], pages: str) -> Synced:
    """Write the runs of each benchmark, and retire all others."""
    counts: Counter[str] = Counter()
    links = []
    for name, families in wanted.items():
        kept = set()
        for parent, children in families:
            finished = [store.finish(parent)]
            finished += [store.finish(child, finished[0][0]) for child in children]
            kept |= {run_id for run_id, _ in finished}
            counts.update(change for _, change in finished)
        for experiment in (name, f"{name}/tuning", f"{name}/ablations"):
            if store.experiment(experiment, create=False) is None:
                continue
            links.append(f"{experiment}: {store.link(experiment, pages)}")
            for run in store.search(experiment, CURRENT, "true"):
                if run.info.run_id not in kept and not is_alive(run):
                    store.retire(run)
    return Synced(counts["created"], counts["updated"], counts["unchanged"], tuple(links))


def sync_or_warn(results: Path, benchmark: str) -> None:
    """Run `sync` at the end of a stage: report a failure once, never fail the stage."""
    try:
        sync(results, benchmark)
    except (RecordError, FileNotFoundError) as error:  # no fault of MLflow's
        print(f"MLflow is not brought up to date: {error}", file=sys.stderr)
    except Exception as error:
        warn_once(error.__cause__ if isinstance(error, TrackingError) and error.__cause__ else error)


def _records(path: Path, kind: Kind | Literal["timing"]) -> list[Record]:
    return read_records(path, kind) if path.exists() else []


def _histories(path: Path, key: Literal["seed", "number"]) -> dict[int, list[Record]]:
    """Map the seed or number of a trial -> its rows of a history."""
    rows: dict[int, list[Record]] = defaultdict(list)
    for row in read_history(path, key):
        rows[row[key]].append(row)
    return rows


def _reported(folder: Path, models: set[str]) -> list[str]:
    """Leave out models that the last report does not have, since they were removed; without a report keep all."""
    from sunets.report.records import SETTINGS  # its package imports pandas, which live tracking must not

    settings = folder / SETTINGS
    shown = read_json(settings).get("models") if settings.exists() else None
    return sorted(models & {*(shown or models)})


def _models(folder: Path) -> list[Family]:
    """Build the runs of every model of a benchmark; `folder` is results/BENCHMARK."""
    base = folder / "records"
    speed = _records(base / "speed.json", "speed")
    table = folder / "tables" / "accuracy.csv"
    shown = {row["model"]: row for row in read_rows(table, ("model",))} if table.exists() else {}
    found = {path.stem for kind in ("train", "evaluate", "cost") for path in json_files(base / kind)}
    families = []
    for model in _reported(folder, found):
        kinds: tuple[Kind | Literal["timing"], ...] = ("train", "evaluate", "cost", "timing")
        trained, tested, counted, timed = (_records(base / kind / f"{model}.json", kind) for kind in kinds)
        path = base / "history" / f"{model}.csv"
        histories = _histories(path, "seed") if path.exists() else {}
        children = []
        for record in trained:
            child = child_run(record, histories.get(record["seed"], ()))
            timing = next((t for t in timed if t["seed"] == record["seed"]), {})
            noisy = {k: v for k, v in timing.items() if k in ("seconds", "images_per_second")}
            scores = [r for r in tested if r["seed"] == record["seed"]]
            metrics = {k: v for r in scores for k, v in _scores(r, tested).items()}
            children.append(
                replace(
                    child,
                    metrics={**child.metrics, **finite_numbers(noisy, "timing."), **metrics},
                    tags={**child.tags, **_test_settings(scores)},
                    seconds=_period(timing),
                    files=_figures(folder / "figures", "training_curves.png"),
                    network=_network(record, counted[0], folder.parent.parent) if counted else None,
                )
            )
        parent = model_run(trained or tested or counted)
        exact = [r for r in [*counted, *(r for r in speed if r["model"] == model)] if r["status"] == "finished"]
        costs = finite_numbers({k: v for r in exact for k, v in r["cost"].items() if k in COSTS})
        periods = [child.seconds for child in children if child.seconds]
        parent = replace(
            parent,
            metrics=_summary(tested, shown.get(model, {})) | costs,
            tags={**parent.tags, **_test_settings(tested)},
            seconds=(min(p[0] for p in periods), max(p[1] for p in periods)) if periods else None,
            files=_figures(folder / "figures", "*.png"),
        )
        families.append((parent, children))
    return families


def _scores(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the scores of the first test-time variant; of another only the headline score."""
    if record["variant"] == records[0]["variant"]:
        return finite_numbers(record["scores"])
    headlines = {k: v for k, v in record["scores"].items() if k in PRIMARY_METRIC.values()}
    return finite_numbers(headlines, f"{VARIANTS}{record['variant']}.")


def _test_settings(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    params = records[0]["params"] if records else {}
    return {name: plain_text(value) for name, value in params.items() if name.startswith("evaluate.")}


def _summary(tested: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean of each overall score over the seeds, and the interval of the headline score.

    The interval over seeds and images is that of `row`, the model's in the table of accuracy; without such a row, or if
    it comes from other records, the interval is over the seeds alone.
    """
    from sunets.report.statistics import mean_interval  # its package imports pandas, which live tracking must not

    values: dict[str, list[float]] = defaultdict(list)
    for record in tested:
        for name, value in _scores({**record, "scores": overall(record["scores"])}, tested).items():
            values[name].append(value)
    summary: dict[str, float | None] = {}
    for name, seeds in values.items():
        estimate = mean_interval(seeds)
        summary[f"{name}.mean"] = estimate.mean
        if name in PRIMARY_METRIC.values():
            ends = [row.get(f"{name}.joint_ci95_{end}") for end in ("low", "high")]
            if None in ends or row.get(f"{name}.mean") != estimate.mean:
                ends = [estimate.low, estimate.high]
            summary |= dict(zip((f"{name}.ci95_low", f"{name}.ci95_high"), ends, strict=True))
            summary[f"{name}.seeds"] = estimate.n
    return finite_numbers(summary)


def _period(timing: Mapping[str, Any]) -> tuple[float, float] | None:
    if not timing.get("started"):
        return None
    start = datetime.fromisoformat(timing["started"]).timestamp()
    return start, start + (timing.get("seconds") or 0.0)


def _network(record: Record, counted: Record, root: Path) -> Network | None:
    """Describe the network of a training; None where its weights are not here, as in a fresh clone."""
    paths = BenchmarkPaths(record["benchmark"], root)
    weights = paths.weights(record["model"], record["seed"])
    if record["status"] != "finished" or not weights.is_file():
        return None
    path = weights.relative_to(root).as_posix()
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shown = {name: counted["cost"].get(f"cost.{name}") for name in ("params_m", "gmacs", "output_stride")}
    params = {f"cost.{name}": value for name, value in shown.items() if value is not None}
    if "cost.size" in counted["params"]:
        params["cost.size"] = counted["params"]["cost.size"]
    manifest = paths.data / "manifest.json"
    classes = len(read_json(manifest)["classes"]) if manifest.exists() else -1
    return Network(
        name=f"{record['model']}-seed{record['seed']}",
        params={name: plain_text(value) for name, value in params.items()} | {"weights.path": path},
        tags={
            EXTERNAL: "true",
            "weights.sha256": digest,
            "mlflow.note.content": f"Weights: `{path}`. Load: `sunets.models.weights.load_trained(path)`.",
        },
        output=(-1, classes, *([-1, -1] if record["task"] == "segmentation" else [])),
    )


def _tunings(folder: Path) -> list[Family]:
    """Build the runs of the tuning of every model: the best recipe so far, and the trials."""
    families = []
    paths = {path.stem: path for path in json_files(folder / "records" / "tune")}
    for path in (paths[model] for model in _reported(folder, {*paths})):
        for record in read_records(path, "tune"):
            rows = read_rows(path.with_suffix(".csv"), ("number", "status", "best"))
            histories = _histories(path.with_suffix(".history.csv"), "number")
            children = [_trial(record, row, histories[row["number"]]) for row in rows]
            pictures = _figures(folder / "figures", "tuning.png")
            parent, *children = (replace(run, files=pictures) for run in (_tuning(record, rows), *children))
            families.append((parent, children))
    return families


def _tuning(record: Record, rows: Sequence[Mapping[str, Any]]) -> Run:
    """Build the parent run, whose curve is the best score after each trial."""
    best = [(row["number"], row["best"]) for row in rows if row["best"] is not None]
    whole = model_run([record])
    score = next(iter(record["scores"]), "score")
    chosen = {path: plain_text(value) for path, value in record["chosen"].items()}
    tuned = {axis["path"] for axis in record["space"]}
    left_out = {f"left_out.{path}": reason for path, reason in record["left_out"].items()}
    return replace(
        whole,
        experiment=f"{record['benchmark']}/tuning",
        slot=make_slot("tuning", record["benchmark"], record["model"]),
        name=shorten(f"tuning of {record['label']}", 250),
        params={**{k: v for k, v in whole.params.items() if k not in tuned}, **legal(chosen)},
        tags={**whole.tags, **legal(left_out | {"kind": "tuning"})},
        points={(f"{CURVES}{score}.best", number): value for number, value in best},
        metrics=finite_numbers({"trials.failed": sum(row["status"] == "failed" for row in rows)})
        | _mean(record, rows[record["trial"] or 0]),
        headline="",
        columns=(
            *(f"metrics.`{k}`" for k in (f"{SUMMARY}{score}.mean", f"{CURVES}{score}.best", f"{SUMMARY}{score}.final")),
            *(f"params.`{axis['path']}`" for axis in record["space"]),
        ),
    )


def _trial(record: Record, row: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Run:
    """Build the run of one trial; what the trials share stands in their parent."""
    cells = {axis["path"]: row[axis["path"]] for axis in record["space"]}  # of a CSV file: True, "[64, 64]"
    values = {k: plain_text(parse_yaml(v, k) if isinstance(v, str) else v) for k, v in cells.items()}
    outcome = {"status": row["status"], "reason": row["reason"], "scores": {}, "number": row["number"]}
    run = child_run(record | outcome, history)
    shown = [f"{path.removeprefix('train.')}={value}" for path, value in values.items()]
    return replace(
        run,
        experiment=f"{record['benchmark']}/tuning",
        slot=make_slot("tuning", record["benchmark"], record["model"], f"{row['number']}"),
        name=shorten(", ".join([f"{record['label']} #{row['number']}", *shown]), 250),
        params=legal(values),
        metrics={**run.metrics, **_mean(record, row)},
        headline="",
    )


def _mean(record: Record, row: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean score by which a recipe was chosen, of a trial that was trained on several seeds."""
    several = any(name.startswith("seed ") for name in row)
    return finite_numbers({f"{SUMMARY}{score}.mean": row[score] for score in record["scores"]}) if several else {}


def _studies(folder: Path) -> list[Family]:
    """Build the runs of every study of a benchmark."""
    base = folder / "records" / "ablations"
    studies = [path.stem for path in json_files(base)]
    families = []
    for study in studies:
        if records := read_records(base / f"{study}.json", "trial"):
            path = base / f"{study}.history.csv"
            histories = _histories(path, "number") if path.exists() else {}
            shown = _figures(folder / "ablations", f"{study}_axes.png")
            shown = shown or _figures(folder / "ablations", f"{study}_pareto.png")  # of a search, which has no axes
            children = [replace(child_run(r, histories.get(r["number"], ())), files=shown) for r in records]
            families.append((replace(study_run(records), files=_study_files(folder, study, studies)), children))
    return families


def _study_files(folder: Path, study: str, studies: Sequence[str]) -> tuple[tuple[Path, str | None], ...]:
    """List figures and tables of a study, such as STUDY.md, STUDY_axes.png, but not those of a study STUDY_more."""

    def owner(path: Path) -> str:
        return max((s for s in studies if f"{path.stem}_".startswith(f"{s}_")), key=len, default="")

    kinds = {".png": "figures", ".md": "tables", ".csv": "tables"}
    paths = sorted(path for path in (folder / "ablations").glob("*") if path.suffix in kinds)
    return tuple((path, kinds[path.suffix]) for path in paths if owner(path) == study)


def _figures(directory: Path, pattern: str) -> tuple[tuple[Path, str | None], ...]:
    return tuple((path, "figures") for path in sorted(directory.glob(pattern)))


def _report(folder: Path) -> list[Family]:
    """Build the run that holds page, tables and figures of the benchmark, and the samples of its data."""
    files: list[tuple[Path, str | None]] = [(path, None) for path in folder.glob("README.md")]
    for pattern in ("tables/*.md", "tables/*.csv", "figures/*.png"):
        files += [(path, path.parent.name) for path in sorted(folder.glob(pattern))]
    files += [(path, "data") for path in (folder.parent.parent / PREPARED / folder.name).glob("samples.png")]
    if not files:
        return []
    run = Run(
        experiment=folder.name,
        slot=make_slot("report", folder.name, "report"),
        identity="report",
        name="report",
        tags={"kind": "report", "benchmark": folder.name},
        status="FINISHED",
        files=tuple(files),
    )
    return [(run, [])]

"""MLflow runs rebuilt from the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from sunets.core.history import read_history
from sunets.core.metrics import PRIMARY_METRIC
from sunets.core.names import PREPARED, check_name
from sunets.core.record import Kind, Record, read_records
from sunets.tracking.address import CREATION_LIMIT, TrackingError, failure
from sunets.tracking.live import REMEDY, warn_once
from sunets.tracking.networks import trained_network
from sunets.tracking.store import CURRENT, Store, is_alive
from sunets.tracking.tuning import tuning_runs
from sunets.tracking.view import (
    Run,
    child_run,
    costs,
    finite_numbers,
    make_slot,
    model_run,
    plain_text,
    study_run,
)


@dataclass(frozen=True)
class Synced:
    """Numbers of runs that `sync` created, completed and left unchanged."""

    created: int
    updated: int
    unchanged: int
    links: tuple[str, ...] = field(default=(), compare=False)
    """Address of the run table of each experiment."""

    def __str__(self) -> str:
        return f"MLflow: {self.created} runs created, {self.updated} updated, {self.unchanged} unchanged"


def sync(results: Path, benchmark: str | None = None, pages: str = "") -> Synced:
    """Rebuild the runs in MLflow from the records; a second call changes nothing.

    Args:
        results: the directory `results/`.
        benchmark: one benchmark; None takes all.
        pages: address of the MLflow UI, for the links.

    Raises:
        FileNotFoundError: there are no records.
        ValueError: `benchmark` cannot be a name.
        TrackingError: MLflow cannot be reached or refuses.
    """
    name = "*" if benchmark is None else check_name(benchmark)
    folders = sorted(path.parent for path in results.glob(f"{name}/records"))
    if not folders:
        raise FileNotFoundError(f"{results / name / 'records'}: no records; run `dvc repro` first")
    wanted = {
        folder.name: [*_models(folder), *tuning_runs(folder), *_studies(folder), *_report(folder)] for folder in folders
    }
    try:
        store = Store()
        # Two that write the same runs at once would double them or break the database's constraints.
        with FileLock(f"{store.lock.lock_file}.sync", timeout=CREATION_LIMIT):
            return _write(store, wanted, pages)
    except Timeout:
        raise TrackingError(f"MLflow: another process is syncing; wait for it to end, then: {REMEDY}") from None
    except (TrackingError, OSError) as error:
        raise TrackingError(f"MLflow: {failure(error)}; see MLFLOW_TRACKING_URI, then: {REMEDY}") from error


def _write(store: Store, wanted: Mapping[str, list[tuple[Run, list[Run]]]], pages: str) -> Synced:
    """Write the runs of each benchmark, and retire all others."""
    counts: Counter[str] = Counter()
    links = []
    for name, families in wanted.items():
        kept = set()
        for parent, children in families:
            parent_id, change = store.finish(parent)
            kept.add(parent_id)
            counts[change] += 1
            for child in children:
                run_id, change = store.finish(child, parent_id)
                kept.add(run_id)
                counts[change] += 1
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
    except Exception as error:
        warn_once(error.__cause__ if isinstance(error, TrackingError) and error.__cause__ else error)


def _records(path: Path, kind: Kind | Literal["timing"]) -> list[Record]:
    return read_records(path, kind) if path.exists() else []


def _items(folder: Path, suffix: str) -> list[str]:
    return sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))


def _models(folder: Path) -> list[tuple[Run, list[Run]]]:
    """Build parent and children of every model of a benchmark.

    Args:
        folder: results/BENCHMARK.
    """
    base = folder / "records"
    speed = _records(base / "speed.json", "speed")
    families = []
    for model in sorted({name for kind in ("train", "evaluate", "cost") for name in _items(base / kind, ".json")}):
        kinds: tuple[Kind | Literal["timing"], ...] = ("train", "evaluate", "cost", "timing")
        trained, tested, counted, timed = (_records(base / kind / f"{model}.json", kind) for kind in kinds)
        path = base / "history" / f"{model}.csv"
        rows = read_history(path, "seed") if path.exists() else []
        children = []
        for record in trained:
            seed = record["seed"]
            child = child_run(record, [row for row in rows if row["seed"] == seed])
            timing = next((t for t in timed if t["seed"] == seed), {})
            noisy = {k: v for k, v in timing.items() if k in ("seconds", "images_per_second")}
            scores = [r for r in tested if r["seed"] == seed]
            metrics = {k: v for r in scores for k, v in _scores(r, tested).items()}
            children.append(
                replace(
                    child,
                    metrics={**child.metrics, **finite_numbers(noisy, "timing."), **metrics},
                    tags={**child.tags, **_test_settings(scores)},
                    seconds=_period(timing),
                    files=_figures(folder / "figures", "training_curves.png"),
                    network=trained_network(record, counted[0], folder.parent.parent) if counted else None,
                )
            )
        parent = model_run(trained or tested or counted)
        exact = [r for r in [*counted, *(r for r in speed if r["model"] == model)] if r["status"] == "finished"]
        periods = [child.seconds for child in children if child.seconds]
        parent = replace(
            parent,
            metrics=_summary(tested) | {k: v for r in exact for k, v in costs(r).items()},
            tags={**parent.tags, **_test_settings(tested)},
            seconds=(min(p[0] for p in periods), max(p[1] for p in periods)) if periods else None,
            files=_figures(folder / "figures", "*.png"),
        )
        families.append((parent, children))
    return families


def _scores(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the scores of the first test-time variant; of another only the headline score, as VARIANT/score."""
    if record["variant"] == records[0]["variant"]:
        return finite_numbers(record["scores"])
    headlines = {k: v for k, v in record["scores"].items() if k in PRIMARY_METRIC.values()}
    return finite_numbers(headlines, f"{record['variant']}/")


def _test_settings(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    params = records[0]["params"] if records else {}
    return {name: plain_text(value) for name, value in params.items() if name.startswith("evaluate.")}


def _summary(tested: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each score over the seeds, and the interval of headline scores."""
    from sunets.report.statistics import mean_interval  # its package imports pandas, which live tracking must not

    values: dict[str, list[float]] = {}
    for record in tested:
        for name, value in _scores(record, tested).items():
            values.setdefault(name, []).append(value)
    summary: dict[str, float | None] = {}
    for name, seeds in values.items():
        estimate = mean_interval(seeds)
        summary[f"{name}.mean"] = estimate.mean
        if name.rpartition("/")[2] in PRIMARY_METRIC.values():
            summary |= {f"{name}.{k}": v for k, v in (("ci95_low", estimate.low), ("ci95_high", estimate.high))}
        if name in PRIMARY_METRIC.values():
            summary[f"{name}.seeds"] = estimate.n
    return finite_numbers(summary)


def _period(timing: Mapping[str, Any]) -> tuple[float, float] | None:
    if not timing.get("started"):
        return None
    start = datetime.fromisoformat(timing["started"]).timestamp()
    return start, start + (timing.get("seconds") or 0.0)


def _studies(folder: Path) -> list[tuple[Run, list[Run]]]:
    """Build parent and children of every study of a benchmark."""
    base = folder / "records" / "ablations"
    families = []
    studies = _items(base, ".json")
    for study in studies:
        records = _records(base / f"{study}.json", "trial")
        if not records:
            continue
        path = base / f"{study}.history.csv"
        rows = read_history(path, "number") if path.exists() else []
        axes = _figures(folder / "ablations", f"{study}_axes.png")
        children = [
            replace(child_run(r, [row for row in rows if row["number"] == r["number"]]), files=axes) for r in records
        ]
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


def _report(folder: Path) -> list[tuple[Run, list[Run]]]:
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

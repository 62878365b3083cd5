"""Commands: `python -m ablations --help`. Thin: each reads its arguments and calls one function of the package."""

from __future__ import annotations

from sunets.core.process import die_with_pipeline

die_with_pipeline()  # before imports that take longer than a kill

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sunets.core import cli
from sunets.core.cli import GPU_TFLOPS, PARAMS, GpuTflops, Params, Settings
from sunets.core.config import Suite, load
from sunets.core.recipes import skip_tuning
from sunets.extras import extras_named

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Recipes tuned alike for all models, and ablations: which part of a Stacked U-Net matters. Both are data, "
    "under `tune` and `ablations` in the parameter file.",
)
cli.add_version(app)


Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Concurrent jobs. Default: one per GPU, or as many as the CPU cores allow; on a Dask cluster, no limit. "
        "The number does not affect the records.",
    ),
]


@app.command()
def tune(
    key: Annotated[str, typer.Argument(metavar="MODEL", help="Key under `models` in the parameter file.")],
    params: Params = PARAMS,
    settings: Settings = None,
    workers: Workers = None,
) -> None:
    """Choose a model's recipe on the validation split, as section `tune` says; `train` takes it from there.

    With tune.trials 0 nothing is tried. The environment variables of `run` apply here too.
    """
    suite = cli.read_suite(params, settings, key)
    if suite.tune.trials:
        from ablations.tune import tune_stage

        tune_stage(suite, key, workers=workers)
    else:
        skip_tuning(suite, key)


@app.command()
def run(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Name under `ablations`; see `list`.")],
    params: Params = PARAMS,
    settings: Settings = None,
    workers: Workers = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Score and record all trials again; finished trainings are kept."),
    ] = False,
) -> None:
    """Run a study, or what is left of it after a kill; rewrites its records.

    DASK_SCHEDULER_ADDRESS runs the trainings on a Dask cluster (docs/cluster.md). OPTUNA_STORAGE keeps the trials for
    optuna-dashboard elsewhere than in .work/ablations: the path of a journal file, a PostgreSQL URL
    (postgresql+psycopg://user@host/name), or grpc://host:port of Optuna's proxy in front of one.
    """
    from ablations.study import run_study

    records = run_study(load(params, settings or []), study, workers=workers, fresh=fresh)
    counts = {status: sum(r["status"] == status for r in records) for status in ("finished", "pruned", "failed")}
    typer.echo(f"{study}: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n))
    for record in records:
        if record["status"] == "failed":
            typer.echo(
                f"trial {record['number']}, {record['arm']}, seed {record['seed']}: {record['reason']}", err=True
            )


@app.command()
def plan(
    studies: Annotated[list[str] | None, typer.Argument(metavar="[STUDY]...", help="Default: all.")] = None,
    params: Params = PARAMS,
    settings: Settings = None,
    gpu_tflops: GpuTflops = GPU_TFLOPS,
) -> None:
    """Print what studies will run, and estimate how long that takes here and on one GPU."""
    from ablations.plan import plan_studies

    suite = load(params, settings or [])
    plan_studies(suite, studies or list(suite.ablations), gpu_tflops=gpu_tflops)


@app.command()
def report(params: Params = PARAMS, settings: Settings = None) -> None:
    """Make the tables, figures and page results/BENCHMARK/ablations.md from the records."""
    from ablations.report.page import build_ablation_report
    from sunets.tracking.sync import sync_or_warn

    suite = load(params, settings or [])
    for path in build_ablation_report(suite, Path()):
        typer.echo(path)
    sync_or_warn(Path("results"), suite.benchmark)


@app.command(name="list")
def list_(params: Params = PARAMS, settings: Settings = None) -> None:
    """List the studies of the parameter file."""
    table = Table("study", "kind", "model", "axes", "seeds", "trials")
    suite: Suite = load(params, settings or [])
    for name, study in suite.ablations.items():
        axes = "; ".join(f"{a.path}: {', '.join(map(str, a.values)) or f'{a.low} to {a.high}'}" for a in study.axes)
        trials = str(study.trials) if study.trials else ""
        table.add_row(name, study.kind, study.model, axes, ", ".join(map(str, study.seeds)), trials)
    Console().print(table)


def main() -> None:
    """Run the command line."""
    cli.run(extras_named()(app))


if __name__ == "__main__":
    main()

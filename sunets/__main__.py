"""Commands of `python -m sunets`; each parses its arguments and calls one function of the package."""

from __future__ import annotations

from sunets.core.process import die_with_pipeline

die_with_pipeline()  # before slow imports, during which the pipeline may be killed

import contextlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sunets.core.cli import GPU_TFLOPS, PARAMS, GpuTflops, Params, Settings, add_version, read_suite, run
from sunets.core.config import flatten
from sunets.core.paths import BenchmarkPaths
from sunets.extras import extras_named
from sunets.presets import list_presets, preset_path, use_preset

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Benchmark and ablate Stacked U-Nets. `dvc repro` runs all of params.yaml; these commands are its parts.",
)
add_version(app)
PIPELINE = "Stages of the pipeline"
TOOLS = "Tools"

Key = Annotated[str, typer.Argument(metavar="MODEL", help="Key under `models` in the parameter file.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Concurrent jobs; default: one per GPU, or as many as the CPU cores allow.")
]


@app.command(rich_help_panel=PIPELINE)
def prepare(params: Params = PARAMS, settings: Settings = None, download: bool = False) -> None:
    """Check the data set, or draw the embedded one, and write its manifest to data/prepared/BENCHMARK/."""
    from sunets.data.preparation import download as fetch
    from sunets.stages.prepare import prepare_stage

    suite = read_suite(params, settings)
    if download:
        fetch(suite.data)
    written = BenchmarkPaths(suite.benchmark).data / "manifest.json"
    before = written.stat().st_mtime_ns if written.exists() else None
    manifest = prepare_stage(suite)
    for warning in manifest.warnings:
        typer.echo(f"warning: {warning}", err=True)
    counts = ", ".join(f"{name} {len(items)}" for name, items in manifest.splits.items())
    typer.echo(f"{manifest.name}: {counts} images, {manifest.num_classes} classes, digest {manifest.digest[:16]}")
    if suite.data.root is not None and written.stat().st_mtime_ns != before:  # new data of the user, not drawn ones
        with contextlib.suppress(Exception):  # neither a failed estimate nor a missing torch may fail the stage
            from sunets.duration import duration_line

            typer.echo(duration_line(suite))


@app.command(rich_help_panel=PIPELINE)
def train(key: Key, params: Params = PARAMS, settings: Settings = None, workers: Workers = None) -> None:
    """Train one model on every seed; resumes interrupted trainings."""
    from sunets.stages.train import train_stage

    train_stage(read_suite(params, settings, key), key, workers=workers)


@app.command(rich_help_panel=PIPELINE)
def evaluate(key: Key, params: Params = PARAMS, settings: Settings = None, workers: Workers = None) -> None:
    """Score one trained model on the test split, with every seed and test-time variant."""
    from sunets.stages.evaluate import evaluate_stage

    evaluate_stage(read_suite(params, settings, key), key, workers=workers)


@app.command(rich_help_panel=PIPELINE)
def cost(key: Key, params: Params = PARAMS, settings: Settings = None) -> None:
    """Count one model's parameters, multiply-adds, saved memory and receptive field (exact figures)."""
    from sunets.stages.cost import cost_stage

    cost_stage(read_suite(params, settings, key), key)


@app.command(rich_help_panel=PIPELINE)
def speed(params: Params = PARAMS, settings: Settings = None) -> None:
    """Time all models of the benchmark, interleaved in one run (noisy figures)."""
    from sunets.stages.cost import speed_stage

    speed_stage(read_suite(params, settings))


@app.command(rich_help_panel=PIPELINE)
def report(
    params: Params = PARAMS,
    settings: Settings = None,
    html: Annotated[
        bool, typer.Option("--html", help="Write the last report as one file to send, report.html, instead.")
    ] = False,
) -> None:
    """Write the tables, figures and page of results/BENCHMARK/ from its records."""
    from sunets.report.build import build_report
    from sunets.report.html import build_html
    from sunets.tracking.sync import sync_or_warn

    suite = read_suite(params, settings)
    if html:
        typer.echo(build_html(suite, Path()))
        return
    for path in build_report(suite, Path()):
        typer.echo(path)
    sync_or_warn(Path("results"), suite.benchmark)


@app.command(rich_help_panel=PIPELINE)
def archive(
    key: Key,
    split: Annotated[str, typer.Option(help="Split of PASCAL VOC; the server scores test.")] = "test",
    variant: Annotated[str | None, typer.Option(help="Test-time variant; default: the last one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Training seed; default: the first one.")] = None,
    params: Params = PARAMS,
    settings: Settings = None,
) -> None:
    """Write and check an archive of label images for the PASCAL VOC server."""
    from sunets import predict

    typer.echo(predict.archive(read_suite(params, settings, key), key, split=split, variant=variant, seed=seed))


@app.command(rich_help_panel=TOOLS)
def plan(
    preset: Annotated[str | None, typer.Argument(help="A file of presets/; default: the parameter file.")] = None,
    params: Params = PARAMS,
    settings: Settings = None,
    gpu_tflops: GpuTflops = GPU_TFLOPS,
) -> None:
    """Estimate the GPU hours and memory of a preset; needs neither its data nor a GPU."""
    from sunets.plan import plan_preset

    path = preset_path(preset) if preset else params
    plan_preset(read_suite(path, settings), gpu_tflops=gpu_tflops)


@app.command(name="list", rich_help_panel=TOOLS)
def list_(task: Annotated[str | None, typer.Option(help="segmentation or classification")] = None) -> None:
    """List the models of the zoo."""
    from sunets.models.zoo import list_models

    for name in list_models(task):
        typer.echo(name)


@app.command(rich_help_panel=TOOLS)
def profile(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names of the zoo; see `list`.")],
    size: Annotated[tuple[int, int], typer.Option(metavar="H W", help="Input size in pixels.")] = (512, 512),
    output_stride: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Output stride; default: that of each model.")
    ] = None,
    num_classes: Annotated[int, typer.Option(min=1, help="Classes.")] = 21,
    batch_size: Annotated[int, typer.Option(min=1, max=65536, help="Images per pass.")] = 1,
    task: Annotated[str, typer.Option(help="segmentation or classification")] = "segmentation",
    json: Annotated[Path | None, typer.Option(help="Write the exact records as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the exact records as CSV.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also time the models, interleaved.")] = False,
    speed_json: Annotated[Path | None, typer.Option(help="Write the timings as JSON; implies --speed.")] = None,
    field: Annotated[bool, typer.Option("--field", help="Also measure the receptive fields.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the effective receptive fields; implies --field.")] = None,
) -> None:
    """Measure the cost of models: parameters, multiply-adds, saved memory, speed, receptive field."""
    from sunets import profile as profiler

    profiler.profile(
        models,
        size=size,
        output_stride=output_stride,
        num_classes=num_classes,
        batch_size=batch_size,
        task=task,
        json_path=json,
        csv_path=csv,
        speed=speed or speed_json is not None,
        speed_json_path=speed_json,
        field=field or picture is not None,
        picture_path=picture,
    )


@app.command(rich_help_panel=TOOLS)
def zoo() -> None:
    """Count the cost of every network of the zoo; writes results/zoo/ and the tables of docs/cost.md."""
    from sunets.zoo_tables import zoo_stage

    zoo_stage()


@app.command(rich_help_panel=TOOLS)
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A file of outputs/BENCHMARK/weights/MODEL/.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Pictures of any size.")],
    out: Annotated[Path, typer.Option(help="Directory for the masks and overlays.")] = Path("predictions"),
) -> None:
    """Segment your pictures: writes palette masks and overlays."""
    from sunets.predict import predict_images

    for path in predict_images(checkpoint, images, out):
        typer.echo(path)


@app.command(rich_help_panel=TOOLS)
def explain(
    table: Annotated[str, typer.Argument(help="Name of a table, such as accuracy or ablations/STUDY.")],
    row: Annotated[
        str,
        typer.Argument(help="A model's key, a trial's number, values of a study's axes joined by slashes, or a claim."),
    ],
    column: Annotated[str, typer.Argument(help="Column of the CSV file or its heading, such as score.miou.")],
    params: Params = PARAMS,
    settings: Settings = None,
) -> None:
    """Trace a number in a table to its runs: seeds, commit, data digest, code, command.

    Tables of the benchmark: accuracy, per_class, object_size, test_time, tuning, cost, speed, training_time, published.

    Of a study: ablations/STUDY (its settings), and the same with _axes, _object_size, _recipes, _variance, _pareto or
    _trials at the end of the name.

    Of all benchmarks: claims, zoo/cost_segmentation, zoo/cost_classification, zoo/speed. An unknown name lists those
    that exist.
    """
    from sunets.report.explain import explain as trace

    typer.echo(trace(Path("results"), read_suite(params, settings).benchmark, table, row, column))


@app.command(rich_help_panel=TOOLS)
def verify(
    allow_earlier_code: Annotated[
        bool, typer.Option("--allow-earlier-code", help="List results of earlier code without failing.")
    ] = False,
) -> None:
    """Check that the results of params.yaml belong to this code and these parameters; exit status 1 if not."""
    from sunets.verify import verify as check

    verdict = check(read_suite(PARAMS, None))
    for line in verdict.notes:
        typer.echo(line)
    faults = verdict.faults + ([] if allow_earlier_code else verdict.earlier)
    for line in verdict.earlier if allow_earlier_code else []:
        typer.echo(line)
    for line in faults:
        typer.echo(f"error: {line}", err=True)
    if faults:
        raise typer.Exit(1)


@app.command(name="mlflow-sync", rich_help_panel=TOOLS)
def mlflow_sync(
    benchmark: Annotated[str | None, typer.Option(help="One benchmark; default: all under results/.")] = None,
    pages: Annotated[str | None, typer.Option(help="Address of MLflow's pages: print a link per experiment.")] = None,
) -> None:
    """Bring MLflow in line with results/; rebuilds a deleted database, adds nothing twice."""
    from sunets.tracking.sync import sync

    done = sync(Path("results"), benchmark, pages or "")
    typer.echo(done)
    for line in done.left_out:
        typer.echo(line, err=True)
    for link in done.links if pages else ():
        typer.echo(link)


@app.command(rich_help_panel=TOOLS)
def preset(
    name: Annotated[str | None, typer.Argument(help="A file of presets/; without a name, list them.")] = None,
    root: Annotated[Path | None, typer.Option(help="Directory of the data set, instead of datasets/NAME.")] = None,
) -> None:
    """Replace params.yaml with presets/NAME.yaml, saving a copy of uncommitted edits; default.yaml is the original."""
    if name is None:
        for preset_name, title in list_presets().items():
            typer.echo(f"{preset_name:24} {title}")
        return
    copy, size = use_preset(name, root)
    if copy:
        typer.echo(f"params.yaml had uncommitted changes: kept as {copy}", err=True)
    if size:
        typer.echo(f"data.size is now {size[0]} x {size[1]} pixels (height x width), the aspect ratio of the images")
    typer.echo(
        f"params.yaml is now presets/{name}.yaml; `dvc repro` runs it, `python -m sunets plan` estimates its GPU hours"
    )


@app.command(rich_help_panel=TOOLS)
def config(params: Params = PARAMS, settings: Settings = None) -> None:
    """Check the parameter file and print every parameter with its dotted name."""
    console = Console(soft_wrap=True, highlight=False)
    for key, value in flatten(read_suite(params, settings)).items():
        console.print(f"{key} = {value}", markup=False)


def main() -> None:
    """Run the command line; commands that packages register under `sunets.commands`, such as `ablate`, come with it."""
    for command in entry_points(group="sunets.commands"):
        app.add_typer(command.load(), name=command.name, rich_help_panel=TOOLS)
    run(extras_named()(app))


if __name__ == "__main__":
    main()

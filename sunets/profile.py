"""Command `profile`: cost and, on request, speed and receptive fields of networks of the zoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sunets.core.config import CostConfig, ModelConfig, override
from sunets.core.provenance import code_hash, command_line, environment, provenance
from sunets.core.record import make_record, write_json, write_rows
from sunets.models.zoo import list_models
from sunets.profiling.cost import build, check_size, cost_parameters, measure_cost
from sunets.profiling.modes import Size
from sunets.profiling.receptive_field import MASS
from sunets.profiling.speed import measure_speed
from sunets.report.images import draw_fields
from sunets.report.style import save_files
from sunets.report.tables import cost_frames, speed_columns


def profile(
    models: Sequence[str],
    *,
    size: Size = (512, 512),
    output_stride: int | None = None,
    num_classes: int = 21,
    batch_size: int = 1,
    task: str = "segmentation",
    json_path: Path | None = None,
    csv_path: Path | None = None,
    speed: bool = False,
    speed_json_path: Path | None = None,
    field: bool = False,
    picture_path: Path | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Profile models of the zoo, print the table and write the requested files; the command `profile`.

    Args:
        models: names of the zoo.
        size: (height, width) of the input in pixels.
        output_stride: output stride of every model; None keeps the default of each.
        num_classes: channels of the logits.
        batch_size: images of an input; counts, memory and times are those of all of them.
        task: segmentation or classification.
        json_path: file for the exact records.
        csv_path: file for the same as a table, one row per model.
        speed: also time the models.
        speed_json_path: file for the timings.
        field: also measure the receptive fields.
        picture_path: PNG of the effective receptive fields.
        console: console for the table.

    Returns:
        The exact records.

    Raises:
        ValueError: an unknown name, too small a size, a model that cannot be built, a picture that is no PNG, or
            one file for two outputs.
        AuditError: two counts differ.
    """
    check_size(size)
    if picture_path is not None and picture_path.suffix.lower() != ".png":
        raise ValueError(f"--picture {picture_path}: the picture is a PNG; name it *.png")
    outputs = [path.resolve() for path in (json_path, csv_path, speed_json_path, picture_path) if path is not None]
    if twice := next((path for path in outputs if outputs.count(path) > 1), None):
        raise ValueError(f"{twice}: named for two outputs, of which one would replace the other; name two files")
    for name in models:
        if name not in list_models(task):
            raise ValueError(f"{name}: no model of the zoo for {task}; there are {', '.join(list_models(task))}")
    settings = override(CostConfig(), {"size": list(size), "batch_size": batch_size}, source="profile")
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=200)
    names = list(dict.fromkeys(models))
    made_by = {kind: code_hash(f"sunets.profiling.{kind}") for kind in ("cost", "speed")}
    shared: dict[str, dict[str, Any]] = {}
    for name in names:
        model = ModelConfig(name=name, output_stride=output_stride)
        params = cost_parameters(settings.model_dump(mode="json"), model, task) | {"model.num_classes": num_classes}
        origin = provenance(None, made_by["cost"], params, command_line())
        shared[name] = {"benchmark": "none", "task": task, "model": name, "config": params, "provenance": origin}
    arguments = {
        name: {"name": name, "task": task, "num_classes": num_classes, "output_stride": output_stride} for name in names
    }
    records, maps = [], {}
    for name in names:
        with console.status(f"counting {name}"):
            figures, gradient = measure_cost(
                arguments[name],
                size=size,
                batch_size=settings.batch_size,
                receptive_field_seeds=settings.receptive_field_seeds if field else 0,
                receptive_field_images=settings.receptive_field_images,
            )
        if gradient is not None:
            maps[name] = gradient
        host = environment("auto", torch.get_num_threads())
        records.append(make_record("cost", cost=figures, environment=host, **shared[name]))
    timings = []
    if speed:
        with console.status("timing"):
            measured = measure_speed(
                {name: build(arguments[name]) for name in names},
                size=size,
                batch_size=settings.batch_size,
                repeats=settings.repeats,
                warmup=settings.warmup,
                threads=settings.threads,
            )
        host = environment("auto", settings.threads)
        for name, figures in measured.items():
            origin = shared[name]["provenance"] | {"code_hash": made_by["speed"]}
            timed = shared[name] | {"provenance": origin}
            timings.append(make_record("speed", cost=figures, environment=host, **timed))
    times = {timing["model"]: timing["cost"] for timing in timings}
    shown = [record | {"cost": record["cost"] | times.get(record["model"], {})} for record in records]
    console.print(_table(shown))
    if json_path is not None:
        write_json(json_path, records)
    if csv_path is not None:
        write_rows(csv_path, [{"model": r["model"], **r["params"], **r["cost"]} for r in records])
    if speed_json_path is not None and timings:
        write_json(speed_json_path, timings)
    if picture_path is not None and maps:
        shares = {record["label"]: record["cost"]["receptive_field.effective_share"] for record in records}
        save_files(draw_fields(maps, shares), picture_path)
    return records


def _table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Make a terminal table with one row per record: figures of `measure_cost` and, if present, `measure_speed`.

    The caption states what was counted, how, and what is not counted.
    """
    rows = [record["cost"] for record in records]
    data, view = cost_frames(records)
    table = Table(title="Cost of the models", caption_justify="left", title_justify="left")
    view = view.assign(**speed_columns(data))
    for heading in view:
        first = heading == "Model"
        table.add_column(str(heading), justify="left" if first else "right", no_wrap=first, overflow="fold")
    for cells in view.itertuples(index=False):
        table.add_row(*cells)
    params = records[0]["params"]
    height, width = params["cost.size"]
    uncounted = sorted({name for row in rows for name in row["cost.uncounted_operators"].split(", ")})
    notes = [
        f"Input {params['cost.batch_size']} x {height} x {width}. Multiply-adds (1 GMAC = 2 GFLOPs) by torch's "
        "counter; convolutions and linear layers agree with fvcore's count and, of SUNets, with a formula, to 0.1 %.",
        f"Not counted by any of them: {', '.join(uncounted)}.",
        "Saved: tensors that autograd saves for the backward pass of a training step, without parameters; recomputing: "
        "with memory_efficient=True.",
    ]
    if attention := [f"{r['label']} {100 * row['cost.gmacs_attention'] / row['cost.gmacs']:.1f} %"
                     for r, row in zip(records, rows, strict=True) if row["cost.gmacs_attention"]]:  # fmt: skip
        notes.append(f"Share of products of activations (attention): {', '.join(attention)}.")
    if any("receptive_field.effective_share" in row for row in rows):
        notes.append(
            "Field: larger side of the centre pixel's theoretical receptive field (up to the image size), and the "
            f"share of the pixels that hold {MASS:.0%} of the input gradient of its logits, at initialisation."
        )
    if timed := next((row for row in rows if "speed.latency_ms" in row), None):
        notes.append(
            f"Times: median (interquartile range) of {timed['speed.repeats']} rounds after {timed['speed.warmup']}, "
            f"models interleaved; {timed['speed.device']}, {timed['speed.threads']} threads, {timed['speed.dtype']}."
        )
    table.caption = "\n".join(notes)
    return table

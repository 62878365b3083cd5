"""Cost of one network, its table for a terminal, and the command `profile`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from sunets.core.config import CostConfig, ModelConfig, flatten
from sunets.core.provenance import code_hash, command_line, environment, provenance
from sunets.core.record import make_record, write_json, write_rows
from sunets.models.sunet import MIN_SIZE, SUNet
from sunets.models.zoo import create_model, list_models, resolve
from sunets.profiling.memory import saved_bytes, to_mib
from sunets.profiling.modes import Figures, Size, input_channels, usual_algorithms
from sunets.profiling.multiply_adds import CONV_AND_LINEAR, Uncounted, audit, compare_with_formula, count_macs
from sunets.profiling.receptive_field import MASS, receptive_field
from sunets.profiling.speed import measure_speed


@usual_algorithms()
def cost(arguments: Mapping[str, Any], *, size: Size, batch_size: int = 1) -> Figures:
    """Count and audit the exact figures of one network.

    Args:
        arguments: keyword arguments of `create_model`; `weights` is ignored, since it does not affect the cost.
        size: (height, width) of the input in pixels.
        batch_size: images of the input.

    Returns:
        cost.params_m: parameters in millions.
        cost.output_stride: input size over the size of the last features.
        cost.gmacs, cost.gflops: multiply-adds of a forward pass in 10^9, and twice that.
        cost.gmacs_attention: those in products of two activations.
        cost.gmacs_forward_backward: those of a forward and backward pass with gradients of all parameters.
        cost.uncounted_operators: operators of the forward pass without a formula in any counter.
        memory.saved_mib, memory.saved_mib_memory_efficient: see `saved_bytes`; the second for SUNets only.

    Raises:
        ValueError: the network cannot be built, or the size is too small.
        AuditError: two counts differ by more than 0.1 %.
    """
    _check_size(size)
    model = _build(arguments)
    params = sum(parameter.numel() for parameter in model.parameters())
    audit(model)

    shape = (batch_size, input_channels(model), *size)
    model = model.to("meta").eval()
    x = torch.zeros(shape, device="meta")
    uncounted = Uncounted()
    with uncounted:
        counts = count_macs(model, x)
    compare_with_formula(model, counts, x)
    forward = counts[""]
    gmacs = sum(forward.values()) / 1e9
    efficient = None
    if isinstance(model, SUNet):
        config = model.config
        model.config = dataclasses.replace(config, memory_efficient=True)
        efficient = to_mib(saved_bytes(model, x))
        model.config = dataclasses.replace(config, memory_efficient=False)
    return {
        "cost.params_m": params / 1e6,
        "cost.output_stride": int(cast(int, model.output_stride)),
        "cost.gmacs": gmacs,
        "cost.gflops": 2 * gmacs,
        "cost.gmacs_attention": sum(n for op, n in forward.items() if op not in CONV_AND_LINEAR) / 1e9,
        "cost.gmacs_forward_backward": sum(count_macs(model, x, backward=True)[""].values()) / 1e9,
        "cost.uncounted_operators": ", ".join(sorted(uncounted.names)),
        "memory.saved_mib": to_mib(saved_bytes(model, x)),
        "memory.saved_mib_memory_efficient": efficient,
    }


def cost_parameters(settings: Mapping[str, Any], model: ModelConfig, task: str) -> dict[str, Any]:
    """Return the flat parameters of a cost or speed record: settings of the measurement and the resolved structure."""
    resolved = flatten(resolve(model, task))
    return {f"cost.{k}": v for k, v in settings.items()} | {f"model.{k}": v for k, v in resolved.items()}


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(**{key: value for key, value in arguments.items() if key != "weights"})


def _check_size(size: Size) -> None:
    if min(size) < MIN_SIZE:
        raise ValueError(f"size: height and width of at least {MIN_SIZE} pixels, not {size[0]} x {size[1]}")


def measure_cost(
    arguments: Mapping[str, Any],
    *,
    size: Size,
    batch_size: int = 1,
    receptive_field_seeds: int = 0,
    receptive_field_images: int = 2,
) -> tuple[Figures, NDArray[np.float32] | None]:
    """Count the cost of a network; with `receptive_field_seeds`, also measure its receptive field.

    Args:
        arguments: keyword arguments of `create_model`.
        size: (height, width) of the input in pixels.
        batch_size: images whose multiply-adds and memory are counted.
        receptive_field_seeds: initialisations that the effective field is averaged over; 0 skips it.
        receptive_field_images: random images per initialisation.

    Returns:
        The figures of `cost` and `receptive_field`, and the map of the effective field (H, W) or None.
    """
    figures = cost(arguments, size=size, batch_size=batch_size)
    if not receptive_field_seeds:
        return figures, None
    plain = {key: value for key, value in arguments.items() if key != "weights"}
    field_figures, gradient = receptive_field(
        lambda: create_model(**plain), size, seeds=receptive_field_seeds, images=receptive_field_images
    )
    return figures | field_figures, gradient


def cost_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Make a terminal table with one row per record: figures of `measure_cost` and, if present, `measure_speed`.

    The caption states what was counted, how, and what is not counted.
    """
    from sunets.report.tables import cost_frames, speed_columns  # counting needs no pandas

    rows = [record["cost"] for record in records]
    data, view = cost_frames(records)
    table = Table(title="Cost of the models", caption_justify="left", title_justify="left")
    view = view.assign(**speed_columns(data))
    for heading in view:
        first = heading == "Model"
        table.add_column(str(heading), justify="left" if first else "right", no_wrap=first)
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


def run_profile(
    models: Sequence[str],
    *,
    size: Size = (512, 512),
    output_stride: int | None = None,
    num_classes: int = 21,
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
    _check_size(size)
    if picture_path is not None and picture_path.suffix.lower() != ".png":
        raise ValueError(f"--picture {picture_path}: the picture is a PNG; name it *.png")
    outputs = [path.resolve() for path in (json_path, csv_path, speed_json_path, picture_path) if path is not None]
    if twice := next((path for path in outputs if outputs.count(path) > 1), None):
        raise ValueError(f"{twice}: named for two outputs, of which one would replace the other; name two files")
    for name in models:
        if name not in list_models(task):
            raise ValueError(f"{name}: no model of the zoo for {task}; there are {', '.join(list_models(task))}")
    settings = CostConfig.model_validate({"size": size})
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=120)
    names = list(dict.fromkeys(models))
    shared: dict[str, dict[str, Any]] = {}
    for name in names:
        model = ModelConfig(name=name, output_stride=output_stride)
        params = cost_parameters(settings.model_dump(mode="json"), model, task) | {"model.num_classes": num_classes}
        origin = provenance(None, code_hash(__name__), params, command_line())
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
                {name: _build(arguments[name]) for name in names},
                size=size,
                batch_size=settings.batch_size,
                repeats=settings.repeats,
                warmup=settings.warmup,
                threads=settings.threads,
            )
        host = environment("auto", settings.threads)
        timings = [
            make_record("speed", cost=figures, environment=host, **shared[name]) for name, figures in measured.items()
        ]
    times = {timing["model"]: timing["cost"] for timing in timings}
    shown = [record | {"cost": record["cost"] | times.get(record["model"], {})} for record in records]
    console.print(cost_table(shown))
    if json_path is not None:
        write_json(json_path, records)
    if csv_path is not None:
        write_rows(csv_path, [{"model": r["model"], **r["params"], **r["cost"]} for r in records])
    if speed_json_path is not None and timings:
        write_json(speed_json_path, timings)
    if picture_path is not None and maps:
        _draw(maps, records, picture_path)
    return records


def _draw(maps: Mapping[str, NDArray[np.float32]], records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the effective receptive fields as a PNG."""
    from sunets.report.images import draw_fields
    from sunets.report.style import save_files

    shares = {record["label"]: record["cost"]["receptive_field.effective_share"] for record in records}
    save_files(draw_fields(maps, shares), path)

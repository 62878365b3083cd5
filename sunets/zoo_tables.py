"""The cost tables of docs/cost.md: every network of the zoo, each task at one input size. Run by `make zoo`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sunets.core.config import ModelConfig, Task
from sunets.core.progress import progress_bar
from sunets.core.provenance import code_hash, environment, provenance
from sunets.core.record import Record, make_record, write_json, write_text
from sunets.models.structure import VARIANTS
from sunets.models.zoo import list_models
from sunets.profiling.cost import cost, cost_parameters
from sunets.report.records import read_checked, speed_rows
from sunets.report.tables import cost_frames, speed_table
from sunets.report.write import Table, markdown, write

MARKERS = ("<!-- cost table: begin -->", "<!-- cost table: end -->")


@dataclass(frozen=True)
class _Part:
    task: Task
    size: tuple[int, int]
    num_classes: int
    title: str


PARTS = (
    _Part("segmentation", (512, 512), 21, "Segmentation networks"),
    _Part("classification", (224, 224), 1000, "Classifiers"),
)


def zoo_stage(root: Path = Path()) -> list[Record]:
    """Count the cost of every network, of released SUNets and dilated ResNets at output strides 32, 16 and 8.

    Writes `results/zoo/`, with a table of the timings there, and the tables between the markers of docs/cost.md.
    """
    folder, page = root / "results" / "zoo", root / "docs" / "cost.md"
    _around_tables(page)  # before the work
    shown, everything = [], []
    for part in PARTS:
        records = []
        with progress_bar(transient=True) as progress:
            task = progress.add_task(part.task, total=len(_rows(part)), last="")
            for name, stride in _rows(part):
                records.append(_record(part, name, stride))
                progress.update(task, advance=1, last=name)
        frame, view = cost_frames(records)
        height, width = part.size
        caption = f"{part.title}: cost at 3 x {height} x {width}, {part.num_classes} classes"
        uncounted = {name for record in records for name in record["cost"]["cost.uncounted_operators"].split(", ")}
        notes = (f"Not counted by any counter: {', '.join(sorted(uncounted))}.",)
        write(Table(f"cost_{part.task}", caption, frame, view, notes), folder)
        shown.append(markdown(view, caption, notes))
        everything += records
    write_json(folder / "records.json", everything)
    if (timed := folder / "speed.json").exists():
        rows = read_checked(timed, "speed")
        strides = sorted({r["params"]["model.output_stride"] for r in rows})
        caption = f"Large networks at output stride {', '.join(map(str, strides))}, timed in turn within one run"
        write(speed_table(caption, speed_rows(rows), rows[0]), folder)
    before, after = _around_tables(page)
    write_text(page, before + MARKERS[0] + "\n" + "\n".join(shown) + MARKERS[1] + after)
    return everything


def _around_tables(page: Path) -> tuple[str, str]:
    """Return the text before and after the tables of docs/cost.md.

    Raises:
        ValueError: the page lacks the markers; names both.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not begin or not end:
        raise ValueError(f"{page}: the tables go between two lines that it lacks: {' and '.join(MARKERS)}")
    return before, after


def _rows(part: _Part) -> list[tuple[str, int | None]]:
    """List the name and output stride of every row; None is the network's default."""
    rows: list[tuple[str, int | None]] = []
    for name in list_models(part.task):
        released = name in VARIANTS and name != "sunet_tiny"
        strided = part.task == "segmentation" and (released or re.fullmatch(r"dilated_resnet\d+", name))
        rows += [(name, stride) for stride in ((32, 16, 8) if strided else (None,))]
    return rows


def _record(part: _Part, name: str, stride: int | None) -> Record:
    settings = {"size": list(part.size), "batch_size": 1}
    params = cost_parameters(settings, ModelConfig(name=name, output_stride=stride), part.task)
    params["model.num_classes"] = part.num_classes
    origin = provenance(None, code_hash("sunets.profiling.cost"), params, "make zoo")  # before the work
    arguments = {"name": name, "task": part.task, "num_classes": part.num_classes, "output_stride": stride}
    return make_record(
        "cost",
        benchmark="zoo",
        task=part.task,
        model="-".join(filter(None, [part.task, name, str(stride or "")])),
        label=name,
        config=params,
        cost=cost(arguments, size=part.size),
        environment=environment("cpu", 1),
        provenance=origin,
    )

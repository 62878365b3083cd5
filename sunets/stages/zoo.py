"""The README's cost table: every segmentation network of the zoo at one input size. Run by `make zoo`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.progress import track

from sunets.profile import cost
from sunets.record import code_hash, environment, make_record, provenance, write_json
from sunets.report.figures import architecture
from sunets.report.tables import cost_frames, markdown, write_table
from sunets.sunet import VARIANTS
from sunets.zoo import list_models

SIZE = (512, 512)
NUM_CLASSES = 21
MARKS = ("<!-- cost table: begin -->", "<!-- cost table: end -->")


def zoo_stage(root: Path = Path()) -> list[dict[str, Any]]:
    """Count every segmentation network; the authors' and those they compare with at every output stride of the release.

    Writes `results/zoo/`, the table between the marks of the README, and the README's figure of the architecture.
    """
    architecture(root / "docs" / "architecture")
    rows = []
    for name in list_models("segmentation"):
        strided = (name in VARIANTS and name != "sunet_tiny") or re.fullmatch(r"dilated_resnet\d+", name)
        rows += [(name, stride) for stride in ((32, 16, 8) if strided else (None,))]
    records = []
    host, code = environment("cpu", 1), code_hash(__name__)
    for name, stride in track(rows, description="counting"):
        params = {
            "model.name": name,
            "model.output_stride": stride,
            "profile.size": list(SIZE),
            "profile.batch_size": 1,
            "model.num_classes": NUM_CLASSES,
        }
        source = provenance(None, code, params, "make zoo")
        figures = cost({"name": name, "num_classes": NUM_CLASSES, "output_stride": stride}, size=SIZE)
        key = f"{name}_{stride}" if stride else name
        records.append(
            make_record(
                "profile",
                benchmark="zoo",
                model=key,
                label=name,
                config=params,
                cost=figures,
                environment=host,
                provenance=source,
            )
        )
    folder = root / "results" / "zoo"
    write_json(folder / "records.json", records)
    frame, view = cost_frames(records)
    caption = f"Cost of every segmentation network, input 3 x {SIZE[0]} x {SIZE[1]}, {NUM_CLASSES} classes"
    notes = [f"Not counted by any counter: {', '.join(_uncounted(records))}."]
    write_table(frame, folder / "cost", caption, view=view, notes=notes)
    readme = root / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(before + MARKS[0] + "\n" + markdown(view, caption, notes) + MARKS[1] + after)
    return records


def _uncounted(records: list[dict[str, Any]]) -> list[str]:
    names = {name for record in records for name in record["cost"]["cost.uncounted_operators"].split(", ")}
    return sorted(names)

"""Stage `report`: write the tables, figures and pages of one benchmark from its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sunets.core.config import IGNORE_INDEX, Suite
from sunets.core.names import PREPARED
from sunets.core.paths import BenchmarkPaths
from sunets.core.record import RecordError, write_json, write_text
from sunets.core.stage import stage
from sunets.data.manifest import read_split
from sunets.data.picture import DataError, read_mask, read_picture
from sunets.report import figures, images, summary, tables, write
from sunets.report.page import benchmark_page, figure_caption, index_page
from sunets.report.paper import narrowed, paper_document
from sunets.report.published import published
from sunets.report.records import SETTINGS, Records, load_records
from sunets.report.style import save_figure
from sunets.report.write import Table

TABLES = ("cost", "accuracy", "per_class", "object_size", "test_time", "tuning", "published", "speed", "training_time")
_REMEDY = "run the stage prepare again for an image or mask, the stage evaluate for a prediction"
FIGURES = (*figures.DRAWN, "qualitative")
"""Names of the files that a report writes: stale ones are removed, others are left alone."""


def build_report(suite: Suite, root: Path) -> list[Path]:
    """Write `results/<benchmark>/` tables, figures, pages and what DVC shows, and `results/README.md`.

    Pictures of a data set of others must not be committed with `results/`: the qualitative figure of all but the
    embedded sets goes to `outputs/<benchmark>/figures/`.

    Returns:
        Every path written.

    Raises:
        FileNotFoundError: there are no records.
        RecordError: a file of records, prepared data or predictions is damaged.
        StageError: the report is being written already, or its code or parameters changed meanwhile.
    """
    root = Path(root)
    params = ("benchmark", "seeds", "data", "models", "train", "evaluate", "cost", "report", "ablations")
    with stage("report", BenchmarkPaths(suite.benchmark, root), __name__, suite=suite, params=params):
        return _write(suite, root)


def _write(suite: Suite, root: Path) -> list[Path]:
    records = load_records(suite, root)
    out, private = root / "results" / suite.benchmark, root / "outputs" / suite.benchmark / "figures"
    made = _tables(suite, records)
    drawn = {name: figure for name, draw in figures.DRAWN.items() if (figure := draw(records)) is not None}
    examples, why_not = _examples(suite, records, root)
    embedded = suite.data.name.startswith("synthetic")
    # Without predictions nothing was scored here: the figure beside the records, from a clone's commit, is theirs.
    kept = embedded and bool(why_not) and (out / "figures/qualitative.png").exists()
    notes = [why_not] if why_not and not kept else []
    _remove_stale(out, private, FIGURES[:-1] if kept else FIGURES)
    written = [path for table in made for path in write.write(table, out / "tables")]
    settings = out / SETTINGS
    write_json(settings, suite.report.model_dump(mode="json") | {"models": list(suite.models)})
    written.append(settings)
    for name, figure in drawn.items():
        written += save_figure(figure, out / "figures" / name)
    palette = np.array(records.palette, dtype=np.uint8).reshape(-1, 3)
    picture = images.qualitative(examples, list(records.labels.values()), records.classes, palette)
    linked = {name: f"figures/{name}" for name in drawn}
    if embedded and (kept or picture is not None):
        linked["qualitative"] = "figures/qualitative"
    if picture is not None:
        written += save_figure(picture, (out / "figures" if embedded else private) / "qualitative")
        if not embedded:
            notes.append(
                f"The qualitative figure shows images of {suite.data.name}, which are not ours to publish: "
                f"`outputs/{suite.benchmark}/figures/qualitative.png`, not committed."
            )
    captions = {path: figure_caption(name, records) for name, path in linked.items()}
    page, paper, index = out / "README.md", out / "paper.tex", out.parent / "README.md"
    write_text(page, benchmark_page(suite, records, made, linked, notes))
    write_text(paper, paper_document(suite, made, captions))
    written += [page, paper, *summary.write_summary(records, out), index]
    write_text(index, index_page(out.parent))  # reads the page above
    return written


def _tables(suite: Suite, records: Records) -> list[Table]:
    names = {key: entry.name for key, entry in suite.models.items()}
    made = (
        tables.cost(records),
        tables.accuracy(records, suite.report.reference),
        tables.per_class(records),
        tables.object_size(records),
        tables.test_time(records),
        tables.tuning(records),
        published(records, names),
        tables.speed(records),
        tables.training_time(records),
    )
    return narrowed(table for table in made if table is not None)


def _remove_stale(out: Path, private: Path, drawn: Sequence[str]) -> None:
    stale = [out / "tables" / f"{name}{suffix}" for name in TABLES for suffix in (".md", ".tex", ".csv")]
    stale.append(out / "report.html")
    pictures = [*(out / "figures" / name for name in drawn), private / "qualitative"]
    stale += [path.with_name(path.name + suffix) for path in pictures for suffix in (".png", ".pdf")]
    for path in stale:
        path.unlink(missing_ok=True)


def _examples(suite: Suite, records: Records, root: Path) -> tuple[list[images.Example], str]:
    """Return the images of the qualitative figure, or the reason why there are none."""
    if records.task != "segmentation" or suite.evaluate.num_qualitative == 0:
        return [], ""
    data = root / PREPARED / suite.benchmark
    outputs = root / "outputs" / suite.benchmark / "predictions"
    listing = data / "splits" / f"{suite.data.test_split}.csv"
    if not (data / "manifest.json").exists() or not listing.exists():
        return [], f"No qualitative figure: `{PREPARED}/{suite.benchmark}` has not been prepared here."
    root_of_data = Path(suite.data.root) if suite.data.root else data
    try:
        items = {i.id: i for i in read_split(data, {"task": records.task}, suite.data.test_split, root_of_data)}
    except DataError as error:
        raise RecordError(str(error)) from None
    names = dict.fromkeys(p.stem for model in records.labels for p in sorted((outputs / model).glob("*.png")))
    examples = []
    for name in [n for n in names if n in items][: suite.evaluate.num_qualitative]:
        files = {label: outputs / model / f"{name}.png" for model, label in records.labels.items()}
        predictions = {label: _read(path) for label, path in files.items() if path.exists()}
        size = next(iter(predictions.values())).shape
        if odd := [label for label, labels in predictions.items() if labels.shape != size]:
            raise RecordError(f"predictions of {name}: {odd[0]}'s has another size; run `dvc repro` until they agree")
        image, target = items[name].image, items[name].target
        if not image.exists():
            return [], f"No qualitative figure: the images of `{suite.data.name}` are not here."
        truth = np.full(size, IGNORE_INDEX, dtype=np.uint8)
        if isinstance(target, Path) and target.exists():
            truth = _read(target, size)
        examples.append(images.Example(name, _read(image, size, color=True), truth, predictions))
    reason = f"No qualitative figure: no predictions in `outputs/{suite.benchmark}/predictions`."
    return examples, "" if examples else reason


def _read(path: Path, size: tuple[int, ...] | None = None, *, color: bool = False) -> NDArray[np.uint8]:
    """Read labels (H, W) or an image (H, W, 3), resized to the given height and width."""
    try:
        pixels = read_picture(path) if color else read_mask(path).astype(np.uint8)
    except DataError as error:
        raise RecordError(f"{error}; {_REMEDY}") from None
    if size is not None:
        how = Image.Resampling.BILINEAR if color else Image.Resampling.NEAREST
        pixels = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), how))
    return pixels

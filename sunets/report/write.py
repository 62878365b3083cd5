"""One table, and the one writer of .md, .tex and .csv.

A table is made twice from the same numbers: `data` is tidy, in full precision, with record keys as column names, and
becomes the CSV; `view` is what a reader sees, as text, and becomes Markdown and, narrowed to a page, LaTeX. No table
holds both exact and noisy figures; `Table.noisy` tells which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sunets.core.record import write_text
from sunets.report.latex import Paper, is_number_column, latex_table

TRIAL_NUMBERS = "trial_numbers"
"""Column of a CSV file of an ablation: the trials behind a row, by which `explain` finds their records."""


@dataclass(frozen=True)
class Table:
    """One table, before it is written."""

    name: str
    """File stem; `explain` takes it, in a folder other than `tables/` after the folder's name and a slash."""
    caption: str
    data: pd.DataFrame
    """The CSV: tidy numbers in full precision, units in the column names; those of columns `*n_seeds` are whole."""
    view: pd.DataFrame
    """What a reader sees; LaTeX shows `paper`."""
    notes: tuple[str, ...] = ()
    noisy: bool = False
    paper: Paper | None = None


def write(table: Table, directory: Path) -> list[Path]:
    """Write a table as `<directory>/<name>.md`, `.tex` and `.csv`, the same bytes for the same input.

    The LaTeX caption names the benchmark too, which is the directory that holds `tables/`, and the number of seeds; its
    label is `tab:BENCHMARK-TABLE`, so that the tables of several benchmarks can stand in one paper.
    """
    view = table.view.fillna("").astype(str)
    counts = [c for c in table.data.columns if str(c).endswith("n_seeds")]
    frame = table.data.astype(dict.fromkeys(counts, "Int64"))  # whole numbers, also where a row has none
    paper = table.paper or Paper(view)
    benchmark = (directory.parent if directory.name in ("tables", "ablations") else directory).name
    seeds = int(frame["n_seeds"].max()) if "n_seeds" in frame and frame["n_seeds"].notna().any() else 0
    named = f"{table.caption.rstrip('.')}; benchmark {benchmark}" + (f", {plural(seeds, 'seed')}." if seeds else ".")
    label = f"tab:{benchmark}-{table.name}"
    texts = {
        ".md": markdown(view, table.caption, table.notes),
        ".tex": latex_table(paper, named, table.notes, label),
        ".csv": frame.to_csv(index=False, lineterminator="\n"),
    }
    files = {directory / f"{table.name}{suffix}": text for suffix, text in texts.items()}
    for path, text in files.items():
        write_text(path, text)
    return list(files)


def markdown(view: pd.DataFrame, caption: str, notes: Sequence[str] = ()) -> str:
    """Write a GitHub table with its caption above and notes below; number columns are right-aligned."""
    escaped = view.map(markdown_cell)
    escaped.columns = pd.Index([markdown_cell(c) for c in view.columns])
    align = ["right" if is_number_column(view.iloc[:, i]) else "left" for i in range(view.shape[1])]
    body = escaped.to_markdown(index=False, disable_numparse=True, colalign=align)
    below = "".join(f"\n{markdown_cell(note)}\n" for note in notes)
    return f"**{markdown_cell(caption)}**\n\n{body}\n{below}"


def markdown_cell(text: object) -> str:
    """Put a text on one line and escape what Markdown would take for a column or for HTML."""
    return re.sub(r"\s*\n\s*", " ", str(text)).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def bullets(sentences: Iterable[str]) -> str:
    """Write a Markdown list."""
    return "\n".join(f"- {markdown_cell(sentence)}" for sentence in sentences)


def plural(count: int, noun: str) -> str:
    """Return `1 seed`, `2 seeds`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def join(items: Sequence[str]) -> str:
    """Join to `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


NAMES = {
    "model.unet_depth": "U-Net depth",
    "model.num_blocks": "U-Nets per stage",
    "model.output_stride": "Output stride",
    "model.dilation": "Dilation schedule",
    "train.lr": "Learning rate",
    "train.weight_decay": "Weight decay",
    "train.zero_init_residual": "Zero-init residual",
    "train.zero_init_head": "Zero-init head",
}
"""Names of hyper-parameters; any other is named by its path."""


def value_text(value: Any) -> str:
    """Format a hyper-parameter, or the value of an axis."""
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "default"}[value]
    if not isinstance(value, float):
        return str(value)
    written = f"{value:.5g}"  # 0.9999 and 0.99999 of an axis are two values; a drawn one has more digits than matter
    return written if float(written) == value else f"{value:.3g}"

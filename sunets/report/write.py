"""One table, and the one writer of .md, .tex and .csv.

A table is made twice from the same numbers: `data` is tidy, in full precision, with record keys as column names, and
becomes the CSV; `view` is what a reader sees, as text, and becomes Markdown and LaTeX. Whether a table holds exact
figures or noisy ones is told by `Table.noisy`; no table holds both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sunets.core.record import write_text


@dataclass(frozen=True)
class Table:
    """One table, before it is written."""

    name: str
    """File stem, and the name that `explain` takes."""
    caption: str
    data: pd.DataFrame
    view: pd.DataFrame
    notes: tuple[str, ...] = ()
    noisy: bool = False


def write(table: Table, directory: Path) -> list[Path]:
    """Write a table as `<directory>/<name>.md`, `.tex` and `.csv`."""
    return write_table(table.data, directory / table.name, table.caption, view=table.view, notes=table.notes)


def write_table(
    frame: pd.DataFrame,
    path_stem: Path,
    caption: str,
    *,
    view: pd.DataFrame | None = None,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write one table as Markdown, LaTeX (booktabs) and CSV, the same bytes for the same input.

    Args:
        frame: tidy numbers in full precision, units in the column names (those that end in n_seeds are whole numbers);
            becomes the CSV.
        path_stem: path of the three files without their suffix.
        caption: one line, without markup.
        view: the same table as a reader should see it; the frame itself, numbers to four digits, by default.
        notes: sentences below the table.

    Returns:
        The paths written.
    """
    view = _plain_view(frame) if view is None else view.fillna("").astype(str)
    counts = [c for c in frame.columns if str(c).endswith("n_seeds")]
    frame = frame.astype(dict.fromkeys(counts, "Int64"))  # whole numbers, also where a row has none
    texts = {
        ".md": markdown(view, caption, notes),
        ".tex": latex(view, caption, notes, f"tab:{path_stem.name}"),
        ".csv": frame.to_csv(index=False, lineterminator="\n"),
    }
    paths = []
    for suffix, text in texts.items():
        path = path_stem.with_name(path_stem.name + suffix)
        write_text(path, text)
        paths.append(path)
    return paths


def markdown(view: pd.DataFrame, caption: str, notes: Sequence[str] = ()) -> str:
    """A GitHub table with its caption above and notes below; number columns are right-aligned."""
    escaped = view.map(_markdown_cell)
    escaped.columns = pd.Index([_markdown_cell(c) for c in view.columns])
    align = ["right" if _is_number_column(view.iloc[:, i]) else "left" for i in range(view.shape[1])]
    body = escaped.to_markdown(index=False, disable_numparse=True, colalign=align)
    below = "".join(f"\n{_markdown_cell(note)}\n" for note in notes)
    return f"**{_markdown_cell(caption)}**\n\n{body}\n{below}"


def latex(view: pd.DataFrame, caption: str, notes: Sequence[str], label: str) -> str:
    """A `table` environment with booktabs rules; needs the package booktabs and nothing else."""
    escaped = view.map(latex_escape)
    escaped.columns = pd.Index([latex_escape(str(c)) for c in view.columns])
    columns = "".join("r" if _is_number_column(view.iloc[:, i]) else "l" for i in range(view.shape[1]))
    lines = [r"\begin{table}[tbp]", r"\centering", rf"\caption{{{latex_escape(caption)}}}", rf"\label{{{label}}}"]
    lines.append(escaped.to_latex(index=False, column_format=columns).rstrip("\n"))
    if notes:
        text = " ".join(latex_escape(note) for note in notes)
        lines.append(rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize {text}\end{{minipage}}")
    return "\n".join([*lines, r"\end{table}", ""])


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", "±": r"$\pm$",
    "×": r"$\times$", "−": r"$-$", "–": "--", "≥": r"$\geq$", "≤": r"$\leq$", "·": r"$\cdot$", "→": r"$\to$",
    "\n": " ",
}  # fmt: skip


def latex_escape(text: object) -> str:
    """Text that LaTeX prints as it stands; a number's leading minus sign becomes a real one."""
    shown = re.sub(r"(?<![\w.])-(?=\d)", "−", str(text))
    return "".join(_LATEX.get(c, c) for c in shown)


def _markdown_cell(text: object) -> str:
    return re.sub(r"\s*\n\s*", " ", str(text)).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _is_number_column(values: Iterable[str]) -> bool:
    shown = [str(v) for v in values if str(v)]
    return bool(shown) and sum(bool(re.match(r"[+\-−\[]?[\d.,]+", v)) for v in shown) * 2 > len(shown)


def _plain_view(frame: pd.DataFrame) -> pd.DataFrame:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.4g}"
        return "" if value is None or value is pd.NA else str(value)

    return frame.map(text)

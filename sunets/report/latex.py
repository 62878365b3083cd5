"""LaTeX for a paper: tables that fit a line of text, and a document that shows all of a benchmark.

The wide version of a table is its CSV and its Markdown. In LaTeX it has the columns that fit, by `PRIORITY`; numbers
are aligned at the decimal point (siunitx), the best of a column is bold.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from sunets.core.metrics import higher_is_better
from sunets.report.records import QUANTITIES

PACKAGES = ("booktabs", "siunitx", "adjustbox", "graphicx", "xurl")
"""Packages that tables and the document need."""
MOST_LETTERS = 116
"""Most characters in a row, with two per column for the gap, that fit a line of an article at 6.5 points or more."""
CELL_LETTERS, HEADING_LETTERS = 20, 13
"""Characters beyond which a text cell and a heading are broken into lines."""
PRIORITY = (
    r"mIoU \(%\)|Top-1 error|Search |Chosen", "Default recipe", "Difference", "Verdict", "Parameters", "Multiply-adds",
    "Saved for backward", "Output stride",
)  # fmt: skip
"""Patterns of headings that a narrow table keeps, the most important first; others follow in their order."""
_DIRECTIONS = {
    q.heading: higher_is_better(key) if key.startswith("score.") else key == "speed.images_per_second"
    for key, q in QUANTITIES.items()
    if not key.startswith(("receptive_field.", "cost.output_stride"))
}
"""Heading -> whether more is better; headings that say nothing of better or worse are absent."""
_NUMBERS = (
    "retain-explicit-plus, group-digits=integer, group-separator={,}, group-minimum-digits=4, "
    "reset-text-series=false, text-series-to-math"
)
_NUMBER = re.compile(r"([+\-−]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d+))?(?=\s|$)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Paper:
    """What a table shows in LaTeX where that is not its view."""

    view: pd.DataFrame
    """Cells as a reader should see them."""
    bold: pd.DataFrame | None = None
    """Truth values, one per cell of `view`; the best of each column by default."""
    notes: tuple[str, ...] | None = None
    """Those of the table by default."""
    whole: bool = False
    """Keep all columns, in smaller print if need be."""
    names: int = 0
    """Number of first columns that are kept in any case, since they name the row."""


def latex_table(paper: Paper, caption: str, notes: Sequence[str], label: str) -> str:
    """Write a `table` environment that is as wide as its text at most; needs booktabs, siunitx and adjustbox.

    Args:
        paper: what the table shows.
        caption: without markup, as are the notes.
        notes: printed below the table, unless `paper` has others.
        label: unique in a document.
    """
    view = paper.view.fillna("").astype(str)
    bold = best_cells(view) if paper.bold is None else paper.bold
    keep = list(range(view.shape[1])) if paper.whole else _fitting(view, paper.names)
    notes = notes if paper.notes is None else paper.notes
    columns = [_column(view.iloc[:, i], bold.iloc[:, i]) for i in keep]
    lines = [
        r"\begin{table}[htbp]", r"\centering", rf"\caption{{{latex_escape(caption)}}}", rf"\label{{{label}}}",
        rf"\footnotesize\setlength{{\tabcolsep}}{{4pt}}\sisetup{{{_NUMBERS}}}",
        r"\begin{adjustbox}{max width=\linewidth, max totalheight=0.8\textheight}",
        rf"\begin{{tabular}}{{{''.join(spec for spec, _, _ in columns)}}}", r"\toprule",
        " & ".join(head for _, head, _ in columns) + r" \\", r"\midrule",
        *(" & ".join(row) + r" \\" for row in zip(*(cells for _, _, cells in columns), strict=True)),
        r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}",
    ]  # fmt: skip
    if left_out := [str(h).lower().partition(" (")[0] for i, h in enumerate(view.columns) if i not in keep]:
        more = f"{len(left_out)} further column{'s are' if len(left_out) > 1 else ' is'} in the CSV file."
        notes = [*(n for n in notes if n.partition(":")[0].lower() not in left_out), more]
    if notes:
        text = " ".join(latex_text(note) for note in notes)
        lines.append(
            rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\scriptsize\raggedright\sloppy {text}\end{{minipage}}"
        )
    return "\n".join([*lines, r"\end{table}", ""])


def best_cells(view: pd.DataFrame, directions: Mapping[str, bool] | None = None) -> pd.DataFrame:
    """Mark the best numbers of each column, at the digits shown, where there are several to choose from.

    `directions` says of a heading whether more is better; those of `QUANTITIES` by default.
    """
    directions = _DIRECTIONS if directions is None else directions
    bold = pd.DataFrame(False, index=view.index, columns=view.columns)
    for i, heading in enumerate(view.columns):
        values = pd.Series([_value(cell) for cell in view.iloc[:, i]], index=view.index, dtype=float)
        if heading in directions and values.nunique() > 1:
            bold.isetitem(i, values == (values.max() if directions[heading] else values.min()))
    return bold


_FLOATS = (("topfraction", 0.95), ("bottomfraction", 0.95), ("textfraction", 0.02), ("floatpagefraction", 0.8))
"""Shares of a page of tables and figures with little text between them."""


def latex_document(title: str, tables: Iterable[str], figures: Mapping[str, str], optional: Mapping[str, str]) -> str:
    """Write an article that shows tables and figures and compiles as it is.

    Args:
        title: without markup.
        tables: .tex files, relative to the document.
        figures: path without suffix -> caption.
        optional: .tex or .pdf files of another stage -> caption of a figure; included where the file exists.
    """
    lines = [
        "% Made by `dvc repro` (stage `report`): pdflatex paper.tex", r"\documentclass{article}",
        *(rf"\usepackage{{{name}}}" for name in PACKAGES), r"\begin{document}",
        rf"\section*{{\raggedright {latex_escape(title)}}}",
        *(rf"\renewcommand{{\{name}}}{{{value}}}" for name, value in _FLOATS),
        *(rf"\input{{{path}}}" for path in tables), r"\clearpage",
    ]  # fmt: skip
    lines += [_figure(path, latex_text(caption)) for path, caption in figures.items()]
    for path, caption in optional.items():
        shown = _figure(path.removesuffix(".pdf"), latex_text(caption)) if caption else rf"\input{{{path}}}"
        lines.append(rf"\IfFileExists{{{path}}}{{%" + "\n" + shown + "}{}")
    return "\n".join([*lines, r"\end{document}", ""])


def _figure(path: str, caption: str) -> str:
    return (
        "\\begin{figure}[tbp]\n\\centering\n"
        f"\\includegraphics[width=\\linewidth,height=0.8\\textheight,keepaspectratio]{{{path}.pdf}}\n"
        f"\\caption{{{caption}}}\n\\end{{figure}}\n\\clearpage"
    )


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", "±": r"$\pm$",
    "×": r"$\times$", "−": r"$-$", "–": "--", "≥": r"$\geq$", "≤": r"$\leq$", "·": r"$\cdot$", "→": r"$\to$",
    "\n": " ",
}  # fmt: skip


def latex_escape(text: object) -> str:
    """Escape text so that LaTeX prints it as it stands; a number's leading minus sign becomes a real one."""
    shown = re.sub(r"(?<![\w.])-(?=\d)", "−", str(text))
    return "".join(_LATEX.get(c, c) for c in shown)


def latex_text(text: str) -> str:
    """Escape a sentence, whose addresses may be broken anywhere."""
    parts = re.split(r"(https?://[^\s,;)]+)", text)
    return "".join(rf"\url{{{part}}}" if i % 2 else latex_escape(part) for i, part in enumerate(parts))


def is_number_column(cells: Iterable[str]) -> bool:
    """Return whether most cells that are not empty begin with a number."""
    shown = [str(v) for v in cells if str(v)]
    return bool(shown) and sum(bool(re.match(r"[+\-−\[]?[\d.,]+", v)) for v in shown) * 2 > len(shown)


def _fitting(view: pd.DataFrame, named: int) -> list[int]:
    """Choose the columns that fit, in order: those that name the row, then by `PRIORITY`."""
    numbers = (i for i in range(view.shape[1]) if is_number_column(view.iloc[:, i]))
    first = max(1, named, next(numbers, view.shape[1]))

    def rank(i: int) -> tuple[int, int]:
        if i < first:
            return (-1, i)
        heading = str(view.columns[i])
        return (next((n for n, p in enumerate(PRIORITY) if re.match(p, heading)), len(PRIORITY)), i)

    keep: list[int] = []
    letters = 0
    for i in sorted(range(view.shape[1]), key=rank):
        lines = [line for cell in view.iloc[:, i] for line in _wrap(cell)]
        letters += max(map(len, [*lines, *_wrap(str(view.columns[i]), HEADING_LETTERS)])) + 2
        if keep and letters > MOST_LETTERS:
            break
        keep.append(i)
    return sorted(keep)


def _wrap(cell: str, letters: int = CELL_LETTERS) -> list[str]:
    """Break a text cell into lines; a number stays on one line with its interval."""
    return [cell] if _value(cell) is not None else textwrap.wrap(cell, letters, break_on_hyphens=False) or [""]


def _number(cell: str) -> re.Match[str] | None:
    match = _NUMBER.fullmatch(cell.strip())
    return match if match and (match[2] or match[3]) else None


def _value(cell: str) -> float | None:
    if (match := _number(cell)) is None:
        return None
    number = float(f"{match[2].replace(',', '') or 0}.{match[3] or 0}")
    return -number if match[1] in ("-", "−") else number


def _column(cells: pd.Series, bold: pd.Series) -> tuple[str, str, list[str]]:
    """Make specification, heading and cells of one column; a number and its interval are two columns of LaTeX."""
    heading = _stacked(str(cells.name), "c")
    parts = [_number(cell) for cell in cells]
    numbers = [match for match in parts if match]
    if not is_number_column(cells) or not numbers:
        aligned = "c" if is_number_column(cells) else "l"
        shown = [rf"\textbf{{{_stacked(c, 'c')}}}" if b else _stacked(c, "l") for c, b in zip(cells, bold, strict=True)]
        return aligned, heading, shown
    sign = "+" if any(m[1] for m in numbers) else ""
    whole = max(len(m[2].replace(",", "")) for m in numbers)
    digits = max(len(m[3] or "") for m in numbers)
    spec = f"S[table-format={sign}{whole}" + (f".{digits}]" if digits else "]")
    rests = [m[4].strip() if m else "" for m in parts]
    wide = any(rests)
    shown = []
    for cell, match, rest, strong in zip(cells, parts, rests, bold, strict=True):
        if match is None:
            text = _stacked(cell, "l")
            shown.append((rf"\multicolumn{{2}}{{l}}{{{text}}}" if wide else f"{{{text}}}") if cell else "&" * wide)
            continue
        number = cell.strip()[: match.end(3) if match[3] else match.end(2)].replace(",", "").replace("−", "-")
        number = (r"\bfseries " if strong else "") + number
        shown.append(f"{number} & {latex_escape(rest)}" if wide else number)
    if wide:
        return spec + r"@{\,}l", rf"\multicolumn{{2}}{{c}}{{{heading}}}", shown
    return spec, f"{{{heading}}}", shown


def _stacked(text: str, position: str) -> str:
    """Write a cell in lines: `l` for text, from the top of its row; `c` for a heading, to the bottom of its row."""
    lines = [latex_escape(line) for line in _wrap(text, CELL_LETTERS if position == "l" else HEADING_LETTERS)]
    if len(lines) == 1:
        return lines[0]
    side = "t" if position == "l" else "b"
    return rf"\begin{{tabular}}[{side}]{{@{{}}{position}@{{}}}}" + r" \\ ".join(lines) + r"\end{tabular}"

"""Traces of the cells of a shown table: its rows and columns by the names that `explain` takes."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sunets.core.config import Suite
from sunets.core.record import read_rows
from sunets.report.claims import CAPTION, Results
from sunets.report.explain import CLAIMS, Explainer
from sunets.report.records import ReportError, quantity
from sunets.report.write import NAMES

_ROW_KEYS = (
    ("our_model", "published_model", "metric"), ("model", "variant"), ("model", "seed"), ("model",), ("axis", "value"),
    ("term",), ("number",),
)  # fmt: skip
"""Columns of a CSV file that name its rows; those of a study's settings are its axes."""
_COLUMNS = {
    r"Difference.*": r".*\bdifference(\.mean)?", "Verdict": r".*\bverdict", "Seeds": "n_seeds", "Ours": r"ours\.mean",
    r"Published parameters \(M\)": "published_params_m", r"Our parameters \(M\)": r"ours\.params_m",
    r"Trainings|Median time \(s\)": "seconds", "Share of variance .*": "share", "Search .*": r"search\..*",
    "Default recipe .*": r"val\..*\.default", "Chosen .*": r"val\.[^.]*",
    **{name: re.escape(path) for path, name in NAMES.items()},
}  # fmt: skip
"""Heading of a shown column -> name of the column in the CSV file, where `explain` does not know the heading."""


class Traces:
    """Traces of a benchmark's tables."""

    def __init__(self, suite: Suite, results: Path, read: Results) -> None:
        self._suite, self._explainer = suite, Explainer(results, read)
        folder = results / suite.benchmark
        files = [*folder.glob("tables/*.md"), *folder.glob("ablations/*.md")]
        self._paths = {path.read_text(encoding="utf-8").partition("\n")[0]: path for path in files}

    def of(self, caption: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[list[str | None]]:
        """What `explain` says of each cell; None of those without a number or a verdict.

        Args:
            caption: of the table, as its Markdown file has it.
            head: headings.
            lines: cells as Markdown.
        """
        if caption == f"**{CAPTION}**":
            claims = [""]  # a claim stands in its first row alone
            for line in lines:
                claims.append(line[0] or claims[-1])
            rows = [["/".join(filter(None, (claim, line[2])))] for claim, line in zip(claims[1:], lines, strict=True)]
            return [[self._trace(CLAIMS, row, h, c) for h, c in zip(head, line)] for row, line in zip(rows, lines)]
        if (path := self._paths.get(caption)) is None:
            return [[None] * len(head) for _ in lines]
        entries = read_rows(path.with_suffix(".csv"), ())
        table = path.stem if path.parent.name == "tables" else f"{path.parent.name}/{path.stem}"
        columns = [_column(heading, entries[0] if entries else ()) for heading in head]
        rows = self._rows(path.stem, entries, lines)
        return [[self._trace(table, row, h, c) for h, c in zip(columns, line)] for row, line in zip(rows, lines)]

    def _trace(self, table: str, rows: Sequence[str], column: str, cell: str) -> str | None:
        judged = column in ("Measured", "Verdict") or column.endswith("verdict")
        if not re.match(r"[\[+−-]?\d", cell) and not (judged and cell not in ("", "reference")):
            return None
        try:
            texts = [self._explainer.explain(self._suite.benchmark, table, row, column) for row in rows]
        except ReportError:  # such as a setting of an axis, which no record measures
            return None
        return "\n\n".join(texts) or None

    def _rows(self, stem: str, entries: Sequence[dict[str, Any]], lines: Sequence[Sequence[str]]) -> list[list[str]]:
        """Names of the rows of the CSV file that each shown line is made from."""
        study = self._suite.ablations.get(stem)
        axes = tuple(axis.path for axis in study.axes) if study else ()
        keys = next((keys for keys in (*_ROW_KEYS, axes) if entries and set(keys) <= set(entries[0])), ())
        names = ["/".join(str(entry[key]) for key in keys) for entry in entries]
        if len(entries) == len(lines):
            return [[name] for name in names]
        values = [{str(v) for v in e.values()} | {quantity(str(e.get("metric"))).heading} for e in entries]
        known = set[str]().union(*values)
        shown = [{html.unescape(c) for c in line if not c[:1].isdigit()} & known for line in lines]
        return [[name for name, value in zip(names, values, strict=True) if texts <= value] for texts in shown]


def _column(heading: str, columns: Sequence[str] | dict[str, Any]) -> str:
    pattern = "|".join(column for shown, column in _COLUMNS.items() if re.fullmatch(shown, heading)) or "(?!)"
    return next((column for column in columns if re.fullmatch(pattern, column)), heading)

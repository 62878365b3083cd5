"""The parts of a benchmark for a paper: narrow versions of its tables, and `paper.tex`, which shows them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd

from sunets.core.config import Suite
from sunets.report.latex import Paper, best_cells, latex_document
from sunets.report.page import SECTIONS
from sunets.report.records import quantity
from sunets.report.write import Table

MOST_CLASSES = 6
"""Most classes that are columns; with more, classes are rows and models are columns."""
_ABLATION = {
    ".tex": "", "_axes.tex": "", "_object_size.tex": "", "_pareto.tex": "",
    "_axes.pdf": "score by the value of each axis, every seed (dots), mean and 95 % t-interval",
    "_interaction.pdf": "mean score over two axes",
    "_pareto.pdf": "score against multiply-adds, trials of the search (left) and those trained again (right)",
    "_importance.pdf": "share of the variance that an axis explains (fANOVA), with 95 % bootstrap intervals",
}  # fmt: skip
"""End of a file of an ablation -> caption of a figure."""
_COSTS = tuple(quantity(key).heading for key in ("cost.params_m", "cost.gmacs"))


def narrowed(tables: Iterable[Table]) -> list[Table]:
    """Give the tables of a benchmark their narrow versions where the columns of the view would not do."""
    tables = list(tables)
    cost = next((t.view for t in tables if t.name == "cost"), pd.DataFrame())
    made = {"accuracy": lambda t: _accuracy(t, cost), "per_class": _per_class, "published": _published}
    return [replace(t, paper=made[t.name](t)) if t.name in made else t for t in tables]


def _accuracy(table: Table, cost: pd.DataFrame) -> Paper:
    """Add the two costs that a claim about accuracy needs beside it; name unfinished trainings in a note."""
    view, notes = table.view, table.notes
    if "Budget" in view:
        moving = [f"{model} {text}" for model, text in zip(view.Model, view.Budget) if text]
        view, notes = view.drop(columns="Budget"), (*notes, f"Validation score at the end: {', '.join(moving)}.")
    if not cost.empty:
        view = view.merge(cost[["Model", *(c for c in _COSTS if c in cost)]], on="Model", how="left")
    return Paper(view, notes=notes)


def _per_class(table: Table) -> Paper:
    """Show means alone; make rows of many classes."""
    means = table.view.fillna("").set_index("Model").replace(r"\s*[±\[].*", "", regex=True)
    view = means.rename(columns=lambda c: c.replace("_", " ")).reset_index()
    bold = best_cells(view, dict.fromkeys(view.columns[1:], True))
    notes = ("IoU in %, mean over the seeds; the CSV file has the intervals.", *table.notes[1:])
    if view.shape[1] - 2 <= MOST_CLASSES:
        return Paper(view, bold, notes, whole=True)
    turned = view.set_index("Model").T.rename_axis("Class").rename_axis(columns=None).reset_index()
    marks = bold.iloc[:, 1:].T.reset_index(drop=True)
    marks.insert(0, "Class", False)
    marks.columns = turned.columns
    return Paper(turned, marks, notes, whole=True)


def _published(table: Table) -> Paper:
    """Put parameters beside the network, and sources as numbers that are explained below."""
    view = table.view
    numbers = {source: f"[{i}]" for i, source in enumerate(dict.fromkeys(view.Source), start=1)}
    parameters = view["Published parameters (M)"].map(lambda m: f", {float(m):g} M" if m else "")
    shown = view.assign(
        Source=view.Source.map(numbers), **{"Published network": view["Published network"] + parameters}
    )
    shown = shown.drop(columns=["Benchmark", "Published parameters (M)", "Our parameters (M)", "Difference"])
    sources = (f"{number} {source}." for source, number in numbers.items())
    return Paper(shown, notes=(*table.notes, *sources), whole=True)


def paper_document(suite: Suite, tables: Iterable[Table], figures: Mapping[str, str]) -> str:
    """Write `paper.tex`: every table and figure of the report, and the main ones of the ablations that have been run.

    `figures` maps a path without suffix, as seen from the page, to a caption.
    """
    optional = {
        f"ablations/{study}{part}": f"Ablation {study}: {caption}." if caption else ""
        for study in suite.ablations
        for part, caption in _ABLATION.items()
    }
    order = [name for _, parts in SECTIONS for kind, name in parts if kind == "table"]
    shown = sorted(tables, key=lambda t: order.index(t.name) if t.name in order else len(order))
    paths = [f"tables/{table.name}.tex" for table in shown]
    return latex_document(f"{suite.report.title} ({suite.benchmark})", paths, figures, optional)

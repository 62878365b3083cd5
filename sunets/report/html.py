"""One page to open and send: the pages of a benchmark with their figures and the trace of each number, in one file.

The Markdown that `report` and `ablations report` wrote is its source, so that it says what they say, in a fresh clone
too. Markdown files that a page links to follow the paragraph with the link.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jinja2
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from markupsafe import Markup, escape
from PIL import Image

from sunets.core.config import Suite
from sunets.core.record import RecordError, read_rows, write_text
from sunets.report.claims import CAPTION, Results, claims_table, read_results
from sunets.report.explain import CLAIMS, Explainer
from sunets.report.latex import is_number_column
from sunets.report.records import ReportError, quantity

FIRST = ("Findings", "Claims", "Limits")
"""Sections that come before the others."""
LONG = 40
"""Characters beyond which a cell is wrapped, and rows beyond which a table is folded."""
_BESIDE = re.compile(
    r"^Made by `dvc repro`.*$|^<sub>Table .*$|^<sub>|</sub>$|,? \(?\[(CSV|LaTeX|PDF)\]\([^)]*\)\)?", re.MULTILINE
)
"""References to neighbouring files, which a reader of the single HTML file does not have."""


def build_html(suite: Suite, root: Path) -> Path:
    """Write `results/<benchmark>/report.html` from the pages, figures and records in `results/`; it needs no data.

    Raises:
        FileNotFoundError: there is no report yet.
        RecordError: a file of records or a table is damaged.
    """
    results = Path(root) / "results"
    source = results / suite.benchmark / "README.md"
    if not source.exists():
        raise FileNotFoundError(f"{source}: no report yet; run `python -m sunets report` without --html first")
    read = read_results(results)
    if suite.benchmark not in read.benchmarks:
        absent = f"{source.parent / 'records'}: no records; run `dvc repro` first"
        raise RecordError(read.unreadable.get(suite.benchmark, absent))
    page = _Page(source.parent, _Traces(suite, results, read))
    sections: dict[str, list[dict[str, Any]]] = {}
    for block in page.blocks(source.read_text(encoding="utf-8")):
        if block["kind"] == "heading" and block["level"] == 2:
            sections[block["text"]] = []
        elif sections:
            sections[next(reversed(sections))].append(block)
    sections["Claims"] = list(page.blocks(claims_table(read)))
    ordered = {name: sections[name] for name in (*FIRST, *sections) if name in sections}
    values = {"title": suite.report.title, "sections": ordered, "traces": list(page.numbers)}
    target = source.with_name("report.html")
    write_text(target, _TEMPLATES.get_template("report.html.j2").render(values))
    return target


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("sunets.report"), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True
)
_MARKDOWN = MarkdownIt("js-default")  # HTML in the text, such as that of a label, stays text
# Images become their text: none is loaded from an address.
_MARKDOWN.add_render_rule("image", lambda _, tokens, i, *rest: str(escape(tokens[i].content)))


def _inline(text: str) -> Markup:
    """Render a sentence; links to pages become "below", links to other files plain text, and addresses links."""
    shown = _MARKDOWN.renderInline(text.strip())
    shown = re.sub(r'<a href="([^":]*\.md)">\1</a>', "below", shown)
    shown = re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", shown)
    return Markup(re.sub(r'(?<![">])https?://[^\s<>"]*[^\s<>".,;)]', r'<a href="\g<0>">\g<0></a>', shown))


@dataclass
class _Page:
    """The pages below a folder."""

    folder: Path
    traces: _Traces
    numbers: dict[str, int] = field(default_factory=dict)
    """Text of a trace -> its number on the page."""
    linked: set[Path] = field(default_factory=set)
    """Files that are part of the page already."""

    def blocks(self, text: str, depth: int = 0) -> Iterator[dict[str, Any]]:
        """Cut a page, less its title, into headings, paragraphs, lists, tables and figures, as the template needs them.

        `depth` is added to the levels of its headings: a page that another links to lies below it.
        """
        caption, last = "", {"kind": ""}
        for node in SyntaxTreeNode(_MARKDOWN.parse(_BESIDE.sub("", text))).children:
            content = node.children[0].content.strip() if node.type in ("heading", "paragraph") else ""
            if re.fullmatch(r"\*\*.*\*\*", content):
                caption = content
                continue
            if last["kind"] == "figure" and not last["caption"]:
                last["caption"] = _inline(content.strip("*"))
                continue
            block = self._block(node, content, caption, depth)
            if block["kind"] == "paragraph" and last["kind"] in ("table", "note"):
                block["kind"] = "note"
            caption, last = "", block
            if node.tag != "h1" and "[Table of " not in content:
                yield block
            for link in re.findall(r"\]\(([^)]+)\)", content):
                if (file := self._file(link, ".md")) and file not in self.linked:
                    self.linked.add(file)
                    yield from self.blocks(file.read_text(encoding="utf-8"), depth + 1)

    def _block(self, node: SyntaxTreeNode, content: str, caption: str, depth: int) -> dict[str, Any]:
        if node.type == "heading":
            return {"kind": "heading", "level": int(node.tag[1]) + depth, "text": content}
        if node.type == "table":
            lines = [[c.children[0].content for c in row.children] for part in node.children for row in part.children]
            return self._table(caption, *lines)
        if node.type == "bullet_list":
            return {"kind": "list", "items": [_inline(item.children[0].children[0].content) for item in node.children]}
        if (picture := re.fullmatch(r"!\[(.*)\]\((.*)\)", content)) and (file := self._file(picture[2], ".png")):
            data = base64.b64encode(file.read_bytes()).decode()
            with Image.open(file) as image:
                return {"kind": "figure", "alt": picture[1], "data": data, "width": image.width, "caption": ""}
        return {"kind": "paragraph", "text": _inline(content)}

    def _file(self, link: str, suffix: str) -> Path | None:
        """Return the file that a link names, if it lies below the folder."""
        path, folder = (self.folder / unquote(link)).resolve(), self.folder.resolve()
        return path if path.suffix == suffix and path.is_relative_to(folder) and path.is_file() else None

    def _table(self, caption: str, head: Sequence[str], *lines: Sequence[str]) -> dict[str, Any]:
        if head[-1] == "Table":  # names of files
            head, lines = head[:-1], tuple(line[:-1] for line in lines)
        numeric = [is_number_column(line[i] for line in lines) for i in range(len(head))]
        rows = [
            [
                {
                    "text": _inline(cell),
                    "long": len(cell) > LONG,
                    "trace": trace and self.numbers.setdefault(trace, len(self.numbers)),
                }
                for cell, trace in zip(line, traces, strict=True)
            ]
            for line, traces in zip(lines, self.traces.of(caption, head, lines), strict=True)
        ]
        return {
            "kind": "table",
            "caption": _inline(caption.strip("*")),
            "head": [_inline(text) for text in head],
            "numeric": numeric,
            "rows": rows,
            "sortable": bool(caption) and all(line[0] for line in lines),
            "folded": len(rows) > LONG,
        }


# --- traces of the cells ---------------------------------------------------------------------------------------------

_ROW_KEYS = (
    ("our_model", "published_model", "metric"), ("model", "variant"), ("model", "seed"), ("model",), ("axis", "value"),
    ("term",), ("number",),
)  # fmt: skip
"""Columns of a CSV file that name its rows; those of a study's settings are its axes."""


class _Traces:
    """Traces of a benchmark's tables."""

    def __init__(self, suite: Suite, results: Path, read: Results) -> None:
        self._suite, self._explainer = suite, Explainer(results, read)
        folder = results / suite.benchmark
        files = [*folder.glob("tables/*.md"), *folder.glob("ablations/*.md")]
        self._paths = {path.read_text(encoding="utf-8").partition("\n")[0]: path for path in files}

    def of(self, caption: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[list[str | None]]:
        """Return what `explain` says of each cell of a shown table; None of those without a number or a verdict."""
        if caption == f"**{CAPTION}**":
            claims = [""]  # a claim stands in its first row alone
            for line in lines:
                claims.append(line[0] or claims[-1])
            rows = [["/".join(filter(None, (claim, line[2])))] for claim, line in zip(claims[1:], lines, strict=True)]
            table = CLAIMS
        elif path := self._paths.get(caption):
            rows = self._rows(path.stem, read_rows(path.with_suffix(".csv")), lines)
            table = path.stem if path.parent.name == "tables" else f"{path.parent.name}/{path.stem}"
        else:
            return [[None] * len(head) for _ in lines]
        return [[self._trace(table, row, h, c) for h, c in zip(head, line)] for row, line in zip(rows, lines)]

    def _trace(self, table: str, rows: Sequence[str], column: str, cell: str) -> str | None:
        judged = column in ("Measured", "Verdict")
        if not re.match(r"[\[+−-]?\d", cell) and not (judged and cell not in ("", "reference")):
            return None
        try:
            texts = [self._explainer.explain(self._suite.benchmark, table, row, column) for row in rows]
        except ReportError:  # such as a setting of an axis, which no record measures
            return None
        return "\n\n".join(texts) or None

    def _rows(self, stem: str, entries: Sequence[dict[str, Any]], lines: Sequence[Sequence[str]]) -> list[list[str]]:
        """Return the names of the rows of the CSV file that each shown line is made from."""
        studies, first = self._suite.ablations, entries[0] if entries else {}
        name = stem if stem in studies else re.sub("_(object_size|recipes)$", "", stem)
        of_recipes = name != stem and stem.endswith("_recipes")
        varied = (*studies[name].axes, *(studies[name].nuisance if of_recipes else ())) if name in studies else ()
        settings = tuple(column for column in first if column in {axis.path for axis in varied})
        keys = next((keys for keys in (*_ROW_KEYS, settings) if first and set(keys) <= set(first)), ())
        names = ["/".join(str(entry[key]) for key in keys if entry[key] is not None) for entry in entries]
        if len(entries) == len(lines):
            return [[name] for name in names]
        values = [{str(v) for v in e.values()} | {quantity(str(e.get("metric"))).heading} for e in entries]
        known = set[str]().union(*values)
        shown = [{html.unescape(c) for c in line if not c[:1].isdigit()} & known for line in lines]
        return [[name for name, value in zip(names, values, strict=True) if texts <= value] for texts in shown]

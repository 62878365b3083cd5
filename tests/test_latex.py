"""Tables and document for a paper: what they hold, and that LaTeX takes them as they are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from test_report import MODELS, SEEDS, fabricate, make_suite

from sunets.report.build import _tables, build_report
from sunets.report.latex import Paper, best_cells, latex_document, latex_escape, latex_table
from sunets.report.paper import narrowed
from sunets.report.records import load_records
from sunets.report.write import Table, write

WIDE = pd.DataFrame(
    {
        "Model": ["A network with a name of many words", "SUNet-tiny", "diverged one"],
        "Seeds": ["5", "5", ""],
        "mIoU (%)": ["71.20 ± 1.10", "9.05", "diverged (5 of 5)"],
        "Pixel accuracy (%)": ["90.00 ± 1.00", "80.00 ± 10.00", ""],
        "mIoU over images (%)": ["[70.10, 72.30]", "[8.00, 10.00]", ""],
        "Difference from SUNet-tiny": ["+62.15 [+60.00, +64.30]", "", ""],
        "Verdict": ["not comparable: train.epochs 6 / 60", "reference", ""],
        "Parameters (M)": ["1,234.500", "0.216", "0.300"],
        "Multiply-adds (G)": ["0.022", "0.054", "0.054"],
        "Saved for backward (MiB)": ["10.0", "12.0", "13.0"],
    }
)


def _rows(text: str) -> list[str]:
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    return [line for line in body.splitlines() if line.endswith(r" \\")]


def test_a_table_keeps_the_columns_that_matter_most_and_that_fit() -> None:
    text = latex_table(Paper(WIDE), "A caption.", ["mIoU over images: bootstrap.", "A note."], "tab:x-y")
    head, *rows = _rows(text)
    for kept in ("mIoU", "Difference", "Verdict", "Parameters", "Multiply-adds"):
        assert kept in head
    for dropped in ("Seeds", "Pixel accuracy", "over images", "Saved"):
        assert dropped not in head
    assert "bootstrap" not in text, "a note on a column that is not shown"
    assert "4 further columns are in the CSV file." in text
    assert len({row.count("&") + row.count(r"\multicolumn{2}") for row in (head, *rows)}) == 1
    assert r"\multicolumn{2}{l}{diverged (5 of 5)}" in rows[2]
    assert text.isascii()


def test_numbers_are_aligned_at_the_decimal_point_and_the_best_is_bold() -> None:
    text = latex_table(Paper(WIDE), "A caption.", [], "tab:x-y")
    assert "S[table-format=2.2]@{\\,}lS[table-format=+2.2]@{\\,}l" in text
    assert "S[table-format=4.3]" in text
    assert r"\bfseries 71.20 & $\pm$ 1.10" in text
    assert r"9.05 & " in text
    assert r"\bfseries 0.216" in text
    assert "1234.500" in text
    assert r"+62.15 & [+60.00, +64.30]" in text


def test_a_list_of_numbers_is_text() -> None:
    view = pd.DataFrame({"U-Net depth": ["1, 1, 1", "12, 1"], "Cost": ["1,234.5", "2.5"]})
    lines = latex_table(Paper(view), "A caption.", (), "tab:x").splitlines()
    assert r"1, 1, 1 & 1234.5 \\" in lines
    assert r"12, 1 & 2.5 \\" in lines


def test_best_is_the_largest_score_the_smallest_cost_and_nothing_where_all_are_equal() -> None:
    view = pd.DataFrame(
        {"Model": ["a", "b", "c"], "mIoU (%)": ["1.0", "2.0 ± 3.0", "2.0"], "Top-1 error (%)": ["9.0", "8.0", ""],
         "Parameters (M)": ["1.0", "1.0", ""], "Output stride": ["8", "16", "4"],
         "Throughput (images/s)": ["5", "6", "7"]}
    )  # fmt: skip
    bold = best_cells(view)
    assert bold["mIoU (%)"].tolist() == [False, True, True]
    assert bold["Top-1 error (%)"].tolist() == [False, True, False]
    assert bold["Throughput (images/s)"].tolist() == [False, False, True]
    assert not bold[["Model", "Parameters (M)", "Output stride"]].any(axis=None)


def test_many_classes_become_rows_with_the_best_of_each_row_bold() -> None:
    names = [f"class_{i}" for i in range(11)]
    view = pd.DataFrame([["A", *(f"{i}.50 ± 0.10" for i in range(11)), "5.50"], ["B", *["3.00"] * 11, "3.00"]])
    view.columns = pd.Index(["Model", *names, "mIoU"])
    (table,) = narrowed([Table("per_class", "IoU of each class.", view, view, ("Intervals.", "Absent: void."))])
    assert table.paper.view.columns.tolist() == ["Class", "A", "B"]
    assert table.paper.view.Class.tolist() == [*(name.replace("_", " ") for name in names), "mIoU"]
    assert table.paper.view.A.tolist()[:2] == ["0.50", "1.50"]
    assert table.paper.bold.A.tolist() == [False, False, False, *[True] * 9]
    assert table.paper.bold.B.tolist() == [True, True, True, *[False] * 9]
    assert table.paper.notes[1:] == ("Absent: void.",)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a benchmark that has published values, and the tables of another."""
    root = tmp_path_factory.mktemp("paper")
    suite = make_suite(MODELS, SEEDS, benchmark="camvid")
    fabricate(root, suite)
    build_report(suite, root)
    suite = make_suite(MODELS, SEEDS)
    fabricate(root, suite)
    for table in _tables(suite, load_records(suite, root)):
        write(table, root / "results/toy/tables")
    return root / "results"


@pytest.mark.slow
def test_labels_are_unique_and_captions_name_benchmark_split_and_seeds(results: Path) -> None:
    texts = {path: path.read_text() for path in sorted(results.glob("*/tables/*.tex"))}
    labels = [label for text in texts.values() for label in re.findall(r"\\label\{(.*?)\}", text)]
    assert len(set(labels)) == len(labels) == len(texts) > 10
    assert {"tab:toy-accuracy", "tab:camvid-accuracy", "tab:camvid-published"} <= set(labels)
    caption = re.search(r"\\caption\{(.*)\}", texts[results / "toy/tables/accuracy.tex"])[1]
    assert caption == "Accuracy on the test split; benchmark toy, 3 seeds."


@pytest.mark.slow
def test_document_shows_every_table_and_figure(results: Path) -> None:
    text = (results / "camvid/paper.tex").read_text()
    folder = results / "camvid"
    assert {f"tables/{p.name}" for p in folder.glob("tables/*.tex")} == set(re.findall(r"\\input\{(.*?)\}", text))
    assert {f"figures/{p.name}" for p in folder.glob("figures/*.pdf")} == set(
        re.findall(r"\\includegraphics\[.*?\]\{(.*?)\}", text)
    )


def compile_latex(folder: Path, out: Path) -> str:
    """Compile `paper.tex` twice, as a reader would, and return the log without its line breaks."""
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={out}", "paper.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    return (out / "paper.log").read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here: Debian's texlive-science, -latex-extra")
@pytest.mark.parametrize("case", ["report", "odd"])
def test_latex_compiles_without_a_box_that_is_too_wide(results: Path, tmp_path: Path, case: str) -> None:
    folder = results / "camvid"
    if case == "odd":  # long words, signs of LaTeX, a table that is longer than a page, a figure that is not there
        folder = tmp_path / "results" / "odd"
        names = [f"A very long name of a class {i} & 100 % of_it ~ ^ \\ # $" for i in range(20)]
        data = pd.concat([WIDE.assign(Model=[f"{m} & {i}_%" for m in WIDE.Model]) for i in range(40)])
        classes = pd.DataFrame([["A network", *["12.30 ± 1.00"] * 21]], columns=["Model", *names, "mIoU"])
        tables = [Table("long", "Über 5 % – ≥ 3 × 4.", data, data, ("A note: https://example.org/" + "a" * 300,))]
        tables += narrowed([Table("per_class", "IoU.", classes, classes, ("IoU.",))])
        for table in tables:
            write(table, folder / "tables")
        paths = [f"tables/{table.name}.tex" for table in tables]
        text = latex_document("Odd & ends", paths, {}, {"ablations/none.tex": "", "ablations/none.pdf": "None."})
        (folder / "paper.tex").write_text(text, encoding="utf-8")
    log = compile_latex(folder, tmp_path)
    assert "Output written on" in log.replace("\n", "")
    too_wide = [float(points) for points in re.findall(r"Overfull \\[hv]box \(([\d.]+)pt too", log)]
    assert not [points for points in too_wide if points > 5], log
    assert "multiply defined" not in log


def test_text_is_escaped() -> None:
    assert latex_escape("a_b & 5 % <-1.5±2> {x}\\") == (r"a\_b \& 5 \% $<$$-$1.5$\pm$2$>$ \{x\}\textbackslash{}")
    assert latex_escape("U-Net 2-3") == "U-Net 2-3"


def test_unfinished_trainings_are_named_below_a_narrow_table() -> None:
    view = pd.DataFrame({"Model": ["A", "B"], "mIoU (%)": ["1.00", "2.00"], "Budget": ["still improving (+3.36)", ""]})
    cost = pd.DataFrame({"Model": ["B", "A"], "Parameters (M)": ["0.2", "0.1"]})
    accuracy, _ = narrowed([Table("accuracy", "A.", view, view, ("N.",)), Table("cost", "C.", cost, cost)])
    assert accuracy.paper.notes == ("N.", "Validation score at the end: A still improving (+3.36).")
    assert accuracy.paper.view["Parameters (M)"].tolist() == ["0.1", "0.2"]
    assert "Budget" not in accuracy.paper.view

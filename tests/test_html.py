"""The page to send: complete in itself, safe whatever a label says, and usable in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, Page, browser
from PIL import Image
from test_report import SEEDS, fabricate, make_suite

from sunets.core.config import Suite
from sunets.core.record import RecordError
from sunets.report.build import _tables
from sunets.report.html import build_html
from sunets.report.page import benchmark_page
from sunets.report.records import load_records
from sunets.report.write import Table, markdown, write

EVIL = "<script>document.title = 'hit'</script> ![x](http://127.0.0.1/x.png) & co"
MODELS = {"sunet_tiny": "SUNet-tiny", "unet_small": EVIL, "plain_conv_small": "Plain"}
COSTS = ["2.5", "-3", "1,200.0", "", "10.25 [9, 11]", "+0.5", "10.5", "7", "8", "9", "diverged", "11"]
RISING = ["-3", "+0.5", "2.5", "7", "8", "9", "10.25 [9, 11]", "10.5", "11", "1,200.0"]
STUDY = pd.DataFrame({"Setting": [f"setting {i}" for i in range(12)], "Cost (G)": COSTS})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Suite]:
    """A checkout without data: records, tables, one figure and pages; that of the ablations is written here."""
    root = tmp_path_factory.mktemp("a site")
    axes = [{"path": "model.unet_depth", "values": [1, 2]}]
    study = {"kind": "one_at_a_time", "model": "sunet_tiny", "axes": axes}
    suite = make_suite(MODELS, SEEDS, ablations={"depth": study})
    fabricate(root, suite)
    records, out = load_records(suite, root), root / "results" / "toy"
    tables = _tables(suite, records)
    for table in tables:
        write(table, out / "tables")
    (out / "figures").mkdir()
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(out / "figures" / "accuracy.png")
    (out / "README.md").write_text(benchmark_page(suite, records, tables, {"accuracy": "figures/accuracy"}))
    write(Table("depth", "Ablation depth.", STUDY, STUDY), out / "ablations")
    shown = markdown(STUDY, "Ablation depth.")
    linked = "Trials. [Table of 12 rows](ablations/depth_trials.md), [CSV](ablations/depth_trials.csv)."
    (out / "ablations.md").write_text(f"# Ablations\n\n## depth\n\n- **A** finding\n\n{shown}\n{linked}\n")
    write(Table("depth_trials", "Trials of depth.", STUDY[:3], STUDY[:3]), out / "ablations")
    shutil.rmtree(root / "data")
    return root, suite


@pytest.fixture(scope="module")
def page(site: tuple[Path, Suite]) -> Path:
    return build_html(site[1], site[0])


class Elements(HTMLParser):
    """Every start tag, and the text of each script."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.scripts += [""] * (tag == "script")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


@pytest.mark.slow
def test_the_page_loads_nothing_and_a_label_is_text(page: Path) -> None:
    text, elements = page.read_text(), Elements(page)
    assert not [tag for tag, _ in elements.tags if tag in ("link", "iframe", "object", "base")]
    loads = [a["src"] for _, a in elements.tags if "src" in a]
    assert loads
    assert all(src.startswith("data:image/png;base64,") for src in loads)
    assert base64.b64decode(loads[0].partition(",")[2])[:4] == b"\x89PNG"
    assert all(a["href"].startswith(("https:", "#")) for tag, a in elements.tags if tag == "a")
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text
    assert len(elements.scripts) == 2
    assert "hit" not in elements.scripts[1]
    assert "&lt;script&gt;document.title" in text


def test_the_page_says_what_the_pages_say_in_order(page: Path) -> None:
    text = page.read_text()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert headings[:4] == ["Findings", "Claims", "Limits", "What was run"]
    assert headings[-3:] == ["Speed", "Ablations", "How it was made"]
    assert "<h3>depth</h3>" in text
    for caption in (
        "Accuracy on the test split.", "Speed, all models taken in turn within one run.", "Trials of depth.",
        "What the paper claims about SUNets, and what the records here say.",
    ):  # fmt: skip
        assert text.count(f'<p class="caption">{caption}</p>') == 1
    assert "<sub>" not in text
    assert "(figures/" not in text
    assert "CSV]" not in text
    assert "Table of 12 rows" not in text


def test_a_number_has_the_trace_of_its_runs(site: tuple[Path, Suite], page: Path) -> None:
    traces = json.loads(Elements(page).scripts[0])
    frame = pd.read_csv(site[0] / "results/toy/tables/accuracy.csv").set_index("model")
    (trace,) = [t for t in traces if "table accuracy, row sunet_tiny" in t and "score.miou.joint_ci95_low" in t]
    value, command = repr(float(frame["score.miou.mean"]["sunet_tiny"])), "python -m sunets evaluate sunet_tiny"
    for part in (value, "seed 0", "seed 2", "0123456789abcdef0123", "d1" * 8, "config hash", command,
                 "records/evaluate/sunet_tiny.json"):  # fmt: skip
        assert part in trace
    for table, row, column in (
        ("accuracy", "plain_conv_small", "score.miou.difference.mean"), ("cost", "unet_small", "cost.gmacs"),
        ("test_time", "sunet_tiny/multi_scale_flip", "score.miou.mean"), ("speed", "sunet_tiny", "speed.latency_ms"),
        ("per_class", "unet_small", "score.iou.disc_dark.mean"), ("training_time", "unet_small/2", "seconds"),
        ("accuracy", "plain_conv_small", "n_seeds"), ("accuracy", "plain_conv_small", "score.miou.difference.verdict"),
    ):  # fmt: skip
        assert [t for t in traces if f"table {table}, row {row}" in t and f"  {column} = " in t], (table, row, column)


def test_the_same_results_make_the_same_bytes(site: tuple[Path, Suite], page: Path) -> None:
    first = page.read_bytes()
    assert build_html(site[1], site[0]) == page
    assert page.read_bytes() == first


def test_without_a_report_the_error_names_the_remedy(site: tuple[Path, Suite], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"toy/README.md: no report yet; run `python -m sunets report`"):
        build_html(site[1], tmp_path)


def test_without_records_the_error_names_the_remedy(site: tuple[Path, Suite], tmp_path: Path) -> None:
    (tmp_path / "results/toy").mkdir(parents=True)
    (tmp_path / "results/toy/README.md").write_text("# Toy\n")
    with pytest.raises(RecordError, match=r"toy/records: no records; run `dvc repro` first"):
        build_html(site[1], tmp_path)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.slow
def test_in_a_browser_headings_sort_and_numbers_show_their_trace(page: Path, chromium: Page) -> None:
    chromium.open(page, 1440, 900)
    chromium.run("[...document.querySelectorAll('th')].find(h => h.textContent === 'Cost (G)').id = 'cost'")
    column = "[...document.querySelectorAll('table:has(#cost) tbody tr')].map(row => row.cells[1].textContent)"
    assert chromium.run(column) == COSTS
    for expected in ([*RISING, "", "diverged"], [*RISING[::-1], "", "diverged"], COSTS):
        chromium.click("#cost button")
        assert chromium.run(column) == expected
    chromium.run("document.querySelector('[data-trace]').id = 'number'")
    shown = "document.getElementById('trace').checkVisibility() && document.querySelector('#trace pre').textContent"
    assert chromium.run(shown) is False
    chromium.point("#number")
    assert "/records:" in chromium.run(shown)
    chromium.click("#number")
    chromium.point("h1")
    assert "git commit: 0123456789abcdef0123" in chromium.run(shown)
    chromium.click("h1")
    assert chromium.run(shown) is False
    assert chromium.run("document.title") == "Toy benchmark"
    assert not chromium.problems()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "phone"), [(390, True), (1440, False)])
def test_in_a_browser_the_page_is_not_wider_than_its_window(page, chromium, width, phone) -> None:
    chromium.open(page, width, 844, phone=phone)
    assert chromium.run("innerWidth") == width
    assert chromium.run("document.documentElement.scrollWidth") <= width
    if phone:  # tables are wider, each in its box
        assert chromium.run("Math.max(...[...document.querySelectorAll('.scroll')].map(b => b.scrollWidth))") > width
        chromium.run("document.querySelector('[data-trace]').id = 'number'")
        chromium.tap("#number")
        box = chromium.run("(({left, right, bottom}) => [left, right, bottom])(trace.getBoundingClientRect())")
        assert box == [0, width, 844]
    assert not chromium.problems()

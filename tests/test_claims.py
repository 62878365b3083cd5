"""What the paper claims, judged on records made up here: one for each verdict."""

from __future__ import annotations

from pathlib import Path

from test_report import record, write

from sunets.report.claims import read_results
from sunets.report.page import index_page


def test_a_benchmark_of_another_version_is_left_out_by_name(tmp_path: Path) -> None:
    rows = [record("evaluate", "sunet64", "S", seed=0, variant="single_scale", scores={"score.miou": 0.5})]
    write(tmp_path / "camvid/records/evaluate/sunet64.json", rows)
    write(tmp_path / "old/records/evaluate/sunet64.json", [{"kind": "evaluate"}])
    (tmp_path / "empty/records").mkdir(parents=True)
    read = read_results(tmp_path)
    assert set(read.benchmarks) == {"camvid"}
    assert set(read.unreadable) == {"old"}
    page = index_page(tmp_path)
    assert "Left out, since its records cannot be read: old (" in page
    assert "evaluate/sunet64.json: record 0 lacks status" in page

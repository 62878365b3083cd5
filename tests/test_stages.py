"""What the stages share: one at a time, and a guard against source that changes meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from sunets.core.paths import Layout
from sunets.core.stage import StageError, stage


def test_stage_runs_once_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sunets.core.stage.LOCK_SECONDS", 0.1)
    layout = Layout("smoke", tmp_path)
    with (
        stage("train@x", layout, "sunets.core.config"),
        pytest.raises(StageError, match="already running"),
        stage("train@x", layout, "sunets.core.config"),
    ):
        pass


def test_edited_source_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter(["before", "after"])
    monkeypatch.setattr("sunets.core.stage.code_hash", lambda *_: next(hashes))
    with (
        pytest.raises(StageError, match="source changed"),
        stage("train@x", Layout("smoke", tmp_path), "sunets.core.config"),
    ):
        pass

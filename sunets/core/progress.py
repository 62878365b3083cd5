"""The progress bar, and the scores beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(*, transient: bool = False) -> Progress:
    """Create a progress bar on standard error, disabled where that is no terminal.

    Args:
        transient: remove the bar at the end.

    Returns:
        A bar whose tasks have a text field `last`: the item completed last.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[last]}"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


def scores_text(row: Mapping[str, Any]) -> str:
    """Format the scores of an epoch or a trial, such as `val.miou 0.4123`; keys without a dot are no scores."""
    return ", ".join(f"{k} {v:.4f}" for k, v in row.items() if "." in k and v is not None)

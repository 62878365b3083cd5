"""The progress bar of everything that takes long."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(*, transient: bool = False) -> Progress:
    """Make a bar on standard error; disabled where that is no terminal, so that the caller prints lines or nothing.

    Args:
        transient: take the bar away at the end.

    Returns:
        A bar whose tasks have a field `last`, a text about what was done last.
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

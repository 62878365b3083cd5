"""Progress of a training on standard error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sunets.core.config import Config

Row = dict[str, Any]
"""One epoch: epoch, iteration, lr, train.loss, train.miou, val.loss, ...; what was not scored is absent."""


class Display:
    """Progress on standard error: a bar with ETA, loss and score on a terminal, a line per epoch elsewhere."""

    def __init__(self, config: Config, iterations: int, shown: bool) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not shown)
        self.name = f"{config.model.name} seed {config.seed}"
        self.epochs, self.iterations = config.train.epochs, iterations
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[scores]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self.task = self.bar.add_task(self.name, total=iterations, scores="")
        self.started: tuple[int, float] | None = None
        self.scored_at = -math.inf

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str | None) -> None:
        """A line of its own."""
        if text:
            self.console.print(text, markup=False)

    def step(self, iteration: int, loss: float, weight: float, score: Callable[[], str]) -> None:
        """One iteration is done; `loss` over `weight` is the epoch's mean so far."""
        now = time.monotonic()
        self.started = self.started or (iteration - 1, now)
        if self.bar.disable:
            return
        self.bar.update(self.task, completed=iteration)
        if now - self.scored_at > 1 and weight:  # a score makes a GPU wait
            self.scored_at = now
            self.bar.update(self.task, scores=f"loss {loss / weight:.4f} {score()}")

    def epoch(self, row: Row, restored: bool = False) -> None:
        """An epoch is done."""
        if restored or not self.bar.disable:
            self.bar.update(self.task, completed=row["iteration"])
            return
        scores = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if "." in k and v is not None)
        first, since = self.started or (0, time.monotonic())
        left = (self.iterations - row["iteration"]) * (time.monotonic() - since) / max(1, row["iteration"] - first)
        self.say(f"{self.name} epoch {row['epoch']}/{self.epochs}: {scores}, lr {row['lr']:.3g}, {left:.0f} s to go")

"""How many trainings choose a model's recipe.

The score of one seed does not tell apart recipes that lie within its noise.
"""

from __future__ import annotations

FINALISTS = 3
"""Recipes of a tuning that are trained on more seeds before one is chosen; the parameter file's is among them."""
TUNING_SEEDS = 3
"""Training seeds whose mean score chooses among the finalists; the first is that of all trials."""


def tuning_trainings(trials: int) -> int:
    """Return the number of trainings of one model's tuning: its trials, and its finalists on the other seeds."""
    finalists = min(FINALISTS, trials)
    return trials + (finalists * (TUNING_SEEDS - 1) if finalists > 1 else 0)

"""What DVC shows of a benchmark: the data of `dvc plots` and the numbers of `dvc metrics`.

DVC reads plain files and draws them with the templates in `.dvc/plots/`: column names are those of `dvc.yaml`, and the
same for every task.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from sunets.core.record import write_json, write_text
from sunets.report.images import confusion_shares
from sunets.report.records import Records, quantity


def write_summary(records: Records, out: Path) -> list[Path]:
    """Write `summary.json`, `plots/curves.csv` and, up to 30 classes, `plots/confusion.csv`; return their paths.

    A stale `plots/confusion.csv` is removed. `out` is results/<benchmark>.
    """
    write_json(out / "summary.json", summary(records))
    (out / "plots" / "confusion.csv").unlink(missing_ok=True)
    frames = {out / "plots" / "curves.csv": curves(records), out / "plots" / "confusion.csv": confusion(records)}
    made = {path: frame for path, frame in frames.items() if frame is not None}
    for path, frame in made.items():
        write_text(path, frame.to_csv(index=False, lineterminator="\n"))
    return [out / "summary.json", *made]


def summary(records: Records) -> dict[str, dict[str, float]]:
    """Map the label of each model to its mean headline score (%), parameters (M) and multiply-adds (G), where known."""
    q, cost = quantity(records.headline), records.cost.set_index("model")
    score = f"{records.headline.removeprefix('score.').removesuffix('_percent')}_percent"
    shown = {}
    for model, label in records.labels.items():
        numbers = {name: cost[f"cost.{name}"][model] for name in ("params_m", "gmacs")}
        if by_seed := records.scores(model):
            numbers[score] = q.scale * np.mean([*by_seed.values()])
        shown[label] = {name: float(value) for name, value in numbers.items() if pd.notna(value)}
    return shown


def curves(records: Records) -> pd.DataFrame:
    """Return one row per model and epoch: model (its label), epoch, train_loss, validation_score (in percent).

    Both are means over the seeds that have a value, so that a model is one line; empty where there is none.
    """
    q = quantity(records.headline)
    history = records.history.reindex(columns=["label", "epoch", "train.loss", records.validation])
    history.columns = pd.Index(["model", "epoch", "train_loss", "validation_score"])
    history = history.astype({"train_loss": float, "validation_score": float})
    history["validation_score"] *= q.scale
    means = history.groupby(["model", "epoch"], sort=False).mean().reset_index()
    order = {label: number for number, label in enumerate(records.labels.values())}
    return means.sort_values(["model", "epoch"], key=lambda c: c.map(order) if c.name == "model" else c)


def confusion(records: Records) -> pd.DataFrame | None:
    """Return one row per model and pair of classes: model, true, predicted, percent of the true class; or None.

    Over all seeds, as in the figure.
    """
    shares, names = confusion_shares(records)
    if not shares:
        return None
    index = pd.MultiIndex.from_product([shares, names, names], names=["model", "true", "predicted"])
    return pd.DataFrame(
        {"percent": np.concatenate([percent.ravel() for percent in shares.values()])}, index
    ).reset_index()

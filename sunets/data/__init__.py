"""Data sets: `prepare` checks and describes one, `make_dataset` and `train_batches` feed it to a network."""

from sunets.data.loading import eval_batches, iterations_per_epoch, make_dataset, train_batches
from sunets.data.manifest import Item, Manifest, load_manifest
from sunets.data.picture import DataError
from sunets.data.preparation import download, prepare

__all__ = [
    "DataError",
    "Item",
    "Manifest",
    "download",
    "eval_batches",
    "iterations_per_epoch",
    "load_manifest",
    "make_dataset",
    "prepare",
    "train_batches",
]

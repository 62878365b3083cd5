"""Data sets: `prepare` checks and describes one, `make_dataset` and `train_batches` feed it to a network."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_MODULES = {
    "loading": ("eval_batches", "iterations_per_epoch", "make_dataset", "train_batches"),
    "manifest": ("Item", "Manifest", "load_manifest"),
    "picture": ("DataError",),
    "preparation": ("download", "prepare"),
}


def __getattr__(name: str) -> Any:
    # Imported on demand, so that a report reads a manifest without torch. Modules of the package import from the
    # submodules, so that `code_hash` covers them.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"sunets.data.{module}"), name)
    raise AttributeError(f"module 'sunets.data' has no attribute {name!r}")

"""Stacked U-Nets (SUNets) and their baselines: training, evaluation and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sunets.core.version import __version__ as __version__

if TYPE_CHECKING:
    from sunets.models.zoo import create_model, list_models

__all__ = ["create_model", "list_models"]


def __getattr__(name: str) -> Any:
    # Lazy: the report and the configuration need no torch.
    if name in __all__:
        from sunets.models import zoo

        return getattr(zoo, name)
    raise AttributeError(f"module 'sunets' has no attribute {name!r}")

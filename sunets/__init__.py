"""Stacked U-Nets (SUNets): the network, the baselines that it is compared with, and what each of them costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sunets.models.zoo import create_model, list_models

__all__ = ["create_model", "list_models"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the report and the configuration need no torch.
    if name in __all__:
        from sunets.models import zoo

        return getattr(zoo, name)
    raise AttributeError(f"module 'sunets' has no attribute {name!r}")

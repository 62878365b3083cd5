"""Stacked U-Nets and the networks they are compared with: build, train, score, cost and ablate them."""

from sunets.zoo import create_model, list_models

__all__ = ["create_model", "list_models"]

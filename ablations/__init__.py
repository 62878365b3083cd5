"""Ablation studies of the networks of `sunets`: which part of a Stacked U-Net matters."""

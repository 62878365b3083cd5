"""How figures look, and the one writer of .png and .pdf; the benchmark's and the ablations' figures share it.

A model has one colour, marker and line in every figure, given by its place in `params.yaml`. Colours are Okabe and
Ito's (2008), which colour-blind readers can tell apart, and no figure relies on colour alone. Sizes are those of a
printed page: 7 inches are a text width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a report is made without a screen

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sunets.core.record import replacing

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#8B5A2B")
"""Okabe and Ito's colours without yellow, which white paper swallows, and with grey and brown for more models."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))

WIDTH = 7.0
"""Inches of a full text width."""

STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same bytes on every machine
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.7,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.dpi": 200,  # as saved, so that measured text is as wide as drawn text
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.05,
    "figure.constrained_layout.h_pad": 0.05,
}


@dataclass(frozen=True)
class Style:
    """How one model looks everywhere."""

    color: str
    marker: str
    line: Any


def model_styles(keys: Iterable[str]) -> dict[str, Style]:
    """A look for each key by its position; colour and marker together tell up to 64 apart."""
    n = len(PALETTE)
    return {
        key: Style(PALETTE[i % n], MARKERS[(i + i // n) % len(MARKERS)], LINES[(i // n) % len(LINES)])
        for i, key in enumerate(keys)
    }


def save_figure(fig: Figure, path_stem: Path) -> list[Path]:
    """Write a figure as `<stem>.png` and `<stem>.pdf`, the same bytes for the same input, and close it."""
    return save_files(fig, *(path_stem.with_name(path_stem.name + suffix) for suffix in _METADATA))


_METADATA: dict[str, Any] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}
"""Suffix -> what is left out of such a file, so that it has the same bytes each time."""


def save_files(fig: Figure, *paths: Path) -> list[Path]:
    """Write a figure to files whose suffix, .png or .pdf, tells the format, and close it."""
    if fig.get_layout_engine() is not None:  # once, for all files
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
    with plt.rc_context({k: STYLE[k] for k in ("savefig.dpi", "pdf.fonttype")}):
        for path in paths:
            with replacing(path) as temporary:
                fig.savefig(temporary, metadata=_METADATA[path.suffix.lower()])
    plt.close(fig)
    return list(paths)

"""Style of all figures, and their writer.

A model keeps its colour, marker and line in all figures of a benchmark, by its position in `params.yaml`; the four
small networks keep theirs in all benchmarks. Colours are those of Okabe and Ito (2008), which colour-blind readers can
tell apart; no figure relies on colour alone. Figures are as wide as the text of a printed page, 7 inches.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: no display is needed

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sunets.core.record import replacing

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#8B5A2B")
"""Colours of Okabe and Ito without yellow, which is too pale on white, and with grey and brown."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_POSITIONS = {"sunet_tiny": 0, "unet_small": 1, "dilated_resnet_small": 2, "plain_conv_small": 3}
"""Models that several presets compare -> position among the styles."""
LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))

WIDTH = 7.0
"""Inches of a full text width."""

STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same bytes on every machine
    "text.parse_math": False,  # a $ in the name of a model or class is a dollar
    "figure.max_open_warning": 0,  # a page draws all of its figures before it writes any
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
    "figure.dpi": 200,  # as saved, so that text has the measured width
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.05,
    "figure.constrained_layout.h_pad": 0.05,
}


@dataclass(frozen=True)
class Style:
    """Look of one model in every figure."""

    color: str
    marker: str
    line: Any


def model_styles(keys: Iterable[str]) -> dict[str, Style]:
    """Assign a style to each key; colour and marker distinguish up to 64 models."""
    keys = list(keys)
    fixed = {key: position for key, position in _POSITIONS.items() if key in keys}
    free = (position for position in itertools.count() if position not in fixed.values())
    n = len(PALETTE)
    return {
        key: Style(PALETTE[i % n], MARKERS[(i + i // n) % len(MARKERS)], LINES[(i // n) % len(LINES)])
        for key in keys
        for i in [fixed[key] if key in fixed else next(free)]
    }


def legend_columns(labels: Sequence[str], width: float = WIDTH) -> int:
    """Return the number of columns of a legend, equally filled, that fit a figure of this width in inches.

    A line has about 16 characters per inch; marker and gap take 7.
    """
    most = max(1, min(4, len(labels), int(16 * width) // (max(map(len, labels)) + 7)))
    return math.ceil(len(labels) / math.ceil(len(labels) / most))


def save_figure(fig: Figure, path_stem: Path) -> list[Path]:
    """Write a figure as `<stem>.png` and `<stem>.pdf`, reproducible to the byte, and close it."""
    return save_files(fig, *(path_stem.with_name(path_stem.name + suffix) for suffix in _METADATA))


_METADATA: dict[str, Any] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}
"""Suffix -> metadata that is left out, so that equal figures are equal files."""


def save_files(fig: Figure, *paths: Path) -> list[Path]:
    """Write a figure to .png or .pdf files, and close it."""
    # The files have no date, and matplotlib fails on one that is not a number.
    os.environ.pop("SOURCE_DATE_EPOCH", None)
    if fig.get_layout_engine() is not None:  # once, for all files
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
    with plt.rc_context({k: STYLE[k] for k in ("savefig.dpi", "pdf.fonttype")}):
        for path in paths:
            with replacing(path) as temporary:
                fig.savefig(temporary, metadata=_METADATA[path.suffix.lower()])
    plt.close(fig)
    return list(paths)

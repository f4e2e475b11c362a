"""What the pictures share: their registry, style, and where numbers come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from cnmix import kernels
from cnmix.fixed_point import FixedPoint

ROOT = Path(__file__).resolve().parents[2]
FIGURES: dict[str, Callable[[], Figure]] = {}
"""The pictures, by the names of their files."""

# Okabe and Ito's colours, which differ for all eyes; widths differ in lightness as well.
BLUE, ORANGE, GREY, BLACK = "#0072b2", "#d55e00", "#8c8c8c", "#222222"
WIDTHS = {8: "#9ecae1", 16: "#3182bd", 31: "#08306b"}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "cnmix",  # the same file from the same numbers
    "figure.constrained_layout.use": True,
}


def picture(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Enters a function into the pictures under its own name."""
    FIGURES[draw.__name__] = draw
    return draw


def canvas(width: float, height: float, columns: int = 1, rows: int = 1, **keywords: Any) -> tuple[Figure, Any]:
    """Returns a figure of this size in inches and its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **keywords)


def fitted(x: Tensor, bits: int) -> FixedPoint:
    """Quantizes a tensor at the position that fits it."""
    return kernels.quantize_measured(x, bits, None)[0]


def result(name: str) -> dict[str, Any]:
    """Reads a result file of the benchmarks."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())

"""Figures of a report: one look for all of them, curves, shares and times."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from .records import PARTS, Training
from .views import MacShares, cost_order, is_logarithmic, mac_shares, mean_parts, thinned

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'a report needs {error.name}: pip install "cnmix[inspect]"', name=error.name) from None

# Shades in the order of their lightness, which a printer without colours keeps.
SHADES = ("#e9eff5", "#b7cade", "#7d9fc0", "#44698f", "#17293f")
INK, QUIET, ALARM = "#1f2a36", "#66717d", "#b3470b"
WIDTH = 10.4
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_STYLES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
_BASELINE = ", float32"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#a5adb6",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # their letters are equally wide
    "font.size": 8.5,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "cnmix",
    "text.color": INK,
    "text.parse_math": False,  # names of modules may have a $
    "xtick.color": QUIET,
    "xtick.labelsize": 8,
    "ytick.color": QUIET,
    "ytick.labelsize": 8,
}
F = TypeVar("F", bound=Callable[..., Figure])


def styled(draw: F) -> F:
    """Gives what a function draws the look of the report."""

    @wraps(draw)
    def within(*arguments: Any, **options: Any) -> Figure:
        with rc_context(_STYLE):
            return draw(*arguments, **options)

    return within  # type: ignore[return-value]


def to_data_uri(figure: Figure) -> str:
    """Returns a figure as an SVG that a page can have in itself."""
    buffer = io.BytesIO()
    _save(figure, buffer, format="svg", dpi=192, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def save_png(figure: Figure, file: Path, title: str) -> None:
    """Writes a figure as a PNG, 150 dots per inch, with a title, since there is no page around it."""
    for legend in figure.legends:
        legend.set_title(title, prop=FontProperties(weight="bold", size=10))
        legend.set_alignment("left")
    _save(figure, file, format="png", dpi=150)


def _save(figure: Figure, target: Any, **options: Any) -> None:
    with rc_context(_STYLE), warnings.catch_warnings():
        # Names of modules may have any letters; a browser finds those of an SVG in other fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(target, **options)


@styled
def curves_figure(named: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], held: bool = False) -> Figure:
    """Draws metrics over the steps.

    Args:
        named: by metric the curves of the trainings, by their labels; that of a float baseline ends in ", float32".
        held: whether values hold up to the next one, with the steps on the axis that maps have.
    """
    columns = min(len(named), 3)
    rows = -(-len(named) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * rows + 0.35))
    grid = figure.subplots(rows, columns, squeeze=False)
    named = {metric: {label: points for label, points in curves.items() if points} for metric, curves in named.items()}
    handles: dict[str, Any] = {}
    labels = list(dict.fromkeys(label for curves in named.values() for label in curves))
    for axes, (metric, curves) in zip(grid.flat, named.items(), strict=False):
        for label, points in curves.items():
            few = len(points) <= 60
            x, y = zip(*thinned(points), strict=True)
            marked = len(points) == 1 if label.endswith(_BASELINE) else few and not held
            marker = _MARKERS[labels.index(label) % 7] if marked else ""
            line = axes.plot(
                x, y, marker=marker, drawstyle="steps-post" if held else "default", **_curve_look(labels, label)
            )
            handles.setdefault(label, line[0])
        axes.set_title(metric)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        every = [value for points in curves.values() for _, value in points if math.isfinite(value)]
        if not every:
            axes.text(0.5, 0.5, "NaN or infinity throughout", transform=axes.transAxes, ha="center", color=QUIET)
        if "loss" in metric and every and 0 < 10 * min(every) < max(every):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("optimizer step")
        steps = {step for points in curves.values() for step, _ in points}
        if held:
            step_axis(axes, 0, max(steps, default=0) + 1, is_logarithmic(0, max(steps, default=0)))
        elif len(steps) == 1:
            axes.set_xlim(0, 1.1 * max(*steps, 1))
    for axes in list(grid.flat)[len(named) :]:
        axes.set_visible(False)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=min(len(handles), 4), handlelength=3
    )
    return figure


def _curve_look(labels: list[str], label: str) -> dict[str, Any]:
    baseline = label.endswith(_BASELINE)
    alike = [each for each in labels if each.endswith(_BASELINE) == baseline]
    number = alike.index(label)
    look = {"linestyle": _STYLES[(number + number // 5) % 5]}  # tells them apart without colour
    if baseline:
        # Wide and pale behind the others, so that a curve that equals it can be seen on it.
        return look | {"color": "#cdd3d9", "linewidth": 5, "markersize": 7, "zorder": 1}
    return look | {"color": (SHADES[4], ALARM, SHADES[3], QUIET, SHADES[2])[number % 5], "markersize": 3}


@styled
def macs_figure(found: MacShares, last: int) -> Figure:
    """Draws the share of the multiply-accumulates by pair of widths; a sampled step stands for those up to the next."""
    figure = Figure(figsize=(WIDTH, 2.6))
    axes = figure.subplots()
    bottom = [0.0] * (len(found.steps) + 1)
    looks = pair_looks(list(found.shares))
    for pair, shares in found.shares.items():
        top = [low + share for low, share in zip(bottom, [*shares, shares[-1]], strict=True)]
        edges = [*found.steps, max(last + 1, found.steps[-1] + 1)]
        axes.fill_between(edges, bottom, top, step="post", linewidth=0, **looks[pair])
        axes.step(edges, top, where="post", color="white", linewidth=0.8)
        if shares[-1] >= 0.06:
            axes.annotate(
                f"{pair}: {100 * shares[-1]:.0f} %",
                (1, (bottom[-1] + top[-1]) / 2),
                xycoords=("axes fraction", "data"),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                annotation_clip=False,
            )
        bottom = top
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlim(found.steps[0], max(last + 1, found.steps[-1] + 1))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel("optimizer step")
    _legend(figure, looks)
    return figure


@styled
def times_figure(training: Training) -> Figure:
    """Draws where the time of sampled steps went, and how long the steps in between took."""
    figure = Figure(figsize=(WIDTH, 2.8))
    axes = figure.subplots()
    times = [each for each in training.times if each.parts]
    steps = [each.step for each in times]
    gaps = [b - a for a, b in pairwise(steps)]
    first, last = training.steps
    width = min([max(0.02 * (last - first), 0.62), *(0.62 * gap for gap in gaps)])
    bottom = [0.0] * len(times)
    looks = part_looks()
    for part in PARTS:
        heights = [1000 * each.parts.get(part, 0.0) for each in times]
        axes.bar(steps, heights, width, bottom, linewidth=0, label=part, **looks[part])
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for each in training.stretches:
        level = 1000 * each.seconds_per_step
        axes.plot([each.first, each.last], [level, level], color=ALARM, linewidth=1.6, solid_capstyle="butt")
    _cut_outliers(axes, steps, bottom)
    axes.set_xlim(first - width, last + width)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_ylabel("ms per step")
    axes.set_xlabel("optimizer step")
    between = [Line2D([], [], color=ALARM, linewidth=1.6, label="mean of the steps in between")]
    _legend(figure, looks, between if training.stretches else [])
    return figure


def _cut_outliers(axes: Axes, steps: Sequence[int], totals: Sequence[float]) -> None:
    """Cuts bars that would leave the others no height, as the first step's, and writes above them how tall they are."""
    limit = 2.5 * sorted(totals)[len(totals) // 2]
    if max(totals) <= limit:
        return
    axes.set_ylim(0, limit)
    for step, total in zip(steps, totals, strict=True):
        if total > limit:
            axes.annotate(f"↑ {total:.3g}", (step, limit), (0, 2), textcoords="offset points", ha="center", size=7.5)


@styled
def compared_macs_figure(trainings: Sequence[Training]) -> Figure:
    """Draws for each training the share of the multiply-accumulates by pair of widths, over all sampled steps."""
    counts = {each.label: mac_shares(each).counts for each in trainings}
    pairs = sorted({pair for found in counts.values() for pair in found}, key=cost_order)
    shares = {
        label: {pair: found.get(pair, 0) / (sum(found.values()) or 1) for pair in pairs}
        for label, found in counts.items()
    }
    figure, axes = _bars(shares, pair_looks(pairs), lambda share: f"{100 * share:.0f} %", 0.05)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("share of the multiply-accumulates")
    return figure


@styled
def compared_times_figure(trainings: Sequence[Training]) -> Figure:
    """Draws for each training where the time of a sampled step goes on average."""
    means = {each.label: {part: 1000 * t for part, t in mean_parts(each).items()} for each in trainings}
    widest = max((sum(parts.values()) for parts in means.values()), default=1)
    figure, axes = _bars(means, part_looks(), lambda value: f"{value:.3g}", 0.06 * widest)
    axes.set_xlabel("ms per sampled step")
    return figure


def _bars(
    values: Mapping[str, Mapping[str, float]],
    looks: Mapping[str, dict[str, Any]],
    write: Callable[[float], str],
    room: float,
) -> tuple[Figure, Axes]:
    """Draws a bar of parts for each label, with its number in each part that has the room."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.36 * len(values)))
    axes = figure.subplots()
    for row, parts in enumerate(values.values()):
        left = 0.0
        for name, value in parts.items():
            axes.barh(row, value, 0.66, left, edgecolor="white", linewidth=0.8, **_fill(looks[name]))
            if value >= room:
                dark = looks[name]["facecolor"] in SHADES[3:]
                axes.text(
                    left + value / 2,
                    row,
                    write(value),
                    ha="center",
                    va="center",
                    color="white" if dark else INK,
                    bbox={"facecolor": looks[name]["facecolor"], "edgecolor": "none", "pad": 1.2},
                )
            left += value
    axes.set_yticks(range(len(values)), list(values))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    _legend(figure, looks)
    return figure, axes


def pair_looks(pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns a fill for each pair of widths: the wider, the darker."""
    order = ("8×8", "8×16", "16×16", "8×31", "16×31", "31×31")
    shades = (SHADES[0], SHADES[1], SHADES[2], SHADES[2], SHADES[3], SHADES[4])
    hatches = ("", "", "", "////", "", "")
    looks = dict(zip(order, zip(shades, hatches, strict=True), strict=True))
    return {pair: _look(*looks.get(pair, (SHADES[4], "xxxx"))) for pair in pairs}


def part_looks() -> dict[str, dict[str, Any]]:
    """Returns a fill for each part of a step."""
    fills = ((SHADES[2], ""), (SHADES[1], ""), (SHADES[4], ""), (SHADES[0], ""))
    return {part: _look(*fill) for part, fill in zip(PARTS, fills, strict=True)}


def _look(shade: str, hatch: str) -> dict[str, Any]:
    return {"facecolor": shade, "hatch": hatch, "edgecolor": "#7d8a97" if hatch else shade}


def _fill(look: Mapping[str, Any]) -> dict[str, Any]:
    return {"facecolor": look["facecolor"], "hatch": look["hatch"], "hatchcolor": look["edgecolor"]}


def step_axis(axes: Axes, first: int, end: int, logarithmic: bool) -> None:
    """Gives a plot its axis of optimizer steps, from ``first`` up to and without ``end``."""
    axes.set_xlabel("optimizer step")
    if logarithmic:
        axes.set_xscale("symlog", linthresh=1, linscale=0.3)
        decades = [0, *(10**power for power in range(8) if 6 * 10**power < end), end - 1]
        axes.set_xticks(decades, [f"{step:,}" for step in decades])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(first, end)


def power(base: int, exponent: float) -> str:
    """Returns a power as text, 2⁻¹⁰."""
    return f"{base}{f'{exponent:.0f}'.translate(_RAISED)}"


def _legend(figure: Figure, looks: Mapping[str, dict[str, Any]], more: Sequence[Line2D] = ()) -> None:
    handles = [Patch(label=re.sub(r"(\d+)×(\d+)", r"int\1 × int\2", name), **look) for name, look in looks.items()]
    figure.legend(handles=[*handles, *more], loc="outside upper left", ncols=6, handlelength=1.6, columnspacing=1.4)

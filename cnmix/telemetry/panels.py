"""Figures of a report that show operands: maps of all of them, and panels of those that one should look at first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy import array, nan, ndarray

from ..config import OPERANDS
from .figures import ALARM, INK, QUIET, SHADES, WIDTH, power, step_axis, styled
from .numbers import write_widths
from .records import Operand
from .views import OperandMap, is_logarithmic, reasons, representable

_LONGEST_NAME, _WRITTEN_ROWS, _MANY_MARKS = 40, 30, 120
_MARKS = {"kept": ("o", 7), "widened": ("^", 34), "narrowed": ("v", 34), "over": ("X", 34)}


@styled
def map_figure(shown: OperandMap, nonfinite: Sequence[tuple[str, str, int]] = ()) -> Figure:
    """Draws a map: a panel for each of the three operands, a row for each module, dark where values are large.

    Args:
        shown: the map.
        nonfinite: module, operand and step of NaN or infinity, which are marked.
    """
    rows = max(len(shown.modules), 1)
    tall = 0.26 if rows <= 12 else 0.19 if rows <= 30 else 0.15 if rows <= 60 else 0.11
    figure = Figure(figsize=(WIDTH, 1.05 + tall * rows))
    present = [each for each in OPERANDS if any((module, each) in shown.cells for module in shown.modules)]
    grid = figure.subplots(1, len(present) or 1, sharey=True, squeeze=False)[0]
    count = len(shown.classes.labels)
    shades = SHADES if count == 5 else (SHADES[0], SHADES[2], SHADES[4])
    for axes, operand in zip(grid, present, strict=False):
        classes = _class_rows(shown, operand)
        axes.pcolormesh(
            shown.edges,
            range(rows + 1),
            array(classes),
            cmap=ListedColormap(shades),
            vmin=-0.5,
            vmax=count - 0.5,
            rasterized=True,
        )
        axes.hlines(
            range(1, rows), shown.edges[0], shown.edges[-1], color="white", linewidth=1.2 if rows <= 30 else 0.8
        )
        for module, name, step in nonfinite:
            if name == operand and module in shown.modules:
                axes.plot(step + 0.5, shown.modules.index(module) + 0.5, "X", color=ALARM, markersize=7, mec="white")
        axes.set_title(operand)
        step_axis(axes, shown.edges[0], shown.edges[-1], shown.logarithmic)
        _write_into(axes, shown, classes, len(present))
        axes.set_ylim(rows, 0)
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8 if rows <= 30 else 6.5 if rows <= 60 else 5.5)
        axes.spines[:].set_visible(False)
    grid[0].set_yticks([row + 0.5 for row in range(len(shown.modules))], [shorten(name) for name in shown.modules])
    handles: list[Any] = [
        Patch(facecolor=shade, edgecolor="#a5adb6", linewidth=0.5, label=label, hatch=_hatch(shown, number))
        for number, (shade, label) in enumerate(zip(shades, shown.classes.labels, strict=True))
    ]
    if nonfinite:
        handles.append(Line2D([], [], color=ALARM, marker="X", linestyle="", label="NaN or infinity"))
    figure.legend(handles=handles, loc="outside upper left", ncols=6, handlelength=1.6, columnspacing=1.4)
    return figure


def _class_rows(shown: OperandMap, operand: str) -> list[list[float]]:
    empty: list[float | None] = [None] * (len(shown.edges) - 1)
    rows = [shown.cells.get((module, operand), empty) for module in shown.modules] or [empty]
    return [[nan if value is None else shown.classes.of(value) for value in row] for row in rows]


def _write_into(axes: Axes, shown: OperandMap, classes: list[list[float]], panels: int) -> None:
    """Writes what a cell is into it where it has the room, and hatches what must not be missed."""
    to_axes = axes.transData + axes.transAxes.inverted()
    longest = max((len(shorten(name)) for name in shown.modules), default=0)
    panel = (WIDTH - 0.5 - 0.075 * longest) / panels  # inches, about
    darkest = len(shown.classes.labels) - (1 if len(shown.classes.labels) == 3 else 2)
    for row, cells in enumerate(classes):
        for start, end, number in _runs(cells):
            left, right = shown.edges[start], shown.edges[end]
            if hatch := _hatch(shown, number):
                axes.add_patch(
                    Rectangle((left, row), right - left, 1, fill=False, hatch=hatch, edgecolor="white", linewidth=0)
                )
            text = shown.classes.letters[number]
            place, behind = (to_axes.transform((x, row))[0] for x in (left, right))
            if len(classes) <= _WRITTEN_ROWS and (behind - place) * panel >= 0.08 + 0.063 * len(text):
                color = "white" if number >= darkest else INK
                where = axes.get_yaxis_transform()
                axes.text(place + 0.014, row + 0.52, text, color=color, va="center", size=7, transform=where)


def _hatch(shown: OperandMap, number: int) -> str:
    return "xxxx" if shown.classes.alarm and number == len(shown.classes.labels) - 1 else ""


def _runs(cells: Sequence[float]) -> Iterator[tuple[int, int, int]]:
    """Yields where equal neighbours start and end, and their class."""
    start = 0
    for end in range(1, len(cells) + 1):
        if end == len(cells) or cells[end] != cells[start]:
            if cells[start] == cells[start]:  # not nan
                yield start, end, int(cells[start])
            start = end


@styled
def errors_figure(operands: Sequence[Operand], first: int, last: int) -> Figure:
    """Draws QEM against the threshold, a panel for each operand: every decision, and below it why it measured."""
    columns = min(len(operands), 2)
    rows = -(-len(operands) // columns)
    why = reasons(operands)
    strip = 0.17 * len(why)
    figure = Figure(figsize=(WIDTH, (1.75 + strip) * rows + 0.6))
    grid = GridSpec(2 * rows, columns, figure, height_ratios=[1.3, strip] * rows)
    for number, operand in enumerate(operands):
        row, column = divmod(number, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=axes)
        _draw_errors(axes, operand)
        step_axis(axes, first, last + 1, is_logarithmic(first, last))
        axes.set_xlabel("")
        axes.set_xlim(first - (0.2 if is_logarithmic(first, last) else 0.01 * (last - first + 1)))
        for place, reason in enumerate(why):
            steps = [each.step for each in operand.decisions if each.reason == reason]
            many = len(steps) > _MANY_MARKS
            below.plot(steps, [place] * len(steps), "|", color=INK, markersize=5.5, mew=0.8, rasterized=many)
        below.set_ylim(len(why) - 0.4, -0.6)
        below.set_yticks(range(len(why)), why if column == 0 else [""] * len(why))
        below.tick_params(axis="y", length=0, labelsize=7)
        below.spines["left"].set_visible(False)
        axes.tick_params(axis="x", labelbottom=False, length=0)
        axes.spines["bottom"].set_visible(False)
        if row == rows - 1:
            below.set_xlabel("optimizer step")
    handles = [
        Line2D([], [], color=INK, marker=marker, markersize=size**0.5, linestyle="", label=outcome)
        for outcome, (marker, size) in _MARKS.items()
        if any(each.outcome == outcome for operand in operands for each in operand.decisions)
    ]
    handles += [
        Line2D([], [], color=QUIET, marker="o", mfc="white", markersize=3.5, linestyle="", label="tried, not taken"),
        Line2D([], [], color=ALARM, linestyle=(0, (4, 2)), linewidth=1.2, label="threshold"),
        Line2D([], [], color=INK, marker="|", linestyle="", label="why it measured"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=7, handlelength=1.8, columnspacing=1.4)
    return figure


def _draw_errors(axes: Axes, operand: Operand) -> None:
    """Draws the errors of each decision; one of 0 lies at the bottom, which a logarithmic axis has no place for."""
    positive = [error for each in operand.decisions for error in each.errors.values() if error]
    floor = max(min([*positive, operand.threshold]), operand.threshold * 1e-5) / 2
    for outcome, (marker, size) in _MARKS.items():
        chosen = [each for each in operand.decisions if each.outcome == outcome and each.error is not None]
        points = [(each.step, max(each.error or 0.0, floor)) for each in chosen]
        if points:
            x, y = zip(*points, strict=True)
            many = len(points) > _MANY_MARKS
            size = min(size, 12) if many else size
            axes.scatter(x, y, s=size, marker=marker, color=INK, linewidth=0, zorder=3, rasterized=many, label=outcome)
    taken = [(each.step, max(each.error, floor)) for each in operand.decisions if each.error is not None]
    if taken:
        axes.plot(*zip(*taken, strict=True), color="#b9c1c9", linewidth=0.7, zorder=1)
    tried = [
        (each.step, max(error, floor), max(floor, error if each.error is None else each.error))
        for each in operand.decisions
        for bits, error in each.errors.items()
        if bits != each.bits[1] and error is not None
    ]
    if tried:
        x, y, settled = zip(*tried, strict=True)
        many = len(tried) > _MANY_MARKS
        axes.plot(x, y, "o", color=QUIET, mfc="white", markersize=3.5, mew=0.8, zorder=2, rasterized=many)
        axes.vlines(x, settled, y, color=QUIET, linewidth=0.7, zorder=1, rasterized=many)
    axes.axhline(operand.threshold, color=ALARM, linestyle=(0, (4, 2)), linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylim(floor / 1.6, max([*positive, operand.threshold]) * 3)
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_major_formatter(lambda value, _: power(10, math.log10(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(f"{shorten(operand.name, 52)}: {write_widths(operand, with_steps=False)}")


@styled
def histograms_figure(operands: Sequence[Operand], first: int, last: int) -> Figure:
    """Draws the exponents of the values over the steps against what the format holds, and beside it the last sample."""
    columns = min(len(operands), 3)
    rows = -(-len(operands) // columns)
    figure = Figure(figsize=(WIDTH, 2.25 * rows + 0.4))
    grid = GridSpec(rows, 2 * columns, figure, width_ratios=[3.4, 1] * columns)
    for number, operand in enumerate(operands):
        row, column = divmod(number, columns)
        axes = figure.add_subplot(grid[row, 2 * column])
        beside = figure.add_subplot(grid[row, 2 * column + 1], sharey=axes)
        _draw_exponents(axes, beside, operand, last)
        axes.set_xlim(first, last + 1)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if column == 0:
            axes.set_ylabel("|x|")
        if row == rows - 1:
            axes.set_xlabel("optimizer step")
            beside.set_xlabel("last")
    handles = [
        Patch(facecolor=SHADES[3], label="values, darker where there are more"),
        Line2D([], [], color=ALARM, label="largest value that the format holds"),
        Line2D([], [], color=ALARM, linestyle=(0, (2, 1.5)), label="half its step: values below become 0"),
        Patch(facecolor="#f6e6dc", edgecolor=ALARM, hatch="/////", label="out of the range"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=2, columnspacing=1.4)
    return figure


def _draw_exponents(axes: Axes, beside: Axes, operand: Operand, last: int) -> None:
    samples = [each for each in operand.samples if each.histogram is not None and each.histogram.nonzero]
    axes.set_title(shorten(operand.name, 44))
    beside.set_xticks([])
    beside.tick_params(axis="y", labelleft=False, length=0)
    beside.spines["bottom"].set_visible(False)
    if not samples:
        axes.text(0.5, 0.5, "only zeros", transform=axes.transAxes, ha="center", color=QUIET)
        return
    shares, low, high = exponent_shares(operand)
    steps = [each.step for each in samples]
    edges = [*steps, max(last, steps[-1]) + 1]
    axes.pcolormesh(
        edges,
        range(low, high + 2),
        shares,
        cmap=LinearSegmentedColormap.from_list("values", ["white", *SHADES[1:]]),
        vmin=0,
        rasterized=True,
    )
    limits = [representable(each) or (nan, nan) for each in samples]
    for side, style in ((1, "-"), (0, (0, (2, 1.5)))):
        line = [each[side] for each in limits]
        axes.step(edges, [*line, line[-1]], where="post", color=ALARM, linewidth=1.3, linestyle=style)
    column = shares[:, -1]
    bottom, top = limits[-1]
    inside = [bottom <= exponent < top for exponent in range(low, high + 1)]
    for exponent, share, held in zip(range(low, high + 1), column, inside, strict=True):
        look: dict[str, Any] = {"facecolor": SHADES[3], "edgecolor": SHADES[3], "linewidth": 0}
        if not held:
            look = {
                "facecolor": "#f6e6dc",
                "edgecolor": ALARM,
                "linewidth": 0.6,
                "hatch": "" if len(inside) > 40 else "/////",
            }
        beside.barh(exponent + 0.5, share, 0.85, **look)
    beside.axhline(top, color=ALARM, linewidth=1.3)
    beside.axhline(bottom, color=ALARM, linewidth=1.3, linestyle=(0, (2, 1.5)))
    for each in (axes, beside):
        each.grid(visible=False)
    known = [limit for each in limits for limit in each if not math.isnan(limit)]
    axes.set_ylim(min([low, *known]) - 1, max([high + 1, *known]) + 1)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda exponent, _: power(2, exponent))


def exponent_shares(operand: Operand) -> tuple[ndarray, int, int]:
    """Returns the share of the sampled values with each exponent.

    Returns:
        A row for each exponent and a column for each sample with values other than zero; the lowest and the highest
        exponent.
    """
    found = [each.histogram for each in operand.samples if each.histogram is not None and each.histogram.nonzero]
    low = min(each.first for each in found)
    high = max(each.first + len(each.counts) - 1 for each in found)
    shares = [
        [0.0] * (each.first - low)
        + [count / each.total for count in each.counts]
        + [0.0] * (high + 1 - each.first - len(each.counts))
        for each in found
    ]
    return array(shares).T, low, high


def shorten(name: str, longest: int = _LONGEST_NAME) -> str:
    """Returns a name that fits, without its middle where it is too long: both ends tell modules apart."""
    if len(name) <= longest:
        return name
    start = (longest - 1) * 2 // 5
    return f"{name[:start]}…{name[start + 1 - longest :]}"

"""What the figures of a report show, as plain data made of what was logged."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config import OPERANDS
from .records import PARTS, LoggedDecision, Operand, Sample, Training

# What fits on a page and can still be read.
_MOST_COLUMNS, _MANY_ROWS, _FEWEST_ROWS, _MOST_POINTS = 120, 30, 8, 400


@dataclass(frozen=True)
class Classes:
    """Classes of values, each shown in a shade of its own.

    Attributes:
        labels: of the classes, from the lightest to the darkest.
        bounds: the smallest value of each class but the first.
        letters: short names, written into the cells where they have room.
        alarm: whether the last class is hatched.
    """

    labels: tuple[str, ...]
    bounds: tuple[float, ...]
    letters: tuple[str, ...]
    alarm: bool = False

    def of(self, value: float) -> int:
        """Returns the class that a value is in."""
        return sum(value >= bound for bound in self.bounds)


WIDTHS = Classes(("int8", "int16", "int31"), (9, 17), ("8", "16", "31"))
INTERVALS = Classes(
    ("1 step", "2 to 9", "10 to 99", "100 to 999", "1000 and more"),
    (2, 10, 100, 1000),
    ("1", "2+", "10+", "100+", "1000+"),
)
ERRORS = Classes(
    ("under 1 % of the threshold", "1 to 10 %", "10 to 50 %", "50 to 100 %", "over the threshold"),
    (0.01, 0.1, 0.5, math.nextafter(1, 2)),
    ("<1 %", "1+ %", "10+ %", "50+ %", "over"),
    alarm=True,
)
SHARES = Classes(
    ("none", "under 0.1 %", "0.1 to 1 %", "1 to 10 %", "10 % and more"),
    (math.nextafter(0, 1), 0.001, 0.01, 0.1),
    ("0", "<0.1 %", "0.1+ %", "1+ %", "10+ %"),
)


@dataclass(frozen=True)
class OperandMap:
    """A value of every operand over the steps.

    Attributes:
        classes: what the values are sorted into.
        edges: the step that each column starts with, and behind the last one the step that it ends before.
        logarithmic: whether the steps are on a logarithmic axis.
        modules: the rows, in the order of the training.
        cells: by module and operand, the value in each column; None where nothing was known yet.
        alike: modules that are left out since all their cells are of the class that the label names.
        alike_label: that class.
        left_out: further modules that had no room, the least interesting ones.
    """

    classes: Classes
    edges: list[int]
    logarithmic: bool
    modules: list[str]
    cells: dict[tuple[str, str], list[float | None]]
    alike: int
    alike_label: str
    left_out: int


def width_map(training: Training) -> OperandMap:
    """Returns the widest width that each operand had in each column."""
    return _decision_map(training, WIDTHS, lambda operand, decision: decision.bits[1], max, most_rows=120)


def mean_widths(training: Training) -> list[tuple[int, float]]:
    """Returns the mean width of the operands, at the end of each column of a map and at the last step."""
    edges = column_edges(*training.steps)
    sums = [0.0] * (len(edges) - 1)
    for operand in training.operands:
        widths = [operand.bits] * len(sums)
        for decision in operand.decisions:
            column = _column(edges, decision.step)
            widths[column:] = [decision.bits[1]] * (len(widths) - column)
        sums = [total + width for total, width in zip(sums, widths, strict=True)]
    count = len(training.operands)
    return [(end - 1, total / count) for end, total in zip(edges[1:], sums, strict=True)] if count else []


def interval_map(training: Training) -> OperandMap:
    """Returns the interval that was set last."""
    return _decision_map(training, INTERVALS, lambda operand, decision: decision.interval, lambda values: values[-1])


def error_map(training: Training) -> OperandMap:
    """Returns the largest error that a decision in each column settled for, as a multiple of the threshold."""

    def ratio(operand: Operand, decision: LoggedDecision) -> float | None:
        return None if decision.error is None else decision.error / operand.threshold

    return _decision_map(training, ERRORS, ratio, max)


def share_map(training: Training, statistic: str) -> OperandMap:
    """Returns the share of values that ``saturation`` or ``underflow`` took on the sampled steps, at its largest."""
    steps = sorted({each.step for operand in training.operands for each in operand.samples})
    every = math.ceil(len(steps) / _MOST_COLUMNS)
    last = training.steps[1] + 1
    starts = steps[:: max(every, 1)]
    edges = [*starts, max(last, starts[-1] + 1)] if starts else [0, 1]
    cells = {}
    for operand in training.operands:
        row: list[float | None] = [None] * (len(edges) - 1)
        for sample in operand.samples:
            value, column = getattr(sample, statistic), _column(edges, sample.step)
            if value is not None:
                row[column] = max(row[column] or 0.0, value)
        cells[operand.module, operand.operand] = row
    return _with_room(training, SHARES, edges, False, cells)


def _decision_map(
    training: Training,
    classes: Classes,
    value_of: Callable[[Operand, LoggedDecision], float | None],
    combine: Callable[[list[float]], float],
    most_rows: int = 40,
) -> OperandMap:
    """Returns a map of what decisions set, which holds until the next one."""
    edges = column_edges(*training.steps)
    cells = {}
    for operand in training.operands:
        found: list[list[float]] = [[] for _ in edges[1:]]
        for decision in operand.decisions:
            value = value_of(operand, decision)
            if value is not None:
                found[_column(edges, decision.step)].append(value)
        row: list[float | None] = []
        present: float | None = None
        for values in found:
            row.append(combine(values) if values else present)
            present = values[-1] if values else present
        cells[operand.module, operand.operand] = row
    return _with_room(training, classes, edges, is_logarithmic(*training.steps), cells, most_rows)


def column_edges(first: int, last: int) -> list[int]:
    """Returns the steps that columns start with, and where the last one ends.

    Most is decided early: in a long training from its beginning on, columns are equally wide on a logarithmic axis.
    """
    end = last + 1
    if not is_logarithmic(first, last):
        return [*range(first, end, math.ceil((end - first) / _MOST_COLUMNS)), end]
    growth = math.log(end + 1) / _MOST_COLUMNS
    starts = {round(math.exp(growth * number)) - 1 for number in range(_MOST_COLUMNS)}
    return sorted({first, end, *(step for step in starts if first < step < end)})


def is_logarithmic(first: int, last: int) -> bool:
    """Returns whether steps are shown on a logarithmic axis."""
    return first < 10 and last >= 100


def _column(edges: Sequence[int], step: int) -> int:
    return min(max(bisect_left(edges, step + 1) - 1, 0), len(edges) - 2)


def _with_room(
    training: Training,
    classes: Classes,
    edges: list[int],
    logarithmic: bool,
    cells: dict[tuple[str, str], list[float | None]],
    most_rows: int = 40,
) -> OperandMap:
    """Leaves out the modules that a large model has too many of: first those in which nothing happens."""
    modules = list(dict.fromkeys(operand.module for operand in training.operands))
    present = {module: [cells[module, each] for each in OPERANDS if (module, each) in cells] for module in modules}
    alike: set[str] = set()
    if len(modules) > _MANY_ROWS:
        quiet = {
            module
            for module, rows in present.items()
            if {classes.of(value) for row in rows for value in row if value is not None} <= {0}
        }
        ranked = list(dict.fromkeys(each.module for each in training.most_interesting(len(training.operands))))
        busy = [module for module in ranked if module not in quiet]
        kept = set((busy + [module for module in ranked if module in quiet])[: max(len(busy), _FEWEST_ROWS)])
        alike = set(modules) - kept
        kept = set([module for module in ranked if module in kept][:most_rows])
        rows = [module for module in modules if module in kept]
    else:
        rows = modules
    left_out = len(modules) - len(rows) - len(alike)
    return OperandMap(classes, edges, logarithmic, rows, cells, len(alike), classes.labels[0], left_out)


@dataclass(frozen=True)
class MacShares:
    """Multiply-accumulates by pair of widths: on each sampled step, and all together."""

    steps: list[int]
    shares: dict[str, list[float]]
    counts: dict[str, int]


def mac_shares(training: Training) -> MacShares:
    """Returns what share of the multiply-accumulates had which pair of widths, the cheapest pair first."""
    times = [each for each in training.times if sum(each.macs.values())]
    pairs = sorted({pair for each in times for pair in each.macs}, key=cost_order)
    shares = {pair: [each.macs.get(pair, 0) / sum(each.macs.values()) for each in times] for pair in pairs}
    counts = {pair: sum(each.macs.get(pair, 0) for each in times) for pair in pairs}
    return MacShares([each.step for each in times], shares, counts)


def cost_order(pair: str) -> tuple[int, int]:
    """Orders pairs of widths by what a product of them costs."""
    narrow, wide = map(int, pair.split("×"))
    return wide, narrow


def mean_parts(training: Training) -> dict[str, float]:
    """Returns the mean seconds of each part of a sampled step; empty where none was timed."""
    times = [each for each in training.times if each.parts]
    return {part: sum(each.parts.get(part, 0.0) for each in times) / len(times) for part in PARTS} if times else {}


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Returns the points of a curve, or where they are too many the means of as many neighbours as it takes."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in each) / len(each), sum(y for _, y in each) / len(each)) for each in groups]


@dataclass(frozen=True)
class Episode:
    """Decisions one after the other with the same reason, outcome and widths."""

    reason: str
    outcome: str
    bits: tuple[int, int]
    decisions: list[LoggedDecision]


def episodes(decisions: Iterable[LoggedDecision]) -> list[Episode]:
    """Returns the decisions of an operand, those together that came out the same."""
    found: list[Episode] = []
    for each in decisions:
        alike = (each.reason, each.outcome, each.bits)
        if found and (found[-1].reason, found[-1].outcome, found[-1].bits) == alike:
            found[-1].decisions.append(each)
        else:
            found.append(Episode(*alike, [each]))
    return found


def reasons(operands: Iterable[Operand]) -> list[str]:
    """Returns the reasons for measuring that occur, in the order in which training met them."""
    first: dict[str, int] = {}
    for operand in operands:
        for each in operand.decisions:
            first[each.reason] = min(first.get(each.reason, each.step), each.step)
    return sorted(first, key=lambda reason: first[reason])


def representable(sample: Sample) -> tuple[int, int] | None:
    """Returns between which exponents a format holds values: below the first they become 0, from the second saturate.

    Half a step, 2^(position − 1), is what rounding decides about; 2^(position + bits − 1) has no integer any more.
    """
    return None if sample.position is None else (sample.position - 1, sample.position + sample.bits - 1)


def final_values(curves: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, float]:
    """Returns the last value of each metric."""
    return {name: points[-1][1] for name, points in curves.items() if points}

"""The numbers behind the figures of a report, as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .records import PARTS, Operand, Training
from .views import cost_order, episodes, final_values, mac_shares, mean_parts, representable, thinned

_MOST_ROWS, _MOST_EPISODES, _MOST_WIDTHS = 1000, 40, 4


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        headings: of the columns.
        rows: the cells.
        note: what is said below it.
        texts: the columns, from the left, that hold names and not numbers.
        title: what a table without a figure is called.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    texts: int = 1
    title: str = ""


def write_number(value: float | None) -> str:
    """Returns a number in four digits, "–" for none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinity"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.3e}" if abs(value) < 1e-3 else f"{value:.4g}"


def write_end(value: float | None, float32: float | None) -> str:
    """Returns how a metric ended, and in brackets its difference from float32 where both are known."""
    if value is None or float32 is None or not math.isfinite(value - float32):
        return write_number(value)
    difference = f"{value - float32:+.2g}".replace("-", "−").replace("e−", "e-")
    return f"{write_number(value)} ({difference})"


def write_share(value: float | None) -> str:
    """Returns a share in percent."""
    if value is None:
        return "–"
    percent = 100 * value
    if percent in (0, 100) or percent >= 1000:
        return f"{percent:,.0f} %"
    return f"{percent:.3g} %" if percent >= 1e-3 else f"{percent:.1e} %"


def write_widths(operand: Operand, with_steps: bool = True) -> str:
    """Returns the widths that an operand had, and at which step each began; of many the first ones and the last."""
    first, changes = operand.decisions[0].bits[0] if operand.decisions else operand.bits, operand.changes
    widths = [f"int{each.bits[1]}" + f" at {each.step:,}" * with_steps for each in changes]
    if len(widths) > _MOST_WIDTHS:
        widths[_MOST_WIDTHS - 1 : -1] = [f"{len(widths) - _MOST_WIDTHS:,} more"]
    return " → ".join([f"int{first}", *widths])


def curves_table(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Table:
    """Returns the points of the curves, by step, with a column for each metric and training."""
    columns = [(metric, label) for metric, named in curves.items() for label in named]
    points = {(metric, label): dict(thinned(curves[metric][label])) for metric, label in columns}
    steps = sorted({step for found in points.values() for step in found})
    rows = [[f"{step:,.0f}", *(write_number(points[each].get(step)) for each in columns)] for step in steps]
    one = len({label for _, label in columns}) == 1
    return Table(["step", *(metric if one else f"{metric}, {label}" for metric, label in columns)], rows, texts=0)


def widths_table(operands: Sequence[Operand]) -> Table:
    """Returns how the width of each operand went."""
    rows = [
        [each.module, each.operand, each.product, f"int{each.max_bitwidth}", f"int{each.last_bits}", write_widths(each)]
        for each in operands
    ]
    return _bounded(Table(["module", "operand", "product", "at most", "at the end", "width from step"], rows, texts=6))


def intervals_table(operands: Sequence[Operand]) -> Table:
    """Returns how often each operand was measured, and why."""
    rows = []
    for each in operands:
        intervals = [decision.interval for decision in each.decisions]
        rows.append(
            [
                each.module,
                each.operand,
                f"{len(intervals):,}",
                *(f"{pick(intervals):,}" if intervals else "–" for pick in (min, max, lambda found: found[-1])),
                _counted(decision.reason for decision in each.decisions),
                _counted(decision.interval_reason for decision in each.decisions),
            ]
        )
    headings = ["module", "operand", "updates", "shortest", "longest", "last", "why it measured", "interval set by"]
    return _bounded(Table(headings, rows, texts=2))


def errors_table(operands: Sequence[Operand]) -> Table:
    """Returns the error of each operand beside its threshold."""
    rows = []
    for each in operands:
        errors = [decision.error for decision in each.decisions if decision.error is not None]
        numbers = [max(errors), errors[-1]] if errors else [None, None]
        ratio = errors[-1] / each.threshold if errors else None
        cells = [each.module, each.operand, write_number(each.threshold), *map(write_number, numbers)]
        rows.append([*cells, write_share(ratio), f"{len(each.over):,}"])
    headings = ["module", "operand", "threshold", "largest QEM", "last QEM", "of the threshold", "times over it"]
    return _bounded(Table(headings, rows, texts=2))


def decisions_table(operands: Sequence[Operand]) -> Table:
    """Returns the decisions of some operands, those together that came out alike."""
    rows, left_out = [], 0
    for operand in operands:
        found = episodes(operand.decisions)
        left_out += max(len(found) - _MOST_EPISODES, 0)
        for each in found[:_MOST_EPISODES]:
            decisions = each.decisions
            widths = dict.fromkeys(bits for decision in decisions for bits in decision.errors)
            errors = (
                f"int{bits} {_range([d.errors[bits] for d in decisions if bits in d.errors], write_number)}"
                for bits in widths
            )
            before, after = each.bits
            rows.append(
                [
                    operand.name,
                    each.reason,
                    each.outcome,
                    f"int{after}" if before == after else f"int{before} → int{after}",
                    _counted(decision.interval_reason for decision in decisions),
                    _range([decision.step for decision in decisions]),
                    str(len(decisions)),
                    ", ".join(errors),
                    _range([decision.position[1] for decision in decisions]),
                    _range([decision.interval for decision in decisions]),
                ]
            )
    headings = ["operand", "why it measured", "outcome", "width", "interval set by", "steps", "decisions", "QEM"]
    note = f"{left_out:,} further rows are left out; telemetry.jsonl has each decision." if left_out else ""
    return Table([*headings, "position", "interval"], rows, note, texts=5)


def samples_table(operands: Sequence[Operand]) -> Table:
    """Returns what the samples of each operand found."""
    rows = []
    for each in operands:
        cells = [each.module, each.operand, str(len(each.samples))]
        for name, pick in (("saturation", max), ("underflow", max), ("snr", min)):
            points = each.statistics[name]
            write = (lambda value: f"{value:.1f} dB") if name == "snr" else write_share
            if points:
                step, value = pick(points, key=lambda point: point[1])
                cells += [f"{write(value)} at {step:,}" if value else write(value), write(points[-1][1])]
            else:
                cells += ["–", "–"]
        rows.append(cells)
    headings = [
        "module",
        "operand",
        "samples",
        "most saturation",
        "last",
        "most underflow",
        "last",
        "least SNR",
        "last",
    ]
    return _bounded(Table(headings, rows, texts=2))


def histograms_table(operands: Sequence[Operand]) -> Table:
    """Returns the last histogram of some operands beside the range that their format holds."""
    rows = []
    for operand in operands:
        found = [each for each in operand.samples if each.histogram is not None]
        if not found:
            continue
        sample, histogram = found[-1], found[-1].histogram
        assert histogram is not None  # for the type checker: chosen above
        limits = representable(sample)
        cells = ["–", "–", "–"]
        if limits is not None and histogram.total:
            bottom, top = limits
            exponents = range(histogram.first, histogram.first + len(histogram.counts))
            counted = list(zip(exponents, histogram.counts, strict=True))
            below = sum(count for exponent, count in counted if exponent < bottom) / histogram.total
            above = sum(count for exponent, count in counted if exponent >= top) / histogram.total
            cells = [f"2^{bottom} to 2^{top}", write_share(below), write_share(above)]
        counts = " ".join(map(str, histogram.counts))
        rows.append(
            [
                operand.name,
                f"int{sample.bits}",
                f"{sample.step:,}",
                *cells,
                str(histogram.zeros),
                f"from 2^{histogram.first}: {counts}" if counts else "–",
            ]
        )
    headings = ["operand", "width", "step", "range", "below it", "above it", "zeros", "values by power of two"]
    return Table(headings, rows, texts=2)


def macs_table(training: Training) -> Table:
    """Returns the multiply-accumulates of each sampled step by pair of widths."""
    pairs = list(mac_shares(training).counts)
    times = [each for each in training.times if each.macs]
    rows = [[f"{each.step:,}", *(f"{each.macs.get(pair, 0):,}" for pair in pairs)] for each in times]
    return _bounded(Table(["step", *pairs], rows, texts=0))


def times_table(training: Training) -> Table:
    """Returns the milliseconds of each sampled step, and of the steps behind it."""
    rows = []
    for each in training.times:
        between = next((one for one in training.stretches if one.first > each.step), None)
        behind = (
            [f"{between.first:,}–{between.last:,}", f"{1000 * between.seconds_per_step:.4g}"] if between else ["–", "–"]
        )
        parts = (f"{1000 * each.parts[part]:.4g}" if part in each.parts else "–" for part in PARTS)
        rows.append([f"{each.step:,}", f"{1000 * each.seconds:.4g}", *parts, *behind])
    return _bounded(Table(["step", "ms", *PARTS, "steps behind it", "ms per step"], rows, texts=0))


def compared_table(trainings: Sequence[Training], baselines: Mapping[str, Training]) -> Table:
    """Returns a row for each training: how it ended, and what it cost.

    Args:
        trainings: to compare.
        baselines: by label of a training, its float32 baseline.
    """
    metrics = list(dict.fromkeys(metric for training in trainings for metric in training.curves))
    rows = []
    for training in trainings:
        last, float32 = final_values(training.curves), {}
        if training.label in baselines:
            float32 = final_values(baselines[training.label].curves)
        widths = Counter(operand.last_bits for operand in training.operands)
        cells = [training.label]
        cells += [write_end(last.get(metric), float32.get(metric)) for metric in metrics]
        cells.append(", ".join(f"{count} int{bits}" for bits, count in sorted(widths.items())) or "–")
        cells.append(f"{sum(len(operand.decisions) for operand in training.operands):,}")
        counts = mac_shares(training).counts
        cells.append(write_share(counts.get("8×8", 0) / sum(counts.values())) if counts else "–")
        seconds, parts = training.seconds_per_step, mean_parts(training)
        cells.append("–" if seconds is None else f"{1000 * seconds:.3g}")
        cells.append(write_share(parts["adapt"] / (sum(parts.values()) or 1)) if parts else "–")
        rows.append(cells)
    headings = ["training", *metrics, "operands", "updates", "int8 MACs", "ms per step", "adapting"]
    note = "In brackets: the difference from the float32 baseline with the same seed." if baselines else ""
    return Table(headings, rows, note, title="How they ended, and what they cost")


def differences_table(trainings: Sequence[Training]) -> Table:
    """Returns the operands whose width at the end is not the same in all trainings that have them."""
    widths = [{operand.name: operand for operand in training.operands} for training in trainings]
    names = dict.fromkeys(name for found in widths for name in found)
    rows = []
    for name in names:
        cells = [f"int{found[name].last_bits}" if name in found else "–" for found in widths]
        if len({*cells} - {"–"}) > 1:
            rows.append([name, *cells])
    title = "Operands that end with different widths"
    return _bounded(Table(["operand", *(training.label for training in trainings)], rows, title=title))


def macs_by_training_table(trainings: Sequence[Training]) -> Table:
    """Returns the multiply-accumulates of all sampled steps, by pair of widths."""
    counts = [mac_shares(training).counts for training in trainings]
    pairs = sorted({pair for found in counts for pair in found}, key=cost_order)
    rows = [
        [training.label, *(f"{found.get(pair, 0):,}" for pair in pairs)]
        for training, found in zip(trainings, counts, strict=True)
    ]
    return Table(["training", *pairs], rows)


def parts_table(trainings: Sequence[Training]) -> Table:
    """Returns the mean milliseconds of a sampled step, by part."""
    rows = []
    for training in trainings:
        parts = mean_parts(training)
        rows.append([training.label, *(f"{1000 * parts[part]:.4g}" if parts else "–" for part in PARTS)])
    return Table(["training", *PARTS], rows)


def _bounded(table: Table) -> Table:
    """Leaves out the rows that a page has no room for."""
    more = len(table.rows) - _MOST_ROWS
    if more <= 0:
        return table
    note = f"{more:,} further rows are left out; telemetry.jsonl has them."
    return replace(table, rows=table.rows[:_MOST_ROWS], note=note)


def _counted(found: Iterable[str]) -> str:
    counts = Counter(found)
    return ", ".join(f"{text} {count:,}×" if count > 1 else text for text, count in counts.most_common()) or "–"


def _range(values: Sequence[float | None], write: object = None) -> str:
    """Returns the smallest and the largest of the values."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    form = write if callable(write) else lambda value: f"{value:,}"
    low, high = form(min(known)), form(max(known))
    return str(low) if low == high else f"{low} to {high}"

"""What a report says in words: the sentences above its figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable

from ..fixed_point import BITS
from .numbers import write_end, write_share
from .records import Operand, Training
from .views import final_values, mac_shares, mean_parts

_NAMED = 4


def headline(training: Training) -> list[tuple[str, str]]:
    """Returns the few numbers that a report begins with, each under what it is called."""
    facts = []
    if training.operands:
        widths = Counter(operand.last_bits for operand in training.operands)
        facts.append(("operands at the end", " · ".join(f"{widths[bits]} int{bits}" for bits in BITS if widths[bits])))
    counts = mac_shares(training).counts
    if counts:
        facts.append(("multiplied as int8 × int8", write_share(counts.get("8×8", 0) / sum(counts.values()))))
    if training.seconds_per_step is not None:
        facts.append(("time per step", f"{1000 * training.seconds_per_step:.3g} ms"))
    parts = mean_parts(training)
    if parts:
        facts.append(("of a sampled step adapting", write_share(parts["adapt"] / (sum(parts.values()) or 1))))
    if facts or training.curves:
        first, last = training.steps
        facts.append(("optimizer steps", f"{last - first + 1:,}"))
    return facts


def findings(training: Training, baseline: Training | None) -> list[str]:
    """Returns what was found, in sentences: how it ended, what went wrong, what was decided, what it cost."""
    said = [*_metrics(training, baseline), *_warnings(training), *_widths(training), *_time(training, baseline)]
    if training.steps[0]:
        said.append(
            f"It begins at step {training.steps[0]:,}: the steps before it are in the run that it was resumed from."
        )
    if training.resumed:
        said.append(f"It was resumed at step {_listed(f'{step:,}' for step in training.resumed)}.")
    if training.unreadable:
        lines = "One line" if training.unreadable == 1 else f"{training.unreadable} lines"
        said.append(f"{lines} of telemetry.jsonl could not be read: a training that is killed leaves half a line.")
    return said


def _warnings(training: Training) -> list[str]:
    said = []
    for name, points in training.curves.items():
        lost = [step for step, value in points if not math.isfinite(value)]
        if lost:
            said.append(
                f"{name} is NaN or infinite in {len(lost):,} of {len(points):,} values, first at step {lost[0]:,}."
            )
    broken = sorted((operand for operand in training.operands if operand.nonfinite), key=lambda each: each.nonfinite[0])
    if broken:
        first = _listed(_named(broken, lambda each: f"{each.name} (step {each.nonfinite[0]:,})"))
        said.append(f"NaN or infinity in {_of(broken, training)}, the first in {first}.")
    over = [operand for operand in training.operands if operand.decisions and operand.decisions[-1].outcome == "over"]
    if over:
        names = _listed(_named(over, lambda each: f"{each.name} (int{each.last_bits})"))
        said.append(f"Over the threshold to the end, at the largest width allowed, in {_of(over, training)}: {names}.")
    for statistic, what in (("saturation", "lay at the limits of the format"), ("underflow", "became zero")):
        worst = max(training.operands, key=lambda each: each.largest(statistic) or 0.0, default=None)
        share = (worst.largest(statistic) or 0.0) if worst is not None else 0.0
        if worst is not None and share >= 0.01:
            step = max(worst.statistics[statistic], key=lambda point: point[1])[0]
            said.append(f"Most {statistic}: {write_share(share)} of {worst.name} {what} at step {step:,}.")
    return said


def _widths(training: Training) -> list[str]:
    operands = training.operands
    if not operands:
        return ["Nothing was recorded of operands in fixed point."]
    said = []
    widened = [each for each in operands if any(one.widened for one in each.decisions)]
    if widened:
        widened.sort(key=lambda each: next(one.step for one in each.decisions if one.widened))

        def tell(operand: Operand) -> str:
            first = next(one for one in operand.decisions if one.widened)
            return f"{operand.name} to int{first.bits[1]} at step {first.step:,}"

        kinds = Counter(each.operand for each in widened)
        which = _listed(f"{count} {kind}" for kind, count in kinds.most_common())
        said.append(f"Widened: {_of(widened, training)} ({which}), the first {_listed(_named(widened, tell))}.")
    else:
        widths = sorted({each.last_bits for each in operands})
        when = "at the end" if any(each.changes for each in operands) else "throughout"
        said.append(f"No operand was widened: {_listed(f'int{bits}' for bits in widths)} {when}.")
    idle = [each for each in operands if not each.decisions]
    if idle:
        said.append(f"Never measured: {_of(idle, training)}: {_listed(_named(idle, lambda each: each.name))}.")
    updates = sum(len(each.decisions) for each in operands)
    steps = training.steps[1] - training.steps[0] + 1
    said.append(
        f"{updates:,} update{'s' * (updates != 1)} in {steps:,} step{'s' * (steps != 1)}: on average an operand "
        f"measured on {write_share(updates / (len(operands) * steps))} of them."
    )
    return said


def _metrics(training: Training, baseline: Training | None) -> list[str]:
    last = final_values(training.curves)
    if not last:
        return []
    float32 = {} if baseline is None else final_values(baseline.curves)
    ended = "At the end " + _listed(f"{name} {write_end(value, float32.get(name))}" for name, value in last.items())
    if baseline is not None:
        return [f"{ended}; in brackets the difference from float32."]
    if training.level == "O0":
        return [f"{ended}."]
    return [f"{ended}; there is no float32 baseline beside it (cnmix train --compare trains one)."]


def _time(training: Training, baseline: Training | None) -> list[str]:
    seconds, parts = training.seconds_per_step, mean_parts(training)
    if seconds is None or not parts:
        return []
    total = sum(parts.values()) or 1
    shares = _listed(f"{write_share(value / total)} {part}" for part, value in parts.items())
    float32 = baseline.seconds_per_step if baseline is not None else None
    times = f", {seconds / float32:.2f} times as long as in float32" if float32 else ""
    return [f"A step takes {1000 * seconds:.3g} ms{times}; of a sampled one {shares}."]


def _of(some: list[Operand], training: Training) -> str:
    return f"{len(some)} of {len(training.operands)} operands"


def _named(operands: list[Operand], tell: Callable[[Operand], str]) -> list[str]:
    """Returns what is told of the first few."""
    more = len(operands) - _NAMED
    return [tell(each) for each in operands[:_NAMED]] + ([f"{more} more"] if more > 0 else [])


def _listed(texts: Iterable[str]) -> str:
    found = list(texts)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}" if found else ""

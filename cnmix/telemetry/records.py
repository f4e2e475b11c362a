"""What trainings logged, as a report takes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of the time of a step.
PARTS = ("quantize", "product", "adapt", "other")


@dataclass(frozen=True)
class LoggedDecision:
    """What an update step of an operand measured and decided.

    Attributes:
        step: optimizer step.
        at: the operand's own training step.
        reason: why it measured.
        errors: QEM at each width that was tried; None where it was not finite.
        bits: width before and after.
        position: position before (None at the first) and after.
        outcome: "kept", "widened", "narrowed", or "over": the error is over the threshold at max_bitwidth, whatever
            became of the width.
        interval: steps until the next update.
        interval_reason: what decided the interval.
    """

    step: int
    at: int
    reason: str
    errors: Mapping[int, float | None]
    bits: tuple[int, int]
    position: tuple[int | None, int | None]
    outcome: str
    interval: int
    interval_reason: str

    @property
    def error(self) -> float | None:
        """QEM at the width that was taken."""
        return self.errors.get(self.bits[1])

    @property
    def widened(self) -> bool:
        """Whether the width grew."""
        return self.bits[1] > self.bits[0]


@dataclass(frozen=True)
class Histogram:
    """How many of the sampled values have which exponent, floor(log2|x|).

    Attributes:
        first: the exponent that ``counts`` starts with; 0 where all values are zeros.
        counts: values with this exponent and each one above.
        zeros: values that are zero.
    """

    first: int
    counts: tuple[int, ...]
    zeros: int

    @property
    def total(self) -> int:
        """All values, zeros among them."""
        return self.nonzero + self.zeros

    @property
    def nonzero(self) -> int:
        """Values other than zero."""
        return sum(self.counts)


@dataclass(frozen=True)
class Sample:
    """What a sampled step found of one operand; a statistic that was not asked for, or was not finite, is None."""

    step: int
    bits: int
    position: int | None
    interval: int | None
    error: float | None
    saturation: float | None
    underflow: float | None
    snr: float | None
    histogram: Histogram | None


@dataclass(frozen=True)
class StepTime:
    """Where the seconds of one sampled step went, and what it multiplied: multiply-accumulates by pair of widths."""

    step: int
    seconds: float
    parts: Mapping[str, float]
    macs: Mapping[str, int]


@dataclass(frozen=True)
class Stretch:
    """Seconds that the steps from ``first`` to ``last`` took, sampled ones not among them."""

    first: int
    last: int
    seconds: float

    @property
    def seconds_per_step(self) -> float:
        """Mean over the steps."""
        return self.seconds / (self.last - self.first + 1)


@dataclass
class Operand:
    """One operand of one module, and all that was logged of it."""

    module: str
    operand: str
    product: str
    bits: int
    max_bitwidth: int
    threshold: float
    decisions: list[LoggedDecision] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As messages call it: ``fc1.input``."""
        return f"{self.module}.{self.operand}" if self.module else self.operand

    @property
    def last_bits(self) -> int:
        """Width at the end."""
        return self.decisions[-1].bits[1] if self.decisions else self.samples[-1].bits if self.samples else self.bits

    @property
    def statistics(self) -> dict[str, list[tuple[int, float]]]:
        """Steps and values of each statistic that was sampled."""
        found: dict[str, list[tuple[int, float]]] = {"saturation": [], "underflow": [], "snr": []}
        for name, points in found.items():
            points += [(each.step, value) for each in self.samples if (value := getattr(each, name)) is not None]
        return found

    @property
    def changes(self) -> list[LoggedDecision]:
        """Decisions that changed the width."""
        return [each for each in self.decisions if each.bits[0] != each.bits[1]]

    @property
    def over(self) -> list[LoggedDecision]:
        """Decisions that left the error over the threshold."""
        return [each for each in self.decisions if each.outcome == "over"]

    @property
    def worst_ratio(self) -> float:
        """The largest error that a decision settled for, as a multiple of the threshold; 0 without any."""
        return max((each.error / self.threshold for each in self.decisions if each.error is not None), default=0.0)

    def largest(self, statistic: str) -> float | None:
        """Returns the largest ``saturation`` or ``underflow`` of all samples."""
        return max((value for _, value in self.statistics[statistic]), default=None)

    @property
    def interest(self) -> tuple[Any, ...]:
        """Orders operands: those that one should look at first are the largest."""
        lost = max(self.largest("saturation") or 0.0, self.largest("underflow") or 0.0)
        return bool(self.nonfinite), bool(self.over), self.last_bits, len(self.changes), self.worst_ratio, lost


@dataclass
class Training:
    """One training: one level, one seed.

    Attributes:
        folder: where it was logged.
        label: how the report calls it.
        header: the first line of the file; empty for a float baseline without one.
        operands: in the order in which training met them.
        times: the sampled steps.
        stretches: the steps in between.
        curves: by name of the metric, the steps at which it was logged and its values, NaN and infinity among them.
        resumed: optimizer steps from which the training was resumed into the same file.
        unreadable: lines that could not be read, as a kill leaves one.
    """

    folder: Path
    label: str
    header: dict[str, Any] = field(default_factory=dict)
    operands: list[Operand] = field(default_factory=list)
    times: list[StepTime] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    unreadable: int = 0

    @property
    def level(self) -> str:
        """Opt level, "" where neither the file nor the folder's name says it."""
        return self.header.get("level") or level_and_seed(self.folder)[0]

    @property
    def seed(self) -> str:
        """Seed, "" where the folder's name does not say it."""
        return level_and_seed(self.folder)[1]

    @property
    def steps(self) -> tuple[int, int]:
        """The optimizer step that it began with, and the last one that anything is known of."""
        logged = [each.step for operand in self.operands for each in operand.decisions]
        logged += [each.step for operand in self.operands for each in operand.samples]
        logged += [each.step for each in self.times]
        logged += [step for each in self.stretches for step in (each.first, each.last)]
        logged += [step for points in self.curves.values() for step, _ in points]
        first = int(self.header.get("first_step", 0))
        return first, max([first, *logged])

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the steps that were not sampled; over the sampled ones where there are no others."""
        steps = sum(each.last - each.first + 1 for each in self.stretches)
        if steps:
            return sum(each.seconds for each in self.stretches) / steps
        return sum(each.seconds for each in self.times) / len(self.times) if self.times else None

    def most_interesting(self, count: int) -> list[Operand]:
        """Returns at most ``count`` operands, those that one should look at first in front."""
        return sorted(self.operands, key=lambda each: each.interest, reverse=True)[:count]


def level_and_seed(folder: Path) -> tuple[str, str]:
    """Returns what a folder's name, as ``O1-seed0``, says of level and seed, "" for what it does not."""
    match = re.fullmatch(r"(\w+)-seed(\d+)", folder.resolve().name)
    return (match[1], match[2]) if match else ("", "")

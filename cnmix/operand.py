"""What is known of one operand: the state that a quantizer goes on from, and what a process saw since the last one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .fixed_point import POSITION_MAX, POSITION_MIN, check_bits

# Where the moving average of the position starts. Far from every real position, it keeps the interval at one step
# until the average has forgotten it (some 125 steps); the public implementations of the algorithm agree on it.
_INITIAL_MOVING_POSITION = 100.0


@dataclass
class OperandState:
    """What one quantizer knows; plain numbers, so that it can be saved as it is.

    Attributes:
        bits: present width.
        position: present position; None before the first update.
        moving_position: moving average of the position.
        step: training steps seen.
        next_update: first step that measures again.
        interval: steps between the last update and ``next_update``.
        error: quantization error at the last update (QEM).
        updates: updates so far.
        last_update: step of the last update.
        exceeds_max_bitwidth: whether the error was over the threshold at the largest width allowed.
        seed: key of the random numbers for stochastic rounding, 64 bits.
        saturation: sum of the shares of saturated values in the steps since the last update; 0 where not counted.
    """

    bits: int
    position: int | None = None
    moving_position: float = _INITIAL_MOVING_POSITION
    step: int = 0
    next_update: int = 0
    interval: int = 1
    error: float = 0.0
    updates: int = 0
    last_update: int = 0
    exceeds_max_bitwidth: bool = False
    seed: int = 0
    saturation: float = 0.0


@dataclass
class Rounds:
    """Counts the backward passes that all processes of a training take part in.

    Attributes:
        present: number of the one that is under way or comes next.
    """

    present: int = 0


@dataclass
class Observation:
    """What one process saw of an operand since the processes last agreed on its format.

    Attributes:
        first_step: the step at which they agreed.
        rounds: the rounds of its processes.
        due_round: the first round that measures; the same in all processes, whose steps may differ.
        absmax: largest magnitude measured; 0 where no update step was seen.
        sums: for each width that was measured the sum of the differences that QEM takes, and of the magnitudes.
        saturation: sum of the shares of saturated values in the steps in between.
        patience: rounds to wait before it is asked for again, if no process has run it.
        missed: whether a round that was due before found nothing to measure.
    """

    first_step: int = 0
    rounds: Rounds = field(default_factory=Rounds)
    due_round: int = 0
    absmax: float = 0.0
    sums: dict[int, tuple[float, float]] = field(default_factory=dict)
    saturation: float = 0.0
    patience: int = 1
    missed: bool = False

    @property
    def due(self) -> bool:
        """Whether this round measures."""
        return self.rounds.present >= self.due_round

    def add(self, absmax: float, sums: Mapping[int, tuple[float, float]]) -> None:
        """Adds what an update step measured: the largest magnitude, and the two sums at each width."""
        self.absmax = max(self.absmax, absmax)
        for bits, (difference, magnitude) in sums.items():
            before = self.sums.get(bits, (0.0, 0.0))
            self.sums[bits] = before[0] + difference, before[1] + magnitude

    def error(self, bits: int) -> float | None:
        """Returns the quantization error at a width, None where it was not measured."""
        return relative_error(*self.sums[bits]) if bits in self.sums else None


def relative_error(difference: float, magnitude: float) -> float:
    """Returns ``log2(|difference| / magnitude + 1)``, and 0 where all is zero; see ``quantization_error``."""
    return math.log2(abs(difference) / magnitude + 1) if magnitude else 0.0


def parse_operand_state(state: Mapping[str, Any], name: str) -> OperandState:
    """Builds an operand's state from plain numbers.

    Raises:
        ValueError: if a number is missing, unknown or out of its range; the message has ``name``.
    """
    fields = {field.name for field in dataclasses.fields(OperandState)}
    if not isinstance(state, Mapping) or set(state) != fields:
        given = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"the saved state of {name} must have exactly {sorted(fields)}, got {given}")
    check_bits(state["bits"], f"the saved width of {name}")
    for entry, value in state.items():
        if entry in ("moving_position", "error", "saturation"):
            right = isinstance(value, (int, float)) and math.isfinite(value)
        elif entry == "position":
            right = value is None or (type(value) is int and POSITION_MIN <= value <= POSITION_MAX)
        elif entry == "exceeds_max_bitwidth":
            right = isinstance(value, bool)
        else:
            right = type(value) is int and value >= 0
        if not right:
            raise ValueError(f"the saved {entry} of {name} is out of its range: {value!r}")
    return OperandState(**state)

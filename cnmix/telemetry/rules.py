"""Which statistics of which operands are recorded, and on which steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import check_names
from ..rules import Selector

STATISTICS = ("saturation", "underflow", "snr", "histogram", "scale")
"""What can be recorded of an operand; width, position, interval and error always are."""


@dataclass(frozen=True)
class TelemetryRule(Selector):
    """What is recorded of some operands; where several rules hold for one, it is what any of them names.

    Recipes, and ``rules=`` of ``record`` and ``CnmixTelemetry``, take rules as mappings of the same names too:
    ``{"modules": "encoder.*", "operands": "grad_output", "statistics": ["snr"], "every_n_steps": 10}``.

    Attributes:
        modules: see ``cnmix.rules.Selector``; likewise ``types``, ``small`` and ``operands``.
        statistics: of ``STATISTICS``; all of them by default.
        every_n_steps: optimizer steps from one that is recorded to the next; step 0 is the first.
        start: first step of which something is recorded.
        stop: step from which on nothing is; None: to the end.
    """

    statistics: tuple[str, ...] = STATISTICS
    every_n_steps: int = 50
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (self.statistics,) if isinstance(self.statistics, str) else tuple(self.statistics)
        object.__setattr__(self, "statistics", names)
        check_names(names, STATISTICS, "statistic in a telemetry rule:")
        check_every_n_steps(self.every_n_steps)
        for name in ("start", "stop"):
            step = getattr(self, name)
            if not (name == "stop" and step is None) and (type(step) is not int or step < 0):
                raise ValueError(f"a telemetry rule's {name} must be a whole number of steps, at least 0, got {step!r}")
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"a telemetry rule's stop must come after its start {self.start}, got {self.stop}")

    def is_due(self, step: int, latest: int) -> bool:
        """Whether this step is to be recorded, where ``latest`` was the step before; see ``is_due``."""
        return (
            self.start <= step and (self.stop is None or step < self.stop) and is_due(self.every_n_steps, step, latest)
        )


def is_due(every_n_steps: int, step: int, latest: int) -> bool:
    """Whether a multiple of ``every_n_steps`` lies after ``latest`` and not after ``step``.

    Not whether the remainder is 0: manual optimization may take several steps in a batch.
    """
    return step // every_n_steps > latest // every_n_steps


def check_every_n_steps(value: object) -> None:
    """Raises ValueError for a number of steps below 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"every_n_steps must be a whole number of steps, at least 1, got {value!r}")


def parse_telemetry_rules(
    rules: Iterable[TelemetryRule | Mapping[str, Any]], every_n_steps: int
) -> tuple[TelemetryRule, ...]:
    """Builds rules from mappings; without any, the one that records everything of every operand.

    Args:
        rules: the rules.
        every_n_steps: of a rule that does not say.

    Raises:
        TypeError: if ``rules`` is no list of mappings or rules.
        ValueError: for an unknown name, with the nearest known one, or a value out of its range.
    """
    check_every_n_steps(every_n_steps)
    example = "{'modules': 'head', 'statistics': ['snr']}"
    if isinstance(rules, (str, Mapping, TelemetryRule)) or not isinstance(rules, Iterable):
        raise TypeError(f"telemetry rules must be a list of mappings, as [{example}], got {rules!r}")
    parsed = []
    known = [each.name for each in dataclasses.fields(TelemetryRule)]
    for rule in rules:
        if isinstance(rule, Mapping):
            check_names(rule, known, "name in a telemetry rule:")
            rule = TelemetryRule(**{"every_n_steps": every_n_steps, **rule})
        if not isinstance(rule, TelemetryRule):
            raise TypeError(f"a telemetry rule is a mapping, as {example}, got {rule!r}")
        parsed.append(rule)
    return tuple(parsed) or (TelemetryRule(every_n_steps=every_n_steps),)

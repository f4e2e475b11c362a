"""What the vendor's variables say of a timed run."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

STRATEGY_COUNT = "MLU_ADAPTIVE_STRATEGY_COUNT"
"""Training iterations after which the adaptive strategy closes; those before are not timed."""

TOTAL_ITERATIONS = "CATCH_MODEL_TOTAL_ITERS"
"""Iterations of a short timed run."""

DEFAULT_STRATEGY_COUNT = 100
"""What the vendor's script for timed runs sets."""

DEFAULT_ITERATIONS = 50
"""Iterations after them whose average is the result."""


def strategy_count() -> int:
    """Returns ``MLU_ADAPTIVE_STRATEGY_COUNT``: 0 where it is not set, and the strategy never closes.

    Raises:
        ValueError: if it is no whole number of iterations.
    """
    return _whole_number(STRATEGY_COUNT) or 0


@dataclass(frozen=True)
class Plan:
    """How long a timed run is.

    Attributes:
        skipped: iterations first in which operands adapt; not timed.
        timed: iterations after them.
    """

    skipped: int
    timed: int

    @property
    def total(self) -> int:
        """All iterations."""
        return self.skipped + self.timed


def make_plan(iterations: int = DEFAULT_ITERATIONS) -> Plan:
    """Returns how long a timed run is, as the variables say.

    ``MLU_ADAPTIVE_STRATEGY_COUNT`` iterations are skipped, 100 where it is not set. ``CATCH_MODEL_TOTAL_ITERS`` is how
    many iterations there are in all, in place of ``iterations`` after those; without the other variable it skips one.

    Args:
        iterations: to time.

    Raises:
        ValueError: for a bad value of a variable, or where nothing would be left to time.
    """
    if iterations < 1:
        raise ValueError(f"a timed run needs at least 1 iteration, got {iterations}")
    total = _whole_number(TOTAL_ITERATIONS)
    if total is None:
        return Plan(strategy_count() or DEFAULT_STRATEGY_COUNT, iterations)
    skipped = strategy_count() or 1
    if skipped >= total:
        raise ValueError(
            f"{STRATEGY_COUNT} skips {skipped} iterations, and {TOTAL_ITERATIONS} ends the run after {total}: nothing "
            "is left to time. Lower the one or raise the other"
        )
    return Plan(skipped, total - skipped)


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Leaves out the warning of ``initialize`` that the strategy closes early, where that is said already."""

    def other(record: logging.LogRecord) -> bool:
        return STRATEGY_COUNT not in record.getMessage()

    logger = logging.getLogger("cnmix")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _whole_number(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name} must be a whole number of iterations, 0 or more, got {text!r}: correct or unset it")
    return int(text)

"""When the adaptive strategy of a model closes: after as many training iterations no operand measures again.

The vendor's variable says after how many. It is for timing alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

logger = logging.getLogger("cnmix")

STRATEGY_COUNT = "MLU_ADAPTIVE_STRATEGY_COUNT"
"""Training iterations after which the adaptive strategy closes; those before are not timed."""


def strategy_count() -> int:
    """Returns ``MLU_ADAPTIVE_STRATEGY_COUNT``: 0 where it is not set, and the strategy never closes.

    Raises:
        ValueError: if it is no whole number of iterations.
    """
    return read_iterations(STRATEGY_COUNT) or 0


def read_iterations(name: str) -> int | None:
    """Returns the number of iterations that a variable of the environment has, None where it is not set or empty.

    Raises:
        ValueError: if it is no whole number, or has more than 18 digits.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise ValueError(f"{name} must be a whole number of iterations, 0 or more, got {shown!r}: correct or unset it")
    return int(text)


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Leaves out the warning of ``initialize`` that the strategy closes early, where that is said already."""

    def other(record: logging.LogRecord) -> bool:
        return STRATEGY_COUNT not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


class Closing:
    """Counts a model's training iterations until its adaptive strategy closes; shared by its quantizers.

    An iteration ends where a forward pass follows a backward pass: with gradient accumulation each micro-batch counts.
    Each process counts its own. A copy of the model goes on counting for itself.

    Attributes:
        count: iterations after which the strategy closes; 0 for never.
        closed: whether it has closed.
        backward_began: whether there was a backward pass in this iteration.
    """

    def __init__(self) -> None:
        self.count = 0
        self.closed = False
        self.backward_began = False
        self._iterations = 0

    def begin(self, count: int) -> bool:
        """Is told when to close, and says what that means; returns whether that is new, and counts anew then."""
        if count == self.count:
            return False
        if count:
            logger.warning(
                "%s=%d: after %d training iterations no operand measures again. That is for timing: the accuracy of "
                "such a run is not valid",
                STRATEGY_COUNT,
                count,
                count,
            )
        self.count, self.closed, self.backward_began, self._iterations = count, False, False, 0
        return True

    def end_iteration(self) -> None:
        """Is called before a module quantizes for a training step that follows a backward pass."""
        self.backward_began = False
        self._iterations += 1
        if not self.closed and 0 < self.count <= self._iterations:
            self.closed = True
            logger.info("the adaptive strategy closed after %d iterations: widths and positions stay", self.count)

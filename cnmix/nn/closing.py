"""When the adaptive strategy of a model closes: after as many training iterations no operand measures again."""

from __future__ import annotations

import logging

from ..benchmark.protocol import STRATEGY_COUNT
from .recomputation import current_backward

logger = logging.getLogger("cnmix")


class Closing:
    """Counts a model's training iterations until its adaptive strategy closes.

    An iteration ends where a forward pass follows a backward pass: with gradient accumulation each micro-batch counts.
    Each process counts its own.

    Args:
        count: iterations after which the strategy closes; 0 for never.

    Attributes:
        count: see above.
        closed: whether it has closed.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.closed = False
        self._iterations = 0
        self._backward_began = False

    def begin(self, count: int) -> None:
        """Is told when to close, and says what that means."""
        if count and count != self.count:
            logger.warning(
                "%s=%d: after %d training iterations no operand measures again. That is for timing: the accuracy of "
                "such a run is not valid",
                STRATEGY_COUNT,
                count,
                count,
            )
        self.count = count

    def backward_begins(self) -> None:
        """Is called in a backward pass, once or more often."""
        self._backward_began = True

    def forward_begins(self) -> bool:
        """Is called before a module quantizes for a training step; returns whether the strategy closes now."""
        if not self._backward_began or self.closed or current_backward() != -1:
            return False
        self._backward_began = False
        self._iterations += 1
        self.closed = 0 < self.count <= self._iterations
        if self.closed:
            logger.info("the adaptive strategy closed after %d iterations: widths and positions stay", self.count)
        return self.closed

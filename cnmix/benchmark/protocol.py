"""What the vendor's variables say of a timed run."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..closing import STRATEGY_COUNT, read_iterations

BENCHMARK_LOG, AVG_LOG = "BENCHMARK_LOG", "AVG_LOG"
"""The files that records, and lines with accuracies, are appended to."""

TOTAL_ITERATIONS = "CATCH_MODEL_TOTAL_ITERS"
"""Iterations of a short timed run."""

DEFAULT_STRATEGY_COUNT = 100
"""What the vendor's script for timed runs sets."""

DEFAULT_ITERATIONS = 50
"""Iterations after them whose average is the result."""


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

    ``MLU_ADAPTIVE_STRATEGY_COUNT`` iterations are skipped, 100 where it is not set; 0 skips none, and operands adapt
    throughout. ``CATCH_MODEL_TOTAL_ITERS`` is how
    many iterations there are in all, in place of ``iterations`` after those; without the other variable it skips one.

    Args:
        iterations: to time.

    Raises:
        ValueError: for a bad value of a variable, or where nothing would be left to time.
    """
    if iterations < 1:
        raise ValueError(f"a timed run needs at least 1 iteration, got {iterations}")
    count, total = read_iterations(STRATEGY_COUNT), read_iterations(TOTAL_ITERATIONS)
    if total is None:
        return Plan(DEFAULT_STRATEGY_COUNT if count is None else count, iterations)
    skipped = 1 if count is None else count
    if skipped < total:
        return Plan(skipped, total - skipped)
    if count is None or total == 0:
        raise ValueError(f"{TOTAL_ITERATIONS}={total} leaves nothing to time: it needs at least 2")
    raise ValueError(
        f"{STRATEGY_COUNT} skips {skipped} iterations, and {TOTAL_ITERATIONS} ends the run after {total}: nothing is "
        "left to time. Lower the one or raise the other"
    )


def log_file(name: str) -> str | None:
    """Returns the file that ``BENCHMARK_LOG`` or ``AVG_LOG`` names, None where it is not set or empty.

    Raises:
        ValueError: if nothing can be appended to it: said before a run, and not after it.
    """
    path = os.environ.get(name)
    if not path:
        return None
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"{name}={path} cannot be written: there is no folder {folder}")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"{name}={path} cannot be written: give a file that may be")
    return path

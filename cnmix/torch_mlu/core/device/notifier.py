"""Notifiers, which mark a point in a queue and tell the time between two of them."""

from __future__ import annotations

import time

import torch


class Notifier:
    """Marks a point in a queue.

    An emulated card computes on the host while the caller waits, so that the card's time between two notifiers is the
    host's: ``hardware_time`` and ``elapsed_time`` differ in their units alone. ``catch_perf`` estimates what a card
    would take.
    """

    def __init__(self, *_: object, **__: object) -> None:
        self._placed: int | None = None

    def place(self, queue: torch.Stream | None = None) -> None:
        """Marks this moment in a queue; None is the current one."""
        self._placed = time.perf_counter_ns()

    record = place

    def wait(self, queue: torch.Stream | None = None) -> None:
        """Lets a queue wait for this notifier, which has always passed."""

    def query(self) -> bool:
        """Whether all before it has been computed, which it has."""
        return True

    def synchronize(self) -> None:
        """Waits until all before it has been computed, which it has."""

    def elapsed_time(self, end: Notifier) -> float:
        """Returns the time from this notifier to another, in milliseconds.

        Raises:
            RuntimeError: if one of them was never placed.
        """
        return self._until(end) / 1e6

    def hardware_time(self, end: Notifier) -> float:
        """Returns the card's time from this notifier to another, in microseconds.

        Raises:
            RuntimeError: if one of them was never placed.
        """
        return self._until(end) / 1e3

    def _until(self, end: Notifier) -> int:
        if self._placed is None or end._placed is None:
            raise RuntimeError("a notifier has no time before place() was called: place both, then ask")
        return end._placed - self._placed

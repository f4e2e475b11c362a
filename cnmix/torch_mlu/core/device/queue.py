"""Queues of a card's operations."""

from __future__ import annotations

from typing import Any

import torch

from .cards import DeviceLike, card_index
from .notifier import Notifier


class Queue(torch.Stream):
    """A queue of a card's operations, which the vendor's later versions call a stream.

    The emulated card has finished an operation when the call returns, so that nothing waits in a queue: it is there
    for scripts that make queues, enter and synchronize them. ``with queue:`` makes it the current one.

    Args:
        device: of the queue; None is the current card.
        priority: taken, and without effect.
    """

    def __new__(cls, device: DeviceLike = None, priority: int = 0, **kwargs: Any) -> Queue:  # noqa: D102
        if kwargs:  # as torch passes what it knows of an existing stream
            return super().__new__(cls, **kwargs)
        return super().__new__(cls, device=torch.device("mlu", card_index(device)), priority=priority)

    @property
    def queue(self) -> int:
        """The number of the queue; the default queue of a card is 0."""
        return int(self.stream_id)

    def record_event(self, event: Any = None) -> Any:
        """Places a notifier in the queue, a new one where none is given, and returns it."""
        placed = Notifier() if event is None else event
        placed.record(self)
        return placed

    def wait_event(self, event: Any) -> None:
        """Lets the queue wait for a notifier, which has always passed."""

    def wait_stream(self, stream: torch.Stream) -> None:
        """Lets the queue wait for another, whose operations have finished."""

    def __repr__(self) -> str:
        return f"<torch_mlu.core.device.Queue device={self.device} queue={self.queue}>"


def as_queue(stream: torch.Stream) -> Queue:
    """Returns the queue that a stream of a card is."""
    return Queue(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)

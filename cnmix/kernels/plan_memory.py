"""The memory between the steps of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from .plan_chain import ARENA, AddValue, Stage, Store, Value

_ALIGNMENT = 64  # bytes; a line of the cache


def note_replaced(source: Value, chain: Sequence[Stage]) -> None:
    """Notes which value a stored one may take the place of: the only one that was added, before."""
    added = [(i, stage.value) for i, stage in enumerate(chain) if isinstance(stage, AddValue)]
    stored = [(i, stage.value) for i, stage in enumerate(chain) if isinstance(stage, Store)]
    if len(added) == 1 and stored and added[0][0] < stored[0][0] and added[0][1] is not source:
        stored[0][1].over = added[0][1]


def aligned(size: int) -> int:
    """Returns the bytes with which the next value begins at a line of the cache."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def lay_out(values: Sequence[Value]) -> int:
    """Places inner values so that those which are needed at the same time do not overlap; returns the bytes of all.

    The largest first, each at the lowest place that is free for its time. A value that replaces one that it is made of,
    element by element, takes its place: sums with a residual then go through half the cache.
    """
    times: dict[Value, tuple[int, int]] = {}
    homes: dict[Value, Value] = {}
    for value in sorted((v for v in values if v.written is not None), key=lambda v: v.written or 0):
        over = value.over
        written, read = value.written or 0, value.read or 0
        if over is not None and over.base == ARENA and over.read == written:
            home = homes[value] = homes[over]
            times[home] = times[home][0], max(times[home][1], read)
        else:
            homes[value] = value
            times[value] = written, read
    placed: list[Value] = []
    end = 0
    for value in sorted(times, key=lambda value: -value.bytes):
        first, last = times[value]
        at = 0
        for other in sorted(placed, key=lambda other: other.offset):
            together = first <= times[other][1] and times[other][0] <= last
            if together and at + value.bytes > other.offset and at < other.offset + other.bytes:
                at = aligned(other.offset + other.bytes)
        value.offset = at
        placed.append(value)
        end = max(end, at + value.bytes)
    for value, home in homes.items():
        value.offset = home.offset
    return aligned(end)

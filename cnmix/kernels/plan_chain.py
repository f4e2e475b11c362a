"""What a plan is made of: values in memory, and chains of float32 operations on every element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

ARENA = 0  # the address that inner values count from; each input and output has one of its own
_ALIGNMENT = 64  # bytes; a line of the cache


class Value:
    """A tensor of a plan, in memory as rows of channels: (N, *spatial, C), whatever its shape says.

    Attributes:
        shape: (N, C, *spatial), or (rows, C).
        dtype: float32, int8 or int16.
        rows: N times the positions.
        channels: C.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, base: int) -> None:
        if len(shape) < 2 or dtype not in (torch.float32, torch.int8, torch.int16):
            raise ValueError(
                f"a plan has float32, int8 and int16 of two or more dimensions, not {dtype} {tuple(shape)}"
            )
        self.shape, self.dtype = tuple(shape), dtype
        self.channels = shape[1]
        self.rows = shape[0] * math.prod(shape[2:])
        self.base, self.offset = base, 0
        self.written: int | None = None  # the first step that writes it
        self.read: int | None = None  # the last one that reads it
        self.over: Value | None = None  # what its elements are sums with, in the step that writes it
        self.planes = True  # whether it may lie channel by channel: nothing reads it but steps on elements

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return self.rows * self.channels * self.dtype.itemsize

    def __str__(self) -> str:
        return f"Value({self.shape}, {self.dtype})"


class Multiply(NamedTuple):
    """Multiplies by one number, or by those of the channels, float32 (C,)."""

    factors: Tensor | float


class Add(NamedTuple):
    """Adds a term to each channel, float32 (C,)."""

    terms: Tensor


class AddValue(NamedTuple):
    """Adds a float32 value of the same rows and channels."""

    value: Value


class Relu(NamedTuple):
    """The larger of zero and x; NaN stays."""


class LeakyRelu(NamedTuple):
    """X where it is positive, else x times the slope."""

    slope: float


class Clamp(NamedTuple):
    """Limits x to [low, high]; NaN stays."""

    low: float
    high: float


class Store(NamedTuple):
    """Writes float32 elements."""

    value: Value


class Quantize(NamedTuple):
    """Writes the integers nearest to x * 2**-position, ties to even, saturated: int8 or int16, by ``bits``."""

    value: Value
    bits: int
    position: int


Stage: TypeAlias = Multiply | Add | AddValue | Relu | LeakyRelu | Clamp | Store | Quantize


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

"""What a plan is made of: values in memory, and chains of float32 operations on every element that a step makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..fixed_point import storage_dtype
from .native import structures

# StageKind of plan.h.
_KINDS = (
    *("multiply", "multiply number", "add", "add value", "relu", "leaky relu", "clamp", "store"),
    *("quantize 8", "quantize 16", "bounded", "multiply add"),
)
_MOST_STAGES = 32  # of plan.h
ARENA = 0  # the address that inner values count from; each input and output has one of its own


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
        self.bound = 128.0 if dtype == torch.int8 else math.inf  # of magnitudes; infinite also where NaN may be
        self.over: Value | None = None  # what its elements are sums with, in the step that writes it
        self.planes = True  # whether it may lie channel by channel: nothing reads it but steps on elements

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return self.rows * self.channels * self.dtype.itemsize

    def note_read(self, step: int) -> None:
        """Notes that a step reads it.

        Raises:
            ValueError: if no step before writes it.
        """
        if self.written is None or self.written == step:
            raise ValueError(f"no step before this one writes {self}")
        self.read = step

    def note_written(self, step: int, again: bool = False) -> None:
        """Notes that a step writes it, or ``again`` more of it.

        Raises:
            ValueError: if another step wrote it.
        """
        if self.written is not None and not again:
            raise ValueError(f"{self} is written already")
        self.written = step if self.written is None else self.written
        self.read = step if self.read is None else max(step, self.read)

    def __str__(self) -> str:
        return f"Value({self.shape}, {self.dtype})"


class Multiply(NamedTuple):
    """Multiplies by one number, or by those of the channels, float32 (C,)."""

    factors: Tensor | float


class Add(NamedTuple):
    """Adds a term to each channel, float32 (C,)."""

    terms: Tensor


class MultiplyAdd(NamedTuple):
    """Multiplies by the factors of the channels and adds their terms, both float32 (C,), with one rounding."""

    factors: Tensor
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


Stage: TypeAlias = Multiply | Add | MultiplyAdd | AddValue | Relu | LeakyRelu | Clamp | Store | Quantize


class Bounded(NamedTuple):
    """Writes int8 as ``Quantize`` does, of elements that are known to be finite and to fit int32 when scaled.

    Attributes:
        value: int8.
        scale: a power of two.
        positive: whether negative integers become zero.
    """

    value: Value
    scale: float
    positive: bool


_SCALED_LIMIT = 2.0**30  # int32, with room for rounding
_FLOAT_LIMIT = 2.0**127  # of float32, with room for rounding
_ROUNDING = 1 + 2.0**-20  # what a float32 operation may add to a bound, generously
_EXACT = 2.0**-60, 2.0**60  # constants that powers of two may move without leaving the normal numbers


def simplify(chain: Sequence[Stage], bound: float, of_sums: bool) -> list[Stage | Bounded]:
    """Returns stages of the same results that take fewer instructions, and notes the bounds of stored values.

    Args:
        chain: stages.
        bound: of the magnitudes of the elements that it begins with.
        of_sums: whether these are integers.
    """
    stages = _join_factors(chain) if of_sums else list(chain)
    made: list[Stage | Bounded] = []
    for stage in stages:
        if isinstance(stage, Multiply):
            bound *= _largest(stage.factors) * _ROUNDING
        elif isinstance(stage, Add):
            bound = (bound + _largest(stage.terms)) * _ROUNDING
        elif isinstance(stage, MultiplyAdd):
            bound = (bound * _largest(stage.factors) + _largest(stage.terms)) * _ROUNDING
        elif isinstance(stage, AddValue):
            bound = (bound + stage.value.bound) * _ROUNDING
        elif isinstance(stage, LeakyRelu):
            bound *= max(1.0, abs(stage.slope)) * _ROUNDING
        elif isinstance(stage, Clamp) and math.isfinite(bound):
            bound = max(abs(stage.low), abs(stage.high))
        elif isinstance(stage, Store):
            stage.value.bound = bound
        bound = bound if bound < _FLOAT_LIMIT else math.inf  # it may be NaN
        if (
            isinstance(stage, Quantize)
            and stage.bits == 8
            and -60 <= stage.position <= 60
            and math.ldexp(bound, -stage.position) < _SCALED_LIMIT
        ):
            made.append(Bounded(stage.value, math.ldexp(1.0, -stage.position), False))
        else:
            made.append(stage)
    last = made[-1] if made else None
    if isinstance(last, Bounded):
        before, scale = _scale_constants(made[:-1], last.scale)
        positive = bool(before) and isinstance(before[-1], Relu)
        made = [*(before[:-1] if positive else before), Bounded(last.value, scale, positive)]
    return made


def check_chain(chain: Sequence[Stage], rows: int, channels: int) -> None:
    """Raises ValueError where stages do not fit elements of so many rows and channels."""
    if len(chain) > _MOST_STAGES:
        raise ValueError(f"a chain has at most {_MOST_STAGES} stages, not {len(chain)}")
    for stage in chain:
        for constants in stage if isinstance(stage, (Multiply, Add, MultiplyAdd)) else ():
            if not isinstance(constants, Tensor):
                continue
            if constants.dtype != torch.float32 or tuple(constants.shape) != (channels,):
                raise ValueError(
                    f"constants of {channels} channels are float32 ({channels},), not {tuple(constants.shape)}"
                )
        if isinstance(stage, (AddValue, Store, Quantize)):
            value = stage.value
            dtype = storage_dtype(stage.bits) if isinstance(stage, Quantize) else torch.float32
            if (value.rows, value.channels, value.dtype) != (rows, channels, dtype):
                raise ValueError(f"{type(stage).__name__} of {rows} rows of {channels} channels cannot be of {value}")


def encode(stage: Stage | Bounded, kept: list[object]) -> structures.Stage:
    """Describes a stage to the compiled part, but for its place; appends to ``kept`` what it points to."""
    if isinstance(stage, (Multiply, Add)):
        values = stage[0]
        if not isinstance(values, Tensor):
            return structures.Stage(_KINDS.index("multiply number"), None, None, values)
        return structures.Stage(_KINDS.index("multiply" if isinstance(stage, Multiply) else "add"), _keep(values, kept))
    if isinstance(stage, MultiplyAdd):
        return structures.Stage(_KINDS.index("multiply add"), *(_keep(values, kept) for values in stage))
    if isinstance(stage, Quantize):
        return structures.Stage(_KINDS.index(f"quantize {stage.bits}"), None, None, *_scale(-stage.position))
    if isinstance(stage, Bounded):
        return structures.Stage(_KINDS.index("bounded"), None, None, stage.scale, stage.positive)
    if isinstance(stage, LeakyRelu):
        return structures.Stage(_KINDS.index("leaky relu"), None, None, stage.slope)
    if isinstance(stage, Clamp):
        return structures.Stage(_KINDS.index("clamp"), None, None, stage.low, stage.high)
    kinds: dict[type, str] = {AddValue: "add value", Relu: "relu", Store: "store"}
    return structures.Stage(_KINDS.index(kinds[type(stage)]))


def _keep(values: Tensor, kept: list[object]) -> int:
    """Returns the address of a copy, longer than there are channels: registers of sixteen are read at once."""
    padded = torch.cat((values.detach(), values.new_zeros(16)))
    kept.append(padded)
    return padded.data_ptr()


def _scale(exponent: int) -> tuple[float, float]:
    """Returns a power of two as two float32 factors; the second is 1 where one is enough."""
    if -126 <= exponent <= 127:
        return math.ldexp(1.0, exponent), 1.0
    return math.ldexp(1.0, exponent // 2), math.ldexp(1.0, exponent - exponent // 2)


def _join_factors(chain: Sequence[Stage]) -> list[Stage]:
    """Puts a power of two at the beginning and the factors that follow it together.

    Of integers, a power of two that overflows nothing is exact. Other elements, scaled, may come near the ends of
    float32's range, where it is not.
    """
    joined: list[Stage] = []
    for stage in chain:
        before = joined[-1] if joined else None
        if (
            len(joined) == 1
            and isinstance(stage, (Multiply, MultiplyAdd))
            and isinstance(before, Multiply)
            and isinstance(before.factors, float)
        ):
            product = stage.factors * before.factors
            power = math.frexp(before.factors)[0] == 0.5 and before.factors <= _EXACT[1]
            if power and _movable(stage.factors) and _movable(product):
                joined[-1] = stage._replace(factors=product)  # type: ignore[arg-type]
                continue
        joined.append(stage)
    return joined


def _scale_constants(stages: list[Stage | Bounded], scale: float) -> tuple[list[Stage | Bounded], float]:
    """Moves the scale of a last ``Bounded`` into the constants before it, where nothing in between needs the elements.

    A power of two commutes with every rounding as long as no number is subnormal.
    """
    made: list[Stage | Bounded] = []
    for i in range(len(stages) - 1, -1, -1):
        stage = stages[i]
        if isinstance(stage, Relu):
            made.append(stage)
            continue
        if isinstance(stage, LeakyRelu) and (stage.slope == 0 or abs(stage.slope) > 2.0**-30):
            made.append(stage)
            continue
        if isinstance(stage, (Multiply, Add, MultiplyAdd)) and all(
            _movable(each) and _movable(each * scale) for each in stage
        ):
            made.append(type(stage)(*(each * scale for each in stage)))  # type: ignore[arg-type]
            if not isinstance(stage, Add):
                return [*stages[:i], *reversed(made)], 1.0
            continue
        break
    return stages, scale


def _movable(constants: Tensor | float) -> bool:
    sizes = constants.abs() if isinstance(constants, Tensor) else torch.tensor([abs(constants)])
    low, high = _EXACT
    return bool(((sizes == 0) | ((sizes >= low) & (sizes <= high))).all())


def _largest(constants: Tensor | float) -> float:
    if not isinstance(constants, Tensor):
        return abs(constants)
    return constants.detach().abs().max().item() if constants.numel() else 0.0

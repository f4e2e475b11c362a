"""The number format of the MLU core: a value is an integer times a power of two.

``value = q * 2**position``, with ``q`` a signed integer of 8, 16 or 31 bits. This is the POSITION form of the vendor's
quantizer (Cambricon CNNL user guide, chapter on fixed-point quantization), the one that training uses.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

BITS = (8, 16, 31)
"""The widths that the core multiplies."""

POSITION_MIN, POSITION_MAX = -128, 127
"""The range of a position in the vendor's format."""

Rounding = Literal["nearest_even", "half_up", "half_away", "stochastic"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

_STORAGE = {8: torch.int8, 16: torch.int16, 31: torch.int32}


class FixedPoint(NamedTuple):
    """A tensor of integers with the format that gives them their value.

    Attributes:
        values: int8, int16 or int32 tensor of any shape; int32 holds 31-bit values.
        bits: width of the format: 8, 16 or 31.
        position: exponent of the step between two neighbouring values.
        finite: False where the float tensor held NaN or infinity; ``values`` are then zeros, and every product with
            this operand is NaN.
    """

    values: Tensor
    bits: int
    position: int
    finite: bool = True


class FixedPointBatch(NamedTuple):
    """A batch of tensors of one width, each with a position of its own.

    Attributes:
        values: int8, int16 or int32 tensor (*batch, ...), as in ``FixedPoint``.
        bits: width of the format: 8, 16 or 31.
        positions: int64 tensor with as many dimensions as ``batch``, each of its size or 1: the exponent of each
            entry's step.
        finite: as in ``FixedPoint``, of the batch as a whole.
    """

    values: Tensor
    bits: int
    positions: Tensor
    finite: bool = True


def storage_dtype(bits: int) -> torch.dtype:
    """Returns the integer dtype that stores values of this width (int8, int16, int32).

    Raises:
        ValueError: if ``bits`` is not 8, 16 or 31.
    """
    check_bits(bits)
    return _STORAGE[bits]


def check_bits(bits: object, name: str = "bits") -> None:
    """Raises ValueError, naming the argument ``name``, unless ``bits`` is 8, 16 or 31."""
    if bits not in BITS or isinstance(bits, (bool, float)):
        number = isinstance(bits, (int, float)) and not isinstance(bits, bool) and math.isfinite(bits)
        hint = f"; the nearest is {min(BITS, key=lambda width: abs(width - bits))}" if number else ""  # type: ignore[operator]
        raise ValueError(f"{name} must be one of 8, 16, 31 (the widths of the MLU core), got {bits!r}{hint}")


def limits(bits: int) -> tuple[int, int]:
    """Returns the smallest and the largest integer of the width: ``-2**(bits-1)`` and ``2**(bits-1) - 1``."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def choose_position(absmax: float, bits: int) -> int:
    """Returns the position at which a tensor with this largest magnitude fills the width.

    ``floor(log2(absmax)) - (bits - 2)``, and 0 for an all-zero tensor (CNNL user guide). The exponent is read with
    frexp: a float logarithm is off by one just below powers of two.

    Args:
        absmax: largest magnitude, finite, at least 0.
        bits: 8, 16 or 31.

    Returns:
        The position, clamped to [-128, 127].
    """
    if absmax == 0:
        return 0
    _, exponent = math.frexp(absmax)  # absmax = m * 2**exponent with m in [0.5, 1)
    return min(max(exponent - 1 - (bits - 2), POSITION_MIN), POSITION_MAX)


def absmax(x: Tensor) -> float:
    """Returns the largest magnitude in ``x`` (0 for an empty tensor; NaN or infinity where ``x`` holds one)."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x.detach())
    return max(-low.item(), high.item()) if not (low.isnan() or high.isnan()) else math.nan


def exponents(x: FixedPoint | FixedPointBatch) -> int | Tensor:
    """Returns the position of an operand, or those of a batch's entries, shaped to broadcast against the values."""
    if isinstance(x, FixedPoint):
        return x.position
    missing = x.values.dim() - x.positions.dim()
    return x.positions.view(x.positions.shape + (1,) * missing) if missing else x.positions


def dequantize(x: FixedPoint | FixedPointBatch) -> Tensor:
    """Returns the float32 values ``q * 2**position``, NaN throughout where the operand was not finite.

    Exact for 8 and 16 bits; 31-bit integers round to float32's 24 bits.
    """
    if not x.finite:
        return torch.full_like(x.values, math.nan, dtype=torch.float32)
    return scale_by_power_of_two(x.values.to(torch.float32), exponents(x))


def powers_of_two(exponent: Tensor) -> Tensor:
    """Returns ``2**exponent`` as float64, for integers in [-1022, 1023].

    Put together from the bits of the format: neither torch's pow nor its exp2 promises exact powers.
    """
    return (exponent.to(torch.int64) + 1023 << 52).view(torch.float64)


def is_float32_exponent(exponent: int | Tensor) -> bool:
    """Says whether ``2**exponent`` is a normal float32, of a tensor of exponents for each of them."""
    if not isinstance(exponent, Tensor):
        return -126 <= exponent <= 127
    return exponent.numel() == 0 or (int(exponent.min()) >= -126 and int(exponent.max()) <= 127)


def scale_by_power_of_two(x: Tensor, exponent: int | Tensor) -> Tensor:
    """Multiplies a float32 tensor by ``2**exponent`` in place, with at most one rounding (into the subnormals).

    A tensor of exponents broadcasts against ``x``. Exponents outside float32's own range go through float64, where the
    product is exact.
    """
    if not isinstance(exponent, Tensor) and exponent == 0:
        return x
    factor = powers_of_two(exponent) if isinstance(exponent, Tensor) else 2.0**exponent
    if is_float32_exponent(exponent):
        return x.mul_(factor.to(torch.float32) if isinstance(factor, Tensor) else factor)
    return x.copy_(x.to(torch.float64).mul_(factor))

"""Batches of matrices, as attention multiplies them: each entry at a position of its own, or all at one.

The compiled part takes a batch in one call. On torch alone small entries go together into a float product that is
exact, large ones one by one.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..fixed_point import (
    POSITION_MAX,
    POSITION_MIN,
    ROUNDINGS,
    FixedPoint,
    FixedPointBatch,
    exponents,
    scale_by_power_of_two,
    storage_dtype,
)
from . import native, reference, tiles
from .native.structures import FloatBatch
from .products import multiply_into, product_sums, round_into
from .profiling import count_matmul, profiled, timed
from .quantization import lines_of, sum_of_magnitudes

# Multiplications from which an entry is worth calls of its own.
_LARGE_ENTRY = 1 << 22
# Elements of operands and results taken at a time on torch alone, so that temporaries stay in the cache.
_BLOCK = 1 << 19
# The longest K whose int8 sums float32 holds.
_FLOAT32_K = 1024


class BatchStatistics(NamedTuple):
    """What quantization finds in each entry of a batch.

    Attributes:
        absmax: float64 (*batch,), largest magnitudes; NaN or infinity where an entry holds one.
        sum_x: float64 (*batch,), sums of |x|, where measured.
        sum_q: int64 (*batch,), sums of |q|, where measured.
    """

    absmax: Tensor
    sum_x: Tensor | None = None
    sum_q: Tensor | None = None


@profiled(count_matmul)
def batched_matmul(
    a: FixedPoint | FixedPointBatch,
    b: FixedPoint | FixedPointBatch,
    *,
    exact_int31: bool = False,
    dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Tensor:
    """Multiplies a batch of matrices.

    Args:
        a: integers (*batch, M, K) of any strides, such as heads that lie side by side; ``batch`` is any number of
            dimensions.
        b: integers (*batch, K, N), likewise. What several entries share may be expanded along them.
        exact_int31: whether 31-bit operands multiply exactly where the compiled part does not serve.
        dtype: of the result, rounded to it from float32.
        name: what a profile calls the product.

    Returns:
        ``dtype`` (*batch, M, N), contiguous; NaN throughout where an operand is not finite.

    Raises:
        ValueError: where the shapes do not go together.
    """
    shape = _result_shape(a, b)
    if not (a.finite and b.finite):
        return torch.full(shape, math.nan, dtype=dtype)
    if 0 in shape:
        return torch.zeros(shape, dtype=dtype)
    if tiles.serve(a, b):
        return tiles.batched_matmul(a, b, dtype)
    return _multiply_on_torch(a, b, shape, exact_int31).to(dtype)


@timed("quantize")
def quantize_batch(
    x: Tensor,
    bits: int,
    positions: Tensor | None = None,
    rounding: str = "nearest_even",
    *,
    batch_dims: int = 1,
    seed: int = 0,
    stream: int = 0,
    measure: bool = False,
) -> tuple[FixedPointBatch, BatchStatistics]:
    """Quantizes each entry of a batch at a position of its own, as ``reference.quantize_batch`` does.

    Args:
        x: float tensor (*batch, ...) of any strides, read as float32; it may hold NaN or infinity.
        bits: 8, 16 or 31.
        positions: integers that broadcast to ``batch``, in [-128, 127]; None chooses for each entry the one that fits
            its largest magnitude.
        rounding: as in ``reference.quantize``; random numbers go by the element's index in the whole batch.
        batch_dims: how many dimensions ``batch`` has.
        seed: as in ``reference.quantize``.
        stream: likewise.
        measure: also sum the magnitudes before and after.

    Returns:
        The batch, its entries one behind the other in memory, zeros and marked as not finite where ``x`` is not; and
        its statistics.

    Raises:
        ValueError: for an unknown width or rounding, positions out of range or of another shape, and more batch
            dimensions than ``x`` has.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be nearest_even, half_up, half_away or stochastic, got {rounding!r}")
    if not 0 <= batch_dims <= x.dim():
        raise ValueError(f"batch_dims must be in [0, {x.dim()}] for a tensor of {x.dim()} dimensions, got {batch_dims}")
    integer, batch = storage_dtype(bits), x.shape[:batch_dims]
    given = None if positions is None else _given_positions(positions, batch)
    source = x.detach()
    library = native.library()
    if source.dtype != torch.float32 and not (source.dtype == torch.bfloat16 and library is not None):
        source = source.to(torch.float32)
    order = list(range(batch_dims, x.dim()))
    if rounding != "stochastic":  # which goes by logical index, not by place in memory
        order.sort(key=source.stride, reverse=True)
    source = source.permute(*range(batch_dims), *order)
    key = (rounding, seed, stream, measure)
    if library is not None:
        out = native.empty(source.shape, integer)
        chosen, found = _quantize_compiled(library, source, out, bits, given, batch, *key)
    else:
        out = torch.empty(source.shape, dtype=integer)
        chosen, found = _quantize_on_torch(source, out, bits, given, batch, *key)
    finite = bool(found.absmax.isfinite().all())
    if not finite:
        out.zero_()
    back = [batch_dims + order.index(dim) for dim in range(batch_dims, x.dim())]
    return FixedPointBatch(out.permute(*range(batch_dims), *back), bits, chosen, finite), found


def _result_shape(a: FixedPoint | FixedPointBatch, b: FixedPoint | FixedPointBatch) -> tuple[int, ...]:
    left, right = tuple(a.values.shape), tuple(b.values.shape)
    if min(len(left), len(right)) < 2 or left[:-2] != right[:-2] or left[-1] != right[-2]:
        raise ValueError(
            f"a batched product takes (*batch, M, K) by (*batch, K, N), got {left} by {right}; "
            "expand what several entries share"
        )
    for x in (a, b):
        if isinstance(x, FixedPointBatch):
            sizes, batch = tuple(x.positions.shape), left[:-2]
            if len(sizes) != len(batch) or any(p not in (1, n) for p, n in zip(sizes, batch, strict=True)):
                raise ValueError(f"positions must have the sizes of the batch {batch}, or 1, got {sizes}")
    return (*left[:-1], right[-1])


def _multiply_on_torch(
    a: FixedPoint | FixedPointBatch, b: FixedPoint | FixedPointBatch, shape: tuple[int, ...], exact_int31: bool
) -> Tensor:
    *batch, m, n = shape
    k = a.values.shape[-1]
    exponent = exponents(a) + exponents(b)
    if isinstance(exponent, Tensor):
        exponent = exponent.expand(*batch, 1, 1).reshape(-1, 1, 1)
    # The batch as one dimension: a copy where it is not, of integers.
    entries = math.prod(batch)
    left, right = a.values.reshape(entries, m, k), b.values.reshape(entries, k, n)
    out = native.empty((entries, m, n), torch.float32)
    together = max(1, _BLOCK // (m * k + k * n + m * n)) if m * k * n < _LARGE_ENTRY else 1
    for first in range(0, entries, together):
        block = slice(first, first + together)
        step = exponent[block] if isinstance(exponent, Tensor) else exponent
        if m * k * n >= _LARGE_ENTRY:
            formats = FixedPoint(left, a.bits, int(step)), FixedPoint(right, b.bits, 0)
            multiply_into(out[first], left[first], right[first], *formats, None, exact_int31)
        elif a.bits == b.bits == 8 and k <= _FLOAT32_K:
            _multiply_in_float32(out[block], left[block], right[block])
            scale_by_power_of_two(out[block], step)
        else:
            round_into(out[block], product_sums(left[block], right[block], a.bits, b.bits, exact_int31))
            scale_by_power_of_two(out[block], step)
    return out.view(shape)


def _multiply_in_float32(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Multiplies int8 batches of K up to 1024 exactly.

    A product is at most 2**14, so that every partial sum, in whatever order, is an integer up to 1024 * 2**14 = 2**24:
    float32 holds all of these. Matrix units that read bfloat16 or TF32 (``torch.set_float32_matmul_precision``) change
    nothing, for both hold int8; autocast, which would round the sums, leaves calls with ``out`` alone.
    """
    torch.bmm(a.to(torch.float32), b.to(torch.float32), out=out)
    out.add_(0.0)  # were the sum of one product -0


def _given_positions(positions: Tensor, batch: torch.Size) -> Tensor:
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"positions must be integers, got {positions.dtype}")
    try:
        given = positions.to(torch.int64).expand(batch).contiguous()
    except RuntimeError:
        sizes = tuple(positions.shape)
        raise ValueError(f"positions must broadcast to the batch {tuple(batch)}, got {sizes}") from None
    if given.numel() and (given.min() < POSITION_MIN or given.max() > POSITION_MAX):
        raise ValueError(f"positions must be in [{POSITION_MIN}, {POSITION_MAX}], got {given.min()} to {given.max()}")
    return given


def _quantize_compiled(
    library: ctypes.CDLL,
    source: Tensor,
    out: Tensor,
    bits: int,
    given: Tensor | None,
    batch: torch.Size,
    rounding: str,
    seed: int,
    stream: int,
    measure: bool,
) -> tuple[Tensor, BatchStatistics]:
    dims = len(batch)
    lines = lines_of(source.shape[dims:], source.stride()[dims:])
    if lines is None:
        source = source.contiguous()
        lines = (1, math.prod(source.shape[dims:]), 0)
    places = native.places(source, dims)
    job = FloatBatch(source.data_ptr(), source.itemsize, len(places), places.data_ptr(), *lines)
    found = native.quantize_batch(library, job, out, bits, given, rounding, seed, stream, measure)
    sums = (found["sum_x"].view(batch), found["sum_q"].view(batch)) if measure else ()
    return found["position"].view(batch), BatchStatistics(found["absmax"].view(batch), *sums)


def _quantize_on_torch(
    source: Tensor,
    out: Tensor,
    bits: int,
    given: Tensor | None,
    batch: torch.Size,
    rounding: str,
    seed: int,
    stream: int,
    measure: bool,
) -> tuple[Tensor, BatchStatistics]:
    size, inner = math.prod(batch), math.prod(source.shape[len(batch) :])
    entries, integers = source.reshape(size, inner), out.view(size, inner)
    absmax = torch.zeros(size, dtype=torch.float32)
    if inner:
        low, high = entries.aminmax(dim=1)
        absmax = torch.maximum(-low, high)
    if given is None:
        positions = torch.frexp(absmax).exponent.to(torch.int64) - 1 - (bits - 2)
        positions = positions.clamp_(POSITION_MIN, POSITION_MAX).masked_fill_((absmax == 0) | ~absmax.isfinite(), 0)
    else:
        positions = given.reshape(size)
    found = BatchStatistics(absmax.to(torch.float64).view(batch))
    if not absmax.isfinite().all():
        return positions.view(batch), found
    together = max(1, _BLOCK // max(1, inner))
    for first in range(0, size, together):
        block = slice(first, first + together)
        piece, position = entries[block], positions[block].unsqueeze(1)
        integers[block] = reference.quantize(
            piece, bits, position, rounding, seed=seed, stream=stream, start=first * inner
        )
    if measure:
        sum_x = torch.tensor([sum_of_magnitudes(entry) for entry in entries], dtype=torch.float64)
        sum_q = torch.tensor([int(sum_of_magnitudes(entry)) for entry in integers], dtype=torch.int64)
        found = found._replace(sum_x=sum_x.view(batch), sum_q=sum_q.view(batch))
    return positions.view(batch), found

"""Quantization on the CPU, bit-equal to ``reference.quantize``, with the statistics that the adaptive algorithm needs.

The compiled part does it in one pass over the tensor; without it torch does, in blocks that stay in the cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..fixed_point import ROUNDINGS, FixedPoint, FixedPointBatch, absmax, choose_position, limits, storage_dtype
from . import native, reference
from .native import Statistics
from .native.structures import FloatBatch
from .profiling import timed

# Elements quantized at a time: the float32 block stays in the processor's second-level cache.
_QUANTIZE_BLOCK = 1 << 18
# Elements side by side from which reading them in place is no slower than copying them first.
_SHORTEST_LINE = 16


class Shares(NamedTuple):
    """What a format does not hold of a tensor, as shares of all its values.

    Attributes:
        saturation: of the values whose integer is the smallest or the largest of the format: those beyond the limits,
            which saturate, and those that round to a limit by themselves.
        underflow: of the values that are not zero and whose integer is: to nearest, those below half a step.
    """

    saturation: float
    underflow: float


@timed("quantize")
def quantize(
    x: Tensor, bits: int, position: int, rounding: str = "nearest_even", *, seed: int = 0, stream: int = 0
) -> Tensor:
    """Quantizes finite floats, as ``reference.quantize`` does; keeps the memory layout of ``x``."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be nearest_even, half_up, half_away or stochastic, got {rounding!r}")
    source, out = _prepare(x, bits, rounding)
    library = native.library()
    if library is not None:
        native.quantize(library, source, out, bits, position, rounding, seed, stream, False)
    else:
        _quantize_blocks(source, out, bits, position, rounding, seed, stream)
    return _restore_layout(out, x)


@timed("quantize")
def quantize_measured(
    x: Tensor,
    bits: int,
    position: int | None,
    rounding: str = "nearest_even",
    *,
    seed: int = 0,
    stream: int = 0,
    start: int = 0,
    measure: bool = False,
    channel_dim: int | None = None,
    with_checksum: bool = False,
) -> tuple[FixedPoint, Statistics]:
    """Quantizes a tensor that may hold NaN or infinity, and says what it found.

    Args:
        x: float tensor of any shape, read as float32.
        bits: 8, 16 or 31.
        position: exponent of the step; None chooses the one that fits the largest magnitude.
        rounding: as in ``reference.quantize``.
        seed: likewise.
        stream: likewise.
        start: likewise.
        measure: also sum the magnitudes before and after.
        channel_dim: also sum ``x`` over all dimensions but this one.
        with_checksum: also take the checksum of ``x``, which is float32 then.

    Returns:
        The operand, zeros and marked as not finite where ``x`` is not, and its statistics.
    """
    asked = measure or with_checksum or channel_dim is not None
    if position is not None and not asked and not start and not _is_dense(x):
        quantized = _quantize_where_it_lies(x, bits, position, rounding)
        if quantized is not None:
            return quantized
    source, out = _prepare(x, bits, rounding)
    library = native.library()
    if library is not None:
        found = native.quantize(
            library,
            source,
            out,
            bits,
            position,
            rounding,
            seed,
            stream,
            measure,
            _summed_dim(source, channel_dim),
            with_checksum and source.data_ptr() == x.data_ptr(),
            start,
        )
    else:
        largest = absmax(source)
        if position is None:
            position = choose_position(largest, bits) if math.isfinite(largest) else 0
        found = Statistics(largest, position)
        if math.isfinite(largest):
            _quantize_blocks(source, out, bits, position, rounding, seed, stream, start)
            if measure:
                found = Statistics(largest, position, sum_of_magnitudes(source), sum_of_magnitudes(out))
    if channel_dim is not None and found.channel_sums is None:
        found = found._replace(channel_sums=channel_sums(source.to(torch.float32), channel_dim))
    if with_checksum and found.checksum is None:
        found = found._replace(checksum=checksum(x))
    finite = math.isfinite(found.absmax)
    if not finite:
        out.zero_()
    return FixedPoint(_restore_layout(out, x), bits, found.position, finite), found


def channel_sums(x: Tensor, channel_dim: int) -> Tensor:
    """Sums over all dimensions but one, in the dtype of ``x``."""
    others = [dim for dim in range(x.dim()) if dim != channel_dim]
    return x.sum(others) if others else x


def _summed_dim(source: Tensor, dim: int | None) -> int | None:
    """Returns ``dim`` where the compiled part can sum its channels: the others lie around it in whole."""
    if dim is None or source.numel() == 0:
        return None
    order = sorted(range(source.dim()), key=source.stride)
    inner = math.prod(source.shape[other] for other in order[: order.index(dim)])
    return dim if source.stride(dim) == inner or source.shape[dim] == 1 else None


@timed("adapt")
def saturated_share(x: FixedPoint | FixedPointBatch) -> float:
    """Returns the share of values at the limits of the format, in [0, 1]; 0 for an empty tensor."""
    if x.values.numel() == 0:
        return 0.0
    values = _flat(x.values)
    least, largest = torch.aminmax(values)  # far quicker than to count, and few tensors reach a limit
    reached = [limit for limit, most in zip(limits(x.bits), (least, largest), strict=True) if most.item() == limit]
    return sum(int(values.eq(limit).count_nonzero()) for limit in reached) / values.numel()


def shares(x: Tensor, quantized: FixedPoint | FixedPointBatch) -> Shares:
    """Returns what of ``x``, float of any shape, is at either end of the format that it was quantized in.

    Both shares are in [0, 1], 0 for an empty tensor, and NaN where ``x`` holds NaN or infinity.
    """
    if not quantized.finite:
        return Shares(math.nan, math.nan)
    # Zero is zero in every format and rounding, so that the zeros that are too many underflowed.
    left = int(_flat(quantized.values).count_nonzero())
    lost = int(_flat(x.detach()).count_nonzero()) - left if left < x.numel() else 0
    return Shares(saturated_share(quantized), lost / max(x.numel(), 1))


def losses(x: Tensor, rounded: Tensor, distance: int, inverse: float) -> tuple[float, int, list[int]]:
    """Returns what is lost of every value at this distance, and how large those are.

    Args:
        x: float32, flat, contiguous, finite.
        rounded: its integers, or floats that these stand for, likewise.
        distance: from one value to the next.
        inverse: 1 / step of the integers.

    Returns:
        The sum of the squares of the differences, in steps; how many values are not zero and became zero; how many
        have each exponent as float32 stores it, of which 0 is that of zeros and subnormals.
    """
    library = native.library()
    if library is not None and not rounded.is_floating_point():
        return native.losses(library, x, rounded, distance, inverse)
    x, rounded = x[::distance].contiguous(), rounded[::distance]
    errors = x.double().mul_(inverse)
    errors.sub_(rounded, alpha=inverse if rounded.is_floating_point() else 1)
    # Zero is zero in every format and rounding, so that the zeros that are too many underflowed.
    underflown = int(x.count_nonzero()) - int(rounded.count_nonzero())
    exponents = (x.view(torch.int32) >> 23).bitwise_and_(255)
    return torch.dot(errors, errors).item(), underflown, torch.bincount(exponents, minlength=256).tolist()


@timed("quantize")
def checksum(x: Tensor) -> int:
    """Returns a number that any single change of a float32 tensor, and any change of order, alters.

    The sum of ``bits[i] * (2 * i + 1)`` modulo 2**64, over the elements in memory order.
    """
    dense = x.detach()
    dense = dense if _is_dense(dense) else dense.contiguous()
    library = native.library()
    if library is not None:
        return library.cnmix_checksum(dense.data_ptr(), dense.numel())
    bits = _in_memory_order(dense).view(torch.int32)
    total = 0
    for start in range(0, bits.numel(), _QUANTIZE_BLOCK):
        piece = bits[start : start + _QUANTIZE_BLOCK].to(torch.int64) & 0xFFFFFFFF
        total += int((piece * torch.arange(2 * start + 1, 2 * (start + piece.numel()), 2)).sum())
    return total % 2**64


def sum_of_magnitudes(x: Tensor) -> float:
    """Sums |x| of floats or integers, in an order that does not depend on the number of threads.

    Rows of fixed length are summed each by one thread, then the row sums, which are too few to be split. Integers sum
    exactly, floats in float64; a row of 4096 int8 magnitudes stays below float32's 2**24.
    """
    flat, row = x.detach().reshape(-1), 4096
    summed = torch.float32 if x.dtype == torch.int8 else torch.float64
    total = 0.0
    for start in range(0, flat.numel(), row * 64):
        # |-128| is no int8: convert first.
        piece = flat[start : start + row * 64].to(summed).abs()
        whole = piece.numel() // row * row
        total += piece[:whole].view(-1, row).sum(1).sum(dtype=torch.float64).item()
        total += piece[whole:].sum(dtype=torch.float64).item()
    return total


def _quantize_where_it_lies(x: Tensor, bits: int, position: int, rounding: str) -> tuple[FixedPoint, Statistics] | None:
    """Quantizes a part of other memory, such as the query in a product with key and value, without copying it first.

    Returns:
        The operand, its dimensions in the order of memory that ``x`` has, and its largest magnitude; None where the
        compiled part does not read it.
    """
    library = native.library()
    if library is None or x.dtype not in (torch.float32, torch.bfloat16) or rounding == "stochastic" or not x.numel():
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    source = x.detach().permute(order)
    shapes = ((dims, lines_of(source.shape[dims:], source.stride()[dims:])) for dims in range(x.dim()))
    dims, lines = next((dims, lines) for dims, lines in shapes if lines is not None)
    if lines[1] < _SHORTEST_LINE:
        return None
    out, batch = native.empty(source.shape, storage_dtype(bits)), source.shape[:dims]
    places = native.places(source, dims)
    job = FloatBatch(source.data_ptr(), source.itemsize, len(places), places.data_ptr(), *lines)
    found = native.quantize_batch(library, job, out, bits, torch.full(batch, position), rounding, 0, 0, False)
    largest = float(found["absmax"].max())
    finite = math.isfinite(largest)
    if not finite:
        out.zero_()
    out = out.permute([order.index(dim) for dim in range(x.dim())])
    return FixedPoint(out, bits, position, finite), Statistics(largest, position)


def _prepare(x: Tensor, bits: int, rounding: str) -> tuple[Tensor, Tensor]:
    """Returns dense memory with the values of ``x``, and memory of the same layout for the integers.

    The values are float32, or bfloat16 where the compiled part reads that.
    """
    source = x.detach()
    read_as_it_is = source.dtype == torch.bfloat16 and native.library() is not None
    if source.dtype != torch.float32 and not read_as_it_is:
        source = source.to(torch.float32)
    if not source.is_contiguous() and (rounding == "stochastic" or not _is_dense(source)):
        # Random numbers go by logical index, not by place in memory.
        source = source.contiguous()
    return source, native.empty(source.shape, storage_dtype(bits), source.stride())


def lines_of(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Returns rows, columns and row stride of a tensor whose memory is rows at one distance, else None."""
    left = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    columns = rows = 1
    while left and left[-1][1] == columns:
        columns *= left.pop()[0]
    if not left:
        return 1, columns, 0
    stride = left[-1][1]
    while left and left[-1][1] == stride * rows:
        rows *= left.pop()[0]
    return None if left else (rows, columns, stride)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of the dimensions."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def _restore_layout(out: Tensor, x: Tensor) -> Tensor:
    """Gives the integers the strides that ``empty_like(x)`` has."""
    if out.stride() == x.stride() or x.is_contiguous():
        return out
    like = torch.empty_like(x, dtype=out.dtype)
    return out if like.stride() == out.stride() else like.copy_(out)


def _quantize_blocks(
    source: Tensor, out: Tensor, bits: int, position: int, rounding: str, seed: int, stream: int, first: int = 0
) -> None:
    flat, flat_out = _in_memory_order(source), _in_memory_order(out)
    low, high = limits(bits)
    buffer = torch.empty(min(_QUANTIZE_BLOCK, flat.numel()), dtype=torch.float32)
    for start in range(0, flat.numel(), _QUANTIZE_BLOCK):
        piece = flat[start : start + _QUANTIZE_BLOCK]
        target = flat_out[start : start + _QUANTIZE_BLOCK]
        if rounding != "nearest_even":
            at = first + start
            rounded = reference.quantize(piece, bits, position, rounding, seed=seed, stream=stream, start=at)
            target.copy_(rounded)
            continue
        block = buffer[: piece.numel()]
        if abs(position) <= 126:
            torch.mul(piece, 2.0**-position, out=block)
        else:  # 2**-position is no normal float32; the two steps are exact
            torch.mul(piece, 2.0 ** (-position // 2), out=block).mul_(2.0 ** (-position - -position // 2))
        block.round_()
        if bits == 31:  # 2**30 - 1 is no float32: clamp to 2**30 first, and to the limit as an integer
            target.copy_(block.clamp_(low, -low)).clamp_(max=high)
        else:
            target.copy_(block.clamp_(low, high))


def _flat(x: Tensor) -> Tensor:
    """Returns the elements in the order of memory where that makes a view, else as they are."""
    if x.is_contiguous():
        return x.view(-1)
    return _in_memory_order(x) if _is_dense(x) else x


def _in_memory_order(x: Tensor) -> Tensor:
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).view(-1)

"""The emulated core on torch's own CPU kernels, bit-equal to ``reference``.

int8 products run on the integer kernel. Wider ones run in float64 on integer values: exact wherever every sum stays
below 2**53, and cut along K where it might not. int31 by default rounds its sums to float64 (normwise error below
1e-14); its exact mode multiplies 16-bit halves. A convolution is its windows gathered into a matrix, then a product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..fixed_point import ROUNDINGS, FixedPoint, limits, scale_by_power_of_two, storage_dtype
from . import reference
from .int8_product import int8_matmul
from .reference import output_size

# Elements quantized at a time: the float32 block stays in the processor's second-level cache.
_QUANTIZE_BLOCK = 1 << 18
# Elements gathered or widened at a time, so that temporaries stay small whatever the batch.
_MATRIX_BLOCK = 1 << 22

Sums = dict[int, Tensor]
"""Integer sums as ``sum(tensor * 2**shift)``: one int32, int64 or float64 tensor at shift 0, or three int64 tensors."""


def quantize(
    x: Tensor, bits: int, position: int, rounding: str = "nearest_even", *, seed: int = 0, stream: int = 0
) -> Tensor:
    """Quantizes finite floats, as ``reference.quantize`` does; keeps the memory layout of ``x``."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be nearest_even, half_up, half_away or stochastic, got {rounding!r}")
    source = x.detach()
    if source.dtype != torch.float32:
        source = source.to(torch.float32)
    if rounding == "stochastic" and not source.is_contiguous():
        # Random numbers go by logical index, not by place in memory.
        flat_out = quantize(source.contiguous(), bits, position, rounding, seed=seed, stream=stream)
        return torch.empty_like(source, dtype=flat_out.dtype).copy_(flat_out)
    out = torch.empty_like(source, dtype=storage_dtype(bits))
    order = sorted(range(source.dim()), key=source.stride, reverse=True)
    flat, flat_out = source.permute(order).reshape(-1), out.permute(order)
    if not flat_out.is_contiguous():  # overlapping or gapped strides: take the logical order
        flat, out = source.reshape(-1), torch.empty(source.shape, dtype=out.dtype)
        flat_out = out
    flat_out = flat_out.view(-1)
    low, high = limits(bits)
    buffer = torch.empty(min(_QUANTIZE_BLOCK, flat.numel()), dtype=torch.float32)
    for start in range(0, flat.numel(), _QUANTIZE_BLOCK):
        piece = flat[start : start + _QUANTIZE_BLOCK]
        target = flat_out[start : start + _QUANTIZE_BLOCK]
        if rounding != "nearest_even":
            target.copy_(reference.quantize(piece, bits, position, rounding, seed=seed, stream=stream, start=start))
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
    return out


def matmul(a: FixedPoint, b: FixedPoint, *, exact_int31: bool = False) -> Tensor:
    """Multiplies matrices: (M, K) by (K, N) gives float32 (M, N)."""
    m, k = a.values.shape
    out = torch.empty((m, b.values.shape[1]), dtype=torch.float32)
    if not (a.finite and b.finite):
        return out.fill_(math.nan)
    rows = max(m, 1) if a.bits == b.bits == 8 else max(1, _MATRIX_BLOCK // max(k, 1))
    right = b.values if a.bits == b.bits == 8 or exact_int31 else b.values.to(torch.float64)
    for start in range(0, m, rows):
        piece = out[start : start + rows]
        _round_into(piece, _sums(a.values[start : start + rows], right, a.bits, b.bits, exact_int31))
    return scale_by_power_of_two(out, a.position + b.position)


def convolution(
    x: FixedPoint,
    weight: FixedPoint,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    exact_int31: bool = False,
) -> Tensor:
    """Convolves (N, C, *spatial) with (O, C / groups, *kernel); float32 (N, O, *output) in the layout of ``x``."""
    size = output_size(x.values.shape[2:], weight.values.shape[2:], stride, padding, dilation)
    placed = _place(x.values, padding, padding, [1] * len(size))
    # (O, C / groups, *kernel) -> (groups, kernel taps * C / groups, O / groups)
    matrix = weight.values.unflatten(0, (groups, -1)).movedim(2, -1).flatten(2).transpose(1, 2)
    out = _correlate(placed, matrix, x, weight, size, weight.values.shape[2:], stride, dilation, exact_int31)
    return _like_layout(out, x.values)


def convolution_grad_input(
    grad_output: FixedPoint,
    weight: FixedPoint,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    exact_int31: bool = False,
) -> Tensor:
    """Returns the gradient of a convolution's input, float32 of shape ``input_size`` in the layout of ``grad_output``.

    The transposed convolution as a plain one: grad_output spread out by the stride, kernel taps in reverse order.
    """
    kernel = weight.values.shape[2:]
    spatial = tuple(input_size)[2:]
    before = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    after = [
        n - 1 - (g - 1) * s + p
        for n, g, s, p in zip(spatial, grad_output.values.shape[2:], stride, padding, strict=True)
    ]
    placed = _place(grad_output.values, before, after, stride)
    flipped = weight.values.flip(list(range(2, weight.values.dim())))
    # (O, C / groups, *kernel) -> (groups, kernel taps * O / groups, C / groups)
    matrix = flipped.unflatten(0, (groups, -1)).movedim(1, -1).movedim(1, -1).flatten(1, -2)
    ones = [1] * len(kernel)
    out = _correlate(placed, matrix, grad_output, weight, spatial, kernel, ones, dilation, exact_int31)
    return _like_layout(out, grad_output.values)


def convolution_grad_weight(
    grad_output: FixedPoint,
    x: FixedPoint,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    exact_int31: bool = False,
) -> Tensor:
    """Returns the gradient of a convolution's weight, float32 of shape ``weight_size`` = (O, C / groups, *kernel)."""
    out_channels, in_channels, *kernel = weight_size
    if not (grad_output.finite and x.finite):
        return torch.full(tuple(weight_size), math.nan)
    size = grad_output.values.shape[2:]
    placed = _place(x.values, padding, padding, [1] * len(kernel))
    total: Sums = {0: torch.zeros((groups, out_channels // groups, math.prod(kernel) * in_channels), dtype=torch.int64)}
    for batch in _batches(placed, size, kernel):
        left = grad_output.values[batch].movedim(1, -1).reshape(-1, groups, out_channels // groups)
        columns = _gather(placed[batch], size, kernel, stride, dilation, groups)
        part = _grouped_sums(left.permute(1, 2, 0), columns, grad_output.bits, x.bits, exact_int31)
        total = {shift: total[shift] + part[shift] if shift in total else part[shift] for shift in part}
    rounded = torch.empty(total[0].shape, dtype=torch.float32)
    _round_into(rounded, total)
    scale_by_power_of_two(rounded, grad_output.position + x.position)
    # (groups, O / groups, kernel taps * C / groups) -> (O, C / groups, *kernel)
    return rounded.view(out_channels, *kernel, in_channels).movedim(-1, 1).contiguous()


def _correlate(
    placed: Tensor,
    matrix: Tensor,
    a: FixedPoint,
    b: FixedPoint,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    exact_int31: bool,
) -> Tensor:
    """Multiplies the windows of (N, *padded, C) by ``matrix`` (groups, K, O); float32 (N, *size, groups * O)."""
    groups, _, out_channels = matrix.shape
    out = torch.empty((placed.shape[0], *size, groups * out_channels), dtype=torch.float32)
    if not (a.finite and b.finite):
        return out.fill_(math.nan)
    for batch in _batches(placed, size, kernel):
        columns = _gather(placed[batch], size, kernel, stride, dilation, groups)
        part = _grouped_sums(columns, matrix, a.bits, b.bits, exact_int31)
        target = out[batch].view(-1, groups, out_channels).transpose(0, 1)
        _round_into(target, part)
    return scale_by_power_of_two(out, a.position + b.position)


def _batches(placed: Tensor, size: Sequence[int], kernel: Sequence[int]) -> list[slice]:
    """Cuts the batch so that one piece's windows hold about ``_MATRIX_BLOCK`` elements."""
    images = max(1, _MATRIX_BLOCK // max(1, math.prod(size) * math.prod(kernel) * placed.shape[-1]))
    return [slice(start, start + images) for start in range(0, placed.shape[0], images)]


def _place(x: Tensor, before: Sequence[int], after: Sequence[int], step: Sequence[int]) -> Tensor:
    """Copies (N, C, *spatial) into zeros, channels last, ``step`` apart; negative padding cuts off.

    Returns:
        (N, *padded, C), where ``padded = before + (spatial - 1) * step + 1 + after``.
    """
    channels_last = x.movedim(1, -1)
    if not any(before) and not any(after) and all(s == 1 for s in step):
        return channels_last.contiguous()
    spread = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], step, strict=True)]
    size = [max(b, 0) + n + max(a, 0) for b, n, a in zip(before, spread, after, strict=True)]
    out = x.new_zeros((x.shape[0], *size, x.shape[1]))
    inside = out
    for dim, (b, n, s) in enumerate(zip(before, spread, step, strict=True), start=1):
        inside = inside.narrow(dim, max(b, 0), n)[(slice(None),) * dim + (slice(None, None, s),)]
    inside.copy_(channels_last)
    for dim, (b, a) in enumerate(zip(before, after, strict=True), start=1):
        out = out.narrow(dim, max(-b, 0), out.shape[dim] - max(-b, 0) - max(-a, 0))
    return out


def _gather(
    placed: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gathers the windows of (N, *padded, C) into a matrix per group: (groups, N * positions, taps * C / groups)."""
    dtype, run = placed.dtype, placed.shape[-1] // groups
    for wide in (torch.int64, torch.int32, torch.int16):
        # The channels of a tap lie side by side: copy as many of them as one word takes.
        ratio = wide.itemsize // dtype.itemsize
        if ratio > 1 and run % ratio == 0 and placed.storage_offset() % ratio == 0 and placed.is_contiguous():
            # view(dtype) also checks the strides of dimensions of size 1, which is_contiguous() passes over.
            fresh = placed.as_strided(placed.shape, _row_major(placed.shape)).view(wide)
            columns = _gather(fresh, size, kernel, stride, dilation, groups)
            if columns.stride() != _row_major(columns.shape):
                columns = torch.empty(columns.shape, dtype=wide).copy_(columns)
            return columns.view(dtype)
    images, channels = placed.shape[0], placed.shape[-1]
    steps = placed.stride()[1:-1]
    windows = placed.as_strided(
        (images, *size, *kernel, groups, channels // groups),
        (
            placed.stride(0),
            *(step * s for step, s in zip(steps, stride, strict=True)),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
            placed.stride(-1) * (channels // groups),
            placed.stride(-1),
        ),
    )
    spatial = len(kernel)
    by_group = windows.movedim(1 + 2 * spatial, 0)
    return by_group.reshape(groups, images * math.prod(size), math.prod(kernel) * (channels // groups))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _like_layout(out: Tensor, like: Tensor) -> Tensor:
    """Turns (N, *spatial, C) into (N, C, *spatial), in memory as ``like`` is: channels last or contiguous."""
    result = out.movedim(-1, 1)
    channels_last = like.dim() > 3 and not like.is_contiguous() and like.movedim(1, -1).is_contiguous()
    return result if channels_last else result.contiguous()


def _grouped_sums(a: Tensor, b: Tensor, a_bits: int, b_bits: int, exact_int31: bool) -> Sums:
    """Multiplies (groups, M, K) by (groups, K, N)."""
    if a.shape[0] == 1:
        return {shift: part.unsqueeze(0) for shift, part in _sums(a[0], b[0], a_bits, b_bits, exact_int31).items()}
    # Many small int8 products cost more in calls than one batched float64 product does in arithmetic.
    if a_bits == b_bits == 8 and a.shape[1] * a.shape[2] * b.shape[2] >= 1 << 18:
        return {0: torch.stack([int8_matmul(a[g], b[g]) for g in range(a.shape[0])])}
    return _sums(a, b, a_bits, b_bits, exact_int31)


def _sums(a: Tensor, b: Tensor, a_bits: int, b_bits: int, exact_int31: bool) -> Sums:
    """Multiplies (..., M, K) by (..., K, N) into exact sums, or float64 ones in int31's default mode."""
    if a_bits == b_bits == 8 and a.dim() == 2:
        return {0: int8_matmul(a, b)}
    if max(a_bits, b_bits) < 31:
        return {0: _exact_float64_matmul(a, b, a_bits + b_bits - 2)}
    if not exact_int31:
        return {0: torch.matmul(a.to(torch.float64), b.to(torch.float64))}
    total: Sums = {}
    for a_shift, a_part in _halves(a, a_bits):
        for b_shift, b_part in _halves(b, b_bits):
            part = _exact_float64_matmul(a_part, b_part, 32)
            shift = a_shift + b_shift
            total[shift] = total[shift] + part if shift in total else part
    return total


def _halves(values: Tensor, bits: int) -> list[tuple[int, Tensor]]:
    return [(16, values >> 16), (0, values & 0xFFFF)] if bits == 31 else [(0, values)]


def _exact_float64_matmul(a: Tensor, b: Tensor, product_bits: int) -> Tensor:
    """Multiplies integers with products up to ``2**product_bits``, in pieces of K that stay below 2**53; int64."""
    k = a.shape[-1]
    limit = 1 << (53 - product_bits)
    if k <= limit:
        return torch.matmul(a.to(torch.float64), b.to(torch.float64)).to(torch.int64)
    pieces = (
        torch.matmul(
            a[..., start : start + limit].to(torch.float64), b[..., start : start + limit, :].to(torch.float64)
        ).to(torch.int64)
        for start in range(0, k, limit)
    )
    total = next(pieces)
    for piece in pieces:
        total += piece
    return total


def _round_into(out: Tensor, sums: Sums) -> None:
    """Rounds sums to float32 once, to nearest, ties to even."""
    if list(sums) == [0]:
        out.copy_(sums[0].view(out.shape))
        return
    zero = torch.zeros((), dtype=torch.int64)
    middle = sums.get(16, zero)
    low = ((middle & 0xFFFF) << 16) + sums[0]
    high = sums.get(32, zero) + (middle >> 16) + (low >> 32)
    low &= 0xFFFFFFFF
    # value = high * 2**32 + low. Where it fits int64, convert it; else `high` has more bits than float32 keeps, and
    # its last bit set for a rest below makes the one rounding come out as it would on the whole number.
    fits = high.abs() < 1 << 30
    whole = ((high << 32) | low).to(torch.float32)
    jammed = (high | (low != 0)).to(torch.float32).mul_(2.0**32)
    out.copy_(torch.where(fits, whole, jammed).view(out.shape))

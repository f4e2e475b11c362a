"""Exact integer matrix products for every mix of widths, and their one rounding to float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..fixed_point import FixedPoint, scale_by_power_of_two
from . import native
from .int8_product import MAX_K, int8_matmul, serving_variant

# Rows widened to float64 at a time hold this many elements.
_FLOAT64_BLOCK = 1 << 20
# Multiplications from which int8 digits beat float64 in a product with an int16 operand: below, calls cost more.
_DIGITS_GAIN = 1 << 20
# Sums of one digit product at a time: few, to stay in the cache; not fewer, for oneDNN packs the right side each call.
_DIGITS_BLOCK = 1 << 20

Sums = dict[int, Tensor]
"""Integer sums as ``sum(tensor * 2**shift)``: one int32, int64 or float64 tensor at shift 0, or three int64 tensors."""


def multiply_into(
    out: Tensor | None,
    a: Tensor,
    b: Tensor,
    a_format: FixedPoint,
    b_format: FixedPoint,
    bias: Tensor | None,
    exact_int31: bool,
    scratch: Tensor | None = None,
) -> Tensor:
    """Multiplies (M, K) by (K, N), rounds, scales and adds the bias.

    Args:
        out: contiguous float32 (M, N), or (images, N, positions) with M = images * positions; None makes the former.
        a: integers of ``a_format``.
        b: integers of ``b_format``.
        a_format: width and position of ``a``; its values are not used.
        b_format: of ``b``.
        bias: float32 (N,), or None.
        exact_int31: whether 31-bit operands multiply exactly.
        scratch: flat int32 memory of at least M * N, to keep sums in on the way where that is needed.

    Returns:
        ``out``, or the new tensor.
    """
    m, n = a.shape[0], b.shape[1]
    exponent = a_format.position + b_format.position
    bits = (a_format.bits, b_format.bits)
    library = native.library()
    fused = library is not None and -126 <= exponent <= 127 and m * n > 0
    if bias is not None:
        bias = bias.detach().to(torch.float32).contiguous()
    if library is not None and fused and bits == (8, 8) and a.shape[1] <= MAX_K:
        if out is None or out.dim() == 2:  # the floats take the place of the sums
            sums = int8_matmul(a, b, None if out is None else out.view(torch.int32))
            return native.dequantize_(library, sums, 2.0**exponent, bias)
        sums = int8_matmul(a, b, None if scratch is None else scratch[: m * n].view(m, n))
        by_image = sums.view(out.shape[0], out.shape[2], n)
        native.dequantize_channels_first(library, by_image, out, 2.0**exponent, bias)
        return out
    target = out if out is not None and out.dim() == 2 else native.empty((m, n), torch.float32)
    if library is not None and fused and _uses_digits(a, b, bits):

        def round_rows(piece: slice, parts: dict[str, Tensor | None], constant: int) -> None:
            native.combine(library, parts, constant, out=target[piece], scale=2.0**exponent, bias=bias)

        _multiply_digits(a, b, bits, round_rows)
    else:
        rows = max(1, m if bits == (8, 8) else _FLOAT64_BLOCK // max(a.shape[1], 1))
        right = b if bits == (8, 8) or exact_int31 else b.to(torch.float64)
        for start in range(0, m, rows):
            part = product_sums(a[start : start + rows], right, *bits, exact_int31)
            round_into(target[start : start + rows], part)
        scale_by_power_of_two(target, exponent)
        if bias is not None:
            target += bias
    if out is None or out.dim() == 2:
        return target
    return out.copy_(target.view(out.shape[0], out.shape[2], n).transpose(1, 2))


def add_product(total: Sums, a: Tensor, b: Tensor, a_bits: int, b_bits: int, exact_int31: bool, total_k: int) -> None:
    """Adds (groups, M, K) @ (groups, K, N) to ``total``, which starts empty; the whole sum has length ``total_k``."""
    library = native.library()
    if library is not None and a.shape[0] == 1 and _uses_digits(a[0], b[0], (a_bits, b_bits)):
        if not total:
            total[0] = torch.zeros((1, a.shape[1], b.shape[2]), dtype=torch.int64)

        def add_rows(piece: slice, parts: dict[str, Tensor | None], constant: int) -> None:
            native.combine(library, parts, constant, total=total[0][0][piece])

        _multiply_digits(a[0], b[0], (a_bits, b_bits), add_rows)
        return
    for shift, part in product_sums(a, b, a_bits, b_bits, exact_int31).items():
        if shift not in total:
            # int32 sums are kept where the whole sum fits them.
            total[shift] = part if part.dtype != torch.int32 or total_k <= MAX_K else part.to(torch.int64)
        else:
            total[shift] += part


def rounded(total: Sums, exponent: int) -> Tensor:
    """Returns sums as float32 times ``2**exponent``; int32 ones may be overwritten."""
    library = native.library()
    first = total[0]
    if library is not None and first.dtype == torch.int32 and first.is_contiguous() and -126 <= exponent <= 127:
        return native.dequantize_(library, first.flatten(0, -2), 2.0**exponent, None).view(first.shape)
    out = torch.empty(first.shape, dtype=torch.float32)
    round_into(out, total)
    return scale_by_power_of_two(out, exponent)


def product_sums(a: Tensor, b: Tensor, a_bits: int, b_bits: int, exact_int31: bool) -> Sums:
    """Multiplies (M, K) by (K, N), or (groups, M, K) by (groups, K, N): exact, or float64 in int31's default mode."""
    if a.dim() == 3 and a.shape[0] == 1:
        parts = product_sums(a[0], b[0], a_bits, b_bits, exact_int31)
        return {shift: part.unsqueeze(0) for shift, part in parts.items()}
    if a_bits == b_bits == 8:
        if a.dim() == 2:
            return {0: int8_matmul(a, b)}
        # Many small int8 products cost more in calls than one batched float64 product does in arithmetic.
        if a.shape[1] * a.shape[2] * b.shape[2] >= 1 << 18:
            return {0: torch.stack([int8_matmul(a[g], b[g]) for g in range(a.shape[0])])}
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


def round_into(out: Tensor, sums: Sums) -> None:
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


def _uses_digits(a: Tensor, b: Tensor, bits: tuple[int, int]) -> bool:
    """Whether int8 digits serve a product with an int16 operand: fast integer units, and enough work."""
    if 16 not in bits or 31 in bits or a.shape[1] > MAX_K:
        return False
    return a.shape[0] * a.shape[1] * b.shape[1] >= _DIGITS_GAIN and serving_variant().name == "int_mm"


def _multiply_digits(a: Tensor, b: Tensor, bits: tuple[int, int], finish: Callable[..., None]) -> None:
    """Multiplies the int8 digits of int16 operands, a block of rows at a time.

    Args:
        a: (M, K) of ``bits[0]``.
        b: (K, N) of ``bits[1]``.
        bits: 8 or 16 each, not both 8.
        finish: called with the rows' slice, the parts and the constant that ``native.combine`` takes.
    """
    library = native.library()
    if library is None:
        raise RuntimeError("digits need the compiled part")
    a, b = _dense(a), _dense(b)
    m, n = a.shape[0], b.shape[1]
    a_high, a_low = native.split(library, a) if bits[0] == 16 else (a, None)
    b_high, b_low = native.split(library, b) if bits[1] == 16 else (b, None)
    # The offset of one operand's digits meets the sum of the other operand.
    row = native.matrix_sums(library, a, by_row=True) if b_low is not None else None
    column = native.matrix_sums(library, b, by_row=False) if a_low is not None else None
    products: dict[str, tuple[Tensor, Tensor]] = {}
    if a_low is not None and b_low is not None:
        products = {"p16": (a_high, b_high), "p8a": (a_high, b_low), "p8b": (a_low, b_high), "p0": (a_low, b_low)}
    elif a_low is not None:
        products = {"p8a": (a_high, b_high), "p0": (a_low, b_high)}
    elif b_low is not None:
        products = {"p8a": (a_high, b_high), "p0": (a_high, b_low)}
    constant = -128 * 128 * a.shape[1] if bits == (16, 16) else 0
    rows = max(1, min(m, _DIGITS_BLOCK // max(n, 1)))
    memory = {name: torch.empty(rows * n, dtype=torch.int32) for name in products}
    for start in range(0, m, rows):
        piece = slice(start, min(start + rows, m))
        height = piece.stop - start
        parts: dict[str, Tensor | None] = {
            name: int8_matmul(left[piece], right, memory[name][: height * n].view(height, n))
            for name, (left, right) in products.items()
        }
        parts["row"], parts["column"] = None if row is None else row[piece], column
        finish(piece, parts, constant)


def _dense(matrix: Tensor) -> Tensor:
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


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

"""The exact definition of the emulated core: slow, and plain enough to be checked by reading.

Every other kernel must return the same bits. A product is the exact integer sum, rounded once to float32 (to nearest,
ties to even), times ``2**(position_a + position_b)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product as cartesian

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fixed_point import (
    FixedPoint,
    FixedPointBatch,
    absmax,
    choose_position,
    exponents,
    limits,
    powers_of_two,
    scale_by_power_of_two,
    storage_dtype,
)

# Constants of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def philox(counter: Sequence[Tensor | int], key: tuple[int, int]) -> list[Tensor]:
    """Evaluates the counter-based generator Philox4x32-10.

    Args:
        counter: four words in [0, 2**32), integers or int64 tensors of one shape, at least one of them a tensor.
        key: two words in [0, 2**32).

    Returns:
        Four int64 tensors with words in [0, 2**32).
    """
    c = list(torch.broadcast_tensors(*(torch.as_tensor(word, dtype=torch.int64) for word in counter)))
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, and their bits are still those of the unsigned product.
        p0, p1 = c[0] * _PHILOX_MULTIPLIERS[0], c[2] * _PHILOX_MULTIPLIERS[1]
        hi0, lo0 = (p0 >> 32) & _MASK32, p0 & _MASK32
        hi1, lo1 = (p1 >> 32) & _MASK32, p1 & _MASK32
        c = [hi1 ^ c[1] ^ k0, lo1, hi0 ^ c[3] ^ k1, lo0]
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK32, (k1 + _PHILOX_KEY_STEPS[1]) & _MASK32
    return c


def uniform(start: int, count: int, seed: int, stream: int) -> Tensor:
    """Returns elements ``start .. start + count`` of a stream of uniform numbers: multiples of 2**-24 in [0, 1).

    Element i takes word ``i % 4`` of the block with counter ``i // 4``, so that any split of a tensor gives the same
    numbers.
    """
    first, last = start // 4, -(-(start + count) // 4)
    block = torch.arange(first, last, dtype=torch.int64)
    words = philox(
        (block & _MASK32, block >> 32, stream & _MASK32, (stream >> 32) & _MASK32),
        (seed & _MASK32, (seed >> 32) & _MASK32),
    )
    flat = torch.stack(words, dim=1).reshape(-1)[start - 4 * first :][:count]
    return (flat >> 8).to(torch.float64) * 2.0**-24


def quantize(
    x: Tensor,
    bits: int,
    position: int | Tensor,
    rounding: str = "nearest_even",
    *,
    seed: int = 0,
    stream: int = 0,
    start: int = 0,
) -> Tensor:
    """Quantizes finite floats: ``clip(round(x / 2**position))``, saturating at the width's limits.

    Args:
        x: float tensor of any shape, finite; read as float32.
        bits: 8, 16 or 31.
        position: exponent of the step, in [-128, 127]; a tensor of them broadcasts against ``x``.
        rounding: "nearest_even", "half_up" (towards +infinity), "half_away" (from zero) or "stochastic".
        seed: key of the random numbers for "stochastic", 64 bits.
        stream: which stream of that key, 64 bits; each quantization of an operand takes its own.
        start: index of the first element in the stream, for a tensor that is quantized in pieces.

    Returns:
        Integers of ``storage_dtype(bits)`` with the shape of ``x``.

    Raises:
        ValueError: for an unknown width or rounding.
    """
    dtype = storage_dtype(bits)
    # In float64 the scaled value and the sums below are exact, or rounded far from the next integer.
    per_step = powers_of_two(-position) if isinstance(position, Tensor) else 2.0**-position
    scaled = x.to(torch.float32).to(torch.float64) * per_step
    if rounding == "nearest_even":
        rounded = scaled.round()
    elif rounding == "half_up":
        rounded = (scaled + 0.5).floor()
    elif rounding == "half_away":
        rounded = scaled.sign() * (scaled.abs() + 0.5).floor()
    elif rounding == "stochastic":
        rounded = (scaled + uniform(start, x.numel(), seed, stream).view(x.shape)).floor()
    else:
        raise ValueError(f"rounding must be nearest_even, half_up, half_away or stochastic, got {rounding!r}")
    return rounded.clamp_(*limits(bits)).to(dtype)


def quantize_batch(
    x: Tensor,
    bits: int,
    positions: Tensor | None = None,
    rounding: str = "nearest_even",
    *,
    batch_dims: int = 1,
    seed: int = 0,
    stream: int = 0,
) -> FixedPointBatch:
    """Quantizes finite floats (*batch, ...), each entry of the batch at a position of its own.

    Args:
        x: float tensor, finite; its first ``batch_dims`` dimensions tell the entries apart.
        bits: 8, 16 or 31.
        positions: integers that broadcast to ``batch``; None chooses for each entry the one that fits its largest
            magnitude.
        rounding: as in ``quantize``; random numbers go by the element's index in the whole batch.
        batch_dims: how many dimensions ``batch`` has.
        seed: as in ``quantize``.
        stream: likewise.
    """
    batch = x.shape[:batch_dims]
    if positions is None:
        entries = x.to(torch.float32).reshape(math.prod(batch), math.prod(x.shape[batch_dims:]))
        chosen = [choose_position(absmax(entry), bits) for entry in entries]
        positions = torch.tensor(chosen, dtype=torch.int64).view(batch)
    form = FixedPointBatch(x, bits, positions.to(torch.int64).expand(batch))
    return form._replace(values=quantize(x, bits, exponents(form), rounding, seed=seed, stream=stream))


def matmul(a: FixedPoint, b: FixedPoint) -> Tensor:
    """Multiplies matrices: (M, K) by (K, N) gives float32 (M, N)."""
    return _product(torch.matmul, a, b)


def batched_matmul(a: FixedPoint | FixedPointBatch, b: FixedPoint | FixedPointBatch) -> Tensor:
    """Multiplies a batch of matrices: (*batch, M, K) by (*batch, K, N) gives float32 (*batch, M, N)."""
    return _product(torch.matmul, a, b)


def convolution(
    x: FixedPoint,
    weight: FixedPoint,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolves (N, C, *spatial) with (O, C / groups, *kernel); one to three spatial dimensions.

    Returns:
        float32 (N, O, *output), the cross-correlation that PyTorch calls convolution.
    """
    kernel = weight.values.shape[2:]

    def sums(xv: Tensor, wv: Tensor) -> Tensor:
        padded = _pad(xv, padding)
        size = output_size(xv.shape[2:], kernel, stride, padding, dilation)
        total = xv.new_zeros((xv.shape[0], groups, wv.shape[0] // groups, *size))
        for number, tap in enumerate(cartesian(*map(range, kernel))):
            window = _group(_window(padded, tap, size, stride, dilation), groups)
            total += torch.einsum("ngc...,goc->ngo...", window, _tap(wv, number, groups))
        return total.flatten(1, 2)

    return _product(sums, x, weight)


def convolution_grad_input(
    grad_output: FixedPoint,
    weight: FixedPoint,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Returns the gradient of a convolution's input, float32 of shape ``input_size`` = (N, C, *spatial)."""
    kernel = weight.values.shape[2:]

    def sums(gv: Tensor, wv: Tensor) -> Tensor:
        padded = _pad(gv.new_zeros(tuple(input_size)), padding)
        for number, tap in enumerate(cartesian(*map(range, kernel))):
            # A view: adding to it adds to `padded`.
            window = _window(padded, tap, gv.shape[2:], stride, dilation)
            window += torch.einsum("ngo...,goc->ngc...", _group(gv, groups), _tap(wv, number, groups)).flatten(1, 2)
        return _unpad(padded, padding)

    return _product(sums, grad_output, weight)


def convolution_grad_weight(
    grad_output: FixedPoint,
    x: FixedPoint,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Returns the gradient of a convolution's weight, float32 of shape ``weight_size`` = (O, C / groups, *kernel)."""
    kernel = tuple(weight_size)[2:]

    def sums(gv: Tensor, xv: Tensor) -> Tensor:
        padded = _pad(xv, padding)
        total = gv.new_zeros((*tuple(weight_size)[:2], math.prod(kernel)))
        for number, tap in enumerate(cartesian(*map(range, kernel))):
            window = _group(_window(padded, tap, gv.shape[2:], stride, dilation), groups)
            left = _group(gv, groups).flatten(3)
            total[..., number] = torch.einsum("ngop,ngcp->goc", left, window.flatten(3)).flatten(0, 1)
        return total.view(tuple(weight_size))

    return _product(sums, grad_output, x)


def output_size(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Returns a convolution's output size per spatial dimension.

    Raises:
        ValueError: if the padded input is smaller than the kernel.
    """
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(spatial, kernel, stride, padding, dilation, strict=True)
    ]
    if any(n < 1 for n in size):
        raise ValueError(
            f"input of spatial size {tuple(spatial)} with padding {tuple(padding)} is smaller than the kernel "
            f"{tuple(kernel)} with dilation {tuple(dilation)}"
        )
    return size


def round_to_float32(value: int) -> float:
    """Rounds a Python integer of any size to the nearest float32, ties to even."""
    excess = abs(value).bit_length() - 24
    if excess <= 0:
        return float(value)
    quotient, rest = divmod(abs(value), 1 << excess)
    half = 1 << (excess - 1)
    if rest > half or (rest == half and quotient % 2 == 1):
        quotient += 1
    return math.copysign(math.ldexp(quotient, excess), value)


def _product(
    sums: Callable[[Tensor, Tensor], Tensor], a: FixedPoint | FixedPointBatch, b: FixedPoint | FixedPointBatch
) -> Tensor:
    """Evaluates a bilinear integer function exactly, rounds once, scales.

    Products of 8 and 16 bits fit int64 for any K. A 31-bit operand is split into ``high * 2**16 + low``; the products
    of the halves fit int64, and Python's integers put them together.
    """
    if a.bits < 31 and b.bits < 31:
        rounded = sums(a.values.to(torch.int64), b.values.to(torch.int64)).to(torch.float32)
    else:
        (a_high, a_low), (b_high, b_low) = _halves(a.values), _halves(b.values)
        high = sums(a_high, b_high)
        middle = sums(a_high, b_low) + sums(a_low, b_high)
        low = sums(a_low, b_low)
        exact = [
            (h << 32) + (m << 16) + n
            for h, m, n in zip(*(t.reshape(-1).tolist() for t in (high, middle, low)), strict=True)
        ]
        rounded = torch.tensor([round_to_float32(v) for v in exact], dtype=torch.float32).view(high.shape)
    if not (a.finite and b.finite):
        return torch.full_like(rounded, math.nan)
    return scale_by_power_of_two(rounded, exponents(a) + exponents(b))


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    wide = values.to(torch.int64)
    return wide >> 16, wide & 0xFFFF


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    return F.pad(x, [p for each in reversed(list(padding)) for p in (each, each)])


def _unpad(x: Tensor, padding: Sequence[int]) -> Tensor:
    for dim, p in enumerate(padding, start=2):
        x = x.narrow(dim, p, x.shape[dim] - 2 * p)
    return x


def _window(
    padded: Tensor, tap: Sequence[int], size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Returns the view of what one kernel tap multiplies: (N, C, *output)."""
    window = padded
    for dim, (t, n, s, d) in enumerate(zip(tap, size, stride, dilation, strict=True), start=2):
        window = window.narrow(dim, t * d, (n - 1) * s + 1)
        window = window.unfold(dim, 1, s).squeeze(-1)
    return window


def _group(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, x.shape[1] // groups))


def _tap(weight: Tensor, number: int, groups: int) -> Tensor:
    """Returns one kernel tap of the weight, counted in row-major order: (groups, O / groups, C / groups)."""
    return weight.flatten(2)[..., number].unflatten(0, (groups, weight.shape[0] // groups))

"""Products on the processor's integer units through the compiled part, which reads operands where they lie.

int8 products need AVX-512 VNNI or AMX, those of wider operands AMX. The exact sums of every width are rounded once,
scaled and given their bias before they leave the cache; int31 is exact here without being asked.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..fixed_point import FixedPoint, FixedPointBatch, exponents, is_float32_exponent, powers_of_two
from . import native
from .native.structures import Operand, Product, ProductBatch, Windows


def serve(a: FixedPoint | FixedPointBatch, b: FixedPoint | FixedPointBatch) -> bool:
    """Whether the compiled part multiplies these operands, on this processor."""
    library = native.library()
    if library is None or library.cnmix_multiplies(a.values.itemsize, b.values.itemsize) != 1:
        return False
    if a.values.is_floating_point():  # what cnmix.debug multiplies in float
        return False
    return is_float32_exponent(exponents(a) + exponents(b))


# What the compiled part writes; other types are cast from float32.
_WRITTEN = (torch.float32, torch.bfloat16)


def matmul(a: FixedPoint, b: FixedPoint, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiplies (M, K) by (K, N) and adds ``bias`` (N,): (M, N) of ``dtype``, rounded from float32."""
    (m, k), n = a.values.shape, b.values.shape[1]
    left, right = _readable(a.values), _readable(b.values.t())
    out = native.empty((m, n), dtype if dtype in _WRITTEN else torch.float32)
    _multiply((m, n, k), _matrix(left), _matrix(right), a, b, bias, out.data_ptr(), out.itemsize, row_stride=n)
    return out.to(dtype)


def batched_matmul(a: FixedPoint | FixedPointBatch, b: FixedPoint | FixedPointBatch, dtype: torch.dtype) -> Tensor:
    """Multiplies (*batch, M, K) by (*batch, K, N): (*batch, M, N) of ``dtype``, rounded from float32."""
    (*batch, m, k), n = a.values.shape, b.values.shape[-1]
    left, right = _readable(a.values), _readable(b.values.transpose(-1, -2))
    out = native.empty((*batch, m, n), dtype if dtype in _WRITTEN else torch.float32)
    library = native.library()
    if library is None or out.numel() == 0:
        return out.to(dtype)
    exponent = exponents(a) + exponents(b)
    scales = None
    if isinstance(exponent, Tensor):
        scales = powers_of_two(exponent).to(torch.float32).expand(*batch, 1, 1).contiguous()
    places = native.places(left, len(batch)), native.places(right, len(batch))
    job = ProductBatch(
        Product(
            *(m, n, k, _matrix(left), _matrix(right), 1.0 if isinstance(exponent, Tensor) else 2.0**exponent),
            *(None, out.data_ptr(), out.itemsize, n),
        ),
        math.prod(batch),
        *(place.data_ptr() for place in places),
        None if scales is None else scales.data_ptr(),
    )
    if not library.cnmix_multiply_batch(ctypes.byref(job)):
        raise _no_memory(m, n, k)
    return out.to(dtype)


class Convolution:
    """Describes to the compiled part the windows of contiguous (images, *size, channels), group by group.

    Args:
        pixels: integers.
        geometry: of the windows.
        groups: groups of channels.
    """

    def __init__(self, pixels: Tensor, geometry: native.WindowGeometry, groups: int) -> None:
        self.images, self.positions, self.taps, self.groups = (
            len(pixels),
            math.prod(geometry.size),
            math.prod(geometry.kernel),
            groups,
        )
        self._pixels, self._run = pixels, pixels.shape[-1] // groups
        self._windows: Windows | None = None
        if tuple(geometry.size) != tuple(pixels.shape[1:-1]) or not geometry.points:
            self._windows = native.describe_windows(pixels, groups, geometry)

    def operand(self, group: int, by_k: bool) -> Operand:
        """Returns the windows of one group of channels: rows of the product, or its K."""
        data = self._pixels.data_ptr() + group * self._run * self._pixels.itemsize
        windows = None if self._windows is None else ctypes.pointer(self._windows)
        return Operand(data, by_k, self._pixels.itemsize, 0, self._pixels.shape[-1], 0, windows)

    def correlate(
        self,
        matrices: Sequence[Operand],
        channels: int,
        a: FixedPoint,
        b: FixedPoint,
        bias: Tensor | None,
        channels_last: bool,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Multiplies the windows of each group by its matrix, of rows ``channels / groups``.

        Returns:
            ``dtype`` (images, positions, channels) where ``channels_last``, else (images, channels, positions).
        """
        shape = (self.positions, channels) if channels_last else (channels, self.positions)
        out = native.empty((self.images, *shape), dtype if dtype in _WRITTEN else torch.float32)
        n = channels // self.groups
        sizes = (self.images * self.positions, n, self.taps * self._run)
        for group, matrix in enumerate(matrices):
            first = group * n
            place = out.data_ptr() + out.itemsize * first * (1 if channels_last else self.positions)
            part = None if bias is None else bias.detach()[first : first + n]
            left = self.operand(group, by_k=False)
            if channels_last:
                _multiply(sizes, left, matrix, a, b, part, place, out.itemsize, row_stride=channels)
            else:
                image = channels * self.positions
                _multiply(
                    sizes,
                    left,
                    matrix,
                    a,
                    b,
                    part,
                    place,
                    out.itemsize,
                    positions=self.positions,
                    image_stride=image,
                )
        return out.to(dtype)

    def correlate_all(self, left: Tensor, a: FixedPoint, b: FixedPoint) -> Tensor:
        """Multiplies (images * positions, channels), transposed, by the windows: (channels, taps * C / groups)."""
        channels = left.shape[1]
        m, n = channels // self.groups, self.taps * self._run
        out = native.empty((channels, n), torch.float32)
        for group in range(self.groups):
            data = left.data_ptr() + group * m * left.itemsize
            rows = Operand(data, True, left.itemsize, 0, channels, 0, None)
            place = out.data_ptr() + 4 * group * m * n
            sizes = (m, n, left.shape[0])
            _multiply(sizes, rows, self.operand(group, by_k=True), a, b, None, place, out.itemsize, row_stride=n)
        return out


def kernel_matrices(weight: Tensor, groups: int) -> list[Operand]:
    """Describes a weight in memory as (O, taps, C / groups): per group, rows O of K = taps * C / groups."""
    out_channels, k = weight.shape[0], math.prod(weight.shape[1:])
    each = out_channels // groups * k * weight.itemsize
    return [Operand(weight.data_ptr() + group * each, False, weight.itemsize, 0, k, 0, None) for group in range(groups)]


def transposed_kernel_matrices(weight: Tensor, groups: int) -> list[Operand]:
    """Describes (O, taps, C / groups) as rows C / groups of K = taps in reverse * O, without moving it."""
    out_channels, taps, run = weight.shape[0], math.prod(weight.shape[1:-1]), weight.shape[-1]
    each, size = out_channels // groups, weight.itemsize
    return [
        Operand(
            weight.data_ptr() + (group * each * taps + taps - 1) * run * size, True, size, each, taps * run, -run, None
        )
        for group in range(groups)
    ]


def _readable(matrix: Tensor) -> Tensor:
    """Returns (..., rows, columns) whose rows or columns are contiguous, copied only where neither are."""
    rows, columns = matrix.shape[-2:]
    return matrix if columns <= 1 or rows <= 1 or 1 in matrix.stride()[-2:] else matrix.contiguous()


def _matrix(matrix: Tensor) -> Operand:
    """Describes (rows, K), or the first such matrix of a batch."""
    by_k = matrix.shape[-1] > 1 and matrix.stride(-1) != 1
    return Operand(matrix.data_ptr(), by_k, matrix.itemsize, 0, matrix.stride(-1 if by_k else -2), 0, None)


def _multiply(
    sizes: tuple[int, int, int],
    left: Operand,
    right: Operand,
    a: FixedPoint,
    b: FixedPoint,
    bias: Tensor | None,
    out: int,
    out_bytes: int,
    **layout: int,
) -> None:
    library = native.library()
    if library is None or 0 in sizes[:2]:
        return
    if bias is not None:
        bias = bias.detach().to(torch.float32).contiguous()
    pointer = None if bias is None else bias.data_ptr()
    job = Product(*sizes, left, right, 2.0 ** (a.position + b.position), pointer, out, out_bytes, **layout)
    if not library.cnmix_multiply(ctypes.byref(job)):
        raise _no_memory(*sizes)


def _no_memory(m: int, n: int, k: int) -> MemoryError:
    return MemoryError(f"no memory for the sums of a product of {m} x {k} by {k} x {n}")

"""The int8 matrix product on torch's integer kernel, and what it takes to trust that kernel.

``torch._int_mm`` (oneDNN) is fast and has four silent faults, each guarded against here:

1. On processors without VNNI it saturates 16-bit partial sums and returns wrong integers. A self-test at first use
   compares it with float64; where it fails, both operands are split into halves in [-64, 64], whose pair sums cannot
   saturate, and if that fails too float64 serves.
2. Matrices with a dimension of size 1 and degenerate strides give garbage. Operands get canonical strides first.
3. int32 sums wrap around from K = 131072 on. Longer products are cut along K and added in int64.
4. Where oneDNN is missing or switched off it falls back to a loop some forty times slower. float64 serves then.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import native

MAX_K = 131071
"""The longest sum of products of two int8 values that cannot leave int32: 131072 * 2**14 is 2**31."""

Product = Callable[[Tensor, Tensor], Tensor]


class Variant(NamedTuple):
    """A way to multiply int8 matrices of K <= MAX_K into int32."""

    name: str
    product: Product
    reason: str


def int8_matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiplies int8 matrices (M, K) and (K, N) exactly, for any strides and any size.

    Args:
        a: int8 (M, K).
        b: int8 (K, N).
        out: contiguous int32 (M, N) to write into, for K up to ``MAX_K``.

    Returns:
        (M, N) integer sums: int32, or int64 where K is over ``MAX_K``.
    """
    k = a.shape[1]
    if 0 in (a.shape[0], b.shape[1], k):
        return torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int32) if out is None else out.zero_()
    variant = serving_variant()
    product = variant.product
    if k <= MAX_K:
        a, b = _canonical(a), _canonical(b)
        if out is None:
            return product(a, b)
        return torch._int_mm(a, b, out=out) if variant.name == "int_mm" else out.copy_(product(a, b))
    total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int64)
    for start in range(0, k, MAX_K):
        total += product(_canonical(a[:, start : start + MAX_K]), _canonical(b[start : start + MAX_K]))
    return total


def serving_variant() -> Variant:
    """Returns the variant in use, testing them on the first call (about a millisecond)."""
    return _choose_variant(torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled())


@functools.cache
def _choose_variant(onednn: bool) -> Variant:
    if not onednn:
        return Variant("float64", _float64_product, "oneDNN is missing or switched off; torch's own int8 loop is slow")
    if _is_exact(torch._int_mm):
        return Variant("int_mm", _int_mm, "torch._int_mm passed the self-test")
    if _is_exact(_split_product):
        reason = (
            "torch._int_mm returned wrong sums (no VNNI); with the operands split in halves it passed the self-test"
        )
        return Variant("int_mm_split", _split_product, reason)
    return Variant("float64", _float64_product, "torch._int_mm returned wrong sums in the self-test")


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    return torch._int_mm(a, b, out=native.empty((a.shape[0], b.shape[1]), torch.int32))


def _float64_product(a: Tensor, b: Tensor) -> Tensor:
    """Exact in any order of summation: the sums stay below 2**53."""
    return torch.mm(a.to(torch.float64), b.to(torch.float64)).to(torch.int32)


def _split_product(a: Tensor, b: Tensor) -> Tensor:
    """Keeps saturating 16-bit pair sums in range by splitting both operands into halves in [-64, 64].

    Without VNNI oneDNN shifts one operand, which one depends on shape and processor, by 128 to make it unsigned: a pair
    sum is then at most 2 * (128 + 64) * 64 = 24576 < 2**15.
    """
    a_half, b_half = a >> 1, b >> 1
    a_rest, b_rest = a - a_half, b - b_half
    total = torch._int_mm(a_half, b_half)
    for left, right in ((a_half, b_rest), (a_rest, b_half), (a_rest, b_rest)):
        total += torch._int_mm(left, right)
    return total


def _is_exact(product: Product) -> bool:
    """Holds a product against float64 on random and extreme values in every layout."""
    try:
        return all(
            torch.equal(product(_canonical(a), _canonical(b)).to(torch.float64), a.double() @ b.double())
            for a, b in _probes()
        )
    except RuntimeError:  # this build of torch does not have the kernel at all
        return False


def _probes() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)

    for m, k, n in ((1, 64, 16), (17, 64, 1), (5, 3, 7), (64, 256, 32), (33, 130, 65)):
        yield random(m, k), random(k, n)
        yield random(k, m).t(), random(n, k).t()
    for va, vb in itertools.product((-128, 127), repeat=2):
        yield torch.full((16, 256), va, dtype=torch.int8), torch.full((256, 16), vb, dtype=torch.int8)


def _canonical(matrix: Tensor) -> Tensor:
    """Returns the matrix with the strides of a fresh row-major or transposed tensor, copied only where it must be."""
    rows, columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    if rows > 1 and columns > 1 and (row_stride, column_stride) in ((columns, 1), (1, rows)):
        return matrix
    if rows == 1 and (column_stride == 1 or columns == 1):
        return matrix.as_strided((rows, columns), (columns, 1))
    if columns == 1 and row_stride == 1:
        return matrix.as_strided((rows, columns), (1, 1))
    # Not .contiguous(): it returns degenerate strides as they are.
    return torch.empty(matrix.shape, dtype=matrix.dtype).copy_(matrix)

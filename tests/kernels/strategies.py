"""Operands, layouts and convolutions for the kernel tests, and what "the same result" means."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cnmix.fixed_point import BITS, FixedPoint, limits, storage_dtype
from cnmix.kernels.reference import output_size

FILLS = ("random", "extremes", "low", "high", "small", "sparse")
MATRIX_LAYOUTS = (
    *("contiguous", "transposed", "sliced", "wide_rows", "wide_columns"),
    *("expanded_rows", "expanded_columns", "overlapping", "ones_stride"),
)
CONV_LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "offset", "offset_channels_last")

widths = st.sampled_from(BITS)
seeds = st.integers(0, 2**32 - 1)
positions = st.one_of(st.integers(-20, 20), st.sampled_from((-128, -127, -64, 63, 126, 127)))
moderate_positions = st.integers(-20, 20)
batch_sizes = st.integers(0, 3)
channels = st.sampled_from((1, 2, 3, 4, 8))


def integers(shape: Sequence[int], bits: int, fill: str = "random", seed: int = 0) -> Tensor:
    """Makes values of a width: anything, its extremes, only one of them, a few units, or mostly zero."""
    low, high = limits(bits)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(low, high + 1, tuple(shape), generator=generator)
    if fill == "extremes":
        random = torch.tensor([low, low + 1, -high, -1, 0, 1, high - 1, high])[random % 8]
    elif fill == "low":
        random.fill_(low)
    elif fill == "high":
        random.fill_(high)
    elif fill == "small":
        random %= 5
        random -= 2
    elif fill == "sparse":
        random *= torch.rand(random.shape, generator=generator) < 0.2
    return random.to(storage_dtype(bits))


def lay_out(matrix: Tensor, layout: str) -> Tensor:
    """Puts a matrix into memory another way; the expanded and overlapping layouts change its values."""
    rows, columns = matrix.shape
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((2 * rows + 1, 3 * columns + 2), 77, dtype=matrix.dtype)
        view = wide[1 : 2 * rows + 1 : 2, 2 : 3 * columns + 2 : 3]
        return view.copy_(matrix)
    if layout == "wide_rows":
        return torch.full((rows, columns + 5), 77, dtype=matrix.dtype)[:, 3 : columns + 3].copy_(matrix)
    if layout == "wide_columns":
        return lay_out(matrix.t(), "wide_rows").t()
    if layout == "overlapping" and rows and columns:
        line = torch.cat((matrix[0], matrix[1:, -1]))
        return line.as_strided((rows, columns), (1, 1))
    if layout == "expanded_rows" and rows:
        return matrix[:1].expand(rows, columns)
    if layout == "expanded_columns" and columns:
        return matrix[:, :1].expand(rows, columns)
    if layout == "ones_stride" and 1 in matrix.shape:
        return matrix.contiguous().as_strided((rows, columns), (1, 1))
    return matrix


@st.composite
def operands(
    draw: st.DrawFn, shape: Sequence[int], bits: int, position: st.SearchStrategy[int] = positions
) -> FixedPoint:
    return FixedPoint(integers(shape, bits, draw(st.sampled_from(FILLS)), draw(seeds)), bits, draw(position))


@st.composite
def matrix_pairs(
    draw: st.DrawFn,
    bits: st.SearchStrategy[tuple[int, int]],
    position: st.SearchStrategy[int] = positions,
    smallest: int = 0,
    largest: int = 24,
    size: st.SearchStrategy[int] | None = None,
) -> tuple[FixedPoint, FixedPoint]:
    if size is None:
        size = st.one_of(st.integers(smallest, 3), st.integers(smallest, largest))
    (a_bits, b_bits), m, k, n = draw(bits), draw(size), draw(size), draw(size)
    pair = draw(operands((m, k), a_bits, position)), draw(operands((k, n), b_bits, position))
    layouts = st.sampled_from(MATRIX_LAYOUTS)
    a, b = (x._replace(values=lay_out(x.values, draw(layouts))) for x in pair)
    return a, b


class Convolution(NamedTuple):
    """The three operands of a convolution's three products, and its geometry."""

    x: FixedPoint
    weight: FixedPoint
    grad_output: FixedPoint
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def run(self, kernels: object, **mode: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns output, grad_input and grad_weight by ``kernels``, a module with the three products."""
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        x, weight, grad_output = self.x, self.weight, self.grad_output
        return (
            kernels.convolution(x, weight, *geometry, **mode),
            kernels.convolution_grad_input(grad_output, weight, x.values.shape, *geometry, **mode),
            kernels.convolution_grad_weight(grad_output, x, weight.values.shape, *geometry, **mode),
        )

    def pairs(self) -> tuple[tuple[FixedPoint, FixedPoint], ...]:
        """Returns the operands of each product, in the order of ``run``."""
        return (self.x, self.weight), (self.grad_output, self.weight), (self.grad_output, self.x)

    def terms(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Yields the index of output, input and weight of every single product, by the definition of a convolution."""
        images, in_channels, *spatial = self.x.values.shape
        out_channels, group_channels, *kernel = self.weight.values.shape
        size = self.grad_output.values.shape[2:]
        for n, o, c in itertools.product(range(images), range(out_channels), range(group_channels)):
            channel = o // (out_channels // self.groups) * group_channels + c
            assert channel < in_channels
            for at in itertools.product(*map(range, size)):
                for tap in itertools.product(*map(range, kernel)):
                    geometry = zip(at, tap, self.stride, self.padding, self.dilation, strict=True)
                    place = tuple(i * s - p + t * d for i, t, s, p, d in geometry)
                    if all(0 <= i < length for i, length in zip(place, spatial, strict=True)):
                        yield (n, o, *at), (n, channel, *place), (o, c, *tap)


def conv_layout(x: Tensor, layout: str) -> Tensor:
    """Puts (N, C, *spatial) into memory another way; the expanded layout repeats its first image."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 55, dtype=x.dtype)
        return wide[..., 1::2].copy_(x)
    if layout.startswith("offset"):
        # At a place in memory that no wider word is aligned to, with strides of their own for dimensions of size 1.
        order = x.movedim(1, -1) if layout == "offset_channels_last" else x
        moved = torch.cat((order.new_zeros(1), order.reshape(-1)))[1:].view(order.shape)
        strides = [s if n != 1 else 2 * s + 3 for n, s in zip(moved.shape, moved.stride(), strict=True)]
        moved = moved.as_strided(moved.shape, strides)
        return moved.movedim(-1, 1) if layout == "offset_channels_last" else moved
    if layout == "expanded" and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@st.composite
def convolutions(
    draw: st.DrawFn,
    bits: st.SearchStrategy[int] = widths,
    position: st.SearchStrategy[int] = positions,
    batches: st.SearchStrategy[int] = batch_sizes,
) -> Convolution:
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, dilation = each(1, 4 - (dims + 1) // 2), each(1, 4), each(1, 3)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, r + 2)) for r in reach)
    spatial = [max(1, r + 1 - 2 * p) + extra for r, p, extra in zip(reach, padding, each(0, 5 - dims), strict=True)]
    groups, in_each, out_each = draw(st.integers(1, 3)), draw(channels), draw(channels)
    images, out_channels = draw(batches), groups * out_each
    size = output_size(spatial, kernel, stride, padding, dilation)
    shapes = (images, groups * in_each, *spatial), (out_channels, in_each, *kernel), (images, out_channels, *size)
    layouts = st.sampled_from(CONV_LAYOUTS)
    tensors = [draw(operands(shape, draw(bits), position)) for shape in shapes]
    x, weight, grad_output = (t._replace(values=conv_layout(t.values, draw(layouts))) for t in tensors)
    return Convolution(x, weight, grad_output, stride, padding, dilation, groups)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Says whether two float32 tensors hold the same bits; any NaN equals any other."""
    if actual.dtype != torch.float32 or expected.dtype != torch.float32 or actual.shape != expected.shape:
        return False
    words = [torch.where(t.isnan(), torch.nan, t).contiguous().view(torch.int32) for t in (actual, expected)]
    return torch.equal(*words)


def near(actual: Tensor, expected: Tensor, a: FixedPoint, b: FixedPoint) -> bool:
    """Says whether a product in int31's default mode is within its tolerance of the exact result."""
    if actual.shape != expected.shape:
        return False
    if actual.numel() == 0 or a.values.numel() == 0:
        return torch.equal(actual, expected)
    count = max(a.values.numel(), b.values.numel())
    largest = a.values.double().abs().max() * b.values.double().abs().max() * 2.0 ** (a.position + b.position)
    error = (actual.double() - expected.double()).abs()
    return bool((error <= 2.0**-23 * expected.double().abs() + 1e-14 * count * largest).all())


def total(
    shape: Sequence[int], terms: Callable[[], Iterator[tuple[tuple[int, ...], int]]]
) -> dict[tuple[int, ...], int]:
    """Adds (index, integer) terms up into an integer for every index of ``shape``."""
    sums = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for index, value in terms():
        sums[index] += value
    return sums


def by_index(x: Tensor) -> dict[tuple[int, ...], int]:
    """Returns the integers of a tensor under their indices."""
    return dict(zip(itertools.product(*map(range, x.shape)), x.flatten().tolist(), strict=True))


def nearly_cancelling(rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Elements (rows, C), factors and terms (C,) whose exact sums end far below the last bit of the products."""
    generator = torch.Generator().manual_seed(channels)
    factors, terms = torch.randn(2, channels, generator=generator)
    x = torch.randn(rows, channels, generator=generator)
    x[1::4] = -terms / factors
    x[2::4] *= 2.0**20
    x[3::4] *= 2.0**-26
    # Sums in the middle of two floats, but for less than float64 holds.
    x[0], factors[::2], terms[::2] = 1 + 2.0**-23, 1 + 2.0**-22, 2.0**-60
    x[4], terms[1::4] = 1 + 2.0**-12, -(2.0**-70)
    factors[1::4] = 1 + 2.0**-12
    return x, factors, terms


def rounded_once(x: Tensor, factors: Tensor, terms: Tensor) -> Tensor:
    """The floats nearest to ``x * factors + terms``, (rows, C), of finite results: in exact fractions."""
    numbers = zip(x.tolist(), *(each.expand_as(x).tolist() for each in (factors, terms)), strict=True)
    exact = [Fraction(a) * Fraction(b) + Fraction(c) for row in numbers for a, b, c in zip(*row, strict=True)]
    return torch.tensor([_nearest(each) for each in exact]).view_as(x)


def _nearest(value: Fraction) -> float:
    near = np.float32(float(value))
    around = (near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf)))
    return float(min(around, key=lambda each: (abs(Fraction(float(each)) - value), int(each.view(np.int32)) & 1)))

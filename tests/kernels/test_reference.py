import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import BITS, ROUNDINGS, FixedPoint, limits, storage_dtype
from cnmix.kernels import reference

from .strategies import (
    Convolution,
    by_index,
    convolutions,
    integers,
    matrix_pairs,
    moderate_positions,
    same_bits,
    seeds,
    total,
    widths,
)

BIG = 2**200


def rounded(value: int) -> Fraction:
    """Rounds to 24 significant bits, ties to even, by exact fractions."""
    if value == 0:
        return Fraction(0)
    ulp = Fraction(2) ** (abs(value).bit_length() - 24)
    return round(value / ulp) * ulp


def as_tensor(sums: dict[tuple[int, ...], int], shape: torch.Size, position: int) -> torch.Tensor:
    values = [math.ldexp(float(rounded(v)), position) for v in sums.values()]
    return torch.tensor(values, dtype=torch.float32).view(shape)


@given(st.one_of(st.integers(-BIG, BIG), st.integers(-(2**64), 2**64), st.integers(-(2**25), 2**25)))
@settings(max_examples=300, deadline=None)
def test_round_to_float32_is_to_nearest_even(value):
    result = reference.round_to_float32(value)
    assert Fraction(result) == rounded(value)
    if abs(value) < 2**127:
        assert torch.tensor(result, dtype=torch.float32).item() == result


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 62), st.integers(-2, 2))
@settings(max_examples=200, deadline=None)
def test_round_to_float32_is_torch_conversion_of_int64(value, exponent, offset):
    tie = (value >> 39 << 39) + (1 << 38) + offset
    for v in (value, value >> exponent, tie, (1 << exponent) + offset):
        if -(2**63) <= v < 2**63:
            assert reference.round_to_float32(v) == torch.tensor(v).to(torch.float32).item()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    result = reference.philox([torch.tensor([counter[0]]), *counter[1:]], key)
    assert tuple(word.item() for word in result) == words


def test_uniform_is_the_same_for_any_split():
    whole = reference.uniform(0, 101, seed=5, stream=2)
    for cuts in ((0, 1, 2, 3, 50, 101), (0, 4, 97, 101), (0, 99, 100, 101)):
        parts = [reference.uniform(i, j - i, seed=5, stream=2) for i, j in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    assert ((whole >= 0) & (whole < 1)).all()
    assert torch.equal(whole * 2**24, (whole * 2**24).floor())


def test_uniform_differs_by_every_bit_of_seed_stream_and_index():
    base = reference.uniform(0, 64, 0, 0)
    for seed, stream, start in ((1, 0, 0), (2**32, 0, 0), (2**63, 0, 0), (0, 1, 0), (0, 2**32, 0), (0, 0, 2**34)):
        other = reference.uniform(start, 64, seed, stream)
        assert (base == other).sum() < 3
    assert torch.equal(reference.uniform(0, 8, -1, -1), reference.uniform(0, 8, 2**64 - 1, 2**64 - 1))


def quantized(x: float, bits: int, position: int, rounding: str) -> int:
    scaled = Fraction(x) / Fraction(2) ** position
    if rounding == "nearest_even":
        q = round(scaled)
    elif rounding == "half_up":
        q = math.floor(scaled + Fraction(1, 2))
    else:
        q = math.floor(abs(scaled) + Fraction(1, 2)) * (1 if scaled > 0 else -1)
    low, high = limits(bits)
    return min(max(q, low), high)


@given(
    widths,
    st.integers(-128, 127),
    st.sampled_from(("nearest_even", "half_up", "half_away")),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=8),
    st.lists(st.integers(-(2**23), 2**23), max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_quantize_is_the_definition(bits, position, rounding, floats, halves):
    near_halves = [math.ldexp(h, position - 1) for h in halves]
    x = torch.tensor(floats + [h for h in near_halves if abs(h) < 2.0**128], dtype=torch.float32)
    result = reference.quantize(x, bits, position, rounding)
    assert result.dtype == storage_dtype(bits)
    assert result.tolist() == [quantized(v, bits, position, rounding) for v in x.tolist()]


@given(st.floats(-4, 4, width=32), seeds, st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_stochastic_rounding_is_unbiased(value, seed, stream):
    count = 4096
    result = reference.quantize(torch.full((count,), value), 16, -3, "stochastic", seed=seed, stream=stream)
    scaled = value * 8
    low = math.floor(scaled)
    assert set(result.tolist()) <= {low, low + 1}
    fraction = scaled - low
    deviation = math.sqrt(count * fraction * (1 - fraction))
    assert abs(result.sum().item() - count * scaled) <= 7 * deviation + 1


def test_stochastic_rounding_is_unbiased_over_many_elements():
    count = 1 << 18
    x = torch.full((count,), -2.3)
    sums = [reference.quantize(x, 8, 0, "stochastic", seed=s).sum(dtype=torch.int64).item() for s in range(4)]
    assert len(set(sums)) > 1
    for s in sums:
        assert abs(s - count * x[0].item()) < 5 * math.sqrt(count * 0.21)


def test_stochastic_rounding_in_pieces_is_that_of_the_whole():
    x = torch.randn(1003, generator=torch.Generator().manual_seed(0))
    whole = reference.quantize(x, 8, -5, "stochastic", seed=3, stream=9)
    cuts = (0, 1, 7, 500, 1003)
    parts = [
        reference.quantize(x[i:j], 8, -5, "stochastic", seed=3, stream=9, start=i) for i, j in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("bits", [0, 4, 32, 8.0, True, None, "8"])
def test_quantize_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="8, 16, 31"):
        reference.quantize(torch.zeros(2), bits, 0)


@pytest.mark.parametrize("rounding", ["", "nearest", "up", None])
def test_quantize_refuses_other_roundings(rounding):
    with pytest.raises(ValueError, match="half_away or stochastic"):
        reference.quantize(torch.zeros(2), 8, 0, rounding)
    assert "nearest" not in ROUNDINGS


@given(matrix_pairs(st.tuples(widths, widths), moderate_positions, largest=5))
@settings(max_examples=100, deadline=None)
def test_matmul_is_the_definition(pair):
    a, b = pair
    rows, columns = a.values.tolist(), b.values.t().tolist()
    shape = torch.Size((a.values.shape[0], b.values.shape[1]))

    def terms():
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                yield (i, j), sum(p * q for p, q in zip(row, column, strict=True))

    assert same_bits(reference.matmul(a, b), as_tensor(total(shape, terms), shape, a.position + b.position))


@given(convolutions(position=moderate_positions, batches=st.integers(0, 2)))
@settings(max_examples=100, deadline=None)
def test_convolutions_are_the_definition(case: Convolution):
    x, weight, grad_output = case.x, case.weight, case.grad_output
    xs, ws, gs = (by_index(t.values) for t in (x, weight, grad_output))
    terms = list(case.terms())
    expected = (
        (total(grad_output.values.shape, lambda: ((o, xs[i] * ws[w]) for o, i, w in terms)), grad_output.values.shape),
        (total(x.values.shape, lambda: ((i, gs[o] * ws[w]) for o, i, w in terms)), x.values.shape),
        (total(weight.values.shape, lambda: ((w, gs[o] * xs[i]) for o, i, w in terms)), weight.values.shape),
    )
    for result, (sums, shape), (a, b) in zip(case.run(reference), expected, case.pairs(), strict=True):
        assert same_bits(result, as_tensor(sums, shape, a.position + b.position))


@given(convolutions(bits=st.just(8), position=st.just(0), batches=st.integers(1, 3)))
@settings(max_examples=60, deadline=None)
def test_convolutions_are_those_of_torch_and_autograd(case: Convolution):
    tensors = (t.values.double().clone(memory_format=torch.contiguous_format) for t in (case.x, case.weight))
    x, weight = (t.requires_grad_() for t in tensors)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    output = convolve(x, weight, None, case.stride, case.padding, case.dilation, case.groups)
    output.backward(case.grad_output.values.double().clone(memory_format=torch.contiguous_format))
    for result, expected in zip(case.run(reference), (output.detach(), x.grad, weight.grad), strict=True):
        assert torch.equal(result.double(), expected.float().double())


def test_convolution_refuses_a_kernel_larger_than_its_input():
    x = FixedPoint(torch.zeros((1, 1, 4), dtype=torch.int8), 8, 0)
    weight = FixedPoint(torch.zeros((1, 1, 3), dtype=torch.int8), 8, 0)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        reference.convolution(x, weight, [1], [0], [2], 1)
    assert reference.convolution(x, weight, [1], [1], [2], 1).shape == (1, 1, 2)


@pytest.mark.parametrize("a_bits", BITS)
@pytest.mark.parametrize("b_bits", BITS)
def test_an_operand_that_is_not_finite_makes_nan(a_bits, b_bits):
    for a_finite, b_finite in ((False, True), (True, False), (False, False)):
        a = FixedPoint(integers((3, 2, 4), a_bits), a_bits, 1, a_finite)
        b = FixedPoint(integers((4, 2, 3), b_bits), b_bits, 1, b_finite)
        g = FixedPoint(integers((3, 4, 2), a_bits), a_bits, 1, a_finite)
        flat = reference.matmul(a._replace(values=a.values[0]), b._replace(values=b.values[:, 0]))
        assert flat.isnan().all()
        assert reference.convolution(a, b, [1], [0], [1], 1).isnan().all()
        assert reference.convolution_grad_input(g, b, (3, 2, 4), [1], [0], [1], 1).isnan().all()
        x = FixedPoint(integers((3, 2, 4), b_bits), b_bits, 1, b_finite)
        assert reference.convolution_grad_weight(g, x, (4, 2, 3), [1], [0], [1], 1).isnan().all()

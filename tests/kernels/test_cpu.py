import itertools
import math
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import BITS, FixedPoint, limits
from cnmix.kernels import cpu, products, quantization, reference

from .strategies import (
    CONV_LAYOUTS,
    Convolution,
    conv_layout,
    convolutions,
    integers,
    matrix_pairs,
    moderate_positions,
    near,
    same_bits,
    seeds,
    widths,
)

pytestmark = pytest.mark.usefixtures("backend")

all_mixes = st.tuples(widths, widths)
exact_mixes = st.sampled_from([(a, b) for a in (8, 16) for b in (8, 16)] + [(8, 31), (31, 8)])
blocks = st.sampled_from((1, 50, 400, 1 << 22))


def operand(shape, bits, fill="random", seed=0, position=-5):
    return FixedPoint(integers(shape, bits, fill, seed), bits, position)


def conv_case(dims=2, bits=(8, 8, 8), images=4, groups=2, channels=6, out_each=2, layout="contiguous"):
    spatial, kernel = (9, 8, 7)[:dims], (3, 2, 3)[:dims]
    stride, padding, dilation = (2, 1, 1)[:dims], (1, 0, 2)[:dims], (1, 2, 1)[:dims]
    size = reference.output_size(spatial, kernel, stride, padding, dilation)
    out = groups * out_each
    shapes = (images, channels, *spatial), (out, channels // groups, *kernel), (images, out, *size)
    x, weight, grad_output = (operand(s, b, seed=i) for i, (s, b) in enumerate(zip(shapes, bits, strict=True)))
    x, grad_output = (t._replace(values=conv_layout(t.values, layout)) for t in (x, grad_output))
    return Convolution(x, weight, grad_output, stride, padding, dilation, groups)


@given(matrix_pairs(all_mixes), blocks)
@example((operand((0, 3), 8), operand((3, 2), 8)), 1 << 22)
@example((operand((2, 0), 8), operand((0, 2), 8)), 1 << 22)
@settings(max_examples=300, deadline=None)
def test_matmul_has_the_bits_of_the_reference(pair, block):
    with mock.patch.object(cpu, "_MATRIX_BLOCK", block):
        assert same_bits(cpu.matmul(*pair, exact_int31=True), reference.matmul(*pair))


@given(matrix_pairs(exact_mixes, smallest=1, largest=40), blocks)
@settings(max_examples=150, deadline=None)
def test_matmul_of_narrow_operands_is_exact_in_the_default_mode(pair, block):
    with mock.patch.object(cpu, "_MATRIX_BLOCK", block):
        assert torch.equal(cpu.matmul(*pair), reference.matmul(*pair))


@given(matrix_pairs(st.sampled_from([(31, 31), (31, 16), (16, 31)]), moderate_positions, smallest=1, largest=40))
@settings(max_examples=150, deadline=None)
def test_matmul_of_31_bits_is_within_its_tolerance_in_the_default_mode(pair):
    assert near(cpu.matmul(*pair), reference.matmul(*pair), *pair)


@given(matrix_pairs(st.just((31, 31)), smallest=1, largest=8))
@settings(max_examples=100, deadline=None)
def test_exact_int31_matmul_is_that_of_pythons_integers(pair):
    a, b = (x._replace(position=0) for x in pair)
    rows, columns = a.values.tolist(), b.values.t().tolist()
    exact = [[sum(p * q for p, q in zip(r, c, strict=True)) for c in columns] for r in rows]
    expected = torch.tensor([[reference.round_to_float32(v) for v in row] for row in exact], dtype=torch.float32)
    assert same_bits(cpu.matmul(a, b, exact_int31=True), expected)


@pytest.mark.parametrize(("a_bits", "b_bits"), [(31, 31), (31, 16), (8, 31)])
@pytest.mark.parametrize(("m", "k", "n"), [(5, 1, 5), (12, 300, 9), (3, 4096, 4)])
def test_default_int31_sums_are_normwise_below_1e_14(a_bits, b_bits, m, k, n):
    for fill in ("random", "extremes"):
        a, b = integers((m, k), a_bits, fill, 1), integers((k, n), b_bits, fill, 2)
        sums = products.product_sums(a, b, a_bits, b_bits, False)[0]
        assert sums.dtype == torch.float64
        columns = b.t().tolist()
        exact = [sum(p * q for p, q in zip(row, c, strict=True)) for row in a.tolist() for c in columns]
        error = sum((Fraction(s) - e) ** 2 for s, e in zip(sums.flatten().tolist(), exact, strict=True))
        assert error <= Fraction(10) ** -28 * sum(e * e for e in exact)


@given(st.lists(st.tuples(*[st.integers(-(2**61), 2**61)] * 3), min_size=1, max_size=20), st.data())
@settings(max_examples=200, deadline=None)
def test_sums_in_three_parts_round_once(parts, data):
    # Ties between neighbouring float32 values, and their neighbours, at every magnitude.
    for _ in range(4):
        shift = data.draw(st.integers(1, 60))
        tie = data.draw(st.sampled_from((-1, 1))) * (2 * data.draw(st.integers(2**23, 2**24 - 1)) + 1) << shift
        high, low = divmod(tie + data.draw(st.integers(-1, 1)), 1 << 32)
        parts = [*parts, (high, 0, low)]
    columns = [torch.tensor(column) for column in zip(*parts, strict=True)]
    out = torch.empty(len(parts))
    products.round_into(out, dict(zip((32, 16, 0), columns, strict=True)))
    exact = [(h << 32) + (m << 16) + n for h, m, n in parts]
    assert out.tolist() == [reference.round_to_float32(v) for v in exact]


LONG = {
    (8, 8): (131071, 131072, 131073, 3 * 131071 + 1),
    (16, 16): (131073, 2**23 - 1, 2**23, 2**23 + 1, 2**23 + 2**13 + 1),
    (8, 16): (131073, 2**20 + 1),
    (31, 8): (2**17 + 1,),
    (31, 16): (2**17 + 1,),
    (31, 31): (2**21 - 1, 2**21, 2**21 + 1),
}


@pytest.mark.parametrize(("bits", "k"), [(bits, k) for bits, sizes in LONG.items() for k in sizes])
def test_long_sums_have_their_closed_form(backend, bits, k):
    # Beyond 2^20 VNNI and int_mm leave the whole sum to torch, as "torch" does.
    picks = ((0, 0), (1, 1), (0, 1)) if k < 2**20 or backend in ("AMX", "torch") else ((0, 0),)
    for pick in picks:
        va, vb = (limits(b)[end] for b, end in zip(bits, pick, strict=True))
        a, b = (integers((1, 1), width, "high" if end else "low") for width, end in zip(bits, pick, strict=True))
        left, right = FixedPoint(a.repeat(1, k), bits[0], 3), FixedPoint(b.repeat(k, 1), bits[1], -3)
        if backend == "torch":  # these sums are torch's own, whatever serves the product
            sums = products.product_sums(left.values, right.values, *bits, True)
            assert sum(part.item() << shift for shift, part in sums.items()) == k * va * vb
        result = cpu.matmul(left, right, exact_int31=True)
        assert result.item() == reference.round_to_float32(k * va * vb)
        if k < 2**20:
            assert same_bits(result, reference.matmul(left, right))


@pytest.mark.parametrize("bits", [(8, 8), (16, 16), (31, 31), (16, 8), (31, 16)])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 2)])
def test_long_sums_of_any_values_have_the_bits_of_the_reference(bits, m, n):
    for fill in ("random", "extremes"):
        a, b = operand((m, 132000), bits[0], fill), operand((132000, n), bits[1], fill, 1)
        a = a._replace(values=a.values.t().contiguous().t())
        assert same_bits(cpu.matmul(a, b, exact_int31=True), reference.matmul(a, b))


@given(convolutions(), blocks)
@settings(max_examples=300, deadline=None)
def test_convolutions_have_the_bits_of_the_reference(case, block):
    with mock.patch.object(cpu, "_MATRIX_BLOCK", block):
        results = case.run(cpu, exact_int31=True)
    for result, expected in zip(results, case.run(reference), strict=True):
        assert same_bits(result, expected)


@given(convolutions(position=moderate_positions), blocks)
@settings(max_examples=150, deadline=None)
def test_convolutions_in_the_default_mode_are_exact_or_within_tolerance(case, block):
    with mock.patch.object(cpu, "_MATRIX_BLOCK", block):
        results = case.run(cpu)
    for result, expected, (a, b) in zip(results, case.run(reference), case.pairs(), strict=True):
        if a.bits + b.bits < 40:
            assert torch.equal(result, expected)
        else:
            assert near(result, expected, a, b)


@pytest.mark.parametrize("layout", CONV_LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 4, 6, 8, 16])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("spatial", [(1, 1), (1, 3), (3, 1)])
def test_pointwise_convolutions(layout, channels, images, spatial):
    for bits in (8, 16):
        x, grad_output = (operand((images, channels, *spatial), bits, seed=seed) for seed in (1, 2))
        x, grad_output = (t._replace(values=conv_layout(t.values, layout)) for t in (x, grad_output))
        for groups in {1, math.gcd(channels, 2)}:
            weight = operand((channels, channels // groups, 1, 1), bits)
            case = Convolution(x, weight, grad_output, (1, 1), (0, 0), (1, 1), groups)
            for result, expected in zip(case.run(cpu), case.run(reference), strict=True):
                assert same_bits(result, expected)


@pytest.mark.parametrize("bits", [(8, 8, 8), (16, 8, 31), (31, 31, 31)])
def test_grad_weight_sums_beyond_int32(bits):
    x, grad_output = (FixedPoint(integers((2, 1, 66000), b, "low"), b, 0) for b in (bits[0], bits[2]))
    expected = reference.round_to_float32(2 * 66000 * limits(bits[0])[0] * limits(bits[2])[0])
    for block in (1, 1 << 22):
        with mock.patch.object(cpu, "_MATRIX_BLOCK", block):
            result = cpu.convolution_grad_weight(grad_output, x, (1, 1, 1), [1], [0], [1], 1, exact_int31=True)
        assert result.item() == expected


@pytest.mark.parametrize("groups", [2, 12])
def test_grouped_int8_products_large_enough_for_torchs_integer_kernel(backend, groups):
    case = conv_case(images=8, groups=groups, channels=48, out_each=8)
    with mock.patch.object(products, "int8_matmul", wraps=products.int8_matmul) as spy:
        results = case.run(cpu)
    # The compiled part's own product serves where it can, and calls none of torch's.
    assert (spy.call_count > 0) == (groups == 2 and backend in ("int_mm", "torch"))
    for result, expected in zip(results, case.run(reference), strict=True):
        assert same_bits(result, expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bits", [(8, 8, 8), (31, 16, 8)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_output_has_the_layout_of_the_input(dims, bits, layout):
    case = conv_case(dims, bits, layout=layout)
    output, grad_input, grad_weight = case.run(cpu)
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    expected = formats[dims] if layout == "channels_last" and dims in formats else torch.contiguous_format
    assert output.is_contiguous(memory_format=expected)
    assert grad_input.is_contiguous(memory_format=expected)
    assert grad_weight.is_contiguous()


@pytest.mark.parametrize("bits", BITS)
def test_row_batches_split_without_a_trace(bits):
    a, b = operand((37, 200), bits), operand((200, 19), bits, seed=1)
    whole = cpu.matmul(a, b, exact_int31=True)
    for cuts in ((0, 1, 37), (0, 16, 17, 37), (0, 36, 37)):
        parts = [cpu.matmul(a._replace(values=a.values[i:j]), b, exact_int31=True) for i, j in itertools.pairwise(cuts)]
        assert same_bits(torch.cat(parts), whole)
    case = conv_case(bits=(bits,) * 3)
    output, grad_input, _ = case.run(cpu, exact_int31=True)
    for part in (slice(0, 1), slice(1, 4)):
        piece = case._replace(
            x=case.x._replace(values=case.x.values[part]),
            grad_output=case.grad_output._replace(values=case.grad_output.values[part]),
        )
        part_output, part_grad_input, _ = piece.run(cpu, exact_int31=True)
        assert same_bits(part_output, output[part])
        assert same_bits(part_grad_input, grad_input[part])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", BITS)
def test_any_number_of_threads_gives_the_same_bits(threads, bits):
    a, b = operand((130, 700), bits), operand((700, 90), bits, seed=1)
    case = conv_case(bits=(bits,) * 3, images=16, channels=16)
    x = torch.randn(700, 900, generator=torch.Generator().manual_seed(0))
    results = []
    for count in (1, 2):
        threads(count)
        results.append(
            (cpu.matmul(a, b, exact_int31=True), *case.run(cpu, exact_int31=True), quantization.quantize(x, bits, -4))
        )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    threads(1)
    assert near(cpu.matmul(a, b), results[0][0], a, b)


@pytest.mark.parametrize("a_bits", BITS)
@pytest.mark.parametrize("b_bits", BITS)
@pytest.mark.parametrize("exact", [False, True])
def test_an_operand_that_is_not_finite_makes_nan(a_bits, b_bits, exact):
    for a_finite, b_finite in ((False, True), (True, False), (False, False)):
        a, b = (operand((3, 3), bits, "small") for bits in (a_bits, b_bits))
        product = cpu.matmul(a._replace(finite=a_finite), b._replace(finite=b_finite), exact_int31=exact)
        assert product.shape == (3, 3)
        assert product.isnan().all()
    for layout in ("contiguous", "channels_last"):
        for name in ("x", "weight", "grad_output"):
            case = conv_case(bits=(a_bits, b_bits, a_bits), layout=layout)
            case = case._replace(**{name: getattr(case, name)._replace(finite=False)})
            results, expected = case.run(cpu, exact_int31=exact), case.run(reference)
            for result, other, pair in zip(results, expected, case.pairs(), strict=True):
                assert result.shape == other.shape
                assert result.isnan().all() == other.isnan().all() == (not all(x.finite for x in pair))


def test_convolution_refuses_a_kernel_larger_than_its_input():
    x, weight = operand((1, 1, 4), 8), operand((1, 1, 3), 8)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        cpu.convolution(x, weight, [1], [0], [2], 1)


@given(seeds, st.integers(1, 5), widths, widths)
@settings(max_examples=60, deadline=None)
def test_scales_at_the_ends_of_the_range(seed, size, a_bits, b_bits):
    a, b = integers((size, 2), a_bits, "extremes", seed), integers((2, size), b_bits, "extremes", seed)
    plain = reference.matmul(FixedPoint(a, a_bits, 0), FixedPoint(b, b_bits, 0)).double()
    for position in ((-128, -128), (-128, 127), (127, 127), (-80, -60)):
        pair = FixedPoint(a, a_bits, position[0]), FixedPoint(b, b_bits, position[1])
        expected = (plain * math.ldexp(1.0, sum(position))).float()
        assert torch.equal(reference.matmul(*pair), expected)
        assert same_bits(cpu.matmul(*pair, exact_int31=True), reference.matmul(*pair))

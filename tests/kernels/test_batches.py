"""Batched products, and quantization with a position for each entry."""

import functools
import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import BITS, ROUNDINGS, FixedPoint, FixedPointBatch, choose_position, dequantize
from cnmix.kernels import batches, cpu, native, products, reference, tiles

from .strategies import FILLS, integers, moderate_positions, near, positions, same_bits, seeds, widths

pytestmark = pytest.mark.usefixtures("backend")

LAYOUTS = ("contiguous", "transposed", "heads", "sliced", "columns apart", "reversed batch", "expanded", "shared rows")
# Around the sides of a tile (16 x 64) and of a block of four.
sizes = st.one_of(st.integers(0, 9), st.sampled_from((15, 16, 17, 31, 33, 63, 64, 65, 90)))
batch_shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
blocks = st.sampled_from((1, 3000, 1 << 19))
large_entries = st.sampled_from((1, 2000, 1 << 22))


def lay_out(x, layout):
    """Puts (*batch, rows, columns) into memory another way; the last two layouts change its values."""
    *batch, rows, columns = x.shape
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "heads":  # side by side in a row, between others: (*batch[:-1], rows, 3 * batch[-1] * columns)
        if not batch:
            return x
        packed = torch.full((*batch[:-1], rows, 3, batch[-1], columns), 77, dtype=x.dtype)
        view = packed[..., 1, :, :].transpose(-2, -3)
        return view.copy_(x)
    if layout == "sliced":
        return torch.full((*batch, 2 * rows + 1, columns + 5), 77, dtype=x.dtype)[..., 1::2, 3 : columns + 3].copy_(x)
    if layout == "columns apart":
        return torch.full((*batch, rows, 2 * columns), 77, dtype=x.dtype)[..., ::2].copy_(x)
    if layout == "reversed batch":
        order = [*reversed(range(len(batch))), len(batch), len(batch) + 1]
        return x.permute(order).contiguous().permute(order)
    if layout == "expanded" and batch and batch[-1]:
        return x[..., :1, :, :].expand(x.shape)
    if layout == "shared rows" and rows:
        return x[..., :1, :].expand(x.shape)
    return x


def operand(shape, bits, fill="random", seed=0, position=-5):
    return FixedPoint(integers(shape, bits, fill, seed), bits, position)


def by_entry(x, low=-20, high=20, seed=0):
    """Gives each entry a position of its own."""
    generator = torch.Generator().manual_seed(seed)
    return FixedPointBatch(x.values, x.bits, torch.randint(low, high + 1, x.values.shape[:-2], generator=generator))


@st.composite
def batch_pairs(draw, bits, position=None, shape=batch_shapes, size=sizes):
    batch, m, k, n = draw(shape), draw(size), draw(size), draw(size)
    pair = []
    if position is None:  # an entry out of float32's range leaves the whole batch to torch
        position = draw(st.sampled_from((moderate_positions, positions)))
    for inner, width in zip(((m, k), (k, n)), draw(bits), strict=True):
        values = integers((*batch, *inner), width, draw(st.sampled_from(FILLS)), draw(seeds))
        values = lay_out(values, draw(st.sampled_from(LAYOUTS)))
        if draw(st.booleans()):
            pair.append(FixedPoint(values, width, draw(position)))
            continue
        given = [n if draw(st.booleans()) else min(n, 1) for n in batch]
        count = math.prod(given)
        chosen = torch.tensor([draw(position) for _ in range(count)], dtype=torch.int64).view(given)
        pair.append(FixedPointBatch(values, width, chosen))
    return tuple(pair)


@given(batch_pairs(st.tuples(widths, widths)), blocks, large_entries)
@settings(max_examples=300, deadline=None)
def test_batches_have_the_bits_of_the_reference(pair, block, large):
    with mock.patch.multiple(batches, _BLOCK=block, _LARGE_ENTRY=large):
        assert same_bits(batches.batched_matmul(*pair, exact_int31=True), reference.batched_matmul(*pair))


@given(
    batch_pairs(
        st.sampled_from([(31, 31), (31, 16), (16, 31)]), moderate_positions, st.just((3,)), size=st.integers(1, 20)
    )
)
@settings(max_examples=60, deadline=None)
def test_31_bits_are_within_their_tolerance_in_the_default_mode(pair):
    result = batches.batched_matmul(*pair)
    for entry, expected in enumerate(reference.batched_matmul(*pair)):
        one, two = (
            FixedPoint(x.values[entry], x.bits, x.position)
            if isinstance(x, FixedPoint)
            else FixedPoint(x.values[entry], x.bits, int(x.positions.expand(3)[entry]))
            for x in pair
        )
        assert near(result[entry], expected, one, two)


@pytest.mark.parametrize("bits", [(8, 8), (16, 16), (8, 31)])
def test_entries_are_products_of_their_own(bits):
    a, b = operand((5, 33, 70), bits[0]), by_entry(operand((5, 70, 18), bits[1], seed=1))
    result = batches.batched_matmul(a, b, exact_int31=True)
    for entry in range(5):
        one = a._replace(values=a.values[entry])
        two = FixedPoint(b.values[entry], b.bits, int(b.positions[entry]))
        assert same_bits(result[entry], cpu.matmul(one, two, exact_int31=True))


@pytest.mark.parametrize("fills", list(itertools.product(("low", "high", "extremes"), repeat=2)))
@pytest.mark.parametrize("bits", list(itertools.product(BITS, repeat=2)))
def test_extremes_of_every_pair_of_widths(bits, fills):
    a, b = (operand(s, w, f) for s, w, f in zip(((2, 17, 130), (2, 130, 3)), bits, fills, strict=True))
    assert same_bits(batches.batched_matmul(a, b, exact_int31=True), reference.batched_matmul(a, b))


@pytest.mark.parametrize("k", [1023, 1024, 1025, 1100, 2049])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_int8_sums_to_the_end_of_float32_and_beyond(k, precision):
    torch.set_float32_matmul_precision(precision)
    try:
        for fills in (("low", "low"), ("low", "high"), ("extremes", "random")):
            a, b = (operand(s, 8, f) for s, f in zip(((9, 16, k), (9, k, 32)), fills, strict=True))
            # Odd products, of which float32 would lose the last bits.
            odd = b._replace(values=operand((9, k, 32), 8).values % 32 * 2 + 65)
            a = a._replace(values=a.values.clamp(min=-127))
            with torch.autocast("cpu", torch.bfloat16):
                assert same_bits(batches.batched_matmul(a, b), reference.batched_matmul(a, b))
                assert same_bits(batches.batched_matmul(a, odd), reference.batched_matmul(a, odd))
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shape", [(1, 8, 1, 64), (1, 64, 1, 8), (4, 3, 2, 5)])
def test_zero_has_no_sign(shape):
    entries, m, k, n = shape
    a, b = operand((entries, m, k), 8), operand((entries, k, n), 8, "low")
    a.values.zero_()
    assert not batches.batched_matmul(a, b).signbit().any()


def test_attention_of_heads_that_share_their_keys():
    images, groups, heads, length, width = 2, 3, 4, 19, 16
    packed = integers((images, length, (heads + 2) * groups * width), 8)
    split = packed.view(images, length, heads + 2, groups, width)
    queries = FixedPoint(split[:, :, :heads].permute(0, 3, 2, 1, 4), 8, -3)  # (images, groups, heads, length, width)
    keys, values = (split[:, :, heads + i].transpose(1, 2).unsqueeze(2) for i in range(2))
    chosen = torch.arange(images * groups).view(images, groups, 1)
    keys = FixedPointBatch(keys.expand(queries.values.shape).transpose(-1, -2), 8, chosen)
    scores = batches.batched_matmul(queries, keys)
    assert scores.shape == (images, groups, heads, length, length)
    assert same_bits(scores, reference.batched_matmul(queries, keys))
    weights = by_entry(FixedPoint(integers(scores.shape, 8, seed=1), 8, 0))
    values = FixedPointBatch(values.expand(queries.values.shape), 8, chosen - 9)
    assert same_bits(batches.batched_matmul(weights, values), reference.batched_matmul(weights, values))
    # The gradient of the keys: rows of the first operand lie apart.
    swapped = weights._replace(values=weights.values.transpose(-1, -2))
    assert same_bits(batches.batched_matmul(swapped, queries), reference.batched_matmul(swapped, queries))


@pytest.mark.parametrize("shape", [(40, 33, 70, 20), (3, 300, 200, 150), (2, 5, 9000, 7), (1, 700, 64, 500)])
@pytest.mark.parametrize("bits", [(8, 8), (16, 8)])
def test_any_number_of_threads_gives_the_bits_of_the_reference(shape, bits):
    entries, m, k, n = shape
    a, b = operand((entries, m, k), bits[0]), by_entry(operand((entries, k, n), bits[1], seed=1))
    expected = reference.batched_matmul(a, b)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same_bits(batches.batched_matmul(a, b), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
def test_results_in_half_are_rounded_float32(dtype, bits):
    a, b = operand((3, 17, 40), bits), by_entry(operand((3, 40, 33), bits, seed=1))
    result = batches.batched_matmul(a, b, dtype=dtype)
    assert result.dtype == dtype
    assert torch.equal(result, batches.batched_matmul(a, b).to(dtype))


def test_an_operand_that_is_not_finite_makes_nan():
    a, b = operand((3, 4, 5), 8), by_entry(operand((3, 5, 6), 8))
    for pair in ((a._replace(finite=False), b), (a, b._replace(finite=False))):
        result = batches.batched_matmul(*pair, dtype=torch.bfloat16)
        assert result.shape == (3, 4, 6)
        assert result.dtype == torch.bfloat16
        assert result.isnan().all()
        assert reference.batched_matmul(*pair).isnan().all()


def test_one_entry_out_of_float32s_range_leaves_the_others_right():
    a, b = operand((4, 5, 6), 8), operand((4, 6, 7), 8, seed=1)
    far = FixedPointBatch(b.values, 8, torch.tensor([-128, 0, 127, 100]))
    a = FixedPointBatch(a.values, 8, torch.tensor([-127, 0, 127, -30]))
    assert not tiles.serve(a, far)
    assert same_bits(batches.batched_matmul(a, far), reference.batched_matmul(a, far))


@pytest.mark.parametrize(
    ("left", "right"), [((2, 3, 4), (2, 5, 6)), ((2, 3, 4), (3, 4, 5)), ((2, 3, 4), (4, 5)), ((4,), (4, 5))]
)
def test_shapes_that_do_not_go_together_are_named(left, right):
    with pytest.raises(ValueError, match=r"\(\*batch, M, K\) by \(\*batch, K, N\), got .* by"):
        batches.batched_matmul(operand(left, 8), operand(right, 8))


@pytest.mark.parametrize("sizes", [(3,), (1, 1), ()])
def test_positions_of_another_shape_are_named(sizes):
    a, b = operand((2, 3, 4), 8), operand((2, 4, 5), 8)
    wrong = FixedPointBatch(a.values, 8, torch.zeros(sizes, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"positions must have the sizes of the batch \(2,\), or 1"):
        batches.batched_matmul(wrong, b)


def test_large_entries_go_one_by_one_on_torch(backend):
    a, b = operand((2, 130, 260), 8), operand((2, 260, 140), 8)
    with mock.patch.object(products, "int8_matmul", wraps=products.int8_matmul) as spy:
        assert same_bits(batches.batched_matmul(a, b), reference.batched_matmul(a, b))
    assert spy.call_count == (2 if backend in ("int_mm", "torch") else 0)


def normal(*shape, seed=0):
    scale = torch.logspace(-3, 3, max(shape[0], 1))[: shape[0]].view(-1, *(1,) * (len(shape) - 1))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def same_quantized(x, bits, given=None, rounding="nearest_even", expected=None, **options):
    result, found = batches.quantize_batch(x, bits, given, rounding, **options)
    options.pop("measure", None)
    if expected is None:
        expected = reference.quantize_batch(x, bits, given, rounding, **options)
    assert result.finite
    assert result.values.dtype == expected.values.dtype
    assert found.absmax.shape == result.positions.shape == expected.positions.shape
    assert torch.equal(result.positions, expected.positions)
    return torch.equal(result.values, expected.values)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.lists(st.one_of(FLOATS, st.floats(-4, 4, width=32)), min_size=1, max_size=24),
    st.integers(0, 2),
    widths,
    st.sampled_from(ROUNDINGS),
    st.booleans(),
    st.sampled_from((1, 7, 1 << 19)),
    seeds,
)
@settings(max_examples=300, deadline=None)
def test_entries_are_quantized_as_by_the_reference(values, dims, bits, rounding, choose, block, seed):
    values = values * -(-24 // len(values))
    x = torch.tensor(values[:24]).view(2, 3, 4)
    generator = torch.Generator().manual_seed(seed)
    given_positions = None if choose else torch.randint(-128, 128, x.shape[:dims], generator=generator)
    with mock.patch.object(batches, "_BLOCK", block):
        assert same_quantized(x, bits, given_positions, rounding, batch_dims=dims, seed=seed, stream=5)


def memory_layouts():
    x = normal(6, 5, 4, 33)
    yield "contiguous", x
    yield "heads", normal(6, 4, 3 * 5 * 33).view(6, 4, 3, 5, 33)[:, :, 1].transpose(1, 2)
    yield "transposed heads", normal(6, 4, 5, 33).permute(0, 2, 3, 1)
    yield "sliced", normal(6, 5, 9, 70)[:, :, 1::2, ::2]
    yield "expanded batch", normal(6, 1, 4, 33).expand(6, 5, 4, 33)
    yield "expanded rows", normal(6, 5, 1, 33).expand(6, 5, 4, 33)
    yield "expanded columns", normal(6, 5, 4, 1).expand(6, 5, 4, 33)
    yield "overlapping", normal(200).as_strided((6, 5, 4, 33), (9, 7, 1, 1))
    yield "permuted", normal(4, 33, 6, 5).permute(2, 3, 0, 1)
    yield "bfloat16", x.bfloat16()
    yield "bfloat16 heads", normal(6, 4, 5, 33).bfloat16().transpose(1, 2)
    yield "float16", x.half()
    yield "float64", x.double()
    yield "no entries", torch.empty(6, 0, 4, 33)
    yield "empty entries", torch.empty(6, 5, 0, 33)


MEMORY = dict(memory_layouts())


@functools.cache  # the same for every way of multiplying
def reference_of(layout, bits, rounding, dims):
    return reference.quantize_batch(MEMORY[layout], bits, None, rounding, batch_dims=dims, seed=3, stream=9)


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("rounding", ["nearest_even", "half_away", "stochastic"])
def test_any_memory_layout_is_quantized_as_by_the_reference(layout, rounding):
    x = MEMORY[layout]
    for dims, bits in itertools.product((0, 1, 2, 3, 4), BITS):
        expected = reference_of(layout, bits, rounding, dims)
        assert same_quantized(x, bits, None, rounding, expected, batch_dims=dims, seed=3, stream=9)
    given_positions = torch.arange(6).view(6, 1) - 12
    assert same_quantized(x, 8, given_positions, rounding, batch_dims=2, measure=True)


@pytest.mark.parametrize("shape", [(3, 10000), (40, 20, 64), (1, 70001)])
def test_long_entries_and_their_statistics(shape):
    for heads in (False, True):
        x = normal(*shape)
        if heads:
            x = torch.stack((x, x), dim=-2)[..., 1, :]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rounding in ("nearest_even", "stochastic"):
                assert same_quantized(x, 8, None, rounding, seed=1, stream=2)
            result, found = batches.quantize_batch(x, 16, measure=True)
            inner = tuple(range(1, x.dim()))
            assert torch.equal(found.absmax, x.abs().amax(inner).double())
            assert torch.equal(found.sum_q, result.values.to(torch.int64).abs().sum(inner))
            torch.testing.assert_close(found.sum_x, x.double().abs().sum(inner), rtol=1e-12, atol=0)
            torch.testing.assert_close(dequantize(result), x, rtol=0, atol=2.0**-14 * float(x.abs().max()))


def test_tiny_and_zero_entries_choose_their_positions():
    x = torch.zeros(5, 3)
    x[1, 2], x[2, 0], x[3, 1], x[4, 0] = 2.0**-149, -(2.0**-126), 3.4028234663852886e38, 1.0
    for bits in BITS:
        result, _ = batches.quantize_batch(x, bits)
        assert result.positions.tolist() == [choose_position(float(e.abs().max()), bits) for e in x]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chosen", [True, False])
def test_an_entry_that_is_not_finite_makes_the_batch_so(value, chosen):
    x = normal(5, 6, 7)
    x[3, 2, 1] = value
    given_positions = None if chosen else torch.arange(5)
    result, found = batches.quantize_batch(x, 8, given_positions)
    assert not result.finite
    assert not result.values.any()
    assert found.absmax.isfinite().tolist() == [True, True, True, False, True]
    expected = [0 if e == 3 else choose_position(float(x[e].abs().max()), 8) for e in range(5)] if chosen else range(5)
    assert result.positions.tolist() == list(expected)
    assert dequantize(result).isnan().all()


def test_integers_of_an_entry_lie_together():
    result, _ = batches.quantize_batch(MEMORY["heads"], 8, batch_dims=2)
    assert result.values.is_contiguous()
    result, _ = batches.quantize_batch(MEMORY["transposed heads"], 8, batch_dims=2)
    assert result.values.transpose(-1, -2).is_contiguous()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_dims": 3}, r"batch_dims must be in \[0, 2\] for a tensor of 2 dimensions, got 3"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions must broadcast to the batch \(2,\), got \(3,\)"),
        ({"positions": torch.tensor([0, 128])}, r"positions must be in \[-128, 127\], got 0 to 128"),
        ({"positions": torch.zeros(2)}, "positions must be integers, got torch.float32"),
        ({"rounding": "up"}, "rounding must be nearest_even"),
        ({"bits": 7}, "bits must be one of 8, 16, 31"),
    ],
)
def test_wrong_use_of_quantize_batch_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        batches.quantize_batch(torch.zeros(2, 4), **{"bits": 8, **options})


def test_dequantized_batches_have_each_entrys_step():
    values = integers((4, 3), 31, "extremes")
    chosen = torch.tensor([-128, 0, 97, -30])
    result = dequantize(FixedPointBatch(values, 31, chosen))
    for entry in range(4):
        assert same_bits(result[entry], dequantize(FixedPoint(values[entry], 31, int(chosen[entry]))))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_instruction_set_quantizes_a_batch_alike(rounding):
    library, x = native.library(), MEMORY["heads"]
    if library is None:
        pytest.skip("torch alone")
    best = library.cnmix_isa(-1)
    for limit in range(best + 1):
        library.cnmix_isa(limit)
        assert all(same_quantized(x, bits, None, rounding, batch_dims=2, seed=1, measure=True) for bits in BITS)
    library.cnmix_isa(best)

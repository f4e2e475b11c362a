import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import BITS, ROUNDINGS, limits, storage_dtype
from cnmix.kernels import quantization, reference

from .strategies import conv_layout, seeds, widths

pytestmark = pytest.mark.usefixtures("backend")

words = st.integers(0, 2**64 - 1)
roundings = st.sampled_from(ROUNDINGS)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
EDGES = (0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38, -3.4028234663852886e38)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(x: torch.Tensor, bits: int, position: int, rounding: str, **key: int) -> bool:
    result, expected = (k.quantize(x, bits, position, rounding, **key) for k in (quantization, reference))
    return result.dtype == expected.dtype == storage_dtype(bits) and torch.equal(result, expected)


@given(
    st.lists(finite, max_size=20),
    st.lists(st.integers(-(2**24), 2**24), max_size=20),
    st.lists(st.integers(-3, 3), max_size=10),
    widths,
    st.integers(-128, 127),
    roundings,
    st.sampled_from((1, 3, 8, 1 << 18)),
    words,
    words,
)
@settings(max_examples=500, deadline=None)
def test_quantize_has_the_bits_of_the_reference(floats, halves, steps, bits, position, rounding, block, seed, stream):
    low, high = limits(bits)
    scaled = [h / 2 for h in halves] + [low + s / 2 for s in steps] + [high + s / 2 for s in steps]
    near = [v for v in (math.ldexp(s, position) for s in scaled) if abs(v) < 2.0**127]
    x = torch.tensor([*EDGES, *floats, *near], dtype=torch.float32)
    with mock.patch.object(quantization, "_QUANTIZE_BLOCK", block):
        assert same(x, bits, position, rounding, seed=seed, stream=stream)


@pytest.mark.parametrize("position", [-128, -127, -126, -1, 0, 1, 126, 127])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_ties_and_saturation_at_the_ends_of_the_positions(position, bits, rounding):
    low, high = limits(bits)
    halves = torch.arange(-9, 10) / 2
    ends = torch.tensor([low - 1.5, low - 0.5, low, low + 0.5, high - 0.5, high, high + 0.5, high + 1.5, 4.0 * high])
    x = (torch.cat((halves, ends, -ends)).double() * 2.0**position).float()
    x = torch.cat((x[x.isfinite()], torch.nextafter(x, torch.zeros(())).nan_to_num(), torch.tensor(EDGES)))
    assert same(x, bits, position, rounding, seed=1, stream=2)
    below, above = quantization.quantize(torch.tensor([-3.4e38, 3.4e38]), bits, 90, rounding).tolist()
    assert (below, above) == (low, high)


@pytest.mark.parametrize("bits", BITS)
def test_ties_round_as_named(bits):
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    expected = {
        "nearest_even": [-2, -2, 0, 0, 2, 2],
        "half_up": [-2, -1, 0, 1, 2, 3],
        "half_away": [-3, -2, -1, 1, 2, 3],
    }
    for rounding, values in expected.items():
        assert quantization.quantize(x, bits, 0, rounding).tolist() == values
        assert quantization.quantize(x / 8, bits, -3, rounding).tolist() == values


def memory_layouts():
    x = normal(6, 5, 4, 3)
    yield "contiguous", x
    yield "transposed", normal(7, 9).t()
    yield "permuted", x.permute(2, 0, 3, 1)
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "channels_last_3d", conv_layout(normal(2, 3, 4, 5, 2), "channels_last")
    yield "sliced", normal(9, 10)[1::2, ::3]
    yield "sliced_transposed", normal(9, 10)[1::2, ::3].t()
    yield "expanded", normal(4, 1, 3).expand(4, 5, 3)
    yield "expanded_scalar", torch.tensor(1.25).expand(3, 4)
    yield "overlapping", normal(20).as_strided((4, 5), (1, 1))
    yield "windows", normal(20).unfold(0, 5, 2)
    yield "degenerate", normal(6).as_strided((1, 6), (1, 1))
    yield "degenerate_column", normal(6).as_strided((6, 1, 1), (1, 1, 3))
    yield "offset", normal(40)[7:]
    yield "scalar", torch.tensor(-0.7)
    yield "one", normal(1, 1, 1)
    yield "empty", torch.empty(0)
    yield "empty_matrix", torch.empty(3, 0, 2).transpose(0, 2)


LAYOUTS = dict(memory_layouts())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("block", [4, 1 << 18])
def test_any_memory_layout_has_the_bits_of_the_reference(layout, rounding, block):
    x = LAYOUTS[layout]
    before = x.clone()
    with mock.patch.object(quantization, "_QUANTIZE_BLOCK", block):
        assert all(same(x, bits, -5, rounding, seed=4, stream=7) for bits in BITS)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "permuted", "channels_last", "channels_last_3d"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_quantize_keeps_the_memory_layout(layout, rounding):
    x = LAYOUTS[layout]
    assert quantization.quantize(x, 8, -5, rounding).stride() == x.stride()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("count", [2**18 - 1, 2**18 + 7])
def test_more_than_one_block(rounding, count):
    assert same(normal(count), 8, -5, rounding, seed=2**40 + 1, stream=2**35)


def test_stochastic_rounding_of_a_transposed_matrix_of_several_blocks():
    x = normal(700, 800).t()
    assert same(x, 16, -12, "stochastic", seed=11)
    result = quantization.quantize(x, 16, -12, "stochastic", seed=11)
    assert torch.equal(result, quantization.quantize(x.contiguous(), 16, -12, "stochastic", seed=11))
    assert not torch.equal(result, quantization.quantize(x, 16, -12, "stochastic", seed=12))
    assert not torch.equal(result, quantization.quantize(x, 16, -12, "stochastic", seed=11, stream=1))


@given(seeds, st.sampled_from((torch.bfloat16, torch.float16, torch.float64)), widths, roundings, st.integers(-20, 4))
@settings(max_examples=80, deadline=None)
def test_other_float_types_are_read_as_float32(seed, dtype, bits, rounding, position):
    x = (normal(5, 9, seed=seed % 1000).double() * 16 + 1e-9).to(dtype).t()
    result = quantization.quantize(x, bits, position, rounding, seed=seed)
    assert torch.equal(result, reference.quantize(x.float(), bits, position, rounding, seed=seed))
    assert torch.equal(result, reference.quantize(x, bits, position, rounding, seed=seed))


def test_float64_just_above_a_tie_is_the_tie_in_float32():
    x = torch.tensor([0.5 + 1e-12, 2.5 - 1e-12], dtype=torch.float64)
    assert quantization.quantize(x, 8, 0).tolist() == reference.quantize(x, 8, 0).tolist() == [0, 2]


def test_quantize_takes_parameters():
    x = torch.nn.Parameter(normal(3, 4))
    assert same(x, 8, -5, "nearest_even")
    assert not quantization.quantize(x, 8, -5, "half_up").requires_grad


@pytest.mark.parametrize("bits", [0, 4, 32, 8.0, True, None, "8"])
def test_quantize_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="8, 16, 31"):
        quantization.quantize(torch.zeros(2), bits, 0)


@pytest.mark.parametrize("rounding", ["", "nearest", "up", None])
@pytest.mark.parametrize("shape", [(), (2,), (0,)])
def test_quantize_refuses_other_roundings(rounding, shape):
    with pytest.raises(ValueError, match="half_away or stochastic"):
        quantization.quantize(torch.zeros(shape), 8, 0, rounding)


SLICES = {
    "columns": lambda x: x[:, :, 32:96],
    "heads": lambda x: x[:, :, :64].unflatten(-1, (4, 16)).permute(1, 2, 0, 3),
    "turned heads": lambda x: x[:, :, 64:].unflatten(-1, (4, 16)).permute(1, 2, 3, 0),
    "every other row": lambda x: x[::2],
    "every other column": lambda x: x[:, :, ::2],
    "one row for all": lambda x: x[:1].expand(5, -1, -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 16, 31])
@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_quantized_as_a_copy_of_it_is(name, bits, dtype):
    x = SLICES[name](torch.randn(7, 5, 128, generator=torch.Generator().manual_seed(0)).to(dtype))
    found, statistics = quantization.quantize_measured(x, bits, 3 - bits)
    expected, known = quantization.quantize_measured(x.contiguous(), bits, 3 - bits)
    assert torch.equal(found.values, expected.values)
    assert (statistics.absmax, found.position, found.finite) == (known.absmax, expected.position, True)
    assert found.values.stride() == torch.empty_like(x).stride() or name == "one row for all"
    if name != "one row for all":
        x[-1, -1, -1] = float("nan")
        assert not quantization.quantize_measured(x, bits, 3 - bits)[0].finite

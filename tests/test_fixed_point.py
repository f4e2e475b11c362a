import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import (
    BITS,
    POSITION_MAX,
    POSITION_MIN,
    FixedPoint,
    absmax,
    check_bits,
    choose_position,
    dequantize,
    limits,
    scale_by_power_of_two,
    storage_dtype,
)
from cnmix.kernels import quantize

FLOAT32_MAX = 3.4028234663852886e38
widths = st.sampled_from(BITS)


def below(value: float) -> float:
    return torch.nextafter(torch.tensor(value), torch.tensor(0.0)).item()


def floor_log2(value: float) -> int:
    ratio = Fraction(value)
    exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    return exponent if ratio >= Fraction(2) ** exponent else exponent - 1


def clamped(position: int) -> int:
    return min(max(position, POSITION_MIN), POSITION_MAX)


@pytest.mark.parametrize("bits", BITS)
def test_position_at_and_just_below_every_power_of_two(bits):
    for exponent in range(-149, 128):
        power = 2.0**exponent
        assert choose_position(power, bits) == clamped(exponent - (bits - 2))
        if exponent > -149:
            expected = floor_log2(below(power))
            assert expected == exponent - 1
            assert choose_position(below(power), bits) == clamped(expected - (bits - 2))


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False, width=32), widths)
@settings(max_examples=200, deadline=None)
def test_position_is_the_floor_of_the_logarithm(value, bits):
    assert choose_position(value, bits) == clamped(floor_log2(value) - (bits - 2))


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -128, 121), (16, -128, 113), (31, -128, 98)])
def test_position_at_the_ends_of_float32(bits, low, high):
    assert choose_position(0.0, bits) == 0
    assert choose_position(-0.0, bits) == 0
    assert choose_position(2.0**-149, bits) == low
    assert choose_position(FLOAT32_MAX, bits) == high
    assert choose_position(2.0**1000, bits) == POSITION_MAX


@given(st.floats(min_value=2.0**-90, max_value=FLOAT32_MAX, width=32), widths)
@settings(max_examples=200, deadline=None)
def test_the_chosen_position_fills_the_width(value, bits):
    _, high = limits(bits)
    scaled = Fraction(value) / Fraction(2) ** choose_position(value, bits)
    assert (high + 1) // 2 <= scaled < high + 1
    q = quantize(torch.tensor([value, -value]), bits, choose_position(value, bits)).tolist()
    assert q[0] >= (high + 1) // 2
    assert -q[1] - q[0] in (0, 1)


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -128, 127), (16, -32768, 32767), (31, -(2**30), 2**30 - 1)])
def test_limits_fit_the_storage(bits, low, high):
    assert limits(bits) == (low, high)
    info = torch.iinfo(storage_dtype(bits))
    assert info.min <= low < high <= info.max
    assert info.bits == {8: 8, 16: 16, 31: 32}[bits]


@pytest.mark.parametrize("bits", [0, 7, 32, -8, 8.0, 31.0, True, False, None, "16"])
def test_other_widths_are_refused_by_name(bits):
    with pytest.raises(ValueError, match=r"start_bits must be one of 8, 16, 31"):
        check_bits(bits, "start_bits")
    with pytest.raises(ValueError, match=r"bits must be one of 8, 16, 31"):
        storage_dtype(bits)


def test_absmax_of_numbers():
    assert absmax(torch.tensor([1.0, -3.5, 2.0])) == 3.5
    assert absmax(torch.tensor([[1.0, 4.25], [-3.5, 2.0]]).t()) == 4.25
    assert absmax(torch.tensor(-7.0)) == 7.0
    assert absmax(torch.tensor([-0.0, 0.0])) == 0.0
    assert absmax(torch.tensor([2.0**-149, -(2.0**-148)])) == 2.0**-148
    assert absmax(torch.tensor([FLOAT32_MAX, -1.0])) == FLOAT32_MAX
    assert absmax(torch.nn.Parameter(torch.tensor([-2.0]))) == 2.0
    assert absmax(torch.tensor([-2.0], dtype=torch.bfloat16)) == 2.0
    assert absmax(torch.ones(1, 3).expand(4, 3)) == 1.0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 4)])
def test_absmax_of_nothing(shape):
    assert absmax(torch.empty(shape)) == 0.0
    assert choose_position(absmax(torch.empty(shape)), 8) == 0


@pytest.mark.parametrize("place", [0, 500, 999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_absmax_shows_what_is_not_finite(place, dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for value in (math.inf, -math.inf):
        x[place] = value
        assert absmax(x) == math.inf
    x[place] = math.nan
    assert math.isnan(absmax(x))
    x[1 - place if place == 0 else 0] = math.inf
    assert math.isnan(absmax(x))


@given(st.sampled_from((8, 16)), st.integers(-128, 110), st.data())
@settings(max_examples=100, deadline=None)
def test_dequantize_is_exact(bits, position, data):
    values = data.draw(st.lists(st.integers(*limits(bits)), max_size=8))
    x = FixedPoint(torch.tensor(values, dtype=storage_dtype(bits)), bits, position)
    result = dequantize(x)
    assert result.dtype == torch.float32
    assert [Fraction(v) for v in result.tolist()] == [q * Fraction(2) ** position for q in values]
    assert torch.equal(quantize(result, bits, position), x.values)


def test_dequantize_rounds_31_bits_to_float32():
    x = FixedPoint(torch.tensor([2**30 - 1, 2**24 + 1, 2**24 + 3, -(2**30)], dtype=torch.int32), 31, -1)
    assert dequantize(x).tolist() == [2.0**29, 2.0**23, 2.0**23 + 2, -(2.0**29)]
    assert x.values.tolist() == [2**30 - 1, 2**24 + 1, 2**24 + 3, -(2**30)]


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_of_what_was_not_finite_is_nan(bits):
    x = FixedPoint(torch.zeros((2, 3), dtype=storage_dtype(bits)), bits, 0, finite=False)
    assert dequantize(x).shape == (2, 3)
    assert dequantize(x).dtype == torch.float32
    assert dequantize(x).isnan().all()


def test_dequantize_keeps_the_layout():
    values = torch.zeros((2, 3, 4, 5), dtype=torch.int8).to(memory_format=torch.channels_last)
    assert dequantize(FixedPoint(values, 8, 3)).is_contiguous(memory_format=torch.channels_last)


def test_a_float_error_of_half_a_step_at_most():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for bits in BITS:
        position = choose_position(absmax(x), bits)
        error = (dequantize(FixedPoint(quantize(x, bits, position), bits, position)) - x).abs().max()
        # The largest value may saturate, by half a step more.
        assert error <= 2.0**position


def test_scaling_rounds_once_at_every_exponent():
    x = torch.tensor([0.0, 1.0, -1.0, 1.9999999, 16777215.0, -1073741824.0, 2.0**70, 3.0 * 2**-20])
    for exponent in range(-256, 255):
        given_tensor = x.clone()
        result = scale_by_power_of_two(given_tensor, exponent)
        assert result is given_tensor
        assert torch.equal(result, (x.double() * 2.0**exponent).float())

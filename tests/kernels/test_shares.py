import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix import kernels
from cnmix.fixed_point import BITS, ROUNDINGS, FixedPoint, limits
from cnmix.kernels import Shares, quantize_measured, shares

from .strategies import seeds, widths

pytestmark = pytest.mark.usefixtures("backend")


def directly(x: torch.Tensor, bits: int, position: int) -> Shares:
    """By the definition, on the floats; a tie goes to the even integer, which the lowest is and the highest is not."""
    low, high = limits(bits)
    steps = x.to(torch.float32).double() * 2.0**-position
    at_limits = (steps > high - 0.5) | (steps <= low + 0.5)
    lost = (steps.abs() <= 0.5) & (x != 0)
    return Shares(at_limits.sum().item() / x.numel(), lost.sum().item() / x.numel())


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@given(seeds, widths, st.sampled_from(FLOATS), st.integers(-6, 34))
@settings(max_examples=150, deadline=None)
def test_shares_are_those_of_the_definition(seed, bits, dtype, coarser):
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes over many powers of two, zeros, and a position from one that saturates to one that loses nearly all.
    x = torch.randn(7, 30, generator=generator) * 2.0 ** torch.randint(-14, 8, (7, 30), generator=generator)
    x = (x * torch.randint(0, 4, (7, 30), generator=generator).clamp(max=1)).to(dtype)
    position = coarser - bits
    assert shares(x, quantize_measured(x, bits, position)[0]) == directly(x, bits, position)


@pytest.mark.parametrize("bits", BITS)
def test_a_known_tensor(bits):
    low, high = limits(bits)
    far = 4.0 * high
    x = torch.tensor([0.0, -0.0, 0.25, -0.5, 1e-45, 0.75, far, -far, float(low), 3.0])
    quantized = quantize_measured(x, bits, 0)[0]
    assert shares(x, quantized) == (0.3, 0.3)
    assert shares(x.bfloat16(), quantize_measured(x.bfloat16(), bits, 0)[0]) == (0.3, 0.2)  # 1e-45 is 0 in bfloat16


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_underflow_goes_by_what_was_rounded_to_zero(rounding):
    x = torch.linspace(-1, 1, 41)
    quantized = quantize_measured(x, 8, 0, rounding, seed=3, stream=1)[0]
    assert shares(x, quantized).underflow == ((quantized.values == 0) & (x != 0)).sum().item() / 41


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_empty(bits, shape):
    x = torch.empty(shape)
    assert shares(x, quantize_measured(x, bits, None)[0]) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", BITS)
def test_not_finite(bits, bad):
    x = torch.tensor([1.0, bad, 0.0])
    assert all(math.isnan(share) for share in shares(x, quantize_measured(x, bits, None)[0]))


def test_any_memory_layout():
    x = torch.randn(6, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = shares(x, quantize_measured(x, 8, -3)[0])
    for other in (x.to(memory_format=torch.channels_last), x.permute(2, 0, 3, 1), x.requires_grad_()):
        assert shares(other, quantize_measured(other, 8, -3)[0]) == expected
    assert expected.saturation == kernels.saturated_share(FixedPoint(quantize_measured(x, 8, -3)[0].values, 8, -3))


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("bits", [8, 16, 31])
def test_largest_magnitude_tells_where_nothing_is_at_the_limits(bits, rounding):
    for largest in (100.0, 126.0, 126.4, 127.0, 127.6, 128.0, 500.0, -126.0, -127.6, -128.0):
        x = torch.cat([torch.linspace(-3, 3, 50), torch.tensor([largest * 2.0 ** (bits - 8)])])
        quantized, found = kernels.quantize_measured(x, bits, 0, rounding, seed=1)
        assert kernels.saturated_share(quantized, found.absmax) == kernels.saturated_share(quantized)

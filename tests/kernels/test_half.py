"""Half-precision inputs of quantization and outputs of products: the same as by way of float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import BITS, FixedPoint, limits, storage_dtype
from cnmix.kernels import cpu, quantization

HALF = (torch.bfloat16, torch.float16)


def integers(shape, bits, seed):
    low, high = limits(bits)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high + 1, shape, generator=generator).to(storage_dtype(bits))
    return FixedPoint(values, bits, -bits)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rounding", ["nearest_even", "half_up", "stochastic"])
@pytest.mark.parametrize("shape", [(0,), (1,), (37, 53), (3, 5000)])
def test_quantizing_half_is_quantizing_its_float32(backend, dtype, rounding, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
    for position in (None, -5):
        options = {"rounding": rounding, "seed": 5, "stream": 7, "measure": True}
        operand, found = quantization.quantize_measured(x, 8, position, channel_dim=x.dim() - 1, **options)
        expected, wanted = quantization.quantize_measured(x.float(), 8, position, channel_dim=x.dim() - 1, **options)
        assert torch.equal(operand.values, expected.values)
        assert operand[1:] == expected[1:]
        assert (found.absmax, found.sum_x, found.sum_q) == (wanted.absmax, wanted.sum_x, wanted.sum_q)
        torch.testing.assert_close(found.channel_sums.float(), wanted.channel_sums)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_half_that_is_not_finite_is_found(backend, value):
    x = torch.ones(9000, dtype=torch.bfloat16)
    x[8999] = value
    assert not quantization.quantize_measured(x, 8, None)[0].finite


@given(m=st.integers(1, 40), k=st.integers(1, 90), n=st.integers(1, 40), bits=st.sampled_from(BITS))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("dtype", HALF)
def test_a_product_in_half_is_float32_rounded(backend, dtype, m, k, n, bits):
    a, b = integers((m, k), bits, 1), integers((k, n), bits, 2)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3))
    bias[0] = float("nan")
    bias[n // 2] = float("inf")
    expected = cpu.matmul(a, b, bias=bias).to(dtype)
    result = cpu.matmul(a, b, bias=bias, dtype=dtype)
    assert result.dtype == dtype
    assert torch.equal(result.isnan(), expected.isnan())  # torch has several NaNs
    assert torch.equal(result.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_convolution_in_half_is_float32_rounded(backend, dtype, channels_last, groups):
    x, weight = integers((3, 6, 9, 7), 8, 1), integers((6, 6 // groups, 3, 3), 8, 2)
    geometry = ([2, 1], [1, 0], [1, 1], groups)
    layout = {"channels_last": channels_last}
    expected = cpu.convolution(x, weight, *geometry, **layout)
    result = cpu.convolution(x, weight, *geometry, **layout, dtype=dtype)
    assert result.stride() == expected.stride()
    assert torch.equal(result, expected.to(dtype))
    grad = integers(tuple(expected.shape), 8, 3)
    expected = cpu.convolution_grad_input(grad, weight, x.values.shape, *geometry, **layout)
    result = cpu.convolution_grad_input(grad, weight, x.values.shape, *geometry, **layout, dtype=dtype)
    assert torch.equal(result, expected.to(dtype))

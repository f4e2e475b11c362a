"""Transposed convolutions: the products of a convolution in other roles, with a bias and outputs beyond the input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.kernels import cpu, reference

from .strategies import CONV_LAYOUTS, batch_sizes, channels, conv_layout, operands, same_bits, widths

pytestmark = pytest.mark.usefixtures("backend")


@st.composite
def transposed(draw, bits=widths):
    """Draws input, weight and grad_output, the output's size and the geometry."""
    dims = draw(st.integers(1, 3))

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, dilation, spatial = each(1, 4 - (dims + 1) // 2), each(1, 4), each(1, 3), each(1, 6 - dims)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    full = [
        (n - 1) * s + d * (k - 1) + 1 + e
        for n, s, d, k, e in zip(spatial, stride, dilation, kernel, extra, strict=True)
    ]
    padding = tuple(draw(st.integers(0, (n - 1) // 2)) for n in full)
    size = [n - 2 * p for n, p in zip(full, padding, strict=True)]
    groups, in_each, out_each = draw(st.integers(1, 3)), draw(channels), draw(channels)
    images = draw(batch_sizes)
    out = images, groups * out_each, *size
    shapes = (images, groups * in_each, *spatial), (groups * in_each, out_each, *kernel), out
    tensors = [draw(operands(shape, draw(bits), st.integers(-20, 20))) for shape in shapes]
    layouts = st.sampled_from(CONV_LAYOUTS)
    x, weight, grad_output = (t._replace(values=conv_layout(t.values, draw(layouts))) for t in tensors)
    return x, weight, grad_output, out, (stride, padding, dilation, groups), extra


@given(transposed(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_three_products_have_the_bits_of_the_reference(case, with_bias):
    x, weight, grad_output, out, geometry, _ = case
    bias = torch.linspace(-1, 1, out[1]) if with_bias else None
    expected = reference.convolution_grad_input(x, weight, out, *geometry)
    if bias is not None:
        expected = expected + bias.view(-1, *[1] * (len(out) - 2))
    found = cpu.convolution_grad_input(x, weight, out, *geometry, bias=bias, exact_int31=True)
    assert same_bits(found, expected)
    found = cpu.convolution(grad_output, weight, *geometry, exact_int31=True)
    assert same_bits(found, reference.convolution(grad_output, weight, *geometry))
    expected = reference.convolution_grad_weight(x, grad_output, weight.values.shape, *geometry)
    found = cpu.convolution_grad_weight(x, grad_output, weight.values.shape, *geometry, exact_int31=True)
    assert same_bits(found, expected)


@given(transposed(bits=st.just(8)))
@settings(max_examples=100, deadline=None)
def test_the_reference_is_torchs_transposed_convolution(case):
    x, weight, grad_output, out, (stride, padding, dilation, groups), extra = case
    if out[0] == 0:
        return
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(out) - 3]
    # New tensors: torch's backward pass refuses a weight whose dimensions of size 1 have odd strides.
    x64, weight64 = (torch.empty(t.values.shape, dtype=torch.float64).copy_(t.values) for t in (x, weight))
    x64.requires_grad_(), weight64.requires_grad_()
    y = function(x64, weight64, None, stride, padding, extra, groups, dilation)  # exact in float64
    y.backward(grad_output.values.double())
    x, weight, grad_output = (t._replace(position=0) for t in (x, weight, grad_output))
    geometry = stride, padding, dilation, groups
    assert torch.equal(reference.convolution_grad_input(x, weight, out, *geometry), y.float())
    grad_x = reference.convolution(grad_output, weight, *geometry)[tuple(slice(n) for n in x64.shape)]
    assert torch.equal(grad_x, x64.grad.float())
    grad_weight = reference.convolution_grad_weight(x, grad_output, weight64.shape, *geometry)
    assert torch.equal(grad_weight, weight64.grad.float())

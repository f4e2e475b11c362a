import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import FixedPoint, limits
from cnmix.kernels import cpu, depthwise, native, reference

from .strategies import CONV_LAYOUTS, FILLS, Convolution, conv_layout, integers, same_bits

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.describe())

# Below, at and above the 64 lanes that are multiplied together.
channel_counts = st.sampled_from((2, 3, 8, 31, 63, 64, 65, 130))


def case_of(images, channels, geometry, bits=(8, 8, 8), fills=("random",) * 3, layouts=("contiguous",) * 3):
    spatial, kernel, stride, padding, dilation = geometry
    size = reference.output_size(spatial, kernel, stride, padding, dilation)
    shapes = (images, channels, *spatial), (channels, 1, *kernel), (images, channels, *size)
    tensors = [
        FixedPoint(conv_layout(integers(shape, b, fill, seed), layout), b, -5)
        for seed, (shape, b, fill, layout) in enumerate(zip(shapes, bits, fills, layouts, strict=True))
    ]
    return Convolution(*tensors, stride, padding, dilation, channels)


def check(case, bias=None):
    channels = case.x.values.shape[1]
    assert all(depthwise.serve(*pair, channels, channels, channels) for pair in case.pairs())
    expected = case.run(reference)
    for result, other in zip(case.run(cpu), expected, strict=True):
        assert same_bits(result, other)
    if bias is not None:
        expected = expected[0] + bias.view(-1, *(1,) * (case.x.values.dim() - 2))
        for last in (False, True):
            assert same_bits(cpu.convolution(*case[:2], *case[3:], bias=bias, channels_last=last), expected)


@given(st.data(), st.integers(1, 3), st.integers(0, 4), channel_counts)
@settings(max_examples=150, deadline=None)
def test_any_geometry_has_the_bits_of_the_reference(instructions, data, dims, images, channels):
    def each(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 3)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(data.draw(st.integers(0, r + 2)) for r in reach)
    spatial = [max(1, r + 1 - 2 * p) + more for r, p, more in zip(reach, padding, each(0, 3), strict=True)]
    bits, fills, layouts = (
        data.draw(st.tuples(*[st.sampled_from(choices)] * 3)) for choices in ((8, 16), FILLS, CONV_LAYOUTS)
    )
    bias = torch.randn(channels) if data.draw(st.booleans()) else None
    check(case_of(images, channels, (spatial, kernel, stride, padding, dilation), bits, fills, layouts), bias)


@pytest.mark.parametrize("bits", list(itertools.product((8, 16), repeat=2)))
def test_any_number_of_threads_gives_the_same_bits(bits):
    case = case_of(8, 70, ((20, 17), (3, 3), (1, 1), (1, 1), (1, 1)), (*bits, bits[0]))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        check(case)


@pytest.mark.parametrize("fill", ["low", "high"])
def test_sums_beyond_int32(fill):
    # Over the taps in the product, over the positions in the weight's gradient.
    taps = 131073
    case = case_of(1, 2, ((taps,), (taps,), (1,), (0,), (1,)), (8, 8, 8), (fill,) * 3)
    one = limits(8)[fill == "high"] ** 2
    output = cpu.convolution(*case[:2], *case[3:])
    assert output.unique().item() == reference.round_to_float32(taps * one) * 2.0**-10
    case = case_of(2, 2, ((100_001,), (1,), (1,), (0,), (1,)), (8, 8, 8), (fill,) * 3)
    grad_weight = cpu.convolution_grad_weight(case.grad_output, case.x, case.weight.values.shape, *case[3:])
    assert grad_weight.unique().item() == reference.round_to_float32(200_002 * one) * 2.0**-10


def test_other_convolutions_are_not_served():
    narrow, wide = (FixedPoint(integers((2, 2), bits), bits, 0) for bits in (8, 31))
    assert depthwise.serve(narrow, narrow, 4, 4, 4)
    assert not depthwise.serve(narrow, narrow, 4, 4, 8)
    assert not depthwise.serve(narrow, narrow, 2, 4, 4)
    assert not depthwise.serve(narrow, narrow, 1, 1, 1)
    assert not depthwise.serve(narrow, wide, 4, 4, 4)
    assert not depthwise.serve(narrow._replace(position=-127), narrow, 4, 4, 4)

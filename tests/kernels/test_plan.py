"""What the steps of plans compute."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.kernels.plan import Add, AddValue, Clamp, LeakyRelu, Multiply, MultiplyAdd, Plan, Quantize, Relu, Store

from .plan_checks import (
    PLANS,
    channels_last,
    check_chain,
    check_product,
    draw_chain,
    empty,
    exact_sums,
    reference_chain,
    run,
    same_bits,
    to_integers,
)
from .strategies import FILLS, integers, nearly_cancelling, rounded_once

CHANNELS = (1, 3, 5, 16, 17, 33, 64, 96)
pytestmark = PLANS


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.sampled_from(("one", "two", "each")))
@settings(max_examples=80, deadline=None)
def test_convolutions(data, dims, images, grouping):
    def each(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(data.draw(st.integers(0, r + 1)) for r in reach)
    spatial = [max(1, r + 1 - 2 * p) + more for r, p, more in zip(reach, padding, each(0, 6), strict=True)]
    channels, outputs = data.draw(st.sampled_from(CHANNELS)), data.draw(st.sampled_from(CHANNELS))
    groups = {"one": 1, "two": 2, "each": channels}[grouping]
    if grouping == "two":
        channels, outputs = 2 * channels, 2 * outputs
    if grouping == "each":
        outputs = channels
    fills = data.draw(st.tuples(st.sampled_from(FILLS), st.sampled_from(FILLS)))
    x = integers((images, channels, *spatial), 8, fills[0], 1)
    weight = integers((outputs, channels // groups, *kernel), 8, fills[1], 2)
    check_product(data, x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)


@given(st.data(), st.sampled_from((1, 7, 16, 17, 32, 49, 100)), st.sampled_from((1, 63, 64, 65, 255, 320)))
@settings(max_examples=40, deadline=None)
def test_matrices(data, rows, depth):
    outputs = data.draw(st.sampled_from((*CHANNELS, 255, 300)))
    fills = data.draw(st.tuples(st.sampled_from(FILLS), st.sampled_from(FILLS)))
    check_product(data, integers((rows, depth), 8, fills[0], 1), integers((outputs, depth), 8, fills[1], 2))


@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride", "padding"),
    [
        ((1, 3, 60, 64), 64, 7, 2, 3),
        ((2, 64, 28, 28), 48, 3, 1, 1),
        ((1, 128, 28, 28), 128, 3, 2, 1),
        ((1, 256, 14, 14), 512, 1, 2, 0),
        ((1, 512, 7, 7), 256, 3, 1, 1),
        ((3, 512, 7, 7), 255, 1, 1, 0),
    ],
)
def test_shapes_of_networks(shape, outputs, kernel, stride, padding):
    x, weight = integers(shape, 8), integers((outputs, shape[1], kernel, kernel), 8, seed=1)
    geometry = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (1, 1)}
    sums = exact_sums(x, weight, **geometry)
    stages = [Multiply(2.0**-15), Add(torch.randn(outputs)), Relu(), Store(None), Quantize(None, 8, -4)]
    made = Plan()
    source = made.input(shape, torch.int8)
    check_chain(made, lambda chain: made.product(source, weight, chain, **geometry), stages, sums.shape, sums, [x])


@given(st.data(), st.sampled_from(CHANNELS), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_elements(data, channels, images, first):
    spatial = data.draw(st.sampled_from(((), (5,), (7, 9), (33, 20), (3, 4, 5))))
    x = torch.randn(images, channels, *spatial)
    stages = draw_chain(data, channels, x.shape, 0.7)
    made = Plan()
    source = made.input(x.shape, torch.float32)
    # Read as it lies, or channels last.
    given_x = x if first else channels_last(x)
    check_chain(made, lambda chain: made.elements(source, chain), stages, x.shape, x, [given_x])


@given(
    st.data(), st.integers(1, 2), st.sampled_from(CHANNELS), st.sampled_from((torch.int8, torch.float32, torch.int16))
)
@settings(max_examples=60, deadline=None)
def test_max_pool(data, dims, channels, dtype):
    def each(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    spatial = [d * (k - 1) + 1 + more for k, d, more in zip(kernel, dilation, each(0, 5), strict=True)]
    x = integers((2, channels, *spatial), 8, data.draw(st.sampled_from(FILLS)), 3).to(dtype)
    if dtype == torch.float32:
        x.view(-1)[0] = float("nan")
    pool = F.max_pool1d if dims == 1 else F.max_pool2d
    expected = pool(x.double(), kernel, stride, padding, dilation)
    made = Plan()
    source, target = made.input(x.shape, dtype), made.output(expected.shape, dtype)
    made.max_pool(source, target, kernel, stride, padding, dilation)
    (result,) = run(made, [x], [target])
    assert torch.equal(result.double().nan_to_num(7e7), expected.nan_to_num(7e7))


@given(st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=4), st.sampled_from((torch.int8, torch.float32)))
@settings(max_examples=20, deadline=None)
def test_concatenation_and_upsampling(channels, dtype):
    parts = [integers((2, c, 3, 5), 8, seed=c).to(dtype) for c in channels]
    made = Plan()
    values = [made.input(x.shape, dtype) for x in parts]
    whole = made.value((2, sum(channels), 3, 5), dtype)
    made.concatenate(values, whole)
    target = made.output((2, sum(channels), 6, 15), dtype)
    made.upsample_nearest(whole, target)
    (result,) = run(made, parts, [target])
    assert same_bits(result, torch.cat(parts, 1).repeat_interleave(2, 2).repeat_interleave(3, 3))


@pytest.mark.parametrize("position", [-6, -1, 3])
@pytest.mark.parametrize("middle", [Relu(), LeakyRelu(0.1), Clamp(-20.0, 30.0)])
@pytest.mark.parametrize("roundings", [1, 2])
def test_integers_of_bounded_sums(position, middle, roundings):
    """No element can be infinite where only integers come in: such chains take shorter ways."""
    x, weight, more = (
        integers((1, 48, 9, 7), 8),
        integers((40, 48, 1, 1), 8, seed=1),
        integers((40, 48, 1, 1), 8, seed=2),
    )
    factors, terms = torch.rand(40) * 2.0**-9, torch.randn(40) * 100
    sums, others = exact_sums(x, weight, (1, 1), (0, 0), (1, 1)), exact_sums(x, more, (1, 1), (0, 0), (1, 1))
    affine = [MultiplyAdd(factors, terms)] if roundings == 1 else [Multiply(factors), Add(terms)]
    stages = [Multiply(0.5), *affine, middle]
    (known,) = reference_chain(sums, [*stages, Store(None)])
    (residual,) = reference_chain(others, [Multiply(2.0**-8), Store(None)])
    (total,) = reference_chain(known, [AddValue(residual), Relu(), Store(None)])
    made, shape = Plan(), sums.shape
    source, inside, integer = (
        made.input(x.shape, torch.int8),
        made.value(shape, torch.float32),
        made.output(shape, torch.int8),
    )
    floats, both = made.output(shape, torch.float32), made.output(shape, torch.int8)
    made.product(source, weight, [*stages, Quantize(integer, 8, position)])
    made.product(source, more, [Multiply(2.0**-8), Store(inside)])
    made.product(source, weight, [*stages, AddValue(inside), Relu(), Store(floats), Quantize(both, 8, position)])
    results = run(made, [x], [integer, floats, both])
    for result, expected in zip(
        results, (to_integers(known, 8, position), total, to_integers(total, 8, position)), strict=True
    ):
        assert same_bits(result, expected)


@pytest.mark.parametrize(
    "constants",
    [
        [Multiply(float("inf"))],
        [Multiply(1e38), Multiply(1e30)],
        [Add(torch.full((4,), torch.nan))],
        [MultiplyAdd(torch.ones(4), torch.full((4,), torch.inf))],
        [MultiplyAdd(torch.full((4,), 1e37), torch.zeros(4))],
    ],
)
def test_constants_that_are_not_finite(constants):
    x, weight = integers((3, 8), 8), integers((4, 8), 8, seed=1)
    made = Plan()
    source, target = made.input(x.shape, torch.int8), made.output((3, 4), torch.int8)
    made.product(source, weight, [*constants, Relu(), Quantize(target, 8, 0)])
    made.finish()
    assert not made.run([x], [empty(target)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 100, 2 * 17 * 35 - 1])
def test_values_that_are_not_finite(bad, place):
    x = torch.randn(2, 17, 5, 7)
    x.view(-1)[place] = bad
    made = Plan()
    source, floats, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.float32), None
    made.elements(source, [Relu(), Clamp(-1.0, 1.0), LeakyRelu(0.5), Store(floats)])
    made.finish()
    outputs = [empty(floats)]
    assert made.run([x], outputs)  # floats may be anything
    assert same_bits(outputs[0].nan_to_num(9.0), torch.relu(x).clamp(-1, 1).nan_to_num(9.0))
    made = Plan()
    source, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.int8)
    made.elements(source, [Multiply(2.0), Quantize(target, 8, -5)])
    made.finish()
    outputs = [empty(target)]
    assert not made.run([x], outputs)
    assert not made.run([channels_last(x)], outputs)
    assert made.run([x.nan_to_num(0.0, 1.0, -1.0)], outputs)


def test_quantization_at_the_ends_of_float32():
    x = torch.tensor([[3.4e38, -3.4e38, 1e-45, -1e-45, 0.5, 1.5, 2.5, -0.5, -0.0, 127.5, -128.5, 2.0**-120]])
    for position in (-128, -127, -126, 0, 100, 126, 127, 128):
        made = Plan()
        source, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.int8)
        made.elements(source, [Quantize(target, 8, position)])
        (result,) = run(made, [x], [target])
        assert same_bits(result, to_integers(x, 8, position))


@pytest.mark.parametrize("channels", [5, 48])
def test_multiply_add_is_exact_before_it_rounds(channels):
    x, factors, terms = nearly_cancelling(40, channels)
    made = Plan()
    source, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.float32)
    made.elements(source, [MultiplyAdd(factors, terms), Store(target)])
    (result,) = run(made, [x], [target])
    assert same_bits(result, rounded_once(x, factors, terms))
    assert not same_bits(result, x * factors + terms)


def test_multiply_add_of_values_that_are_not_finite():
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0, 0.0, -0.0, 3e38, torch.inf]])
    factors, terms = torch.tensor([2.0, 2, 2, 0, 1, 1, 2, 0]), torch.tensor([1.0, 1, 1, -0.0, -0.0, -0.0, -3e38, 1])
    made = Plan()
    source, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.float32)
    made.elements(source, [MultiplyAdd(factors, terms), Store(target)])
    (result,) = run(made, [x], [target])
    expected = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, 0.0, -0.0, 3e38, torch.nan]])
    assert same_bits(result.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_longest_sum():
    rows = integers((1, 131071), 8, "low")
    made = Plan()
    source, target = made.input(rows.shape, torch.int8), made.output((1, 2), torch.float32)
    made.product(source, integers((2, 131071), 8, "low"), [Store(target)])
    (result,) = run(made, [rows], [target])
    assert result.unique().item() == torch.tensor(131071 * 2**14).float().item()
    with pytest.raises(ValueError, match="K of 131072"):
        Plan().product(Plan().input((1, 131072), torch.int8), integers((2, 131072), 8), [])

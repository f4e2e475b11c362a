"""The card's integers against the documented formulas, written out slowly."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from cnmix.torch_mlu.core.quantized import functional
from cnmix.torch_mlu.core.quantized.functional import formats

QMAX = {8: 127, 16: 32767}


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def slow_position(scale, bits):
    """floor(log2(qmax / scale)) - (bits - 2), in exact arithmetic."""
    absmax, exponent = Fraction(QMAX[bits]) / Fraction(scale), 0
    while Fraction(2) ** (exponent + 1) <= absmax:
        exponent += 1
    while Fraction(2) ** exponent > absmax:
        exponent -= 1
    return exponent - (bits - 2)


def slow_integers(x, step, bits):
    return torch.round(x / step).clamp(-QMAX[bits] - 1, QMAX[bits]).to(torch.float64)


def slow_product(multiply, x, weight, bias, scale, mode):
    """What the card is to return: ``multiply`` takes float64 integers, whose sums are exact."""
    bits = 8 if mode in (1, 3) else 16
    channel = (-1, *[1] * (weight.dim() - 2)) if weight.dim() > 2 else (-1,)
    x_position = slow_position(scale[0], bits)
    qx = slow_integers(x, 2.0**x_position, bits)
    if mode in (1, 2):
        position = slow_position(scale[1], bits)
        sums = multiply(qx, slow_integers(weight, 2.0**position, bits))
        y = sums.to(torch.float32) * 2.0 ** (x_position + position)
    else:
        of_weight = torch.tensor(scale[2:])
        positions = [slow_position(each, bits) for each in scale[2:]]
        middle = (max(positions) + min(positions)) / 2
        position = math.floor(middle + 0.5) if middle >= 0 else math.ceil(middle - 0.5)
        absmax = torch.full_like(of_weight, QMAX[bits]) / of_weight
        own = torch.tensor([2.0**each for each in positions]) * QMAX[bits] / absmax
        fine = own * torch.tensor([2.0 ** (position - each) for each in positions])
        step = 2.0**position / fine
        qw = slow_integers(weight, step.view(-1, *[1] * (weight.dim() - 1)), bits)
        y = multiply(qx, qw).to(torch.float32) * 2.0 ** (x_position + position) * (1 / fine).view(channel)
    return y if bias is None else y + bias.view(channel)


def scales_of(x, weight, mode):
    qmax = QMAX[8 if mode in (1, 3) else 16]
    own = weight.abs().amax(1 if weight.dim() == 2 else tuple(range(1, weight.dim())))
    weights = [qmax / weight.abs().max()] if mode in (1, 2) else [torch.tensor(0.0), *(qmax / own)]
    return [(qmax / x.abs().max()).item(), *(each.item() for each in weights)]


MAGNITUDES = st.integers(-18, 18).map(lambda exponent: 2.0**exponent * 1.37)


@examples(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from([1, 2, 3, 4]),
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(1, 9)),
    magnitudes=st.tuples(MAGNITUDES, MAGNITUDES),
    with_bias=st.booleans(),
    too_small=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_linear_is_the_slow_one(mode, sizes, magnitudes, with_bias, too_small, seed):
    rows, features, channels = sizes
    x = random(rows, features, seed=seed, scale=magnitudes[0])
    weight = random(channels, features, seed=seed + 1, scale=magnitudes[1])
    weight *= 2.0 ** torch.arange(channels).view(-1, 1)  # positions of channels lie apart
    bias = random(channels, seed=seed + 2) if with_bias else None
    scale = scales_of(torch.cat([x.flatten(), torch.ones(1)]), weight, mode)
    scale[0] *= too_small  # the scale is of other data: values saturate
    scale[0] = torch.tensor(scale[0]).item()
    y = functional.linear(x.to("mlu"), weight.to("mlu"), None if bias is None else bias.to("mlu"), scale, [mode])
    expected = slow_product(lambda a, b: a @ b.t(), x, weight, bias, scale, mode)
    assert y.device.type == "mlu"
    assert torch.equal(y.cpu(), expected)


CONVOLUTIONS = st.sampled_from(
    [
        # spatial size, kernel, stride, padding, dilation, groups
        ((7,), (3,), (1,), (0,), (1,), 1),
        ((9,), (3,), (2,), (2,), (2,), 2),
        ((6, 7), (3, 2), (1, 1), (1, 0), (1, 1), 1),
        ((6, 6), (3, 3), (2, 1), (1, 2), (1, 2), 4),
        ((5, 6), (1, 1), (1, 1), (0, 0), (1, 1), 1),
        ((4, 5, 4), (2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 1), 2),
    ]
)


@examples(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from([1, 2, 3, 4]),
    geometry=CONVOLUTIONS,
    magnitudes=st.tuples(MAGNITUDES, MAGNITUDES),
    with_bias=st.booleans(),
    images=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_convolution_is_the_slow_one(mode, geometry, magnitudes, with_bias, images, seed):
    size, kernel, stride, padding, dilation, groups = geometry
    x = random(images, 4, *size, seed=seed, scale=magnitudes[0])
    weight = random(8, 4 // groups, *kernel, seed=seed + 1, scale=magnitudes[1])
    bias = random(8, seed=seed + 2) if with_bias else None
    scale = scales_of(torch.cat([x.flatten(), torch.ones(1)]), weight, mode)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    expected = slow_product(
        lambda a, b: convolve(a, b, None, stride, padding, dilation, groups), x, weight, bias, scale, mode
    )
    around = [each for each in reversed(padding) for _ in range(2)]
    y = functional.convolution(
        *(x.to("mlu"), weight.to("mlu"), None if bias is None else bias.to("mlu"), None, None),
        *(stride, around, dilation, groups, "zeros", scale, [mode]),
    )
    assert torch.equal(y.cpu(), expected)


def test_widths_and_positions_are_taken_as_they_are():
    assert formats([16, 8], [-9, -3]) == (16, -9, 8, -3, None)
    x, weight = torch.tensor([[1.0, -0.3]]), torch.tensor([[0.26, 1.0]])
    y = functional.linear(x.to("mlu"), weight.to("mlu"), None, [16, 8], [-9, -3])
    assert y.item() == (512 * 2 + -154 * 8) * 2.0**-12


@pytest.mark.parametrize("scale", [127.0, 127.00001, 126.99999, 127 / 3, 1.0, 1e30, 1e-30])
def test_position_is_exact_at_powers_of_two(scale):
    scale = torch.tensor(scale).item()
    assert formats([scale, scale], [1])[1] == slow_position(scale, 8)


def test_mean_and_std_are_of_the_card():
    x = torch.arange(48.0).view(1, 3, 4, 4)
    weight, mean, std = random(2, 3, 3, 3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    mean, std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1, "zeros", scales_of(x, weight, 2), [2])
    y = functional.convolution(
        *(each.to("mlu") for each in (x.to(torch.uint8), weight)), None, mean.to("mlu"), std.to("mlu"), *geometry
    )
    normal = functional.convolution(((x - mean) / std).to("mlu"), weight.to("mlu"), None, None, None, *geometry)
    assert torch.equal(y.cpu(), normal.cpu())
    assert y.dtype == torch.float32
    on_host = functional.convolution(x, weight, None, mean, std, *geometry)
    assert torch.equal(on_host, F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_of_every_kind_is_that_of_floats(mode):
    x, weight = random(2, 3, 6, 5), random(4, 3, 2, 3)
    around, geometry = [1, 2, 0, 1], (1, mode, scales_of(x, weight, 2), [2])
    y = functional.convolution(x.to("mlu"), weight.to("mlu"), None, None, None, [1, 1], around, [1, 1], *geometry)
    padded = F.pad(x, around, "constant" if mode == "zeros" else mode)
    assert torch.allclose(y.cpu(), F.conv2d(padded, weight), atol=2e-3)
    on_host = functional.convolution(x, weight, None, None, None, [1, 1], around, [1, 1], *geometry)
    assert torch.allclose(on_host, F.conv2d(padded, weight), atol=1e-6)


def test_an_image_without_a_batch():
    x, weight = random(3, 6, 5).to("mlu"), random(4, 3, 2, 3).to("mlu")
    rest = (None, None, None, [1, 1], [0, 0, 0, 0], [1, 1], 1, "zeros", scales_of(x, weight, 1), [1])
    alone, batched = functional.convolution(x, weight, *rest), functional.convolution(x[None], weight, *rest)
    assert torch.equal(alone.cpu(), batched[0].cpu())


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_half_in_half_out(mode):
    x, weight, bias = random(3, 8).half(), random(5, 8).half(), random(5).half()
    scale = scales_of(x.float(), weight.float(), mode)
    y = functional.linear(x.to("mlu"), weight.to("mlu"), bias.to("mlu"), scale, [mode])
    full = functional.linear(x.float().to("mlu"), weight.float().to("mlu"), bias.float().to("mlu"), scale, [mode])
    assert y.dtype == torch.float16
    assert torch.equal(y.cpu(), full.half().cpu())


@pytest.mark.parametrize("mode", [1, 3])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_what_is_not_finite_is_seen_in_the_result(mode, where):
    x, weight = random(2, 4), random(3, 4)
    scale = scales_of(x, weight, mode)
    (x if where == "x" else weight)[0, 0] = math.nan
    assert functional.linear(x.to("mlu"), weight.to("mlu"), None, scale, [mode]).isnan().all()


def test_no_gradient_on_the_card_and_it_says_so():
    x, weight = random(2, 4).to("mlu").requires_grad_(), random(3, 4).to("mlu")
    y = functional.linear(x, weight, None, [50.0, 50.0], [1])
    with pytest.raises(RuntimeError, match="adaptive_quantize"):
        y.sum().backward()
    with torch.no_grad():
        assert not functional.linear(x, weight, None, [50.0, 50.0], [1]).requires_grad


def test_errors_name_the_module():
    weight = random(3, 4).to("mlu")
    with pytest.raises(ValueError, match=r"'fc' takes 4 features .* \(2, 5\)"):
        functional.linear(random(2, 5).to("mlu"), weight, None, [1.0, 1.0], [1], "fc")
    with pytest.raises(RuntimeError, match=r"'fc' is on mlu:0 and got a tensor of cpu.*\.to\(\)"):
        functional.linear(random(2, 4), weight, None, [1.0, 1.0], [1], "fc")
    with pytest.raises(RuntimeError, match="'fc' is on cpu and got a tensor of mlu:1"):
        functional.linear(random(2, 4).to("mlu:1"), random(3, 4), None, [1.0, 1.0], [1], "fc")
    with pytest.raises(TypeError, match=r"'fc' takes float tensors, got torch\.uint8"):
        functional.linear(torch.ones(2, 4, dtype=torch.uint8).to("mlu"), weight, None, [1.0, 1.0], [1], "fc")
    with pytest.raises(ValueError, match=r"'conv' takes .*4 channels, 1 spatial"):
        functional.convolution(
            *(random(1, 3, 9).to("mlu"), random(2, 4, 3).to("mlu"), None, None, None, [1], [0, 0], [1], 1, "zeros"),
            *([1.0, 1.0], [1], "conv"),
        )


def test_a_result_is_on_the_card_of_the_input():
    x, weight = random(2, 4).to("mlu:1"), random(3, 4).to("mlu:1")
    assert functional.linear(x, weight, None, [50.0, 50.0], [1]).device == torch.device("mlu:1")

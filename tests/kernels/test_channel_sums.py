"""The sums over all dimensions but one that quantizing finds on its way: bias gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.kernels import native, quantization

from .strategies import seeds

pytestmark = pytest.mark.usefixtures("instructions")

FILLS = ("normal", "alike", "tiny among huge", "integers")


def values(shape, fill, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if fill == "alike":
        x.fill_(0.1)
    elif fill == "tiny among huge":
        x *= torch.where(torch.rand(shape, generator=generator) < 0.1, 1e20, 1e-20)
    elif fill == "integers":
        x = (x * 50).round()
    return x


def found_sums(x, dim, **how):
    return quantization.quantize_measured(x, 8, None, channel_dim=dim, **how)[1].channel_sums


def check(x, dim, **how):
    sums = found_sums(x, dim, **how)
    others = [other for other in range(x.dim()) if other != dim]
    exact = x.double().sum(others) if others else x.double()
    magnitude = x.double().abs().sum(others) if others else x.double().abs()
    assert (sums.shape, sums.dtype) == ((x.shape[dim],), torch.float32)
    # A few hundred roundings of float32, most of them to different sides.
    assert ((sums - exact).abs() <= 32 * 2.0**-24 * magnitude).all()


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


CASES = {
    "Linear": lambda f: (values((700, 300), f), 1),
    "Linear, one output": lambda f: (values((70_000, 1), f), 1),
    "Linear, two outputs": lambda f: (values((300_000, 2), f), 1),
    "Linear, three outputs": lambda f: (values((100_001, 3), f), 1),
    "Linear, one row": lambda f: (values((1, 5000), f), 1),
    "Linear, many outputs": lambda f: (values((9, 70_001), f), 1),
    "Linear, sequences": lambda f: (values((6, 70, 513), f), 2),
    "Linear, transposed": lambda f: (values((300, 700), f).t(), 1),
    "NCHW": lambda f: (values((5, 33, 17, 19), f), 1),
    "NCHW, one channel": lambda f: (values((5, 1, 70, 90), f), 1),
    "NCHW, one image": lambda f: (values((1, 7, 130, 110), f), 1),
    "NCHW, one position": lambda f: (values((900, 70, 1, 1), f), 1),
    "NCHW, long runs": lambda f: (values((2, 3, 400, 500), f), 1),
    "channels last": lambda f: (channels_last(values((5, 33, 17, 19), f)), 1),
    "channels last, one image of one row": lambda f: (channels_last(values((1, 33, 1, 400), f)), 1),
    "NCL": lambda f: (values((12, 40, 300), f), 1),
    "NCDHW": lambda f: (values((3, 20, 5, 6, 7), f), 1),
    "NCDHW, channels last": lambda f: (channels_last(values((3, 20, 5, 6, 7), f)), 1),
    "one position with a stride of its own": lambda f: (values((40, 30), f).as_strided((40, 30, 1), (30, 1, 7)), 1),
    "one channel with no stride": lambda f: (values((40, 30), f).as_strided((40, 1, 30), (30, 0, 1)), 1),
    "one channel with a stride of its own": lambda f: (values((40, 30), f).as_strided((40, 1, 30), (30, 77, 1)), 1),
    "expanded scalar": lambda f: (values((), f).expand(300, 70), 1),
    "expanded over the batch": lambda f: (values((1, 12, 9), f).expand(50, 12, 9), 1),
    "expanded over positions": lambda f: (values((50, 12, 1), f).expand(50, 12, 90), 1),
    "sliced": lambda f: (values((80, 60, 14), f)[::2, 1::3, 2:], 1),
    "permuted": lambda f: (values((30, 20, 10, 9), f).permute(2, 0, 3, 1), 1),
    "channels first of all": lambda f: (values((30, 2000), f), 0),
    "no other dimension": lambda f: (values((50,), f), 0),
    "empty batch": lambda f: (values((0, 12), f), 1),
    "no channels": lambda f: (values((12, 0), f), 1),
    "half precision": lambda f: (values((700, 30), "integers").bfloat16(), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fill", FILLS)
def test_sums_are_those_of_float64(case, fill):
    check(*CASES[case](fill))


@pytest.mark.parametrize("rounding", ["half_up", "stochastic"])
@pytest.mark.parametrize("case", ["NCHW", "channels last", "Linear, transposed", "expanded over positions"])
def test_sums_go_with_every_rounding_and_with_statistics(case, rounding):
    check(*CASES[case]("normal"), rounding=rounding, seed=3, measure=True)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data(), seeds)
@settings(max_examples=100, deadline=None)
def test_any_order_of_dimensions(shape, data, seed):
    order = data.draw(st.permutations(range(len(shape))))
    x = values([shape[dim] for dim in order], "normal", seed)
    x = x.permute([order.index(dim) for dim in range(len(shape))])
    assert list(x.shape) == shape
    check(x, data.draw(st.integers(0, len(shape) - 1)))


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads_finds_the_same_bits(case):
    x, dim = CASES[case]("normal")
    if case == "half precision":
        pytest.skip("the sums are those of torch's float32 copy, as in other cases")
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums.append(found_sums(x, dim))
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_long_sums_of_equal_gradients_do_not_drift(instructions):
    # Added up one by one in float32, a hundred thousand tenths are wrong in the third digit.
    for shape in ((400_000, 2), (100_000, 12), (2, 12, 100_000)):
        check(values(shape, "alike"), 1)


def test_every_instruction_set_finds_the_same_bits(instructions):
    library = native.library()
    for case in CASES.values():
        x, dim = case("normal")
        sums = found_sums(x, dim)
        library.cnmix_isa(0)
        portable = found_sums(x, dim)
        library.cnmix_isa(instructions)
        assert torch.equal(sums, portable)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_its_channel(value):
    for x, dim in (CASES["Linear"]("normal"), CASES["NCHW"]("normal"), CASES["channels last"]("normal")):
        x = x.clone()
        x[(3,) * x.dim()] = value
        operand, found = quantization.quantize_measured(x, 8, None, channel_dim=dim)
        assert not operand.finite
        assert found.channel_sums.isfinite().logical_not().nonzero().tolist() == [[3]]


def test_sums_that_are_not_asked_for_are_not_made():
    assert quantization.quantize_measured(values((4, 5), "normal"), 8, None)[1].channel_sums is None

import math

import pytest
import torch
from torch.profiler import profile

from cnmix import kernels
from cnmix.fixed_point import FixedPoint
from cnmix.kernels import profiling

GEOMETRY = ((2, 1), (1, 0), (1, 2), 2)


def operand(*shape, bits=8):
    return FixedPoint(torch.randint(-9, 9, shape, dtype=torch.int8 if bits == 8 else torch.int16), bits, -3)


def convolution_operands():
    x, weight = operand(2, 4, 7, 8), operand(6, 2, 3, 2, bits=16)
    return x, weight, operand(2, 6, 4, 6)


CALLS = {
    "matmul": lambda **more: kernels.matmul(operand(3, 5), operand(5, 7, bits=16), **more),
    "batched_matmul": lambda **more: kernels.batched_matmul(operand(2, 1, 3, 5), operand(2, 1, 5, 7, bits=16), **more),
    "convolution": lambda **more: kernels.convolution(*convolution_operands()[:2], *GEOMETRY, **more),
    "convolution_grad_input": lambda **more: kernels.convolution_grad_input(
        convolution_operands()[2], convolution_operands()[1], (2, 4, 7, 8), *GEOMETRY, **more
    ),
    "convolution_grad_weight": lambda **more: kernels.convolution_grad_weight(
        convolution_operands()[2], operand(2, 4, 7, 8, bits=16), (6, 2, 3, 2), *GEOMETRY, **more
    ),
}
MACS = {"matmul": 3 * 5 * 7, "batched_matmul": 2 * 3 * 5 * 7}
ONE_CONVOLUTION = 2 * 6 * 4 * 6 * 2 * 3 * 2


@pytest.mark.parametrize("kind", CALLS)
def test_products_are_ranges_that_say_what_was_multiplied(kind):
    torch.manual_seed(0)
    expected = CALLS[kind]()
    torch.manual_seed(0)
    with profile() as profiled:
        found = CALLS[kind](name="encoder.layer 1..l0.input")
        CALLS[kind]()
    assert torch.equal(found, expected)
    named, unnamed = (event.name for event in profiled.events() if event.name.startswith("cnmix::"))
    macs = MACS.get(kind, ONE_CONVOLUTION)
    assert profiling.parse(named) == (kind, (8, 16), macs, "encoder.layer 1..l0.input")
    assert profiling.parse(unnamed) == (kind, (8, 16), macs, "")


def test_a_range_reads_well_and_counts_what_the_shapes_say():
    with profile() as profiled:
        y = kernels.matmul(operand(3, 5), operand(5, 7, bits=16), name="head")
    assert "cnmix::matmul(int8 3x5, int16 5x7) 105 MACs head" in [event.name for event in profiled.events()]
    assert math.prod(y.shape) * 5 == 105


def test_other_names_are_none():
    assert profiling.parse("aten::mm") is None
    assert profiling.parse("cnmix::product") is None


class Heard:
    def __init__(self):
        self.products, self.work = [], []

    def multiplied(self, *what):
        self.products.append(what)

    def spent(self, work, seconds):
        assert seconds > 0
        self.work.append(work)


@pytest.fixture
def heard():
    listener = Heard()
    profiling.add_listener(listener)
    yield listener
    profiling.remove_listener(listener)
    assert profiling.listeners() == ()


@pytest.mark.parametrize("kind", CALLS)
def test_a_listener_is_told_what_was_multiplied_once(kind, heard):
    torch.manual_seed(0)
    found = CALLS[kind]()
    assert heard.work.count("product") == 1
    ((bits, macs, numbers),) = heard.products
    profiling.remove_listener(heard)
    torch.manual_seed(0)
    assert torch.equal(CALLS[kind](), found)
    assert len(heard.products) == 1
    assert (bits, macs) == ((8, 16), MACS.get(kind, ONE_CONVOLUTION))
    sizes = {
        "matmul": (15, 35),
        "batched_matmul": (30, 70),
        "convolution": (2 * 4 * 56, 72),
        "convolution_grad_input": (2 * 6 * 24, 72),
        "convolution_grad_weight": (2 * 6 * 24, 2 * 4 * 56),
    }
    assert numbers == sizes[kind]


def test_a_listener_hears_nothing_of_a_product_that_fails(heard):
    with pytest.raises(ValueError, match="smaller than the kernel"):
        kernels.convolution(operand(1, 1, 2, 2), operand(1, 1, 3, 3), (1, 1), (0, 0), (1, 1), 1)
    kernels.matmul(operand(3, 5), operand(5, 7))
    assert heard.products == [((8, 8), 105, (15, 35))]


def test_all_listeners_are_told_of_the_outermost_work(heard):
    other = Heard()
    profiling.add_listener(other)
    x = torch.randn(7, 5)
    kernels.quantize_measured(x, 8, None, with_checksum=True)
    kernels.quantize_batch(x, 8)
    profiling.remove_listener(other)
    kernels.quantize(x, 8, 0)
    assert (heard.work, other.work) == (["quantize"] * 3, ["quantize"] * 2)

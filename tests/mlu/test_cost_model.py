import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cnmix.torch_mlu.cards import find_card
from cnmix.torch_mlu.cost_model import LAUNCH, NOTHING, CostModel, Product, count_bytes, count_traffic

MLU270, MLU370 = (CostModel.of(find_card(name)) for name in ("MLU270", "MLU370"))


class Estimates(TorchDispatchMode):
    """Estimates every operator of host or meta tensors, by name."""

    def __init__(self, model=MLU270, kind=None):
        super().__init__()
        self.model, self.kind, self.found = model, kind, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        names = func._schema.arguments
        given = {
            each.name: args[i] if i < len(args) else kwargs.get(each.name, each.default_value)
            for i, each in enumerate(names)
        }
        self.found.append((func.name(), self.model.operator(func.name(), given, result, self.kind)))
        return result

    def only(self):
        ((_, estimate),) = [(name, each) for name, each in self.found if each is not NOTHING]
        return estimate


def estimate(function, *args, model=MLU270, **kwargs):
    with Estimates(model) as mode:
        function(*args, **kwargs)
    return mode.only()


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_a_large_product_takes_the_time_of_its_arithmetic():
    found = estimate(torch.mm, meta(4096, 4096), meta(4096, 4096))
    macs = 4096**3
    assert found.products == (Product(macs, "int31", "int31"),)
    assert found.compute == pytest.approx(2 * macs / (128e12 / 8))  # int31 at an eighth of int8's rate
    assert found.seconds == found.compute + LAUNCH


def test_an_operator_on_elements_takes_the_time_of_its_memory():
    found = estimate(torch.add, meta(1000, 1000), meta(1000, 1000))
    assert (found.products, found.compute, found.traffic) == ((), 0, 12_000_000)
    assert found.seconds == pytest.approx(12e6 / 102.4e9 + LAUNCH)


def test_a_small_product_takes_the_time_of_starting_it():
    assert estimate(torch.mm, meta(2, 2), meta(2, 2)).seconds == pytest.approx(LAUNCH, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "on_270", "on_370"),
    [
        (torch.float32, "int31", "float32"),
        (torch.float64, "int31", "float32"),
        (torch.float16, "int16", "float16"),
        (torch.bfloat16, "int16", "bfloat16"),
        (torch.int8, "int8", "int8"),
        (torch.int16, "int16", "int16"),
        (torch.int32, "int31", "int31"),
        (torch.int64, "int31", "int31"),
    ],
)
def test_the_card_decides_what_a_dtype_is_multiplied_as(dtype, on_270, on_370):
    assert (MLU270.operand(dtype), MLU370.operand(dtype)) == (on_270, on_370)
    product = estimate(torch.mm, meta(3, 4, dtype=dtype), meta(4, 5, dtype=dtype)).products
    assert product == (Product(60, on_270, on_270),)


def test_a_370_can_be_told_to_multiply_integers():
    assert CostModel(find_card("MLU370"), floating=False).operand(torch.float32) == "int31"


def convolution(**more):
    return lambda: nn.Conv2d(8, 12, 3, **more)(torch.randn(2, 8, 9, 7)).sum().backward()


def transposed(**more):
    return lambda: nn.ConvTranspose2d(8, 12, 3, **more)(torch.randn(2, 8, 9, 7, requires_grad=True)).sum().backward()


def attention():
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    F.scaled_dot_product_attention(q, k, v).sum().backward()


CALLS = {
    "linear": lambda: nn.Linear(6, 5)(torch.randn(4, 3, 6)).sum().backward(),
    "bmm": lambda: torch.bmm(torch.randn(3, 4, 5), torch.randn(3, 5, 6)),
    "baddbmm": lambda: torch.baddbmm(torch.randn(3, 4, 6), torch.randn(3, 4, 5), torch.randn(3, 5, 6)),
    "convolution": convolution(stride=2, padding=1),
    "dilated convolution": convolution(dilation=2),
    "transposed convolution": transposed(stride=2, output_padding=1),
    "attention": attention,
}


@pytest.mark.filterwarnings("ignore:.*with oneDNN:UserWarning")
@pytest.mark.parametrize("name", CALLS)
def test_multiply_accumulates_are_those_that_torch_counts(name):
    with FlopCounterMode(display=False) as counter:
        CALLS[name]()
    with Estimates() as mode:
        CALLS[name]()
    counted = sum(each.macs for _, each in mode.found if each is not None)
    # Torch's counter has no formulas for the attention kernels of the CPU.
    expected = counter.get_total_flops() // 2 or 7 * 2 * 3 * 16 * 16 * 8
    assert counted == expected


@pytest.mark.parametrize(
    ("call", "macs"),
    [
        (lambda: F.conv2d(meta(2, 8, 9, 7), meta(12, 2, 3, 3), groups=4), 2 * 12 * 7 * 5 * 2 * 9),
        (lambda: torch.mv(meta(3, 4), meta(4)), 12),
        (lambda: torch.dot(meta(4), meta(4)), 4),
        (lambda: torch.addmv(meta(3), meta(3, 4), meta(4)), 12),
        (lambda: torch.addmm(meta(5), meta(3, 4), meta(4, 5)), 60),
    ],
)
def test_vectors_and_sums_are_counted(call, macs):
    assert estimate(call).macs == macs


def test_a_devices_own_convolution_is_counted_as_the_others_are():
    x, weight, grad = meta(2, 8, 9, 9), meta(12, 4, 3, 3), meta(2, 12, 7, 7)
    geometry = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "transposed": False, "output_padding": [0, 0]}
    macs = grad.numel() * 4 * 9
    given = {"input": x, "weight": weight, "bias": None, **geometry, "groups": 2}
    assert MLU270.operator("aten::convolution_overrideable", given, grad).macs == macs
    for mask, times in (([True, True, False], 2), ([False, True, True], 1)):
        given = {"grad_output": grad, "input": x, "weight": weight, **geometry, "groups": 2, "output_mask": mask}
        found = MLU270.operator("aten::convolution_backward_overrideable", given, (x, weight, None))
        assert found.macs == times * macs


def test_a_devices_own_attention_is_counted():
    q = meta(2, 3, 16, 8)
    given = {"query": q, "key": q, "value": q}
    name = "aten::_scaled_dot_product_fused_attention_overrideable"
    assert MLU270.operator(name, given, (q,)).macs == 2 * q.numel() * 16
    assert MLU270.operator(f"{name}_backward", {"grad_out": q, **given}, (q, q, q)).macs == 5 * q.numel() * 16


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.t(),
        lambda x: x.view(-1),
        lambda x: x.expand(2, 4, 3),
        lambda x: x.detach(),
        lambda x: x[1:].unbind(),
        lambda x: torch.empty_like(x),
        lambda x: torch.empty(3, device="meta"),
        lambda x: x.unsqueeze_(0),
    ],
)
def test_views_and_memory_take_no_time(call):
    with Estimates() as mode:
        call(meta(4, 3))
    assert mode.found
    assert all(each is NOTHING for _, each in mode.found)


@pytest.mark.parametrize(
    ("call", "traffic"),
    [
        (lambda x: x + x, 2 * 4000),  # the same numbers are read once
        (lambda x: x + meta(1, 1).expand(10, 100), 2 * 4000 + 4),
        (lambda x: x.add_(1), 2 * 4000),
        (lambda x: x.zero_(), 4000),
        (lambda x: x.copy_(meta(100)), 4000 + 400),
        (lambda x: torch.mul(x, 2, out=meta(10, 100)), 2 * 4000),
        (lambda x: torch._foreach_add_([x, meta(5)], 1.0), 2 * 4020),
        (lambda x: torch.max(x, 1), 4000 + 40 + 80),
        (lambda x: x.half(), 4000 + 2000),
        (lambda x: F.embedding(meta(2, dtype=torch.int64), x), 16 + 2 * 800),  # two of ten rows
        (lambda x: x[meta(2, dtype=torch.int64)], 16 + 2 * 800),
        (lambda x: x.relu(), 2 * 4000),
    ],
)
def test_bytes_are_counted_once_for_reading_and_once_for_writing(call, traffic):
    assert estimate(call, meta(10, 100)).traffic == traffic


def test_what_crosses_the_bus_is_not_estimated():
    x, y = torch.ones(3), torch.ones(3, device="mlu")
    assert MLU270.operator("aten::_copy_from", {"self": x, "dst": y}, y) is None
    assert MLU270.operator("aten::_copy_from", {"self": y, "dst": x}, x) is None
    assert MLU270.operator("aten::_local_scalar_dense", {"self": y}, 1.0) is None
    found = MLU270.operator("aten::_copy_from", {"self": y, "dst": y + 1}, y)
    assert found.traffic == 24


def test_operators_that_torch_does_not_know_take_the_time_of_their_memory():
    assert MLU270.operator("vendor::own", {"x": meta(4)}, meta(2)).traffic == 24


def test_products_of_several_widths_take_the_sum():
    card = find_card("MLU270")
    found = MLU270.products([Product(1000, "int8", "int16"), Product(500, "int31", "int16")], 0)
    assert found.compute == 1000 / card.rate("int16", "int16") + 500 / card.rate("int31", "int16")
    assert found.macs == 1500


def test_products_that_a_card_does_not_have_are_refused():
    with pytest.raises(ValueError, match="MLU270 multiplies int8, int16, int31: not float16"):
        MLU270.products([Product(1, "float16", "float16")], 0)


def test_the_type_of_operands_can_be_given():
    with Estimates(kind="int8") as mode:
        torch.mm(meta(3, 4), meta(4, 5))
    assert mode.only().products == (Product(60, "int8", "int8"),)


def test_bytes_of_tensors_in_any_layout():
    assert count_bytes(torch.zeros(3, 0).expand(3, 0)) == 0
    assert count_bytes(torch.zeros(()).expand(4, 5)) == 4
    assert count_bytes(torch.zeros(6, dtype=torch.bool)[::2]) == 3
    assert count_bytes(torch.zeros(3, 3).to_sparse()) == 36
    x = torch.zeros(4)
    assert count_traffic([x, {"a": (x, None)}], [x[:2], x[2:]]) == 32


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(["int8", "int16", "int31"]))
def test_no_estimate_is_below_its_parts_and_more_work_never_takes_less(m, k, n, kind):
    def time(*sizes):
        rows, inner, columns = sizes
        traffic = 4 * (rows * inner + inner * columns + rows * columns)
        return MLU270.products([Product(rows * inner * columns, kind, kind)], traffic)

    found = time(m, k, n)
    assert found.seconds >= max(found.compute, found.memory, LAUNCH)
    for larger in ((m + 1, k, n), (m, k + 1, n), (m, k, n + 1)):
        assert time(*larger).seconds > found.seconds

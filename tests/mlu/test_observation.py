import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_step import OPERATORS, batch, small_net

import cnmix
from cnmix.torch_mlu.observation import OperatorCall, OperatorObserver

CARD = "mlu"


class Seen(OperatorObserver):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OperatorCall] = []
        self.results: list[Any] = []

    def begins(self, call: OperatorCall) -> None:
        self.calls.append(call)

    def ends(self, call: OperatorCall, result: Any) -> None:
        self.results.append(result)

    @property
    def names(self) -> list[str]:
        return [call.name for call in self.calls]


def names_of(function: Callable[[], Any]) -> list[str]:
    with Seen() as seen:
        function()
    return seen.names


@pytest.fixture(scope="module")
def operators() -> Iterator[None]:
    """Operators as of another package: one with a kernel for the card, one that only the host has."""
    library = torch.library.Library("cnmix_observed", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: (x + x).relu(), "PrivateUse1")
    library.define("host_only(Tensor x) -> Tensor")
    library.impl("host_only", lambda x: x + 1, "CPU")
    yield
    library._destroy()


def test_training_step_is_seen_as_the_card_runs_it() -> None:
    net = small_net().to(CARD)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = (each.to(CARD) for each in batch())
    with Seen() as seen:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    computing = [call.name for call in seen.calls if not call.is_view and not call.name.startswith(("empty", "copy"))]
    assert computing == OPERATORS
    assert [call.number for call in seen.calls] == list(range(1, len(seen.calls) + 1))
    assert len(seen.results) == len(seen.calls)
    assert all(call.depth == 0 for call in seen.calls)


@pytest.mark.parametrize("level", ["float", "O1"])
def test_what_is_watched_is_computed_as_it_is_else(level: str) -> None:
    def train(observer: OperatorObserver | None) -> list[Tensor]:
        torch.manual_seed(3)
        net = nn.Sequential(small_net(), nn.Dropout(0.5)).to(CARD)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, foreach=True)
        if level != "float":
            net, optimizer = cnmix.initialize(net, optimizer, opt_level=level)
        for step in range(3):
            x, y = (each.to(CARD) for each in batch(step))
            if observer is not None:
                observer.__enter__()
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            if observer is not None:
                observer.__exit__(None, None, None)
        return [each.detach().cpu() for each in net.state_dict().values()]

    for a, b in zip(train(None), train(Seen()), strict=True):
        assert torch.equal(a, b)


def test_arguments_have_their_names_order_and_defaults() -> None:
    x = torch.ones(2, 3, device=CARD)
    with Seen() as seen:
        torch.add(x, x)
        y = x + 2
    first, second = seen.calls
    assert list(first.arguments) == ["self", "other", "alpha"]
    assert first.arguments["alpha"] == 1
    assert first.arguments["self"] is x
    assert first.arguments["self"].device.type == CARD
    assert first.full_name == "aten::add.Tensor"
    assert first.name == "add"
    assert second.arguments["other"] == 2
    assert torch.equal(y.cpu(), torch.full((2, 3), 3.0))


def test_a_number_keeps_its_place_in_type_promotion() -> None:
    x = torch.tensor(1.5, dtype=torch.float16, device=CARD)
    with Seen():
        assert (x * 2.0).dtype == torch.float16


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x % 2,
        lambda x: 2 % (x + 1),
        lambda x: x & 1,
        lambda x: (x > 1) | True,
        lambda x: 4 >> x,
        lambda x: torch.fmod(x, 2),
        lambda x: 2.5 ** x.half(),
        lambda x: torch.xlogy(2, x.double()),
        lambda x: torch.copysign(x.float(), -0.0),
        lambda x: x + True,
        lambda x: (x > 1) * 2,
        lambda x: x.sum() * 0.1,
    ],
)
def test_operators_that_take_a_number_for_a_tensor(compute: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(5, device=CARD)
    expected = compute(x)
    with Seen() as seen, Seen():
        found = compute(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert any(isinstance(each, (int, float)) for call in seen.calls for each in call.arguments.values())


def test_forms() -> None:
    x = torch.ones(4, device=CARD)
    with Seen() as seen:
        x.add_(1)
        torch.add(x, x, out=x)
        x.view(2, 2)
        x.abs()
    add_, out, view, plain = seen.calls
    assert add_.in_place
    assert not add_.out_form
    assert not add_.is_view
    assert out.out_form
    assert not out.in_place
    assert out.name == "add"
    assert view.is_view
    assert not (plain.in_place)
    assert not (plain.out_form)
    assert not (plain.is_view)


def test_factories_copies_and_reads() -> None:
    assert names_of(lambda: torch.zeros(3, device=CARD)) == ["empty", "zero_"]
    assert names_of(lambda: torch.arange(3, device="mlu:1"))[-1] == "arange"
    assert names_of(lambda: torch.ones(3).to(CARD)) == ["empty_strided", "copy_from"]
    x = torch.ones(3, device=CARD)
    assert names_of(lambda: x.cpu()) == ["copy_from"]
    assert names_of(lambda: x.sum().item()) == ["sum", "local_scalar_dense"]
    assert names_of(lambda: x[x > 0]) == ["gt", "index"]


def test_operators_of_the_host_are_not_seen() -> None:
    x = torch.ones(3, 3, requires_grad=True)
    on_card = torch.ones(3, device=CARD)

    def compute() -> None:
        F.relu(x @ x).sum().backward()
        torch.randperm(4)
        torch.ops.cnmix_card.host(on_card).mul(2)

    assert names_of(compute) == []


def test_a_composite_operator_is_seen_as_what_it_calls() -> None:
    x = torch.ones(1, 1, 4, 4, device=CARD)
    assert names_of(lambda: F.conv2d(x, x[:, :, :2, :2].contiguous())).count("convolution_overrideable") == 1
    with torch.inference_mode():
        y = torch.ones(2, 3, device=CARD)
        assert "addmm" in names_of(lambda: F.linear(y, torch.ones(4, 3, device=CARD), torch.ones(4, device=CARD)))


def test_attention_is_seen_forwards_and_backwards() -> None:
    q = torch.randn(1, 2, 4, 8, device=CARD, requires_grad=True)
    names = names_of(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    fused = "scaled_dot_product_fused_attention_overrideable"
    assert [name for name in names if "attention" in name] == [fused, f"{fused}_backward"]


def test_what_an_operator_calls_is_nested(operators: None) -> None:
    x = torch.tensor([-1.0, 2.0], device=CARD)
    with Seen() as seen:
        x.abs()
        y = torch.ops.cnmix_observed.twice(x)
        x.neg()
    assert [(call.name, call.depth, call.number) for call in seen.calls] == [
        *(("abs", 0, 1), ("twice", 0, 2), ("add", 1, 1), ("relu", 1, 2), ("neg", 0, 3))
    ]
    assert seen.calls[2].parent is seen.calls[1]
    assert seen.calls[1].full_name == "cnmix_observed::twice"
    assert torch.equal(y.cpu(), torch.tensor([0.0, 4.0]))


def test_an_operator_that_only_the_host_has_is_seen(operators: None) -> None:
    x = torch.ones(2, device=CARD)
    with Seen() as seen:
        y = torch.ops.cnmix_observed.host_only(x)
    assert seen.names == ["host_only"]
    assert y.device.type == CARD


def test_unseen_operators_are_not_numbered() -> None:
    class Some(Seen):
        unseen = frozenset({"empty", "zero_"})

    with Some() as seen:
        torch.zeros(2, device=CARD).abs()
    assert [(call.name, call.number) for call in seen.calls] == [("abs", 1)]


def test_several_observers_see_the_same_in_whatever_order_they_leave() -> None:
    x = torch.ones(2, device=CARD)
    first, second = Seen(), Seen()
    first.__enter__()
    x.abs()
    second.__enter__()
    x.neg()
    first.__exit__(None, None, None)
    x.exp()
    second.__exit__(None, None, None)
    x.log()
    assert first.names == ["abs", "neg"]
    assert second.names == ["neg", "exp"]
    assert [call.number for call in second.calls] == [1, 2]
    assert names_of(lambda: x.sin()) == ["sin"]


def test_hooks_are_not_seen_and_leave_no_gradients() -> None:
    class Computes(Seen):
        def begins(self, call: OperatorCall) -> None:
            super().begins(call)
            assert not (call.arguments["self"] * 2).requires_grad

    x = torch.ones(2, device=CARD, requires_grad=True)
    with Seen() as other, Computes() as seen:
        x.abs()
    assert seen.names == other.names == ["abs"]


def test_an_operator_that_raises_has_no_end() -> None:
    x = torch.ones(2, 3, device=CARD)
    with Seen() as seen:
        with pytest.raises(RuntimeError):
            torch.mm(x, x)
        x.abs()
    assert [(call.name, call.depth, call.number) for call in seen.calls] == [("mm", 0, 1), ("abs", 0, 2)]
    assert len(seen.results) == 1


def test_another_thread_is_not_seen() -> None:
    x = torch.ones(2, device=CARD)

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: x.abs())
        thread.start()
        thread.join()

    assert names_of(elsewhere) == []


def test_products_in_fixed_point_are_seen() -> None:
    net = small_net().to(CARD)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net, optimizer = cnmix.initialize(net, optimizer, opt_level="O1")
    x, y = (each.to(CARD) for each in batch())
    with Seen() as seen:
        F.cross_entropy(net(x), y).backward()
    products = {call.name: call for call in seen.calls if call.name.startswith("quantize_")}
    assert list(products) == [
        *("quantize_convolution", "quantize_matmul", "quantize_matmul_backward", "quantize_convolution_backward")
    ]
    convolution = products["quantize_convolution"]
    assert convolution.arguments["input"].device.type == CARD
    assert convolution.arguments["stride"] == (1, 1)
    assert convolution.operator is None
    assert set(convolution.bits) >= {"input", "weight"}
    assert not any(call.depth for call in seen.calls)
    assert names_of(lambda: net(x))[0] == "quantize_convolution"


def test_a_product_that_raises_is_over_when_the_next_ends() -> None:
    net = nn.Linear(4, 4).to(CARD)
    cnmix.initialize(net, None, opt_level="O1")
    x = torch.ones(2, 4, device=CARD)

    def refuse(saved: Tensor) -> Tensor:
        raise RuntimeError("no")

    with Seen() as seen:
        with pytest.raises(RuntimeError), torch.autograd.graph.saved_tensors_hooks(refuse, lambda x: x):
            net(x)
        x.abs()
    assert seen.calls[-1].name == "abs"


def test_tensor_classes_of_their_own_are_left_to_themselves() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.ones(2, 3, device=CARD)
    with FlopCounterMode(display=False) as flops, Seen() as seen:
        torch.mm(x, x.T)
    assert flops.get_total_flops() == 24
    assert "mm" in seen.names
    with Seen() as seen, FlopCounterMode(display=False) as flops:
        torch.mm(x, x.T)
    assert flops.get_total_flops() == 24
    assert "mm" in seen.names


def test_a_compiler_that_traces_is_not_seen() -> None:
    net = nn.Linear(2, 2).to(CARD)
    with Seen():
        exported = torch.export.export(net, (torch.zeros(1, 2, device=CARD),)).module()
    assert names_of(lambda: exported(torch.zeros(1, 2, device=CARD))).count("addmm") == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("device", ["cpu", CARD])
@pytest.mark.parametrize("gradients", [True, False])
def test_traced_modules_compute_what_they_did(device: str, gradients: bool) -> None:
    net = nn.Sequential(small_net(), nn.Unflatten(1, (5, 1)), nn.ConvTranspose1d(5, 2, 1)).to(device).eval()
    x = batch()[0].to(device)
    with torch.set_grad_enabled(gradients):
        with Seen() as seen:
            traced = torch.jit.trace(net, x)
        assert ("convolution_overrideable" in seen.names) == (device == CARD)
        assert torch.equal(traced(2 * x), net(2 * x))
        assert str(traced.inlined_graph).count("aten::_convolution") == 2
        names = names_of(lambda: traced(x))
        # Without gradients it runs fused, and what is in a group is not seen.
        assert names.count("convolution_overrideable") == (2 if device == CARD and gradients else 0)

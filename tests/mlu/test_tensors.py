"""Tensors of a card behave as PyTorch's do: views, versions, storages, copies, derivatives of every kind."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from cnmix.torch_mlu.catch_perf.profiler import profile


def test_views_share_memory_and_versions() -> None:
    x = torch.arange(12.0, device="mlu").reshape(3, 4)
    for view in (
        x[1:],
        x.t(),
        x.unfold(1, 2, 1),
        x.as_strided((2, 2), (1, 4)),
        x.view(-1),
        x.expand(2, 3, 4),
        x.detach(),
    ):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert view.is_mlu
    left, right = x.split(2, 1)
    left.zero_()
    right.t().add_(1)
    assert x.tolist() == [[0, 0, 3, 4], [0, 0, 7, 8], [0, 0, 11, 12]]
    assert x._version == left._version == 2
    assert torch.add(x, 1, out=x) is x
    assert x.add_(1) is x


def test_what_autograd_saved_may_not_be_written() -> None:
    x = torch.randn(3, device="mlu", requires_grad=True)
    for write in (lambda y: y.add_(1), lambda y: y.detach().zero_(), lambda y: y[0].fill_(1), lambda y: y.copy_(x)):
        y = x.exp()
        with torch.no_grad():
            write(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_out_is_resized() -> None:
    x, out = torch.randn(3, 4, device="mlu"), torch.empty(0, device="mlu")
    view = out[:]
    assert torch.mul(x, 2, out=out) is out
    assert out.equal(x * 2)
    assert view.shape == (0,)
    with pytest.warns(UserWarning, match="was resized"):
        torch.add(x, 1, out=torch.empty(2, device="mlu"))
    values, indices = torch.empty(0, device="mlu"), torch.empty(0, dtype=torch.long, device="mlu")
    torch.sort(x, 1, out=(values, indices))
    assert values.equal(x.gather(1, indices))


def test_resizing() -> None:
    x = torch.arange(6.0, device="mlu")
    view = x[2:4]
    x.resize_(100, 1000)
    view.resize_(3)
    assert view.tolist() == [2.0, 3.0, 4.0]
    assert view.untyped_storage().nbytes() == x.untyped_storage().nbytes() == 400000
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0
    x.set_()
    assert x.shape == (0,)


def test_set_and_data() -> None:
    x, y = torch.zeros(3, device="mlu"), torch.arange(5.0, device="mlu")
    assert x.set_(y).data_ptr() == y.data_ptr()
    x.set_(y.untyped_storage(), 1, (2,), (2,))
    assert x.tolist() == [1.0, 3.0]
    x.data = y * 2
    assert x.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_a_module_keeps_its_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3))
    model(torch.randn(2, 4)).sum().backward()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.to("mlu:1")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {each.device.index for each in parameters} == {each.grad.device.index for each in parameters} == {1}
    model(torch.randn(2, 4, device="mlu:1")).sum().backward()
    optimizer.step()
    assert model.cpu()[0].weight.device.type == "cpu"


def test_inference_mode() -> None:
    x = torch.randn(3, device="mlu")
    with torch.inference_mode():
        y = (x + 1).mul_(2)
        x.add_(1)
    assert y.is_inference()
    assert not (y + x).is_inference()
    with pytest.raises(RuntimeError, match="inference tensor"):
        y.requires_grad_()


def test_conjugate_and_negative_views() -> None:
    x = torch.randn(4, dtype=torch.complex64, device="mlu")
    host = x.cpu()
    for call in (
        lambda z: z.conj() + 1,
        lambda z: z.conj().imag * 2,
        lambda z: z.conj().clone(),
        lambda z: z.clone().conj().mul_(2j),
        lambda z: z.clone().conj_physical_(),
        lambda z: torch.fft.ifft(z.conj()),
    ):
        assert torch.equal(call(x).cpu(), call(host))
    assert torch.equal(x.conj().to("cpu"), host.conj())
    assert torch.equal(host.conj().to("mlu").cpu(), host.conj())


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_derivatives_of_every_kind() -> None:
    x = torch.randn(4, device="mlu", requires_grad=True)
    (first,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x.detach())
    y = x.detach()

    def cubes(v: Tensor) -> Tensor:
        return (v**3).sum()

    torch.testing.assert_close(torch.func.hessian(cubes)(y).diagonal(), 6 * y)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(cubes))(y[None]), 3 * y[None] ** 2)
    torch.testing.assert_close(
        torch.func.jvp(torch.sign, (y,), (y,))[1], torch.zeros_like(y)
    )  # zeros that are marked so
    doubles = torch.randn(3, dtype=torch.float64, device="mlu", requires_grad=True)
    assert torch.autograd.gradcheck(torch.tanh, (doubles,))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_of_activations(use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).to("mlu")
    x = torch.randn(2, 3, device="mlu", requires_grad=True)
    torch.manual_seed(0)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
    (found,) = torch.autograd.grad(y.sum(), x) if not use_reentrant else (_gradient(y, x),)
    torch.manual_seed(0)
    assert torch.equal(found, torch.autograd.grad(model(x).sum(), x)[0])


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    y.sum().backward()
    assert x.grad is not None
    return x.grad.clone()


def test_files_and_copies() -> None:
    x = torch.arange(4.0, device="mlu:1")
    file = io.BytesIO()
    torch.save({"x": x, "view": x[1:]}, file)
    for location, device in ((None, "mlu:1"), ("cpu", "cpu"), ("mlu:0", "mlu:0"), ({"mlu:1": "mlu:0"}, "mlu:0")):
        file.seek(0)
        read = torch.load(file, map_location=location, weights_only=True)
        assert str(read["x"].device) == device
        read["x"][1] = 9
        assert read["view"].tolist() == [9.0, 2.0, 3.0]
    read = pickle.loads(pickle.dumps(x))
    assert (read.device, read.tolist()) == (x.device, x.tolist())
    a, b = copy.deepcopy([x, x[1:]])
    a[1] = 5
    assert (b[0].item(), x[1].item()) == (5.0, 1.0)


def test_another_process_gets_a_copy() -> None:
    queue: Any = torch.multiprocessing.get_context("spawn").SimpleQueue()
    weight = nn.Parameter(torch.ones(3, device="mlu:1", dtype=torch.bfloat16))
    view = torch.arange(6.0, device="mlu:1").view(2, 3).t()[1:]
    for x in (view, weight, weight.detach().requires_grad_(), weight.data):
        queue.put(x)
        got = queue.get()
        assert (type(got), got.device, got.requires_grad) == (type(x), x.device, x.requires_grad)
        assert torch.equal(got, x)
    with pytest.raises(RuntimeError, match=r"send x\.detach\(\)"):
        queue.put(weight * 2)
    host = torch.ones(2)
    queue.put(host)
    queue.get()[0] = 5
    assert host[0] == 5  # the host's are shared, as ever


class Squares(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)], device="mlu").square()


def test_workers_of_a_loader_may_compute_on_the_card() -> None:
    batches = list(torch.utils.data.DataLoader(Squares(), 2, num_workers=1))
    assert [x.is_mlu for x in batches] == [True, True]
    assert torch.cat(batches).flatten().tolist() == [0, 1, 4, 9]


def test_queues_may_use_its_memory() -> None:
    x = torch.ones(3, device="mlu")
    x.record_stream(torch.mlu.Stream())
    x.record_stream(torch.mlu.current_stream())


def test_an_operator_without_a_kernel_says_so_in_a_line() -> None:
    with pytest.raises(NotImplementedError) as caught:
        torch._cudnn_rnn_flatten_weight([torch.ones(2, 2, device="mlu")] * 4, 2, 2, 2, 2, 0, 1, False, False)
    assert str(caught.value).splitlines()[0].endswith("and the host has none for this operator")
    assert len(str(caught.value)) < 200


def test_values_are_formatted_on_the_host() -> None:
    x = torch.tensor([[1.5, float("nan")], [2e9, -1.0]], device="mlu", requires_grad=True)
    assert repr(x) == repr(x.detach().cpu()).replace(")", ", device='mlu:0', requires_grad=True)")
    with profile() as perf:
        repr(x)
    assert not perf.operators


def test_generators() -> None:
    torch.manual_seed(1)
    host = torch.randn(3)
    torch.manual_seed(1)
    assert torch.equal(torch.randn(3, device="mlu").cpu(), host)
    card, other = torch.Generator("mlu").manual_seed(5), torch.Generator().manual_seed(5)
    assert torch.equal(torch.randn(3, device="mlu", generator=card).cpu(), torch.randn(3, generator=other))
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'mlu'"):
        torch.randn(3, generator=card)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_scripts_and_traces() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval(),
        torch.randn(1, 1, 4, 4),
    )
    expected = model(x)
    traced = torch.jit.trace(copy.deepcopy(model).to("mlu"), x.to("mlu"))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    for location, device in (("mlu", "mlu"), ("cpu", "cpu")):
        file.seek(0)
        found = torch.jit.load(file, map_location=location)(x.to(device))
        assert found.device.type == device
        assert torch.equal(found.cpu(), expected)


def test_what_is_printed() -> None:
    assert repr(torch.ones(2, device="mlu:1")) == "tensor([1., 1.], device='mlu:1')"
    assert repr(torch.tensor([], device="mlu")) == "tensor([], device='mlu:0')"
    assert f"{torch.tensor(1.5, device='mlu'):.2f}" == "1.50"
    assert torch.tensor([1, 2], device="mlu").tolist() == [1, 2]

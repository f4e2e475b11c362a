"""What surrounds training with cnmix on the card: copies, checkpoints, inference, reports, transforms, observers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnmix
import cnmix.checkpoint
from cnmix import inference
from cnmix.nn.card_tensors import product_observers


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).flatten(2)
        y = self.lstm(y)[0]
        return self.last(y @ y.transpose(1, 2) @ y).mean(1)


def trained(device: str, level: str = "O1", steps: int = 3) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Net().to(device)
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
    cnmix.initialize(model, optimizer, opt_level=level)
    train(model, optimizer, device, range(steps))
    return model, optimizer


def train(model: nn.Module, optimizer: Any, device: str, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model(random(2, 1, 6, 6, seed=step).to(device)).square().sum()
        optimizer.zero_grad()
        with cnmix.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


X = random(2, 1, 6, 6, seed=9)


def test_a_copy_trains_on_as_the_model_does() -> None:
    model, _ = trained("mlu")
    other = copy.deepcopy(model)
    found = []
    for each in (model, other):
        each.zero_grad()
        for step in range(3, 6):
            each(random(2, 1, 6, 6, seed=step).to("mlu")).square().sum().backward()
        found.append([parameter.grad for parameter in each.parameters()])
    assert all(map(torch.equal, *found))
    assert found[1][0].device.type == "mlu"


@pytest.mark.parametrize(("saved_on", "loaded_on"), [("mlu", "cpu"), ("cpu", "mlu"), ("mlu", "mlu:1")])
def test_a_checkpoint_goes_on_wherever_it_is_loaded(tmp_path: Path, saved_on: str, loaded_on: str) -> None:
    model, optimizer = trained(saved_on)
    path = tmp_path / "checkpoint.pt"
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cnmix": cnmix.state_dict()["models"][-1:]},
        path,
    )
    known = cnmix.state_dict()
    expected = train(model, optimizer, saved_on, range(3, 6))
    del model, optimizer

    found = torch.load(path, map_location=loaded_on, weights_only=True)
    assert {value.device.type for value in found["model"].values()} == {loaded_on.partition(":")[0]}
    other = Net().to(loaded_on)
    other_optimizer: Any = torch.optim.Adam(other.parameters(), lr=0.01)
    cnmix.initialize(other, other_optimizer, opt_level="O1")
    other.load_state_dict(found["model"])
    other_optimizer.load_state_dict(found["optimizer"])
    cnmix.load_state_dict({**known, "models": known["models"][-1:], "loss_scalers": known["loss_scalers"][-1:]})
    assert train(other, other_optimizer, loaded_on, range(3, 6)) == expected


def test_the_plain_model_loads_it(tmp_path: Path) -> None:
    model, _ = trained("mlu")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    Net().load_state_dict(torch.load(tmp_path / "weights.pt", map_location="cpu", weights_only=True), strict=True)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_integer_inference(level: str) -> None:
    outputs = []
    for device in ("mlu", "cpu"):
        model, _ = trained(device, level)
        inference.freeze(model)
        with torch.no_grad():
            outputs.append(model(X.to(device)).cpu())
        model.to("cpu" if device == "mlu" else "mlu")
        with torch.inference_mode():
            outputs.append(model(X.to(next(model.parameters()).device)).cpu())
    assert all(torch.equal(outputs[0], each) for each in outputs)


def test_integer_inference_from_a_file(tmp_path: Path) -> None:
    model, _ = trained("mlu")
    model.eval()
    path = tmp_path / "checkpoint.pt"
    cnmix.checkpoint.save(path, model)
    with torch.no_grad():
        expected = model(X.to("mlu")).cpu()
        prepared = inference.prepare(Net(), path)
        assert torch.equal(prepared(X), expected)
        assert torch.equal(inference.prepare(Net().to("mlu"), path)(X.to("mlu")).cpu(), expected)


def test_reports(capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for device in ("mlu", "cpu"):
        model, _ = trained(device)
        reports.append((str(cnmix.summary(model)), capsys.readouterr().out))
    assert reports[0] == reports[1]


def test_executed_products_are_counted() -> None:
    counts = []
    for device in ("mlu", "cpu"):
        model, _ = trained(device)
        counts.append(str(cnmix.executed_products(model, X.to(device))))
    assert counts[0] == counts[1]


def test_dequantize() -> None:
    model, _ = trained("mlu")
    cnmix.dequantize(model)
    assert type(model.conv) is nn.Conv2d
    assert model(X.to("mlu")).device.type == "mlu"


def test_autocast_around_it() -> None:
    found = []
    for device in ("mlu", "cpu"):
        model, _ = trained(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            y = model(X.to(device))
        y.float().sum().backward()
        found.append([y.detach().float().cpu(), *(each.grad.cpu() for each in model.parameters())])
    assert all(map(torch.equal, *found))


def test_a_transform_of_torch_func() -> None:
    found = []
    for device in ("mlu", "cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 3)).to(device)
        cnmix.initialize(model, None, opt_level="O1")
        weights = {name: value.detach() for name, value in model.named_parameters()}

        def loss(values: Mapping[str, Tensor], model: nn.Module = model, device: str = device) -> Tensor:
            return torch.func.functional_call(model, dict(values), (X.to(device),)).square().sum()

        found.append({name: value.cpu() for name, value in torch.func.grad(loss)(weights).items()})
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(model)(X[:, None].to(device))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_graph_trains_to_the_same_bits() -> None:
    found = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to("mlu")
        cnmix.initialize(model, None, opt_level="O1")
        run = model if backend is None else torch.compile(model, backend=backend)
        for step in range(3):
            y = run(random(2, 1, 6, 6, seed=step).to("mlu"))
            y.square().sum().backward()
        assert y.device.type == "mlu"
        found.append([parameter.grad for parameter in model.parameters()])
    torch._dynamo.reset()
    assert all(map(torch.equal, *found))


def test_gradients_of_gradients_are_refused_as_on_the_host() -> None:
    model = nn.Linear(4, 2).to("mlu")
    cnmix.initialize(model, None, opt_level="O1")
    x = random(3, 4).to("mlu").requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradients_that_are_not_wanted() -> None:
    model = nn.Linear(4, 2).to("mlu")
    cnmix.initialize(model, None, opt_level="O1")
    model.weight.requires_grad_(False)
    x = random(3, 4).to("mlu")
    model(x).sum().backward()
    assert model.weight.grad is None
    assert model.bias.grad is not None
    with torch.no_grad():
        assert not model(x).requires_grad


Told = list[tuple[str, str, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], dict[str, int]]]


@pytest.fixture
def told() -> Iterator[Told]:
    found: Told = []

    def observer(
        name: str, phase: str, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor], bits: Mapping[str, int]
    ) -> None:
        operands = {key: each for key, each in inputs.items() if isinstance(each, Tensor)}
        assert all(each.device.type == "mlu" for each in (*operands.values(), *outputs.values()))
        shapes = ({key: tuple(each.shape) for key, each in tensors.items()} for tensors in (operands, outputs))
        found.append((name, phase, *shapes, dict(bits)))

    token = product_observers.set((observer,))
    yield found
    product_observers.reset(token)


BITS = {"input": 8, "weight": 8, "grad_output": 8}


def test_observers_are_told_of_a_product_and_its_backward_pass(told: Told) -> None:
    model = nn.Linear(4, 2).to("mlu")
    cnmix.initialize(model, None, opt_level="O3")
    model(random(3, 4).to("mlu").requires_grad_()).sum().backward()
    inputs = {"input": (3, 4), "weight": (2, 4), "bias": (2,)}
    gradients = {"grad_input": (3, 4), "grad_weight": (2, 4), "grad_bias": (2,)}
    assert told == [
        ("quantize_matmul", "begins", inputs, {}, BITS),
        ("quantize_matmul", "ends", inputs, {"result": (3, 2)}, BITS),
        ("quantize_matmul_backward", "begins", {"grad_output": (3, 2)}, {}, BITS),
        ("quantize_matmul_backward", "ends", {"grad_output": (3, 2)}, gradients, BITS),
    ]


@pytest.mark.parametrize(
    ("make", "shape", "name"),
    [
        (lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 5), "convolution"),
        (lambda: nn.LSTM(4, 4), (3, 2, 4), "lstm"),
        (lambda: nn.GRU(4, 4), (3, 2, 4), "gru"),
        (lambda: nn.RNN(4, 4), (3, 2, 4), "rnn"),
        (lambda: nn.TransformerEncoderLayer(4, 1, 4), (3, 2, 4), "attention"),
    ],
)
def test_observers_are_told_of_every_kind(
    told: Told, make: Callable[[], nn.Module], shape: tuple[int, ...], name: str
) -> None:
    model = make().to("mlu")
    cnmix.initialize(model, None, opt_level="O3")
    y = model(random(*shape).to("mlu"))
    (y[0] if isinstance(y, tuple) else y).sum().backward()
    named = [(each, phase) for each, phase, *_ in told if each.removeprefix("quantize_").startswith(name)]
    expected = [f"quantize_{name}", f"quantize_{name}_backward"]
    assert named == [(each, phase) for each in expected for phase in ("begins", "ends")]
    assert all(bits == BITS for *_, bits in told)


def test_observers_are_not_told_of_the_host(told: Told) -> None:
    model = nn.Linear(4, 2)
    cnmix.initialize(model, None, opt_level="O3")
    model(random(3, 4)).sum().backward()
    assert told == []

"""Functions under torch.compile stay float, in every part that is compiled; those of torch.fx's graphs do not."""

import logging

import pytest
import torch
from calls import INT8, places
from torch import nn
from torch.overrides import _get_current_function_mode

import cnmix


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(4, 4) / 2), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(torch.tanh(x @ self.weight))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Inner(), Inner()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x):
        return self.second(self.first(x) @ self.weight)


def train(model, steps=2):
    for seed in range(steps):
        model(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))).sum().backward()
    assert _get_current_function_mode() is None


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_messages(caplog):
    return [record.getMessage() for record in caplog.records if "is compiled" in record.getMessage()]


def test_a_compiled_model_says_once_what_stays_float(caplog):
    caplog.set_level(logging.WARNING, "cnmix")
    model = Outer()
    cnmix.initialize(model, **INT8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled, 3)
    assert not places(model)
    assert {message.split()[0] for message in compiled_messages(caplog)} == {"'Outer'", "'first'", "'second'"}
    count = len(compiled_messages(caplog))
    train(compiled, 2)
    assert len(compiled_messages(caplog)) == count


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_a_compiled_part_within_a_model(backend, caplog):
    model = Outer()
    cnmix.initialize(model, **INT8)
    model.first.compile(backend=backend, fullgraph=True)
    train(model, 3)
    assert places(model) == ["..forward+1:matmul(weight)", "second..forward+1:matmul(weight)"]
    states = cnmix.state_dict(model)["models"][0]["modules"]
    assert {state["operands"]["input"]["step"] for state in states.values()} == {3}
    assert [message.split()[0] for message in compiled_messages(caplog)] == ["'first'"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, as it compiles
def test_a_compiled_function_within_a_model():
    multiply = torch.compile(lambda x, weight: x @ weight, backend="aot_eager", fullgraph=True)

    class Model(Outer):
        def forward(self, x):
            return multiply(super().forward(x), self.weight) @ self.weight

    model = Model()
    cnmix.initialize(model, **INT8)
    train(model)
    assert "..forward+1:matmul(weight)" in places(model)
    assert not [name for name in places(model) if "lambda" in name]


def test_a_traced_graph_calls_functions():
    model = torch.fx.symbolic_trace(Outer())
    cnmix.initialize(model, **INT8)
    train(model)
    found = {name.rpartition(":")[2] for name in places(model)}
    assert found == {"matmul(weight)", "matmul(first.weight)", "matmul(second.weight)"}

"""Modules that get the same tensor share its integers, and nothing else comes out of it."""

import copy

import pytest
import torch
from torch import nn

import cnmix
from cnmix.nn import ModuleQuantizers, quantized_modules
from cnmix.nn.shared_input import LatestInput


class Heads(nn.Module):
    def __init__(self, change=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.change = change

    def forward(self, x):
        x = torch.tanh(self.first(x))
        query = self.query(x)
        return (query * self.key(self.change(x))).sum(1)


def data(seed=0):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def train(model, steps=6):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        model(data(seed)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def quantized_inputs(monkeypatch):
    """Records the modules whose input was quantized rather than shared."""
    names, original = [], ModuleQuantizers._quantize_input

    def quantize_input(self, x, training):
        known = self._latest_input._latest
        integers = original(self, x, training)
        if known is None or integers is not known[2]:
            names.append(self.fqn)
        return integers

    monkeypatch.setattr(ModuleQuantizers, "_quantize_input", quantize_input)
    return names


def initialized(change=lambda x: x, **settings):
    model = Heads(change)
    cnmix.initialize(model, None, **{"steps_per_epoch": 2, "max_bitwidth": 8, **settings})
    return model


def test_the_second_module_takes_what_the_first_quantized(monkeypatch):
    names = quantized_inputs(monkeypatch)
    model = initialized()
    train(model, 3)  # an epoch, and the update on the first step of the next: every operand measures for itself
    del names[:]
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(data(5))
    shared = [tensor.data_ptr() for tensor in saved if tensor.dtype == torch.int8 and tensor.shape == (5, 6)]
    assert len(shared) == 3
    assert len(set(shared)) == 2
    assert names == ["first", "query"]
    steps = {
        quantizer.state.step
        for _, module in quantized_modules(model)
        for name, quantizer in module.quantizers
        if name == "input"
    }
    assert steps == {4}


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_bitwidth": 31}, {"rounding": "stochastic"}, {"saturation": 0.01}, {"opt_level": "O2"},
     {"rules": [{"modules": "key", "bitwidth": 8, "max_bitwidth": 16, "threshold": 1e-9}]}],
)  # fmt: skip
def test_it_changes_no_bit(monkeypatch, settings):
    shared = initialized(**settings)
    weights = train(shared)
    monkeypatch.setattr(LatestInput, "find", lambda self, x, form: None)
    apart = initialized(**settings)
    assert all(torch.equal(a, b) for a, b in zip(weights, train(apart), strict=True))
    assert cnmix.state_dict(shared) == cnmix.state_dict(apart)


@pytest.mark.parametrize("change", [lambda x: x.mul_(3), lambda x: x * 1, lambda x: x.detach(), lambda x: x.view(5, 6)])
def test_what_is_another_tensor_or_was_written_to_is_quantized_again(monkeypatch, change):
    names = quantized_inputs(monkeypatch)

    class Before(Heads):
        def forward(self, x):
            x = self.first(x)
            query = self.query(x).detach()
            return (query * self.key(self.change(x))).sum(1)

    model = Before(change)
    cnmix.initialize(model, None, steps_per_epoch=2, max_bitwidth=8)
    train(model, 4)
    assert names.count("key") == names.count("query") == 4


def test_a_buffer_that_is_filled_anew_is_quantized_anew():
    linear = nn.Linear(6, 4)
    cnmix.initialize(linear, None, mode="fixed_interval", interval=100, max_bitwidth=8)
    buffer = data()
    linear(buffer)
    values = buffer.numpy()
    before = linear(buffer)
    values *= 0.5
    assert not torch.equal(linear(buffer), before)


def test_copies_and_pickles_have_their_own():
    model = initialized()
    train(model, 4)
    again = copy.deepcopy(model)
    latest = {id(module.quantizers._latest_input) for _, module in quantized_modules(again)}
    assert len(latest) == 1
    assert id(model.first.quantizers._latest_input) not in latest
    assert again.first.quantizers._latest_input._latest is None
    train(again, 4)

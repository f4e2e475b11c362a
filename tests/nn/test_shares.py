"""When operands look at their shares: on the training step that was asked for, and on no other."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cnmix import QuantizeConfig, kernels
from cnmix.adaptive import OperandQuantizer
from cnmix.nn import OPERANDS, convert, quantized_modules


@pytest.fixture
def linear():
    torch.manual_seed(0)
    module = nn.Linear(6, 4)
    convert(module, QuantizeConfig(max_bitwidth=8))
    return module


@pytest.fixture
def looks(monkeypatch):
    """Collects the names of the operands that were looked at."""
    seen = []
    original = OperandQuantizer.look

    def noted(self, x, quantized, *absmax):
        seen.append(self.name.split()[0])
        original(self, x, quantized, *absmax)

    monkeypatch.setattr(OperandQuantizer, "look", noted)
    return seen


def ask(model):
    for _, module in quantized_modules(model):
        for _, quantizer in module.quantizers:
            quantizer.look_next, quantizer.shares = True, None


def inputs(seed=0):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)) ** 5
    return x.requires_grad_()


def expected(x, quantizer):
    return kernels.shares(x, kernels.quantize_measured(x, quantizer.state.bits, quantizer.state.position)[0])


def test_the_next_training_step_looks_once(linear, looks):
    linear(inputs()).sum().backward()
    assert looks == []
    ask(linear)
    linear.eval()(inputs())
    with torch.no_grad():
        linear.train()(inputs())
    assert looks == []
    x = inputs(1)
    y = linear(x)
    y.retain_grad()
    (y**3).sum().backward()
    assert looks == ["input", "weight", "grad_output"]
    tensors = dict(zip(OPERANDS, (x, linear.weight, y.grad), strict=True))
    for operand, quantizer in linear.quantizers:
        assert quantizer.shares == expected(tensors[operand], quantizer)
    assert linear.quantizers.input.shares.underflow > 0
    kept = linear.quantizers.input.shares
    linear(inputs(2)).sum().backward()
    assert len(looks) == 3
    assert linear.quantizers.input.shares is kept


def test_a_weight_that_is_not_quantized_again(linear, looks):
    linear(inputs()).sum().backward()
    linear(inputs()).sum().backward()
    ask(linear)
    linear(inputs()).sum().backward()
    assert looks == ["input", "weight", "grad_output"]
    assert linear.quantizers.weight.shares == expected(linear.weight, linear.quantizers.weight)


def test_an_input_that_another_module_quantized(looks):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])
    convert(model, QuantizeConfig(max_bitwidth=8, quantify_rate=0.0))
    for step in range(3):
        x = inputs() * 1.0
        if step == 2:
            ask(model)
        sum(part(x).sum() for part in model).backward()
    assert looks.count("input") == 2
    first, second = (part.quantizers.input for part in model)
    assert first.shares == second.shares == expected(x, first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_repeated_forward_pass_does_not_look(linear, looks, reentrant):
    checkpoint(linear, inputs(), use_reentrant=reentrant).sum().backward()
    ask(linear)
    checkpoint(linear, inputs(1), use_reentrant=reentrant).sum().backward()
    assert looks == ["input", "weight", "grad_output"]
    assert linear.quantizers.input.shares == expected(inputs(1), linear.quantizers.input)


def test_looking_is_no_part_of_the_state(linear):
    before = linear.quantizers.state_dict()
    ask(linear)
    assert linear.quantizers.state_dict() == before
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        other(inputs()).sum().backward()
        assert other.quantizers.input.shares is not None
    linear(inputs()).sum().backward()
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert other.quantizers.input.shares == linear.quantizers.input.shares
        assert set(other.quantizers.state_dict()) == set(before)


def test_compiled(linear, looks):
    compiled = torch.compile(linear, backend="aot_eager")
    ask(linear)
    x = inputs()
    compiled(x).sum().backward()
    assert sorted(looks) == sorted(OPERANDS)
    assert linear.quantizers.input.shares == expected(x, linear.quantizers.input)

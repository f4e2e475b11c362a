"""Lazy modules: converted before they have weights, and computing in fixed point from the pass that gives them some."""

import copy
import pickle

import pytest
import torch
from test_functional import random
from torch import nn
from torch.nn.parameter import is_lazy

import cnmix
from cnmix import inference
from cnmix.nn import (
    QUANTIZED_CLASSES,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedLinear,
    quantized_modules,
)

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


class NamedLazy(nn.LazyLinear):
    """Becomes nn.Linear, as torch does it."""


class Net(nn.Module):
    def __init__(self, lazy=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.LazyConv2d(4, 3) if lazy else nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.LazyConvTranspose2d(3, 2, stride=2) if lazy else nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.head = NamedLazy(5) if lazy else nn.Linear(48, 5)

    def forward(self, x):
        return self.head(self.up(self.norm(self.conv(x)).relu()).flatten(1))


BECOME = {"conv": QuantizedConv2d, "up": QuantizedConvTranspose2d, "head": QuantizedLinear}


def images(seed=0):
    return random((4, 2, 4, 4), seed)


def train(model, optimizer=None, steps=3, start=0, call=None):
    torch.manual_seed(1)  # for the weights that the first pass draws
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        (model if call is None else call)(images(seed)).square().mean().backward()
        optimizer.step()
    return model


def build(level="O1", **settings):
    model = Net()
    return cnmix.initialize(model, None, level, **settings)[0]


def same(a, b):
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert cnmix.state_dict(a)["models"] == cnmix.state_dict(b)["models"]


def test_it_trains_as_one_that_ran_before_and_with_the_same_optimizer():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer)
    parameters = list(model.parameters())
    assert all(is_lazy(parameter) for parameter in model.conv.parameters())
    assert [fqn for fqn, _ in quantized_modules(model)] == list(BECOME)
    train(model, optimizer)
    assert {fqn: type(module) for fqn, module in quantized_modules(model)} == BECOME
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [module.quantizers.input.state.step for _, module in quantized_modules(model)] == [3, 3, 3]

    ran = Net()
    torch.manual_seed(1)
    with torch.no_grad():
        ran.eval()(images())
    torch.manual_seed(0)  # which the quantizers are numbered from
    same(model, train(cnmix.initialize(ran.train(), None)[0]))


def test_31_bits_are_those_of_float():
    ours, theirs = train(build(bitwidth=31)), train(Net())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_on_alike(duplicate, moment):
    model = build()
    if moment == "after":
        train(model)
    same(train(duplicate(model)), train(model))


def test_dequantize_before_it_ran():
    model = cnmix.dequantize(build())
    assert [type(module) for module in model.children()] == [type(module) for module in Net().children()]
    train(model)
    assert not any(quantized_modules(model))


def test_rules_and_settings_wait_with_it():
    model = build(exclude=["up"], rules=[{"types": "LazyLinear", "width": 16}, {"types": "Conv2d", "width": 31}])
    train(model)
    assert [(fqn, m.quantizers.input.state.bits) for fqn, m in quantized_modules(model)] == [("conv", 31), ("head", 16)]


@pytest.mark.parametrize("rule", [{"small": True, "leave_out": True}, {"small": True, "modules": "head", "width": 16}])
def test_a_rule_by_size_is_refused_until_the_size_is_known(rule):
    model = Net()
    with pytest.raises(ValueError, match=r"is a (LazyConv2d|NamedLazy), whose size is known after a forward pass"):
        cnmix.initialize(model, None, rules=[rule])
    assert not any(quantized_modules(model))
    cnmix.initialize(Net(), None, rules=[{"small": True, "modules": "norm", "leave_out": True}])
    model(images())
    cnmix.initialize(model, None, rules=[rule])


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"the weight of 'conv' has dtype torch\.float64"):
        cnmix.initialize(Net().double(), None)


def test_state_is_loaded_before_it_ran():
    model = train(build())
    weights, state = copy.deepcopy(model.state_dict()), cnmix.state_dict(model)
    again = build()
    again.load_state_dict(weights)
    cnmix.load_state_dict(state, again)
    same(train(again, start=3), train(model, start=3))
    infers = inference.prepare(Net(), {"state_dict": weights, "cnmix": state})
    plain = inference.prepare(Net(lazy=False), {"state_dict": weights, "cnmix": state})
    assert torch.equal(infers(images(9)), plain(images(9)))


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_half_levels(level):
    model = train(build(level))
    assert all(module.quantizers.output_dtype == torch.bfloat16 for _, module in quantized_modules(model))


def test_compiled_before_it_ran():
    torch._dynamo.reset()
    eager, model = train(build(max_bitwidth=8)), build(max_bitwidth=8)
    same(eager, train(model, call=torch.compile(model, backend="aot_eager")))
    torch._dynamo.reset()


def test_summary():
    model = build(exclude=["head"])
    rows = cnmix.summary(model).rows
    assert [(row.kind, row.weight, row.macs, row.reason) for row in rows] == [
        ("LazyConv2d", None, None, ""),
        ("LazyConvTranspose2d", None, None, ""),
        ("NamedLazy", None, None, "left out"),
    ]
    rows = cnmix.summary(model, images()).rows  # a forward pass, which gives them weights
    assert [(row.kind, row.weight, row.macs, row.reason) for row in rows] == [
        ("Conv2d", (4, 2, 3, 3), 4 * 4 * 4 * 18, ""),
        ("ConvTranspose2d", (4, 3, 2, 2), 4 * 4 * 4 * 12, ""),
        ("Linear", (5, 48), 4 * 48 * 5, "left out"),
    ]


def test_all_of_torch_become_a_converted_class():
    lazy = [nn.LazyLinear, nn.LazyConv1d, nn.LazyConv2d, nn.LazyConv3d]
    lazy += [nn.LazyConvTranspose1d, nn.LazyConvTranspose2d, nn.LazyConvTranspose3d]
    for kind in lazy:
        dims = 0 if kind is nn.LazyLinear else int(kind.__name__[-2])
        model = nn.Sequential(kind(4) if dims == 0 else kind(4, 2))
        cnmix.initialize(model, None)
        assert type(model[0]).__name__ == f"Quantized{kind.__name__}"
        model(torch.randn(2, 3, *[3] * dims)).sum().backward()
        assert type(model[0]) is QUANTIZED_CLASSES[kind.cls_to_become]


def test_other_lazy_modules_are_none_of_ours():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    cnmix.initialize(model, None)
    model(images())
    assert [type(module) for module in model] == [QuantizedConv2d, nn.BatchNorm2d]

"""Subclasses of the classes that are converted: which keep their class beside ours, and which stay float."""

import abc
import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_functional import random
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

import cnmix
from cnmix import QuantizeConfig, inference
from cnmix.nn import QuantizedConv2d, QuantizedLinear, QuantizedModule, convert, quantized_modules
from cnmix.nn.convert import find_conversion, plain_class


class Named(nn.Linear):
    """Another ``__init__``, more methods and state of its own."""

    def __init__(self, width, name):
        super().__init__(width, width)
        self.name = name
        self.register_buffer("calls", torch.zeros(()))

    def describe(self):
        return f"{self.name}: {self.out_features}"

    def extra_repr(self):
        return f"name={self.name}, {super().extra_repr()}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}saved"] = torch.ones(())

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}saved", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Scaled(nn.Linear):
    """A forward that calls the parent's."""

    def forward(self, input):
        return 2 * super().forward(input)


class ScaledTwice(Scaled):
    def forward(self, input):
        return 2 * super(ScaledTwice, self).forward(input)  # noqa: UP008


class Rectified:
    """No module itself."""

    def forward(self, x):
        return super().forward(x).relu()


class RectifiedConv(Rectified, nn.Conv2d, abc.ABC):
    pass


class Keyword(nn.ConvTranspose1d):
    def forward(self, input, twice=False):
        return super().forward(input) * (2 if twice else 1)


class Masked(nn.Linear):
    """A product of its own."""

    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class MaskedScaled(Masked):
    def forward(self, x):
        return super().forward(x) * 2


class Explicit(nn.Linear):
    def forward(self, x):
        return nn.Linear.forward(self, x)


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Taken(nn.Linear):
    quantizers = None


def unwrapped(function):
    return lambda self, x: function(self, x)


class Decorated(nn.Linear):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Hidden(nn.Linear):
    forward = unwrapped(nn.Linear.forward)


class OutputAlone(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class Permuted(nn.LSTM):
    def permute_hidden(self, hx, permutation):
        return hx


CONVERTED = [Named, Scaled, ScaledTwice, RectifiedConv, Keyword, Decorated, OutputAlone]
FLOAT = {
    Masked: "a subclass of Linear with a forward of its own, which does not call super().forward",
    MaskedScaled: "a subclass of Linear with a forward of its own, which does not call super().forward",
    Explicit: "a subclass of Linear with a forward of its own, which does not call super().forward",
    Hidden: "a subclass of Linear with a forward of its own, which does not call super().forward",
    Standardized: "a subclass of Conv2d with a _conv_forward of its own",
    Taken: "a subclass of Linear with an attribute 'quantizers' of its own, a name that cnmix uses",
    NonDynamicallyQuantizableLinear: "nn.MultiheadAttention multiplies by its weight without calling it",
    Permuted: "a subclass of LSTM with a permute_hidden of its own",
    nn.MultiheadAttention: "MultiheadAttention is not converted in this version",
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = RectifiedConv(2, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), Named(6, "middle"), ScaledTwice(6, 6))
        self.up = Keyword(1, 2, 2)

    def forward(self, x):
        return self.up(self.body(self.conv(x)).unsqueeze(1), twice=True)


NAMES = ["conv", "body.1", "body.2", "body.3", "up"]


def train(model, steps=3, start=0, call=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        (model if call is None else call)(random((4, 2, 3, 3), seed)).square().mean().backward()
        optimizer.step()
    return model


def build(level="O1", **settings):
    return cnmix.initialize(Net(), None, level, **settings)[0]


def same(a, b):
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert cnmix.state_dict(a)["models"] == cnmix.state_dict(b)["models"]


@pytest.mark.parametrize("kind", CONVERTED)
def test_which_are_converted(kind):
    ours, reason = find_conversion(kind)
    assert reason == ""
    assert issubclass(ours, QuantizedModule)


@pytest.mark.parametrize("kind", FLOAT)
def test_which_stay_float_and_why(kind):
    assert find_conversion(kind) == (None, FLOAT[kind])


def test_the_class_is_the_users_and_ours():
    model = build()
    assert [fqn for fqn, _ in quantized_modules(model)] == NAMES
    named = model.body[2]
    assert [isinstance(named, kind) for kind in (Named, QuantizedLinear)] == [True, True]
    assert type(named).__mro__[1:6] == (Named, QuantizedLinear, QuantizedModule, nn.Linear, nn.Module)
    assert type(named).__name__ == "QuantizedNamed"
    assert named.describe() == "middle: 6"
    assert repr(named) == (
        "QuantizedNamed(name=middle, in_features=6, out_features=6, bias=True, input=int8, weight=int8, "
        "grad_output=int8)"
    )
    assert plain_class(named) is Named
    assert isinstance(model.conv, QuantizedConv2d)
    other = nn.Sequential(Named(2, "other"))
    convert(other, QuantizeConfig())
    assert type(other[0]) is type(named)


def test_31_bits_are_those_of_float():
    plain, model = Net(), build(bitwidth=31)
    for ours, theirs in zip(train(model).parameters(), train(plain).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(module.quantizers.grad_output.state.step == 3 for _, module in quantized_modules(model))


def test_its_own_forward_runs_around_the_product():
    plain, model = nn.Linear(4, 3), Scaled(4, 3)
    model.load_state_dict(plain.state_dict())
    convert(plain, QuantizeConfig())
    convert(model, QuantizeConfig())
    x = random((5, 4))
    assert torch.equal(model(x), 2 * plain(x))


def test_state_dict_keeps_what_the_class_does():
    plain, model = Net(), build()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert "body.2.saved" in model.state_dict()
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch.save"])
def test_copies_and_pickles_train_on_alike(duplicate, tmp_path):
    model = train(build())
    if duplicate == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        other = duplicate(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert other.body[2].describe() == "middle: 6"
    assert other.body[2].quantizers is not model.body[2].quantizers
    same(train(model, start=3), train(other, start=3))


def test_dequantize_gives_the_users_classes_back():
    model, plain = train(build()), Net()
    plain.load_state_dict(model.state_dict())
    cnmix.dequantize(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(model(random((4, 2, 3, 3))), plain(random((4, 2, 3, 3))))
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_half_levels(level):
    model = train(build(level))
    assert all(module.quantizers.output_dtype == torch.bfloat16 for _, module in quantized_modules(model))


def test_a_compiled_model_trains_to_the_same_bits():
    torch._dynamo.reset()
    eager, model = train(build()), build()
    same(eager, train(model, call=torch.compile(model, backend="aot_eager", fullgraph=True)))
    torch._dynamo.reset()


def test_resume_and_integer_inference():
    model = train(build())
    state = {"state_dict": copy.deepcopy(model.state_dict()), "cnmix": cnmix.state_dict(model)}
    infers = inference.prepare(Net(), state)
    assert torch.equal(infers(random((4, 2, 3, 3))), model.eval()(random((4, 2, 3, 3))))


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrized(when):
    model = nn.Sequential(Named(4, "a"), Scaled(4, 4))
    if when == "before":
        parametrizations.weight_norm(model[0])
    cnmix.initialize(model, None)
    if when == "after":
        parametrizations.weight_norm(model[0])
    assert type(model[0]).__name__ == "ParametrizedQuantizedNamed"
    assert plain_class(model[0]) is Named
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each(random((2, 4))).sum().backward()
    assert model[0].describe() == "a: 4"
    remove_parametrizations(model[0], "weight")
    assert type(model[0]).__bases__ == (Named, QuantizedLinear)
    cnmix.dequantize(twin)
    assert type(twin[0]).__bases__ == (Named,)


def test_rules_by_class():
    model = build(rules=[{"types": "Named", "width": 16}, {"types": RectifiedConv, "leave_out": True}])
    assert [fqn for fqn, _ in quantized_modules(model)] == NAMES[1:]
    assert model.body[2].quantizers.input.state.bits == 16
    assert model.body[1].quantizers.input.state.bits == 8


def test_summary_and_log_name_what_stays_float(caplog):
    model = nn.Sequential(Scaled(4, 4), Masked(4, 4), MaskedScaled(4, 4), Masked(4, 4), nn.Linear(4, 4))
    cnmix.initialize(model, None, exclude=["3", "4"])
    rows = cnmix.summary(model, random((2, 4))).rows
    why = "the functions that it calls go to the core, and are listed once they have been trained"
    assert [(row.kind, row.reason) for row in rows] == [
        ("Scaled", ""),
        ("Masked", why),
        ("MaskedScaled", why),
        ("Masked", "left out"),
        ("Linear", "left out"),
    ]
    assert rows[0].widths == (8, 8, 8)
    assert caplog.records == []


def test_what_no_rule_could_hold_for_and_attention_are_not_logged(caplog):
    cnmix.initialize(nn.Sequential(Masked(4, 4), nn.Linear(4, 4)), None, "O0")
    cnmix.initialize(nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4)), None)
    assert caplog.records == []


def test_a_class_made_in_a_function_trains_and_is_copied():
    class Local(nn.Linear):
        pass

    model = nn.Sequential(Local(4, 4))
    convert(model, QuantizeConfig())
    other = copy.deepcopy(model)
    assert type(other[0]) is type(model[0])
    assert torch.equal(other(random((2, 4))), model(random((2, 4))))


def test_a_way_of_pickling_of_its_own_is_kept():
    class Own(nn.Linear):
        def __reduce__(self):
            return functools.partial(Own, self.in_features), (self.out_features,)

    model = Own(4, 4)
    convert(model, QuantizeConfig())
    assert type(copy.copy(model)) is Own


class Mixed(nn.Module):
    """A subclass, a transposed convolution and a bilinear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.named, self.up, self.both = Named(6, "first"), nn.ConvTranspose1d(1, 2, 3), nn.Bilinear(8, 8, 3)

    def forward(self, x):
        return self.both(*self.up(self.named(x).unsqueeze(1)).unbind(1))


def sharded(rank, order):
    model = Mixed()
    if order == "before":
        cnmix.initialize(model, None)
    if order != "never":
        for part in model.children():
            fully_shard(part)
        fully_shard(model)
    if order != "before":
        cnmix.initialize(model, None, process_group=torch.distributed.group.WORLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(4):
        optimizer.zero_grad()
        model(random((8, 6), seed)).square().mean().backward()
        optimizer.step()
    assert model.named.describe() == "first: 6"
    assert plain_class(model.named) is Named
    weights = {name: getattr(each, "full_tensor", lambda each=each: each)() for name, each in model.named_parameters()}
    weights = {name: weight.detach() for name, weight in weights.items()}
    return cnmix.state_dict(model)["models"], weights


@pytest.mark.parametrize("order", ["before", "after"])
def test_fully_shard_gives_the_bits_of_one_process(processes, order):
    whole, _ = processes.run(sharded, "never")
    for states, weights in processes.run(sharded, order):
        assert states == whole[0]
        assert all(torch.equal(weight, whole[1][name]) for name, weight in weights.items())

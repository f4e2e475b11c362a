"""Weights that are computed: parametrizations, weight norm, spectral norm, pruning."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

import cnmix
from cnmix import inference
from cnmix.nn import QuantizedConv2d, QuantizedLinear, QuantizedModule, quantized_modules

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x):
        return x.triu()


NEW = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "custom": lambda module: register_parametrization(module, "weight", Symmetric()),
}
OLD = {
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


def build(parametrize=lambda module: module):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
    parametrize(model[3])
    return model


def data(seed):
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(8) % 3


def train(model, optimizer=None, steps=3):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for seed in range(steps):
        x, y = data(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def trained(parametrize, level="O1", **settings):
    model = build(parametrize)
    cnmix.initialize(model, None, level, **settings)
    return train(model)


def states(model):
    return cnmix.state_dict(model)["models"]


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", [*NEW, *OLD])
def test_before_and_after_conversion_are_the_same(kind):
    parametrize = {**NEW, **OLD}[kind]
    plain = build(parametrize)
    before = trained(parametrize)
    torch.manual_seed(0)
    after = build()
    cnmix.initialize(after, None)
    parametrize(after[3])
    train(after)
    assert list(before.state_dict()) == list(plain.state_dict())
    assert [fqn for fqn, _ in quantized_modules(before)] == ["0", "3", "4"]
    assert same(before, after)
    assert states(before) == states(after)
    assert before[3].quantizers.weight.state.step == 3
    assert not same(before, plain)


@pytest.mark.parametrize("kind", [*NEW, *OLD])
def test_training_of_int31_is_that_of_float(kind):
    parametrize = {**NEW, **OLD}[kind]
    ours = trained(parametrize, bitwidth=31)
    theirs = train(build(parametrize))
    for (name, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", [*NEW, *OLD])
def test_what_is_quantized_is_the_computed_weight(kind):
    model = trained({**NEW, **OLD}[kind], bitwidth=16, max_bitwidth=16).eval()
    layer, x = model[3], torch.rand(5, 16) / 4  # within what the input's stored position holds
    found = layer.quantizers.quantize_weight(layer.weight, training=False)
    assert torch.allclose(found.values * 2.0**found.position, layer.weight, atol=2.0**found.position)
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("level", ["O2", "O3"])
@pytest.mark.parametrize("kind", [*NEW, *OLD])
def test_half_levels(kind, level):
    parametrize = {**NEW, **OLD}[kind]
    model = trained(parametrize, level)
    assert model[3].weight.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert list(model.state_dict()) == list(build(parametrize).state_dict())
    assert model(data(0)[0]).dtype == torch.float32


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_parametrized_layer_that_stays_float_at_a_half_level(inputs):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4) if inputs == 1 else nn.Bilinear(4, 4, 4))
    parametrizations.weight_norm(model[1])
    cnmix.initialize(model, None, "O2", exclude=["1"])
    inner = model[0](torch.randn(2, 4).bfloat16())
    y = model[1](*[inner] * inputs)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", NEW)
def test_dequantize_gives_the_plain_parametrized_module(kind):
    model, plain = trained(NEW[kind]), build(NEW[kind])
    plain.load_state_dict(model.state_dict())
    cnmix.dequantize(model)
    assert [type(module).__mro__[1] for module in (model[0], model[3])] == [nn.modules.conv._ConvNd, nn.Linear]
    assert type(model[3]).__name__ == "ParametrizedLinear"
    assert same(train(model), train(plain))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", NEW)
def test_parametrizations_are_removed(kind, when):
    model = build(NEW[kind] if when == "before" else lambda module: module)
    cnmix.initialize(model, None)
    if when == "after":
        NEW[kind](model[3])
    train(model).eval()
    expected, state = model(data(0)[0]), states(model)
    remove_parametrizations(model[3], "weight")
    assert type(model[3]) is QuantizedLinear
    assert torch.allclose(model(data(0)[0]), expected, atol=1e-6)
    assert states(model) == state
    assert sorted(model.state_dict()) == sorted(build().state_dict())
    train(model.train())
    assert type(cnmix.dequantize(model)[3]) is nn.Linear


def test_old_style_norms_and_masks_are_removed():
    removal = {"old weight_norm": nn.utils.remove_weight_norm, "old spectral_norm": nn.utils.remove_spectral_norm}
    for kind, parametrize in OLD.items():
        model = trained(parametrize)
        removal.get(kind, lambda module: prune.remove(module, "weight"))(model[3])
        assert sorted(model.state_dict()) == sorted(build().state_dict())
        train(model)


def test_several_parametrizations_and_a_second_one_after_conversion():
    def both(module):
        register_parametrization(module, "weight", Symmetric())
        register_parametrization(module, "bias", nn.Tanh())

    before = trained(both)
    after = build(lambda module: register_parametrization(module, "weight", Symmetric()))
    cnmix.initialize(after, None)
    register_parametrization(after[3], "bias", nn.Tanh())
    train(after)
    assert same(before, after)
    assert torch.equal(after[3].weight, after[3].weight.mT)
    remove_parametrizations(after[3], "bias")
    assert is_parametrized(after[3], "weight")
    assert isinstance(after[3], QuantizedModule)


def test_a_parametrized_convolution():
    model = build()
    parametrizations.weight_norm(model[0])
    cnmix.initialize(model, None)
    assert isinstance(model[0], QuantizedConv2d)
    train(model)
    assert model[0].quantizers.weight.state.step == 3


def test_checking_moves_no_buffers_of_spectral_norm():
    model = build(parametrizations.spectral_norm)
    before = copy.deepcopy(model.state_dict())
    cnmix.initialize(model, None)
    cnmix.dequantize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_copy_trains_on_by_itself():
    model = trained(parametrizations.weight_norm)
    other = copy.deepcopy(model)
    assert same(train(model), train(other))
    assert states(model) == states(other)
    assert model[3].quantizers is not other[3].quantizers
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(model)


@pytest.mark.parametrize("tied", ["original", "parametrization"])
def test_tied_to_a_parametrized_weight(tied):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    register_parametrization(model[0], "weight", Symmetric())
    if tied == "original":
        model[1].weight = model[0].parametrizations.weight.original
    else:
        register_parametrization(model[1], "weight", Symmetric())
        model[1].parametrizations = model[0].parametrizations
    cnmix.initialize(model, None)
    assert [fqn for fqn, _ in quantized_modules(model)] == ["0", "1"]
    model(torch.randn(2, 4)).sum().backward()
    assert all(module.quantizers.grad_output.state.step == 1 for module in model)


def test_a_parametrized_weight_shared_with_a_module_left_out_is_refused():
    model = nn.ModuleDict({"tail": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    register_parametrization(model["head"], "weight", Symmetric())
    model["head"].parametrizations.weight.original = model["tail"].weight
    with pytest.raises(ValueError, match=r"'head' shares a parameter with 'tail' \(Linear\)"):
        cnmix.initialize(model, None, exclude=["tail"])


def test_a_wrong_dtype_is_refused():
    model = build(parametrizations.weight_norm)
    model[3].double()
    with pytest.raises(ValueError, match=r"the weight of '3' has dtype torch\.float64"):
        cnmix.initialize(model, None)
    assert not any(quantized_modules(model))


def test_resume_and_integer_inference():
    model = trained(parametrizations.weight_norm)
    saved = {"state_dict": copy.deepcopy(model.state_dict()), "cnmix": {**cnmix.state_dict(model)}}
    again = build(parametrizations.weight_norm)
    again.load_state_dict(saved["state_dict"])
    cnmix.initialize(again, None)
    cnmix.load_state_dict(saved["cnmix"], again)
    assert same(train(model), train(again))
    assert states(model) == states(again)
    infers = inference.prepare(build(parametrizations.weight_norm), saved)
    assert [fqn for fqn, _ in quantized_modules(infers)] == ["0", "3", "4"]
    assert infers(data(0)[0]).isfinite().all()


def test_compiled():
    torch._dynamo.reset()
    model, expected = build(parametrizations.weight_norm), trained(parametrizations.weight_norm, max_bitwidth=8)
    cnmix.initialize(model, None, max_bitwidth=8)
    train(torch.compile(model, backend="aot_eager"), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert same(model, expected)
    assert states(model) == states(expected)
    torch._dynamo.reset()


def test_summary_says_why_and_moves_no_buffers():
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 4)), parametrizations.weight_norm(nn.Linear(4, 4))
    )
    before = copy.deepcopy(model.state_dict())
    cnmix.initialize(model, None, exclude=["1"])
    rows = cnmix.summary(model, torch.ones(2, 4)).rows
    assert [(row.kind, row.reason, row.weight, row.macs) for row in rows] == [
        ("Linear", "", (4, 4), 32),
        ("Linear", "left out", (4, 4), 32),
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

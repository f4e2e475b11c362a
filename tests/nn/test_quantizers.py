import copy
import pickle

import pytest
import torch
from torch import nn

from cnmix import QuantizeConfig
from cnmix.adaptive import OperandQuantizer
from cnmix.kernels import quantize, reference
from cnmix.nn import OPERANDS, convert

SMALL, LARGE = (4, 3), (200, 100)


def quantized_linear(size=SMALL, **settings):
    torch.manual_seed(0)
    linear = nn.Linear(*size)
    convert(linear, QuantizeConfig(**settings))
    return linear


def step(linear, seed=0):
    x = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(seed))
    linear(x).sum().backward()


@pytest.fixture
def weight_calls(monkeypatch):
    """Collects what the weight quantizers are called with."""
    calls = []
    original = OperandQuantizer.measured

    def counted(self, x, training, **more):
        if self.name.startswith("weight"):
            calls.append(self.name)
        return original(self, x, training, **more)

    monkeypatch.setattr(OperandQuantizer, "measured", counted)
    return calls


def integers(linear):
    """The integers that serve the weight's next product, checked against the weight of now."""
    known = linear.quantizers.quantize_weight(linear.weight, training=False)
    assert torch.equal(known.values, reference.quantize(linear.weight.detach(), known.bits, known.position))
    return known


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_weight_is_quantized_once_per_version(size, weight_calls):
    linear = quantized_linear(size)
    for seed in range(4):
        step(linear, seed)
    assert len(weight_calls) == 1
    assert linear.quantizers.weight.state.step == 4
    linear.eval()
    step(linear)
    with torch.no_grad():
        step_free = linear(torch.ones(1, size[0]))
    assert step_free.isfinite().all()
    assert len(weight_calls) == 1


def write_in_place(linear):
    with torch.no_grad():
        linear.weight.mul_(1.3)


def write_data(linear):
    linear.weight.data.mul_(1.3)


def write_one_element_of_data(linear):
    linear.weight.data[1, 2] += 0.3


def replace_data(linear):
    linear.weight.data = linear.weight.data * 1.3


def replace_parameter(linear):
    linear.weight = nn.Parameter(linear.weight.detach() * 1.3)


def optimizer_step(linear):
    torch.optim.SGD(linear.parameters(), lr=0.1).step()


def adam_step(linear):
    torch.optim.Adam(linear.parameters(), lr=0.1, foreach=True).step()


def load_state(linear):
    linear.load_state_dict({name: value * 1.3 for name, value in linear.state_dict().items()})


def assign_state(linear):
    linear.load_state_dict({name: value * 1.3 for name, value in linear.state_dict().items()}, assign=True)


def write_through_numpy(linear):
    linear.weight.detach().numpy()[...] *= 1.3


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(
    "write",
    [
        write_in_place,
        write_data,
        replace_data,
        replace_parameter,
        optimizer_step,
        adam_step,
        load_state,
        assign_state,
        write_through_numpy,
    ],
)
def test_every_write_is_a_new_version(write, size, weight_calls):
    linear = quantized_linear(size, online=True)
    step(linear)
    before = integers(linear)
    for count in (2, 3):
        write(linear)
        step(linear)
        assert len(weight_calls) == count
        integers(linear)
    assert len(weight_calls) == 3
    assert not torch.equal(before.values, integers(linear).values)


def test_one_element_of_data_is_a_new_version(weight_calls):
    linear = quantized_linear()
    step(linear)
    write_one_element_of_data(linear)
    step(linear)
    assert len(weight_calls) == 2
    integers(linear)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_column_of_data_of_a_large_weight_is_a_new_version(value):
    linear = quantized_linear((256, 64))
    step(linear)
    linear.weight.data[:, 1] = value
    y = linear(torch.eye(256)[1:2]) - linear.bias
    assert y.isnan().all() if value else not y.any()


@pytest.mark.parametrize("write", [write_in_place, write_data])
def test_a_write_in_evaluation_is_seen(write, weight_calls):
    linear = quantized_linear()
    step(linear)
    linear.eval()
    write(linear)
    step(linear)
    assert len(weight_calls) == 2
    integers(linear)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda linear: pickle.loads(pickle.dumps(linear))])
def test_a_copy_quantizes_its_own_weight(copied, weight_calls):
    linear = quantized_linear()
    step(linear)
    other = copied(linear)
    with torch.no_grad():
        other.weight.neg_()
    x = torch.ones(2, 4)
    linear.eval(), other.eval()
    assert len(weight_calls) == 1
    torch.testing.assert_close(other(x) - other.bias, -(linear(x) - linear.bias), rtol=0.05, atol=0.02)
    assert len(weight_calls) == 2
    assert other.quantizers is not linear.quantizers
    assert other.quantizers.state_dict() == linear.quantizers.state_dict()


def test_shared_integers_are_those_of_measuring_again():
    shared, fresh = (quantized_linear(steps_per_epoch=20, quantify_rate=0.2, alpha=0.3) for _ in range(2))
    for number in range(60):
        if number % 3 == 0:
            for each in (shared, fresh):
                write_in_place(each)
        fresh.quantizers._weight_integers = None
        for each in (shared, fresh):
            step(each, number)
        assert shared.quantizers.state_dict() == fresh.quantizers.state_dict()


def test_a_weight_that_stands_still_is_measured_again_when_settings_change():
    linear = quantized_linear(online=True)
    step(linear)
    assert linear.quantizers.weight.state.bits == 8
    linear.quantizers.config = linear.quantizers.config.replace(threshold=1e-9)
    step(linear)
    step(linear)
    assert linear.quantizers.input.state.bits == 31
    assert linear.quantizers.weight.state.bits == 31


def test_evaluation_does_not_keep_training_from_measuring():
    linear = quantized_linear(online=True)
    linear.eval()
    step(linear)
    assert linear.quantizers.weight.state.position is None
    linear.train()
    step(linear)
    assert (linear.quantizers.weight.state.updates, linear.quantizers.weight.state.step) == (1, 1)


def test_stochastic_weights_are_nearest_in_evaluation():
    linear = quantized_linear(LARGE, rounding="stochastic")
    step(linear)
    random = linear.quantizers.quantize_weight(linear.weight, training=True)
    linear.eval()
    assert not torch.equal(random.values, integers(linear).values)


def test_stochastic_operands_have_different_streams():
    linear = quantized_linear(rounding="stochastic")
    quantizers = [quantizer for _, quantizer in linear.quantizers]
    x = torch.full((4096,), 0.3)
    bits = [quantizer(x, training=True).values for quantizer in quantizers]
    assert not torch.equal(bits[0], bits[1])
    assert not torch.equal(bits[1], bits[2])
    again = quantized_linear(rounding="stochastic")
    for (_, quantizer), values in zip(again.quantizers, bits, strict=True):
        assert torch.equal(quantizer(x, training=True).values, values)
    torch.manual_seed(1)
    other = nn.Linear(4, 3)
    convert(other, QuantizeConfig(rounding="stochastic"))
    assert not torch.equal(other.quantizers.input(x, training=True).values, bits[0])


def test_settings_are_replaced_together():
    linear = quantized_linear()
    step(linear)
    state = linear.quantizers.state_dict()["operands"]
    linear.quantizers.config = QuantizeConfig(alpha=0.1)
    assert {quantizer.config.alpha for _, quantizer in linear.quantizers} == {0.1}
    assert linear.quantizers.state_dict()["operands"] == state


def test_state_round_trip_continues_alike():
    linear = quantized_linear(steps_per_epoch=10)
    for seed in range(3):
        step(linear, seed)
    other = quantized_linear(steps_per_epoch=10)
    step(other, 7)
    other.quantizers.load_state_dict(pickle.loads(pickle.dumps(linear.quantizers.state_dict())))
    for seed in range(3, 25):
        for each in (linear, other):
            optimizer_step(each) if seed % 5 == 0 else None
            step(each, seed)
            each.zero_grad()
        assert linear.quantizers.state_dict() == other.quantizers.state_dict()
        assert torch.equal(integers(linear).values, integers(other).values)


@pytest.mark.parametrize("broken", ["none", "no operands", "operand missing", "number missing", "width"])
def test_bad_states_are_refused_by_name_and_change_nothing(broken):
    linear = nn.Sequential(quantized_linear())
    quantizers = linear[0].quantizers
    quantizers.fqn = "encoder.fc1"
    step(linear[0])
    state = copy.deepcopy(quantizers.state_dict())
    for name in OPERANDS:
        state["operands"][name]["step"] = 77
    if broken == "none":
        state = None
    elif broken == "no operands":
        del state["operands"]
    elif broken == "operand missing":
        del state["operands"]["weight"]
    elif broken == "number missing":
        del state["operands"]["grad_output"]["error"]
    else:
        state["operands"]["grad_output"]["bits"] = 24
    before = quantizers.state_dict()
    with pytest.raises(ValueError, match=r"'encoder\.fc1'"):
        quantizers.load_state_dict(state)
    assert quantizers.state_dict() == before


def test_any_data_write_to_a_large_weight_is_a_new_version():
    layer = nn.Conv2d(64, 64, 3, bias=False)
    convert(layer, QuantizeConfig())
    x = torch.randn(1, 64, 5, 5)
    layer(x)
    layer.eval()
    for index in [(0, 0), (13, 7), (63, 63)]:
        layer.weight.data[index].mul_(-1)
        integers = layer.quantizers.quantize_weight(layer.weight, False)
        assert torch.equal(integers.values, quantize(layer.weight, integers.bits, integers.position))

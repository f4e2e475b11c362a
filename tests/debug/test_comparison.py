import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from debugged_networks import NETWORKS, Attention, Many, loss, made, mlp, random
from torch import nn

import cnmix
import cnmix.debug
import cnmix.inference
from cnmix.fixed_point import choose_position, dequantize
from cnmix.kernels import quantize_measured
from cnmix.nn import quantizer_sets


def gradients(model, *example):
    model.zero_grad()
    total = loss(model(*example))
    total.backward()
    return float(total.detach()), [each.grad.clone() for each in model.parameters()]


def relative(found, expected):
    flat = [torch.cat([each.flatten() for each in several]).double() for several in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def rounded(x, bits=8):
    """What the format of this width holds of a tensor."""
    position = choose_position(float(x.abs().max()), bits)
    return (x / 2.0**position).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * 2.0**position


@pytest.mark.parametrize("name", NETWORKS)
def test_step_in_float_is_the_plain_models_and_that_in_fixed_point_the_next_one(name):
    model, x = made(name)
    float_loss, expected = gradients(copy.deepcopy(model), x)
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    compared = cnmix.debug.compare(model, x, loss=loss)
    fixed_loss, found = gradients(model, x)
    assert compared.float_loss == pytest.approx(float_loss, rel=1e-5)
    assert compared.loss == fixed_loss  # to the bit
    assert compared.gradient == pytest.approx(relative(found, expected), rel=1e-3)
    assert 1e-4 < compared.gradient < 0.2


def test_errors_are_those_of_the_operands_rounded_by_hand():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), random(5, 16)
    first, second = (each.weight.detach().clone() for each in model)
    middle = F.linear(x, first, model[0].bias.detach())
    y = F.linear(middle, second, model[1].bias.detach())
    grad = 2 * y / y.numel()
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    rows = {row.name: row for row in cnmix.debug.compare(model, x, loss=loss).rows}
    bias = model[1].bias.detach()
    own = rows["1"].own
    assert own.output == pytest.approx(relative([F.linear(rounded(middle), rounded(second), bias)], [y]), rel=1e-3)
    assert own.grad_input == pytest.approx(relative([rounded(grad) @ rounded(second)], [grad @ second]), rel=1e-3)
    assert own.grad_weight == pytest.approx(relative([rounded(grad).t() @ rounded(middle)], [grad.t() @ middle]), 1e-3)
    alone = rows["1"].operands
    assert alone["input"].output == pytest.approx(relative([F.linear(rounded(middle), second, bias)], [y]), rel=1e-3)
    assert alone["weight"].grad_input == pytest.approx(relative([grad @ rounded(second)], [grad @ second]), rel=1e-3)
    assert max(alone["weight"].grad_weight, alone["grad_output"].output) < 1e-6
    # What the first layer gets is the same in both steps; what it returns is one error, which the second adds to.
    assert rows["0"].own.output == rows["0"].accumulated.output
    fixed = F.linear(rounded(x), rounded(first), model[0].bias.detach())
    accumulated = F.linear(rounded(fixed), rounded(second), bias)
    assert rows["1"].accumulated.output == pytest.approx(relative([accumulated], [y]), rel=1e-3)
    assert rows["0"].own.grad_input is None  # of data
    assert rows["1"].own.snr("output") == pytest.approx(-20 * torch.tensor(own.output).log10().item())


@pytest.mark.parametrize("layer", ["0", "3", "9"])
def test_a_weight_far_off_is_found(layer):
    torch.manual_seed(0)
    model = mlp()
    with torch.no_grad():
        model.get_submodule(layer).weight[1, 2] = 60.0
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    rows = cnmix.debug.compare(model, random(16, 32), loss=loss).rows
    assert rows[0].name == rows[0].module == layer
    assert rows[0].worst_operand == "weight"
    assert rows[0].operands["weight"].worst > 3 * max(row.operands["weight"].worst for row in rows[1:])


def test_an_operand_with_one_large_channel_is_found():
    """The layer behind multiplies the channel by little, so that the small ones, which int8 makes zeros, matter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    with torch.no_grad():
        model[0].bias[5] = 500.0
        model[1].weight[:, 5] = 0
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    compared = cnmix.debug.compare(model, random(16, 32), loss=loss)
    assert (compared.rows[0].name, compared.rows[0].worst_operand) == ("1", "input")
    assert compared.rows[0].own.output > 0.5
    by_name = {row.name: row for row in compared.rows}
    assert by_name["2"].own.output < 0.05 < 0.5 < by_name["2"].accumulated.output  # not its fault


def test_the_product_of_an_attention_is_found():
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        model.into.weight[16 + 3] *= 300  # a channel of the keys, which the queries hardly have
        model.into.weight[3] /= 300
    cnmix.initialize(model, None, "O1", rules=[{"modules": ["into", "out"], "width": 16}], max_bitwidth=8)
    rows = cnmix.debug.compare(model, random(2, 6, 16), loss=loss).rows
    assert rows[0].name.startswith("Attention..forward")
    assert rows[0].module == ""
    assert rows[0].worst_operand in rows[0].bits
    assert rows[0].bits[rows[0].worst_operand] == 8
    assert {operand.partition(" ")[0] for operand in rows[0].operands} == {"scores", "values", "value_gradient"}


def test_the_layer_of_an_lstm_is_found():
    torch.manual_seed(0)
    model = nn.LSTM(16, 12, 2)
    with torch.no_grad():
        model.weight_hh_l1[0, 0] = 50.0
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    rows = cnmix.debug.compare(model, random(6, 3, 16), loss=lambda output: loss(output[0])).rows
    assert (rows[0].name, rows[0].worst_operand) == ("LSTM..l1", "hidden weight")


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_a_model_of_all_kinds_is_compared_at_every_level(level):
    torch.manual_seed(0)
    model = Many()
    cnmix.initialize(model, None, level, max_bitwidth=8)
    compared = cnmix.debug.compare(model, random(3, 6, 16), loss=loss)
    assert {row.module for row in compared.rows} == {
        *("conv", "", "attention.into", "attention", "attention.out", "multihead", "lstm", "head")
    }
    # Dropout drew the same in both: else the difference would be as large as what it is of.
    assert all(0 < row.own.worst < 0.2 and 0 < row.accumulated.worst < 0.5 for row in compared.rows)
    assert all(set(row.bits.values()) == {8} for row in compared.rows)
    lines = str(compared).splitlines()
    assert len(lines) == 1 + len(compared.rows) + 3
    assert lines[1].startswith(compared.rows[0].name)
    assert "int8" in lines[1]
    assert " dB)" in lines[1]


def test_more_bits_are_seen():
    torch.manual_seed(0)
    model = mlp()
    cnmix.initialize(model, None, "O1", bitwidth=16, rules=[{"modules": "6", "width": 8}])
    rows = cnmix.debug.compare(model, random(16, 32), loss=loss).rows
    assert rows[0].name == "6"
    assert rows[0].own.output > 0.003
    assert all(row.own.worst < 1e-3 for row in rows[1:])
    assert all(row.bits == dict.fromkeys(("input", "weight", "grad_output"), 16) for row in rows[1:])


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_nothing_is_changed(rounding):
    torch.manual_seed(0)
    model, x = Many(), random(3, 6, 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cnmix.initialize(model, optimizer, "O1", rounding=rounding)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(1)
        for step in range(3):
            its_optimizer.zero_grad()
            if each is model:
                cnmix.debug.compare(model, x, loss=loss)
                if not step:
                    cnmix.debug.sensitivity(model, x, loss=loss, modules=["head"]).suggest()
            if step == 2:  # gradients that are there stay
                loss(each(x)).backward()
                if each is model:
                    cnmix.debug.compare(model, x, loss=loss)
            loss(each(x)).backward()
            its_optimizer.step()
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    states = [{name: each.state_dict() for name, each in quantizer_sets(m)} for m in (model, other)]
    assert states[0] == states[1]


def test_evaluation_and_no_grad_have_no_gradients():
    model, x = made("mlp")
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    with torch.no_grad():
        compared = cnmix.debug.compare(model.eval(), x)
    assert compared.gradient is compared.loss is None
    assert compared.output > 0
    assert all(row.own.grad_input is row.own.grad_weight is None and row.own.output > 0 for row in compared.rows)
    assert "–" in str(compared)


def test_compiled_model_runs_eagerly():
    model, x = made("mlp")
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    plain = cnmix.debug.compare(model, x, loss=loss)
    assert cnmix.debug.compare(torch.compile(model, backend="eager"), x, loss=loss) == plain


def test_what_goes_other_ways_in_fixed_point_is_left_out():
    """As a mixture of experts does, which sends other rows to an expert."""

    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.first(x)
            return self.second(y[: 2 + bool(y.detach().frac().ne(rounded(y.detach(), 31)).all())].clone())

    model = Chooses()
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    assert len(cnmix.debug.compare(model, random(4, 4)).rows) == 2


def test_nan_is_the_worst_error():
    model, x = made("mlp")
    with torch.no_grad():
        model[6].weight[0, 0] = float("nan")
    cnmix.initialize(model, None, "O1")
    compared = cnmix.debug.compare(model, x, loss=loss)
    assert compared.rows[0].own.worst == float("inf")
    assert "nan" in str(compared)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="nothing in Sequential computes in fixed point: call cnmix"):
        cnmix.debug.compare(mlp(), random(2, 32))
    lazy = nn.Sequential(nn.LazyLinear(4))
    cnmix.initialize(lazy, None, "O1")
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        cnmix.debug.compare(lazy, random(2, 32))
    model, x = made("mlp")
    cnmix.initialize(model, None, "O1")
    loss(model(x)).backward()
    cnmix.inference.freeze(model.eval())
    with pytest.raises(ValueError, match="frozen for integer inference"):
        cnmix.debug.compare(model, x)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (TypeError, torch.ones(()), "loss must be a function of the model's output, got Tensor"),
        (TypeError, lambda output: 1.0, "loss must return a tensor to go backwards from, got float"),
        (ValueError, lambda output: output, r"must return one number, got one of shape \(2, 8\): take its mean"),
    ],
)
def test_wrong_losses_are_named_and_leave_the_model_alone(kind, wrong, message):
    model, x = mlp(), random(2, 32)
    cnmix.initialize(model, None, "O1")
    own = [each for _, each in quantizer_sets(model)]
    with pytest.raises(kind, match=message):
        cnmix.debug.compare(model, x, loss=wrong)
    assert [each for _, each in quantizer_sets(model)] == own
    assert all(each.input.state.step == 0 for each in own)
    assert all(each.grad is None for each in model.parameters())


@dataclasses.dataclass
class Output:
    logits: torch.Tensor | None
    hidden: tuple[torch.Tensor, ...] = ()


class Returns(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.layer, self.returned = nn.Linear(16, 4), returned

    def forward(self, x):
        return self.returned(self.layer(x))


def test_outputs_are_looked_into():
    x, errors = random(3, 16), []
    for returned in (lambda y: y, lambda y: {"logits": y}, Output, lambda y: Output(None, (y,))):
        torch.manual_seed(0)
        model = Returns(returned)
        cnmix.initialize(model, None, "O1")
        errors.append(cnmix.debug.compare(model, x).gradient)
    assert errors == errors[:1] * 4
    assert errors[0] > 0
    model = Returns(lambda y: (each for each in y))
    cnmix.initialize(model, None, "O1")
    with pytest.raises(ValueError, match=r"Returns returned generator, which has no floating tensor: give loss=\.\.\."):
        cnmix.debug.compare(model, x)
    assert cnmix.debug.compare(model, x, loss=lambda output: sum(each.sum() for each in output)).gradient > 0


def test_a_loss_with_parameters_is_as_it_was():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, output):
            return self.norm(output).pow(4).mean()

    model, x = made("mlp")
    cnmix.initialize(model, None, "O1")
    scaled = Scaled()
    assert cnmix.debug.compare(model, x, loss=scaled).gradient > 0
    assert scaled.norm.weight.grad is None
    assert scaled.norm.num_batches_tracked == 0
    assert torch.equal(scaled.norm.running_mean, torch.zeros(8))


def test_parts_that_were_initialized_by_themselves_are_told_apart():
    parts = [mlp(), mlp()]
    with torch.no_grad():
        parts[1][0].weight[1, 2] = 60.0
    for each in parts:
        cnmix.initialize(each, None, "O1", max_bitwidth=8)
    model = nn.Sequential(parts[0], nn.Linear(8, 32), parts[1])
    rows = cnmix.debug.compare(model, random(16, 32), loss=loss).rows
    assert {row.name for row in rows} == {f"{part}.{layer}" for part in (0, 2) for layer in (0, 3, 6, 9, 12)}
    assert all(row.module == row.name for row in rows)
    assert rows[0].name == "2.0"


def test_products_of_another_model_in_the_loss_are_not_compared():
    (model, x), (teacher, _) = made("mlp"), made("mlp")
    for each in (model, teacher):
        cnmix.initialize(each, None, "O1", max_bitwidth=8)
    compared = cnmix.debug.compare(model, x, loss=lambda output: F.mse_loss(output, teacher(x).detach() + 1))
    assert len(compared.rows) == 5
    assert compared.rows[0].operands.keys() == {"input", "weight", "grad_output"}


def test_rounding_by_hand_is_that_of_the_kernels():
    x = random(5, 16)
    assert torch.equal(dequantize(quantize_measured(x, 8, None)[0]), rounded(x))

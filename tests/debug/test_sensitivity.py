import copy

import pytest
import torch
from debugged_networks import Attention, Many, Recurrent, loss, made, mlp, random
from omegaconf import OmegaConf
from torch import nn

import cnmix
import cnmix.debug
from cnmix.debug.suggestion import Width, make_rules
from cnmix.nn import module_name, quantizer_sets
from cnmix.plugins.precision import FixedPointPrecision
from cnmix.recipe import load_recipe, recipe_rules


def gradient_error(model, plain, x, rules=(), **settings):
    """The error of the parameters' gradients, without any of the tools."""
    model, plain = copy.deepcopy(model), copy.deepcopy(plain)
    if rules is not None:
        cnmix.initialize(model, None, **{"opt_level": "O1", **settings}, rules=rules)
    found = []
    for each in (model, plain):
        torch.manual_seed(5)
        each.zero_grad()
        loss(each(x)).backward()
        found.append(torch.cat([p.grad.flatten() for p in each.parameters()]).double())
    return float((found[0] - found[1]).norm() / found[1].norm())


def one_weight_far_off():
    model = mlp()
    with torch.no_grad():
        model[3].weight[1, 2] = 60.0
    return model, random(16, 32), {("3", "weight")}


def one_channel_large():
    """The layer behind multiplies the channel by nothing, so that the small ones, which int8 makes zeros, matter."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    with torch.no_grad():
        model[0].bias[5] = 500.0
        model[1].weight[:, 5] = 0
    return model, random(16, 32), {("1", "input")}


def one_weight_of_an_lstm():
    model, x = made("lstm")
    with torch.no_grad():
        model.rnn.weight_ih_l0_reverse[0, 0] = 40.0
    return model, x, {("rnn", "weight")}


@pytest.mark.parametrize("plant", [one_weight_far_off, one_channel_large, one_weight_of_an_lstm])
def test_what_was_planted_is_first_and_the_rules_for_it_lower_the_error(plant):
    torch.manual_seed(0)
    model, x, planted = plant()
    plain = copy.deepcopy(model)
    before = gradient_error(model, plain, x, max_bitwidth=8)
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    report = cnmix.debug.sensitivity(model, x, loss=loss)
    first = report.effects[0]
    assert {(first.module, first.operand)} == planted
    assert first.error > 2 * report.effects[1].error
    assert next(iter(report.modules)) == first.module
    assert report.gradient == report.error == pytest.approx(before, rel=1e-3)
    suggestion = report.suggest()
    assert suggestion.mappings == ({"modules": [first.module], "operands": [first.operand], "width": 16},)
    assert (suggestion.before, suggestion.wanted) == (report.error, report.error / 2)
    after = gradient_error(plain, plain, x, suggestion.mappings, max_bitwidth=8)
    assert after == pytest.approx(suggestion.after, rel=1e-3)
    assert after < 0.5 * before


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("make", [mlp, Attention, Many])
def test_rules_do_what_was_measured(level, make):
    torch.manual_seed(0)
    model, x = make(), random(3, 6, 32 if make is mlp else 16)
    plain = copy.deepcopy(model)
    limit = {} if level == "O3" else {"max_bitwidth": 8}
    cnmix.initialize(model, None, level, **limit)
    report = cnmix.debug.sensitivity(model, x, loss=loss)
    suggestion = report.suggest(report.error / 4)
    assert suggestion.rules == cnmix.rules.parse_rules(suggestion.mappings)
    cnmix.initialize(plain, None, level, **limit, rules=suggestion.rules)
    # Where what flows is bfloat16, a sum that is rounded otherwise in its last bit is so by more.
    close = 0.02 if level == "O1" else 0.25
    assert cnmix.debug.compare(plain, x, loss=loss).gradient == pytest.approx(suggestion.after, rel=close)
    assert suggestion.after < suggestion.before / 2
    assert (suggestion.after <= suggestion.wanted) or all(
        quantizer.config.bitwidth == 16 for _, quantizers in quantizer_sets(plain) for _, quantizer in quantizers
    )


def test_rules_widen_what_training_has_widened():
    """Widths at which training has arrived count, not those that it began with."""
    torch.manual_seed(0)
    model, x = mlp(), random(16, 32)
    cnmix.initialize(model, None, "O1", rules=[{"modules": ["3"], "width": 16}], max_bitwidth=16)
    loss(model(x)).backward()
    report = cnmix.debug.sensitivity(model, x, loss=loss, modules=["3"])
    assert {(each.module, each.bits) for each in report.effects} == {("3", 16)}
    (rule,) = report.suggest(1e-9).mappings
    assert rule == {"modules": ["3"], "width": 31}


def test_costs_are_multiply_accumulates():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), random(5, 16)
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    suggestion = cnmix.debug.sensitivity(model, x, loss=loss, modules=["1"]).suggest(1e-9)
    first, second = 5 * 16 * 16, 5 * 16 * 4
    assert suggestion.macs_before == {"int8 x int8": 2 * first + 3 * second}  # the first input is data
    assert suggestion.macs_after == {"int8 x int8": 2 * first, "int16 x int16": 3 * second}
    assert suggestion.after > suggestion.wanted
    text = str(suggestion)
    assert "{'modules': ['1'], 'width': 16}" in text
    assert "not the 1e-09 that was asked for" in text
    assert "int16 x int16         0.0%    27.3%" in text


def test_file_of_rules_is_taken_by_initialize_a_recipe_and_the_plugins(tmp_path):
    torch.manual_seed(0)
    model, x = Many(), random(3, 6, 16)
    plain = copy.deepcopy(model)
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    suggestion = cnmix.debug.sensitivity(model, x, loss=loss).suggest()
    path = tmp_path / "folder" / "rules.yaml"
    suggestion.save(path)
    assert path.read_text(encoding="utf-8").startswith("# error of the step: ")
    loaded = OmegaConf.load(path).cnmix.rules
    cnmix.initialize(plain, None, "O1", rules=loaded, max_bitwidth=8)
    assert cnmix.debug.compare(plain, x, loss=loss).gradient == pytest.approx(suggestion.after, rel=1e-3)
    assert FixedPointPrecision(recipe=str(path)).rules == suggestion.rules
    recipe = OmegaConf.merge(OmegaConf.load("recipes/digits.yaml"), OmegaConf.load(path))
    OmegaConf.save(recipe, tmp_path / "recipe.yaml")
    (tmp_path / recipe.module).write_text("")
    assert recipe_rules(load_recipe(tmp_path / "recipe.yaml")) == suggestion.rules


def test_without_gradients_it_is_about_the_output():
    model, x = made("mlp")
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    with torch.no_grad():
        report = cnmix.debug.sensitivity(model.eval(), x)
        assert report.gradient is None
        assert report.error == report.output > 0
        assert all(each.output == 0 for each in report.effects if each.operand == "grad_output")
        assert report.suggest().after < report.output / 2


def test_text_is_a_table():
    model, x = made("attention")
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    lines = str(cnmix.debug.sensitivity(model, x, loss=loss)).splitlines()
    assert len(lines) == 1 + 3 * 3 + 1
    assert {line.split()[0] for line in lines[1:-1]} == {"into", "out", "(the"}
    assert lines[-1].startswith("(all together)")


def test_mistakes_are_named():
    model, x = made("attention")
    cnmix.initialize(model, None, "O1")
    with pytest.raises(ValueError, match="no module is called 'inot': did you mean 'into'"):
        cnmix.debug.sensitivity(model, x, modules=["inot"])
    with pytest.raises(TypeError, match=r"write \['into'\]"):
        cnmix.debug.sensitivity(model, x, modules="into")
    report = cnmix.debug.sensitivity(model, x, modules=["into"])
    for wrong in (0, -1.0, float("inf"), float("nan"), "1 %"):
        with pytest.raises(ValueError, match="error must be a positive number"):
            report.suggest(wrong)
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    cnmix.initialize(layers, None, "O1")
    with pytest.raises(ValueError, match="nothing in '1' computes in fixed point, as it does in '0', '2'"):
        cnmix.debug.sensitivity(layers, random(2, 4), modules=["0", "1"])
    report = cnmix.debug.sensitivity(layers, random(2, 4))
    assert len(report.suggest().mappings) > 0
    torch.optim.SGD(layers.parameters(), 0.1).step()
    assert len(report.suggest().mappings) > 0
    layers(random(2, 4)).sum().backward()
    torch.optim.SGD(layers.parameters(), 0.1).step()
    with pytest.raises(ValueError, match=r"trained since: call cnmix\.debug\.sensitivity again"):
        report.suggest()
    report = cnmix.debug.sensitivity(layers, random(2, 4) * float("nan"))
    with pytest.raises(ValueError, match="infinite or NaN, and has no half"):
        report.suggest()


class Nested(nn.Module):
    """Functions at three depths, each with modules below it; one name is a pattern's."""

    def __init__(self, depth=0):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.table = nn.Parameter(random(16, 16) / 4)
        if depth < 2:
            setattr(self, "b[0]*", Nested(depth + 1))
            self.other = nn.Linear(16, 16)

    def forward(self, x):
        x = self.linear(x) @ self.table
        inner = getattr(self, "b[0]*", None)
        return x if inner is None else self.other(inner(x))


@pytest.mark.parametrize("seed", range(6))
def test_rules_give_each_operand_what_was_asked_for_and_no_other(seed):
    """Rules for a module hold for those within it too, which must keep what they have."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(0)
    model, x = Nested(), random(4, 16)
    own = [{"modules": ["other", "b[[]0[]][*].linear"], "bitwidth": 16, "max_bitwidth": 16}]
    cnmix.initialize(model, None, "O1", rules=own, max_bitwidth=(8, 31)[seed % 2])
    loss(model(x)).backward()
    configs = {module_name(name): quantizers.configs for name, quantizers in quantizer_sets(model)}
    wanted = {
        (fqn, operand): Width(31 if config.bitwidth == 16 else 16, max(config.max_bitwidth, 31))
        for fqn, each in configs.items()
        for operand, config in each.items()
        if torch.rand((), generator=draw) < 0.4
    }
    rules = make_rules(configs, wanted)
    again = Nested()
    cnmix.initialize(again, None, "O1", rules=[*own, *rules], max_bitwidth=(8, 31)[seed % 2])
    loss(again(x)).backward()
    for name, quantizers in quantizer_sets(again):
        for operand, config in quantizers.configs.items():
            before = configs[module_name(name)][operand]
            expected = wanted.get((module_name(name), operand), (before.bitwidth, before.max_bitwidth))
            assert (config.bitwidth, config.max_bitwidth) == expected, (name, operand, rules)


def test_no_rules_where_nothing_is_to_change():
    model, x = made("mlp")
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    report = cnmix.debug.sensitivity(model, x, loss=loss, modules=["0"])
    suggestion = report.suggest(10.0)
    assert suggestion.mappings == ()
    assert suggestion.after == suggestion.before


def test_recurrent_module_is_one():
    torch.manual_seed(0)
    model = Recurrent(nn.GRU, num_layers=2, bidirectional=True)
    x = random(2, 4, 16)
    model(x)
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    report = cnmix.debug.sensitivity(model, x, loss=loss)
    assert {each.module for each in report.effects} == {"rnn", "head"}
    assert report.suggest(report.error / 10).after < report.error / 10

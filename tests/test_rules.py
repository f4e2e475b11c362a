import logging

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import cnmix
from cnmix.nn import quantized_modules
from cnmix.rules import SMALL_CONVOLUTION, SMALL_LINEAR, Rule, leave_out, parse_rules


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.value(self.query(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(1, 2, 3, padding=1)
        self.blocks = nn.Sequential(Attention(), nn.ReLU(), Attention())
        self.head = nn.Linear(8, 256)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(1)[:, :8]))


def converted(*rules, level="O1", **keywords):
    model, _ = cnmix.initialize(Net(), None, level, rules=rules, **keywords)
    return model


def names(model):
    return [fqn for fqn, _ in quantized_modules(model)]


ALL = ["stem", "blocks.0.query", "blocks.0.value", "blocks.2.query", "blocks.2.value", "head"]


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ({"modules": "head"}, ALL[:5]),
        ({"modules": ["head", "stem"]}, ALL[1:5]),
        ({"modules": "blocks.*.query"}, ["stem", "blocks.0.value", "blocks.2.value", "head"]),
        ({"types": "Conv1d"}, ALL[1:]),
        ({"types": nn.Conv1d}, ALL[1:]),
        ({"types": "Attention"}, ["stem", "head"]),
        ({"types": [Attention, "Conv1d"]}, ["head"]),
        ({"types": "Attention", "modules": "blocks.0"}, ["stem", "blocks.2.query", "blocks.2.value", "head"]),
        ({"types": "Linear", "modules": "*.value"}, ["stem", "blocks.0.query", "blocks.2.query", "head"]),
        ({"types": "Module"}, []),
        ({"modules": "blocks", "small": True}, ["stem", "head"]),
    ],
)
def test_what_a_rule_leaves_out(rule, left):
    assert names(converted({**rule, "leave_out": True})) == left


def test_settings_by_module_and_operand_with_later_rules_over_earlier():
    model = converted(
        {"types": "Linear", "bitwidth": 16, "threshold": 0.02},
        {"modules": "blocks", "operands": "grad_output", "rounding": "stochastic"},
        {"modules": "blocks.2", "operands": ["input", "weight"], "width": 8},
        {"modules": "head", "width": 16},
        threshold=0.04,
    )

    def settings(fqn):
        configs = model.get_submodule(fqn).quantizers.configs
        return {
            operand: (each.bitwidth, each.max_bitwidth, each.threshold, each.rounding)
            for operand, each in configs.items()
        }

    assert set(settings("stem").values()) == {(8, 31, 0.04, "nearest_even")}
    assert settings("blocks.0.query") == {
        "input": (16, 31, 0.02, "nearest_even"),
        "weight": (16, 31, 0.02, "nearest_even"),
        "grad_output": (16, 31, 0.02, "stochastic"),
    }
    assert settings("blocks.2.value") == {
        "input": (8, 8, 0.02, "nearest_even"),
        "weight": (8, 8, 0.02, "nearest_even"),
        "grad_output": (16, 31, 0.02, "stochastic"),
    }
    assert set(settings("head").values()) == {(16, 16, 0.02, "nearest_even")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnmix.initialize([], optimizer)
    for _ in range(2):
        model(torch.randn(4, 1, 8)).square().mean().backward()
        optimizer.step()
    bits = {operand: each.state.bits for operand, each in model.blocks[2].query.quantizers}
    assert (bits["input"], bits["weight"]) == (8, 8)
    assert bits["grad_output"] >= 16
    assert "input=int16, weight=int16, grad_output=int16" in repr(model.head)


def test_width_goes_over_what_a_level_allows():
    model = converted({"modules": "head", "width": 16}, level="O3")
    assert model.head.quantizers.config.max_bitwidth == 16
    assert model.stem.quantizers.config.max_bitwidth == 8


def test_rules_survive_saving_and_loading():
    torch.manual_seed(0)  # or an input widens as well
    rules = [{"modules": "head", "operands": "weight", "width": 16}, {"modules": "stem", "leave_out": True}]
    model = converted(*rules)
    model(torch.randn(4, 1, 8)).sum().backward()
    state = cnmix.state_dict(model)
    assert state["models"][0]["modules"]["head"]["settings"]["weight"]["bitwidth"] == 16
    again = converted(*rules)
    assert cnmix.load_state_dict(state, again) == []
    assert cnmix.state_dict(again) == state
    narrow = converted({"modules": "stem", "leave_out": True}, max_bitwidth=8)
    with pytest.raises(ValueError, match="weight of 'head' is saved at int16, over max_bitwidth 8"):
        cnmix.load_state_dict(state, narrow)


def test_small_layers_are_left_out_and_named(caplog):
    class Wide(nn.Sequential):
        pass

    side, channels = int(SMALL_LINEAR**0.5), SMALL_CONVOLUTION // 4
    model = Wide(
        nn.Linear(side, side),
        nn.Linear(side, side - 1),
        nn.Conv2d(64, 64, 16, groups=64),
        nn.Linear(9, 9),
        nn.Conv2d(1, channels, 2),
        nn.Conv2d(1, channels - 1, 2),
    )
    with caplog.at_level(logging.WARNING):
        cnmix.initialize(model, None, rules=[{"small": True, "leave_out": True}], exclude=["3"])
    assert names(model) == ["0", "4"]
    assert "too small to gain, left in float32: '1', '2', '5'" in caplog.text
    reasons = {row.fqn: row.reason for row in cnmix.summary(model).rows}
    assert reasons == {
        **dict.fromkeys("04", ""),
        **dict.fromkeys("125", "too small to gain"),
        "3": "left out",
    }


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({"modules": "haed", "leave_out": True}, ValueError, "no module is called 'haed': did you mean 'head'"),
        (
            {"types": "Conv1D", "leave_out": True},
            ValueError,
            "no module is of the class 'Conv1D': did you mean 'Conv1d'",
        ),
        ({"types": nn.Bilinear, "leave_out": True}, ValueError, "no module is of the class 'Bilinear'"),
        ({"modules": "head"}, ValueError, "neither leave_out nor a setting"),
        ({"module": "head", "width": 8}, ValueError, "unknown name in a rule: 'module': did you mean 'modules'"),
        ({"modules": "head", "width": 12}, ValueError, "bitwidth must be one of 8, 16, 31.*got 12"),
        ({"modules": "head", "width": 8, "bitwidth": 8}, ValueError, "drop bitwidth"),
        ({"modules": "head", "operands": "gradient", "width": 8}, ValueError, "unknown operand in a rule: 'gradient'"),
        ({"modules": "head", "leave_out": True, "operands": "input"}, ValueError, "all three operands stay float32"),
        ({"modules": "head", "leave_out": "yes"}, ValueError, "leave_out must be True or False, got 'yes'"),
        ({"modules": "head", "operands": "input", "exact_int31": True}, ValueError, "exact_int31 is of a whole module"),
        ({"modules": "head", "bitwidth": 16}, ValueError, "the rules for 'head': bitwidth 16 is over max_bitwidth 8"),
        ({"modules": 3, "width": 8}, TypeError, "got 3"),
        ({"types": 3, "width": 8}, TypeError, "got 3"),
        ("head", TypeError, "a rule is a mapping"),
    ],
)
def test_a_wrong_rule_is_refused_and_nothing_changes(rule, error, message):
    model = Net()
    with pytest.raises(error, match=message):
        cnmix.initialize(model, None, "O3", rules=[rule])
    assert names(model) == []
    assert cnmix.state_dict()["models"] == []


def test_rules_are_a_list_and_need_a_level_in_fixed_point():
    with pytest.raises(TypeError, match="rules must be a list of mappings"):
        cnmix.initialize(Net(), None, rules={"modules": "head", "leave_out": True})
    with pytest.raises(ValueError, match="opt_level 'O0' keeps every product in float32"):
        cnmix.initialize(Net(), None, "O0", rules=[{"modules": "head", "width": 8}])
    cnmix.initialize(Net(), None, "O0", rules=[{"modules": "head", "leave_out": True}])


def test_a_second_call_with_other_rules_is_refused():
    rule = {"modules": "head", "width": 8}
    model = converted(rule)
    cnmix.initialize(model, None, rules=[rule])
    with pytest.raises(ValueError, match="initialized before"):
        cnmix.initialize(model, None, rules=[{**rule, "width": 16}])


def test_what_core_was_told_goes_under_rules_and_keywords():
    cnmix.cnmix_set_amp_quantify_params("matmul", {"alpha": 0.1, "beta": 0.2, "gamma": 3.0})
    model = converted({"modules": "head", "beta": 0.3}, gamma=4.0)
    config = model.head.quantizers.config
    assert (config.alpha, config.beta, config.gamma) == (0.1, 0.3, 4.0)
    assert model.stem.quantizers.config.beta == 0.1


def test_prefix():
    rules = parse_rules([{"modules": ["a", "b.*"], "width": 8}, {"types": "Linear", "leave_out": True}])
    assert [rule.under("model.").modules for rule in rules] == [("model.a", "model.b.*"), ()]
    assert leave_out(["a"]) == (Rule(modules=("a",), leave_out=True),)


def test_a_model_whose_modules_have_gone_is_initialized_again():
    rules = [{"modules": ["head", "stem"], "width": 16}, {"modules": "head", "width": 8}]
    model = converted(*rules)
    model.head = nn.Identity()
    model.blocks.append(nn.Linear(8, 8))
    cnmix.initialize(model, None, rules=rules)
    assert names(model) == [*ALL[:5], "blocks.3"]
    assert model.stem.quantizers.config.max_bitwidth == 16


@pytest.mark.parametrize(
    "rule",
    [{"modules": "blocks.1", "width": 16}, {"types": "ReLU", "threshold": 0.1}, {"modules": "head", "width": 16}],
)
def test_a_rule_that_could_have_no_effect_is_refused(rule):
    model = Net()
    with pytest.raises(ValueError, match="nothing computes in fixed point"):
        cnmix.initialize(model, None, exclude=["head"], rules=[rule])
    assert names(model) == []


def test_values_are_checked_where_a_rule_is_written():
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 0\.5\)"):
        parse_rules([{"modules": "nowhere", "threshold": 3}])
    with pytest.raises(ValueError, match="no module is called 'nowhere'"):
        cnmix.initialize(Net(), None, "O0", rules=[{"modules": "nowhere", "leave_out": True}])


def test_rules_from_omegaconf():
    text = "[{modules: [head, stem], operands: [input], width: 16}, {types: [Attention], leave_out: true}]"
    model = converted(*OmegaConf.create(text))
    assert names(model) == ["stem", "head"]
    assert model.head.quantizers.configs["input"].bitwidth == 16
    assert model.head.quantizers.configs["weight"].bitwidth == 8


def test_the_size_of_a_lazy_layer_is_not_known():
    with pytest.raises(ValueError, match="'0' is a LazyLinear, whose size is known after a forward pass"):
        cnmix.initialize(nn.Sequential(nn.LazyLinear(512)), None, rules=[{"small": True, "leave_out": True}])


@pytest.mark.parametrize("selector", [{"modules": []}, {"types": ()}, {"small": False}, {"modules": ""}])
def test_an_empty_selector_does_not_mean_everything(selector):
    with pytest.raises(ValueError, match="name some, or drop"):
        cnmix.initialize(Net(), None, rules=[{**selector, "leave_out": True}])


def test_a_rule_for_what_is_too_small_anyway_is_no_mistake():
    model = converted({"types": "Conv1d", "width": 16}, {"small": True, "leave_out": True})
    assert names(model) == []

import dataclasses
import math

import pytest

from cnmix import QuantizeConfig
from cnmix.config import check_names

TINY = 5e-324


@pytest.mark.parametrize(
    ("name", "text", "refused", "accepted"),
    [
        ("quantify_rate", "[0, 1]", [-TINY, -1, math.nextafter(1, 2), 2], [0, 0.0, 1, 1.0, 0.5]),
        ("threshold", "(0, 0.5)", [0, -TINY, -0.1, 0.5, 1], [TINY, math.nextafter(0.5, 0), 0.03]),
        ("alpha", "(0, 0.4)", [0, -TINY, -0.1, 0.4, 1], [TINY, math.nextafter(0.4, 0)]),
        ("beta", "(0, 1)", [0, -TINY, -1, 1, 1.0, 2], [TINY, math.nextafter(1, 0)]),
        ("gamma", "[0, 100]", [-TINY, -1, math.nextafter(100, 200), 101], [0, 100, 100.0]),
        ("delta", "(0, 1000)", [0, 0.0, -TINY, -1, 1000, 1001], [TINY, math.nextafter(1000, 0), 1]),
    ],
)
def test_ranges(name, text, refused, accepted):
    for value in accepted:
        assert getattr(QuantizeConfig(**{name: value}), name) == value
    for value in [*refused, math.nan, math.inf, -math.inf, True, False, "0.1", [0.1], 0.1j]:
        with pytest.raises(ValueError, match=name) as caught:
            QuantizeConfig(**{name: value})
        assert str(caught.value) == f"{name} must lie in {text}, got {value!r}"


@pytest.mark.parametrize("name", ["quantify_rate", "alpha", "beta", "gamma", "delta"])
def test_only_the_threshold_may_be_left_open(name):
    with pytest.raises(ValueError, match=f"{name} must lie in .*, got None"):
        QuantizeConfig(**{name: None})
    assert QuantizeConfig(threshold=None).threshold is None


@pytest.mark.parametrize("name", ["interval", "steps_per_epoch"])
@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "3", None, math.nan])
def test_step_counts_are_whole_and_at_least_one(name, value):
    assert getattr(QuantizeConfig(**{name: 1}), name) == 1
    with pytest.raises(ValueError, match=name) as caught:
        QuantizeConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["bitwidth", "max_bitwidth"])
@pytest.mark.parametrize("value", [0, 1, 7, 9, 15, 24, 30, 32, -8, True, False, 8.0, 16.0, "8", None, math.nan, (8,)])
def test_widths_are_those_of_the_core(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be one of 8, 16, 31") as caught:
        QuantizeConfig(**{name: value})
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(("bits", "largest"), [(16, 8), (31, 8), (31, 16)])
def test_starting_width_over_the_largest(bits, largest):
    with pytest.raises(ValueError, match=f"^bitwidth {bits} is over max_bitwidth {largest}"):
        QuantizeConfig(bitwidth=bits, max_bitwidth=largest)


@pytest.mark.parametrize(("bits", "largest"), [(8, 8), (8, 16), (16, 16), (16, 31), (31, 31)])
def test_starting_width_up_to_the_largest(bits, largest):
    config = QuantizeConfig(bitwidth=bits, max_bitwidth=largest)
    assert (config.bitwidth, config.max_bitwidth) == (bits, largest)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("mode", ["adaptive", "fixed_width", "fixed_interval"]),
        ("error_measure", ["mean", "l1"]),
        ("rounding", ["nearest_even", "half_up", "half_away", "stochastic"]),
    ],
)
def test_choices(name, choices):
    for value in choices:
        assert getattr(QuantizeConfig(**{name: value}), name) == value
    for value in ["Adaptive", "", None, 1, ["mean"]]:
        with pytest.raises(ValueError, match=name) as caught:
            QuantizeConfig(**{name: value})
        message = str(caught.value)
        assert message.endswith(f"got {value!r}")
        assert all(choice in message for choice in choices)


@pytest.mark.parametrize("name", ["online", "exact_int31"])
@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_switches(name, value):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got {value!r}"):
        QuantizeConfig(**{name: value})


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("bitwith", "bitwidth"), ("max_bitwith", "max_bitwidth"), ("steps_per_epochs", "steps_per_epoch")],
)
def test_unknown_setting_names_the_nearest(given, nearest):
    with pytest.raises(ValueError, match=f"unknown setting '{given}': did you mean '{nearest}'"):
        QuantizeConfig().replace(**{given: 8})


def test_unknown_setting_like_none_lists_them_all():
    with pytest.raises(ValueError, match="unknown setting 'zzzzzz'") as caught:
        QuantizeConfig().replace(zzzzzz=8)
    assert all(field.name in str(caught.value) for field in dataclasses.fields(QuantizeConfig))


def test_replace_checks_values_together_and_leaves_the_original():
    config = QuantizeConfig()
    changed = config.replace(bitwidth=16, max_bitwidth=16, alpha=0.1)
    assert (changed.bitwidth, changed.max_bitwidth, changed.alpha) == (16, 16, 0.1)
    assert config == QuantizeConfig()
    with pytest.raises(ValueError, match="bitwidth 31 is over max_bitwidth 16"):
        changed.replace(bitwidth=31)
    with pytest.raises(ValueError, match="alpha must lie in"):
        changed.replace(alpha=0.4)


def test_frozen():
    config = QuantizeConfig()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
    assert hash(config) == hash(QuantizeConfig())


def test_default_threshold_goes_by_product():
    assert QuantizeConfig().threshold_for("convolution") == 0.03
    assert QuantizeConfig().threshold_for("matmul") == 0.01
    assert QuantizeConfig(threshold=0.2).threshold_for("matmul") == 0.2
    assert QuantizeConfig(threshold=0.2).threshold_for("convolution") == 0.2


def test_defaults_are_those_of_the_vendor():
    config = QuantizeConfig()
    assert (config.bitwidth, config.max_bitwidth, config.steps_per_epoch) == (8, 31, 10_000)
    assert (config.alpha, config.beta, config.gamma, config.delta) == (0.04, 0.1, 2, 100)
    assert (config.mode, config.error_measure, config.rounding) == ("adaptive", "mean", "nearest_even")
    assert (config.quantify_rate, config.online, config.exact_int31) == (0.01, False, False)


def test_check_names_takes_any_names():
    check_names({"a": 1}, ["a", "b"], "thing")
    check_names([], [], "thing")
    with pytest.raises(ValueError, match="unknown thing 'alpa': did you mean 'alpha'"):
        check_names(["alpha", "alpa"], iter(["alpha", "beta"]), "thing")

import pytest
import torch
from torch import nn

import cnmix
from cnmix.strategies import LEVELS, Strategy, find_level, register_level


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


# level, keywords, and what comes of them: widths at the start and at most, activations, loss scale.
ALLOWED = [
    ("O0", {}, None, torch.float32, 1.0),
    ("O0", {"loss_scale": 128}, None, torch.float32, 128.0),
    ("O0", {"steps_per_epoch": 10}, None, torch.float32, 1.0),
    ("O1", {}, (8, 31), torch.float32, 1.0),
    ("O1", {"bitwidth": 16}, (16, 31), torch.float32, 1.0),
    ("O1", {"max_bitwidth": 8}, (8, 8), torch.float32, 1.0),
    ("O1", {"activation_dtype": "bfloat16"}, (8, 31), torch.bfloat16, 1.0),
    ("O1", {"loss_scale": "dynamic"}, (8, 31), torch.float32, 2.0**16),
    ("O2", {}, (8, 16), torch.bfloat16, 1.0),
    ("O2", {"bitwidth": 16}, (16, 16), torch.bfloat16, 1.0),
    ("O2", {"max_bitwidth": 31}, (8, 31), torch.bfloat16, 1.0),
    ("O2", {"activation_dtype": torch.float16}, (8, 16), torch.float16, 2.0**16),
    ("O2", {"activation_dtype": "float16", "loss_scale": 1024}, (8, 16), torch.float16, 1024.0),
    ("O2", {"activation_dtype": "float32"}, (8, 16), torch.float32, 1.0),
    ("O3", {}, (8, 8), torch.bfloat16, 1.0),
    ("O3", {"max_bitwidth": 16}, (8, 16), torch.bfloat16, 1.0),
    ("O3", {"activation_dtype": "float16"}, (8, 8), torch.float16, 2.0**16),
]
REFUSED = [
    ("O0", {"bitwidth": 16}, "every product in float32"),
    ("O0", {"max_bitwidth": 8}, "every product in float32"),
    ("O0", {"activation_dtype": "bfloat16"}, "float32 throughout"),
    ("O1", {"activation_dtype": "float64"}, "float32, bfloat16, float16"),
    ("O1", {"activation_dtype": torch.int8}, "float32, bfloat16, float16"),
    ("O2", {"bitwidth": 31}, "over max_bitwidth 16"),
    ("O3", {"bitwidth": 16}, "over max_bitwidth 8"),
    ("O2", {"loss_scale": 0}, "positive finite"),
    ("O2", {"loss_scale": "static"}, "positive finite"),
    ("O4", {}, "O0, O1, O2, O3"),
    ("o2", {}, "did you mean 'O2'"),
]


@pytest.mark.parametrize(("level", "keywords", "widths", "activations", "scale"), ALLOWED)
def test_a_level_with_an_override(level, keywords, widths, activations, scale):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnmix.initialize(model, optimizer, opt_level=level, **keywords)
    if widths is None:
        assert type(model[0]) is nn.Linear
    else:
        config = model[0].quantizers.config
        assert (config.bitwidth, config.max_bitwidth) == widths
    seen = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    loss = model(torch.randn(4, 6)).square().mean()
    assert loss.dtype == torch.float32
    assert seen == [activations]
    with cnmix.scale_loss(loss, optimizer) as scaled:
        assert scaled.item() == pytest.approx(loss.item() * scale)
        scaled.backward()
    optimizer.step()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("level", "keywords", "words"), REFUSED)
def test_a_combination_without_sense_is_refused_and_nothing_changes(level, keywords, words):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=words):
        cnmix.initialize(model, optimizer, opt_level=level, **keywords)
    assert type(model[0]) is nn.Linear
    assert not model._forward_hooks


def test_the_table_of_levels():
    lines = cnmix.levels().splitlines()
    assert [line.split()[0] for line in lines] == ["level", "O0", "O1", "O2", "O3"]
    assert "adaptive, int8 to int16  bfloat16" in lines[3]


@pytest.fixture
def own_level():
    class Narrow(Strategy):
        name = "narrow"
        summary = "int8 inputs in float16"
        quantizes = True
        defaults = cnmix.QuantizeConfig(max_bitwidth=8)
        activation_dtype = torch.float16

    yield register_level(Narrow)
    LEVELS.pop("narrow", None)


def test_a_level_of_ones_own(own_level):
    assert find_level("narrow") is own_level
    assert "narrow" in cnmix.levels()
    model, _ = cnmix.initialize(net(), None, opt_level="narrow")
    assert model[0].quantizers.output_dtype == torch.float16


def test_a_name_that_is_taken_and_what_is_no_level():
    class Other(Strategy):
        name = "O1"
        summary = "another"
        quantizes = True

    class Unfinished(Strategy):
        name = "unfinished"
        summary = "says not whether it quantizes"

    with pytest.raises(ValueError, match="choose another name"):
        register_level(Other)
    with pytest.raises(TypeError, match="Unfinished must have a bool called quantizes"):
        register_level(Unfinished)
    with pytest.raises(TypeError, match="subclass"):
        register_level(nn.Linear)

"""The states of functions: saved and loaded before any forward pass, copied, frozen, told settings, and taken away."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from calls import places
from torch import nn

import cnmix
from cnmix.checkpoint import save
from cnmix.core import cnmix_set_amp_quantify_params, cnmix_set_amp_use_online
from cnmix.inference import freeze, prepare
from cnmix.nn import quantizer_sets


class Mixer(nn.Module):
    """Attention, a product with a parameter and a convolution, all by functions, some of them in a loop."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Parameter(torch.randn(4, 4) / 2)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3) / 3)
        self.last = nn.Linear(4, 4)

    def forward(self, x, times=2):
        for _ in range(times):
            x = torch.tanh(x @ self.mix)
        x = x + F.scaled_dot_product_attention(x, x, x)
        return self.last(F.conv1d(x.mT, self.kernel, padding="same").mT)


NAMES = [
    "..forward+2:matmul(mix)",
    "..forward+3:attention.scores",
    "..forward+3:attention.values",
    "..forward+3:attention.value_gradient",
    "..forward+4:conv1d(kernel)",
]


def train(model, optimizer, seeds, times=2):
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed))
        loss = model(x, times).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def start(**settings):
    model = Mixer()
    return cnmix.initialize(model, torch.optim.SGD(model.parameters(), 0.05), **settings)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def steps(model):
    states = cnmix.state_dict(model)["models"][0]["modules"]
    return {name: state["operands"]["input"]["step"] for name, state in states.items()}


SETTINGS = {
    "adaptive": {"steps_per_epoch": 4},
    "stochastic": {"rounding": "stochastic"},
    "O2": {"opt_level": "O2"},
    "O3": {"opt_level": "O3"},
    "per entry": {"per_entry": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_fresh_model_goes_on_to_the_bit(settings):
    model, optimizer = start(**SETTINGS[settings])
    train(model, optimizer, range(3))
    assert places(model) == NAMES
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), cnmix.state_dict(model)], file)
    file.seek(0)
    weights, momenta, state = torch.load(file, weights_only=True)
    again, its_optimizer = start(**SETTINGS[settings])
    again.load_state_dict(weights)
    its_optimizer.load_state_dict(momenta)
    assert cnmix.load_state_dict(state, again) == []
    assert train(model, optimizer, range(3, 6)) == train(again, its_optimizer, range(3, 6))
    assert same(model, again)
    assert cnmix.state_dict(model) == cnmix.state_dict(again)


def test_a_state_waits_for_its_model():
    model, optimizer = start()
    train(model, optimizer, range(3))
    state, weights = copy.deepcopy(cnmix.state_dict(model)), copy.deepcopy(model.state_dict())
    del model, optimizer
    cnmix.load_state_dict({**state, "loss_scalers": []})
    again = Mixer()
    again.load_state_dict(weights)
    cnmix.initialize(again)
    assert cnmix.state_dict(again)["models"] == state["models"]


def test_a_loop_runs_as_often_as_it_likes():
    model, optimizer = start()
    for seed, times in enumerate((1, 3, 0, 2)):
        train(model, optimizer, [seed], times)
    # Without a loop x needs no gradient.
    assert steps(model) == {NAMES[0]: 6, **dict.fromkeys(NAMES[1:], 4), NAMES[3]: 3, "last": 4}


def test_copies_go_on_alike_and_apart():
    model, optimizer = start()
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    before = cnmix.state_dict(model)
    for each in copies:
        train(each, torch.optim.SGD(each.parameters(), 0.05), [2])
    assert cnmix.state_dict(model) == before
    train(model, optimizer, [2])
    assert all(same(each, model) and cnmix.state_dict(each) == cnmix.state_dict(model) for each in copies)


def test_nothing_moves_without_gradients_or_in_evaluation():
    model, optimizer = start()
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        model(x)
    assert not places(model)
    train(model, optimizer, range(2))
    before = cnmix.state_dict(model)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    model.eval()
    model(x).sum().backward()
    assert cnmix.state_dict(model) == before


def test_a_place_first_called_in_evaluation_is_not_saved():
    model, _ = start()
    model.eval()
    model(torch.randn(3, 5, 4))
    assert not places(model)
    assert len(list(quantizer_sets(model))) == 6


def test_integer_inference(tmp_path):
    model, optimizer = start()
    train(model, optimizer, range(3))
    save(tmp_path / "checkpoint.pt", model)
    prepared = prepare(Mixer(), tmp_path / "checkpoint.pt")
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        y = prepared(x)
        assert torch.equal(y, model.eval()(x))
        assert torch.equal(y, freeze(model)(x))
    assert cnmix.state_dict(prepared)["models"] == cnmix.state_dict(model)["models"]


def test_frozen_functions_keep_the_integers_of_their_parameters():
    model, optimizer = start()
    train(model, optimizer, range(2))
    freeze(model)
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        y = model(x)
        model.mix.zero_()
        model.last.weight.zero_()
        assert torch.equal(model(x), y)
    model.last.eval()
    with pytest.raises(RuntimeError, match="'Mixer' is frozen for integer inference"):
        model.train()(x)


@pytest.mark.parametrize("place", ["nonsense", "forward+2", "scoresX", "forward+x:matmul"])
def test_a_place_that_no_code_has_is_refused(place):
    model, optimizer = start()
    train(model, optimizer, range(2))
    state = copy.deepcopy(cnmix.state_dict(model))
    modules = state["models"][0]["modules"]
    modules[f"..{place}"] = modules[NAMES[0]]
    with pytest.raises(ValueError, match=rf"the state has '\.\.{re.escape(place)}'"):
        cnmix.load_state_dict(state, model)


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_half_types_beside_parameters_before_any_training(level):
    model, optimizer = start(opt_level=level)
    plain, x = Mixer(), torch.randn(3, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain(x), rtol=0.1, atol=0.1)
    assert not list(places(model))
    train(model.train(), optimizer, [0])


def test_frozen_parameters_and_attention_are_on_the_core():
    model = Mixer().requires_grad_(False)
    model.last.requires_grad_(True)
    cnmix.initialize(model)
    model(torch.randn(3, 5, 4)).sum().backward()
    assert places(model) == NAMES[:3] + NAMES[4:]


def test_initialized_twice_and_made_float_again():
    plain, (model, optimizer) = Mixer(), start()
    train(model, optimizer, [0])
    cnmix.initialize(model, optimizer)
    train(model, optimizer, [1])
    assert places(model) == NAMES
    cnmix.dequantize(model)
    for module in model.modules():
        assert not {*module._forward_hooks, *module._forward_pre_hooks, *module._forward_hooks_always_called}
    assert vars(model).keys() == vars(plain).keys()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 5, 4)
    assert torch.equal(model(x), plain(x))


def test_two_models_in_one_process():
    (first, its_optimizer), (second, another) = start(), start(opt_level="O3")
    for seed in range(2):
        train(first, its_optimizer, [seed])
        train(second, another, [seed])
    assert steps(first) == steps(second)
    for model, widest in ((first, 31), (second, 8)):
        for _, quantizers in quantizer_sets(model):
            assert quantizers.config.max_bitwidth == widest


def test_settings_reach_places_that_come_later():
    cnmix_set_amp_quantify_params("matmul", {"batch_size": 4, "data_num": 40, "th": 0.2})
    rules = [{"types": "Mixer", "operands": "weight", "threshold": 0.3}]
    model, optimizer = start(rules=rules)
    cnmix_set_amp_quantify_params("conv", {"quantify_rate": 0.5})
    train(model, optimizer, [0])
    cnmix_set_amp_use_online(True)
    found = {name: quantizers.configs for name, quantizers in quantizer_sets(model)}
    for name in NAMES[:4]:
        assert [found[name][each].threshold for each in ("input", "weight", "grad_output")] == [0.2, 0.3, 0.2]
        assert found[name]["input"].steps_per_epoch == 10
    of_convolution = found[NAMES[4]]["input"]
    assert (of_convolution.quantify_rate, of_convolution.threshold) == (0.5, None)
    assert found[NAMES[0]]["input"].quantify_rate != 0.5
    assert all(config.online for configs in found.values() for config in configs.values())


def test_rules_hold_for_functions():
    model = nn.Sequential(Mixer(), Mixer())
    rules = [{"modules": "1", "operands": "grad_output", "bitwidth": 16}]
    cnmix.initialize(model, exclude=["0"], rules=rules)
    model(torch.randn(3, 5, 4)).sum().backward()
    assert places(model) == [f"1{name}" for name in NAMES]
    for _, quantizers in quantizer_sets(model):
        assert [quantizer.state.bits for _, quantizer in quantizers] == [8, 8, 16]


def test_a_width_over_the_settings_is_refused():
    model, optimizer = start(bitwidth=16)
    train(model, optimizer, [0])
    state = cnmix.state_dict(model)
    narrow, _ = start(opt_level="O3")
    del state["models"][0]["modules"]["last"]
    before = cnmix.state_dict(narrow)
    with pytest.raises(ValueError, match=r"of '\.\.forward\+2:matmul\(mix\)' is saved at int16, over max_bitwidth 8"):
        cnmix.load_state_dict(state, narrow, strict=False)
    assert cnmix.state_dict(narrow) == before


class Edited(Mixer):
    def forward(self, x, times=2):
        x = x + 0.0
        for _ in range(times):
            x = torch.tanh(x @ self.mix)
        return self.last(x)


def test_code_that_was_edited_is_told_of_once(caplog):
    model, optimizer = start()
    train(model, optimizer, range(2))
    state = cnmix.state_dict(model)
    edited = Edited()
    optimizer = torch.optim.SGD(edited.parameters(), 0.05)
    cnmix.initialize(edited, optimizer)
    cnmix.load_state_dict({**state, "loss_scalers": []}, edited)
    train(edited, optimizer, range(3))
    (message,) = [record.getMessage() for record in caplog.records if "begins anew" in record.getMessage()]
    assert message.startswith("'Edited' does not call forward+2:matmul(mix), ")
    assert "but forward+3:matmul(mix), which" in message


def test_the_same_code_says_nothing(caplog):
    model, optimizer = start()
    train(model, optimizer, range(2))
    again, its_optimizer = start()
    cnmix.load_state_dict({**cnmix.state_dict(model), "loss_scalers": []}, again)
    train(again, its_optimizer, range(2))
    assert not caplog.records


def test_a_loading_that_is_not_strict_keeps_the_others():
    model, optimizer = start()
    train(model, optimizer, range(2))
    state = copy.deepcopy(cnmix.state_dict(model))
    del state["models"][0]["modules"][NAMES[0]]
    train(model, optimizer, range(2))
    cnmix.load_state_dict(state, model, strict=False)
    assert steps(model) == {NAMES[0]: 8, **dict.fromkeys(NAMES[1:], 2), "last": 2}
    cnmix.load_state_dict(state, model)  # the products are those of the state then
    assert places(model) == NAMES[1:]

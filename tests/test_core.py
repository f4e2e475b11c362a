import pytest
import torch
from torch import nn

import cnmix
from cnmix import core
from cnmix.nn import quantized_modules


def configs(model):
    return {fqn: module.quantizers.config for fqn, module in quantized_modules(model)}


def steps_per_epoch(model):
    return {fqn: config.steps_per_epoch for fqn, config in configs(model).items()}


def test_names_and_aliases():
    assert cnmix.core is core
    assert cnmix.cnmix_set_amp_quantify_params is core.cnmix_set_amp_quantify_params
    assert cnmix.cnmix_set_amp_use_online is core.cnmix_set_amp_use_online
    for name in ("initialize", "scale_loss", "state_dict", "load_state_dict"):
        assert callable(getattr(cnmix, name))


@pytest.mark.parametrize(
    ("products", "params", "error", "message"),
    [
        ("al", {}, ValueError, "unknown kind of products 'al': did you mean 'all'"),
        ("all", {"batchsize": 8, "data_num": 10}, ValueError, "parameter 'batchsize': did you mean 'batch_size'"),
        ("all", {"batch_size": 8}, ValueError, "go together"),
        ("all", {"data_num": 8}, ValueError, "go together"),
        ("all", {"batch_size": 0, "data_num": 8}, ValueError, "batch_size must be a positive number, got 0"),
        ("all", {"batch_size": 8, "data_num": "8"}, ValueError, "data_num must be a positive number, got '8'"),
        ("all", {"batch_size": True, "data_num": 8}, ValueError, "batch_size must be a positive number"),
        ("conv", {"quantify_rate": 1.5}, ValueError, "quantify_rate must lie in"),
        ("all", {"th": 0.5}, ValueError, "threshold must lie in"),
        ("all", ["batch_size"], TypeError, "takes a dict of parameters, got list"),
        ("all", {"batch_size": float("nan"), "data_num": 8}, ValueError, "batch_size must be a positive number"),
        ("all", {"batch_size": 8, "data_num": float("inf")}, ValueError, "data_num must be a positive number"),
    ],
)
def test_bad_parameters_change_nothing(net, products, params, error, message):
    model = net()
    cnmix.initialize(model)
    before = configs(model)
    with pytest.raises(error, match=message):
        core.cnmix_set_amp_quantify_params(products, params)
    assert configs(model) == before
    other = net()
    cnmix.initialize(other)
    assert configs(other) == before


@pytest.mark.parametrize(
    ("data_num", "batch_size", "steps"), [(80, 8, 10), (81, 8, 11), (3, 8, 1), (1281167, 64, 20019)]
)
def test_steps_are_data_over_batch_rounded_up(net, data_num, batch_size, steps):
    before, after = net(0), net(1)
    cnmix.initialize(before)
    core.cnmix_set_amp_quantify_params("all", {"batch_size": batch_size, "data_num": data_num})
    cnmix.initialize(after)
    for model in (before, after):
        assert set(steps_per_epoch(model).values()) == {steps}


def test_argument_of_initialize_comes_before_earlier_parameters(net):
    core.cnmix_set_amp_quantify_params("all", {"batch_size": 8, "data_num": 80})
    model = net()
    cnmix.initialize(model, steps_per_epoch=33)
    assert set(steps_per_epoch(model).values()) == {33}
    core.cnmix_set_amp_quantify_params("all", {"batch_size": 8, "data_num": 80})
    assert set(steps_per_epoch(model).values()) == {10}


def test_selectors(net):
    model = net()
    cnmix.initialize(model)
    core.cnmix_set_amp_quantify_params("conv", {"steps_per_epoch": 5, "th": 0.2})
    core.cnmix_set_amp_quantify_params("matmul", {"steps_per_epoch": 6, "alpha": 0.1, "beta": 0.2, "gamma": 1})
    assert steps_per_epoch(model) == {"conv": 5, "fc1": 6, "fc2": 6}
    assert configs(model)["conv"].threshold == 0.2
    assert configs(model)["fc1"].threshold is None
    assert (configs(model)["fc1"].alpha, configs(model)["conv"].alpha) == (0.1, 0.04)
    later = net()
    cnmix.initialize(later)
    assert configs(later) == configs(model)


def test_quantify_rate_1_updates_throughout_the_first_epoch(net, step):
    counts = {}
    for rate in (1, 0):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        cnmix.initialize(model, optimizer, gamma=0.0, delta=1e-6, beta=0.999, alpha=1e-6)
        params = {"batch_size": 8, "data_num": 64, "quantify_rate": rate}
        core.cnmix_set_amp_quantify_params("all", params)
        for seed in range(12):
            step(model, optimizer, seed)
        counts[rate] = model.fc1.quantizers.input.state.updates
    assert counts[1] == 8 + 1
    assert counts[0] == 2


def test_online_before_initialize_updates_on_each_step(net, step):
    core.cnmix_set_amp_use_online(True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    cnmix.initialize(model, optimizer, steps_per_epoch=2)
    for seed in range(9):
        step(model, optimizer, seed)
    updates = {q.state.updates for _, module in quantized_modules(model) for _, q in module.quantizers}
    assert updates == {9}


def test_online_can_be_switched_off(net, step):
    core.cnmix_set_amp_use_online(True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    cnmix.initialize(model, optimizer, steps_per_epoch=4)
    core.cnmix_set_amp_use_online(False)
    for seed in range(13):
        step(model, optimizer, seed)
    updates = {q.state.updates for _, module in quantized_modules(model) for _, q in module.quantizers}
    assert max(updates) < 13
    later = nn.Linear(2, 2)
    cnmix.initialize(later)
    assert later.quantizers.config.online is False

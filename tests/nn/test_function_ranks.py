"""Processes that train one model together agree on the formats of functions, which come to be in its first step."""

import pytest
import torch
import torch.distributed as dist
from test_function_states import Mixer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cnmix
from cnmix.registry import registry


class Once(Mixer):
    """Calls each function once in a step: processes together measure the largest of several calls."""

    def forward(self, x):
        return super().forward(x, 1)


class Free(nn.Module):
    """Multiplies by parameters alone: nothing of it is converted before it is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Parameter(torch.randn(4, 4) / 2) for _ in range(2))
        self.uses_second = True

    def forward(self, x):
        x = torch.tanh(x @ self.first)
        return x @ self.second if self.uses_second else x + 0 * self.second.sum()


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 3)
        model(x).square().mean().backward()
        optimizer.step()


def build(kind, **settings):
    registry.models.clear()
    registry.optimizers.clear()
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    return cnmix.initialize(model, optimizer, **settings)


def result(model):
    return cnmix.state_dict(model)["models"], model.state_dict()


def same(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def ddp(rank, kind, settings, seeds):
    model, optimizer = build(kind, **settings)
    train(DistributedDataParallel(model), optimizer, [each[rank] for each in seeds])
    return result(model)


SETTINGS = {
    "adaptive": {"steps_per_epoch": 4},
    "intervals": {"mode": "fixed_interval", "interval": 3},
    "saturation": {"saturation": 0.001},
    "per entry": {"per_entry": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [Once, Free])
def test_equal_data_give_the_bits_of_one_process(processes, kind, settings):
    torch.set_num_threads(1)
    found = processes.run(ddp, kind, SETTINGS[settings], [(seed, seed) for seed in range(6)])
    model, optimizer = build(kind, **SETTINGS[settings])
    train(model, optimizer, range(6))
    assert same(found[0], found[1])
    assert same(found[0], result(model))


@pytest.mark.parametrize("kind", [Once, Free])
def test_different_data_give_one_state(processes, kind):
    first, second = processes.run(ddp, kind, {}, [(2 * seed, 30 * seed + 1) for seed in range(6)])
    assert same(first, second)


def alone(rank, rounds):
    """The second process calls a function that the first one calls in its last rounds only."""
    model, optimizer = build(Free)
    wrapped = DistributedDataParallel(model)
    for seed in range(rounds):
        model.uses_second = rank == 1 or seed >= rounds - 2
        train(wrapped, optimizer, [2 * seed + rank])
    return result(model)


def test_a_function_that_one_process_calls_waits_for_the_others(processes):
    first, second = processes.run(alone, 6)
    assert same(first, second)


def group(rank, seeds):
    """Averages gradients by itself, with the processes given to initialize."""
    model, optimizer = build(Free, process_group=dist.group.WORLD)
    for each in seeds:
        x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(each[rank]))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
    return result(model)


def test_a_group_that_was_given(processes):
    first, second = processes.run(group, [(seed, seed + 10) for seed in range(4)])
    assert same(first, second)


def sharded(rank, kind, seeds):
    model, optimizer = build(kind)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    train(model, optimizer, [each[rank] for each in seeds])
    weights = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    return cnmix.state_dict(model)["models"], weights


@pytest.mark.parametrize("kind", [Once, Free])
def test_fully_shard_gives_the_bits_of_one_process(processes, kind):
    torch.set_num_threads(1)
    found = processes.run(sharded, kind, [(seed, seed) for seed in range(6)])
    model, optimizer = build(kind)
    train(model, optimizer, range(6))
    assert same(found[0], found[1])
    assert same(found[0], result(model))
    different = processes.run(sharded, kind, [(seed, seed + 10) for seed in range(6)])
    assert same(*different)


def loaded(rank, state, weights, seeds):
    model, optimizer = build(Once)
    model.load_state_dict(weights)
    cnmix.load_state_dict({"version": 2, "models": state, "loss_scalers": []}, model)
    train(DistributedDataParallel(model), optimizer, [each[rank] for each in seeds])
    return result(model)


def test_a_state_is_loaded_in_every_process(processes):
    torch.set_num_threads(1)
    model, optimizer = build(Once)
    train(model, optimizer, range(3))
    state, weights = result(model)
    found = processes.run(loaded, state, weights, [(seed, seed) for seed in range(3, 6)])
    again, its_optimizer = build(Once)
    again.load_state_dict(weights)
    cnmix.load_state_dict({"version": 2, "models": state, "loss_scalers": []}, again)
    train(again, its_optimizer, range(3, 6))
    assert found[0][0][0]["modules"].keys() == state[0]["modules"].keys()
    assert same(found[0], found[1])
    assert same(found[0], result(again))

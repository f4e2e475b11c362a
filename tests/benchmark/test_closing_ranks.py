"""Processes that train one model together close its strategy together."""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_net import Net
from torch.nn.parallel import DistributedDataParallel

import cnmix
from cnmix.nn import quantizer_sets
from cnmix.registry import registry

COUNT = 4


def batch(seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def train(rank, settings, micro_batches, iterations, opened=None):
    """Trains; returns the updates after each step, the state, and the collectives of each step.

    Before the iteration ``opened`` it initializes again, without the variable.
    """
    os.environ["MLU_ADAPTIVE_STRATEGY_COUNT"] = str(COUNT)
    collectives, original = [], dist.all_reduce

    def counted(*args, **kwargs):
        collectives[-1] += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        registry.models.clear()
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        cnmix.initialize(model, optimizer, **settings)
        wrapped = DistributedDataParallel(model)
        updates = []
        for iteration in range(iterations):
            collectives.append(0)
            if iteration == opened:
                os.environ["MLU_ADAPTIVE_STRATEGY_COUNT"] = ""
                cnmix.initialize(model, optimizer, **settings)
            for part in reversed(range(micro_batches[rank])):
                x, y = batch(100 * iteration + 10 * part + rank)
                with wrapped.no_sync() if part else contextlib.nullcontext():
                    F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            operands = [quantizer for _, quantizers in quantizer_sets(model) for _, quantizer in quantizers]
            updates.append({each.state.updates for each in operands})
        return updates, cnmix.state_dict(model), collectives
    finally:
        dist.all_reduce = original
        del os.environ["MLU_ADAPTIVE_STRATEGY_COUNT"]


@pytest.mark.parametrize("settings", [{}, {"opt_level": "O3"}, {"online": True}, {"saturation": 0.0}])
def test_after_the_count_nothing_is_measured_and_nothing_agreed_on(processes, settings):
    (updates, state, collectives), other = processes.run(train, settings, (1, 1), 10)
    assert updates == other[0] == [{min(iteration, COUNT)} for iteration in range(1, 11)]
    assert state == other[1]
    assert collectives == other[2] == [1] * (COUNT + 1) + [0] * (9 - COUNT)  # in the last one all say that they closed


def test_opened_again_they_agree_again(processes):
    (updates, state, collectives), other = processes.run(train, {}, (1, 1), 10, 7)
    assert updates == other[0] == [{min(iteration, COUNT)} for iteration in range(1, 8)] + [{5}, {6}, {7}]
    assert state == other[1]
    assert collectives[5:] == other[2][5:] == [0, 0, 1, 1, 1]


def test_it_falls_between_two_updates(processes):
    settings = {"mode": "fixed_interval", "interval": 3}
    (updates, state, _), other = processes.run(train, settings, (1, 1), 12)
    assert updates == other[0]
    assert updates[-1] == {2}  # in iterations 1 and 4
    assert state == other[1]


@pytest.mark.parametrize("micro_batches", [(2, 2), (1, 3)])
def test_micro_batches_count_in_each_process(processes, micro_batches):
    (updates, state, collectives), other = processes.run(train, {}, micro_batches, 8)
    assert updates == other[0]
    assert state["models"][0]["modules"].keys() == other[1]["models"][0]["modules"].keys()
    if micro_batches == (2, 2):
        assert updates[-1] == {COUNT // 2}
    assert collectives[-2:] == other[2][-2:] == [0, 0]

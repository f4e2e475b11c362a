"""Processes that train one model together choose the same formats, in one collective on steps with an update."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_net import Net
from torch.nn.parallel import DistributedDataParallel

import cnmix
from cnmix.adaptive import Observation
from cnmix.fixed_point import BITS, choose_position
from cnmix.nn.ranks import pack, unpack
from cnmix.registry import registry


def batch(seed, size=8):
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(size, 1, 6, 6, generator=generator)
    x[0, 0, 0, 0] = 100.0 + seed
    return x, torch.randint(0, 3, (size,), generator=generator)


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def build(**settings):
    registry.models.clear()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cnmix.initialize(model, optimizer, **settings)
    return model, optimizer


class Collectives:
    """Counts the calls of ``all_reduce``."""

    def __enter__(self):
        self.count, self._original = 0, dist.all_reduce
        dist.all_reduce = self._call
        return self

    def _call(self, *args, **kwargs):
        self.count += 1
        return self._original(*args, **kwargs)

    def __exit__(self, *_):
        dist.all_reduce = self._original


def result(model):
    return cnmix.state_dict(model), model.state_dict()


def same(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def ddp(rank, settings, seeds):
    model, optimizer = build(**settings)
    wrapped = DistributedDataParallel(model)
    with Collectives() as collectives:
        train(wrapped, optimizer, [batch(each[rank]) for each in seeds])
    return *result(model), collectives.count


SETTINGS = {
    "adaptive": {},
    "widening": {"threshold": 1e-5},
    "intervals": {"mode": "fixed_interval", "interval": 3},
    "l1": {"error_measure": "l1"},
    "narrowing": {"narrowing": 0.5, "bitwidth": 8, "threshold": 1e-3},
    "saturation": {"saturation": 0.001, "mode": "fixed_interval", "interval": 4},
    "O2": {"opt_level": "O2"},
    "O3": {"opt_level": "O3"},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_equal_data_give_the_bits_of_one_process(processes, settings):
    torch.set_num_threads(1)
    found = processes.run(ddp, SETTINGS[settings], [(seed, seed) for seed in range(6)])
    model, optimizer = build(**SETTINGS[settings])
    train(model, optimizer, [batch(seed) for seed in range(6)])
    assert same(found[0], found[1])
    assert same(found[0], result(model))


@pytest.mark.parametrize("settings", SETTINGS)
def test_different_data_give_one_state(processes, settings):
    found = processes.run(ddp, SETTINGS[settings], [(2 * seed, 30 * seed + 1) for seed in range(6)])
    assert found[0][0] == found[1][0]
    weights = [{name: value for name, value in each[1].items() if "bn.running" not in name} for each in found]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

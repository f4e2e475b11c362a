"""Processes that do not do the same work in a round end with one state all the same, and wait for nobody in vain."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_net import Net
from test_ranks import Collectives, batch, build, result, same, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cnmix
from cnmix.registry import registry

INTERVALS = {"mode": "fixed_interval", "interval": 3}


def operands(model):
    return cnmix.state_dict(model)["models"][0]["modules"]


def formats(model):
    """Returns what the processes must agree on at the end of a round that measures."""
    fields = ("bits", "position", "error", "updates", "moving_position")
    return {
        (fqn, name): tuple(operand[field] for field in fields)
        for fqn, module in operands(model).items()
        for name, operand in module["operands"].items()
    }


class Cell(nn.Module):
    """Calls a module as often as it is told."""

    def __init__(self):
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.calls = 1

    def forward(self, x):
        y = self.first(x.flatten(1))
        for _ in range(self.calls):
            y = torch.tanh(self.cell(y))
        return self.last(y)


def variable_calls(rank, settings):
    registry.models.clear()
    torch.manual_seed(0)
    model = Cell()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, **settings)
    wrapped = DistributedDataParallel(model)
    for seed in range(8):
        model.calls = 1 + (seed * (rank + 1)) % 4
        train(wrapped, optimizer, [batch(2 * seed + rank)])
    return formats(model), model.state_dict()


@pytest.mark.parametrize("settings", [{}, INTERVALS, {"saturation": 0.01, **INTERVALS}])
def test_modules_called_more_often_in_one_process(processes, settings):
    first, second = processes.run(variable_calls, settings)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def unequal_accumulation(rank):
    model, optimizer = build(**INTERVALS)
    wrapped = DistributedDataParallel(model)
    for seed in range(6):
        optimizer.zero_grad()
        for micro in range(rank + seed % 2):
            with wrapped.no_sync():
                x, y = batch(10 * seed + micro)
                F.cross_entropy(wrapped(x), y).backward()
        x, y = batch(10 * seed + 9 + rank)
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    return formats(model)


def extra_forward(rank):
    """The first process looks at its gradients once more, outside of the wrapper, on some steps."""
    model, optimizer = build(**INTERVALS)
    wrapped = DistributedDataParallel(model)
    for seed in range(8):
        train(wrapped, optimizer, [batch(2 * seed + rank)])
        if rank == 0 and seed % 3 == 1:
            model(batch(50)[0]).sum()
    return formats(model)


class Branches(nn.Module):
    """A converted branch and a float one."""

    def __init__(self):
        super().__init__()
        self.fixed, self.floating = nn.Linear(36, 3), nn.Linear(36, 3)
        self.branch = "fixed"

    def forward(self, x):
        return getattr(self, self.branch)(x.flatten(1))


def nothing_converted_runs(rank):
    torch.manual_seed(0)
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, exclude=["floating"], **INTERVALS)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for seed in range(8):
        # In the first round every process has to run one: there they find each other.
        model.branch = "floating" if seed and (seed + rank) % 3 == 0 else "fixed"
        train(wrapped, optimizer, [batch(2 * seed + rank)])
    return formats(model)


@pytest.mark.parametrize("work", [unequal_accumulation, extra_forward, nothing_converted_runs])
def test_unequal_work(processes, work):
    first, second = processes.run(work)
    assert first == second
    assert all(position is not None for _, position, *_ in first.values())


def frozen_backbone(rank):
    torch.manual_seed(0)
    model = Net()
    model.conv.requires_grad_(False)
    model.bn.requires_grad_(False)
    model.fc1.requires_grad_(False)
    optimizer = torch.optim.SGD(model.fc2.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, exclude=["fc2"])
    train(DistributedDataParallel(model), optimizer, [batch(2 * seed + rank) for seed in range(4)])
    return operands(model)["fc1"]["operands"]["input"]


def test_formats_of_a_frozen_backbone_are_learned(processes):
    first, second = processes.run(frozen_backbone)
    assert first == second
    assert first["updates"] == 4


def two_wrappers(rank, same_group):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(36, 8)), nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, **INTERVALS)
    groups = [dist.group.WORLD, dist.group.WORLD if same_group else dist.new_group([0, 1])]
    parts = [DistributedDataParallel(part, process_group=group) for part, group in zip(model, groups, strict=True)]
    with Collectives() as collectives:
        train(lambda x: parts[1](parts[0](x)), optimizer, [batch(2 * seed + rank) for seed in range(6)])
    return formats(model), collectives.count


def test_parts_in_wrappers_of_their_own(processes):
    first, second = processes.run(two_wrappers, True)
    assert first == second
    assert first[1] == 2
    with pytest.raises(RuntimeError, match=r"give each part a cnmix\.initialize of its own"):
        processes.run(two_wrappers, False)


def only_biases(rank):
    """No gradient of the first layer's output is ever quantized."""
    model, optimizer = build(**INTERVALS)
    for module in (model.conv, model.fc1, model.fc2):
        module.weight.requires_grad_(False)
    model.bn.requires_grad_(False)
    with Collectives() as collectives:
        train(DistributedDataParallel(model), optimizer, [batch(2 * seed + rank) for seed in range(24)])
    return formats(model), collectives.count


def test_an_operand_that_nothing_quantizes_is_asked_for_less_and_less(processes):
    first, second = processes.run(only_biases)
    assert first == second
    assert first[1] < 8 + 6


class Checkpointed(Net):
    """With its second half as a checkpointed part, of the kind that is given."""

    reentrant = None

    def forward(self, x):
        y = F.relu(self.conv(x)).flatten(1)
        part = nn.Sequential(self.fc1, nn.ReLU(), self.fc2)
        return part(y) if self.reentrant is None else checkpoint(part, y, use_reentrant=self.reentrant)


def checkpointed(rank, reentrant, scale):
    registry.models.clear()
    torch.manual_seed(0)
    model = Checkpointed()
    del model.bn
    model.reentrant = reentrant
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, **INTERVALS)
    head = nn.Linear(3, 3) if scale else nn.Identity()
    whole = DistributedDataParallel(nn.Sequential(model, head))
    with Collectives() as collectives:
        train(whole, optimizer, [batch(2 * seed + rank) for seed in range(6)])
        model(batch(0)[0])  # what waits for the next forward pass
    return formats(model), model.state_dict(), collectives.count


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_take_no_collective_of_their_own(processes, reentrant, head):
    plain, other = processes.run(checkpointed, None, head), processes.run(checkpointed, reentrant, head)
    assert other[0][0] == other[1][0] == plain[0][0]
    assert other[0][2] == plain[0][2] == 2
    assert all(torch.equal(other[0][1][name], plain[0][1][name]) for name in plain[0][1])


class Shared(nn.Module):
    """Two modules that read the same tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.q, self.k = nn.Linear(36, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        y = torch.relu(self.first(x.flatten(1)))
        return self.q(y) * self.k(y)


def shared_input(rank, wrap=DistributedDataParallel):
    registry.models.clear()
    torch.manual_seed(0)
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, rules=[{"modules": "k", "interval": 2}], **INTERVALS)
    train(wrap(model), optimizer, [batch(seed) for seed in range(8)])
    return result(model)


def test_modules_with_one_input_and_other_intervals(processes):
    torch.set_num_threads(1)
    found = processes.run(shared_input)
    assert same(found[0], found[1])
    assert same(found[0], shared_input(0, lambda model: model))


def wrapped_anew(rank):
    model, optimizer = build(**INTERVALS)
    train(DistributedDataParallel(model), optimizer, [batch(2 * seed + rank) for seed in range(4)])
    again = DistributedDataParallel(model, find_unused_parameters=True)
    train(again, optimizer, [batch(20 + 2 * seed + rank) for seed in range(4)])
    return result(model)


def test_a_second_wrapper(processes):
    (first, _), (second, _) = processes.run(wrapped_anew)
    assert first == second

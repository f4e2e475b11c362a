"""What people do with a model under fully_shard: accumulate, checkpoint, convert more, copy, freeze, save."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_ranks import batch, same, train
from test_sharded import Net, build, whole_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import cnmix
from cnmix import checkpoint as checkpoints
from cnmix import inference
from cnmix.nn import quantized_modules
from cnmix.registry import registry

INTERVALS = {"mode": "fixed_interval", "interval": 3}
WEIGHT = [{"modules": "*", "operands": "weight", "rounding": "stochastic"}]


def accumulated(rank, settings, shard):
    """Two micro-batches a step, and an evaluation in between, which gathers other weights."""
    if shard:
        model, optimizer = build("after", "each", settings)
    else:
        registry.models.clear()
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        cnmix.initialize(model, optimizer, **settings)
    keep = []
    for seed in range(6):
        optimizer.zero_grad()
        for micro in range(2):
            x, y = batch(10 * seed + micro)
            F.cross_entropy(model(x), y).backward()
            keep.append(torch.empty(1000 * (rank + 1)))  # other addresses in each process
            with torch.no_grad():
                model.eval()(batch(9)[0])
            model.train()
        optimizer.step()
    return cnmix.state_dict(model), whole_weights(model) if shard else model.state_dict()


@pytest.mark.parametrize(
    "settings", [INTERVALS, {"rules": WEIGHT, **INTERVALS}, {"saturation": 0.002, **INTERVALS}, {"opt_level": "O3"}]
)
def test_accumulation_does_not_depend_on_where_weights_lie(processes, settings):
    first, second = processes.run(accumulated, settings, True)
    assert same(first, second)
    if "saturation" not in settings:  # which one process acts on within a step
        weights = accumulated(0, settings, False)[1]
        assert all(torch.equal(first[1][name], weights[name]) for name in weights)


class Blocks(nn.Module):
    """Two blocks, each a checkpointed part."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(36, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2))
        self.last = nn.Linear(16, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


def checkpointed(rank, reentrant):
    registry.models.clear()
    model = Blocks(reentrant)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, **INTERVALS)
    train(model, optimizer, [batch(2 * seed + rank) for seed in range(7)])
    return cnmix.state_dict(model), whole_weights(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(processes, reentrant):
    plain, other = processes.run(checkpointed, None), processes.run(checkpointed, reentrant)
    assert same(other[0], other[1])
    assert same(other[0], plain[0])


def hybrid(rank, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    model, optimizer = build("after", "each", INTERVALS, mesh=mesh)
    train(model, optimizer, [batch(2 * seed + rank) for seed in range(6)])
    return cnmix.state_dict(model), whole_weights(model)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_hybrid_meshes(processes, shape):
    first, second = processes.run(hybrid, shape)
    assert same(first, second)


def converted_later(rank):
    model, optimizer = build("after", "each", {"exclude": ["fc2"], **INTERVALS})
    train(model, optimizer, [batch(2 * seed + rank) for seed in range(4)])
    cnmix.dequantize(model)
    train(model, optimizer, [batch(20 + 2 * seed + rank) for seed in range(2)])
    plain = [fqn for fqn, _ in quantized_modules(model)]
    cnmix.initialize(model, optimizer, **INTERVALS)
    train(model, optimizer, [batch(30 + 2 * seed + rank) for seed in range(4)])
    return plain, (cnmix.state_dict(model), whole_weights(model))


def test_plain_again_and_converted_again(processes):
    (plain, first), (_, second) = processes.run(converted_later)
    assert plain == []
    assert same(first, second)


def a_new_module(rank):
    registry.models.clear()
    torch.manual_seed(0)
    model = Blocks()
    late = model.blocks[1][0]
    model.blocks[1][0] = nn.Identity()
    cnmix.initialize(model, None, **INTERVALS)
    model.blocks[1][0] = late
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer, [batch(2 * seed + rank) for seed in range(4)])
    cnmix.initialize(model, optimizer, **INTERVALS)
    train(model, optimizer, [batch(20 + 2 * seed + rank) for seed in range(4)])
    return cnmix.state_dict(model), whole_weights(model)


def a_part(rank):
    """The inner model is initialized, and the whole is sharded."""
    registry.models.clear()
    model = nn.Sequential(Blocks(), nn.Identity())
    cnmix.initialize(model[0], None, **INTERVALS)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer, [batch(2 * seed + rank) for seed in range(4)])
    return cnmix.state_dict(model[0]), whole_weights(model)


@pytest.mark.parametrize("use", [a_new_module, a_part])
def test_processes_find_each_other(processes, use):
    first, second = processes.run(use)
    assert same(first, second)


def copies(rank, folder):
    model, optimizer = build("after", "each", INTERVALS)
    train(model, optimizer, [batch(seed) for seed in range(4)])
    weight = model.fc1.weight
    copied = copy.deepcopy(weight)
    read = pickle.loads(pickle.dumps(weight.to_local().detach()))
    with pytest.raises(ValueError, match="shared out among processes: prepare a plain model"):
        inference.freeze(model)
    with pytest.raises(ValueError, match="is shared out among processes, and this one has a part of it"):
        checkpoints.save(f"{folder}/a.pt", model)
    train(model.train(), optimizer, [batch(9)])
    return copied.full_tensor().shape == (16, 80) and read.shape == weight.to_local().shape


def test_copies_and_refusals(processes, tmp_path):
    assert processes.run(copies, str(tmp_path)) == [True, True]


def test_a_parametrization_is_computed_once_in_a_forward_pass():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    cnmix.initialize(model, None, bitwidth=31)
    model(torch.ones(2, 8))
    plain(torch.ones(2, 8))
    ours, theirs = dict(model.named_buffers()), dict(plain.named_buffers())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def scaled_by_a_plugin(rank, scale, wrap, bad):
    """Takes Lightning's plugin through steps by its hooks, as Fabric calls them."""
    from cnmix.lightning import FabricCnmixPlugin

    registry.models.clear()
    torch.manual_seed(0)
    model = Blocks()
    for part in (model.first, *model.blocks) if wrap != "root" else ():
        fully_shard(part)
    if wrap != "parts":
        fully_shard(model)
    plugin = FabricCnmixPlugin("O1", loss_scale=scale, settings=INTERVALS)
    plugin.convert_module(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(4):
        for micro in range(2):
            x, y = batch(10 * seed + 2 * micro + rank)
            plugin.backward(F.cross_entropy(model(x), y), model)
        if seed == 2 and rank == bad:
            model.first.weight.grad.to_local()[0, 0] = float("inf")
        if seed == 2 and bad is not None:  # which the next backward pass finds
            x, y = batch(90 + rank)
            plugin.backward(F.cross_entropy(model(x), y), model)
        plugin.optimizer_step(optimizer)
        optimizer.zero_grad()
    weights = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    scalers = plugin.state_dict()["loss_scalers"]
    return weights, scalers[0][0]["scale"] if scalers else scale


@pytest.mark.parametrize("wrap", ["whole", "root", "parts"])
def test_the_loss_scale_of_a_plugin(processes, wrap):
    plain, scaled = (
        processes.run(scaled_by_a_plugin, 1.0, wrap, None),
        processes.run(scaled_by_a_plugin, 2.0**10, wrap, None),
    )
    assert all(torch.equal(plain[0][0][name], scaled[0][0][name]) for name in plain[0][0])
    assert all(torch.isfinite(value).all() for value in plain[0][0].values())


@pytest.mark.parametrize("bad", [0, 1])
def test_an_overflow_in_one_process_skips_the_plugins_step_in_all(processes, bad):
    first, second = processes.run(scaled_by_a_plugin, "dynamic", "whole", bad)
    assert first[1] == second[1] == 2.0**15
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert all(torch.isfinite(value).all() for value in first[0].values())

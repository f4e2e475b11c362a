"""Training under fully_shard gives the bits of one process, with weights that travel as integers."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_ranks import batch, same, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import cnmix
from cnmix.nn import quantized_modules
from cnmix.registry import registry


class Net(nn.Module):
    """Sizes that two processes share out evenly, unevenly, and with nothing left for the second."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.norm = nn.GroupNorm(1, 5)
        self.fc1 = nn.Linear(80, 16)
        self.fc2 = nn.Linear(16, 1)
        self.fc3 = nn.Linear(1, 3)

    def forward(self, x):
        return self.fc3(self.fc2(F.relu(self.fc1(F.relu(self.norm(self.conv(x))).flatten(1)))))


class Gathers:
    """Notes the bytes that each process gives to an all-gather."""

    def __enter__(self):
        self.bytes, self._original = [], dist.all_gather_single
        dist.all_gather_single = self._call
        return self

    def _call(self, output_tensor, input_tensor, *args, **kwargs):
        self.bytes.append(input_tensor.nbytes)
        return self._original(output_tensor, input_tensor, *args, **kwargs)

    def __exit__(self, *_):
        dist.all_gather_single = self._original


def build(order, wrap, settings, **options):
    registry.models.clear()
    registry.optimizers.clear()
    torch.manual_seed(0)
    model = Net()
    if order == "before":
        cnmix.initialize(model, None, **settings)
    for part in model.children() if wrap == "each" else ():
        fully_shard(part, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if order == "after":
        cnmix.initialize(model, optimizer, **settings)
    return model, optimizer


def whole_weights(model):
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def sharded(rank, order, wrap, settings, seeds, options=None):
    model, optimizer = build(order, wrap, settings, **(options or {}))
    with Gathers() as gathers:
        for each in seeds:
            train(model, optimizer, [batch(each[rank])])
            with torch.no_grad():
                model.eval()(batch(9)[0])
            model.train()
    kinds = {fqn: type(module).__name__ for fqn, module in quantized_modules(model)}
    return cnmix.state_dict(model), whole_weights(model), gathers.bytes, kinds


def alone(settings, seeds):
    torch.set_num_threads(1)
    registry.models.clear()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cnmix.initialize(model, optimizer, **settings)
    train(model, optimizer, [batch(seed) for seed in seeds])
    return cnmix.state_dict(model), model.state_dict()


SETTINGS = {
    "adaptive": {},
    "intervals": {"mode": "fixed_interval", "interval": 3},
    "int16": {"mode": "fixed_interval", "interval": 3, "bitwidth": 16},
    "int31": {"mode": "fixed_interval", "interval": 3, "bitwidth": 31},
    "stochastic weights": {"rules": [{"modules": "*", "operands": "weight", "rounding": "stochastic"}]},
    "O3": {"opt_level": "O3"},
}


@pytest.mark.parametrize("wrap", ["whole", "each"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equal_data_give_the_bits_of_one_process(processes, settings, order, wrap):
    found = processes.run(sharded, order, wrap, SETTINGS[settings], [(seed, seed) for seed in range(7)])
    assert same(found[0], found[1])
    assert same(found[0], alone(SETTINGS[settings], range(7)))
    prefix = "FSDP" if wrap == "each" else ""
    assert found[0][3]["fc1"] == f"{prefix}QuantizedLinear"
    assert found[0][3]["conv"] == f"{prefix}QuantizedConv2d"
    if wrap == "each":  # fc1's part, with half of its bias, and one byte that says whether it is finite
        weight, bias = 80 * 16 // 2, 4 * 16 // 2
        integers = {"intervals": weight + 1, "int16": 2 * weight + 1, "O3": weight + 1}.get(settings)
        assert 4 * weight + bias in found[0][2]
        assert integers is None or integers + bias in found[0][2]
        assert settings != "int31" or {each for each in found[0][2] if each > 600} == {4 * weight + bias}


def test_different_data_give_one_state(processes):
    seeds = [(2 * seed, 30 * seed + 1) for seed in range(6)]
    found = processes.run(sharded, "after", "each", SETTINGS["intervals"], seeds)
    assert same(found[0], found[1])


POLICIES = {
    "bfloat16 parameters": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "kept after forward": {"reshard_after_forward": False},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_of_fully_shard(processes, policy):
    seeds = [(seed, seed) for seed in range(5)]
    found = processes.run(sharded, "after", "each", SETTINGS["intervals"], seeds, POLICIES[policy])
    assert same(found[0], found[1])
    if policy != "bfloat16 parameters":
        assert same(found[0], alone(SETTINGS["intervals"], range(5)))


def not_finite(rank):
    model, optimizer = build("after", "whole", SETTINGS["intervals"])
    train(model, optimizer, [batch(seed) for seed in range(4)])
    with torch.no_grad():
        if rank == 1:
            model.fc1.weight.to_local()[-1, -1] = math.nan
        hidden = []
        model.fc1.register_forward_hook(lambda module, args, output: hidden.append(output))
        model.eval()(batch(0)[0])
    return bool(hidden[0].isnan().all())


def test_a_part_that_is_not_finite_makes_the_product_nan_everywhere(processes):
    assert processes.run(not_finite) == [True, True]


def without_backward(rank):
    """Runs forward passes in training mode that no backward pass follows, as an adversarial network's do."""
    model, optimizer = build("after", "whole", SETTINGS["intervals"])
    for seed in range(6):
        model(batch(20 + seed)[0])
        train(model, optimizer, [batch(2 * seed + rank)])
    return cnmix.state_dict(model), whole_weights(model)


def test_forward_passes_without_a_backward_pass(processes):
    found = processes.run(without_backward)
    assert same(found[0], found[1])
    state = found[0][0]["models"][0]["modules"]["fc1"]["operands"]["weight"]
    assert state["step"] == 12
    assert state["updates"] >= 3


def loaded(rank):
    """Goes on from plain weights and a state, as after a restart."""
    model, optimizer = build("after", "each", SETTINGS["intervals"])
    train(model, optimizer, [batch(seed) for seed in range(4)])
    weights, state = whole_weights(model), cnmix.state_dict(model)
    again, _ = build("after", "each", SETTINGS["intervals"])
    optimizer = torch.optim.SGD(again.parameters(), lr=0.05)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(again, weights, options=StateDictOptions(full_state_dict=True))
    cnmix.load_state_dict(state, again)
    plain = torch.optim.SGD(model.parameters(), lr=0.05)
    for each, with_optimizer in ((model, plain), (again, optimizer)):
        train(each, with_optimizer, [batch(10 + seed) for seed in range(4)])
    return (cnmix.state_dict(model), whole_weights(model)), (cnmix.state_dict(again), whole_weights(again))


def loaded_anew(rank):
    """Evaluates after weights of another make were put in the place of the sharded ones."""
    model, optimizer = build("after", "each", SETTINGS["intervals"])
    train(model, optimizer, [batch(seed) for seed in range(4)])
    with torch.inference_mode():
        before = model.eval()(batch(9)[0])
    weights = {name: torch.clone(value.detach()) for name, value in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    with torch.inference_mode():
        after = model(batch(9)[0])
    train(model.train(), optimizer, [batch(seed) for seed in range(2)])
    return torch.equal(before, after)


def test_weights_that_are_assigned(processes):
    assert processes.run(loaded_anew) == [True, True]


def test_going_on_from_whole_weights(processes):
    for went_on, restarted in processes.run(loaded):
        assert same(went_on, restarted)


def tensor_parallel(rank, order):
    registry.models.clear()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)), torch.ones(2, 8)
    expected = model(x)
    mesh = init_device_mesh("cpu", (2,))
    if order == "before":
        cnmix.initialize(model)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if order == "left out":
        cnmix.initialize(model, exclude=["0", "2"], bitwidth=31)
        y = model(x)
        y.sum().backward()
        return torch.allclose(y, expected, atol=1e-5)
    refusal = pytest.raises(
        ValueError if order == "after" else RuntimeError, match=r"'0' is split by tensor parallelism"
    )
    with refusal:
        cnmix.initialize(model)
        model(x)
    return True


@pytest.mark.parametrize("order", ["before", "after", "left out"])
def test_tensor_parallelism(processes, order):
    assert processes.run(tensor_parallel, order) == [True, True]


def reverted(rank):
    model, _ = build("after", "each", {})
    cnmix.dequantize(model)
    return [type(module).__name__ for module in model.children()]


def test_dequantize(processes):
    assert processes.run(reverted)[0] == ["FSDPConv2d", "FSDPGroupNorm", "FSDPLinear", "FSDPLinear", "FSDPLinear"]


def overflow(rank, bad):
    """Trains with a dynamic loss scale; in one step one part of a gradient is infinite."""
    model, optimizer = build("after", "each", {"opt_level": "O2", "activation_dtype": "float16"})
    scales = []
    for seed in range(4):
        x, y = batch(2 * seed + rank)
        optimizer.zero_grad()
        with cnmix.scale_loss(F.cross_entropy(model(x), y), optimizer) as scaled:
            scaled.backward()
            if seed == 2 and rank == bad:
                model.fc1.weight.grad.to_local()[0, 0] = math.inf
        optimizer.step()
        scales.append(cnmix.state_dict()["loss_scalers"][0][0]["scale"])
    return scales, whole_weights(model)


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_an_overflow_in_one_part_skips_the_step_everywhere(processes, bad):
    found = processes.run(overflow, bad)
    expected = [2.0**16] * 4 if bad is None else [2.0**16, 2.0**16, 2.0**15, 2.0**15]
    assert [each[0] for each in found] == [expected, expected]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])

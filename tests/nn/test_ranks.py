"""Processes that train one model together choose the same formats, in one collective on steps with an update."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_net import Net
from torch.nn.parallel import DistributedDataParallel

import cnmix
from cnmix.fixed_point import BITS, choose_position
from cnmix.nn.ranks import pack, unpack
from cnmix.operand import Observation
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


def schedule(rank, settings, passes):
    """Trains with several forward or backward passes in a step; returns the result and the number of collectives."""
    model, optimizer = build(**settings)
    wrapped = DistributedDataParallel(model, find_unused_parameters=passes == "find unused")
    with Collectives() as collectives:
        for seed in range(6):
            optimizer.zero_grad()
            if passes == "no_sync":
                with wrapped.no_sync():
                    F.cross_entropy(*_scores(wrapped, 2 * seed + rank)).backward()
            if passes == "twice":
                sum(F.cross_entropy(*_scores(wrapped, 2 * seed + rank)) for _ in range(2)).backward()
            else:
                F.cross_entropy(*_scores(wrapped, 2 * seed + rank)).backward()
            optimizer.step()
            with torch.no_grad():
                wrapped.eval()(batch(9)[0])
            wrapped.train()
    return *result(model), collectives.count


def _scores(model, seed):
    x, y = batch(seed)
    return model(x), y


# An update every three steps of a module takes one collective for all operands.
@pytest.mark.parametrize(("passes", "count"), [("one", 2), ("no_sync", 3), ("twice", 3), ("find unused", 2)])
def test_one_collective_on_steps_with_an_update(processes, passes, count):
    found = processes.run(schedule, {"mode": "fixed_interval", "interval": 3}, passes)
    assert found[0][0] == found[1][0]
    assert [each[2] for each in found] == [count, count]


def unequal_work(rank):
    """The second process leaves a layer out on every other step."""

    class Sometimes(Net):
        def forward(self, x):
            y = F.relu(self.bn(self.conv(x))).flatten(1)
            return self.fc2(F.relu(self.fc1(y)) if self.whole else y[:, :8])

    torch.manual_seed(0)
    model = Sometimes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for seed in range(6):
        model.whole = rank == 0 or seed % 2 == 0
        train(wrapped, optimizer, [batch(2 * seed + rank)])
    return result(model)


def test_processes_that_run_different_modules(processes):
    states, _ = zip(*processes.run(unequal_work), strict=True)
    assert states[0] == states[1]
    operands = states[0]["models"][0]["modules"]["fc1"]["operands"]
    assert {operand["step"] for operand in operands.values()} == {6}


def formats_of_a_group(rank, absmax):
    """One Linear whose input differs by process; returns position and width of its input."""
    layer = torch.nn.Linear(4, 4)
    cnmix.initialize(layer, max_bitwidth=8)
    x = torch.full((2, 4), absmax[rank])
    DistributedDataParallel(layer)(x).sum().backward()
    state = layer.quantizers.input.state
    return state.position, state.bits, state.step


@pytest.mark.parametrize("absmax", [(1.0, 5.0), (300.0, 0.001), (0.0, 2.0), (float("nan"), 2.0), (2.0, float("inf"))])
def test_the_position_fits_the_largest_of_all(processes, absmax):
    finite = [each for each in absmax if each < float("inf")]
    expected = (choose_position(max(finite), 8), 8, 1)
    assert processes.run(formats_of_a_group, absmax) == [expected, expected]


def nothing_to_measure(rank):
    return formats_of_a_group(rank, (0.0, float("nan")))


def test_tensors_that_say_nothing_are_looked_at_again(processes):
    assert processes.run(nothing_to_measure) == [(None, 8, 1)] * 2


def stochastic(rank):
    torch.manual_seed(rank)  # as scripts do to shuffle differently
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, rounding="stochastic", max_bitwidth=8)
    wrapped = DistributedDataParallel(model)
    train(wrapped, optimizer, [batch(seed) for seed in range(4)])
    quantizers = model.fc1.quantizers
    same_input = quantizers.input(torch.full((64,), 0.3), True).values
    return *result(model), quantizers.quantize_weight(model.fc1.weight, True).values, same_input


def test_stochastic_weights_are_equal_and_data_draw_their_own_numbers(processes):
    first, second = processes.run(stochastic)
    assert first[0]["models"][0]["modules"].keys() == second[0]["models"][0]["modules"].keys()
    assert torch.equal(first[2], second[2])
    assert not torch.equal(first[3], second[3])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1] if "running" not in name)


def different_settings(rank):
    model, optimizer = build(**({"threshold": 0.02} if rank else {}))
    with pytest.raises(ValueError, match=r"rank 1 of 2 converted other modules than rank 0, or with other settings"):
        train(DistributedDataParallel(model), optimizer, [batch(0)])


def test_different_settings_are_refused_everywhere(processes):
    processes.run(different_settings)


def state_of_rank_0(rank, state):
    model, optimizer = build()
    if rank == 0:
        cnmix.load_state_dict(state, model)
    train(DistributedDataParallel(model), optimizer, [batch(rank)])
    return cnmix.state_dict(model)


def test_processes_begin_with_the_state_of_the_first(processes):
    model, optimizer = build()
    train(model, optimizer, [batch(seed) for seed in range(3)])
    found = processes.run(state_of_rank_0, cnmix.state_dict(model))
    assert found[0] == found[1]
    assert found[0]["models"][0]["modules"]["fc1"]["operands"]["input"]["step"] == 4


def by_hand(rank, group):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, process_group=dist.group.WORLD if group else None)
    for seed in range(3):
        x, y = batch(2 * seed + rank)
        optimizer.zero_grad()
        F.cross_entropy(model(10 ** (rank * seed) * x), y).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()
    return cnmix.state_dict(model)["models"]


def test_gradients_averaged_by_hand(processes):
    together, alone = processes.run(by_hand, True), processes.run(by_hand, False)
    assert together[0] == together[1]
    assert alone[0] != alone[1]


def test_no_process_group():
    with pytest.raises(TypeError, match=r"torch\.distributed\.group\.WORLD after init_process_group, got None|'gloo'"):
        cnmix.initialize(Net(), process_group="gloo")


def compiled(rank):
    torch._dynamo.reset()
    found = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        model, optimizer = build()
        train(wrap(DistributedDataParallel(model)), optimizer, [batch(2 * seed + rank) for seed in range(3)])
        found.append(result(model))
    return found


@pytest.mark.filterwarnings("ignore")
def test_compiled(processes):
    for eager, other in processes.run(compiled):
        assert same(eager, other)


def checkpointed(rank, reentrant):
    from torch.utils.checkpoint import checkpoint

    class Part(Net):
        def forward(self, x):
            y = F.relu(self.conv(x)).flatten(1)
            part = torch.nn.Sequential(self.fc1, torch.nn.ReLU(), self.fc2)
            return part(y) if reentrant is None else checkpoint(part, y, use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Part()
    del model.bn
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer)
    train(DistributedDataParallel(model), optimizer, [batch(2 * seed + rank) for seed in range(4)])
    return result(model)


def test_activation_checkpointing(processes):
    plain, other = processes.run(checkpointed, None), processes.run(checkpointed, False)
    assert plain[0][0] == plain[1][0] == other[0][0]
    assert same(plain[0], other[0])


def test_reentrant_activation_checkpointing(processes):
    found = processes.run(checkpointed, True)
    assert same(found[0], found[1])


@given(st.lists(st.floats(min_value=0, allow_infinity=False, width=32, allow_nan=False), min_size=1, max_size=40))
def test_the_largest_exponent_comes_through_a_sum(magnitudes):
    rows = [pack(3, Observation(first_step=1, absmax=absmax)) for absmax in magnitudes]
    steps, seen = unpack([sum(column) for column in zip(*rows, strict=True)])
    assert steps == 2
    for bits in BITS:
        assert choose_position(seen.absmax, bits) == choose_position(max(magnitudes), bits)


@pytest.mark.parametrize("count", [2, 1024, 2**14 - 1])
@pytest.mark.parametrize("absmax", [2.0**-149, 1.0, 3.0e38])
def test_many_processes_do_not_carry(count, absmax):
    row = [count * number for number in pack(1, Observation(absmax=absmax, sums={8: (-0.25, 2.0)}, saturation=0.5))]
    steps, seen = unpack(row)
    assert (steps, seen.saturation) == (1, 0.5)
    assert seen.sums == {8: (-0.25 * count, 2.0 * count)}
    assert choose_position(seen.absmax, 16) == choose_position(absmax, 16)


def joined(rank):
    model, optimizer = build()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"Give every process as many batches"), wrapped.join():
        train(wrapped, optimizer, [batch(rank)])


def test_uneven_inputs_are_refused(processes):
    processes.run(joined)


def loaded_in_between(rank, state):
    model, optimizer = build(mode="fixed_interval", interval=5)
    wrapped = DistributedDataParallel(model)
    train(wrapped, optimizer, [batch(2 * seed + rank) for seed in range(3)])
    cnmix.load_state_dict(state, model)
    with Collectives() as collectives:
        train(wrapped, optimizer, [batch(20 + 2 * seed + rank) for seed in range(7)])
    return cnmix.state_dict(model), collectives.count


def test_a_state_that_every_process_loads_in_between(processes):
    model, optimizer = build(mode="fixed_interval", interval=5)
    train(model, optimizer, [batch(seed) for seed in range(5)])  # the next step measures
    first, second = processes.run(loaded_in_between, cnmix.state_dict(model))
    assert first == second
    operands = first[0]["models"][0]["modules"]["fc1"]["operands"]
    assert {operand["updates"] for operand in operands.values()} == {3}
    assert first[1] == 2

"""Wrappers around a model, before and after conversion, change no bit: DDP, DataParallel, compile, checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import cnmix
from cnmix.nn import QuantizedModule, quantized_modules

# torch's own, where a hook or a module within is compiled by itself
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

NAMES = ["conv", "fc1", "fc2"]


@pytest.fixture(autouse=True)
def _clean():
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def states(model=None):
    return cnmix.state_dict(model)["models"]


WRAPPERS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "eager": lambda model: torch.compile(model, backend="eager"),
    "aot_eager": lambda model: torch.compile(model, backend="aot_eager"),
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
}
SETTINGS = {"O1": {}, "O2": {"opt_level": "O2"}, "stochastic": {"rounding": "stochastic", "max_bitwidth": 8}}


@pytest.fixture
def expected(net, step):
    """Trains without a wrapper; returns the model."""

    def run(steps=3, **settings):
        model = net()
        optimizer = sgd(model)
        cnmix.initialize(model, optimizer, **settings)
        for seed in range(steps):
            step(model, optimizer, seed)
        return model

    return run


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_initialized_before_or_after_the_wrap(net, step, same_weights, expected, wrapper, order, settings):
    model, given = net(), SETTINGS[settings]
    optimizer = sgd(model)
    if order == "before":
        cnmix.initialize(model, optimizer, **given)
    wrapped = WRAPPERS[wrapper](model)
    if order == "after":
        cnmix.initialize(wrapped, optimizer, **given)
    for seed in range(3):
        step(wrapped, optimizer, seed)
    plain = expected(**given)
    assert states(wrapped) == states(model) == states(plain)
    assert same_weights(model, plain)
    assert list(states()[0]["modules"]) == NAMES
    assert [module.quantizers.fqn for _, module in quantized_modules(model)] == NAMES


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("wrapper", ["DDP", "DataParallel", "eager"])
def test_a_wrapped_model_and_its_inner_one_are_one(net, step, wrapper):
    model = net()
    optimizer = sgd(model)
    wrapped = WRAPPERS[wrapper](model)
    cnmix.initialize(wrapped, optimizer, exclude=["fc2"])
    step(wrapped, optimizer)
    before = states(model)
    cnmix.initialize(model, optimizer, exclude=["fc2"])
    cnmix.initialize(wrapped, optimizer, exclude=["fc2"])
    assert states() == before
    assert list(before[0]["modules"]) == NAMES[:2]
    cnmix.load_state_dict({"version": 1, "models": before, "loss_scalers": []})
    assert cnmix.dequantize(wrapped) is wrapped
    assert not any(quantized_modules(model))
    assert states() == []
    step(wrapped, optimizer)


@pytest.mark.parametrize("given", ["inner", "compiled"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_from_before_the_conversion_is_not_reused(net, batch, step, same_weights, expected, backend, given):
    model = net()
    optimizer = sgd(model)
    compiled = torch.compile(model, backend=backend)
    model.eval()
    compiled(batch(0)[0]).sum().backward()  # a graph of float
    model.train().zero_grad()
    cnmix.initialize(model if given == "inner" else compiled, optimizer)
    for seed in range(3):
        step(compiled, optimizer, seed)
    plain = expected()
    assert states(model) == states(plain)
    assert same_weights(model, plain)
    cnmix.dequantize(compiled)
    model.eval()
    assert torch.equal(compiled(batch(3)[0]), model(batch(3)[0]))
    assert not any(quantized_modules(model))


def test_a_module_compiled_in_place(net, step, same_weights, expected):
    model = net()
    optimizer = sgd(model)
    model.fc1.compile(backend="eager")
    cnmix.initialize(model, optimizer)
    model.conv.compile(backend="eager")
    for seed in range(3):
        step(model, optimizer, seed)
    plain = expected()
    assert states(model) == states(plain)
    assert same_weights(model, plain)


class Blocks(nn.Module):
    """Three blocks, with the middle one checkpointed in the way that is given; no batch norm, which counts twice."""

    def __init__(self, run=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(36, 16)
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU())
        self.last = nn.Linear(16, 3)
        self.run = run

    def forward(self, x):
        return self.last(self.run(self.middle, self.first(x.flatten(1))))


def nested(block, x):
    return checkpoint(lambda y: checkpoint(block, y, use_reentrant=False), x, use_reentrant=False)


def layer_by_layer(block, x):
    for layer in block:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


CHECKPOINTS = {
    "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "no early stop": lambda block, x: checkpoint(block, x, use_reentrant=False, early_stop=False),
    "nested": nested,
    "layer by layer": layer_by_layer,
    "sequential": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=False),
    "sequential, reentrant": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=True),
}
SCHEDULES = {
    "adaptive": {},
    "widening": {"threshold": 1e-5},
    "between updates": {"mode": "fixed_interval", "interval": 3},
    "short epochs": {"steps_per_epoch": 2, "quantify_rate": 0.5},
    "stochastic": {"rounding": "stochastic"},
    "O2": {"opt_level": "O2"},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("way", CHECKPOINTS)
def test_activation_checkpointing(step, same_weights, way, schedule):
    models = []
    for model in (Blocks(), Blocks(CHECKPOINTS[way])):
        optimizer = sgd(model)
        cnmix.initialize(model, optimizer, **SCHEDULES[schedule])
        for seed in range(5):
            step(model, optimizer, seed)
        models.append(model)
    plain, checkpointed = models
    for name, quantizer in checkpointed.middle[0].quantizers:
        assert quantizer.state.step == 5, name
    assert states(plain) == states(checkpointed)
    assert same_weights(plain, checkpointed)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the evaluation, reentrant
@pytest.mark.parametrize("way", ["not reentrant", "reentrant"])
def test_activation_checkpointing_with_accumulation_and_evaluation_in_between(backward, batch, same_weights, way):
    models = []
    for model in (Blocks(), Blocks(CHECKPOINTS[way])):
        optimizer = sgd(model)
        cnmix.initialize(model, optimizer)
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, optimizer, 2 * seed)
            with torch.no_grad():
                model.eval()(batch(9)[0])
            backward(model.train(), optimizer, 2 * seed + 1)
            optimizer.step()
        models.append(model)
    assert models[1].middle[0].quantizers.input.state.step == 6
    assert states(models[0]) == states(models[1])
    assert same_weights(*models)


@pytest.mark.parametrize("way", ["not reentrant", "reentrant"])
def test_two_checkpointed_passes_before_their_backward_passes(batch, same_weights, way):
    models = []
    for model in (Blocks(), Blocks(CHECKPOINTS[way])):
        optimizer = sgd(model)
        cnmix.initialize(model, optimizer)
        for seed in range(3):
            optimizer.zero_grad()
            losses = [F.cross_entropy(model(x), y) for x, y in (batch(seed), batch(seed + 3))]
            with cnmix.scale_loss(sum(losses), optimizer) as scaled:
                scaled.backward()
            optimizer.step()
        models.append(model)
    assert states(models[0]) == states(models[1])
    assert same_weights(*models)


def test_a_checkpointed_pass_that_no_backward_pass_followed(batch, step):
    model = Blocks(CHECKPOINTS["not reentrant"])
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer)
    model(batch(0)[0])
    assert model.middle[0].quantizers.input.state.step == 1
    step(model, optimizer, 1)
    assert model.middle[0].quantizers.input.state.step == 2
    assert all(isinstance(layer, QuantizedModule) for layer in model.middle[::2])


@pytest.mark.parametrize("way", ["not reentrant", "reentrant"])
def test_a_range_that_jumps_between_updates(way):
    """A repeated pass that measured anew would multiply other integers than the formats of the first pass say."""
    found = []
    for run in (lambda block, x: block(x), CHECKPOINTS[way]):
        torch.manual_seed(0)
        layer = nn.Linear(16, 16)
        cnmix.initialize(layer, None, mode="fixed_interval", interval=3, bitwidth=16, max_bitwidth=16)
        for scale in (1, 0.01, 1, 0.01):
            x = torch.full((4, 16), float(scale), requires_grad=True)
            run(layer, x).sum().backward()
        found.append(layer.weight.grad)
    assert torch.equal(*found)

"""What scripts do beside training changes no bit of it; each test compares with training that goes straight through."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils

import cnmix
from cnmix.nn import quantized_modules

LEVELS = ["O1", "O2"]
# The weight's integers serve several steps, nothing is measured in between, and random numbers count steps.
SCHEDULES = [
    pytest.param({}, id="adaptive"),
    pytest.param({"mode": "fixed_interval", "interval": 3}, id="between updates"),
    pytest.param({"rounding": "stochastic"}, id="stochastic"),
    pytest.param({"opt_level": "O2"}, id="O2"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def ready(model, **settings):
    torch.manual_seed(0)  # the quantizers keep the seed of the run
    return cnmix.initialize(model, sgd(model), **settings)


def states(model=None):
    return cnmix.state_dict(model)["models"]


def steps_of(model):
    return {fqn: [q.state.step for _, q in module.quantizers] for fqn, module in quantized_modules(model)}


@pytest.fixture
def straight(net, step):
    """Trains straight through; returns the model."""

    def run(steps=4, seed=0, **settings):
        model, optimizer = ready(net(seed), **settings)
        for index in range(steps):
            step(model, optimizer, index)
        return model

    return run


def differences(a, b):
    """Returns the names of weights and operands in which two models differ."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    found = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    ours, theirs = states(a)[0]["modules"], states(b)[0]["modules"]
    assert list(ours) == list(theirs)
    for fqn, module in ours.items():
        for operand, state in module["operands"].items():
            other = theirs[fqn]["operands"][operand]
            found += [f"{fqn} {operand} {name}" for name in state if state[name] != other[name]]
    return found


# Several models and optimizers


@pytest.mark.parametrize("calls", ["one", "several", "models first"])
@pytest.mark.parametrize("loss_scale", [1.0, "dynamic"])
def test_several_models_with_an_optimizer_each(net, step, straight, calls, loss_scale):
    models = [net(1), net(0)]  # the quantizers keep the seed of the run, which is the last one
    optimizers = [sgd(model) for model in models]
    if calls == "one":
        assert cnmix.initialize(models, optimizers, loss_scale=loss_scale) == (models, optimizers)
    elif calls == "several":
        for model, optimizer in zip(models, optimizers, strict=True):
            cnmix.initialize(model, optimizer, loss_scale=loss_scale)
    else:
        cnmix.initialize(models, None)
        cnmix.initialize([], optimizers, loss_scale=loss_scale)
    for seed in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, seed)
    assert len(states()) == len(cnmix.state_dict()["loss_scalers"]) == 2
    for seed, model in zip((1, 0), models, strict=True):
        assert differences(model, straight(seed=seed, loss_scale=loss_scale)) == []


@pytest.mark.parametrize("calls", ["one", "several"])
def test_several_models_share_an_optimizer(net, batch, straight, calls):
    models = [net(1), net(0)]  # the quantizers keep the seed of the run, which is the last one
    optimizer = torch.optim.SGD(itertools.chain(*(model.parameters() for model in models)), lr=0.05, momentum=0.9)
    if calls == "one":
        cnmix.initialize(models, optimizer, loss_scale=64.0)
    else:
        for model in models:
            cnmix.initialize(model, optimizer, loss_scale=64.0)
    for seed in range(4):
        x, y = batch(seed)
        optimizer.zero_grad()
        with cnmix.scale_loss(sum(F.cross_entropy(model(x), y) for model in models), optimizer) as scaled:
            scaled.backward()
        optimizer.step()
    assert len(cnmix.state_dict()["loss_scalers"]) == 1
    for seed, model in zip((1, 0), models, strict=True):
        assert differences(model, straight(seed=seed, loss_scale=64.0)) == []


def test_a_part_and_the_whole_with_an_optimizer_each(net, backward, straight):
    model = net()
    torch.manual_seed(0)
    parts = [[*model.conv.parameters(), *model.bn.parameters()], [*model.fc1.parameters(), *model.fc2.parameters()]]
    optimizers = [torch.optim.SGD(part, lr=0.05, momentum=0.9) for part in parts]
    cnmix.initialize(model.conv, optimizers[0])
    cnmix.initialize(model, optimizers[1])
    for seed in range(4):
        model.zero_grad()
        backward(model, optimizers, seed)
        for optimizer in optimizers:
            optimizer.step()
    # A key of random numbers comes from the name that a module had when it was converted.
    assert [each for each in differences(model, straight()) if not each.endswith("seed")] == []


# Copies


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("when", [0, 2])
def test_a_copy_trains_on_as_the_original(net, step, straight, way, when, settings):
    model, optimizer = ready(net(), **settings)
    for seed in range(when):
        step(model, optimizer, seed)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert differences(model, other) == []
    second = sgd(other)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cnmix.initialize(other, second, **settings)
    assert differences(model, other) == []
    for seed in range(when, 4):
        step(model, optimizer, seed)
    assert steps_of(other)["fc1"] == [when] * 3
    for seed in range(when, 4):
        step(other, second, seed)
    assert differences(model, other) == []
    assert differences(model, straight(**settings)) == []


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("loss_scale", [1.0, "dynamic"])
def test_a_copied_pair(net, step, straight, order, loss_scale):
    model = net()
    pair = model, sgd(model)
    if order == "after":
        cnmix.initialize(*pair, loss_scale=loss_scale)
    other = copy.deepcopy(pair)
    assert other[1].param_groups[0]["params"][0] is other[0].conv.weight
    for each in (pair, other):
        cnmix.initialize(*each, loss_scale=loss_scale)
    for seed in range(4):
        step(*other, seed)
    assert differences(other[0], straight(loss_scale=loss_scale)) == []
    assert steps_of(pair[0])["fc1"] == [0, 0, 0]
    assert torch.equal(pair[0].fc1.weight, net().fc1.weight)


AVERAGES = {
    "SWA": lambda model: swa_utils.AveragedModel(model),
    "EMA": lambda model: swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)),
    "own": lambda model: swa_utils.AveragedModel(model, avg_fn=lambda mean, now, n: 0.5 * mean + 0.5 * now),
    "with buffers": lambda model: swa_utils.AveragedModel(model, use_buffers=True),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["before", "after", "later"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_of_weights(net, step, batch, straight, kind, order, level):
    model = net()
    averaged = AVERAGES[kind](model) if order == "before" else None
    model, optimizer = ready(model, opt_level=level)
    averaged = averaged or (AVERAGES[kind](model) if order == "after" else None)
    plain = AVERAGES[kind](net()) if order != "later" else None
    for seed in range(4):
        step(model, optimizer, seed)
        if order == "later" and seed == 1:
            averaged, plain = AVERAGES[kind](model), AVERAGES[kind](cnmix.dequantize(copy.deepcopy(model)))
        if averaged is not None:
            known = states(averaged)
            averaged.update_parameters(model)
            plain.update_parameters(model)
            averaged.eval()(batch(seed)[0])
            assert states(averaged) == known
    assert differences(model, straight(opt_level=level)) == []
    for ours, theirs in zip(averaged.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    if order != "before":
        assert len(list(quantized_modules(averaged))) == 3
        assert averaged.module.fc1.quantizers is not model.fc1.quantizers
    before = states(model), states(averaged)
    swa_utils.update_bn([batch(seed)[0] for seed in range(3)], averaged)
    swa_utils.update_bn([batch(seed)[0] for seed in range(3)], plain)
    assert (states(model), states(averaged)) == before
    x = batch(0)[0].clamp(-3, 3)
    assert (averaged.eval()(x) - plain.eval()(x)).norm() < 0.1 * plain(x).norm()


# Hooks


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_get_what_flows(net, step, batch, straight, order, level):
    model, seen = net(), {}
    optimizer = sgd(model)
    if order == "after":
        cnmix.initialize(model, optimizer, opt_level=level)

    def note(kind):
        return lambda *arguments: seen.__setitem__(kind, arguments)

    layer = model.fc2
    handles = [
        layer.register_forward_pre_hook(note("pre")),
        layer.register_forward_hook(note("forward")),
        layer.register_full_backward_pre_hook(note("backward pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.weight.register_hook(note("gradient")),
        layer.weight.register_post_accumulate_grad_hook(note("accumulated")),
    ]
    if order == "before":
        cnmix.initialize(model, optimizer, opt_level=level)
    for seed in range(4):
        step(model, optimizer, seed)
    dtype = torch.bfloat16 if level == "O2" else torch.float32
    (x,), y = seen["pre"][1], seen["forward"][2]
    assert seen["pre"][0] is seen["forward"][0] is seen["backward"][0] is layer
    assert (x.dtype, x.shape, y.dtype, y.shape) == (dtype, (8, 8), dtype, (8, 3))
    assert torch.equal(x, seen["forward"][1][0])
    (grad_x,), (grad_y,) = seen["backward"][1:]
    assert (grad_x.dtype, grad_x.shape, grad_y.dtype, grad_y.shape) == (dtype, (8, 8), dtype, (8, 3))
    assert torch.equal(grad_y, seen["backward pre"][1][0])
    assert torch.equal(seen["gradient"][0], layer.weight.grad)
    assert seen["accumulated"][0] is layer.weight
    assert differences(model, straight(opt_level=level)) == []
    for handle in handles:
        handle.remove()
    seen.clear()
    step(model, optimizer)
    assert seen == {}


@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_change_what_flows(order):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4, bias=False))

    def register(layer):
        layer.register_forward_pre_hook(lambda module, args: (4 * args[0],))
        layer.register_forward_hook(lambda module, args, y: 2 * y)
        layer.register_full_backward_hook(lambda module, grad_x, grad_y: (8 * grad_x[0],))
        layer.weight.register_hook(lambda gradient: gradient / 2)

    ours, plain = build(), build()
    if order == "before":
        register(ours[0])
    for model in (ours, plain):
        cnmix.initialize(model, None)
    if order == "after":
        register(ours[0])
    x = torch.randn(3, 4)
    gradients = []
    for model in (ours, plain):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.sum().backward()
        gradients.append((y, leaf.grad, model[0].weight.grad))
    for mine, theirs, factor in zip(*gradients, (8, 64, 4), strict=True):
        assert torch.equal(mine, factor * theirs)


def test_global_hooks(net, batch):
    model, _ = ready(net())
    seen = []
    handles = [
        nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)),
        nn.modules.module.register_module_full_backward_hook(lambda module, *_: seen.append(type(module).__name__)),
    ]
    try:
        model(batch()[0].requires_grad_()).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen) == sorted(2 * ["Net", "QuantizedConv2d", "BatchNorm2d", "QuantizedLinear", "QuantizedLinear"])


# Parameters that stand still


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize("frozen", ["fc1.weight", "fc1.bias", "fc1", "conv", "fc2", ""])
def test_frozen_parameters_and_unfreezing(net, step, batch, backward, frozen, settings):
    """What stays trainable gets the same gradients, bit for bit, and later training goes on as if nothing had been."""
    model, optimizer = ready(net(), **settings)
    other, second = ready(net(), **settings)
    inside = {name for name, _ in model.named_parameters() if name.startswith(frozen)}
    for seed in range(2):
        step(model, optimizer, seed)
        step(other, second, seed)
    for name in inside:
        model.get_parameter(name).requires_grad_(False)
    optimizer.zero_grad()
    second.zero_grad()
    backward(other, second, 2)
    if len(inside) == len(list(model.parameters())):
        assert not model(batch(2)[0]).requires_grad
    else:
        backward(model, optimizer, 2)
    assert all(model.get_parameter(name).grad is None for name in inside)
    for name, parameter in model.named_parameters():
        assert name in inside or torch.equal(parameter.grad, other.get_parameter(name).grad), name
    assert all(counts[:2] == [3, 3] for counts in steps_of(model).values())
    # Back to a common state, trainable again.
    second.step()
    optimizer.load_state_dict(copy.deepcopy(second.state_dict()))
    model.load_state_dict(other.state_dict())
    cnmix.load_state_dict(cnmix.state_dict(other), model)
    model.requires_grad_(True)
    for index in (3, 4):
        step(model, optimizer, index)
        step(other, second, index)
    assert differences(model, other) == []


def test_frozen_from_the_start_and_never_in_the_optimizer(net, step):
    models = []
    for order in ("before", "after"):
        model = net()
        if order == "before":
            model.fc1.requires_grad_(False)
        optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "fc1" not in name], lr=0.05)
        cnmix.initialize(model, optimizer)
        model.fc1.requires_grad_(False)
        for seed in range(3):
            step(model, optimizer, seed)
        assert torch.equal(model.fc1.weight, net().fc1.weight)
        models.append(model)
    assert differences(*models) == []
    model.fc1.requires_grad_(True)
    optimizer.add_param_group({"params": model.fc1.parameters()})
    step(model, optimizer, 3)
    assert not torch.equal(model.fc1.weight, net().fc1.weight)


# Passes in between


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_in_between(net, step, batch, straight, context, mode, settings):
    model, optimizer = ready(net(), **settings)
    model.bn.eval()  # its statistics are its own affair
    with context():
        model(batch(7)[0])
    for seed in range(4):
        step(model, optimizer, seed)
        before = states(model)
        model.train(mode == "train").bn.eval()
        with context():
            model(batch(7)[0])
            model(3 * batch(8)[0])
        model.train().bn.eval()
        assert states(model) == before
    other, second = ready(net(), **settings)
    other.bn.eval()
    for seed in range(4):
        step(other, second, seed)
    assert differences(model, other) == []


# In place


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(6, 5), (4, 6)),
        (lambda: nn.Linear(6, 5), (2, 4, 6)),
        (lambda: nn.Conv1d(4, 5, 3), (2, 4, 7)),
        (lambda: nn.Conv2d(4, 8, 3, padding="same", groups=2), (2, 4, 7, 7)),
        (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 7, 7)),
    ],
)
def test_an_activation_in_place_behind_a_product(layer, shape, level):
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(layer(), nn.ReLU(inplace=inplace))
        cnmix.initialize(model, None, level)
        x = torch.randn(shape).requires_grad_()
        model(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

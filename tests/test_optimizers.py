"""Optimizers of torch with a dynamic loss scale train as they do with none, and are not hurt by an overflow."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import cnmix
from cnmix.optim import scalers_of

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, foreach=False),
    "SGD foreach": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.05),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
}
LEVELS = ["O1", "O2"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def equal(a, b):
    """Compares nested dicts and lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def finite(optimizer):
    values = [value for state in optimizer.state.values() for value in state.values()]
    values = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return all(bool(each.isfinite().all()) for each in values if isinstance(each, torch.Tensor))


def pair(net, name, **settings):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    return cnmix.initialize(model, optimizer, **settings)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_dynamic_scale_changes_no_bit(net, backward, same_weights, name, level, set_to_none):
    """Accumulates two micro-batches and clips their gradients; the scale is a power of two, and exact."""
    trained = []
    for loss_scale in (1.0, "dynamic", 2.0**-6):
        model, optimizer = pair(net, name, opt_level=level, loss_scale=loss_scale)
        for seed in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(model, optimizer, 2 * seed, factor=0.5)
            backward(model, optimizer, 2 * seed + 1, factor=0.5)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        trained.append((model, optimizer))
    model, optimizer = trained[0]
    for other, second in trained[1:]:
        assert same_weights(model, other)
        assert equal(optimizer.state_dict(), second.state_dict())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_was_not_initialized_trains_alike(net, batch, step, same_weights, name, level):
    model, optimizer = pair(net, name, opt_level=level)
    other = net()
    plain = OPTIMIZERS[name](other.parameters())
    cnmix.initialize(other, None, level)
    for seed in range(4):
        step(model, optimizer, seed)
        x, y = batch(seed)
        plain.zero_grad()
        F.cross_entropy(other(x), y).backward()
        plain.step()
    assert same_weights(model, other)
    assert cnmix.state_dict(model) == cnmix.state_dict(other)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_, None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_leaves_weights_and_optimizer_alone(net, step, backward, name, clip):
    model, optimizer = pair(net, name, loss_scale="dynamic")
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    step(model, optimizer)
    before = copy.deepcopy((dict(model.named_parameters()), optimizer.state_dict()))
    for factor in (float("inf"), float("nan"), 1e38):
        optimizer.zero_grad()
        backward(model, optimizer, 1, factor=factor)
        if clip:
            clip(model.parameters(), 1.0)
        optimizer.step()
    assert equal(before, (dict(model.named_parameters()), optimizer.state_dict()))
    assert scalers_of(optimizer)[0].scale == 2.0**13
    assert fired == ["pre", "post"]
    step(model, optimizer, 2)
    assert fired == ["pre", "post", "pre", "post"]
    assert finite(optimizer)
    assert not equal(before[0], dict(model.named_parameters()))


@pytest.mark.parametrize("loss_scale", [1.0, "dynamic"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_added_in_mid_training(net, batch, same_weights, name, level, loss_scale):
    models = []
    for scale in (1.0, loss_scale):
        model = nn.Sequential(net(), nn.Linear(3, 3))
        optimizer = OPTIMIZERS[name](model[0].parameters())
        cnmix.initialize(model, optimizer, level, loss_scale=scale)
        for seed in range(4):
            if seed == 2:
                optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.1})
            model.zero_grad()
            x, y = batch(seed)
            with cnmix.scale_loss(F.cross_entropy(model(x), y), optimizer) as scaled:
                scaled.backward()
            optimizer.step()
        models.append(model)
    assert same_weights(*models)
    torch.manual_seed(0)
    net()
    assert not torch.equal(models[0][1].weight, nn.Linear(3, 3).weight)


SCHEDULERS = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "warm-up": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.5)], [2]
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("skipped", [(), (0,), (1, 2)])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_around_skipped_steps(net, backward, kind, skipped, order):
    rates = []
    for loss_scale in (1.0, "dynamic"):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = SCHEDULERS[kind](optimizer) if order == "before" else None
        cnmix.initialize(model, optimizer, loss_scale=loss_scale)
        scheduler = scheduler or SCHEDULERS[kind](optimizer)
        found = []
        for seed in range(5):
            optimizer.zero_grad()
            overflows = loss_scale == "dynamic" and seed in skipped
            backward(model, optimizer, seed, factor=float("inf") if overflows else 1.0)
            optimizer.step()
            scheduler.step(*([1.0] if kind == "plateau" else []))
            found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        rates.append(found)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert scalers_of(optimizer)[0].scale == 2.0 ** (16 - len(skipped))


# Closures


class Overflowing(torch.autograd.Function):
    """The identity, in a format whose gradients overflow from ``largest`` on."""

    @staticmethod
    def forward(ctx, x, largest):
        ctx.largest = largest
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.where(grad.abs() < ctx.largest, grad, float("inf")), None


def closure_of(model, optimizer, x, y, largest=float("inf")):
    def closure():
        optimizer.zero_grad()
        loss = Overflowing.apply(F.cross_entropy(model(x), y), largest)
        with cnmix.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        return loss

    return closure


CLOSURES = {
    **{name: OPTIMIZERS[name] for name in ("SGD", "SGD fused", "AdamW foreach")},
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=4),
    "LBFGS with line search": lambda params: torch.optim.LBFGS(params, max_iter=4, line_search_fn="strong_wolfe"),
}


def losses_with_closures(net, batch, name, largest=float("inf"), steps=4, **settings):
    model = net().eval()
    optimizer = CLOSURES[name](model.parameters())
    cnmix.initialize(model, optimizer, **settings)
    closure = closure_of(model, optimizer, *batch(), largest)
    losses = [optimizer.step(closure) for _ in range(steps)]
    return losses, model, optimizer


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CLOSURES)
def test_closures_with_a_dynamic_scale(net, batch, same_weights, name, level):
    expected, model, _ = losses_with_closures(net, batch, name, opt_level=level)
    losses, other, optimizer = losses_with_closures(net, batch, name, opt_level=level, loss_scale="dynamic")
    assert [loss.item() for loss in losses] == [loss.item() for loss in expected]
    assert same_weights(model, other)
    assert losses[-1] < losses[0]
    assert scalers_of(optimizer)[0].scale == 2.0**16


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CLOSURES)
def test_an_overflow_within_a_closure(net, batch, same_weights, name, level):
    expected, undisturbed, _ = losses_with_closures(net, batch, name, opt_level=level)
    losses, model, optimizer = losses_with_closures(net, batch, name, 2.0**14, opt_level=level, loss_scale="dynamic")
    assert losses == expected
    assert same_weights(model, undisturbed)
    assert finite(optimizer)
    assert scalers_of(optimizer)[0].scale < 2.0**14


@pytest.mark.parametrize("name", CLOSURES)
def test_a_closure_that_never_comes_out_finite_leaves_the_weights(net, batch, name):
    _, model, optimizer = losses_with_closures(net, batch, name, 0.0, steps=3, loss_scale="dynamic")
    assert equal(dict(model.named_parameters()), dict(net().named_parameters()))
    assert finite(optimizer)
    assert scalers_of(optimizer)[0].scale < 2.0**16


@pytest.mark.parametrize("name", ["LBFGS", "LBFGS with line search"])
def test_an_overflow_in_a_later_evaluation_of_a_closure(net, batch, name):
    model = net().eval()
    optimizer = CLOSURES[name](model.parameters())
    cnmix.initialize(model, optimizer, loss_scale="dynamic")
    evaluations, losses = 0, []

    def closure():
        nonlocal evaluations
        evaluations += 1
        return closure_of(model, optimizer, *batch(), 2.0**14 if evaluations == 3 else float("inf"))()

    for _ in range(4):
        losses.append(optimizer.step(closure))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert finite(optimizer)
    assert scalers_of(optimizer)[0].scale < 2.0**16
    assert losses[-1] < losses[0]

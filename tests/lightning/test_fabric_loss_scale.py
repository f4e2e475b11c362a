import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def step(fabric, model, optimizer, batch, factor=1.0, clip=None, seed=0):
    x, y = batch(seed)
    optimizer.zero_grad()
    fabric.backward(F.cross_entropy(model(x), y) * factor)
    if clip:
        fabric.clip_gradients(model, optimizer, **clip)
    optimizer.step()


def setup(host, model, optimizer=None, **arguments):
    plugin = host.FabricPlugin(**arguments)
    fabric = host.start(plugin)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return plugin, fabric, *fabric.setup(model, optimizer)


def scale_of(plugin):
    return plugin.state_dict()["loss_scalers"][0][0]["scale"]


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.5}, {"clip_val": 0.01}])
@pytest.mark.parametrize("scale", [64, "dynamic"])
def test_scaled_steps_equal_plain_ones(host, net, batch, same_weights, scale, clip):
    models = [net(), net()]
    for model, loss_scale in zip(models, (None, scale), strict=True):
        _, *rest = setup(host, model, loss_scale=loss_scale)
        for seed in range(3):
            step(*rest, batch, clip=clip, seed=seed)
    assert same_weights(*models)


def test_the_loss_is_scaled_while_gradients_flow(host, net, batch):
    seen, model = [], net()
    plugin, *rest = setup(host, model, activation_dtype="float16", opt_level="O2")
    model.fc2.register_full_backward_hook(lambda module, grads, outputs: seen.append(outputs[0].abs().max().item()))
    step(*rest, batch)
    assert max(seen) > 100
    assert model.fc2.weight.grad.abs().max() < 100
    assert scale_of(plugin) == 2.0**16


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.5}, {"clip_val": 0.01}])
def test_overflow_skips_the_first_step_too(host, net, batch, caplog, clip):
    model = net()
    plugin, fabric, wrapped, optimizer = setup(host, model, loss_scale="dynamic")
    before = model.fc2.weight.detach().clone()
    step(fabric, wrapped, optimizer, batch, factor=float("inf"), clip=clip)
    assert torch.equal(model.fc2.weight, before)
    assert scale_of(plugin) == 2.0**15
    assert "gradient overflow: step skipped, loss scale now 32768" in caplog.text
    step(fabric, wrapped, optimizer, batch, clip=clip)
    assert not torch.equal(model.fc2.weight, before)
    assert scale_of(plugin) == 2.0**15


def test_overflow_of_one_micro_batch_skips_the_whole_step(host, net, batch):
    model = net()
    plugin, fabric, wrapped, optimizer = setup(host, model, loss_scale="dynamic")
    before = model.fc2.weight.detach().clone()
    for factor in (1.0, float("inf"), 1.0):
        fabric.backward(F.cross_entropy(wrapped(batch()[0]), batch()[1]) * factor)
    optimizer.step()
    assert torch.equal(model.fc2.weight, before)
    assert scale_of(plugin) == 2.0**15


def test_accumulation_over_a_changed_scale(host, net, batch):
    """Two optimizers that step at different rates: what one has accumulated survives the other's overflow."""
    a, b = net().eval(), net(1).eval()
    plugin = host.FabricPlugin(loss_scale="dynamic")
    fabric = host.start(plugin)
    slow, slow_optimizer = fabric.setup(a, torch.optim.SGD(a.parameters(), lr=0.05))
    fast, fast_optimizer = fabric.setup(b, torch.optim.SGD(b.parameters(), lr=0.05))
    fabric.backward(F.cross_entropy(slow(batch()[0]), batch()[1]))
    once, before = a.fc2.weight.grad.clone(), b.fc2.weight.detach().clone()
    fabric.backward(F.cross_entropy(fast(batch()[0]), batch()[1]) * float("inf"))
    fast_optimizer.step()
    assert torch.equal(b.fc2.weight, before)
    assert scale_of(plugin) == 2.0**15
    fabric.backward(F.cross_entropy(slow(batch()[0]), batch()[1]))
    assert torch.equal(a.fc2.weight.grad, 2 * once)
    before = a.fc2.weight.detach().clone()
    slow_optimizer.step()
    assert not torch.equal(a.fc2.weight, before)


def test_one_module_with_two_optimizers(host, net, batch):
    model = net()
    parts = [torch.optim.SGD(part.parameters(), lr=0.05) for part in (model.fc1, model.fc2)]
    plugin = host.FabricPlugin(loss_scale="dynamic")
    fabric = host.start(plugin)
    wrapped, first, second = fabric.setup(model, *parts)
    weights = [model.fc1.weight.detach().clone(), model.fc2.weight.detach().clone()]
    for factor, moved in ((float("inf"), False), (1.0, True)):
        fabric.backward(F.cross_entropy(wrapped(batch()[0]), batch()[1]) * factor)
        first.step()
        second.step()
        model.zero_grad()
        assert torch.equal(model.fc1.weight, weights[0]) != moved
        assert torch.equal(model.fc2.weight, weights[1]) != moved


def test_overflow_in_gradients_that_were_thrown_away(host, net, batch):
    """As a generator's loss leaves gradients in the discriminator, whose own step begins with zero_grad."""
    a, b = net(), net(1)
    fabric = host.start(host.FabricPlugin(loss_scale="dynamic"))
    one, first = fabric.setup(a, torch.optim.SGD(a.parameters(), lr=0.05))
    two, second = fabric.setup(b, torch.optim.SGD(b.parameters(), lr=0.05))
    x, y = batch()
    fabric.backward(F.cross_entropy(one(x), y) + F.cross_entropy(two(x), y) * float("inf"))
    before = a.fc2.weight.detach().clone(), b.fc2.weight.detach().clone()
    first.step()
    second.zero_grad()
    fabric.backward(F.cross_entropy(two(x), y))
    second.step()
    assert not torch.equal(a.fc2.weight, before[0])
    assert not torch.equal(b.fc2.weight, before[1])


@pytest.mark.parametrize("kind", ["Adam", "LBFGS"])
def test_closure(host, net, batch, same_weights, kind):
    models, calls = [net().eval(), net().eval()], []
    for model, scale in zip(models, (None, "dynamic"), strict=True):
        options = {"max_iter": 4} if kind == "LBFGS" else {}
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)
        _, fabric, wrapped, optimizer = setup(host, model, optimizer, loss_scale=scale, max_bitwidth=8)

        def closure(fabric=fabric, wrapped=wrapped, optimizer=optimizer, scale=scale):
            optimizer.zero_grad()
            loss = F.cross_entropy(wrapped(batch()[0]), batch()[1])
            overflow = scale == "dynamic" and not calls
            calls.append(scale)
            fabric.backward(loss * float("inf") if overflow else loss)
            return loss

        if scale == "dynamic":
            calls.clear()
            before = model.fc2.weight.detach().clone()
            loss = optimizer.step(closure)
            if kind == "Adam":  # skipped; LBFGS evaluates again and goes on
                assert torch.equal(model.fc2.weight, before)
                assert loss is not None
                optimizer.step(closure)
        else:
            optimizer.step(closure)
    assert same_weights(*models)


def test_scale_goes_on_where_it_was(host, net, batch, same_weights, caplog):
    models = [net(), net(7)]
    plugin, *rest = setup(host, models[0], opt_level="O3", activation_dtype="float16")
    step(*rest, batch, factor=float("inf"))
    step(*rest, batch)
    saved = plugin.state_dict()
    weights, momenta = models[0].state_dict(), copy.deepcopy(rest[2].state_dict())
    models[1].load_state_dict(weights)
    again, *others = setup(host, models[1], opt_level="O3", activation_dtype="float16")
    others[2].load_state_dict(momenta)
    again.load_state_dict(saved)
    assert again.state_dict() == saved
    assert saved["loss_scalers"][0][0]["scale"] == 2.0**15
    for seed in range(2):
        step(*rest, batch, seed=seed)
        step(*others, batch, seed=seed)
    assert same_weights(*models)
    assert again.state_dict() == plugin.state_dict()
    static = host.FabricPlugin(loss_scale=4)
    static.load_state_dict(saved)
    assert "the loss scale starts anew, at 4" in caplog.text


def test_parameter_of_no_module(host, net, batch):
    model, temperature = net(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    _, fabric, wrapped, optimizer = setup(host, model, optimizer, loss_scale=8)
    fabric.backward(F.cross_entropy(wrapped(batch()[0]) * temperature, batch()[1]))
    with pytest.raises(RuntimeError, match=r"shape \(1,\) that is in no module which was set up"):
        optimizer.step()


@pytest.mark.parametrize("scale", [0, -1.0, "dynamc", float("inf"), True])
def test_wrong_scale(host, scale):
    with pytest.raises(ValueError, match="loss_scale must be a positive finite number or"):
        host.FabricPlugin(loss_scale=scale)

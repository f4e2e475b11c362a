import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from hosts import operands
from torch import nn

from cnmix.nn import quantized_modules


def train(fabric, model, optimizer, batch, count):
    losses = []
    for _ in range(count):
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def test_training(host, net, batch):
    plugin = host.FabricPlugin(steps_per_epoch=4)
    fabric = host.start(plugin)
    model = net()
    before = model.fc2.weight.detach().clone()
    wrapped, optimizer = fabric.setup(model, sgd(model))
    losses = train(fabric, wrapped, optimizer, batch, 8)
    assert [fqn for fqn, _ in quantized_modules(model)] == ["conv", "fc1", "fc2"]
    assert losses[-1] < losses[0]
    assert not torch.equal(before, model.fc2.weight)
    assert {module.quantizers.config.steps_per_epoch for _, module in quantized_modules(model)} == {4}
    assert set(wrapped.state_dict()) == set(net().state_dict())
    assert plugin.precision == "32-true"


@pytest.mark.parametrize("loaded", ["before setup", "after setup"])
def test_state(host, net, batch, same_weights, tmp_path, loaded):
    plugin = host.FabricPlugin(steps_per_epoch=3)
    assert plugin.state_dict() == {}
    fabric = host.start(plugin)
    model = net()
    wrapped, optimizer = fabric.setup(model, sgd(model))
    train(fabric, wrapped, optimizer, batch, 5)
    fabric.save(tmp_path / "a.ckpt", {"model": wrapped, "cnmix": plugin.state_dict()})
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    train(fabric, wrapped, optimizer, batch, 5)

    plugin2 = host.FabricPlugin(steps_per_epoch=3)
    again = net(9)
    again.load_state_dict(saved["model"], strict=True)
    other = host.start(plugin2)
    if loaded == "before setup":
        plugin2.load_state_dict(saved["cnmix"])
        assert plugin2.state_dict() == saved["cnmix"]
    wrapped2, optimizer2 = other.setup(again, sgd(again))
    if loaded == "after setup":
        plugin2.load_state_dict(saved["cnmix"])
    assert plugin2.state_dict() == saved["cnmix"]
    train(other, wrapped2, optimizer2, batch, 5)
    assert same_weights(model, again)
    assert plugin2.state_dict() == plugin.state_dict()


@pytest.mark.parametrize("loaded_after", [0, 1, 2])
def test_state_of_several_models(host, net, batch, loaded_after):
    models, plugin = [net(), net(1)], host.FabricPlugin()
    fabric = host.start(plugin)
    for steps, model in enumerate(models, start=2):
        train(fabric, *fabric.setup(model, sgd(model)), batch, steps)
    saved = plugin.state_dict()
    assert [each["modules"]["fc1"]["operands"]["input"]["step"] for each in saved["models"]] == [2, 3]

    again, plugin2 = [net(2), net(3)], host.FabricPlugin()
    fabric2 = host.start(plugin2)
    for index, model in enumerate([*again, None]):
        if index == loaded_after:
            plugin2.load_state_dict(saved)
            assert plugin2.state_dict() == saved
        if model is not None:
            fabric2.setup_module(model)
    fabric2.setup_module(again[0])  # twice is once
    assert plugin2.state_dict() == saved
    assert [operands(model) for model in again] == [operands(model) for model in models]


def test_state_of_one_model_as_versions_before_saved_it(host, net, batch, caplog):
    plugin, model, second = host.FabricPlugin(), net(), net(1)
    fabric = host.start(plugin)
    train(fabric, *fabric.setup(model, sgd(model)), batch, 2)
    saved = {"version": 1, "models": [], "loss_scalers": []}
    for each in plugin.state_dict()["models"]:
        modules = {
            fqn: {"settings": part["settings"]["input"], "operands": part["operands"]}
            for fqn, part in each["modules"].items()
        }
        saved["models"].append({"modules": modules})
    other, again = host.FabricPlugin(), net()
    host.start(other).setup_module(again)
    other.load_state_dict(saved)
    assert operands(again) == operands(model)
    host.start(other).setup_module(second)
    other.load_state_dict(saved)
    assert "without a state: the model Net" in caplog.text


def test_state_of_another_model(host, net):
    plugin = host.FabricPlugin(exclude=["fc1"])
    model = net()
    host.start(plugin).setup_module(model)
    other, another = host.FabricPlugin(), net()
    host.start(other).setup_module(another)
    with pytest.raises(ValueError, match="the model has 'fc1', which the state lacks"):
        other.load_state_dict(plugin.state_dict())
    waiting, late = host.FabricPlugin(), net()
    waiting.load_state_dict(plugin.state_dict())
    with pytest.raises(ValueError, match="the model has 'fc1', which the state lacks"):
        host.start(waiting).setup_module(late)
    with pytest.raises(ValueError, match="this is no cnmix state"):
        host.FabricPlugin().load_state_dict({"scale": 1.0})


def test_rules(host, net):
    rules = [{"modules": "fc1", "width": 16}, {"types": "Conv2d", "leave_out": True}]
    model = host.start(host.FabricPlugin(rules=rules)).setup_module(net())
    assert [fqn for fqn, _ in quantized_modules(model.module)] == ["fc1", "fc2"]
    assert model.module.fc1.quantizers.config.max_bitwidth == 16
    with pytest.raises(ValueError, match="neither leave_out nor a setting"):
        host.FabricPlugin(rules=[{"modules": "fc1"}])
    with pytest.raises(TypeError, match="rules must be a list"):
        host.FabricPlugin(rules={"modules": "fc1", "width": 16})


@pytest.mark.parametrize("told", ["before", "after"])
def test_steps_per_epoch_told_later_go_under_the_rules(host, net, told):
    plugin = host.FabricPlugin(rules=[{"modules": "fc1", "steps_per_epoch": 7}])
    model = net()
    if told == "before":
        plugin.set_steps_per_epoch(50)
    host.start(plugin).setup_module(model)
    if told == "after":
        plugin.set_steps_per_epoch(50)
    steps = {fqn: module.quantizers.config.steps_per_epoch for fqn, module in quantized_modules(model)}
    assert steps == {"conv": 50, "fc1": 7, "fc2": 50}


def test_half_flows_between_the_parts_of_a_module(host, net, batch):
    model = net()
    wrapped = host.start(host.FabricPlugin("O2")).setup_module(model)
    seen = []
    model.fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert wrapped(batch()[0]).dtype == torch.float32
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("level", ["O2", "O3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lightning_module_that_computes_its_loss_outside_of_forward(host, level, dtype):
    task = host.Task()
    fabric = host.start(host.FabricPlugin(level, activation_dtype=dtype))
    wrapped, optimizer = fabric.setup(task, sgd(task))
    assert task.fc(torch.randn(2, 64)).dtype == torch.float32
    for _ in range(2):
        optimizer.zero_grad()
        loss = wrapped.training_step((torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])), 0)
        fabric.backward(loss)
        optimizer.step()
    assert loss.dtype == torch.float32


def test_compiled(host, net, batch, same_weights):
    models = [net(), net()]
    for model, given in zip(models, (models[0], torch.compile(models[1], backend="aot_eager")), strict=True):
        fabric = host.start(host.FabricPlugin())
        train(fabric, *fabric.setup(given, sgd(model)), batch, 3)
    assert same_weights(*models)
    torch._dynamo.reset()


def test_picklable_with_its_models(host, net):
    plugin, model = host.FabricPlugin(activation_dtype="float16", rules=[{"types": "Conv2d", "width": 16}]), net()
    host.start(plugin).setup_module(model)
    again = pickle.loads(pickle.dumps(plugin))
    assert repr(again) == repr(plugin)
    assert again.state_dict() == {}
    assert plugin.state_dict() != {}


def test_plain_backward_where_nothing_is_scaled(host, net, batch):
    model = net()
    wrapped, optimizer = host.start(host.FabricPlugin()).setup(model, sgd(model))
    F.cross_entropy(wrapped(batch()[0]), batch()[1]).backward()
    optimizer.step()
    scaled = net()
    wrapped, optimizer = host.start(host.FabricPlugin(loss_scale=8)).setup(scaled, sgd(scaled))
    with pytest.raises(RuntimeError, match=r"requires you to call `fabric.backward\(loss\)`"):
        F.cross_entropy(wrapped(batch()[0]), batch()[1]).backward()


def test_state_of_a_level_in_float32(host, net, caplog):
    plain, fixed, models = host.FabricPlugin("O0"), host.FabricPlugin("O1"), [net(), net()]
    host.start(plain).setup_module(models[0])
    host.start(fixed).setup_module(models[1])
    caplog.set_level(logging.WARNING, logger="cnmix")
    before = fixed.state_dict()
    fixed.load_state_dict(plain.state_dict())
    assert "it is of a float32 run, so operands start anew" in caplog.text
    plain.load_state_dict(before)
    assert "left, as opt_level 'O0' is float32 throughout" in caplog.text
    assert fixed.state_dict() == before
    assert isinstance(models[0].fc1, nn.Linear)

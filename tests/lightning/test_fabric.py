import lightning.fabric
import pytest
import torch
import torch.nn.functional as F

from cnmix.lightning import CnmixPlugin, FabricCnmixPlugin
from cnmix.nn import quantized_modules


def start(plugin):
    return lightning.fabric.Fabric(accelerator="cpu", devices=1, plugins=[plugin])


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


def test_training(net, batch):
    plugin = FabricCnmixPlugin(steps_per_epoch=4)
    fabric = start(plugin)
    model = net()
    before = model.fc2.weight.detach().clone()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    losses = train(fabric, wrapped, optimizer, batch, 8)
    assert [fqn for fqn, _ in quantized_modules(model)] == ["conv", "fc1", "fc2"]
    assert losses[-1] < losses[0]
    assert not torch.equal(before, model.fc2.weight)
    assert {module.quantizers.config.steps_per_epoch for _, module in quantized_modules(model)} == {4}
    assert set(wrapped.state_dict()) == set(net().state_dict())


def test_state(net, batch, same_weights, tmp_path):
    torch.set_num_threads(1)
    plugin = FabricCnmixPlugin(steps_per_epoch=3)
    assert plugin.state_dict() == {}
    fabric = start(plugin)
    model = net()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    train(fabric, wrapped, optimizer, batch, 5)
    fabric.save(tmp_path / "a.ckpt", {"model": wrapped, "cnmix": plugin.state_dict()})
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    train(fabric, wrapped, optimizer, batch, 5)

    plugin2 = FabricCnmixPlugin(steps_per_epoch=3)
    again = net(9)
    again.load_state_dict(saved["model"], strict=True)
    other = start(plugin2)
    wrapped2, optimizer2 = other.setup(again, torch.optim.SGD(again.parameters(), lr=0.05))
    plugin2.load_state_dict(saved["cnmix"])
    assert plugin2.state_dict() == saved["cnmix"]
    train(other, wrapped2, optimizer2, batch, 5)
    assert same_weights(model, again)
    assert plugin2.state_dict() == plugin.state_dict()


def test_state_of_another_model(net):
    plugin = FabricCnmixPlugin(exclude=["fc1"])
    model = net()
    start(plugin).setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    state = plugin.state_dict()
    other = FabricCnmixPlugin()
    start(other).setup(net(), torch.optim.SGD(model.parameters(), lr=0.05))
    with pytest.raises(ValueError, match="the model has 'fc1', which the state lacks"):
        other.load_state_dict(state)


def test_trainer_plugin_is_a_fabric_plugin_too():
    assert issubclass(CnmixPlugin, FabricCnmixPlugin)
    assert FabricCnmixPlugin.precision == CnmixPlugin.precision == "32-true"


def test_bad_arguments_at_construction():
    with pytest.raises(ValueError, match="bitwidth must be one of"):
        FabricCnmixPlugin(bitwidth=4)


def test_rules(net):
    rules = [{"modules": "fc1", "width": 16}, {"types": "Conv2d", "leave_out": True}]
    model = start(FabricCnmixPlugin(rules=rules)).setup_module(net())
    assert [fqn for fqn, _ in quantized_modules(model.module)] == ["fc1", "fc2"]
    assert model.module.fc1.quantizers.config.max_bitwidth == 16
    with pytest.raises(ValueError, match="neither leave_out nor a setting"):
        FabricCnmixPlugin(rules=[{"modules": "fc1"}])
    with pytest.raises(TypeError, match="rules must be a list"):
        FabricCnmixPlugin(rules={"modules": "fc1", "width": 16})

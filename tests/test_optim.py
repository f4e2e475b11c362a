import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnmix
from cnmix.optim import LossScaler, scalers_of


@pytest.fixture
def dynamic(net):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    cnmix.initialize(model, optimizer, loss_scale="dynamic")
    return model, optimizer


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_overflow_skips_the_step_and_halves_the_scale(dynamic, step, backward, caplog, factor):
    model, optimizer = dynamic
    step(model, optimizer)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(dict(model.named_parameters()))
    with caplog.at_level(logging.INFO, logger="cnmix"):
        for halvings in (1, 2):
            optimizer.zero_grad()
            backward(model, optimizer, factor=factor)
            optimizer.step()
            assert scalers_of(optimizer)[0].scale == 2.0 ** (16 - halvings)
    assert "step skipped, loss scale now 16384" in caplog.text
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][index][name]) for name, value in moments.items())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert scalers_of(optimizer)[0].steps_without_overflow == 0
    step(model, optimizer)
    assert not torch.equal(model.fc2.weight, weights["fc2.weight"])


def test_overflow_of_one_micro_batch_skips_the_whole_step(dynamic, backward):
    model, optimizer = dynamic
    weight = model.fc2.weight.detach().clone()
    backward(model, optimizer, factor=float("inf"))
    backward(model, optimizer)
    optimizer.step()
    assert torch.equal(model.fc2.weight, weight)
    assert scalers_of(optimizer)[0].scale == 2.0**15


def test_scale_doubles_after_2000_steps(dynamic, step, monkeypatch):
    model, optimizer = dynamic
    scaler = scalers_of(optimizer)[0]
    monkeypatch.setattr(scaler, "steps_without_overflow", 1998)
    step(model, optimizer)
    assert scaler.scale == 2.0**16
    step(model, optimizer)
    assert scaler.scale == 2.0**17
    assert scaler.steps_without_overflow == 0


def test_gradients_keep_their_meaning_when_the_scale_changes(dynamic, backward):
    model, optimizer = dynamic
    model.eval()
    backward(model, optimizer)
    once = model.fc2.weight.grad.clone()
    scalers_of(optimizer)[0].scale /= 2
    backward(model, optimizer)
    assert torch.equal(model.fc2.weight.grad, 2 * once)


@pytest.mark.parametrize("first_step_skipped", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_scheduler_around_a_skipping_step(net, backward, order, first_step_skipped):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def make():
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)

    scheduler = make() if order == "before" else None
    cnmix.initialize(model, optimizer, loss_scale="dynamic")
    scheduler = scheduler or make()
    for index in range(3):
        optimizer.zero_grad()
        backward(model, optimizer, factor=float("inf") if first_step_skipped and index == 0 else 1.0)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0125
    assert scalers_of(optimizer)[0].scale == 2.0 ** (15 if first_step_skipped else 16)


def test_lbfgs_closure_with_a_static_scale(net, batch):
    losses = {}
    for scale in (1.0, 32.0):
        model = net().eval()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        cnmix.initialize(model, optimizer, loss_scale=scale, max_bitwidth=8)
        x, y = batch()

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            with cnmix.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
            return loss

        losses[scale] = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[1.0] == losses[32.0]
    assert losses[1.0][-1] < losses[1.0][0]


def test_several_optimizers(net, backward):
    model = net()
    optimizers = [
        torch.optim.SGD([*model.conv.parameters(), *model.bn.parameters()], lr=0.1),
        torch.optim.Adam([*model.fc1.parameters(), *model.fc2.parameters()], lr=0.01),
    ]
    same_model, same_optimizers = cnmix.initialize(model, optimizers, loss_scale="dynamic")
    assert same_model is model
    assert same_optimizers is optimizers
    before = copy.deepcopy(dict(model.named_parameters()))
    backward(model, optimizers)
    for optimizer in optimizers:
        optimizer.step()
    assert not torch.equal(before["conv.weight"], model.conv.weight)
    assert not torch.equal(before["fc2.weight"], model.fc2.weight)
    scalers_of(optimizers[0])[0].scale = 4.0
    with (
        pytest.raises(ValueError, match="different loss scales"),
        cnmix.scale_loss(torch.ones(()), optimizers),
    ):
        pass


def test_optimizers_that_share_a_parameter(net, backward):
    gradients = []
    for scale in (1.0, 64.0):
        model = net().eval()
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model.fc2.parameters(), lr=0.1)]
        cnmix.initialize(model, optimizers, loss_scale=scale, max_bitwidth=8)
        backward(model, optimizers)
        gradients.append(model.fc2.weight.grad)
    assert torch.equal(*gradients)


def test_sparse_gradients():
    embedding = nn.Embedding(10, 4, sparse=True)
    model = nn.Sequential(embedding, nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for scale in (8.0, "dynamic"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cnmix.initialize(model, optimizer, loss_scale=scale)
        for _ in range(2):
            optimizer.zero_grad()
            with cnmix.scale_loss(model(torch.tensor([1, 1, 3])).sum(), optimizer) as scaled:
                scaled.backward()
            optimizer.step()
    assert embedding.weight.grad.is_sparse


def test_unused_parameters_and_none_gradients(net, backward):
    model = net()
    unused = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([*model.parameters(), unused], lr=0.1)
    cnmix.initialize(model, optimizer, loss_scale="dynamic")
    backward(model, optimizer)
    optimizer.step()
    assert unused.grad is None


class ClippingSGD(torch.optim.SGD):
    """Clips and updates one parameter after the other within ``step``, as BertAdam does."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                nn.utils.clip_grad_norm_(param, 0.1)
                param.sub_(group["lr"] * param.grad)


def test_optimizer_that_clips_within_step(net, step, same_weights):
    models = []
    for loss_scale in (1.0, 1024.0, "dynamic"):
        model = net()
        optimizer = ClippingSGD(model.parameters(), lr=0.1)
        cnmix.initialize(model, optimizer, loss_scale=loss_scale, max_bitwidth=8)
        step(model, optimizer)
        models.append(model)
    assert same_weights(models[0], models[1])
    assert same_weights(models[0], models[2])


def test_scaler_state():
    scaler = LossScaler("dynamic")
    scaler.overflow = True
    scaler.adjust()
    assert scaler.scale == 2.0**15
    again = LossScaler("dynamic")
    again.load_state_dict(scaler.state_dict())
    assert again.state_dict() == scaler.state_dict()
    with pytest.raises(ValueError, match="must have exactly"):
        again.load_state_dict({"scale": 2.0})
    with pytest.raises(ValueError, match='saved loss scale is "dynamic", and initialize was given a number'):
        LossScaler(2.0).load_state_dict(scaler.state_dict())


@pytest.mark.parametrize("scale", ["dynamic", 8.0])
def test_a_step_within_the_block_is_refused(net, batch, scale):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnmix.initialize(model, optimizer, loss_scale=scale)
    before = model.fc2.weight.detach().clone()
    x, y = batch()
    with cnmix.scale_loss(F.cross_entropy(model(x), y), optimizer) as scaled:
        scaled.backward()
        with pytest.raises(RuntimeError, match=r"SGD\.step\(\) within a scale_loss block"):
            optimizer.step()
    assert torch.equal(model.fc2.weight, before)
    optimizer.step()
    assert not torch.equal(model.fc2.weight, before)

import copy
import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnmix
from cnmix.nn import OPERANDS, quantized_modules

LEVELS = {
    "O0": {},
    "O1": {},
    "O1 stochastic": {"rounding": "stochastic"},
    "O2": {},
    "O2 float16": {"activation_dtype": "float16"},
    "O3": {},
    "O3 stochastic gradients": {"rules": [{"modules": "*", "operands": "grad_output", "rounding": "stochastic"}]},
    "O1 options": {"saturation": 0.001, "narrowing": 0.5},
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def ready(net, level, seed=0):
    model = net(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    settings = {"loss_scale": "dynamic", "steps_per_epoch": 4, "quantify_rate": 0.5, **LEVELS[level]}
    return cnmix.initialize(model, optimizer, level[:2], **settings)


# What happens before each optimizer step: the factors of the loss in its micro-batches.
STEPS = [(1.0,), (1.0, 2.0), (float("inf"),), (1.0, 1.0, 1.0), (1.0, float("inf")), (1.0,), (1.0, 2.0)]


def passes():
    """Yields (seed, factor, whether the optimizer steps behind it)."""
    seed = 0
    for factors in STEPS:
        for number, factor in enumerate(factors, start=1):
            yield seed, factor, number == len(factors)
            seed += 1


def train(backward, model, optimizer, chosen):
    for seed, factor, ends in chosen:
        backward(model, optimizer, seed, factor)
        if ends:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("level", LEVELS)
def test_resuming_anywhere_is_bit_equal(net, backward, same_weights, tmp_path, level):
    """After a step, between micro-batches, and between an overflow and the step that it skips."""
    every = list(passes())
    model, optimizer = ready(net, level)
    train(backward, model, optimizer, every)
    expected, expected_state = model, cnmix.state_dict(model)
    expected_scalers = cnmix.state_dict()["loss_scalers"]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    registry_clear()
    for stop in range(1, len(every)):
        torch.manual_seed(7)
        model, optimizer = ready(net, level)
        torch.manual_seed(8)
        train(backward, model, optimizer, every[:stop])
        saved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "cnmix": cnmix.state_dict(),
            "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        }
        torch.save(saved, tmp_path / "last.pt")
        del model, optimizer, saved
        registry_clear()
        saved = torch.load(tmp_path / "last.pt", weights_only=True)
        torch.manual_seed(9)
        model, optimizer = ready(net, level, seed=5)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        assert cnmix.load_state_dict(saved["cnmix"]) == []
        for name, parameter in model.named_parameters():
            parameter.grad = saved["gradients"].get(name)
        train(backward, model, optimizer, every[stop:])
        assert same_weights(model, expected)
        assert all(equal(p.grad, gradients[name]) for name, p in model.named_parameters())
        assert cnmix.state_dict(model) == expected_state
        assert cnmix.state_dict()["loss_scalers"] == expected_scalers
        del model, optimizer
        registry_clear()


def registry_clear():
    """Forgets the models of before, as a new process would."""
    from cnmix.registry import Registry, registry

    gc.collect()
    for name, value in vars(Registry()).items():
        setattr(registry, name, value)


def equal(a, b):
    return a is b is None or torch.equal(a, b)


def test_the_steps_of_that_test_overflow_and_widen(net, backward):
    model, optimizer = ready(net, "O1")
    train(backward, model, optimizer, passes())
    assert cnmix.state_dict()["loss_scalers"][0][0]["scale"] == 2.0**14
    assert (
        len({quantizer.state.bits for _, module in quantized_modules(model) for _, quantizer in module.quantizers}) > 1
    )


def test_what_could_not_be_placed_is_reported(net, step, caplog):
    models = [net(0), net(1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    cnmix.initialize(models, optimizers)
    state = cnmix.state_dict()
    assert cnmix.load_state_dict(state) == []
    del models, optimizers
    registry_clear()

    waiting = cnmix.load_state_dict(state)
    assert waiting == [
        "waiting for cnmix.initialize: the state of a model with 'conv', 'fc1', 'fc2'",
        "waiting for cnmix.initialize: the state of a model with 'conv', 'fc1', 'fc2'",
        "waiting for cnmix.initialize: the state of the loss scales of an optimizer",
        "waiting for cnmix.initialize: the state of the loss scales of an optimizer",
    ]
    model = net(2)
    cnmix.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with caplog.at_level(logging.WARNING):
        cnmix.state_dict()
    assert "1 models of the state that was loaded were not initialized yet" in caplog.text

    further = net(3), net(4)
    cnmix.initialize(list(further), None)
    caplog.clear()
    assert cnmix.load_state_dict({**state, "loss_scalers": []}) == ["without a state: the model Net"]
    assert "without a state: the model Net" in caplog.text
    one = {**state, "models": state["models"][:1]}
    assert cnmix.load_state_dict(one, model) == ["left: the loss scales of 2 optimizers, as one model was given"]


def test_loading_that_is_not_strict_restores_what_both_have(net, step):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnmix.initialize(model, optimizer)
    step(model, optimizer)
    state = cnmix.state_dict(model)
    other = net(1)
    other.fc2 = nn.Sequential(nn.Linear(8, 3))
    cnmix.initialize(other, None, exclude=["conv"])
    before = cnmix.state_dict(other)
    with pytest.raises(ValueError, match=r"the state has 'conv', 'fc2', which .*; the model has 'fc2\.0', which"):
        cnmix.load_state_dict(state, other)
    assert cnmix.state_dict(other) == before
    assert cnmix.load_state_dict(state, other, strict=False) == [
        "the state has 'conv', 'fc2', which the model does not compute in fixed point",
        "the model has 'fc2.0', which the state lacks",
    ]
    assert other.fc1.quantizers.state_dict() == model.fc1.quantizers.state_dict()
    assert other.fc2[0].quantizers.input.state.step == 0


def test_a_state_of_version_1(net, step):
    """What cnmix saved before settings were per operand."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnmix.initialize(model, optimizer, loss_scale="dynamic")
    step(model, optimizer)
    state = cnmix.state_dict()
    old = copy.deepcopy(state)
    old["version"] = 1
    for module in old["models"][0]["modules"].values():
        module["settings"] = module["settings"]["input"]
        del module["drawn_weight"]
        for operand in OPERANDS:
            del module["operands"][operand]["saturation"]
    (old["loss_scalers"][0],) = old["loss_scalers"][0]
    del old["loss_scalers"][0]["pending"]
    step(model, optimizer, 1)
    assert cnmix.load_state_dict(old) == []
    assert cnmix.state_dict() == state


def test_one_scale_for_each_loss(net, batch, caplog):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnmix.initialize(model, optimizer, loss_scale="dynamic", num_losses=3)

    def backward(loss_id, seed, factor=1.0):
        x, y = batch(seed)
        with cnmix.scale_loss(F.cross_entropy(model(x), y) * factor, optimizer, loss_id=loss_id) as scaled:
            scaled.backward()

    def scales():
        return [(each["scale"], each["steps_without_overflow"]) for each in cnmix.state_dict()["loss_scalers"][0]]

    backward(0, 0)
    backward(1, 1)
    optimizer.step()
    assert scales() == [(2.0**16, 1), (2.0**16, 1), (2.0**16, 0)]  # the third took no part
    optimizer.zero_grad()
    before = model.fc2.weight.detach().clone()
    backward(0, 2, factor=float("inf"))
    backward(1, 3)  # sees the infinities of the first, and is not blamed for them
    caplog.clear()
    optimizer.step()
    assert torch.equal(model.fc2.weight, before)
    assert scales() == [(2.0**15, 0), (2.0**16, 1), (2.0**16, 0)]
    assert caplog.text.count("gradient overflow") == 1
    assert "loss scale now 32768, 65536, 65536" in caplog.text
    state = cnmix.state_dict()
    optimizer.zero_grad()
    backward(2, 4)
    optimizer.step()
    assert not torch.equal(model.fc2.weight, before)
    cnmix.load_state_dict(state)
    assert cnmix.state_dict() == state

    for loss_id in (3, -1, "a"):
        with pytest.raises(ValueError, match="num_losses=3"), cnmix.scale_loss(torch.ones(()), optimizer, loss_id):
            pass
    with pytest.raises(ValueError, match="num_losses=3 and not 2"):
        cnmix.initialize(model, optimizer, num_losses=2)
    other = net(1)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="num_losses must be a whole number"):
        cnmix.initialize(other, sgd, num_losses=0)
    registry_clear()
    cnmix.load_state_dict({**state, "models": []})
    with pytest.raises(ValueError, match="3 losses of an optimizer are saved, and num_losses is 2"):
        cnmix.initialize(other, sgd, num_losses=2, loss_scale="dynamic")


def test_gradients_of_several_losses_are_their_sum(net, batch):
    gradients = []
    for scale in (1.0, "dynamic"):
        model = net().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cnmix.initialize(model, optimizer, loss_scale=scale, num_losses=2)
        x, y = batch()
        losses = F.cross_entropy(model(x), y), model(x).square().mean()
        for loss_id, loss in enumerate(losses):
            with cnmix.scale_loss(loss, optimizer, loss_id) as scaled:
                scaled.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_closure_with_an_overflow_is_evaluated_again(net, batch, caplog):
    weights = []
    for factor in (1.0, 2.0**120):
        model = net().eval()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        cnmix.initialize(model, optimizer, loss_scale="dynamic", max_bitwidth=8)
        x, y = batch()

        def closure(model=model, optimizer=optimizer, x=x, y=y, factor=factor):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * factor
            with cnmix.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
            for parameter in model.parameters():
                parameter.grad /= factor
            return loss / factor

        caplog.clear()
        assert all(torch.isfinite(optimizer.step(closure)) for _ in range(2))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert caplog.text.count("closure evaluated again") == 1
    assert cnmix.state_dict()["loss_scalers"][-1][0]["scale"] < 2.0**8
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_closure_whose_gradients_are_never_finite_ends(net, caplog):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnmix.initialize(model, optimizer, loss_scale="dynamic")

    def closure():
        with cnmix.scale_loss(model.fc1.weight.sum() * float("nan"), optimizer) as scaled:
            scaled.backward()

    before = model.fc1.weight.detach().clone()
    assert optimizer.step(closure) is None
    assert torch.equal(model.fc1.weight, before)
    assert caplog.text.count("gradient overflow") == 1
    assert "step skipped, loss scale now 5.96046e-08" in caplog.text

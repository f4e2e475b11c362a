import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnmix
from cnmix.nn import quantized_modules
from cnmix.optim import LossScaler


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def is_plain(model):
    return not list(quantized_modules(model)) and type(model.fc1) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"opt_level": "o1"}, ValueError, "did you mean 'O1'"),
        ({"opt_level": "O7"}, ValueError, "unknown opt_level 'O7': this version has O0, O1"),
        ({"opt_level": 1}, ValueError, "unknown opt_level 1"),
        ({"bitwidht": 8}, ValueError, "unknown setting 'bitwidht': did you mean 'bitwidth'"),
        ({"treshold": 0.1}, ValueError, "did you mean 'threshold'"),
        ({"bitwidth": 9}, ValueError, "bitwidth must be one of 8, 16, 31"),
        ({"max_bitwidth": True}, ValueError, "max_bitwidth"),
        ({"bitwidth": 16, "max_bitwidth": 8}, ValueError, "bitwidth 16 is over max_bitwidth 8"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be a whole number"),
        ({"steps_per_epoch": 2.5}, ValueError, "steps_per_epoch must be a whole number"),
        ({"loss_scale": 0}, ValueError, "loss_scale must be a positive finite number"),
        ({"loss_scale": -2.0}, ValueError, "got -2.0"),
        ({"loss_scale": math.inf}, ValueError, "got inf"),
        ({"loss_scale": math.nan}, ValueError, "got nan"),
        ({"loss_scale": True}, ValueError, "got True"),
        ({"loss_scale": "dynamcal"}, ValueError, "got 'dynamcal'"),
        ({"exclude": ["fc3"]}, ValueError, "no module is called 'fc3': did you mean 'fc1'|'fc2'"),
        ({"exclude": "fc1"}, TypeError, r"write \['fc1'\]"),
    ],
)
def test_bad_argument_changes_nothing(net, arguments, error, message):
    model = net()
    optimizer = sgd(model)
    step = optimizer.step
    with pytest.raises(error, match=message):
        cnmix.initialize(model, optimizer, **{"opt_level": "O1", **arguments})
    assert is_plain(model)
    assert optimizer.step == step
    assert cnmix.state_dict() == {"version": 2, "models": [], "loss_scalers": []}
    cnmix.initialize(model, optimizer)
    assert [fqn for fqn, _ in quantized_modules(model)] == ["conv", "fc1", "fc2"]


def test_wrong_objects_change_nothing(net):
    model = net()
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, or a list of them, got dict"):
        cnmix.initialize([model, {}], None)
    with pytest.raises(TypeError, match="takes a torch optimizer, a list of them or None, got Net"):
        cnmix.initialize(model, net())
    with pytest.raises(ValueError, match=r"the weight of 'conv' has dtype torch\.float64"):
        cnmix.initialize(copy.deepcopy(model).double())
    assert is_plain(model)


def test_bad_second_model_leaves_the_first(net):
    first, second = net(), net()
    second.fc2.double()
    with pytest.raises(ValueError, match=r"the weight of 'fc2' has dtype torch\.float64"):
        cnmix.initialize([first, second], sgd(first))
    assert is_plain(first)
    assert cnmix.state_dict()["models"] == []
    assert cnmix.state_dict()["loss_scalers"] == []


def test_scale_loss_needs_an_initialized_optimizer(net):
    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model)
    with (
        pytest.raises(RuntimeError, match="got a SGD that was not initialized"),
        cnmix.scale_loss(torch.ones(()), optimizer),
    ):
        pass
    with pytest.raises(RuntimeError, match="needs the optimizer"), cnmix.scale_loss(torch.ones(()), None):
        pass


def test_second_call_is_idempotent(net, step):
    model = net()
    optimizer = sgd(model)
    for _ in range(3):
        cnmix.initialize(model, optimizer, "O1", loss_scale="dynamic", steps_per_epoch=7)
        step(model, optimizer)
    state = cnmix.state_dict()
    assert len(state["models"]) == len(state["loss_scalers"]) == 1
    assert state["loss_scalers"][0][0]["steps_without_overflow"] == 3
    assert state["models"][0]["modules"]["fc1"]["operands"]["weight"]["step"] == 3


@pytest.mark.parametrize("other", [{"opt_level": "O0"}, {"bitwidth": 16}, {"exclude": ["fc1"]}, {"loss_scale": 128.0}])
def test_second_call_with_other_settings(net, other):
    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, loss_scale=2.0)
    before = cnmix.state_dict()
    with pytest.raises(ValueError, match="initialized before"):
        cnmix.initialize(model, optimizer, **{"loss_scale": 2.0, **other})
    assert cnmix.state_dict() == before


def test_o0_keeps_float32(net, step, same_weights):
    plain, ours = net(), net()
    optimizer = sgd(ours)
    cnmix.initialize(ours, optimizer, "O0")
    assert is_plain(ours)
    step(ours, optimizer)
    cnmix.initialize(plain, float_optimizer := sgd(plain), "O0")
    step(plain, float_optimizer)
    assert same_weights(plain, ours)
    assert cnmix.state_dict(ours)["models"] == [{"modules": {}}]


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, "got NoneType"),
        ({}, ValueError, "this is no cnmix state"),
        ({"state_dict": {}, "epoch": 3}, ValueError, r"it has the keys \['epoch', 'state_dict'\]"),
        ({"version": 3, "models": [], "loss_scalers": []}, ValueError, "version 3, and this cnmix reads up to 2"),
        ({"version": "1", "models": [], "loss_scalers": []}, ValueError, "version '1'"),
        ({"version": 1, "models": [{}], "loss_scalers": []}, ValueError, "a model in it has no modules"),
        ({"version": 1, "models": [{"modules": {"a": 1}}], "loss_scalers": []}, ValueError, "the saved state of 'a'"),
        ({"version": 1, "models": [], "loss_scalers": [{"scale": 1.0}]}, ValueError, "saved loss scale must have"),
        ({"version": 1, "models": None, "loss_scalers": []}, ValueError, "no cnmix state"),
    ],
)
def test_bad_state_changes_nothing(net, step, state, error, message):
    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, loss_scale="dynamic")
    step(model, optimizer)
    before = cnmix.state_dict()
    with pytest.raises(error, match=message):
        cnmix.load_state_dict(state)
    assert cnmix.state_dict() == before


def test_bad_second_loss_scale_leaves_the_first(net):
    models = [net(), net()]
    optimizers = [sgd(model) for model in models]
    cnmix.initialize(models, optimizers, loss_scale=4.0)
    state = cnmix.state_dict()
    state["loss_scalers"][0][0]["scale"] = 32.0
    state["loss_scalers"][1][0]["dynamic"] = True
    with pytest.raises(ValueError, match='the saved loss scale is "dynamic"'):
        cnmix.load_state_dict(state)
    assert [scaler["scale"] for (scaler,) in cnmix.state_dict()["loss_scalers"]] == [4.0, 4.0]


@pytest.mark.parametrize("order", ["before", "after"])
def test_state_of_another_model(net, order):
    other = nn.Sequential(nn.Linear(3, 3))
    cnmix.initialize(other)
    state = cnmix.state_dict(other)
    del other
    gc.collect()
    model = net()
    if order == "before":
        cnmix.load_state_dict(state)
        with pytest.raises(ValueError, match=r"the state has '0', .*; the model has 'conv', 'fc1', 'fc2'"):
            cnmix.initialize(model)
        assert is_plain(model)
    else:
        cnmix.initialize(model)
        before = cnmix.state_dict()
        for arguments in ((), (model,)):
            with pytest.raises(ValueError, match=r"the state has '0', .*; the model has 'conv', 'fc1', 'fc2'"):
                cnmix.load_state_dict(state, *arguments)
        assert cnmix.state_dict() == before


def test_round_trip_with_states_that_wait(net, step, tmp_path):
    models = [net(0), net(1)]
    optimizers = [sgd(model) for model in models]
    cnmix.initialize(models, optimizers, loss_scale="dynamic")
    for count, (model, optimizer) in enumerate(zip(models, optimizers, strict=True), start=1):
        for seed in range(count):
            step(model, optimizer, seed)
    torch.save(cnmix.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state == cnmix.state_dict()

    del models[:], optimizers[:], model, optimizer
    gc.collect()
    first, second = net(2), net(3)
    first_optimizer, second_optimizer = sgd(first), sgd(second)
    cnmix.initialize(first, first_optimizer, loss_scale="dynamic")
    cnmix.load_state_dict(state)
    assert cnmix.state_dict() == {**state, "models": state["models"][:1], "loss_scalers": state["loss_scalers"][:1]}
    cnmix.initialize(second, second_optimizer, loss_scale="dynamic")
    assert cnmix.state_dict() == state


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("load", ["before", "after"])
def test_resumed_training_is_bit_exact(net, step, batch, same_weights, tmp_path, load, evaluate):
    settings = {"opt_level": "O1", "steps_per_epoch": 5, "quantify_rate": 0.2, "loss_scale": "dynamic"}

    def epoch(model, optimizer, number, evaluated=False):
        for index in range(5):
            step(model, optimizer, 5 * number + index)
        if evaluated:
            with torch.no_grad():
                model.fc1(torch.full((2, 64), 1e4))
                model.eval()
                model(100 * batch(99)[0])
            model(batch(98)[0]).sum().backward()
            model.train()

    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, **settings)
    for number in range(3):
        epoch(model, optimizer, number)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cnmix": cnmix.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pth")
    widths = {quantizer.state.bits for _, module in quantized_modules(model) for _, quantizer in module.quantizers}
    assert len(widths) > 1
    for number in range(3, 6):
        epoch(model, optimizer, number)
    expected_state, expected = cnmix.state_dict(), copy.deepcopy(model.state_dict())
    plain = net(1)
    plain.load_state_dict(expected)
    del model, optimizer, saved
    gc.collect()

    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    resumed = net(9)
    resumed.load_state_dict(saved["model"])
    optimizer = sgd(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    if load == "before":
        cnmix.load_state_dict(saved["cnmix"])
    cnmix.initialize(resumed, optimizer, **settings)
    if load == "after":
        cnmix.load_state_dict(saved["cnmix"])
    for number in range(3, 6):
        epoch(resumed, optimizer, number, evaluate)
    assert same_weights(resumed, plain)
    assert cnmix.state_dict() == expected_state


def test_waiting_loss_scale_of_another_kind(net):
    cnmix.load_state_dict({"version": 2, "models": [], "loss_scalers": [[LossScaler("dynamic").state_dict()]]})
    model = net()
    with pytest.raises(ValueError, match='saved loss scale is "dynamic", and initialize was given a number'):
        cnmix.initialize(model, sgd(model), loss_scale=2.0)
    assert is_plain(model)


def test_registry_keeps_nothing_alive(net, step):
    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, loss_scale="dynamic")
    step(model, optimizer)
    references = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert cnmix.state_dict() == {"version": 2, "models": [], "loss_scalers": []}


def test_exception_within_scale_loss_leaves_accumulated_gradients(net, batch):
    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, loss_scale=64.0)
    x, y = batch()
    with cnmix.scale_loss(F.cross_entropy(model(x), y), optimizer) as scaled:
        scaled.backward()
    before = model.fc2.weight.grad.clone()
    with pytest.raises(RuntimeError, match="out of memory"), cnmix.scale_loss(torch.ones(()), optimizer):
        raise RuntimeError("out of memory")
    assert torch.equal(model.fc2.weight.grad, before)


def test_checkpoint_before_the_first_step(net, step, same_weights, tmp_path):
    model, again = net(), net(7)
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer)
    torch.save({"model": model.state_dict(), "cnmix": cnmix.state_dict()}, tmp_path / "start.pth")
    saved = torch.load(tmp_path / "start.pth", weights_only=True)
    again.load_state_dict(saved["model"], strict=True)
    cnmix.initialize(again, second := sgd(again))
    cnmix.load_state_dict(saved["cnmix"], again)
    for seed in range(3):
        step(model, optimizer, seed)
        step(again, second, seed)
    assert same_weights(model, again)


def test_state_over_the_largest_width_is_refused(net, batch):
    wide, narrow = net(), net()
    cnmix.initialize(wide, None, bitwidth=16)
    wide(batch()[0])
    state = cnmix.state_dict(wide)
    cnmix.initialize(narrow, None, max_bitwidth=8)
    with pytest.raises(ValueError, match="input of 'conv' is saved at int16, over max_bitwidth 8"):
        cnmix.load_state_dict(state, narrow)


def test_resume_with_stochastic_rounding_draws_the_same_numbers(net, step):
    def build():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        cnmix.initialize(model, optimizer, rounding="stochastic", steps_per_epoch=4)
        return model, optimizer

    torch.set_num_threads(1)
    model, optimizer = build()
    for seed in range(3):
        step(model, optimizer, seed)
    saved = model.state_dict(), cnmix.state_dict(model)
    saved = ({key: value.clone() for key, value in saved[0].items()}, saved[1])
    step(model, optimizer, 3)
    torch.manual_seed(99)
    again, other = build()
    torch.manual_seed(98)
    again.load_state_dict(saved[0])
    cnmix.load_state_dict(saved[1], again)
    step(again, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_second_call_for_another_model_keeps_the_optimizers_loss_scale(net):
    first, second = net(), net()
    optimizer = sgd(first)
    cnmix.initialize(first, optimizer, loss_scale=64.0)
    cnmix.initialize(second, optimizer)
    assert cnmix.state_dict()["loss_scalers"][0][0]["scale"] == 64.0


def test_the_same_object_twice_is_one(net, step):
    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, loss_scale="dynamic")
    step(model, optimizer)
    state = cnmix.state_dict()
    del model, optimizer
    gc.collect()
    model = net()
    optimizer = sgd(model)
    assert len(cnmix.load_state_dict(state)) == 2
    wrapped = nn.DataParallel(model)
    cnmix.initialize([model, model, wrapped], [optimizer, optimizer], loss_scale="dynamic")
    assert cnmix.state_dict() == state
    step(model, optimizer)
    assert cnmix.state_dict()["loss_scalers"][0][0]["steps_without_overflow"] == 2


def test_a_state_that_waits_for_another_model_can_be_dropped(net, caplog):
    other = nn.Sequential(nn.Linear(3, 3))
    cnmix.initialize(other)
    state = cnmix.state_dict()
    del other
    gc.collect()
    with caplog.at_level("INFO"):
        cnmix.load_state_dict(state)
    assert "waiting for cnmix.initialize: the state of a model with '0'" in caplog.text
    with pytest.raises(ValueError, match=r"to drop it: cnmix\.load_state_dict\(cnmix\.state_dict\(\)\)"):
        cnmix.initialize(net())
    cnmix.load_state_dict(cnmix.state_dict())
    cnmix.initialize(net())


def test_strict_loading_is_remembered_by_what_waits(net, step):
    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer)
    step(model, optimizer)
    state = {**cnmix.state_dict(), "loss_scalers": []}
    del model, optimizer
    gc.collect()
    cnmix.load_state_dict(state, strict=False)
    model = net()
    cnmix.initialize(model, exclude=["conv"])
    assert model.fc1.quantizers.input.state.step == 1


def test_an_optimizer_without_a_saved_scale_is_reported(net):
    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer)
    state = {**cnmix.state_dict(), "loss_scalers": []}
    assert cnmix.load_state_dict(state) == ["without a loss scale: the optimizer SGD"]


def test_parts_that_were_initialized_otherwise(net):
    for first, then, changes in (
        ({}, {"max_bitwidth": 8}, "fc1"),
        ({}, {"exclude": ["fc1"]}, "fc1"),
        ({}, {"rules": [{"modules": "fc1", "width": 16}]}, "fc1"),
        ({"opt_level": "O2"}, {"max_bitwidth": 16}, "fc1"),
        ({}, {"opt_level": "O0"}, "fc1"),
    ):
        model = net()
        cnmix.initialize(model.fc1, None, **first)
        with pytest.raises(ValueError, match=f"'{changes}' of this Net was initialized before, with other settings"):
            cnmix.initialize(model, None, **then)
        assert type(model.conv) is nn.Conv2d
    model = net()
    cnmix.initialize(model.fc1, None, steps_per_epoch=3)
    cnmix.initialize(model, None, steps_per_epoch=5)


def test_scaling_within_scaling_is_refused(net):
    model = net()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, loss_scale=8.0, num_losses=2)
    with (
        cnmix.scale_loss(torch.ones(()), optimizer),
        pytest.raises(RuntimeError, match="within scale_loss of the same optimizer"),
        cnmix.scale_loss(torch.ones(()), optimizer, loss_id=1),
    ):
        pass
    with cnmix.scale_loss(torch.ones(()), optimizer, loss_id=1):  # the other block has ended
        pass


@pytest.mark.parametrize("scale", ["banana", -3, 0])
def test_a_wrong_loss_scale_without_an_optimizer(net, scale):
    with pytest.raises(ValueError, match="loss_scale must be"):
        cnmix.initialize(net(), None, loss_scale=scale)

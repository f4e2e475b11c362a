"""What real scripts do with the original library, one test for each of their habits."""

import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnmix
from cnmix.nn import QuantizedModule, quantized_modules


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **settings})


def ready(model, **settings):
    """Returns the model and its optimizer, initialized in the plainest way."""
    return cnmix.initialize(model, sgd(model), opt_level="O1", **settings)


def converted(model):
    return [fqn for fqn, _ in quantized_modules(model)]


def trained(net, step, steps=3, prepare=lambda model, optimizer: None, **settings):
    """Trains in the plainest order; what other orders are compared with."""
    model, optimizer = ready(net(), **settings)
    prepare(model, optimizer)
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, optimizer


@pytest.mark.parametrize("assignment", ["ignored", "module attribute", "pair"])
def test_in_place(net, step, same_weights, assignment):
    model = net()
    optimizer = sgd(model)
    keys, modules, parameters = list(model.state_dict()), dict(model.named_modules()), list(model.parameters())
    if assignment == "ignored":
        cnmix.initialize(model, optimizer, opt_level="O1")
    elif assignment == "module attribute":
        model.optimizer = cnmix.initialize(model, optimizer, opt_level="O1")
        assert model.optimizer == (model, optimizer)
    else:
        assert cnmix.initialize(model, optimizer, opt_level="O1") == (model, optimizer)
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert converted(model) == ["conv", "fc1", "fc2"]
    for seed in range(3):
        step(model, optimizer, seed)
    assert same_weights(model, trained(net, step)[0])


def test_several_models_over_several_calls(net, batch):
    networks = {"features": net(0), "classifier": nn.Linear(3, 3)}
    groups = [{"params": network.parameters(), "lr": 0.1} for network in networks.values()]
    optimizer = torch.optim.SGD(groups)
    networks["features"], optimizer = cnmix.initialize(networks["features"], optimizer, opt_level="O1", loss_scale=8.0)
    networks["classifier"], nothing = cnmix.initialize(networks["classifier"], None, opt_level="O1", loss_scale=8.0)
    assert nothing is None
    assert isinstance(networks["classifier"], QuantizedModule)
    before = copy.deepcopy([network.state_dict() for network in networks.values()])
    x, y = batch()
    with cnmix.scale_loss(F.cross_entropy(networks["classifier"](networks["features"](x)), y), optimizer) as scaled:
        scaled.backward()
    optimizer.step()
    assert not torch.equal(before[0]["conv.weight"], networks["features"].conv.weight)
    assert not torch.equal(before[1]["weight"], networks["classifier"].weight)
    assert [len(each["modules"]) for each in cnmix.state_dict()["models"]] == [3, 1]


def test_no_optimizer(net, batch):
    model, nothing = cnmix.initialize(net(), None, opt_level="O1")
    assert nothing is None
    other, nothing = cnmix.initialize(net(1), opt_level="O1")
    assert nothing is None
    other.eval()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    state = cnmix.state_dict()
    assert len(state["models"]) == 2
    assert state["loss_scalers"] == []


@pytest.mark.parametrize("order", ["before", "after"])
def test_optimizer_state_moved(net, step, same_weights, order):
    model = net()
    optimizer = sgd(model)

    def move():
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[key] = value.clone()

    if order == "before":
        move()
    cnmix.initialize(model, optimizer, opt_level="O1")
    for seed in range(3):
        if order == "after":
            move()
        step(model, optimizer, seed)
    assert same_weights(model, trained(net, step)[0])


def test_distributed_wrap_after_initialize(net, step, same_weights, tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model, optimizer = ready(net(), loss_scale=64.0)
        wrapped = nn.parallel.DistributedDataParallel(model)
        cnmix.cnmix_set_amp_quantify_params("all", {"batch_size": 8, "data_num": 80_000})
        for seed in range(3):
            step(wrapped, optimizer, seed)
        assert cnmix.state_dict(wrapped) == {**cnmix.state_dict(), "loss_scalers": []}
        assert same_weights(wrapped.module, trained(net, step, loss_scale=64.0)[0])
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_wrap_after_initialize(net, step, same_weights):
    model, optimizer = ready(net())
    wrapped = nn.DataParallel(model)
    for seed in range(3):
        step(wrapped, optimizer, seed)
    assert same_weights(wrapped.module, trained(net, step)[0])


@pytest.mark.parametrize("loss_scale", [1.0, "dynamic"])
def test_optimizer_state_loaded_before_or_after(net, step, same_weights, loss_scale):
    _, old = trained(net, step)
    saved = copy.deepcopy(old.state_dict())
    assert saved["state"]
    finished = []
    for order in ("before", "after"):
        model = net()
        optimizer = sgd(model)
        if order == "before":
            optimizer.load_state_dict(copy.deepcopy(saved))
        cnmix.initialize(model, optimizer, opt_level="O1", loss_scale=loss_scale)
        if order == "after":
            optimizer.load_state_dict(copy.deepcopy(saved))
        step(model, optimizer)
        finished.append(model)
    assert same_weights(*finished)
    fresh, _ = trained(net, step, steps=1, loss_scale=loss_scale)
    assert not same_weights(finished[0], fresh)


@pytest.mark.parametrize("quantify", ["before", "after", "never"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_state_loaded_before_or_after_initialize(net, step, order, quantify):
    def params():
        if quantify != "never":
            cnmix.core.cnmix_set_amp_quantify_params("all", {"batch_size": 8, "data_num": 40})

    running = trained(net, step, steps=7, loss_scale="dynamic")
    saved = cnmix.state_dict()
    del running
    gc.collect()  # a dynamic scale and its optimizer refer to one another
    assert saved["models"][0]["modules"]["conv"]["operands"]["input"]["step"] == 7

    assert cnmix.state_dict()["models"] == []
    model = net(5)
    optimizer = sgd(model)
    if order == "before":
        if quantify == "before":
            params()
        cnmix.load_state_dict(saved)
    cnmix.initialize(model, optimizer, opt_level="O1", loss_scale="dynamic")
    if order == "after":
        if quantify == "before":
            params()
        cnmix.load_state_dict(saved)
    if quantify == "after":
        params()
    state = cnmix.state_dict()
    for fqn, module in saved["models"][0]["modules"].items():
        assert state["models"][0]["modules"][fqn]["operands"] == module["operands"]
    assert state["loss_scalers"] == saved["loss_scalers"]
    expected = 10_000 if quantify == "never" else 5
    assert {module.quantizers.config.steps_per_epoch for _, module in quantized_modules(model)} == {expected}
    step(model, optimizer)


@pytest.mark.parametrize("when", ["before", "after", "after wrap", "much later", "never"])
def test_quantify_params_optional_and_any_time(net, step, when):
    def params():
        cnmix.cnmix_set_amp_quantify_params("all", {"batch_size": 8, "data_num": 83})

    if when == "before":
        params()
    model, optimizer = ready(net())
    if when == "after":
        params()
    wrapped = nn.DataParallel(model)
    if when == "after wrap":
        params()
    step(wrapped, optimizer)
    if when == "much later":
        step(wrapped, optimizer)
        params()
    step(wrapped, optimizer)
    expected = 10_000 if when == "never" else 11
    assert {module.quantizers.config.steps_per_epoch for _, module in quantized_modules(model)} == {expected}


@pytest.mark.parametrize("loss_scale", [1024.0, 3.0, "dynamic"])
def test_gradients_are_unscaled_after_the_block(net, backward, loss_scale):
    norms, divided = [], []
    for scale in (1.0, loss_scale):
        model, optimizer = ready(net(), loss_scale=scale, max_bitwidth=31, bitwidth=31)
        backward(model, optimizer)
        for param in model.parameters():
            param.grad /= 2
        divided.append([param.grad.clone() for param in model.parameters()])
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
        assert torch.allclose(nn.utils.get_total_norm([p.grad for p in model.parameters()]), torch.tensor(1e-3))
    assert torch.allclose(*norms, rtol=1e-5)
    for plain, unscaled in zip(*divided, strict=True):
        assert torch.allclose(plain, unscaled, rtol=1e-4, atol=1e-6 * float(norms[0]))


def test_ordinary_step_with_hidden_skipping(net, step, backward):
    model, optimizer = ready(net(), loss_scale="dynamic")
    step(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.zero_grad()
    backward(model, optimizer, 1, factor=float("inf"))
    assert optimizer.step() is None
    # The forward pass of the skipped step has moved the running statistics of bn.
    assert all(torch.equal(before[0][name], value) for name, value in model.named_parameters())
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], before[1]["state"][index]["momentum_buffer"])
    step(model, optimizer, 2)
    assert not torch.equal(before[0]["fc2.weight"], model.fc2.weight)


def test_list_given_to_load_state_dict(net):
    cnmix.initialize(net(), None, opt_level="O1")
    with pytest.raises(TypeError, match=r"takes the dict that cnmix.state_dict\(\) returned, got list"):
        cnmix.load_state_dict(["cnmix"])


class DistributedOptimizer(torch.optim.Optimizer):
    """The methods that Horovod mixes into an optimizer."""

    def synchronize(self):
        self.synchronized = self.__dict__.get("synchronized", 0) + 1

    @contextlib.contextmanager
    def skip_synchronize(self):
        self.should_synchronize = False
        yield
        self.should_synchronize = True

    def step(self, closure=None):
        if self.__dict__.get("should_synchronize", True):
            self.synchronize()
        return super(self.__class__, self).step(closure)


@pytest.mark.parametrize("loss_scale", [1.0, 16.0, "dynamic"])
def test_methods_of_a_horovod_optimizer_remain(net, batch, step, same_weights, loss_scale):
    model = net()
    optimizer = sgd(model)
    methods = {name: value for name, value in vars(DistributedOptimizer).items() if not name.startswith("__")}
    optimizer.__class__ = type("SGD", (torch.optim.SGD,), methods)
    cnmix.initialize(model, optimizer, opt_level="O1", loss_scale=loss_scale)
    x, y = batch()
    with cnmix.scale_loss(F.cross_entropy(model(x), y), optimizer) as scaled:
        scaled.backward()
        optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
    assert optimizer.synchronized == 1
    assert isinstance(optimizer, torch.optim.SGD)
    assert same_weights(model, trained(net, step, steps=1, loss_scale=loss_scale)[0])


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0, 2.0**-4, "dynamic"])
def test_accumulation_unscales_once(net, batch, loss_scale):
    gradients = []
    for blocks in ("one", "several"):
        scale = 1.0 if blocks == "one" else loss_scale
        model, optimizer = ready(net().eval(), loss_scale=scale, max_bitwidth=8)  # bn would tie the passes together
        losses = [F.cross_entropy(model(x), y) for x, y in (batch(0), batch(1))]
        if blocks == "one":
            with cnmix.scale_loss(losses[0] + losses[1], optimizer) as scaled:
                scaled.backward()
        else:
            for loss in losses:
                with cnmix.scale_loss(loss, optimizer) as scaled:
                    scaled.backward()
        gradients.append([param.grad for param in model.parameters()])
    assert all(torch.equal(one, several) for one, several in zip(*gradients, strict=True))


def test_zero_grad_variants(net, backward, same_weights):
    models = []
    for variant in ("before", "before, kept", "model", "after", "after, kept"):
        model, optimizer = ready(net(), loss_scale=256.0)
        for seed in range(3):
            if variant.startswith("before"):
                optimizer.zero_grad(set_to_none="kept" not in variant)
            elif variant == "model":
                model.zero_grad()
            backward(model, optimizer, seed)
            optimizer.step()
            if variant.startswith("after"):
                optimizer.zero_grad(set_to_none="kept" not in variant)
        models.append(model)
    assert all(same_weights(models[0], model) for model in models[1:])


def test_weights_load_into_a_plain_model(net, step, tmp_path):
    plain = net(3)
    model, _ = trained(net, step)
    assert list(model.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert model.state_dict()[key].dtype == value.dtype
    torch.save({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict()}, tmp_path / "checkpoint.pth")
    saved = torch.load(tmp_path / "checkpoint.pth", map_location=lambda storage, _: storage, weights_only=True)
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert type(plain.fc1) is nn.Linear
    x = torch.randn(4, 1, 6, 6)
    assert torch.allclose(plain.eval()(x), model.eval()(x), rtol=0.1, atol=0.1)

"""Models that share, reuse, lack and exchange layers; autocast, and the way back to float."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnmix
from cnmix.nn import QuantizedLinear, quantized_modules


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def states(model=None):
    return cnmix.state_dict(model)["models"]


def names(model):
    return list(states(model)[0]["modules"])


def operands(model):
    return {fqn: each["operands"] for fqn, each in states(model)[0]["modules"].items()}


def steps_of(model):
    return {fqn: module.quantizers.input.state.step for fqn, module in quantized_modules(model)}


def layer(seed, *shape, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(*shape, bias=bias)


def mlp():
    return nn.Sequential(OrderedDict(a=layer(0, 6, 8), relu=nn.ReLU(), b=layer(1, 8, 8), c=layer(2, 8, 3)))


def data(seed=0, features=6):
    return torch.randn(5, features, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer=None, steps=2, first=0):
    optimizer = optimizer or sgd(model)
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        model(data(seed)).square().mean().backward()
        optimizer.step()
    return model


def gradients(model, *inputs):
    model.zero_grad()
    sum(model(x).square().sum() for x in inputs).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# Shared weights, shared modules, unused modules


class Two(nn.Module):
    """Two layers of one shape: one module, two with one weight, or one for each of two inputs."""

    def __init__(self, kind):
        super().__init__()
        self.a = layer(0, 6, 6)
        if kind == "tied":
            self.b = layer(1, 6, 6)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias
        else:
            self.b = self.a

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Siamese(Two):
    def forward(self, x):
        return self.a(x) - self.b(2 * x + 1)


class Recurrent(Two):
    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.a(x)) + torch.tanh(self.b(x))
        return x


@pytest.mark.parametrize("kind", ["tied", "one module"])
@pytest.mark.parametrize("make", [Two, Siamese, Recurrent])
def test_gradients_of_shared_weights_are_those_of_float(make, kind):
    plain = make(kind)
    model, _ = cnmix.initialize(copy.deepcopy(plain), None, bitwidth=31)
    for seed in range(2):
        ours, theirs = gradients(model, data(seed)), gradients(plain, data(seed))
        assert list(ours) == list(theirs) == ["a.weight", "a.bias"]
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5)
    calls = 3 if make is Recurrent else 1
    if kind == "tied":
        assert steps_of(model) == {"a": 2 * calls, "b": 2 * calls}
    else:
        assert steps_of(model) == {"a": 4 * calls}


@pytest.mark.parametrize("make", [Two, Siamese])
def test_a_module_called_twice_computes_as_two_with_one_weight(make):
    found = [gradients(cnmix.initialize(make(kind), None)[0], data()) for kind in ("tied", "one module")]
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])


@pytest.mark.parametrize("kind", ["tied", "one module"])
def test_shared_weights_train_and_resume(kind):
    model, _ = cnmix.initialize(Two(kind), None)
    optimizer = sgd(model)
    train(model, optimizer)
    other = Two(kind)
    other.load_state_dict(model.state_dict())
    second = sgd(other)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cnmix.initialize(other, second)
    cnmix.load_state_dict(cnmix.state_dict(model), other)
    train(model, optimizer, first=2)
    train(other, second, first=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert operands(model) == operands(other)


@pytest.mark.parametrize("exclude", [[], ["head"]])
def test_a_head_tied_to_an_embedding_trains(exclude):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 6)
            self.body = layer(0, 6, 6)
            self.head = layer(1, 6, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.body(self.embedding(x)))

    for level in ("O1", "O2"):
        model = Tied()
        cnmix.initialize(model, None, level, exclude=exclude)
        optimizer = sgd(model)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.arange(7)), torch.arange(7)).backward()
            optimizer.step()
        assert names(model) == ["body", *({"head"} - {*exclude})]
        assert model.head.weight is model.embedding.weight


class Unused(nn.Module):
    """Takes one of two branches."""

    def __init__(self):
        super().__init__()
        self.taken, self.other = mlp(), mlp()

    def forward(self, x, other=False):
        return (self.other if other else self.taken)(x)


@pytest.mark.parametrize("loss_scale", [1.0, "dynamic"])
def test_unused_modules(loss_scale):
    model, plain = Unused(), mlp()
    for each in (model, plain):
        torch.manual_seed(0)
        optimizer = sgd(each)
        cnmix.initialize(each, optimizer, loss_scale=loss_scale)
        train(each, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.taken.parameters(), plain.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.other.parameters())
    assert set(steps_of(model.other).values()) == {0}
    resumed = Unused()
    optimizer = sgd(resumed)
    cnmix.initialize(resumed, optimizer, loss_scale=loss_scale)
    resumed.load_state_dict(model.state_dict())
    cnmix.load_state_dict(cnmix.state_dict(model), resumed)
    assert states(resumed) == states(model)
    resumed(data(), other=True).sum().backward()
    optimizer.step()
    assert set(steps_of(resumed.other).values()) == {1}
    assert resumed.eval()(data(), other=True).isfinite().all()


# Surgery


def replace(model):
    model.b = layer(9, 8, 8)
    return ["a", "b", "c"], ["a", "c"]


def delete(model):
    del model.b
    return ["a", "c"], ["a", "c"]


def insert(model):
    model.insert(2, layer(9, 8, 8))
    return ["0", "2", "3", "4"], ["0", "3", "4"]


def append(model):
    model.append(layer(9, 3, 3))
    return ["a", "b", "c", "4"], ["a", "b", "c"]


def rename(model):
    model.last = model.c
    del model.c
    return ["a", "b", "last"], ["a", "b", "last"]


def wrap(model):
    model.b = nn.Sequential(model.b, layer(9, 8, 8))
    return ["a", "b.0", "b.1", "c"], ["a", "b.0", "c"]


def enlarge(model):
    weight = torch.cat([model.c.weight.detach(), torch.zeros(2, 8)])
    model.c.weight, model.c.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(5))
    model.c.out_features = 5
    return ["a", "b", "c"], ["a", "b", "c"]


def move_in(model):
    other = mlp()
    cnmix.initialize(other, None)
    train(other)
    model.c = nn.Sequential(model.c, nn.Linear(3, 8), other.b)
    return ["a", "b", "c.0", "c.1", "c.2"], ["a", "b", "c.0", "c.2"]


SURGERY = [replace, delete, insert, append, rename, wrap, enlarge, move_in]


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("operate", SURGERY)
def test_surgery_and_initialize_again(operate, level):
    model = nn.Sequential(*mlp()) if operate is insert else mlp()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, level)
    train(model, optimizer)
    known = {id(module): module.quantizers for _, module in quantized_modules(model)}
    saved = copy.deepcopy(cnmix.state_dict(model))
    after, kept = operate(model)
    before = {fqn: copy.deepcopy(model.get_submodule(fqn).quantizers.state_dict()) for fqn in kept}
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, level)
    assert names(model) == after
    assert {fqn: model.get_submodule(fqn).quantizers.state_dict() for fqn in kept} == before
    assert all(known.get(id(module), module.quantizers) is module.quantizers for _, module in quantized_modules(model))
    new = set(after) - set(kept)
    assert all(steps_of(model)[fqn] == 0 for fqn in new)
    assert all(module.quantizers.fqn == fqn for fqn, module in quantized_modules(model))
    train(model, optimizer)
    assert all(steps_of(model)[fqn] == (2 if fqn in new else 4) for fqn in after)
    assert model(data()).dtype == torch.float32
    if after != ["a", "b", "c"]:
        with pytest.raises(ValueError, match="the cnmix state does not fit this Sequential"):
            cnmix.load_state_dict(saved, model)
    cnmix.load_state_dict(cnmix.state_dict(model), model)
    assert len(states()) == 1
    cnmix.dequantize(model)
    assert not any(quantized_modules(model))


def test_a_fresh_layer_computes_in_float_until_initialize_is_called_again():
    model, _ = cnmix.initialize(mlp(), None)
    model.b = layer(9, 8, 8)
    assert names(train(model)) == ["a", "c"]
    cnmix.initialize(model, None)
    assert type(model.b) is QuantizedLinear
    assert steps_of(train(model)) == {"a": 4, "b": 2, "c": 4}


def test_a_new_layer_is_left_out_where_the_first_call_left_it_out():
    model = mlp()
    cnmix.initialize(model, None, exclude=["b"])
    model.b = layer(9, 8, 8)
    cnmix.initialize(model, None, exclude=["b"])
    assert names(model) == ["a", "c"]


def test_a_layer_moves_to_another_model_with_what_it_knows():
    model, other = mlp(), mlp()
    cnmix.initialize([model, other], None)
    train(model)
    other.b = model.b
    assert steps_of(other) == {"a": 0, "b": 2, "c": 0}
    train(other)
    assert steps_of(model) == {"a": 2, "b": 4, "c": 2}
    cnmix.dequantize(other)
    assert names(model) == ["a", "c"]


# Back to float


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_dequantize_goes_on_in_float(level):
    model = mlp()
    optimizer = sgd(model)
    cnmix.initialize(model, optimizer, level, loss_scale=8.0)
    train(model, optimizer)
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    other = sgd(plain)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert cnmix.dequantize(model) is model
    assert states() == []
    for seed in range(2, 4):
        for each, stepped in ((model, optimizer), (plain, other)):
            stepped.zero_grad()
            each(data(seed)).square().mean().backward()
            stepped.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert [type(each) for each in model] == [type(each) for each in plain]
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    assert torch.equal(copy.deepcopy(model)(data()), plain(data()))
    cnmix.initialize(model, optimizer, level)
    assert set(steps_of(train(model, optimizer)).values()) == {2}


# Autocast


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_where_only_converted_modules_multiply(dtype, level):
    models = []
    for enabled in (False, True):
        model = mlp()
        optimizer = sgd(model)
        cnmix.initialize(model, optimizer, level)
        for seed in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = F.mse_loss(model(data(seed)), torch.ones(5, 3))
            loss.backward()
            optimizer.step()
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(each.parameters() for each in models), strict=True))
    assert states(models[0]) == states(models[1])


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_autocast_of_the_products_between(level):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.left_out, self.outer = layer(0, 6, 6), layer(1, 6, 6), layer(2, 6, 6)

        def forward(self, x):
            y = self.inner(x)
            return self.outer((y @ y.mT).softmax(-1) @ self.left_out(x) + y)

    losses = {}
    for enabled in (False, True):
        model = Attention()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        cnmix.initialize(model, optimizer, level, exclude=["left_out"])
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = model(data())
                loss = (y.float() - 1).square().mean()
            loss.backward()
            optimizer.step()
        losses[enabled] = loss.item()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
        assert steps_of(model) == {"inner": 20, "outer": 20}
    assert losses[True] == pytest.approx(losses[False], rel=0.2)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_second_derivative_is_refused(level):
    model, _ = cnmix.initialize(mlp(), None, level)
    x = data().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()

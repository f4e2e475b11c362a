import copy

import pytest
import torch
from torch import nn

import cnmix
from cnmix import QuantizeConfig, checkpoint
from cnmix.inference import freeze, prepare
from cnmix.nn import convert, quantized_modules
from cnmix.rules import leave_out


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 16, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.fc(self.norm(self.conv(x)).relu().flatten(1)).relu())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def images(seed, n=4, scale=1.0):
    return scale * torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def train(model, inputs=None, exclude=(), steps=3, **settings):
    convert(model, QuantizeConfig(**settings), leave_out(exclude))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(step) if inputs is None else inputs).square().mean().backward()
        optimizer.step()
    return model


def saved(model):
    return copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bitwidth": 16},
        {"bitwidth": 31, "exact_int31": True},
        {"rounding": "half_up"},
        {"rounding": "stochastic"},
        {"threshold": 1e-3},
    ],
)
def test_prepared_model_computes_as_the_trained_one(settings):
    model = train(Net(), **settings)
    data = saved(model)
    plain = Net()
    prepared = prepare(plain, data)
    assert prepared is plain
    assert not prepared.training
    model.eval()
    for seed, scale in ((9, 1.0), (10, 30.0), (11, 1e-3), (12, 0.0)):
        x = images(seed, scale=scale)
        assert torch.equal(prepared(x), model(x))
        with torch.inference_mode():
            assert torch.equal(prepared(x), model(x))
    assert cnmix.state_dict(prepared) == data["cnmix"]


def test_prepared_from_a_file(tmp_path):
    model = train(Net())
    checkpoint.save(tmp_path / "model.pt", model)
    prepared = prepare(Net(), checkpoint.load(tmp_path / "model.pt"))
    assert torch.equal(prepared(images(5)), model.eval()(images(5)))


def test_frozen_model_computes_as_before():
    model = train(Net()).eval()
    expected = model(images(5))
    state = copy.deepcopy(cnmix.state_dict(model))
    assert freeze(model.train()) is model
    assert not model.training
    assert torch.equal(model(images(5)), expected)
    assert all(module.quantizers.frozen for _, module in quantized_modules(model))
    again = copy.deepcopy(model)
    assert torch.equal(again(images(5)), expected)
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(model(images(5)), expected)
    assert cnmix.state_dict(model) == state


def test_a_lone_linear():
    model = train(nn.Linear(4, 3), torch.ones(2, 4))
    prepared = prepare(nn.Linear(4, 3), saved(model))
    x = torch.randn(5, 4)
    assert torch.equal(prepared(x), model.eval()(x))


def test_untrained_model_is_refused_by_name():
    model = Net()
    convert(model, QuantizeConfig())
    with pytest.raises(ValueError, match="'conv' has no stored position for input and weight"):
        freeze(model)
    assert model.training
    with pytest.raises(ValueError, match="'conv' has no stored position"):
        prepare(Net(), saved(model))


def test_module_that_took_no_part_is_refused_by_name():
    model = train(Net())
    model.head.quantizers.load_state_dict(train(nn.Linear(6, 3), steps=0).quantizers.state_dict())
    with pytest.raises(ValueError, match="'head' has no stored position"):
        freeze(model)
    assert not any(module.quantizers.frozen for _, module in quantized_modules(model))


def test_training_a_frozen_model_is_refused_by_name():
    model = freeze(train(Net())).train()
    with pytest.raises(RuntimeError, match="'conv' is frozen for integer inference"):
        model(images(0))
    model.eval()
    assert model(images(0)).isfinite().all()


def test_excluded_modules_stay_float():
    model = train(Net(), exclude=["head", "conv"])
    prepared = prepare(Net(), saved(model))
    assert [fqn for fqn, _ in quantized_modules(prepared)] == ["fc"]
    assert type(prepared.head) is nn.Linear
    assert torch.equal(prepared(images(5)), model.eval()(images(5)))


def test_weight_tied_to_an_embedding_stays_float():
    tokens = torch.tensor([[0, 3, 5]])
    model = train(Tied(), tokens, exclude=["head"])
    prepared = prepare(Tied(), saved(model))
    assert [fqn for fqn, _ in quantized_modules(prepared)] == ["body"]
    assert torch.equal(prepared(tokens), model.eval()(tokens))


def test_excluded_module_of_another_dtype_stays_float():
    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].to(torch.float64)
        return model

    model = make()
    convert(model, QuantizeConfig(), leave_out(["1"]))
    model[0](torch.ones(2, 4)).sum().backward()
    prepared = prepare(make(), saved(model))
    assert [fqn for fqn, _ in quantized_modules(prepared)] == ["0"]


def other_architecture():
    return saved(train(nn.Linear(4, 3), torch.ones(2, 4)))


def other_shape():
    return saved(train(Net(width=5)))


def one_module_more():
    data = saved(train(Net()))
    modules = data["cnmix"]["models"][0]["modules"]
    modules["tail"] = modules["head"]
    return data


def two_models():
    data = saved(train(Net()))
    data["cnmix"]["models"] *= 2
    return data


def newer_version():
    data = saved(train(Net()))
    data["cnmix"]["version"] = 10**6
    return data


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_architecture, "does not fit this Net"),
        (other_shape, "size mismatch"),
        (one_module_more, "'tail'"),
        (two_models, "2 models"),
        (newer_version, "upgrade"),
    ],
)
def test_foreign_checkpoints_are_refused(make, message):
    data = make()
    with pytest.raises((RuntimeError, ValueError), match=message):
        prepare(Net(), data)


@pytest.mark.parametrize("lacking", ["cnmix", "state_dict"])
def test_ordinary_checkpoints_are_refused(lacking):
    data = saved(train(Net()))
    del data[lacking]
    with pytest.raises(ValueError, match=lacking):
        prepare(Net(), data)


def test_a_refused_state_leaves_the_model_plain():
    model, data = Net(), one_module_more()
    with pytest.raises(ValueError, match="'tail'"):
        prepare(model, data)
    assert not any(quantized_modules(model))

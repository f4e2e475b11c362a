"""Integer models of checkpoints: every level, kind of module, geometry and format."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import cnmix
from cnmix.fixed_point import storage_dtype
from cnmix.inference import fuse, load, prepare
from cnmix.inference.integers import Affine, IntegerConv2d, IntegerLinear, IntegerModule


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(make, x, steps=2, level="O1", **settings):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    cnmix.initialize(model, optimizer, opt_level=level, steps_per_epoch=10, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        with cnmix.scale_loss(model(x).float().square().mean(), optimizer) as loss:
            loss.backward()
        optimizer.step()
    return copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})


def check(make, x, data, close=None):
    """Compares what is loaded with what is prepared, and what is fused of it; returns the first."""
    model, prepared = load(make(), data), prepare(make(), data)
    assert not model.training
    with torch.no_grad():
        expected, other = model(x), prepared(x)
        if close is None:
            assert torch.equal(expected, other)
        else:
            assert torch.allclose(expected, other, atol=close)
    fused = fuse(model, x)
    assert torch.equal(fused(x), expected)
    with torch.no_grad():
        assert torch.equal(fused(-0.4 * x), model(-0.4 * x))
    return model


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


IMAGES = draw(4, 3, 8, 8)


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_levels(level):
    data = trained(network, IMAGES, level=level)
    model = check(network, IMAGES, data, close=1e-2)
    integers = [each for each in model.modules() if isinstance(each, IntegerModule)]
    assert len(integers) == (0 if level == "O0" else 3)
    assert sum(isinstance(each, Affine) for each in model.modules()) == 1


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"bitwidth": 16}, 16),
        ({"bitwidth": 31, "max_bitwidth": 31}, 31),
        ({"bitwidth": 31, "max_bitwidth": 31, "exact_int31": True}, 31),
        ({"rounding": "half_up"}, 8),
        ({"rounding": "half_away"}, 8),
        ({"rounding": "stochastic"}, 8),
    ],
    ids=str,
)
def test_formats(settings, bits):
    def make():
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    x = draw(7, 6)
    model = check(make, x, trained(make, x, **settings))
    for each in (model[0], model[2]):
        assert each.formats[0] >= bits
        assert each.integers.dtype == storage_dtype(each.formats[2])
        assert f"input=int{each.formats[0]} * 2**{each.formats[1]}" in repr(each)
        assert each.weight.dtype == torch.float32
        assert torch.equal(each.weight, each.integers.float() * 2.0 ** each.formats[3])


GEOMETRIES = {
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 6, 6)),
    "dilated": (lambda: nn.Conv2d(4, 3, 3, dilation=2, stride=2), (2, 4, 9, 9)),
    "same": (lambda: nn.Conv2d(3, 4, 4, padding="same"), (2, 3, 6, 6)),
    "valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 6)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "circular": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6)),
    "replicate": (lambda: nn.Conv1d(3, 4, 3, padding="same", padding_mode="replicate"), (2, 3, 6)),
    "one": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 6)),
    "three": (lambda: nn.Conv3d(2, 4, 3, padding=1), (2, 2, 4, 4, 4)),
    "unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1), (2, 4, 5, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2), (2, 4, 5)),
    "transposed in three": (lambda: nn.ConvTranspose3d(2, 3, 2, 2), (1, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions(name):
    make, shape = GEOMETRIES[name]
    x = draw(*shape)
    model = check(make, x, trained(make, x))
    assert isinstance(model, IntegerModule)
    assert isinstance(model, type(make()))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.body(self.embedding(tokens.abs().long() % 9))))


def test_tied_embedding_stays_float_and_a_module_may_be_used_twice():
    x = 5 * draw(3, 4)
    data = trained(Tied, x)
    model = check(Tied, x, data)
    assert isinstance(model.head, IntegerLinear)
    assert torch.equal(model.embedding.weight, data["state_dict"]["embedding.weight"])


class Shared(nn.Module):
    """Two modules of one weight, and one that a function multiplies too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x))) @ self.third.weight.to(self.third.weight.dtype)


def test_shared_weights():
    x = draw(5, 4)
    model = check(Shared, x, trained(Shared, x))
    assert isinstance(model.second, IntegerLinear)
    assert torch.equal(model.second.integers, model.first.integers)
    assert not isinstance(model.third, IntegerLinear)


class Aside(nn.Module):
    """Holds a layer that it never calls, and multiplies by its weight."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_a_layer_that_is_never_called():
    x = draw(5, 4)
    check(Aside, x, trained(Aside, x))


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(3)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().flatten(1))


def test_lazy_modules():
    torch.manual_seed(0)
    model = Lazy()
    cnmix.initialize(model)
    for _ in range(2):
        model(IMAGES).square().mean().backward()
    data = copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})
    check(Lazy, IMAGES, data, close=1e-2)


def test_parametrized_modules():
    def make():
        layers = parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), parametrizations.orthogonal(nn.Linear(6, 6))
        return nn.Sequential(layers[0], nn.ReLU(), layers[1])

    check(make, IMAGES, trained(make, IMAGES))


def test_excluded_modules_and_rules():
    def make():
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    x = draw(4, 6)
    model = check(make, x, trained(make, x, exclude=["2"], rules=[{"modules": ["4"], "bitwidth": 16}]))
    assert type(model[2]) is nn.Linear
    assert (model[0].formats[0], model[4].formats[0]) == (8, 16)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


def test_only_plain_batch_norms_become_affine():
    def make():
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            OwnNorm(4),
            nn.BatchNorm2d(4, affine=False),
            nn.BatchNorm2d(4, track_running_stats=False),
        )

    model = check(make, IMAGES, trained(make, IMAGES), close=1e-4)
    assert [type(each) for each in model] == [IntegerConv2d, OwnNorm, Affine, nn.BatchNorm2d]
    with pytest.raises(ValueError, match="'2' takes 4 dimensions"):
        model[2](draw(4, 4, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["layer.weight", "first.weight", "parametrized.parametrizations.weight.original0"])
def test_weights_that_are_not_finite_are_refused_and_change_nothing(value, key):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
            self.parametrized = parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x):
            return nn.functional.linear(self.parametrized(self.first(x)), self.layer.weight)

    data = trained(Model, draw(3, 4))
    data["state_dict"][key][0, 0] = value
    model = Model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"the weight '{key}' holds NaN or infinity"):
        load(model, data)
    assert type(model.first) is nn.Linear
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_integer_models_are_saved_copied_and_refuse_wrong_inputs(tmp_path):
    data = trained(network, IMAGES)
    model = load(network(), data)
    with torch.no_grad():
        expected = model(IMAGES)
        assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
        torch.save(model, tmp_path / "model.pt")
        assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(IMAGES), expected)
        again = load(network(), data)
        again.load_state_dict({name: torch.zeros_like(each) for name, each in model.state_dict().items()})
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(IMAGES), expected)
    with pytest.raises(ValueError, match=r"'0' takes .*3 channels"):
        model(draw(1, 2, 8, 8))
    with pytest.raises(ValueError, match="'6' takes 8 features"):
        model(draw(1, 3, 12, 12))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(network().state_dict())


def test_gradients_make_no_new_quantizers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.other = nn.Linear(4, 4), nn.Parameter(draw(4, 4))

        def forward(self, x):
            y = self.fc(x) @ self.fc(x).t()
            return y if self.training else y @ x @ self.other

    x = draw(5, 4)
    model = load(Model(), trained(Model, x))
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_a_float_model_is_fused_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = draw(3, 5, 8)
    with torch.no_grad():
        assert torch.allclose(fuse(model, x)(x), model(x), atol=1e-5)


def test_a_state_without_models_is_of_a_float_model():
    saved = nn.Linear(3, 2)
    state = {"version": 2, "models": [], "loss_scalers": []}
    loaded = load(nn.Linear(3, 2), {"state_dict": saved.state_dict(), "cnmix": state})
    assert torch.equal(loaded(torch.ones(1, 3)), saved(torch.ones(1, 3)))

"""Products that are no Linear and no convolution: what functions, attention and recurrent layers multiply, fused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

import cnmix
from cnmix.inference import fuse, load, prepare

N, T, E = 3, 5, 8


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(make, *inputs, steps=2, **settings):
    """Returns a plain model's class and the checkpoint of a few steps."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, steps_per_epoch=10, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = [each for each in pytree.tree_leaves(model(*inputs)) if each is not None]
        loss = sum(each.float().square().mean() for each in outputs)
        with cnmix.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        optimizer.step()
    return copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})


def check(make, *inputs, operators, settings=None):
    """Trains, loads and fuses a model, and compares; returns the fused model."""
    data = trained(make, *inputs, **(settings or {}))
    model, prepared = load(make(), data), prepare(make(), data)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*inputs))
        same(expected, pytree.tree_leaves(prepared(*inputs)))
    fused = fuse(model, *inputs)
    same(expected, pytree.tree_leaves(fused(*inputs)))
    others = pytree.tree_map(lambda x: 1.7 * x.flip(0) if x.is_floating_point() else x, inputs)
    with torch.no_grad():
        same(pytree.tree_leaves(model(*others)), pytree.tree_leaves(fused(*others)))
    calls = [step.operator for step in fused.first.program.steps if step.operator.startswith("cnmix.")]
    assert sorted(calls) == sorted(f"cnmix.integer_{each}.default" for each in operators)
    for step in fused.first.program.steps:  # numbers and strings alone, which a file can hold
        plain = [x for x in pytree.tree_leaves([step.arguments, step.keywords]) if type(x).__name__ != "Ref"]
        assert all(
            x is None or isinstance(x, (int, float, str, torch.dtype, torch.device, torch.memory_format)) for x in plain
        ), step
    return fused


def same(expected, found):
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


class Functions(nn.Module):
    """Multiplies by its own parameters, and activations by each other."""

    def __init__(self):
        super().__init__()
        self.linear, self.right = nn.Parameter(draw(6, E, seed=1)), nn.Parameter(draw(6, E, seed=2))
        self.bias = nn.Parameter(draw(6, seed=3))
        self.pair = nn.Parameter(draw(2, 6, 6, seed=4))

    def forward(self, x):  # (N, T, E)
        y = F.linear(x, self.linear, self.bias) + F.gelu(x) @ self.right.t()
        y = torch.stack([y @ part for part in self.pair]).mean(0)
        scores = torch.bmm(y, x[..., :6].transpose(1, 2)).softmax(-1)
        z = torch.einsum("nts,nse->nte", scores, x)
        return z, torch.baddbmm(z, scores, x, beta=0.5), torch.matmul(z, x[0, 0])


def test_functions():
    check(
        Functions,
        draw(N, T, E),
        operators=["linear"] * 2 + ["matmul"] * 6,
    )


@pytest.mark.parametrize("settings", [{"bitwidth": 16}, {"rounding": "half_up"}, {"rounding": "stochastic"}])
def test_functions_in_other_formats(settings):
    check(Functions, draw(N, T, E), operators=["linear"] * 2 + ["matmul"] * 6, settings=settings)


class Dynamic(nn.Module):
    """Weights that are computed, or buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("blur", torch.full((4, 1, 3, 3), 1 / 9))
        self.weight = nn.Parameter(draw(4, 3, 3, 3))
        self.out = nn.Parameter(draw(4, 2, 2, 2))

    def forward(self, images):  # (N, 3, 8, 8)
        x = F.conv2d(images, self.weight, padding="same")
        x = F.conv2d(x, self.blur, padding=1, groups=4)
        x = F.conv2d(x, self.weight.tanh().transpose(0, 1).contiguous(), torch.ones(3), stride=2)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, dilation=2)
        return F.conv_transpose2d(x, self.out, stride=2).mean((2, 3)), F.linear(x.flatten(2), x[0, :, 0, :1].sin())


def test_convolutions_by_functions():
    check(Dynamic, draw(N, 3, 8, 8), operators=["convolution"] * 3 + ["filter"] * 2 + ["matmul"])


class Heads(nn.Module):
    """Scaled dot product attention, with fewer heads of keys than of queries."""

    def __init__(self, **how):
        super().__init__()
        self.how = how
        self.project = nn.Linear(E, 4 * E)

    def forward(self, x, mask=None):
        q, kv = self.project(x).split([2 * E, 2 * E], -1)
        q = q.unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in kv.chunk(2, -1))
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **self.how)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("settings", [{}, {"per_entry": True}], ids=["whole", "per_entry"])
@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_attention(how, settings):
    check(lambda: Heads(**how), draw(N, T, E), operators=["linear", "matmul", "matmul"], settings=settings)


def test_attention_with_masks():
    seen = torch.ones(T, T).tril().bool()
    seen[2] = False  # sees nothing
    for mask in (seen, draw(1, 1, T, T)):
        check(Heads, draw(N, T, E), mask, operators=["linear", "matmul", "matmul"])


class Attending(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True, **how)

    def forward(self, q, k, v):
        return self.attention(q, k, v)


class SelfAttending(Attending):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_multihead_attention():
    check(SelfAttending, draw(N, T, E), operators=["linear", "matmul", "matmul", "linear"])
    three = [draw(N, T, E, seed=seed) for seed in range(3)]
    check(Attending, *three, operators=["linear"] + ["matmul"] * 5)  # parts of a parameter
    check(lambda: Attending(kdim=4, vdim=4), *(x[..., :4] if i else x for i, x in enumerate(three)),
          operators=["linear"] * 4 + ["matmul"] * 2)  # fmt: skip


def test_one_tensor_as_several_inputs_is_another_program():
    x, others = draw(N, T, E), [draw(N, T, E, seed=seed) for seed in range(3)]
    torch.manual_seed(0)
    model = Attending()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, steps_per_epoch=10)
    for inputs in ([x] * 3, others, [x] * 3, others):
        model(*inputs)[0].square().mean().backward()
        optimizer.step()
    model = load(Attending(), {"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})
    fused = fuse(model, x, x, x)
    for inputs in ([x] * 3, others):
        with torch.no_grad():
            same(model(*inputs), fused(*inputs))


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first):
    def make():
        layer = nn.TransformerEncoderLayer(E, 2, 16, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    check(make, draw(N, T, E), operators=["linear", "matmul", "matmul", "linear", "linear", "linear"])


class Translating(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(E, 2, 1, 1, 16, 0.0, batch_first=True)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.transformer(source, target, tgt_mask=mask)


def test_transformer_with_a_causal_mask():
    check(Translating, draw(N, T, E), draw(N, 4, E), operators=["linear"] * 9 + ["matmul"] * 8)


class Recurrent(nn.Module):
    def __init__(self, kind, **how):
        super().__init__()
        self.layers = kind(E, 6, **how)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    ("kind", "how", "count"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}, 4),
        (nn.LSTM, {"proj_size": 4, "bias": False, "batch_first": True}, 1),
        (nn.GRU, {"bidirectional": True}, 2),
        (nn.RNN, {"nonlinearity": "relu"}, 1),
        (nn.LSTMCell, {}, 1),
        (nn.GRUCell, {}, 1),
    ],
)
def test_recurrent_layers(kind, how, count):
    shape = (N, E) if issubclass(kind, nn.RNNCellBase) else (T, N, E)
    check(lambda: Recurrent(kind, **how), draw(*shape), operators=["recurrence"] * count)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.GRU(E, 6)

    def forward(self, a, b):
        return self.layers(pack_sequence([a, b]))[0].data


def test_packed_sequences_stay_eager():
    inputs = draw(4, E), draw(2, E)
    model = load(Packed(), trained(Packed, *inputs))
    with pytest.raises(ValueError, match="'layers', so that Packed cannot be fused: keep it as it is"):
        fuse(model, *inputs)
    assert torch.overrides._get_current_function_mode() is None


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(draw(3, 16, 8))

    def forward(self, x, ends):
        return F.grouped_mm(x, self.experts, offs=ends)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has none")
def test_groups_of_rows():
    fused = check(Grouped, draw(8, 16), torch.tensor([2, 2, 7], dtype=torch.int32), operators=["grouped"])
    model = fused.model
    inputs = draw(8, 16, seed=3), torch.tensor([0, 5, 8], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(fused(*inputs), model(*inputs))


class Odd(nn.Module):
    """Bilinear, parametrized and subclassed layers."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(E, E, 4)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 6))
        self.spectral = parametrizations.spectral_norm(nn.Conv1d(T, 4, 3))
        self.own = Doubling(4, 3)

    def forward(self, x):  # (N, T, E)
        y = self.spectral(self.normed(self.bilinear(x, x.flip(1))))
        return self.own(y)


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def test_bilinear_parametrized_and_subclassed():
    check(Odd, draw(N, T, E), operators=["linear", "linear", "convolution", "linear"])


class Asking(nn.Module):
    """Takes another way where it is compiled."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(draw(E, E))

    def forward(self, x):
        if torch.compiler.is_compiling():
            return torch.mm(x, 1.0 * self.weight)
        return x @ self.weight


def test_a_graph_that_computes_something_else_is_refused():
    x = draw(N, E)
    model = load(Asking(), trained(Asking, x))
    with pytest.raises(ValueError, match="computes other numbers than the model does"):
        fuse(model, x)


class Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(E, E)

    def forward(self, x, scale=1, *, other=None, name=""):
        y = self.fc(x) * scale
        return {"y": y if other is None else y + other}


def test_keywords_and_numbers():
    x, other = draw(N, E), draw(E, seed=1)
    model = load(Options(), trained(Options, x))
    fused = fuse(model, x, other=other, name="a")
    with torch.no_grad():
        assert torch.equal(fused(x, other=other, name="a")["y"], model(x, other=other)["y"])
        assert torch.equal(fused(x, 3)["y"], model(x, 3)["y"])
        assert torch.equal(fused(x, scale=2, other=2 * other)["y"], model(x, 2, other=2 * other)["y"])


def test_a_model_in_training_is_refused():
    model = Options()
    cnmix.initialize(model, torch.optim.SGD(model.parameters(), 0.1))
    model(draw(N, E))["y"].sum().backward()
    with pytest.raises(ValueError, match="'fc' trains in fixed point"):
        fuse(model.eval(), draw(N, E))


def test_not_finite_activations_are_nan_as_in_eager_mode():
    x = draw(N, T, E)
    fused = check(Functions, x, operators=["linear"] * 2 + ["matmul"] * 6)
    x[0, 0, 0] = float("inf")
    with torch.no_grad():
        for a, b in zip(fused.model(x), fused(x), strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert b.isnan().any()

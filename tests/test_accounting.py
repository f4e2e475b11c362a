import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cnmix
from cnmix.kernels import native, profiling

pytestmark = pytest.mark.filterwarnings("ignore:.*with oneDNN:UserWarning")


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return x @ self.table + torch.ones(1, 3) @ torch.ones(3, 16)


class OwnLinear(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        heads = self.into(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def forward(self, x):
        return checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1),
        nn.Flatten(),
        nn.Linear(4 * 64, 4),
    )


def counted_by_torch(model, *example):
    with FlopCounterMode(display=False) as counter:
        model(*example).sum().backward()
    return counter.get_total_flops() // 2


def by_phase(counted):
    found = {}
    for row in counted.rows:
        found[row.phase] = found.get(row.phase, 0) + row.macs
    return found


@pytest.mark.parametrize(
    ("make", "shape"),
    [(mlp, (5, 16)), (mlp, (2, 5, 16)), (convolutions, (3, 4, 8, 8)), (Own, (3, 5, 16))],
)
def test_float_counts_are_those_of_torch(make, shape):
    model, x = make(), torch.randn(shape)
    counted = cnmix.executed_products(model, x)
    assert counted.macs == counted_by_torch(model, x)
    assert counted.share == 0
    assert counted.floating == counted.rows
    assert {row.reason for row in counted.rows} == {"the model is not converted"}
    assert math.isclose(sum(row.share for row in counted.rows), 1)


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (mlp, (5, 16)),
        (convolutions, (3, 4, 8, 8)),
        (lambda: nn.Conv1d(8, 8, 3, groups=4, padding="same"), (2, 8, 9)),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 7, 7)),
        (lambda: nn.ConvTranspose1d(8, 4, 3, groups=2), (8, 9)),
        (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    ],
)
def test_the_core_multiplies_as_often_as_float(make, shape, level):
    model, x = make(), torch.randn(shape)
    expected = by_phase(cnmix.executed_products(model, x))
    cnmix.initialize(model, None, opt_level=level)
    counted = cnmix.executed_products(model, x)
    assert counted.share == 1, counted
    assert by_phase(counted) == expected
    assert not counted.floating
    assert all(row.bits and row.reason == "" for row in counted.rows)


def test_a_grouped_convolution():
    weight, positions = 8 * 2 * 3, 2 * 7
    model, x = nn.Conv1d(8, 8, 3, groups=4), torch.randn(2, 8, 9, requires_grad=True)
    assert by_phase(cnmix.executed_products(model, x)) == {
        "forward": positions * weight,
        "backward": 2 * positions * weight,
    }
    model.requires_grad_(False)
    assert by_phase(cnmix.executed_products(model, x))["backward"] == positions * weight
    assert "backward" not in by_phase(cnmix.executed_products(model, x.detach()))


def test_attention():
    batch, length, heads, width = 2, 5, 4, 4
    model, x = Attention(), torch.randn(batch, length, 16)
    scores = batch * heads * length * length * width
    linear = batch * length * 16 * (48 + 16)
    # The backward pass of the fused kernel computes the scores again; nothing needs the gradient of x.
    float_counts = by_phase(cnmix.executed_products(model, x))
    assert float_counts == {
        "forward": linear + 2 * scores,
        "backward": 2 * linear - batch * length * 16 * 48 + 5 * scores,
    }
    cnmix.initialize(model, None)
    counted = cnmix.executed_products(model, x)
    assert counted.share == 1
    assert by_phase(counted) == {**float_counts, "backward": float_counts["backward"] - scores}
    with torch.random.fork_rng():  # its first training step makes the quantizers of attention; later ones find them
        model(x).sum().backward()
    assert by_phase(cnmix.executed_products(model, x)) == by_phase(counted)
    assert {row.fqn for row in cnmix.summary(model).rows} == {row.place for row in counted.rows}


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}])
def test_lstm(options):
    model, x = nn.LSTM(8, 6, **options), torch.randn(5, 3, 8)
    inputs = [8, 8] if model.bidirectional else [8, 6][: model.num_layers]
    hidden, products = 3 * 24 * 6, [5 * 3 * 24 * size for size in inputs]
    forward = sum(products) + len(inputs) * 5 * hidden
    found = cnmix.executed_products(model, x)
    assert by_phase(found) == {"forward": forward, "backward": 2 * forward}  # oneDNN's kernel computes every gradient
    cnmix.initialize(model, None)
    counted = cnmix.executed_products(model, x)
    assert counted.share == 1
    # Neither x nor the first hidden state needs a gradient.
    first = products[-1] if model.num_layers > 1 else 0
    backward = sum(products) + first + len(inputs) * (5 + 4) * hidden
    assert by_phase(counted) == {"forward": forward, "backward": backward}
    assert {row.place for row in counted.rows} >= {"..l0.input", "..l0.hidden"}
    assert sum(row.calls for row in counted.rows if row.place.endswith("l0.hidden") and row.phase == "forward") == 5


@pytest.mark.parametrize("part", [False, True])
def test_functions_of_a_compiled_part_are_float(part):
    model = nn.Sequential(Own(), nn.Linear(16, 4))
    cnmix.initialize(model, None)
    if part:
        model[0].compile(backend="eager")
    counted = cnmix.executed_products(model if part else torch.compile(model, backend="eager"), torch.randn(7, 16))
    assert {row.place: row.reason for row in counted.rows} == {
        "0": "called in Own.forward, which is compiled: functions stay float there",
        "1": "",
    }
    assert cnmix.executed_products(Own(), torch.randn(7, 16)).share == 0.0


def test_what_stays_float_is_listed_with_the_reason():
    model = nn.Sequential(
        nn.Linear(16, 16), Own(), OwnLinear(16, 16), nn.MultiheadAttention(16, 2), nn.Linear(16, 16), nn.Linear(16, 2)
    )
    model[3].forward = lambda x, inner=model[3].forward: inner(x, x, x)[0]
    model.insert(5, Own())
    cnmix.initialize(model, None, exclude=["4", "5"], rules=[{"modules": "6", "small": True, "leave_out": True}])
    model.append(nn.Linear(2, 2))
    counted = cnmix.executed_products(model, torch.randn(7, 16), loss=lambda y: (y @ torch.ones(2, 2)).sum())
    reasons = {row.place: row.reason for row in counted.rows}
    assert reasons == {
        "0": "",
        "1..forward+1:matmul(table)": "",
        "1": "called in Own.forward with constants, with another dtype, or a function that is not converted",
        "2..forward+1:linear(weight)": "",
        "3..in_proj": "",
        "3..scores": "",
        "3..values": "",
        "3..value_gradient": "",
        "3..out_proj": "",
        "4": "left out",
        "5": "left out",
        "6": "too small to gain",
        "7": "came after initialize: call it again",
        "(outside of the model)": "outside of the model's forward pass",
    }
    for place in {*reasons} - {"1", "3..value_gradient"}:
        assert {row.phase for row in counted.rows if row.place == place} == {"forward", "backward"}
    assert 0 < counted.share < 1
    text = str(counted)
    assert "a function that is not converted" in text
    assert f"{counted.share:.1%} of {counted.macs:,} executed" in text


def test_an_operation_without_a_formula_is_listed():
    class Rows(nn.Module):
        def forward(self, x):
            return torch._weight_int8pack_mm(
                x.bfloat16(), torch.ones(8, 16, dtype=torch.int8), torch.ones(8).bfloat16()
            )

    counted = cnmix.executed_products(Rows(), torch.randn(4, 16))
    (row,) = counted.unknown
    assert (row.executed, row.macs, row.share, row.calls) == ("aten::_weight_int8pack_mm", None, None, 1)
    assert counted.share is None
    assert "not counted: 1 calls" in str(counted)


@pytest.mark.parametrize("fixed_point", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_repeated_forward_passes_count(reentrant, fixed_point):
    model = Checkpointed(reentrant)
    if fixed_point:
        cnmix.initialize(model, None)
    counted = cnmix.executed_products(model, torch.randn(3, 8))
    one = 3 * 8 * 8
    assert by_phase(counted) == {"forward": 2 * one, "recompute": one, "backward": 3 * one}
    assert [row.place for row in counted.rows if row.phase == "recompute"] == ["second"]


def test_a_step_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.utils.parametrizations.spectral_norm(nn.Linear(16, 4))
    )
    cnmix.initialize(model, None)
    x = torch.randn(8, 16, requires_grad=True)
    model(x * 2).sum().backward()
    steps = []
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: steps.append(1))
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    other, before = copy.deepcopy(model), copy.deepcopy(cnmix.state_dict(model))
    state, quantizers, own = copy.deepcopy(model.state_dict()), model[0].quantizers, x.grad.clone()
    versions, random = [buffer._version for buffer in model.parameters()], torch.get_rng_state()

    assert cnmix.executed_products(model, x * 1).share > 0.9
    assert cnmix.executed_products(model, x).share > 0.9

    assert torch.equal(torch.get_rng_state(), random)
    assert model[0].quantizers is quantizers
    assert cnmix.state_dict(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [parameter._version for parameter in model.parameters()] == versions
    assert all(a.grad is b for a, b in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, values, strict=True))
    assert torch.equal(x.grad, own)
    assert steps == []
    assert not torch.nn.modules.module._global_forward_hooks
    torch.manual_seed(1)
    expected = other(x)
    torch.manual_seed(1)
    found = model(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert steps == [1]


def test_what_fails_leaves_everything_as_it_was():
    model, _ = cnmix.initialize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), None)
    before, quantizers = copy.deepcopy(cnmix.state_dict(model)), model[0].quantizers
    with pytest.raises(ValueError, match="takes 4 features"):
        cnmix.executed_products(model, torch.randn(2, 5))
    assert cnmix.state_dict(model) == before
    assert model[0].quantizers is quantizers
    assert not torch.nn.modules.module._global_forward_hooks
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        cnmix.executed_products(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))
    with profile(), pytest.raises(RuntimeError, match="a profiler is on"):
        cnmix.executed_products(model, torch.randn(2, 4))


def test_outputs_of_many_kinds():
    class Model(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.layer, self.answer = nn.Linear(4, 4), answer

        def forward(self, x, scale=1):
            return self.answer(self.layer(x) * scale)

    class Output(dict):
        @property
        def loss(self):
            return self["loss"]

    answers = [
        lambda y: (y, [y.sum()], {"a": y, "n": 3}),
        lambda y: Output(loss=y.mean(), logits=y),
        lambda y: Output(loss=None, logits=y),
    ]
    one = 2 * 4 * 4
    for answer in answers:
        counted = cnmix.executed_products(Model(answer), torch.randn(2, 4), scale=2)
        assert by_phase(counted) == {"forward": one, "backward": one}
    with torch.no_grad():
        assert by_phase(cnmix.executed_products(Model(answers[0]), torch.randn(2, 4))) == {"forward": one}
    assert by_phase(cnmix.executed_products(Model(lambda y: y.argmax()), torch.randn(2, 4))) == {"forward": one}


def test_torch_s_fused_layers():
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        fused = cnmix.executed_products(layer, x)
        assert [row.executed for row in fused.rows] == ["aten::_transformer_encoder_layer_fwd"]
        layer.train()
        assert fused.macs == cnmix.executed_products(layer, x).macs


def test_wrapped_and_compiled_models():
    model = mlp()
    expected = cnmix.executed_products(model, torch.randn(5, 16)).rows
    model[2].compile(backend="eager")
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert cnmix.executed_products(wrapped, torch.randn(5, 16)).rows == expected


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_profiles_name_the_products_and_change_no_bit(level):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    cnmix.initialize(model, None, opt_level=level)
    other, x = copy.deepcopy(model), torch.randn(3, 16)
    other(x).square().sum().backward()
    with profile(record_shapes=True) as profiled:
        model(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    found = [event.name for event in profiled.events() if event.name.startswith("cnmix::")]
    assert found[0] == "cnmix::matmul(int8 3x16, int8 16x8) 384 MACs 0"
    assert [profiling.parse(name).macs for name in found] == [384, 96, 96, 96, 384]
    assert [profiling.parse(name).name for name in found] == ["0", "2", "2", "2", "0"]


def test_without_the_compiled_part_nothing_else_is_counted(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    model = convolutions()
    x = torch.randn(3, 4, 8, 8)
    expected = cnmix.executed_products(model, x).macs
    cnmix.initialize(model, None, bitwidth=16)
    counted = cnmix.executed_products(model, x)
    assert (counted.macs, counted.share) == (expected, 1)

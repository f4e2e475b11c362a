import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import cnmix
from cnmix import QuantizeConfig
from cnmix.inference import prepare
from cnmix.nn import convert, quantized_modules, quantizer_sets
from cnmix.rules import SMALL_HIDDEN, leave_out

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
OPTIONS = {
    "plain": {},
    "layers": {"num_layers": 3, "dropout": 0.4},
    "both directions": {"bidirectional": True, "num_layers": 2, "dropout": 0.3, "batch_first": True},
    "without bias": {"bias": False},
}
CASES = [(kind, options) for kind in KINDS for options in OPTIONS.values()] + [
    ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
]
CELLS = {
    "LSTMCell": nn.LSTMCell,
    "GRUCell": nn.GRUCell,
    "RNNCell": nn.RNNCell,
    "relu": lambda *args: nn.RNNCell(*args, nonlinearity="relu"),
    "no bias": lambda *args: nn.LSTMCell(*args, bias=False),
}
# torch says so of its own LSTM with projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(make, **settings):
    torch.manual_seed(0)
    plain = make()
    module = copy.deepcopy(plain)
    convert(module, QuantizeConfig(**settings))
    return plain, module


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, nn.utils.rnn.PackedSequence):
        return [result.data]
    return [each for part in result for each in flat(part)]


def gradients(module, x, hx=(), seed=3):
    """Returns the results, and the gradients of what has any, of a weighted sum of them all."""
    torch.manual_seed(seed)
    module.zero_grad()
    states = [state.clone().requires_grad_() for state in hx]
    leaf = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
    leaf.grad = None
    given = tuple(states) if "LSTM" in type(module).__name__ else next(iter(states), None)
    outputs = flat(module(x, given) if states else module(x))
    sum((y * random(*y.shape, seed=i)).sum() for i, y in enumerate(outputs)).backward()
    leaves = [leaf, *states, *module.parameters()]
    return outputs + [each.grad for each in leaves if each.requires_grad]


def assert_near(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-5 * b.norm()


def first_states(kind, options, batch):
    count = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    shapes = [(count, *batch, options.get("proj_size") or 5), (count, *batch, 5)]
    return [random(*shape, seed=7) for shape in shapes[: 1 + (kind == "LSTM")]]


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("form", ["batch", "unbatched", "packed", "sorted"])
def test_int31_is_float32_within_its_tolerance(kind, options, with_states, form):
    plain, module = pair(lambda: KINDS[kind](6, 5, **options), bitwidth=31)
    batch = () if form == "unbatched" else (4,)
    x = random(4, 4, 6) if batch else random(7, 6)
    if form in ("packed", "sorted"):
        lengths = [4, 2, 1, 1] if form == "sorted" else [1, 4, 2, 1]
        x = pack_padded_sequence(x, lengths, options.get("batch_first", False), enforce_sorted=form == "sorted")
        x = x._replace(data=x.data.detach().requires_grad_())
    else:
        x.requires_grad_()
    hx = first_states(kind, options, batch) if with_states else ()
    fresh = copy.deepcopy(module)
    assert_near(gradients(module, x, hx), gradients(plain, x, hx))  # dropout draws the same numbers
    assert_near(gradients(fresh.eval(), x, hx), gradients(plain.eval(), x, hx))
    with torch.no_grad():
        assert flat(fresh(x))[0].stride() == flat(plain(x))[0].stride()


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize("with_states", [False, True])
def test_int31_cells_are_those_of_float32(kind, batch, with_states):
    plain, module = pair(lambda: CELLS[kind](6, 5), bitwidth=31)
    x = random(*batch, 6).requires_grad_()
    count = 1 + isinstance(plain, nn.LSTMCell)
    hx = [random(*batch, 5, seed=i) for i in range(count)] if with_states else ()
    assert_near(gradients(module, x, hx), gradients(plain, x, hx))


def test_packed_sequences_keep_their_order():
    _, module = pair(lambda: nn.LSTM(6, 5, bidirectional=True))
    module.eval()
    parts = [random(n, 6, seed=n) for n in (2, 5, 3)]
    packed, (h, _) = module(pack_sequence(parts, enforce_sorted=False))
    assert packed.unsorted_indices.tolist() == [2, 0, 1]
    assert h.shape == (2, 3, 5)
    y = nn.utils.rnn.unpack_sequence(packed)
    assert [len(each) for each in y] == [2, 5, 3]
    assert torch.equal(y[1][-1, :5], h[0, 1])
    assert torch.equal(y[1][0, 5:], h[1, 1])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, dropout=0.2, bidirectional=True, proj_size=4)
        self.inner = nn.ModuleDict({"cell": nn.GRUCell(8, 6)})
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        y, _ = self.lstm(x)
        h = None
        for step in y:
            h = self.inner["cell"](step, h)
        return self.head(h)


def train(model, steps, first=0, **initialize):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnmix.initialize(model, optimizer, **{"steps_per_epoch": 20, **initialize})
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(random(5, 4, 6, seed=step)).square().mean().backward()
        optimizer.step()
    return model


def build():
    torch.manual_seed(0)
    return Net()


def test_conversion_in_place_and_back():
    model, plain = build(), build()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert convert(model, QuantizeConfig()) == ["lstm", "inner.cell", "head"]
    names = [name for name, _ in quantizer_sets(model)]
    assert names[:3] == ["lstm..l0.input", "lstm..l0.hidden", "lstm..l0.projection"]
    assert "lstm..l1_reverse.projection" in names
    assert names[-3:] == ["inner.cell..input", "inner.cell..hidden", "head"]
    assert len(names) == 15
    assert convert(model, QuantizeConfig()) == []
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model.lstm, nn.LSTM)
    model.lstm.flatten_parameters()
    assert "l0.hidden=int8/8/8" in repr(model)
    cnmix.dequantize(model)
    assert (type(model.lstm), type(model.inner["cell"])) == (nn.LSTM, nn.GRUCell)
    x = random(5, 4, 6)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not any(quantizer_sets(model))
    assert convert(model, QuantizeConfig(), leave_out(["lstm"])) == ["inner.cell", "head"]


def test_copies_and_pickles_train_apart_and_alike():
    model = train(build(), 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert cnmix.state_dict(other) == cnmix.state_dict(model)
        before = cnmix.state_dict(model)
        train(other, 1, first=3)
        assert cnmix.state_dict(model) == before
        expected = train(copy.deepcopy(model), 1, first=3)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"rounding": "stochastic"}, {"mode": "fixed_interval", "interval": 3}])
def test_training_goes_on_from_a_saved_state_bit_for_bit(settings):
    model = train(build(), 4, **settings)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(cnmix.state_dict(model))
    steps = [each["operands"]["input"]["step"] for each in state["models"][0]["modules"].values()]
    assert steps == [4] * 12 + [20, 20, 4]  # the cell is called five times in a forward pass
    train(model, 2, first=4, **settings)
    other = train(Net(), 0, **settings)
    other.load_state_dict(weights)
    cnmix.load_state_dict(state, other)
    train(other, 2, first=4, **settings)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert cnmix.state_dict(other) == cnmix.state_dict(model)


def test_a_state_of_another_network_is_refused():
    state = cnmix.state_dict(train(build(), 1))
    other = build()
    other.lstm = nn.LSTM(6, 8)
    cnmix.initialize(other, None)
    with pytest.raises(ValueError, match=r"the state has 'lstm\.\.l0\.projection'"):
        cnmix.load_state_dict(state, other)


def test_integer_inference_from_a_checkpoint():
    model = train(build(), 3, exclude=["inner"])
    saved = {"state_dict": copy.deepcopy(model.state_dict()), "cnmix": copy.deepcopy(cnmix.state_dict(model))}
    frozen = prepare(build(), saved)
    assert [fqn for fqn, _ in quantized_modules(frozen)] == ["lstm", "head"]
    x = random(5, 4, 6, seed=9)
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(frozen(x), expected)
        frozen.lstm.weight_hh_l0.zero_()  # its integers are fixed
        assert torch.equal(frozen(x), expected)
    frozen.train()
    with pytest.raises(RuntimeError, match="'lstm' is frozen"):
        frozen(x)


def test_statistics_move_only_in_training_with_gradients():
    model = train(build(), 1)
    before = copy.deepcopy(cnmix.state_dict(model))
    model.eval()
    model(random(5, 4, 6, seed=8) * 50).sum().backward()
    model.train()
    with torch.no_grad():
        model(random(5, 4, 6, seed=8) * 50)
    assert cnmix.state_dict(model) == before
    fresh = build().eval()
    convert(fresh, QuantizeConfig())
    with torch.no_grad():
        assert (fresh(random(5, 4, 6)) - build().eval()(random(5, 4, 6))).norm() < 0.05


def test_gradients_accumulate_and_only_where_needed():
    _, module = pair(lambda: nn.LSTM(6, 5), mode="fixed_interval", interval=100, quantify_rate=0.0)
    x = random(4, 3, 6)
    module(x)[0].sum().backward()  # measures
    module.zero_grad()
    module(x)[0].sum().backward()
    once = [parameter.grad.clone() for parameter in module.parameters()]
    module(x)[0].sum().backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(module.parameters(), once, strict=True))
    for names in (["weight_ih_l0"], ["weight_hh_l0"], ["bias_ih_l0"], ["bias_hh_l0"], []):
        module.zero_grad()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in names)
        leaf = x.clone().requires_grad_(not names)
        module(leaf)[0].sum().backward()
        for (_, parameter), expected in zip(module.named_parameters(), once, strict=True):
            assert parameter.grad is None or torch.equal(parameter.grad, expected)
        assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == names


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("settings", [{}, {"mode": "fixed_interval", "interval": 2, "rounding": "stochastic"}])
def test_activation_checkpointing_repeats_the_same_integers(use_reentrant, settings):
    class Checkpointed(Net):
        def forward(self, x):
            y = checkpoint(lambda x: self.lstm(x)[0], x.requires_grad_(), use_reentrant=use_reentrant)
            return self.head(self.inner["cell"](y[-1]))

    class Plain(Net):
        def forward(self, x):
            return self.head(self.inner["cell"](self.lstm(x.requires_grad_())[0][-1]))

    trained = []
    for kind in (Checkpointed, Plain):
        torch.manual_seed(0)
        trained.append(train(kind(), 5, **settings))
    ours, theirs = trained
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert cnmix.state_dict(ours) == cnmix.state_dict(theirs)


@pytest.mark.parametrize(("level", "dtype"), [("O2", torch.bfloat16), ("O3", torch.bfloat16)])
def test_half_levels(level, dtype):
    model = train(build(), 3, opt_level=level)
    y, (h, c) = model.lstm(random(5, 4, 6).to(dtype))
    assert {y.dtype, h.dtype, c.dtype} == {dtype}
    assert not model.lstm._forward_hooks
    assert model(random(5, 4, 6)).dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    for mixed in (torch.float16, torch.float64):
        leaf = random(5, 4, 6).to(mixed).requires_grad_()
        _, module = pair(lambda: nn.GRU(6, 5))
        y, h = module(leaf)
        y.sum().backward()
        assert (y.dtype, h.dtype, leaf.grad.dtype) == (mixed,) * 3


def test_nan_is_named_and_passes(caplog):
    _, module = pair(lambda: nn.LSTM(6, 5))
    x = random(4, 3, 6)
    x[2, 1, 0] = math.nan
    y, (h, _) = module(x)
    assert y.isnan().all()
    assert h.isnan().all()
    y.sum().backward()
    assert all(parameter.grad.isnan().all() for parameter in module.parameters())
    found = [record.getMessage() for record in caplog.records]
    assert found[0] == "NaN or infinity in input of 'LSTM..l0.input' (training step 0): the products with it are NaN"
    assert all(
        not quantizer.state.updates
        for _, each in quantizer_sets(module)
        for name, quantizer in each
        if name != "weight"
    )
    module.zero_grad()
    y, _ = module(random(4, 3, 6))
    y.sum().backward()
    assert all(each.isfinite().all() for each in (y, *(parameter.grad for parameter in module.parameters())))


@pytest.mark.parametrize("make", [lambda: nn.LSTM(6, 5), lambda: nn.GRU(6, 5), lambda: nn.LSTMCell(6, 5)])
def test_wrong_input_is_refused_by_name(make):
    model = nn.Sequential()
    model.add_module("encoder", make())
    convert(model, QuantizeConfig())
    encoder, single = model.encoder, isinstance(model.encoder, nn.LSTMCell)
    shape = (3, 6) if single else (4, 3, 6)
    with pytest.raises(ValueError, match=r"'encoder' takes 6 features .* got a tensor of shape \(.*7\)"):
        encoder(random(*shape[:-1], 7))
    with pytest.raises(ValueError, match="'encoder' takes 6 features"):
        encoder(random(2, 2, *shape))
    with pytest.raises(TypeError, match=r"'encoder' takes a float tensor, got torch\.int64"):
        encoder(torch.ones(shape, dtype=torch.int64))
    wrong = random(*(() if single else (1,)), 3, 4)
    states = (wrong, wrong) if isinstance(encoder, (nn.LSTM, nn.LSTMCell)) else wrong
    with pytest.raises(ValueError, match=r"'encoder' takes h_0 of shape \(.*3, 5\), got \(.*3, 4\)"):
        encoder(random(*shape), states)
    if isinstance(encoder, (nn.LSTM, nn.LSTMCell)):
        with pytest.raises(TypeError, match=r"'encoder' takes the pair \(h_0, c_0\), got a Tensor"):
            encoder(random(*shape), wrong)
    if not single:
        with pytest.raises(ValueError, match="'encoder' takes sequences of at least one time step"):
            encoder(random(0, 3, 6))
    with pytest.raises(RuntimeError, match=r"'encoder.*torch\.func"):
        torch.func.grad(lambda x: flat(encoder(x))[0].sum())(random(*shape))


def test_rules_and_summary():
    model = nn.Sequential(nn.LSTM(6, SMALL_HIDDEN), nn.LSTM(6, SMALL_HIDDEN - 1))
    rules = [{"small": True, "leave_out": True}, {"types": "LSTM", "operands": "weight", "width": 16}]
    cnmix.initialize(model, None, rules=rules)
    assert [fqn for fqn, _ in quantized_modules(model)] == ["0"]
    model = build()
    cnmix.initialize(model, None, exclude=["head"], rules=rules[1:])
    found = cnmix.summary(model, random(5, 4, 6))
    rows = {row.fqn: row for row in found.rows}
    assert rows["lstm..l0.input"].widths == (8, 16, 8)
    assert rows["lstm..l0.input"].macs == 5 * 4 * 32 * 6
    assert rows["lstm..l0_reverse.hidden"].macs == 5 * 4 * 32 * 4
    assert rows["lstm..l1.projection"].macs == 5 * 4 * 4 * 8
    assert rows["inner.cell..hidden"].macs == 5 * 4 * 18 * 6
    assert (rows["head"].reason, rows["lstm..l0.input"].kind) == ("left out", "LSTM")
    assert found.share == 1 - rows["head"].macs / sum(row.macs for row in found.rows)


def test_empty_batches_and_a_second_backward_pass():
    _, module = pair(lambda: nn.GRU(6, 5))
    y, h = module(random(4, 0, 6))
    assert (y.shape, h.shape) == ((4, 0, 5), (1, 0, 5))
    y.sum().backward()
    y, _ = module(random(4, 3, 6))
    y.sum().backward(retain_graph=True)
    once = module.weight_hh_l0.grad.clone()
    y.sum().backward()
    assert torch.equal(module.weight_hh_l0.grad, 2 * once)

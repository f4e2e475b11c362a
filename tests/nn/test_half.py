import copy
import pickle

import pytest
import torch
from torch import nn

import cnmix
from cnmix.nn.half import CastInputs, CastOutput, cast_tensors, use_float32, use_half


class Mixed(nn.Module):
    """Every kind of module that a half level treats in its own way."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.batch_norm = nn.BatchNorm1d(5)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.activation = nn.PReLU()
        self.inner = nn.Linear(16, 32)
        self.left_out = nn.Linear(32, 32)
        self.head = nn.Linear(32, 11)
        self.seen = {}

    def forward(self, tokens):
        x = self.note("norm", self.norm(self.note("embedding", self.embedding(tokens))))
        x = self.note("attention", self.attention(x, x, x, need_weights=False)[0]) + x
        x = self.note("batch_norm", self.batch_norm(x))
        x = self.note("recurrent", self.recurrent(x)[0])
        x = self.note("activation", self.activation(x))
        x = self.note("left_out", self.left_out(torch.relu(self.note("inner", self.inner(x)))))
        return {"scores": self.head(x), "tokens": tokens}

    def note(self, name, x):
        self.seen[name] = x.dtype
        return x


TOKENS = torch.arange(20).view(4, 5) % 11


def train(model, steps, level="O2", **settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cnmix.initialize(model, optimizer, opt_level=level, steps_per_epoch=10, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TOKENS)["scores"].flatten(0, 1), TOKENS.flatten())
        with cnmix.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_are_half_between_all_kinds_of_modules(dtype):
    torch.manual_seed(0)
    model = Mixed()
    train(model, 2, activation_dtype=dtype, exclude=["left_out"])
    assert set(model.seen.values()) == {dtype}
    output = model(TOKENS)
    assert output["scores"].dtype == torch.float32
    assert output["tokens"] is TOKENS


@pytest.mark.parametrize(("level", "settings"), [("O2", {}), ("O3", {}), ("O2", {"activation_dtype": "float16"})])
def test_a_half_level_learns_as_float32_does(level, settings):
    losses = []
    for each, more in (("O0", {}), (level, settings)):
        torch.manual_seed(0)
        losses.append(train(Mixed(), 40, each, **more))
    assert losses[1] < 1.5 * losses[0] + 0.02


def test_parameters_are_the_master_weights():
    torch.manual_seed(0)
    model = Mixed()
    keys = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    train(model, 2)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == keys
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    Mixed().load_state_dict(model.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_alike(copied):
    torch.manual_seed(0)
    model = Mixed()
    train(model, 2)
    model.eval()
    assert torch.equal(copied(model)(TOKENS)["scores"], model(TOKENS)["scores"])


def test_using_half_twice_is_using_it_once_and_float32_takes_it_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU())
    cnmix.initialize(model, None)
    for _ in range(2):
        use_half(model, torch.bfloat16)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert hooks == [2, 0, 2]
    foreign = model[1].register_forward_hook(lambda module, args, output: None)
    use_float32(model)
    assert [len(module._forward_hooks) for module in model.modules()] == [0, 0, 1]
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())
    foreign.remove()


def test_less_is_saved_for_the_backward_pass():
    def saved(level):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(3)))
        cnmix.initialize(model, None, opt_level=level)
        parameters = {p.data_ptr() for p in model.parameters()}
        found = {}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                found[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.itemsize
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(torch.randn(512, 64))
        loss.sum().backward()
        return sum(found.values())

    assert saved("O2") < 0.65 * saved("O1")


def test_float16_overflow_skips_the_step_and_training_goes_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    cnmix.initialize(model, optimizer, opt_level="O2", activation_dtype="float16")
    before = [p.clone() for p in model.parameters()]
    moved = []
    for _ in range(8):  # the scale starts at 2**16, which float16 has not
        optimizer.zero_grad()
        with cnmix.scale_loss(model(torch.ones(2, 4)).sum(), optimizer) as scaled:
            scaled.backward()
        optimizer.step()
        moved.append(not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)))
    assert not moved[0]
    assert moved[-1]
    assert all(p.isfinite().all() for p in model.parameters())


def test_casting_leaves_what_is_no_float_tensor():
    x = torch.ones(2)
    value = (x, [torch.ones(1, dtype=torch.int64), None], {"a": "text"}, 3.0)
    cast = cast_tensors(value, torch.bfloat16)
    assert cast[0].dtype == torch.bfloat16
    assert cast[1][0] is value[1][0]
    assert cast[2] is value[2]
    named = torch.ones(3, 2).max(dim=1)
    assert type(cast_tensors(named, torch.float16)) is type(named)
    assert repr(CastInputs(torch.bfloat16)) != repr(CastOutput(torch.bfloat16))


def test_a_mask_beyond_float16_makes_no_nan():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, mask):
            return self.inner(x) * 0 + mask * 0

    model, _ = cnmix.initialize(Masked(), None, opt_level="O2", activation_dtype="float16")
    assert model(torch.ones(2, 4), mask=torch.full((2, 4), -(2.0**32))).isfinite().all()

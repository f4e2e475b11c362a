"""Fused programs where joining steps is delicate: to the bit, or one step less joined."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from test_fusion import assert_same
from torch import Tensor, nn

import cnmix
from cnmix import inference
from cnmix.kernels import plan, plan_chain

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two convolutions, and what a test does with them."""

    def __init__(self, compute, channels: int = 4, x: Tensor = X) -> None:
        super().__init__()
        kind = (nn.Linear, nn.Linear, nn.Conv1d, nn.Conv2d)[x.dim() - 1]
        shape = (1, 1) if kind is nn.Linear else (1, 1, 1)
        size = x.shape[-1] if kind is nn.Linear else 3
        self.a, self.b = kind(size, 4, *shape[2:]), kind(channels, 4, *shape[2:])
        self.compute = compute

    def forward(self, x: Tensor):
        return self.compute(self, x)


def trained(compute, channels: int = 4, x: Tensor = X) -> nn.Module:
    return trained_as(lambda: Net(compute, channels, x), x)


def trained_as(build, x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    cnmix.initialize(model, optimizer, steps_per_epoch=10)
    for _ in range(2):
        optimizer.zero_grad()
        sum(each.square().mean() for each in model(x) if each.requires_grad).backward()
        optimizer.step()
    state = copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})
    return inference.load(build(), state)


def long_chain(m: nn.Module, x: Tensor):
    y = m.a(x)
    for _ in range(15):
        y = F.relu(y) * 1.01 + 0.1
    return (m.b(y), y)


def two_channels(m: nn.Module, x: Tensor):  # of a pool, which takes the first dimension for channels
    return (m.b(F.max_pool2d(m.a(x), (1, 2))),)


def beyond_the_image(m: nn.Module, x: Tensor):
    y = m.a(x)[:, :, :2, :2]
    return (m.b(y), m.b(y if m.training else F.max_pool2d(y, 2, 1, 1, 3)))


def positions_first(m: nn.Module, x: Tensor):
    y = m.a(x.view(8, 6, 8))
    return (m.b(F.relu(y)) + y,)


CASES = {
    "a chain longer than a plan's": (long_chain, 4, X),
    "one dimension": (lambda m, x: (m.b(F.relu(m.a(x))),), 4, X[0, 0, 0]),
    "a pool of three dimensions": (two_channels, 4, X[:, :, 0]),
    "windows beyond the image": (beyond_the_image, 4, X),
    "enlarged unevenly": (lambda m, x: (m.b(F.interpolate(m.a(x)[..., :2].relu(), scale_factor=(3, 3.3))),), 4, X),
    "enlarged by a factor that rounds": (lambda m, x: (m.b(F.interpolate(m.a(x), scale_factor=(1, 41))),), 4, X),
    "no channels side by side": (lambda m, x: (m.b(torch.cat([m.a(x)[:, :0], m.a(x)], 1)),), 4, X),
    "nothing side by side": (lambda m, x: (m.b(torch.cat([x.new_zeros(0), m.a(x)], 1)),), 4, X),
    "dtypes side by side": (lambda m, x: (m.b(torch.cat([m.a(x).half(), m.a(x)], 1)),), 8, X),
    "one twice side by side": (lambda m, x: (m.b(torch.cat([y := m.a(x), y], 1)), y, y), 8, X),
    "a sequence that comes before the batch": (positions_first, 4, X.flatten(0, 2)),
    "factors that leave the range": (lambda m, x: (m.b(m.a(x * 4.0 * 0.1)), m.a(x) * 4.0 * 0.1), 4, X),
}


@pytest.mark.parametrize("name", CASES)
def test_edges(name):
    compute, channels, x = CASES[name]
    model = trained(compute, channels, x)
    fused = inference.fuse(model, x)
    for scale in (1.0, 0.0, 1e-40, 1e-37, 1e4, 5e37, float("nan")):
        with torch.no_grad():
            assert_same(fused(x * scale), model(x * scale))


def test_a_tensor_in_more_formats_than_a_chain_has_places():
    model = trained(lambda m, x: tuple(each(m.a(x)) for each in getattr(m, "heads", [m.b])))
    model.heads = nn.ModuleList(copy.deepcopy(model.b) for _ in range(40))
    for position, head in enumerate(model.heads, -30):
        head.formats = (8, position, *head.formats[2:])
    with torch.no_grad():
        assert_same(inference.fuse(model, X)(X), model(X))


def test_powers_of_two_are_joined_with_factors_only_where_nothing_overflows():
    half, third = plan_chain.Multiply(2.0**-10), plan_chain.Multiply(0.3)
    assert plan_chain.simplify([half, third], 2.0**31, of_sums=True) == [plan_chain.Multiply(0.3 * 2.0**-10)]
    assert plan_chain.simplify([half, third], 2.0**31, of_sums=False) == [half, third]
    huge = plan_chain.Multiply(2.0**100)
    assert plan_chain.simplify([huge, third], 2.0**31, of_sums=True) == [huge, third]


def test_callers_may_write_to_what_they_get():
    def compute(m, x):
        y = m.a(x)
        return m.b(y), torch.arange(5.0) + 1, x.clone().view(-1), y, y.clone().transpose(1, 2)

    fused = inference.fuse(trained(compute), X)
    x = X.clone()
    outputs = fused(x)
    expected = [each.clone() for each in outputs]
    for index, each in enumerate(outputs):
        each.add_(1)
        assert_same([x], [X])
        for later in range(index + 1, len(outputs)):
            assert_same([outputs[later]], [expected[later]])
    assert_same(fused(X), expected)


class RowsAsImage(Net):
    """Multiplies the last dimension of an image, then convolves the maxima."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: (m.b(F.max_pool2d(m.a(x), 2)),), 3)
        self.a = nn.Linear(8, 8)


class SingleChannel(nn.Module):
    """GELU, whose last bits depend on how its tensor lies, which the strides of single channels decide."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 1, 3, padding=(3, 2))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = self.one(x)
        return (F.gelu(torch.cat([y, y + 0.5], 1)),)


def test_a_single_channel():
    x = X[:1]
    model = trained_as(SingleChannel, x)
    found = inference.fuse(model, x)(x)
    with torch.no_grad():
        assert_same(found, model(x))
        assert found[0].stride() == model(x)[0].stride()


def test_rows_that_a_convolution_takes_for_an_image():
    model = trained_as(RowsAsImage, X)
    with torch.no_grad():
        assert_same(inference.fuse(model, X)(X), model(X))


class Scaled(nn.Linear):
    """Takes a number, or a word."""

    def forward(self, x: Tensor, by=1) -> Tensor:
        y = super().forward(x)
        return y + 1 if by is True else y * by if isinstance(by, float) else y


@pytest.fixture
def scaled() -> inference.FusedModel:
    torch.manual_seed(0)
    return inference.fuse(Scaled(3, 3).eval(), torch.ones(2, 3))


@torch.no_grad()
def test_numbers_that_are_equal_but_not_alike(scaled):
    x = torch.ones(2, 3)
    for by in (1, True, 1.0, 0.0, -0.0):
        found, expected = scaled(x, by), scaled.model(x, by)
        assert torch.equal(found, expected)
        assert torch.equal(found.signbit(), expected.signbit())
    with pytest.raises(ValueError, match="cannot follow"):
        scaled(x, {1, 2})


def test_the_shapes_that_came_last_stay_fused(scaled, monkeypatch):
    monkeypatch.setattr("cnmix.inference.fused._MOST_SHAPES", 2)
    for n in (3, 4, 3, 5):
        scaled(torch.ones(n, 3))
    assert sorted(made.program.specs["x"].shape[0] for made, _ in scaled._made.values()) == [3, 5]
    assert scaled(torch.ones(2, 3)).shape == (2, 3)


@torch.no_grad()
def test_autocast_is_a_part_of_what_is_fused(scaled):
    x = torch.randn(2, 3)
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert scaled(x).dtype == scaled.model(x).dtype
            assert torch.equal(scaled(x), scaled.model(x))


def test_a_fused_model_stays_what_it_is(scaled):
    for change in (scaled.half, scaled.train, lambda: scaled.load_state_dict(scaled.state_dict())):
        with pytest.raises(ValueError, match="a fused model"):
            change()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(scaled)
    assert scaled.to("cpu").eval() is scaled


def test_threads_fuse_and_call_at_once(scaled):
    other = inference.fuse(scaled.model, torch.ones(2, 3))
    inputs = [torch.randn(n, 3) for n in (2, 3, 4)]
    with torch.no_grad():
        expected = [scaled.model(x) for x in inputs]
    wrong: list[object] = []

    def work(first: int) -> None:
        try:
            for i in range(6):
                for each in (scaled, other):
                    if not torch.equal(each(inputs[(first + i) % 3]), expected[(first + i) % 3]):
                        wrong.append(first)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_limit_that_is_no_number():
    model = trained(lambda m, x: (m.b(m.a(x)), m.b(m.a(x)) if m.training else torch.clamp(m.a(x), float("nan"), 1.0)))
    with torch.no_grad():
        assert_same(inference.fuse(model, X)(X), model(X))


def test_plans_serve_what_the_cases_are_for():
    if not plan.serves():
        pytest.skip("this machine has no kernels for plans")
    fused = inference.fuse(trained(CASES["one twice side by side"][0], 8), X)
    assert fused.first.parts

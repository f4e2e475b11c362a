import copy
import shutil

import pytest
import torch
from torch import nn

import cnmix
from cnmix.nn import operators
from cnmix.nn.handles import find_quantizers


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Twice(nn.Module):
    """One layer called twice on the same input, and once more on its own output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x) + self.layer(x))


def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten()
    )


MODELS = [
    pytest.param(mlp, (5, 12), id="mlp"),
    pytest.param(mlp, (2, 3, 12), id="tokens"),
    pytest.param(convolutions, (2, 3, 8, 8), id="convolutions"),
    pytest.param(lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), (2, 4, 9), id="circular"),
    pytest.param(lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4), id="3d"),
    pytest.param(Twice, (4, 6), id="twice"),
]


def train(make, shape, backend, layout=None, **settings):
    """Returns losses, weights and the quantizers' state after a few steps; ``backend`` None is eager mode."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, steps_per_epoch=6, **settings)
    run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    data = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(9):
        x = torch.randn(shape, generator=data)
        x = (x if layout is None else x.to(memory_format=layout)).requires_grad_()
        optimizer.zero_grad()
        loss = run(x).square().mean() * 3
        loss.backward()
        optimizer.step()
        losses += [loss.item(), x.grad.sum().item()]
    model.eval()
    with torch.no_grad():
        losses.append(run(torch.ones(shape)).sum().item())
    states = [m.quantizers.state_dict() for m in model.modules() if hasattr(m, "quantizers")]
    return losses, model.state_dict(), states


def assert_same(eager, compiled):
    assert eager[0] == compiled[0]
    assert all(torch.equal(tensor, compiled[1][name]) for name, tensor in eager[1].items())
    assert eager[2] == compiled[2]


SETTINGS = {
    "widening": {"threshold": 1e-5},
    "stochastic": {"rounding": "stochastic"},
    "adaptive": {},
    "int8": {"max_bitwidth": 8},
}
# Compiling takes half a second: the last two settings, which ask less of a graph, have two models.
COMPILED = [
    pytest.param(*model.values, settings, id=f"{model.id}-{name}")
    for number, (name, settings) in enumerate(SETTINGS.items())
    for model in MODELS
    if number < 2 or model.id in ("mlp", "convolutions")
]


@pytest.mark.parametrize(("make", "shape", "settings"), COMPILED)
def test_a_compiled_model_trains_to_the_same_bits(make, shape, settings):
    assert_same(train(make, shape, None, **settings), train(make, shape, "aot_eager", **settings))


def test_channels_last_keeps_its_layout_in_the_graph():
    arguments = (convolutions, (2, 3, 8, 8))
    layout = torch.channels_last
    assert_same(train(*arguments, None, layout), train(*arguments, "aot_eager", layout))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_inductor_trains_to_the_same_bits():
    assert_same(train(mlp, (5, 12), None), train(mlp, (5, 12), "inductor"))


def test_one_graph_serves_layers_of_a_shape():
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    cnmix.initialize(model, None, max_bitwidth=8)
    for layer in model:
        layer.compile(backend=count)
    plain = copy.deepcopy(model)
    for layer in model:
        layer.compile(backend=count)
    with torch.no_grad():
        expected = model(torch.ones(3, 6))
        assert torch.equal(plain(torch.ones(3, 6)), expected)
    assert len(compiled) == 1


def arguments(module, x, geometry, keep, requires_grad=False):
    tensors = [t.detach().clone().requires_grad_(requires_grad) for t in (x, module.weight, module.bias)]
    return (*tensors, torch.empty(0), module.quantizers.handle, False, geometry, 8, 8, torch.float32, keep)


@pytest.mark.parametrize(
    ("make", "shape", "geometry"),
    [
        (lambda: nn.Linear(8, 5), (3, 8), []),
        (lambda: nn.Linear(8, 5), (2, 3, 8), []),
        (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7), [1, 2, 1, 1, 2, 0]),
        (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 7), [2, 1, 1, 0, 1, 1, 1, 1, 0]),
        (lambda: nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4), [3, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0]),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5), [1, 2, 1, 1, 2, 1, 1]),
        (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 3, 4), [2, 2, 1, 0, 1, 4, 1, 1, 1, 3, 0]),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_pass_opcheck(make, shape, geometry, channels_last):
    if channels_last and len(shape) != 4:
        pytest.skip("torch has this layout for four dimensions")
    module, x = make(), torch.randn(shape)
    cnmix.initialize(module, None, max_bitwidth=8)
    module(x)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    for keep in (True, False):
        torch.library.opcheck(operators.product, arguments(module, x, geometry, keep, requires_grad=keep))
    y, *saved = operators.product(*arguments(module, x, geometry, keep=True))
    handle, shapes = module.quantizers.handle, (list(x.shape), list(module.weight.shape))
    for needs in ([True, True, True], [False, True, False], [False, False, True]):
        torch.library.opcheck(
            operators.product_backward,
            (torch.randn_like(y), *saved, torch.empty(0), handle, False, geometry, *shapes, channels_last, needs),
        )


def test_the_graph_gets_its_own_copy_of_the_weight():
    module = nn.Linear(4, 4)
    cnmix.initialize(module, None, max_bitwidth=8)
    x = torch.randn(3, 4)
    module(x)
    expected = module(x)
    _, _, weight_values, _ = operators.product(*arguments(module, x, [], keep=True))
    weight_values.zero_()
    assert torch.equal(module(x), expected)


def test_a_graph_whose_module_is_gone_says_so():
    module = nn.Linear(4, 4)
    cnmix.initialize(module, None)
    handle = int(module.quantizers.handle)
    assert find_quantizers(handle) is module.quantizers
    assert int(copy.deepcopy(module).quantizers.handle) != handle
    del module
    with pytest.raises(RuntimeError, match="compile the model again"):
        find_quantizers(handle)


def test_integers_that_wait_are_limited_and_taken_once():
    module = nn.Linear(4, 4)
    cnmix.initialize(module, None)
    quantizers = module.quantizers
    numbers = [quantizers.waiting.put((torch.zeros(1), torch.zeros(1))) for _ in range(70)]
    quantizers.waiting.take(numbers[-1], "x")
    for number in (numbers[0], numbers[-1]):
        with pytest.raises(RuntimeError, match="run the backward pass once"):
            quantizers.waiting.take(number, "x")

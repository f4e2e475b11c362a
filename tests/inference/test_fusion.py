"""Fused programs against the integer models that they come from, to the bit."""

import copy
import random

import plan_definition
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnmix
from cnmix import inference
from cnmix.inference.nodes import Call, Fused
from cnmix.inference.norms import _rounds_once
from cnmix.kernels import plan


class RandomNet(nn.Module):
    """Layers drawn at random, each on one or two of the tensors so far."""

    def __init__(self, seed: int, layers: int = 12) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.modules_, self.plan_ = nn.ModuleList(), []
        shapes = [(3, 16)]  # channels and size of each tensor
        for _ in range(layers):
            source = draw.choice([len(shapes) - 1, draw.randrange(len(shapes))])
            channels, size = shapes[source]
            kind = draw.choice(
                ["conv", "conv", "conv", "bn", "relu", "leaky", "clamp", "pool", "cat", "add", "up", "gelu"]
            )
            other = source
            if kind == "conv":
                out, stride = draw.choice([4, 7, 16]), draw.choice([1, 1, 2])
                kernel, groups = draw.choice([1, 3]), draw.choice([1, 1, channels])
                out = channels if groups > 1 else out
                layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=draw.random() < 0.5)
                shapes.append((out, (size - 1) // stride + 1))
            elif kind == "pool" and size > 3:
                layer = nn.MaxPool2d(*draw.choice([(2, 2, 0), (3, 2, 1), (3, 1, 1)]))
                shapes.append((channels, layer(torch.zeros(1, 1, size, size)).shape[-1]))
            elif kind in ("cat", "add"):
                fitting = [
                    i for i, (c, s) in enumerate(shapes) if s == size and (kind == "cat" or c == channels) and i > 0
                ]
                if source == 0 or not fitting:
                    continue
                other, layer = draw.choice(fitting), nn.Identity()
                shapes.append((channels + shapes[other][0] if kind == "cat" else channels, size))
            elif kind == "up" and size <= 8:
                layer = nn.Upsample(scale_factor=2)
                shapes.append((channels, size * 2))
            elif kind in ("bn", "relu", "leaky", "clamp", "gelu"):
                layer = {
                    "bn": nn.BatchNorm2d(channels),
                    "relu": nn.ReLU(inplace=False),
                    "leaky": nn.LeakyReLU(0.1),
                    "clamp": nn.ReLU6(),
                    "gelu": nn.GELU(),
                }[kind]
                shapes.append((channels, size))
            else:
                continue
            self.modules_.append(layer)
            self.plan_.append((kind, source, other))
        channels, size = shapes[-1]
        self.pools = draw.random() < 0.5
        self.head = nn.Linear(channels if self.pools else channels * size * size, 5)
        self.second = draw.randrange(1, len(shapes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for layer, (kind, source, other) in zip(self.modules_, self.plan_, strict=True):
            a, b = values[source], values[other]
            values.append(torch.cat([a, b], 1) if kind == "cat" else a + b if kind == "add" else layer(a))
        last = F.adaptive_avg_pool2d(values[-1], 1) if self.pools else values[-1]
        return self.head(last.flatten(1)), values[self.second]


def images(seed: int, n: int = 2) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def trained(build, into=inference.load, **settings) -> nn.Module:
    """The integer model of a few steps of training, as ``into`` makes it."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    cnmix.initialize(model, optimizer, steps_per_epoch=10, **settings)
    for step in range(2):
        optimizer.zero_grad()
        outputs = model(images(step))
        sum(each.square().mean() for each in outputs).backward()
        optimizer.step()
    state = copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})
    return into(build(), state)


def assert_same(given, expected) -> None:
    for a, b in zip(given, expected, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


@pytest.fixture(params=["native", "definition"])
def _plans(request, monkeypatch):
    if request.param == "definition":
        monkeypatch.setattr(plan, "Plan", plan_definition.PlanDefinition)
        monkeypatch.setattr(plan, "serves", lambda: True)
    elif not plan.serves():
        pytest.skip("this machine has no kernels for plans")


@pytest.mark.usefixtures("_plans")
@pytest.mark.parametrize("seed", range(25))
def test_random_networks(seed):
    model = trained(lambda: RandomNet(seed))
    x = images(99)
    with torch.no_grad():
        expected = model(x)
    fused = inference.fuse(model, x)
    assert_same(fused(x), expected)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_same(fused(channels_last), model(channels_last))
    assert_same(fused.first.program.run(x), expected)
    for scale in (0.0, 1e-4, 1e4):
        with torch.no_grad():
            assert_same(fused(x * scale), model(x * scale))


@pytest.mark.usefixtures("_plans")
@pytest.mark.parametrize("seed", range(8))
def test_random_networks_that_keep_their_batch_norms(seed):
    model = trained(lambda: RandomNet(seed), inference.prepare)
    x = images(99)
    fused = inference.fuse(model, x)
    with torch.no_grad():
        for given_x in (x, x.contiguous(memory_format=torch.channels_last), x * 1e4, x / 0, x * torch.nan):
            assert_same(fused(given_x), model(given_x))


@pytest.mark.usefixtures("_plans")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(value):
    model = trained(lambda: RandomNet(1))
    x = images(5)
    fused = inference.fuse(model, x)
    x[1, 2, 3, 4] = value
    with torch.no_grad():
        assert_same(fused(x), model(x))


class Block(nn.Module):
    """A bottleneck of ResNet, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv1, self.norm1 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 4, 1)
        self.fc = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.pool(self.norm(self.stem(x)).relu_())
        y = self.norm1(self.conv1(x)).relu_()
        y = self.norm2(self.conv2(y)).relu_()
        y = self.norm3(self.conv3(y))
        y += x
        return (self.fc(self.last(y.relu_()).relu_().flatten(1)),)


def test_products_take_along_what_follows_and_integers_travel(monkeypatch):
    monkeypatch.setattr(plan, "Plan", plan_definition.PlanDefinition)
    monkeypatch.setattr(plan, "serves", lambda: True)
    fused = inference.fuse(trained(Block), images(0))
    images_, rows = fused.first.parts  # plans alone: image by image, and all rows of the last product at once
    assert not isinstance(images_, Call)
    assert [node.kind for node in rows.nodes] == ["product"]
    nodes = [*images_.nodes, *rows.nodes]
    chains = [[stage.kind for stage in node.stages] for node in nodes if node.kind == "product"]
    affine = ["multiply", "multiply", "add"]
    assert chains == [
        [*affine, "relu"],
        [*affine, "relu"],
        [*affine, "relu"],
        [*affine, "add_value", "relu"],
        ["multiply", "add", "relu"],
        ["multiply", "add"],
    ]
    floats = [name for node in nodes for name in node.stored]
    assert len(floats) == 3  # the output, what the residual adds, and what that is the maximum of
    assert [node.kind for node in nodes if isinstance(node, Fused)].count("max_pool") >= 1


@pytest.mark.usefixtures("_plans")
def test_batch_norms_that_stay_are_stages():
    model, x = trained(Block, inference.prepare), images(0)
    fused = inference.fuse(model, x)
    assert not any(isinstance(part, Call) for part in fused.first.parts)
    chains = [[stage.kind for stage in node.stages] for part in fused.first.parts for node in part.nodes]
    affine = ["multiply_add"] if _rounds_once() else ["multiply", "add"]
    assert chains.count(["multiply", *affine, "relu"]) == 3
    with torch.no_grad():
        assert_same(fused(x), model(x))


def test_other_shapes_are_fused_when_they_come():
    model = trained(Block)
    fused = inference.fuse(model, images(0, 1))
    for n in (1, 3):
        with torch.no_grad():
            assert_same(fused(images(7, n)), model(images(7, n)))


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match="Block is in training"):
        inference.fuse(Block(), images(0))


def test_what_cannot_be_exported_is_refused():
    class Branch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"torch.export cannot follow Branch"):
        inference.fuse(Branch(3, 3).eval(), torch.ones(2, 3))


class Sequence(nn.Module):
    """Linear layers on (N, positions, features), with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.permute(0, 2, 3, 1).flatten(1, 2).repeat(1, 1, 4)
        y = self.second(F.relu(self.first(x))) + x
        return self.third(F.gelu(y)), y


@pytest.mark.usefixtures("_plans")
def test_linear_layers_on_sequences():
    model = trained(Sequence)
    x = images(3)
    fused = inference.fuse(model, x)
    with torch.no_grad():
        assert_same(fused(x), model(x))


class Viewed(nn.Module):
    """Flattens as many scripts do, which wants memory in the order of the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 49, 5)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return (self.fc(x.view(x.size(0), -1)),)


@pytest.mark.usefixtures("_plans")
def test_a_view_of_what_a_convolution_made():
    model = trained(Viewed)
    x = images(3)
    fused = inference.fuse(model, x)
    assert not any(isinstance(part, Call) for part in fused.first.parts)
    with torch.no_grad():
        assert_same(fused(x), model(x))

"""Bilinear in fixed point: one product of its weight with the outer products of its inputs."""

import copy

import pytest
import torch
from test_functional import WIDTHS, as_integers, random
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import cnmix
from cnmix import QuantizeConfig, inference
from cnmix.kernels import reference
from cnmix.nn import QuantizedBilinear, convert, quantized_modules

SHAPES = [(), (7,), (2, 3), (0,), (2, 0, 3)]


def run(module, shape):
    """One step; returns the inputs, the output and its gradient, and the gradients of the inputs and the weight."""
    x1, x2 = random((*shape, 5)).requires_grad_(), random((*shape, 3), 1).requires_grad_()
    y = module(x1, x2)
    g = random(y.shape, 2)
    y.backward(g)
    return x1, x2, y, g, x1.grad, x2.grad, module.weight.grad, *([] if module.bias is None else [module.bias.grad])


def build(bias=True, **settings):
    torch.manual_seed(0)
    module = nn.Bilinear(5, 3, 4, bias=bias)
    convert(module, QuantizeConfig(**settings))
    return module


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_reference_product_of_the_outer_products(shape, bits, bias):
    module = nn.Bilinear(5, 3, 4, bias=bias)
    convert(module, WIDTHS[bits])
    x1, x2, y, g, grad_x1, grad_x2, grad_weight, *_ = run(module, shape)
    quantizers = module.quantizers
    outer = torch.einsum("...i,...j->...ij", x1, x2).detach()
    qx = as_integers(outer.reshape(-1, 15), quantizers.input)
    qw, qg = (
        as_integers(module.weight.view(4, 15), quantizers.weight),
        as_integers(g.view(-1, 4), quantizers.grad_output),
    )
    expected = reference.matmul(qx, qw._replace(values=qw.values.t())).view(*shape, 4)
    assert torch.equal(y, expected + module.bias if bias else expected)
    grad_outer = reference.matmul(qg, qw).view(outer.shape)
    torch.testing.assert_close(grad_x1, (grad_outer * x2.unsqueeze(-2)).sum(-1))
    torch.testing.assert_close(grad_x2, (grad_outer * x1.unsqueeze(-1)).sum(-2))
    expected = reference.matmul(qg._replace(values=qg.values.t()), qx).view(4, 5, 3)
    assert torch.equal(grad_weight, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_31_bits_are_those_of_torch(shape):
    module = build(bitwidth=31)
    plain = cnmix.dequantize(copy.deepcopy(module))
    assert type(plain) is nn.Bilinear
    for ours, theirs in zip(run(module, shape), run(plain, shape), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        (((2, 5), (2, 4)), ValueError, r"'head' takes 5 and 3 features .*\(2, 5\) and \(2, 4\)"),
        (((2, 4), (2, 3)), ValueError, "takes 5 and 3 features"),
        (((2, 5), (3, 3)), ValueError, "otherwise of one shape"),
        (((5,), (1, 3)), ValueError, "otherwise of one shape"),
        (((), (3,)), ValueError, "takes 5 and 3 features"),
    ],
)
def test_wrong_shapes_are_refused_by_name(shapes, error, message):
    model = nn.ModuleDict({"head": nn.Bilinear(5, 3, 4)})
    convert(model, QuantizeConfig())
    with pytest.raises(error, match=message):
        model["head"](*(torch.ones(shape) for shape in shapes))
    with pytest.raises(TypeError, match=r"takes a float tensor, got torch\.int64"):
        model["head"](torch.ones(2, 5), torch.ones(2, 3, dtype=torch.int64))
    assert model["head"].quantizers.input.state.step == 0


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.both = nn.Linear(6, 5), nn.Linear(6, 3), nn.Bilinear(5, 3, 4)

    def forward(self, x):
        return self.both(self.left(x), self.right(x))


def pair(level="O1", **settings):
    torch.manual_seed(0)
    return cnmix.initialize(Pair(), None, level, **settings)[0]


def train(model, call=None, start=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(start, start + 4):
        optimizer.zero_grad()
        (model if call is None else call)(random((8, 6), seed).requires_grad_()).square().mean().backward()
        optimizer.step()
    return model


def same(a, b):
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert cnmix.state_dict(a)["models"] == cnmix.state_dict(b)["models"]


@pytest.mark.parametrize("settings", [{}, {"threshold": 1e-5}, {"rounding": "stochastic"}])
def test_a_compiled_model_trains_to_the_same_bits(settings):
    torch._dynamo.reset()
    eager, model = train(pair(**settings)), pair(**settings)
    same(eager, train(model, torch.compile(model, backend="aot_eager", fullgraph=True)))
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    plain, again = pair(), pair()
    same(train(plain), train(again, lambda x: checkpoint(again, x, use_reentrant=reentrant)))


def test_gradients_of_a_transform_are_those_of_backward():
    ours, theirs = pair(), pair()
    x = random((8, 6))
    found = grad(lambda p: functional_call(ours, p, (x,)).square().mean())(dict(ours.named_parameters()))
    theirs(x).square().mean().backward()
    assert all(torch.equal(found[name], parameter.grad) for name, parameter in theirs.named_parameters())


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_half_levels(level):
    model, seen = pair(level), []
    model.both.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    train(model)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert model(random((8, 6))).dtype == model.both.weight.grad.dtype == torch.float32


def test_resume_and_integer_inference():
    model = train(pair())
    state = {"state_dict": copy.deepcopy(model.state_dict()), "cnmix": cnmix.state_dict(model)}
    infers = inference.prepare(Pair(), state)
    assert torch.equal(infers(random((8, 6))), model.eval()(random((8, 6))))
    again = pair()
    again.load_state_dict(state["state_dict"])
    cnmix.load_state_dict(state["cnmix"], again)
    same(train(again, start=4), train(model.train(), start=4))


def test_the_weight_is_quantized_once_per_version():
    module = build()
    x = random((7, 5)), random((7, 3))
    module(*x)
    integers = module.quantizers.quantize_weight(module.weight, True)
    module(*x)
    assert module.quantizers.quantize_weight(module.weight, True) is integers
    with torch.no_grad():
        module.weight += 1
    assert module.quantizers.quantize_weight(module.weight, True) is not integers


def test_summary_rules_and_parametrizations():
    model = pair(rules=[{"types": "Bilinear", "width": 16}])
    row = cnmix.summary(model, random((8, 6))).rows[2]
    assert (row.fqn, row.kind, row.product, row.widths) == ("both", "Bilinear", "matmul", (16, 16, 16))
    assert row.macs == 8 * 4 * 5 * 3
    small = nn.Sequential(nn.Bilinear(32, 32, 15), nn.Bilinear(32, 32, 16))
    cnmix.initialize(small, None, rules=[{"small": True, "leave_out": True}])
    assert [fqn for fqn, _ in quantized_modules(small)] == ["1"]
    normed = nn.ModuleList([parametrizations.weight_norm(nn.Bilinear(5, 3, 4))])
    cnmix.initialize(normed, None)
    assert isinstance(normed[0], QuantizedBilinear)
    normed[0](*(random((7, n)) for n in (5, 3))).sum().backward()
    assert all(parameter.grad is not None for parameter in normed.parameters())


def test_what_is_saved_of_the_outer_products_is_integers():
    module, saved = build(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(random((7, 5)).requires_grad_(), random((7, 3)).requires_grad_())
    assert {(t.numel(), t.dtype) for t in saved if t.dtype != torch.int64} == {
        (7 * 5, torch.float32),
        (7 * 3, torch.float32),
        (7 * 15, torch.int8),
        (60, torch.int8),
    }

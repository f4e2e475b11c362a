"""Transposed convolutions in fixed point."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_functional import WIDTHS, as_integers, random, run
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint_sequential

import cnmix
from cnmix import QuantizeConfig, inference
from cnmix.kernels import reference
from cnmix.nn import QuantizedConvTranspose2d, convert, quantized_modules

CASES = {
    "1d": (nn.ConvTranspose1d(3, 4, 3), (2, 3, 7)),
    "1d unbatched": (nn.ConvTranspose1d(3, 4, 3, padding=1), (3, 7)),
    "1d stride, output padding": (nn.ConvTranspose1d(2, 4, 4, stride=3, padding=2, output_padding=2), (2, 2, 5)),
    "2d": (nn.ConvTranspose2d(3, 4, 3), (2, 3, 4, 5)),
    "2d no bias": (nn.ConvTranspose2d(3, 4, 3, bias=False), (2, 3, 4, 5)),
    "2d doubles": (nn.ConvTranspose2d(3, 4, 2, stride=2), (2, 3, 4, 5)),
    "2d stride": (
        nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
        (2, 3, 4, 3),
    ),
    "2d dilation": (nn.ConvTranspose2d(3, 4, 3, dilation=(1, 2), padding=2), (2, 3, 4, 5)),
    "2d output padding of whole strides": (
        nn.ConvTranspose2d(3, 4, 3, stride=2, dilation=4, output_padding=(3, 2), padding=3),
        (2, 3, 4, 5),
    ),
    "2d points, output padding": (nn.ConvTranspose2d(3, 4, 1, dilation=3, output_padding=2), (2, 3, 4, 5)),
    "2d padding over the kernel": (nn.ConvTranspose2d(3, 4, 2, padding=2), (2, 3, 6, 5)),
    "2d groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 3, 5)),
    "2d depthwise": (nn.ConvTranspose2d(4, 4, 3, groups=4, stride=2, padding=1), (2, 4, 5, 5)),
    "2d depthwise, two each": (nn.ConvTranspose2d(3, 6, 3, groups=3, stride=2), (2, 3, 4, 5)),
    "2d unbatched": (nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 4, 5)),
    "2d empty batch": (nn.ConvTranspose2d(3, 4, 3, padding=1), (0, 3, 6, 5)),
    "3d": (nn.ConvTranspose3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
    "3d groups, stride": (nn.ConvTranspose3d(4, 2, (1, 2, 3), stride=(1, 2, 1), groups=2), (2, 4, 3, 2, 3)),
}


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_reference_product_of_its_operands(case, bits):
    module, shape = copy.deepcopy(CASES[case][0]), CASES[case][1]
    convert(module, WIDTHS[bits])
    spatial = len(module.kernel_size)
    x = random(shape)
    y, g, grad_x, grad_weight, grad_bias = run(module, x)
    batched, g_batched = (t.view(-1, *t.shape[-spatial - 1 :]) if t.dim() == spatial + 1 else t for t in (x, g))
    geometry = module.stride, module.padding, module.dilation, module.groups
    quantizers = module.quantizers
    qx, qw = as_integers(batched, quantizers.input), as_integers(module.weight, quantizers.weight)
    qg = as_integers(g_batched, quantizers.grad_output)
    expected = reference.convolution_grad_input(qx, qw, g_batched.shape, *geometry)
    if module.bias is not None:
        expected += module.bias.detach().view(-1, *(1,) * spatial)
        torch.testing.assert_close(grad_bias, g.transpose(0, -spatial - 1).flatten(1).sum(1))
    assert torch.equal(y, expected.view(y.shape))
    grad_batched = reference.convolution(qg, qw, *geometry)[tuple(slice(n) for n in batched.shape)]
    assert torch.equal(grad_x, grad_batched.reshape(shape))
    assert torch.equal(grad_weight, reference.convolution_grad_weight(qx, qg, module.weight.shape, *geometry))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_31_bits_are_those_of_torch(case, layout):
    plain, shape = CASES[case]
    if layout == torch.channels_last and len(shape) != 4:
        pytest.skip("torch has this layout for four dimensions")
    module = copy.deepcopy(plain)
    convert(module, QuantizeConfig(bitwidth=31))
    x = random(shape).to(memory_format=layout)
    for ours, theirs in zip(run(module, x), run(copy.deepcopy(plain), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["2d doubles", "2d output padding of whole strides", "2d depthwise"])
def test_channels_last_in_and_out(case):
    module, shape = copy.deepcopy(CASES[case][0]), CASES[case][1]
    convert(module, QuantizeConfig())
    x = random(shape).to(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()
    assert torch.equal(y, module(x.contiguous()))
    y.sum().backward()
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_and_gradient_have_the_dtype_of_the_input(dtype):
    module = nn.ConvTranspose2d(3, 4, 3, stride=2)
    convert(module, QuantizeConfig())
    x = random((2, 3, 4, 5)).to(dtype).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("size", [(8, 10), [9, 11], torch.Size((2, 4, 8, 11))])
def test_output_size(size):
    plain = nn.ConvTranspose2d(3, 4, 2, stride=2)
    module = copy.deepcopy(plain)
    convert(module, QuantizeConfig(bitwidth=31))
    x = random((2, 3, 4, 5))
    torch.testing.assert_close(module(x, output_size=size), plain(x, output_size=size))
    assert torch.equal(module(x[0], tuple(size)[-2:]), module(x, size)[0])


@pytest.mark.parametrize(
    ("make", "shape", "size", "message"),
    [
        (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (2, 3, 4, 5), (8, 13), "'up': requested an output size"),
        (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (2, 3, 4, 5), (8,), "'up'.*must have 2 or 4 elements"),
        (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 4, 4, 5), None, r"'up' takes \(batch, 3 channels"),
        (lambda: nn.ConvTranspose2d(3, 4, 2), (3, 4), None, r"'up' takes \(batch, 3 channels"),
        (lambda: nn.ConvTranspose2d(3, 4, 2, padding=2), (2, 3, 3, 4), None, r"'up': an input of .*\(0, 1\).*padding"),
        (
            lambda: nn.ConvTranspose1d(3, 4, 2, stride=2, output_padding=2),
            (2, 3, 4),
            None,
            r"'up': output_padding \(2,\) must be smaller than the stride \(2,\) or the dilation \(1,\)",
        ),
    ],
)
def test_wrong_use_is_refused_by_name_and_moves_nothing(make, shape, size, message):
    model = nn.ModuleDict({"up": make()})
    convert(model, QuantizeConfig())
    with pytest.raises(ValueError, match=message):
        model["up"](torch.ones(shape), size)
    assert model["up"].quantizers.input.state.step == 0


class UNet(nn.Module):
    """A level of one: down, up, and the two side by side."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.out(torch.cat((x, self.up(self.down(x).relu(), output_size=x.shape)), 1))


def train(model, run=None, steps=4, start=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        (model if run is None else run)(random((2, 2, 8, 7), seed)).square().mean().backward()
        optimizer.step()
    return model


def build(level="O1", **settings):
    torch.manual_seed(0)
    return cnmix.initialize(UNet(), None, level, **settings)[0]


def same(a, b):
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert cnmix.state_dict(a)["models"] == cnmix.state_dict(b)["models"]


@pytest.mark.parametrize("settings", [{}, {"threshold": 1e-5}, {"rounding": "stochastic"}])
def test_a_compiled_model_trains_to_the_same_bits(settings):
    torch._dynamo.reset()
    eager, model = train(build(**settings)), build(**settings)
    same(eager, train(model, torch.compile(model, backend="aot_eager", fullgraph=True)))
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    def parts(model):
        return nn.Sequential(model.down, model.up)

    plain, again = build(), build()
    x = random((2, 2, 8, 7)).requires_grad_()
    for _ in range(3):
        parts(plain)(x).sum().backward()
        checkpoint_sequential(parts(again), 2, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(plain.up.weight.grad, again.up.weight.grad)
    assert cnmix.state_dict(plain)["models"] == cnmix.state_dict(again)["models"]


def test_gradients_of_a_transform_are_those_of_backward():
    ours, theirs = build(), build()
    x = random((2, 2, 8, 7))
    found = grad(lambda p: functional_call(ours, p, (x,)).square().mean())(dict(ours.named_parameters()))
    theirs(x).square().mean().backward()
    assert all(torch.equal(found[name], parameter.grad) for name, parameter in theirs.named_parameters())


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_half_levels(level):
    model, seen = build(level), []
    model.up.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    train(model)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert model(random((2, 2, 8, 7))).dtype == model.up.weight.grad.dtype == torch.float32


def test_resume_integer_inference_and_dequantize():
    model = train(build())
    state = {"state_dict": copy.deepcopy(model.state_dict()), "cnmix": cnmix.state_dict(model)}
    infers = inference.prepare(UNet(), state)
    assert torch.equal(infers(random((2, 2, 8, 7))), model.eval()(random((2, 2, 8, 7))))
    again = build()
    again.load_state_dict(state["state_dict"])
    cnmix.load_state_dict(state["cnmix"], again)
    same(train(again, steps=2, start=4), train(model.train(), steps=2, start=4))
    cnmix.dequantize(model)
    assert type(model.up) is nn.ConvTranspose2d


def test_summary_and_rules():
    model = build(rules=[{"types": "ConvTranspose2d", "width": 16}])
    row = cnmix.summary(model, random((2, 2, 8, 7))).rows[1]
    assert (row.fqn, row.kind, row.product, row.widths) == ("up", "ConvTranspose2d", "convolution", (16, 16, 16))
    assert row.macs == 2 * 4 * 4 * 4 * 3 * 9  # each number of the input with every tap of three channels
    assert row.shapes == ((2, 4, 4, 4), (2, 3, 8, 7))
    small = cnmix.initialize(UNet(), None, rules=[{"small": True, "leave_out": True}])[0]
    assert not any(quantized_modules(small))
    large = nn.Sequential(nn.ConvTranspose2d(32, 64, 2, stride=2))
    cnmix.initialize(large, None, rules=[{"small": True, "leave_out": True}])
    assert type(large[0]) is QuantizedConvTranspose2d


def test_only_integers_are_saved():
    module = nn.ConvTranspose1d(4, 3, 2)
    convert(module, QuantizeConfig())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(random((2, 4, 5)).requires_grad_())
    assert [t.numel() for t in saved if t.dtype == torch.int8] == [40, 24]
    assert {t.dtype for t in saved} == {torch.int8, torch.int64}


def distributed(rank):
    model = build()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        F.mse_loss(wrapped(random((2, 2, 8, 7), 2 * seed + rank)), torch.zeros(())).backward()
        optimizer.step()
    return cnmix.state_dict(model)["models"], model.up.weight.detach()


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_processes_agree(processes):
    first, second = processes.run(distributed)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnmix import QuantizeConfig
from cnmix.adaptive import OperandQuantizer
from cnmix.fixed_point import FixedPoint
from cnmix.kernels import reference
from cnmix.nn import convert

LINEAR = {
    "2d": ((7, 5), True),
    "1d": ((5,), True),
    "3d": ((2, 3, 5), True),
    "4d": ((2, 1, 2, 5), True),
    "no bias": ((7, 5), False),
    "one row": ((1, 5), True),
    "empty batch": ((0, 5), True),
    "empty inner batch": ((2, 0, 5), False),
}
CONVOLUTION = {
    "1d": (nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "1d unbatched": (nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "1d same, even kernel": (nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 9)),
    "1d same, dilated": (nn.Conv1d(2, 4, 4, padding="same", dilation=3), (2, 2, 13)),
    "1d circular": (nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular"), (2, 2, 6)),
    "2d": (nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
    "2d no bias": (nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 5)),
    "2d stride": (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 3, 8, 9)),
    "2d stride that leaves a rest": (nn.Conv2d(2, 3, 3, stride=3, padding=1), (2, 2, 9, 8)),
    "2d dilation": (nn.Conv2d(3, 4, 3, dilation=(1, 2), padding=2), (2, 3, 6, 7)),
    "2d groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "2d depthwise, two each": (nn.Conv2d(3, 6, 3, groups=3, stride=2), (2, 3, 5, 5)),
    "2d one by one": (nn.Conv2d(3, 4, 1), (2, 3, 4, 5)),
    "2d same": (nn.Conv2d(3, 4, (3, 2), padding="same"), (2, 3, 6, 5)),
    "2d valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 5)),
    "2d unbatched": (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "2d unbatched, same": (nn.Conv2d(3, 4, 3, padding="same"), (3, 6, 5)),
    "2d reflect": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 6, 5)),
    "2d reflect, same": (nn.Conv2d(3, 4, (4, 3), padding="same", padding_mode="reflect"), (2, 3, 6, 5)),
    "2d circular": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular", stride=2), (2, 3, 6, 5)),
    "2d replicate": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="replicate"), (2, 3, 6, 5)),
    "2d empty batch": (nn.Conv2d(3, 4, 3, padding=1), (0, 3, 6, 5)),
    "3d": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
    "3d groups, stride": (nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), groups=2), (2, 2, 3, 4, 5)),
    "3d replicate, unbatched": (nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"), (2, 3, 4, 3)),
    "3d same": (nn.Conv3d(2, 2, (2, 3, 1), padding="same"), (1, 2, 3, 4, 3)),
}
WIDTHS = {8: QuantizeConfig(mode="fixed_width"), 16: QuantizeConfig(bitwidth=16, mode="fixed_width")}
WIDTHS[31] = QuantizeConfig(bitwidth=31, exact_int31=True)


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_integers(x, quantizer):
    bits, position = quantizer.state.bits, quantizer.state.position or 0
    return FixedPoint(reference.quantize(x.detach(), bits, position), bits, position)


def run(module, x):
    """One step; returns the converted module, output, its gradient, and the input's, weight's and bias's."""
    x = x.clone().requires_grad_()
    y = module(x)
    g = random(y.shape, 1)
    y.backward(g)
    return y, g, x.grad, module.weight.grad, None if module.bias is None else module.bias.grad


def padded_by_hand(conv, x):
    """What the convolution multiplies: the input with its own padding around it, and the padding that remains."""
    spatial = len(conv.kernel_size)
    if conv.padding == "valid":
        return x, (0,) * spatial
    if conv.padding_mode == "zeros" and conv.padding != "same":
        return x, conv.padding
    sides = []
    for n in reversed(range(spatial)):
        both = conv.dilation[n] * (conv.kernel_size[n] - 1) if conv.padding == "same" else 2 * conv.padding[n]
        sides += [both // 2, both - both // 2]
    return F.pad(x, sides, mode=conv.padding_mode.replace("zeros", "constant")), (0,) * spatial


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("case", LINEAR)
def test_linear_is_the_reference_product_of_its_operands(case, bits):
    shape, bias = LINEAR[case]
    torch.manual_seed(3)
    linear = nn.Linear(5, 4, bias=bias)
    convert(linear, WIDTHS[bits])
    x = random(shape)
    y, g, grad_x, grad_weight, grad_bias = run(linear, x)
    quantizers = linear.quantizers
    qx = as_integers(x.reshape(-1, 5), quantizers.input)
    qw, qg = as_integers(linear.weight, quantizers.weight), as_integers(g.reshape(-1, 4), quantizers.grad_output)
    expected = reference.matmul(qx, qw._replace(values=qw.values.t())).view(*shape[:-1], 4)
    assert torch.equal(y, expected + linear.bias if bias else expected)
    assert torch.equal(grad_x, reference.matmul(qg, qw).view(shape))
    assert torch.equal(grad_weight, reference.matmul(qg._replace(values=qg.values.t()), qx))
    if bias:
        torch.testing.assert_close(grad_bias, g.reshape(-1, 4).sum(0))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("case", CONVOLUTION)
def test_convolution_is_the_reference_product_of_its_operands(case, bits):
    conv, shape = copy.deepcopy(CONVOLUTION[case][0]), CONVOLUTION[case][1]
    convert(conv, WIDTHS[bits])
    spatial = len(conv.kernel_size)
    x = random(shape)
    y, g, grad_x, grad_weight, grad_bias = run(conv, x)
    leaf = (x if x.dim() == spatial + 2 else x[None]).clone().requires_grad_()
    padded, padding = padded_by_hand(conv, leaf)
    geometry = conv.stride, padding, conv.dilation, conv.groups
    quantizers = conv.quantizers
    qx, qw = as_integers(padded, quantizers.input), as_integers(conv.weight, quantizers.weight)
    qg = as_integers(g.view(-1, *g.shape[-spatial - 1 :]), quantizers.grad_output)
    expected = reference.convolution(qx, qw, *geometry)
    if conv.bias is not None:
        expected += conv.bias.detach().view(-1, *(1,) * spatial)
        torch.testing.assert_close(grad_bias, g.transpose(0, -spatial - 1).flatten(1).sum(1))
    assert y.dtype == torch.float32
    assert torch.equal(y, expected.view(y.shape))
    grad_padded = reference.convolution_grad_input(qg, qw, padded.shape, *geometry)
    if padded is not leaf:
        (grad_padded,) = torch.autograd.grad(padded, leaf, grad_padded)
    assert torch.equal(grad_x, grad_padded.view(shape))
    assert torch.equal(grad_weight, reference.convolution_grad_weight(qg, qx, conv.weight.shape, *geometry))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", CONVOLUTION)
def test_convolution_of_31_bits_is_that_of_torch(case):
    plain, shape = copy.deepcopy(CONVOLUTION[case][0]), CONVOLUTION[case][1]
    conv = copy.deepcopy(plain)
    convert(conv, QuantizeConfig(bitwidth=31))
    x = random(shape)
    for ours, theirs in zip(run(conv, x), run(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def saved_by(module, x):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    return y, [tensor for tensor in saved if tensor.dtype != torch.int64]  # those are widths and positions


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, 1, padding="same")])
def test_only_integers_are_saved(make, bits):
    module = make()
    convert(module, WIDTHS[bits])
    shape = (3, 6) if isinstance(module, nn.Linear) else (3, 6, 2, 2)
    dtype = {8: torch.int8, 16: torch.int16, 31: torch.int32}[bits]
    x = random(shape).requires_grad_()
    y, saved = saved_by(module, x)
    assert [(t.dtype, t.numel()) for t in saved] == [(dtype, x.numel()), (dtype, module.weight.numel())]
    y.sum().backward()

    _, saved = saved_by(module, x.detach())
    assert [t.numel() for t in saved] == [x.numel()]
    module.weight.requires_grad_(False)
    y, saved = saved_by(module, x)
    assert [t.numel() for t in saved] == [module.weight.numel()]
    module.weight.grad = None
    y.sum().backward()
    assert module.weight.grad is None
    y, saved = saved_by(module, x.detach())
    assert saved == []
    module.bias.grad = None
    before = module.quantizers.grad_output.state_dict()
    y.sum().backward()
    assert torch.equal(module.bias.grad, torch.full((4,), float(y.numel() // 4)))
    assert module.quantizers.grad_output.state_dict() == before


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Linear(6, 4), (3, 6)), (lambda: nn.Conv1d(6, 4, 2), (2, 6, 5))]
)
def test_gradient_is_quantized_once_for_both_products(make, shape, monkeypatch):
    module = make()
    convert(module, QuantizeConfig())
    seen = []
    original = OperandQuantizer.measured
    monkeypatch.setattr(
        OperandQuantizer, "measured", lambda self, *rest, **more: seen.append(self) or original(self, *rest, **more)
    )
    run(module, random(shape))
    operands = module.quantizers
    assert seen == [operands.input, operands.weight, operands.grad_output]
    assert all(operand.state.step == operand.state.updates == 1 for _, operand in operands)


def test_mixed_widths_are_the_reference_product():
    linear = nn.Linear(5, 4)
    convert(linear, WIDTHS[8])
    operands = linear.quantizers
    operands.weight.state.bits, operands.grad_output.state.bits = 16, 31
    operands.grad_output.config = operands.input.config = WIDTHS[31].replace(bitwidth=8, mode="fixed_width")
    x = random((7, 5))
    y, g, grad_x, grad_weight, _ = run(linear, x)
    qx, qw, qg = (as_integers(t, q) for t, (_, q) in zip((x, linear.weight, g), operands, strict=True))
    assert [q.values.dtype for q in (qx, qw, qg)] == [torch.int8, torch.int16, torch.int32]
    assert torch.equal(y, reference.matmul(qx, qw._replace(values=qw.values.t())) + linear.bias)
    assert torch.equal(grad_x, reference.matmul(qg, qw))
    assert torch.equal(grad_weight, reference.matmul(qg._replace(values=qg.values.t()), qx))


def test_gradients_of_31_bits_are_those_of_float32():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 5),
    )
    model = copy.deepcopy(plain)
    convert(model, QuantizeConfig(bitwidth=31))
    x, labels = random((4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])
    for each in (plain, model):
        F.cross_entropy(each(x), labels).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()


def test_gradients_accumulate_and_flow_through_a_shared_weight():
    linear = nn.Linear(4, 4, bias=False)
    twice = copy.deepcopy(linear)
    convert(twice, QuantizeConfig(bitwidth=31))
    x = random((3, 4))
    for each in (linear, twice):
        each(each(x).relu()).sum().backward()
    torch.testing.assert_close(twice.weight.grad, linear.weight.grad, rtol=1e-5, atol=1e-5)


def test_no_second_derivatives():
    linear = nn.Linear(4, 4)
    convert(linear, QuantizeConfig())
    x = random((3, 4)).requires_grad_()
    (grad,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()

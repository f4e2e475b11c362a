"""Products of float tensors on cards that multiply integers only, and the same on those that multiply floats."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cnmix.torch_mlu
from cnmix.fixed_point import FixedPoint, choose_position
from cnmix.kernels import reference
from cnmix.torch_mlu.core import mlu_model as ct
from cnmix.torch_mlu.settings import configure


@pytest.fixture(autouse=True)
def floating_as_before() -> Iterator[None]:
    yield
    configure(floating=None)


@pytest.fixture
def int31_card() -> None:
    cnmix.torch_mlu.install(card_name="MLU270")


def quantized(x: Tensor) -> FixedPoint:
    """Quantizes by the definition: each operand at the position of its own largest magnitude."""
    bits = 16 if x.dtype in (torch.float16, torch.bfloat16) else 31
    floats = x.to(torch.float32)
    position = choose_position(float(floats.abs().max()), bits)
    return FixedPoint(reference.quantize(floats, bits, position), bits, position)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close_to(found: Tensor, expected: Tensor) -> bool:
    """Whether results are the definition's: int31's default mode rounds its sums to float64 first."""
    return torch.equal(found.cpu(), expected.to(found.dtype))


@pytest.mark.parametrize("bits", [8, 16])
def test_the_width_of_all_products_can_be_set(int31_card: None, bits: int) -> None:
    a, b = random(5, 7), random(7, 3, seed=1)
    ct.set_quantized_bitwidth(bits)
    try:
        found = a.mlu() @ b.mlu()
    finally:
        ct.set_quantized_bitwidth(31)
    operands = []
    for each in (a, b):
        position = choose_position(float(each.abs().max()), bits)
        operands.append(FixedPoint(reference.quantize(each, bits, position), bits, position))
    assert torch.equal(found.cpu(), reference.matmul(*operands))


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forms", ["mm", "mv", "dot", "bmm"])
def test_products_of_matrices_are_the_definitions(int31_card: None, forms: str, dtype: torch.dtype) -> None:
    shapes = {"mm": ((5, 7), (7, 3)), "mv": ((5, 7), (7,)), "dot": ((7,), (7,)), "bmm": ((4, 5, 7), (4, 7, 3))}[forms]
    a, b = (random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    found = getattr(torch, forms)(a.to("mlu"), b.to("mlu"))
    left, right = quantized(a), quantized(b)
    left = left._replace(values=left.values.unsqueeze(0) if a.dim() == 1 else left.values)
    right = right._replace(values=right.values.unsqueeze(-1) if b.dim() == 1 else right.values)
    product = reference.batched_matmul if a.dim() == 3 else reference.matmul
    expected = product(left, right).reshape(found.shape)
    assert (found.dtype, found.device.type) == (dtype, "mlu")
    assert close_to(found, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 6), st.integers(-30, 30), st.integers(0, 1000))
def test_any_shape_and_magnitude(m: int, k: int, n: int, power: int, seed: int) -> None:
    cnmix.torch_mlu.install(card_name="MLU290")
    a, b = random(m, k, seed=seed, scale=2.0**power), random(k, n, seed=seed + 1)
    found = a.to("mlu") @ b.to("mlu").t().contiguous().t()
    assert close_to(found, reference.matmul(quantized(a), quantized(b)))


CONVOLUTIONS = [
    pytest.param((2, 4, 9), (6, 4, 3), {"stride": 2, "padding": 1}, id="1d"),
    pytest.param((2, 4, 7, 6), (6, 2, 3, 2), {"padding": (1, 0), "groups": 2}, id="2d in groups"),
    pytest.param((2, 4, 7, 6), (4, 1, 3, 3), {"dilation": 2, "padding": 2, "groups": 4}, id="depthwise, dilated"),
    pytest.param((1, 3, 5, 4, 6), (2, 3, 2, 3, 2), {"stride": (1, 2, 1)}, id="3d"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x_shape", "weight_shape", "options"), CONVOLUTIONS)
def test_convolutions_and_their_gradients_are_the_definitions(
    int31_card: None,
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    options: dict[str, object],
    dtype: torch.dtype,
) -> None:
    spatial = len(x_shape) - 2
    x, weight = random(*x_shape, dtype=dtype), random(*weight_shape, seed=1, dtype=dtype)
    on_card = [each.to("mlu").requires_grad_() for each in (x, weight)]
    convolve: Callable[..., Tensor] = getattr(F, f"conv{spatial}d")
    y = convolve(*on_card, **options)
    grad = random(*y.shape, seed=2, dtype=dtype)
    y.backward(grad.to("mlu"))

    geometry = [_tuple(options.get(name, default), spatial) for name, default in _DEFAULTS]
    groups = options.get("groups", 1)
    qx, qw, qg = map(quantized, (x, weight, grad))
    assert close_to(y.detach(), reference.convolution(qx, qw, *geometry, groups))
    grads = [each.grad for each in on_card]
    assert close_to(grads[0], reference.convolution_grad_input(qg, qw, x_shape, *geometry, groups))
    assert close_to(grads[1], reference.convolution_grad_weight(qg, qx, weight_shape, *geometry, groups))
    assert all(each.dtype == dtype and each.device.type == "mlu" for each in grads)


_DEFAULTS = (("stride", 1), ("padding", 0), ("dilation", 1))


def _tuple(value: object, count: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * count  # type: ignore[return-value]


def test_transposed_convolutions(int31_card: None) -> None:
    x, weight = random(2, 4, 5, 5), random(4, 3, 3, 3, seed=1)
    on_card = [each.to("mlu").requires_grad_() for each in (x, weight)]
    y = F.conv_transpose2d(*on_card, stride=2, padding=1, output_padding=1, groups=2)
    grad = random(*y.shape, seed=2)
    y.backward(grad.to("mlu"))

    qx, qw, qg = map(quantized, (x, weight, grad))
    geometry = ((2, 2), (1, 1), (1, 1), 2)
    assert close_to(y.detach(), reference.convolution_grad_input(qx, qw, y.shape, *geometry))
    assert close_to(on_card[0].grad, reference.convolution(qg, qw, *geometry))
    assert close_to(on_card[1].grad, reference.convolution_grad_weight(qx, qg, weight.shape, *geometry))


def test_a_convolution_keeps_channels_last(int31_card: None) -> None:
    x = random(2, 4, 6, 6).to("mlu").to(memory_format=torch.channels_last)
    y = F.conv2d(x, random(3, 4, 3, 3).to("mlu"))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_bias_alpha_and_beta(int31_card: None) -> None:
    z, a, b = random(3), random(5, 7, seed=1), random(7, 3, seed=2)
    product = reference.matmul(quantized(a), quantized(b))
    z_card, a_card, b_card = (each.to("mlu") for each in (z, a, b))
    assert torch.equal(torch.addmm(z_card, a_card, b_card).cpu(), product + z)
    found = torch.addmm(z_card, a_card, b_card, beta=0.5, alpha=2)
    assert torch.equal(found.cpu(), (product * 2).add_(z, alpha=0.5))
    ignored = torch.full((5, 3), torch.nan, device="mlu")
    assert torch.equal(torch.addmm(ignored, a_card, b_card, beta=0).cpu(), product)
    with pytest.raises(RuntimeError, match="shape"):
        torch.addmm(torch.ones(2, 5, 3, device="mlu"), a_card, b_card)
    with pytest.raises(RuntimeError, match="Half"):
        torch.addmm(z_card.half(), a_card, b_card)


@pytest.mark.parametrize("fixed", [False, True])
def test_in_place_and_out_forms(fixed: bool) -> None:
    ct.enable_floating_point_calculation(not fixed)
    a, b, batch = random(5, 7).to("mlu"), random(7, 3, seed=1).to("mlu"), random(2, 5, 7).to("mlu")
    others, vector = random(2, 7, 3, seed=2).to("mlu"), random(7, seed=3).to("mlu")
    z, rows, both = torch.ones(5, 3, device="mlu"), torch.ones(5, device="mlu"), torch.ones(2, 5, 3, device="mlu")
    for function, operands in {
        torch.mm: (a, b),
        torch.bmm: (batch, others),
        torch.mv: (a, vector),
        torch.addmm: (z, a, b),
        torch.addmv: (rows, a, vector),
        torch.baddbmm: (both, batch, others),
        torch.addbmm: (z, batch, others),
    }.items():
        expected = function(*operands)
        out = torch.empty(0, device="mlu")
        assert function(*operands, out=out) is out
        assert torch.equal(out, expected)
        if function.__name__.startswith("add") or function is torch.baddbmm:
            target = operands[0].clone()
            version = target._version
            assert getattr(target, f"{function.__name__}_")(*operands[1:]) is target
            assert torch.equal(target, expected)
            assert target._version > version
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(a, b, out=torch.empty(0, device="mlu", dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"in place|expand|shape"):
        torch.ones(3, device="mlu").addmm_(a, b)


def test_linear_of_any_shape(int31_card: None) -> None:
    weight, bias = random(3, 7, seed=1), random(3, seed=2)
    for shape in ((7,), (5, 7), (2, 5, 7), (2, 2, 5, 7), (0, 7)):
        x = random(*shape)
        found = F.linear(x.to("mlu"), weight.to("mlu"), bias.to("mlu"))
        assert found.shape == (*shape[:-1], 3)
        if x.numel():
            flat = x.reshape(-1, 7)
            expected = reference.matmul(quantized(flat), quantized(weight.t())) + bias
            assert torch.equal(found.cpu(), expected.reshape(found.shape))


def test_integers_and_complex_numbers_are_the_hosts(int31_card: None) -> None:
    integers = torch.arange(6).reshape(2, 3)
    assert torch.equal((integers.to("mlu") @ integers.t().to("mlu")).cpu(), integers @ integers.t())
    numbers = torch.randn(2, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert torch.equal((numbers.to("mlu") @ numbers.t().to("mlu")).cpu(), numbers @ numbers.t())


def test_nothing_to_multiply(int31_card: None) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="mlu")

    assert torch.mm(empty(0, 3), empty(3, 2)).shape == (0, 2)
    assert torch.equal(torch.mm(empty(2, 0), empty(0, 3)).cpu(), torch.zeros(2, 3))
    assert torch.bmm(empty(0, 2, 3), empty(0, 3, 2)).shape == (0, 2, 2)
    assert torch.dot(empty(0), empty(0)).item() == 0
    x = torch.empty(0, 2, 4, 4, device="mlu", requires_grad=True)
    weight = torch.ones(3, 2, 3, 3, device="mlu", requires_grad=True)
    y = F.conv2d(x, weight)
    assert y.shape == (0, 3, 2, 2)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(int31_card: None, value: float) -> None:
    a = random(5, 7).to("mlu")
    a[2, 3] = value
    assert torch.mm(a, random(7, 3).to("mlu")).isnan().all()
    image = random(1, 2, 5, 5).to("mlu")
    image[0, 0, 0, 0] = value
    assert F.conv2d(image, random(1, 2, 3, 3).to("mlu")).isnan().all()


def test_what_does_not_go_together_raises(int31_card: None) -> None:
    a = random(5, 7).to("mlu")
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(5x7 and 5x7\)"):
        torch.mm(a, a)
    with pytest.raises(RuntimeError, match=r"torch.float32, torch.float16: convert"):
        torch.mm(a, a.t().half())
    with pytest.raises(RuntimeError, match="dimensions"):
        torch.bmm(a, a)
    with pytest.raises(RuntimeError, match="mlu:1"):
        torch.mm(a, a.t().to("mlu:1"))


def test_strict_products_refuse_tensors_of_the_host() -> None:
    cnmix.torch_mlu.install(strict=True)
    a = random(5, 7)
    for operands in ((a, a.t().to("mlu")), (a.to("mlu"), a.t())):
        with pytest.raises(RuntimeError, match="from the host"):
            torch.mm(*operands)
    with pytest.raises(RuntimeError, match="bias from the host"):
        F.conv1d(random(1, 2, 5).to("mlu"), random(3, 2, 3).to("mlu"), random(3))


class _Everything(nn.Module):
    """Each kind of product once."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.lstm = nn.LSTM(16, 8, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.relu(self.convolution(x))).mean(1).flatten(1).unflatten(1, (16, 16))
        y = self.attention(self.gru(self.lstm(y)[0])[0])
        return self.last(y.mean(1))


def _train(model: nn.Module, device: str, steps: int = 12) -> list[float]:
    model = copy.deepcopy(model).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        x, target = random(6, 1, 8, 8, seed=step).to(device), (torch.arange(6) % 3).to(device)
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_is_close_to_floats(int31_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = _Everything()
    on_card, on_host = _train(model, "mlu"), _train(model, "cpu")
    assert on_card == pytest.approx(on_host, rel=2e-3, abs=2e-4)
    assert on_card != on_host


def test_evaluation_takes_the_same_products(int31_card: None) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = random(2, 5, 16)
    with torch.no_grad():
        host = layer(x)
        layer.to("mlu")
        fixed = layer(x.to("mlu"))
        ct.enable_floating_point_calculation(True)
        floating = layer(x.to("mlu"))
    assert torch.equal(floating.cpu(), host)
    assert torch.allclose(fixed.cpu(), host, atol=1e-5)
    assert not torch.equal(fixed.cpu(), host)


def test_a_card_that_multiplies_floats_has_the_hosts_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.Linear(16, 3))
    assert _train(model, "mlu") == _train(model, "cpu")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_has_the_hosts_bits(causal: bool, mask: str | None) -> None:
    if causal and mask:
        pytest.skip("either one or the other")
    given_mask = None if mask is None else random(1, 1, 6, 6) > 0 if mask == "bool" else random(1, 1, 6, 6)
    found = []
    for device in ("cpu", "mlu"):
        operands = [random(2, 3, 6, 8, seed=seed).to(device).requires_grad_() for seed in range(3)]
        own_mask = None if given_mask is None else given_mask.to(device)
        y = F.scaled_dot_product_attention(*operands, attn_mask=own_mask, is_causal=causal)
        y.square().sum().backward()
        found.append([y.detach().cpu(), *(each.grad.cpu() for each in operands)])
    assert all(map(torch.equal, *found))
    assert type(y.grad_fn).__name__ != "ScaledDotProductFlashAttentionForCpuBackward0"


def test_the_mode_can_be_changed() -> None:
    a, b = random(5, 70).to("mlu"), random(70, 3, seed=1).to("mlu")
    floating = torch.mm(a, b)
    ct.enable_floating_point_calculation(False)
    fixed = torch.mm(a, b)
    assert not torch.equal(fixed, floating)
    configure(floating=None)
    assert torch.equal(torch.mm(a, b), floating)


def test_gradients_of_gradients(int31_card: None) -> None:
    x = random(4, 4).to("mlu").requires_grad_()
    (grad,) = torch.autograd.grad((x @ x).square().sum(), x, create_graph=True)
    grad.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()

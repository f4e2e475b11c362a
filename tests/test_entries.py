"""Products of batches whose matrices have positions of their own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cnmix
from cnmix.adaptive import OperandQuantizer
from cnmix.config import QuantizeConfig
from cnmix.entries import quantize_entries, repeat_entries
from cnmix.fixed_point import FixedPoint, FixedPointBatch, dequantize
from cnmix.kernels import reference
from cnmix.nn import quantizer_sets


class Product(nn.Module):
    def forward(self, a, b):
        return a @ b


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def drawn(*shape, seed=0):
    """Matrices of very different range."""
    generator = torch.Generator().manual_seed(seed)
    ranges = torch.exp(4 * torch.randn(*shape[:-2], 1, 1, generator=generator))
    return (torch.randn(shape, generator=generator) * ranges).requires_grad_()


def quantizer(**settings):
    return OperandQuantizer(QuantizeConfig(per_entry=True, **settings), "matmul", "input of 'x'", seed=3)


@pytest.mark.parametrize("bits", [8, 16, 31])
def test_a_product_is_the_references(bits):
    model = Product()
    cnmix.initialize(model, bitwidth=bits, max_bitwidth=bits, per_entry=True)
    a, b, g = drawn(3, 2, 5, 7), drawn(3, 2, 7, 4, seed=1), drawn(3, 2, 5, 4, seed=2).detach()
    y = model(a, b)
    y.backward(g)
    qa, qb, qg = (reference.quantize_batch(x.detach(), bits, batch_dims=2) for x in (a, b, g))
    exact = bits < 31
    for found, left, right in ((y, qa, qb), (a.grad, qg, turned(qb)), (b.grad, turned(qa), qg)):
        expected = reference.batched_matmul(left, right)
        assert torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=1e-6)


def turned(x):
    return x._replace(values=x.values.transpose(-1, -2))


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_matrices_are_broadcast_and_one_operand_may_have_one_position(rounding):
    model = Product()
    rules = [{"operands": "weight", "per_entry": True, "rounding": rounding}]
    cnmix.initialize(model, bitwidth=16, max_bitwidth=16, rules=rules)
    a, b = drawn(5, 7), drawn(3, 2, 7, 4, seed=1)
    y = model(a, b)
    assert torch.allclose(y, a @ b, rtol=1e-2, atol=1e-3 * float(y.detach().abs().max()))
    y.sum().backward()
    assert a.grad.shape == a.shape
    assert torch.isfinite(b.grad).all()


def test_small_matrices_beside_large_ones_keep_their_bits():
    errors = {}
    for per_entry in (False, True):
        model = Attention()
        cnmix.initialize(model, bitwidth=8, max_bitwidth=8, per_entry=per_entry)
        operands = [drawn(4, 3, 10, 16, seed=seed) for seed in range(3)]
        found, expected = model(*operands), Attention()(*operands)
        each = (found - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
        errors[per_entry] = each.median().item()
    assert errors[True] < 0.05 < 0.5 < errors[False]


@pytest.mark.parametrize("measure", ["mean", "l1"])
def test_the_width_adapts_to_the_batch_as_a_whole(measure):
    x = torch.full((6, 32, 32), 0.004)  # below half a step of int8
    x[:, 0, 0] = 1.0
    x *= torch.tensor([1.0, 3.0, 1e3, 1e-3, 7.0, 1.0])[:, None, None]
    narrow, wide = (quantizer(max_bitwidth=bits, error_measure=measure) for bits in (8, 31))
    for each in (narrow, wide):
        quantized = quantize_entries(each, x, True)
        assert (each.state.step, each.state.updates) == (1, 1)
        fits = reference.quantize_batch(x, each.state.bits)
        assert torch.equal(quantized.positions, fits.positions)
        assert torch.equal(quantized.values, fits.values)
    assert narrow.state.exceeds_max_bitwidth
    assert narrow.state.bits == 8 < wide.state.bits
    error = (x - dequantize(reference.quantize_batch(x, 8))).abs().sum() / x.abs().sum()
    if measure == "l1":
        assert narrow.state.error == pytest.approx(torch.log2(error + 1).item(), rel=1e-5)


def test_between_updates_positions_follow_the_data():
    each = quantizer(mode="fixed_interval", interval=100, quantify_rate=0.0)
    quantize_entries(each, drawn(2, 3, 3).detach(), True)
    x = drawn(2, 3, 3, seed=1).detach()
    assert torch.equal(quantize_entries(each, x, True).positions, reference.quantize_batch(x, 8).positions)
    assert (each.state.step, each.state.updates) == (2, 1)
    before = each.state_dict()
    quantize_entries(each, x, False)
    assert each.state_dict() == before


def test_a_step_is_repeated_to_the_bit():
    each = quantizer(rounding="stochastic")
    x = drawn(2, 3, 3).detach()
    first = quantize_entries(each, x, True)
    quantize_entries(each, x, True)
    again = repeat_entries(each, x, (first.bits, None, 1))
    assert torch.equal(again.values, first.values)
    assert not torch.equal(repeat_entries(each, x, (first.bits, None, 2)).values, first.values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_adjusts_nothing(bad, caplog):
    each = quantizer()
    x = drawn(2, 3, 3).detach()
    x[0, 1, 1] = bad
    assert not quantize_entries(each, x, True).finite
    assert (each.state.updates, each.state.step) == (0, 1)
    assert "NaN or infinity in input of 'x'" in caplog.text
    quantize_entries(each, torch.zeros(2, 3, 3), True)
    assert each.state.updates == 0


def test_without_the_option_there_is_one_position():
    each = OperandQuantizer(QuantizeConfig(), "matmul", "input of 'x'")
    assert isinstance(quantize_entries(each, drawn(2, 3, 3).detach(), True), FixedPoint)
    assert isinstance(quantize_entries(quantizer(), drawn(2, 3, 3).detach(), True), FixedPointBatch)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_a_checkpointed_part_is_what_it_is_without(reentrant, rounding):
    gradients, states = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Attention()
        cnmix.initialize(model, per_entry=True, rounding=rounding)
        operands = [drawn(2, 3, 6, 4, seed=seed) for seed in range(3)]
        for _ in range(2):
            y = checkpoint(model, *operands, use_reentrant=reentrant) if checkpointed else model(*operands)
            y.square().sum().backward()
        gradients.append([each.grad for each in operands])
        states.append(cnmix.state_dict(model)["models"])
    assert all(torch.equal(*each) for each in zip(*gradients, strict=True))
    assert states[0] == states[1]


def test_rules_choose_operands_by_module():
    model = nn.ModuleDict({"a": Product(), "b": Product()})
    cnmix.initialize(model, rules=[{"modules": "b", "operands": "grad_output", "per_entry": True}])
    for product in model.values():
        product(drawn(2, 3, 3), drawn(2, 3, 3, seed=1)).sum().backward()
    found = {name: [each.config.per_entry for _, each in quantizers] for name, quantizers in quantizer_sets(model)}
    assert found == {"a..forward+1:matmul": [False] * 3, "b..forward+1:matmul": [False, False, True]}

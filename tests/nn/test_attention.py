"""scaled_dot_product_attention: both products on the core, masks, dropout, shared heads, and checkpointing."""

import math

import pytest
import torch
import torch.nn.functional as F
from calls import INT8, INT31, Calls, assert_close, float_and_core, places, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import cnmix
from cnmix.fixed_point import FixedPoint, absmax, choose_position
from cnmix.kernels import reference

QUERY, KEY, VALUE = (2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 3)
MASK = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) > 0.3
MASK[2] = False  # a row that sees nothing
ADDED = torch.where(MASK, 0.5, -math.inf)
attend = F.scaled_dot_product_attention

FORMS = {
    "plain": (attend, QUERY, KEY, VALUE),
    "by keyword": (lambda q, k, v: attend(query=q, key=k, value=v, attn_mask=None, scale=None), QUERY, KEY, VALUE),
    "bool mask": (lambda q, k, v: attend(q, k, v, MASK), QUERY, KEY, VALUE),
    "float mask": (lambda q, k, v: attend(q, k, v, ADDED), QUERY, KEY, VALUE),
    "lowest float": (lambda q, k, v: attend(q, k, v, ADDED.clamp(torch.finfo().min)), QUERY, KEY, VALUE),
    "mask of each batch": (
        lambda q, k, v: attend(q, k, v, MASK.view(1, 1, 5, 6).expand(2, 1, 5, 6)),
        QUERY,
        KEY,
        VALUE,
    ),
    "trained mask": (attend, QUERY, KEY, VALUE, (5, 6)),
    "trained mask of each head": (lambda q, k, v, m: attend(q, k, v, 2 * m), QUERY, KEY, VALUE, (4, 5, 1)),
    "causal": (lambda q, k, v: attend(q, k, v, is_causal=True), QUERY, KEY, VALUE),
    "causal, fewer keys": (lambda q, k, v: attend(q, k, v, is_causal=True), KEY, QUERY, (2, 4, 5, 3)),
    "scale": (lambda q, k, v: attend(q, k, v, scale=0.3), QUERY, KEY, VALUE),
    "no scale": (lambda q, k, v: attend(q, k, v, scale=0.0), QUERY, KEY, VALUE),
    "shared heads": (lambda q, k, v: attend(q, k, v, enable_gqa=True), QUERY, (2, 2, 6, 8), (2, 2, 6, 3)),
    "shared heads and a mask": (
        lambda q, k, v: attend(q, k, v, MASK, enable_gqa=True),
        QUERY,
        (2, 2, 6, 8),
        (2, 2, 6, 3),
    ),
    "one head for all": (attend, QUERY, (2, 1, 6, 8), (2, 1, 6, 3)),
    "one batch for all": (attend, QUERY, (1, 4, 6, 8), (1, 4, 6, 3)),
    "no heads": (attend, (4, 5, 8), (4, 6, 8), (4, 6, 3)),
    "two batches": (attend, (2, 2, 4, 5, 8), (2, 2, 4, 6, 8), (2, 2, 4, 6, 3)),
    "one position": (attend, (2, 4, 1, 8), (2, 4, 1, 8), (2, 4, 1, 3)),
    "views": (
        lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
        (2, 5, 4, 8),
        (2, 6, 4, 8),
        (2, 6, 4, 3),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_int31_is_float32(form):
    float32, core, found = float_and_core(*FORMS[form])
    assert [name.rpartition(".")[2] for name in found] == ["scores", "values", "value_gradient"]
    assert_close(core, float32)


WRONG = {
    "sizes": (attend, QUERY, (2, 4, 6, 7), VALUE),
    "heads": (attend, QUERY, (2, 2, 6, 8), (2, 2, 6, 3)),
    "shared heads": (lambda q, k, v: attend(q, k, v, enable_gqa=True), QUERY, (2, 3, 6, 8), (2, 3, 6, 3)),
    "mask's shape": (lambda q, k, v: attend(q, k, v, torch.zeros(4, 6)), QUERY, KEY, VALUE),
    "mask's dimensions": (lambda q, k, v: attend(q, k, v, torch.zeros(3, 2, 4, 5, 6)), QUERY, KEY, VALUE),
    "mask's dtype": (lambda q, k, v: attend(q, k, v, torch.zeros(5, 6).long()), QUERY, KEY, VALUE),
    "mask and causal": (lambda q, k, v: attend(q, k, v, MASK, is_causal=True), QUERY, KEY, VALUE),
    "dropout": (lambda q, k, v: attend(q, k, v, dropout_p=1.5), QUERY, KEY, VALUE),
}


@pytest.mark.parametrize("form", WRONG)
def test_wrong_arguments_are_torchs_to_refuse(form):
    float32, core, found = float_and_core(*WRONG[form])
    assert isinstance(float32[0], str)
    assert core == float32
    assert not found


COMPOSED = {
    "plain": {},
    "bool mask": {"attn_mask": MASK | (torch.arange(5)[:, None] == 2)},
    "float mask": {"attn_mask": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))},
    "causal": {"is_causal": True},
}


def turned(x):
    return x._replace(values=x.values.mT)


@pytest.mark.parametrize("per_entry", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("form", COMPOSED)
def test_it_is_the_references_products_and_a_softmax_to_the_bit(form, bits, per_entry):
    def fit(x):
        if per_entry:
            return reference.quantize_batch(x, bits, batch_dims=2)
        position = choose_position(absmax(x), bits)
        return FixedPoint(reference.quantize(x, bits, position), bits, position)

    options = COMPOSED[form]
    mask = torch.ones(5, 6, dtype=torch.bool).tril() if "is_causal" in options else options.get("attn_mask")
    model = Calls(lambda q, k, v: attend(q, k, v, **options), QUERY, KEY, VALUE)
    cnmix.initialize(model, bitwidth=bits, max_bitwidth=bits, per_entry=per_entry)
    found, g = run(model), torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(7))
    assert len(places(model)) == 3

    q, k, v = (fit(operand.detach()) for operand in model.operands)
    scores = reference.batched_matmul(q, turned(k)) * (1 / math.sqrt(8))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    largest, full = weights.amax(-1, keepdim=True), 127 / 64
    y = reference.batched_matmul(fit(weights * (full / largest)), v) * (largest / full)
    half = largest.sqrt()
    grad_v = reference.batched_matmul(turned(fit(weights * (full / half))), fit(g * (half / full)))
    grad_weights = reference.batched_matmul(fit(g), turned(v))
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32)
    grad_scores = fit(grad_scores * (1 / math.sqrt(8)))
    grad_q, grad_k = reference.batched_matmul(grad_scores, k), reference.batched_matmul(turned(grad_scores), q)
    for ours, expected in zip(found, (y, grad_q, grad_k, grad_v), strict=True):
        assert torch.equal(ours, expected)


def test_rows_that_see_many_positions_keep_their_bits():
    shape, errors = (2, 4, 256, 16), {}
    float32, core, _ = float_and_core(lambda q, k, v: attend(q, k, v, is_causal=True), shape, shape, shape, **INT8)
    for name, ours, expected in zip(("y", "query", "key", "value"), core, float32, strict=True):
        errors[name] = float((ours - expected).norm() / expected.norm())
    assert errors["y"] < 0.05  # 0.22 with probabilities as they are
    assert errors["value"] < 0.1  # 0.22


def test_dropout_drops_that_share_and_both_passes_drop_the_same():
    model = Calls(lambda q, k, v: attend(q, k, v, dropout_p=0.3), (1, 2, 40, 8), (1, 2, 50, 8), (1, 2, 50, 50))
    with torch.no_grad():
        model.operands[2].copy_(torch.eye(50))  # so that the output is the probabilities that were not dropped
    cnmix.initialize(model, **INT31)
    torch.manual_seed(0)
    y, *gradients = run(model)
    kept = y != 0
    assert 0.66 < kept.float().mean() < 0.74
    q, k, v = (operand.detach().requires_grad_() for operand in model.operands)
    weights = torch.softmax(q @ k.mT / math.sqrt(8), -1) * kept / 0.7
    torch.testing.assert_close(y, weights.detach(), rtol=1e-4, atol=1e-6)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    assert_close(gradients, torch.autograd.grad(weights @ v, (q, k, v), grad))


def test_without_dropout_none_is_drawn_and_all_of_it_is_torchs():
    model = Calls(attend, QUERY, KEY, VALUE)
    cnmix.initialize(model)
    before = torch.get_rng_state()
    run(model)
    assert torch.equal(torch.get_rng_state(), before)
    float32, core, found = float_and_core(lambda q, k, v: attend(q, k, v, dropout_p=1.0), QUERY, KEY, VALUE)
    assert not found
    assert_close(core, float32)


def test_stochastic_rounding_draws_anew_on_every_step():
    model = Calls(attend, QUERY, KEY, VALUE)
    cnmix.initialize(model, rounding="stochastic", **INT8)
    first, second = run(model), run(model)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class SelfAttention(nn.Module):
    def __init__(self, kind=None, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.last = nn.Linear(8, 24), nn.Linear(8, 8)
        self.kind, self.dropout = kind, dropout

    def attend(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).movedim(2, 0).transpose(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x):
        y = self.attend(x) if self.kind is None else checkpoint(self.attend, x, use_reentrant=self.kind)
        return self.last(y)


@pytest.mark.parametrize(
    "settings", [{}, {"rounding": "stochastic"}, {"per_entry": True}], ids=["adaptive", "stochastic", "per entry"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_to_the_bit(dropout, settings):
    results = []
    for kind in (None, False, True):
        model = SelfAttention(kind, dropout)
        cnmix.initialize(model, **settings)
        # The place is named otherwise within a part; its random numbers go by the name.
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(1)
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            model(x).square().mean().backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    plain, *checkpointed = results
    for each in [plain, *checkpointed] if "rounding" not in settings else checkpointed:
        assert all(torch.equal(ours, expected) for ours, expected in zip(each, checkpointed[0], strict=True))


def test_bfloat16_between_products():
    models = SelfAttention(), SelfAttention()
    cnmix.initialize(models[1], opt_level="O2", bitwidth=16)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    models[1].project.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    outputs = [model(x) for model in models]
    for y in outputs:
        y.square().mean().backward()
    assert seen == [torch.bfloat16]
    assert len(places(models[1])) == 3
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.05, atol=0.02)
    for ours, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=0.1, atol=0.01)

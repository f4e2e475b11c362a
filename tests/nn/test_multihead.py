"""nn.MultiheadAttention and torch's Transformer layers on the core: every option, and no fast path around it."""

import copy
import itertools

import pytest
import torch
from calls import INT8, INT31, assert_close, places
from torch import nn
from torch.utils.checkpoint import checkpoint

import cnmix

WIDTH, LENGTH, KEYS, BATCH = 8, 4, 5, 3
PAIRS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def inputs(kdim=WIDTH, vdim=WIDTH, batch_first=True):
    found = draw(BATCH, LENGTH, WIDTH), draw(BATCH, KEYS, kdim), draw(BATCH, KEYS, vdim)
    return found if batch_first else tuple(x.transpose(0, 1) for x in found)


def run(module, call):
    """Returns outputs and gradients; a message in place of what raised one."""
    try:
        outputs = call(module)
    except (RuntimeError, AssertionError) as error:
        return [f"{type(error).__name__}: {error}"]
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    if outputs[0].requires_grad:
        outputs[0].backward(draw(*outputs[0].shape))
    return [*(x.detach() for x in outputs), *(parameter.grad for parameter in module.parameters())]


def both(build, call, **settings):
    torch.manual_seed(0)
    plain = build()
    module = copy.deepcopy(plain)
    cnmix.initialize(module, **settings or INT31)
    return run(module, call), run(plain, call), module


def attention(**options):
    return lambda: nn.MultiheadAttention(WIDTH, 2, **{"batch_first": True, **options})


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 7}], ids=["one size", "three sizes"])
@pytest.mark.parametrize("options", PAIRS, ids=map(str, PAIRS))
def test_options(options, sizes, need_weights):
    for batch_first in (False, True):
        given = inputs(**sizes, batch_first=batch_first)
        ours, expected, module = both(
            attention(batch_first=batch_first, **options, **sizes), lambda m, x=given: m(*x, need_weights=need_weights)
        )
        assert_close(ours, expected)
        assert len(places(module)) == 7


@pytest.mark.parametrize("need_weights", [False, True])
def test_projections_of_one_tensor_are_one_product(need_weights):
    x, memory, _ = inputs()
    for given, projections in (((x, x, x), ["in_proj"]), ((x, memory, memory), ["in_proj.query", "in_proj.key_value"])):
        ours, expected, module = both(attention(), lambda m, x=given: m(*x, need_weights=need_weights))
        assert_close(ours, expected)
        assert places(module) == [
            f"..{each}" for each in ("scores", "values", "value_gradient", *projections, "out_proj")
        ]


PADDING = torch.arange(KEYS) >= torch.tensor([[3], [5], [4]])
SEEN = torch.rand(LENGTH, KEYS, generator=torch.Generator().manual_seed(0)) > 0.7
SEEN[:, 0] = False
OF_HEADS = torch.rand(2 * BATCH, LENGTH, KEYS, generator=torch.Generator().manual_seed(1)) > 0.7
OF_HEADS[..., 0] = False
MASKS = {
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.zeros(BATCH, KEYS).masked_fill(PADDING, -torch.inf)},
    "mask": {"attn_mask": SEEN},
    "float mask": {"attn_mask": -9.0 * SEEN},
    "mask of heads": {"attn_mask": OF_HEADS},
    "float mask of heads": {"attn_mask": 1.0 * OF_HEADS},
    "both": {"attn_mask": OF_HEADS, "key_padding_mask": PADDING},
    "each head's": {"average_attn_weights": False, "attn_mask": SEEN},
    "wrong shape": {"attn_mask": torch.zeros(LENGTH, KEYS + 1)},
    "wrong shape of heads": {"attn_mask": torch.zeros(BATCH, LENGTH, KEYS)},
    "wrong padding": {"key_padding_mask": torch.zeros(BATCH, KEYS + 1, dtype=torch.bool)},
    "integers": {"attn_mask": torch.zeros(LENGTH, KEYS, dtype=torch.int32)},
    "causal without a mask": {"is_causal": True},
}


@pytest.mark.parametrize("need_weights", [False, True])
def test_what_sees_nothing_is_zeros(need_weights):
    """As in torch without weights; with them torch has NaN."""
    padding = torch.ones(BATCH, KEYS, dtype=torch.bool)
    _, expected, _ = both(attention(), lambda m: m(*inputs(), need_weights=False, key_padding_mask=padding))
    ours, _, _ = both(attention(), lambda m: m(*inputs(), need_weights=need_weights, key_padding_mask=padding))
    assert_close([ours[0], *ours[-len(expected) + 1 :]], expected)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    for need_weights, options in itertools.product((False, True), ({}, {"add_bias_kv": True, "add_zero_attn": True})):
        ours, expected, module = both(
            attention(**options), lambda m, n=need_weights: m(*inputs(), need_weights=n, **MASKS[name])
        )
        if isinstance(expected[0], str):
            assert ours == expected
            assert not places(module)
        else:
            assert_close(ours, expected)
            assert places(module)


def test_causal_and_unbatched():
    x, memory, value = inputs()
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    calls = (
        lambda m: m(x, x, x, attn_mask=later, is_causal=True, need_weights=False),
        lambda m: m(x[0], memory[0], value[0], key_padding_mask=PADDING[0], attn_mask=SEEN),
        lambda m: m(x[0], x[0], x[0], attn_mask=torch.zeros(2, LENGTH, LENGTH), need_weights=False),
    )
    for call in calls:
        ours, expected, module = both(attention(), call)
        assert_close(ours, expected)
        assert places(module)


@pytest.mark.parametrize("wrong", ["width", "batch", "keys"])
def test_wrong_inputs_are_torchs_to_refuse(wrong):
    x, memory, value = inputs()
    given = {"width": (x[..., :6],) * 3, "batch": (x, memory[:2], value[:2]), "keys": (x, memory, value[:, :3])}[wrong]
    ours, expected, module = both(attention(), lambda m: m(*given))
    assert isinstance(expected[0], str)
    assert ours == expected
    assert not places(module)


def test_dropout_drops_what_is_shown():
    x = draw(BATCH, 40, WIDTH)
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)
    cnmix.initialize(module, **INT31)
    y, shown = module(x, x, x, average_attn_weights=False)
    assert 0.66 < (shown != 0).float().mean() < 0.74
    y.sum().backward()
    module.eval()
    assert (module(x, x, x, average_attn_weights=False)[1] != 0).all()
    module.train()
    module(x, x, x, need_weights=False)[0].sum().backward()


class Checkpointed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention = nn.Linear(WIDTH, WIDTH), nn.MultiheadAttention(WIDTH, 2, 0.3, batch_first=True)
        self.kind = kind

    def forward(self, x):
        x = self.first(x)
        if self.kind is None:
            return self.attention(x, x, x, None, False)[0]
        return checkpoint(self.attention, x, x, x, None, False, use_reentrant=self.kind)[0]


def test_checkpointed_to_the_bit():
    results = []
    for kind in (None, False, True):
        model = Checkpointed(kind)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        cnmix.initialize(model, optimizer)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(BATCH, LENGTH, WIDTH)).square().mean().backward()
            optimizer.step()
        results.append((cnmix.state_dict(model)["models"], [parameter.detach() for parameter in model.parameters()]))
    for state, weights in results[1:]:
        assert state == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][1], strict=True))


LAYERS = {
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True),
        lambda m: m(inputs()[1], src_key_padding_mask=PADDING),
    ),
    "gelu, norm first": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True),
        lambda m: m(inputs()[1]),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True), 2),
        lambda m: m(inputs()[1], src_key_padding_mask=PADDING),
    ),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True),
        lambda m: m(*inputs()[:2], memory_key_padding_mask=PADDING),
    ),
    "transformer": (
        lambda: nn.Transformer(WIDTH, 2, 1, 1, 16, dropout=0.0, batch_first=True),
        lambda m: m(inputs()[1], inputs()[0], tgt_mask=m.generate_square_subsequent_mask(LENGTH), tgt_is_causal=True),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_training(name):
    ours, expected, module = both(*LAYERS[name])
    assert_close(ours, expected)
    # Each attention has four products, or five where it looks at another tensor.
    count = sum(isinstance(each, nn.MultiheadAttention) for each in module.modules())
    assert len(places(module)) >= 4 * count


@pytest.mark.parametrize("exclude", [[], ["*linear?"]], ids=["whole", "attention alone"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_fast_path_goes_around_the_core_in_evaluation(name, exclude):
    build, call = LAYERS[name]
    torch.manual_seed(0)
    plain = build()
    module = copy.deepcopy(plain)
    cnmix.initialize(module, exclude=exclude, **INT8)
    call(module).sum().backward()
    module.eval()
    plain.eval()
    with_gradients = call(module).detach()
    assert not torch.allclose(call(plain), with_gradients, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(call(module), with_gradients)
    with torch.inference_mode():
        assert torch.equal(call(module), with_gradients)


def test_the_fast_path_is_back_in_a_plain_model():
    build, call = LAYERS["gelu, norm first"]
    torch.manual_seed(0)
    module = build().eval()
    with torch.no_grad():
        expected = call(module)
        cnmix.initialize(module)
        cnmix.dequantize(module)
        assert torch.equal(call(module), expected)
        assert module.activation_relu_or_gelu == 2


def test_a_subclass_is_attention_too():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0] @ self.out_proj.weight

    torch.manual_seed(0)
    module = Own(WIDTH, 2, batch_first=True)
    cnmix.initialize(module, **INT8)
    module(inputs()[0]).sum().backward()
    assert places(module) == [
        "..scores",
        "..values",
        "..value_gradient",
        "..in_proj",
        "..out_proj",
        "..forward+1:matmul(out_proj.weight)",
    ]


def test_attention_that_a_rule_leaves_out_stays_float():
    build, call = LAYERS["encoder layer"]
    torch.manual_seed(0)
    module = build()
    cnmix.initialize(module, exclude=["self_attn"], **INT8)
    call(module).sum().backward()
    assert not places(module)
    rules = [{"types": "MultiheadAttention", "operands": "weight", "bitwidth": 16, "max_bitwidth": 16}]
    module = cnmix.initialize(build(), rules=rules)[0]
    call(module).sum().backward()
    for _, quantizers in cnmix.nn.quantizer_sets(module.self_attn):
        assert [quantizer.state.bits for _, quantizer in quantizers][1] == 16

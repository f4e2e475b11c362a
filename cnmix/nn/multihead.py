"""``nn.MultiheadAttention`` on the core: projections, both products of attention, and the output's projection."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attend, attention_of
from .function_calls import Call, is_multiplied
from .recomputation import current_backward


def multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """``torch.nn.functional.multi_head_attention_forward``, which ``nn.MultiheadAttention`` calls.

    Its products have the places ``in_proj`` (or ``q_proj``, ``k_proj`` and ``v_proj``; ``in_proj.query`` and
    ``in_proj.key_value`` where the key is another tensor than the query), ``scores``, ``values`` and ``out_proj``.
    """
    if not is_multiplied(query, key, value, out_proj_weight) or static_k is not None or static_v is not None:
        return NotImplemented
    # These raise as torch does, naming what is wrong.
    batched = F._mha_shape_check(  # type: ignore[attr-defined]
        query, key, value, key_padding_mask, attn_mask, num_heads
    )
    if query.shape[-1] != embed_dim_to_check or embed_dim_to_check % num_heads or (is_causal and attn_mask is None):
        return NotImplemented
    if not 0 <= dropout_p < 1 and training:
        return NotImplemented
    if not _fit(query, key, value, key_padding_mask, attn_mask, num_heads):
        return NotImplemented
    weights = (in_proj_weight, q_proj_weight, out_proj_weight)
    attention = attention_of(
        call,
        (query, key, value, *(each for each in weights if each is not None)),
        1 / math.sqrt(embed_dim_to_check // num_heads),
        False,
        dropout_p if training else 0.0,
    )
    if attention is None:
        return NotImplemented
    if not batched:
        same = key is query, value is key
        query = query.unsqueeze(1)
        key = query if same[0] else key.unsqueeze(1)
        value = key if same[1] else value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    q, k, v = _project(call, (query, key, value), in_proj_weight, in_proj_bias, separate)
    batch = q.shape[1]
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, batch, -1)])
        v = torch.cat([v, bias_v.expand(1, batch, -1)])
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))  # (batch, heads, length, size)
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (k, v))
    mask = _merged_mask(attn_mask, key_padding_mask, q, k.shape[2])
    y, shown = attend(q, k, v, mask, attention, need_weights)
    if shown is not None and average_attn_weights:
        shown = shown.mean(1)
    y = y.permute(2, 0, 1, 3).flatten(2)  # (length, batch, embed_dim)
    y = _linear(call, y, out_proj_weight, out_proj_bias, "out_proj")
    if batched:
        return y, shown
    return y.squeeze(1), None if shown is None else shown.squeeze(0)


def _fit(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None, heads: int) -> bool:
    """Whether the shapes of inputs and masks go together."""
    (length, *batch, _), (keys, *others, _) = query.shape, key.shape
    if key.shape[:-1] != value.shape[:-1] or batch != others:
        return False
    if padding is not None and padding.shape != (*batch, keys):
        return False
    return mask is None or mask.shape in ((length, keys), (math.prod(batch) * heads, length, keys))


def _linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, part: str) -> Tensor:
    y = call.multiply(x, weight, bias, part=part)
    return F.linear(x, weight, bias) if y is NotImplemented else y


def _project(
    call: Call,
    inputs: tuple[Tensor, Tensor, Tensor],
    packed: Tensor | None,
    bias: Tensor | None,
    separate: tuple[Tensor | None, ...] | None,
) -> tuple[Tensor, ...]:
    """Returns query, key and value (length, batch, features): one product where they are projections of one tensor."""
    query, key, value = inputs
    size = query.shape[-1]
    if separate is None and packed is not None and _is_one(query, key) and _is_one(key, value):
        return _linear(call, query, packed, bias, "in_proj").chunk(3, -1)
    if separate is None and packed is not None and _is_one(key, value):
        q = _linear(call, query, packed[:size], None if bias is None else bias[:size], "in_proj.query")
        both = _linear(call, key, packed[size:], None if bias is None else bias[size:], "in_proj.key_value")
        return q, *both.chunk(2, -1)
    parts = packed.chunk(3) if separate is None and packed is not None else separate or ()
    biases = (None, None, None) if bias is None else bias.chunk(3)
    names = ("q_proj", "k_proj", "v_proj")
    return tuple(
        _linear(call, x, weight, b, name)
        for x, weight, b, name in zip(inputs, parts, biases, names, strict=True)
        if weight is not None
    )


def _is_one(a: Tensor, b: Tensor) -> bool:
    """Whether these are one tensor; the reentrant kind of checkpointing repeats a pass with views in its place."""
    if a is b or current_backward() == -1:
        return a is b
    forms = [(x.data_ptr(), x.shape, x.stride(), x.requires_grad) for x in (a, b)]
    return forms[0] == forms[1]


def _merged_mask(mask: Tensor | None, padding: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
    """Returns both masks as one to add, (batch or 1, heads or 1, L or 1, S).

    Positions that ``bias_k`` and ``add_zero_attn`` put behind the others are seen by all.
    """
    batch, heads, length, _ = query.shape
    merged = None
    for each, name in ((mask, "attn_mask"), (padding, "key_padding_mask")):
        if each is None:
            continue
        added: Tensor = F._canonical_mask(each, name, None, "", query.dtype, check_other=False)  # type: ignore[assignment]
        added = F.pad(added, (0, keys - added.shape[-1]))
        if name == "key_padding_mask":
            added = added.view(batch, 1, 1, keys)
        elif added.dim() == 3:
            added = added.view(batch, heads, length, keys)
        merged = added if merged is None else merged + added
    return merged

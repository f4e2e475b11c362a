"""Attention: its two products in fixed point, its softmax in float, differentiable.

The scores are scaled, masked and made probabilities in one piece of memory. Kept for the backward pass are the integers
of query, key and value, and the probabilities in float, which the gradient of softmax takes; their integers, for the
gradient of value, are computed from them again: float32's way keeps as many probabilities, and float queries, keys and
values besides.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..entries import quantize_entries, repeat_entries
from .batched import multiply_integers, save_operands, saved_operands, transposed
from .function_calls import Call, are_broadcast, is_multiplied
from .quantizers import ModuleQuantizers


class Attention(NamedTuple):
    """What attention computes with, besides its tensors.

    Attributes:
        scores: quantizers of the product of query and key.
        values: of the product of probabilities and value.
        trains_scores: whether the statistics of ``scores`` may move.
        trains_values: likewise of ``values``.
        scale: of the scores.
        causal: whether position i of the query sees only positions up to i of the key.
        dropout: share of the probabilities to drop.
    """

    scores: ModuleQuantizers
    values: ModuleQuantizers
    trains_scores: bool
    trains_values: bool
    scale: float
    causal: bool
    dropout: float


def scaled_dot_product_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *rest: Any,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``torch.nn.functional.scaled_dot_product_attention``, in float32 between the products."""
    if rest or not is_multiplied(query, key, value) or min(map(Tensor.dim, (query, key, value))) < 3:
        return NotImplemented
    heads, shared = query.shape[-3], key.shape[-3]
    fits = query.shape[-1] == key.shape[-1] and key.shape[:-1] == value.shape[:-1]
    if not fits or (heads != shared and ((not enable_gqa and shared > 1) or heads % shared)):
        return NotImplemented
    if attn_mask is not None and (is_causal or not _is_mask(attn_mask, (*query.shape[:-1], key.shape[-2]))):
        return NotImplemented
    if not 0 <= dropout_p < 1:
        return NotImplemented
    if query.shape[:-3] != key.shape[:-3]:
        if not are_broadcast(query.shape[:-3], key.shape[:-3]):
            return NotImplemented
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
        query, key, value = (each.expand(*batch, *each.shape[-3:]) for each in (query, key, value))
    attention = attention_of(
        call,
        (query, key, value),
        "",
        1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        is_causal,
        dropout_p,
    )
    return NotImplemented if attention is None else attend(query, key, value, attn_mask, attention)


def _is_mask(mask: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether this is broadcast to scores of this shape."""
    known = is_multiplied(mask) or (type(mask) is Tensor and mask.dtype == torch.bool and mask.numel() > 0)
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    return known and mask.dim() <= len(shape) and all(each in (1, size) for each, size in sizes)


def attention_of(
    call: Call, operands: tuple[Tensor, ...], prefix: str, scale: float, causal: bool, dropout: float
) -> Attention | None:
    """Finds the quantizers of attention; None where it stays float."""
    scores = call.quantizers(*operands, part=f"{prefix}scores")
    values = call.quantizers(*operands, part=f"{prefix}values")
    if scores is None or values is None:
        return None
    return Attention(scores[0], values[0], scores[1], values[1], scale, causal, dropout)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
    """Returns ``softmax(query @ key.T * scale + mask) @ value``.

    Args:
        query: float (*batch, heads, L, E), of any strides.
        key: float (*batch, shared, S, E), where each of the ``shared`` heads serves heads / shared of the query's.
        value: float (*batch, shared, S, V).
        mask: broadcast to (*batch, heads, L, S): bool, true where a position is seen, or float to add; or None.
        attention: what else to compute with.

    Returns:
        (*batch, heads, L, V), of the dtype of ``query``.
    """
    return _Attention.apply(query, key, value, mask, attention)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: Attention
    ) -> Tensor:
        shape = (*query.shape[:-1], key.shape[-2])
        grouped = _rows_by_shared_head(query, key.shape[-3])
        qq, qk, _ = attention.scores.quantize_batches(grouped, key, attention.trains_scores)
        scores = multiply_integers(qq, transposed(qk), attention.scores, torch.float32).view(shape)
        weights = probabilities(scores, mask, attention).to(query.dtype)
        kept = None
        if attention.dropout:
            kept = torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - attention.dropout)
        dropped = _rows_by_shared_head(_drop(weights, kept, attention), key.shape[-3])
        qw, qv, ctx.again = attention.values.quantize_batches(dropped, value, attention.trains_values)
        del dropped
        y = multiply_integers(qw, qv, attention.values, query.dtype)
        ctx.attention = attention
        save_operands(ctx, qq, qk, qv, others=(weights, kept))
        ctx.shapes = query.shape, value.shape, None if mask is None else mask.shape
        ctx.dtypes = tuple(None if each is None else each.dtype for each in (query, key, value, mask))
        return y.view(*query.shape[:-1], value.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (qq, qk, qv), (weights, kept) = saved_operands(ctx)
        attention, (q_dtype, k_dtype, v_dtype, mask_dtype) = ctx.attention, ctx.dtypes
        needs_query, needs_key, needs_value, needs_mask, _ = ctx.needs_input_grad
        query_shape, value_shape, mask_shape = ctx.shapes
        shared = value_shape[-3]
        grad_query = grad_key = grad_value = grad_mask = None
        if attention.trains_values:
            attention.values.ranks.backward_begins()
        grouped = _rows_by_shared_head(grad_output, shared)
        qg = quantize_entries(attention.values.grad_output, grouped, attention.trains_values)
        if needs_value:
            dropped = _rows_by_shared_head(_drop(weights, kept, attention), shared)
            qw = repeat_entries(attention.values.input, dropped, ctx.again, attention.trains_values)
            del dropped
            grad_value = multiply_integers(transposed(qw), qg, attention.values, v_dtype)
            del qw
        if needs_query or needs_key or needs_mask:
            grad = multiply_integers(qg, transposed(qv), attention.values, torch.float32).view(weights.shape)
            if kept is not None:
                grad.mul_(kept).div_(1 - attention.dropout)
            weights = weights.to(torch.float32)
            grad = torch._softmax_backward_data(grad, weights, -1, torch.float32, grad_input=grad)
            if needs_mask:
                grad_mask = grad.sum_to_size(mask_shape).to(mask_dtype)
            grouped = _rows_by_shared_head(grad.mul_(attention.scale), shared)
            if needs_query or needs_key:
                qs = quantize_entries(attention.scores.grad_output, grouped, attention.trains_scores)
                del grad, grouped
                if needs_query:
                    grad_query = multiply_integers(qs, qk, attention.scores, q_dtype).view(query_shape)
                if needs_key:
                    grad_key = multiply_integers(transposed(qs), qq, attention.scores, k_dtype)
        return grad_query, grad_key, grad_value, grad_mask, None


def probabilities(scores: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
    """Returns the softmax of the scores (*batch, heads, L, S), which it overwrites, scaled and masked.

    A row without a position to see is zeros, as in torch.
    """
    scores.mul_(attention.scale)
    if attention.causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
        scores.masked_fill_(unseen, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(mask.logical_not(), -math.inf)
    elif mask is not None:
        scores.add_(mask)
    blind = None if mask is None else scores.amax(-1, keepdim=True) == -math.inf
    weights = torch.softmax(scores, -1, out=scores)
    return weights if blind is None else weights.masked_fill_(blind, 0.0)


def _drop(weights: Tensor, kept: Tensor | None, attention: Attention) -> Tensor:
    return weights if kept is None else weights.mul(kept).div_(1 - attention.dropout)


def _rows_by_shared_head(x: Tensor, shared: int) -> Tensor:
    """Returns (*batch, heads, L, E) as (*batch, shared, heads / shared * L, E): heads with one key are one matrix."""
    *batch, heads, rows, columns = x.shape
    return x if heads == shared else x.reshape(*batch, shared, heads // shared * rows, columns)

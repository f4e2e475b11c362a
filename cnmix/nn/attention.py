"""Attention: its two products in fixed point, its softmax in float, differentiable.

The scores are scaled, masked and made probabilities in one piece of memory. Kept for the backward pass are the integers
of query, key and value, and the probabilities in float, which the gradient of softmax takes: float32's way keeps as
many probabilities, and float queries, keys and values besides.

A row that sees many positions has small probabilities, and one that sees a single one has a 1: with one position for
all, int8 would make the former zeros. So each row is divided by its largest value before it is quantized (which gives
``exp(score - largest score)``), and the row of the product multiplied by it again, in float. Value's gradient sums over
these rows, so that nothing can be undone behind it: there each row is divided by the square root, and the row of the
output's gradient multiplied by it, which shares the range out between the two operands.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..entries import quantize_entries
from .batched import multiply_integers, save_operands, saved_operands, transposed
from .card_tensors import apply_on_host, widest
from .exported import is_exporting, is_fake, multiply_batches_exported
from .function_calls import Call, are_broadcast, is_broadcast_to, is_multiplied
from .quantizers import ModuleQuantizers

# The largest value that fills the width: 127 steps of int8 at the position of 1.
_FULL = 127 / 64
_SMALLEST = 1e-30  # of a row's largest probability, for rows of zeros


class Attention(NamedTuple):
    """What attention computes with, besides its tensors.

    Attributes:
        scores: quantizers of the product of query and key.
        values: of the product of probabilities and value.
        value_gradient: of the product that is value's gradient.
        trains: whether their statistics may move.
        scale: of the scores.
        causal: whether position i of the query sees only positions up to i of the key.
        dropout: share of the probabilities to drop.
    """

    scores: ModuleQuantizers
    values: ModuleQuantizers
    value_gradient: ModuleQuantizers
    trains: bool
    scale: float
    causal: bool
    dropout: float

    @property
    def product(self) -> str:
        """What this is."""
        return "attention"

    @property
    def fqn(self) -> str:
        """Fully qualified name of the module, and the place."""
        return self.scores.fqn

    @property
    def bits(self) -> dict[str, int]:
        """The widest of its products by operand."""
        return widest(self.scores.bits, self.values.bits)


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
        1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        is_causal,
        dropout_p,
    )
    return NotImplemented if attention is None else attend(query, key, value, attn_mask, attention)[0]


def _is_mask(mask: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether this is broadcast to scores of this shape."""
    known = is_multiplied(mask) or (
        (type(mask) is Tensor or is_fake(mask)) and mask.dtype == torch.bool and mask.numel() > 0
    )
    return known and is_broadcast_to(mask.shape, shape)


def attention_of(
    call: Call, operands: tuple[Tensor, ...], scale: float, causal: bool, dropout: float
) -> Attention | None:
    """Finds the quantizers of attention; None where it stays float."""
    scores, values, gradient = (
        call.quantizers(*operands, part=part) for part in ("scores", "values", "value_gradient")
    )
    if scores is None or values is None or gradient is None:
        return None
    return Attention(scores[0], values[0], gradient[0], scores[1], scale, causal, dropout)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: Attention, shows: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Returns ``softmax(query @ key.T * scale + mask) @ value``.

    Args:
        query: float (*batch, heads, L, E), of any strides.
        key: float (*batch, shared, S, E), where each of the ``shared`` heads serves heads / shared of the query's.
        value: float (*batch, shared, S, V).
        mask: broadcast to (*batch, heads, L, S): bool, true where a position is seen, or float to add; or None.
        attention: what else to compute with.
        shows: whether to return the probabilities too.

    Returns:
        (*batch, heads, L, V), of the dtype of ``query``; and the probabilities, after dropout, (*batch, heads, L, S).
    """
    if attention.scores.frozen and is_exporting():
        return _attend_exported(query, key, value, mask, attention)
    y, shown = apply_on_host(_Attention, query, key, value, mask, attention, shows)
    return y, shown


def _attend_exported(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: Attention
) -> tuple[Tensor, Tensor]:
    """Does what ``_Attention`` does, product by product, for ``torch.export``.

    Raises:
        ValueError: if probabilities are dropped at random.
    """
    if attention.dropout:
        raise ValueError(f"{attention.fqn!r} drops probabilities at random in evaluation: pass dropout_p=0.0 there")
    shape, shared = (*query.shape[:-1], key.shape[-2]), key.shape[-3]
    grouped, transposed_key = _rows_by_shared_head(query, shared), key.transpose(-1, -2)
    scores = multiply_batches_exported(grouped, transposed_key, attention.scores).view(shape)
    weights = probabilities(scores, mask, attention).to(query.dtype)
    largest = weights.amax(-1, keepdim=True).to(torch.float32).clamp(min=_SMALLEST)
    scaled = _rows_by_shared_head(_dropped(weights, None, attention, _FULL / largest), shared)
    y = multiply_batches_exported(scaled, value, attention.values)
    y = y.view(*query.shape[:-1], value.shape[-1]) * (largest / _FULL)
    return y.to(query.dtype), weights


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        attention: Attention,
        shows: bool,
    ) -> tuple[Tensor, Tensor | None]:
        shape, shared = (*query.shape[:-1], key.shape[-2]), key.shape[-3]
        grouped = _rows_by_shared_head(query, shared)
        qq, qk = attention.scores.quantize_batches(grouped, key, attention.trains)
        scores = multiply_integers(qq, transposed(qk), attention.scores, torch.float32).view(shape)
        weights = probabilities(scores, mask, attention).to(query.dtype)
        kept = None
        if attention.dropout:
            kept = torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - attention.dropout)
        largest = weights.amax(-1, keepdim=True).to(torch.float32).clamp_(min=_SMALLEST)
        scaled = _rows_by_shared_head(_dropped(weights, kept, attention, _FULL / largest), shared)
        qw, qv = attention.values.quantize_batches(scaled, value, attention.trains)
        del scaled
        y = multiply_integers(qw, qv, attention.values, torch.float32).view(*query.shape[:-1], value.shape[-1])
        ctx.attention = attention
        save_operands(ctx, qq, qk, qv, others=(weights, kept, largest))
        ctx.shapes = query.shape, value.shape, None if mask is None else mask.shape
        ctx.dtypes = tuple(None if each is None else each.dtype for each in (query, key, value, mask))
        ctx.set_materialize_grads(False)
        shown = _dropped(weights, kept, attention, torch.ones(())).to(query.dtype) if shows else None
        return y.mul_(largest / _FULL).to(query.dtype), shown

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_shown: Tensor | None) -> tuple[Tensor | None, ...]:
        (qq, qk, qv), (weights, kept, largest) = saved_operands(ctx)
        attention, (q_dtype, k_dtype, v_dtype, mask_dtype) = ctx.attention, ctx.dtypes
        needs_query, needs_key, needs_value, needs_mask, *_ = ctx.needs_input_grad
        query_shape, value_shape, mask_shape = ctx.shapes
        shared = value_shape[-3]
        grad_query = grad_key = grad_value = grad_mask = None
        if attention.trains:
            attention.values.ranks.backward_begins()
        if grad_output is None:
            grad_output = weights.new_zeros(*query_shape[:-1], value_shape[-1])
        if needs_value:
            grad_value = _value_gradient(weights, kept, largest, grad_output, shared, attention).to(v_dtype)
        if needs_query or needs_key or needs_mask:
            grouped = _rows_by_shared_head(grad_output, shared)
            qg = quantize_entries(attention.values.grad_output, grouped, attention.trains)
            grad = multiply_integers(qg, transposed(qv), attention.values, torch.float32).view(weights.shape)
            if grad_shown is not None:
                grad.add_(grad_shown)
            if kept is not None:
                grad.mul_(kept).div_(1 - attention.dropout)
            weights = weights.to(torch.float32)
            grad = torch._softmax_backward_data(grad, weights, -1, torch.float32, grad_input=grad)
            if needs_mask:
                grad_mask = grad.sum_to_size(mask_shape).to(mask_dtype)
            grouped = _rows_by_shared_head(grad.mul_(attention.scale), shared)
            if needs_query or needs_key:
                qs = quantize_entries(attention.scores.grad_output, grouped, attention.trains)
                del grad, grouped
                if needs_query:
                    grad_query = multiply_integers(qs, qk, attention.scores, q_dtype).view(query_shape)
                if needs_key:
                    grad_key = multiply_integers(transposed(qs), qq, attention.scores, k_dtype)
        return grad_query, grad_key, grad_value, grad_mask, None, None


def _value_gradient(
    weights: Tensor, kept: Tensor | None, largest: Tensor, grad_output: Tensor, shared: int, attention: Attention
) -> Tensor:
    """Returns ``weights.T @ grad_output``, each row of both scaled halfway to what evens out those of the weights."""
    half, quantizers = largest.sqrt(), attention.value_gradient
    left = _rows_by_shared_head(_dropped(weights, kept, attention, _FULL / half), shared)
    ql = quantize_entries(quantizers.input, left, attention.trains)
    right = _rows_by_shared_head(grad_output * (half / _FULL), shared)
    qr = quantize_entries(quantizers.weight, right, attention.trains)
    return multiply_integers(transposed(ql), qr, quantizers, torch.float32)


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


def _dropped(weights: Tensor, kept: Tensor | None, attention: Attention, factor: Tensor) -> Tensor:
    """Returns the probabilities after dropout, each row times a factor."""
    scaled = weights * (factor / (1 - attention.dropout))
    return scaled if kept is None else scaled.mul_(kept)


def _rows_by_shared_head(x: Tensor, shared: int) -> Tensor:
    """Returns (*batch, heads, L, E) as (*batch, shared, heads / shared * L, E): heads with one key are one matrix."""
    *batch, heads, rows, columns = x.shape
    return x if heads == shared else x.reshape(*batch, shared, heads // shared * rows, columns)

"""Products of two batches of matrices in fixed point, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..entries import quantize_entries
from ..fixed_point import FixedPoint, FixedPointBatch
from .card_tensors import apply_on_host
from .exported import is_exporting, multiply_batches_exported
from .quantizers import ModuleQuantizers
from .recomputation import saved_tensor_hooks

Operand = FixedPoint | FixedPointBatch


def multiply_batches(a: Tensor, b: Tensor, quantizers: ModuleQuantizers, training: bool) -> Tensor:
    """Multiplies (*batch, M, K) by (*batch, K, N) in fixed point, differentiably.

    Args:
        a: float, of any strides. Its batch and that of ``b`` are broadcast against each other, in integers.
        b: float, likewise.
        quantizers: of the product.
        training: whether statistics may move.

    Returns:
        (*batch, M, N), in the dtype that torch promotes those of ``a`` and ``b`` to.
    """
    if quantizers.frozen and is_exporting():
        return multiply_batches_exported(a, b, quantizers).to(torch.promote_types(a.dtype, b.dtype))
    return apply_on_host(_BatchedProduct, a, b, quantizers, training)


class _BatchedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, quantizers: ModuleQuantizers, training: bool) -> Tensor:
        qa, qb = quantizers.quantize_batches(a, b, training)
        needs_a, needs_b = ctx.needs_input_grad[:2]
        save_operands(ctx, qa if needs_b else None, qb if needs_a else None)
        ctx.quantizers, ctx.training = quantizers, training
        ctx.sides = (a.shape, a.dtype), (b.shape, b.dtype)
        return multiply_integers(qa, qb, quantizers, torch.promote_types(a.dtype, b.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (qa, qb), _ = saved_operands(ctx)
        quantizers = ctx.quantizers
        if ctx.training:
            quantizers.ranks.backward_begins()
        qg = quantize_entries(quantizers.grad_output, grad_output, ctx.training)
        (a_shape, a_dtype), (b_shape, b_dtype) = ctx.sides
        grad_a = grad_b = None
        if qb is not None:
            grad_a = multiply_integers(qg, transposed(qb), quantizers, a_dtype).sum_to_size(a_shape)
        if qa is not None:
            grad_b = multiply_integers(transposed(qa), qg, quantizers, b_dtype).sum_to_size(b_shape)
        return grad_a, grad_b, None, None


def save_operands(ctx: Any, *operands: Operand | None, others: Sequence[Tensor | None] = ()) -> None:
    """Saves operands, and other tensors, for the backward pass."""
    ctx.formats = [None if each is None else _format(each) for each in operands]
    values = [None if each is None else each.values for each in operands]
    positions = [each.positions if isinstance(each, FixedPointBatch) else None for each in operands]
    # Activation checkpointing replaces what is saved: the formats must come from where the integers do.
    replaced = saved_tensor_hooks() is not None
    formats = torch.tensor([each or (0, 0, 0) for each in ctx.formats]) if replaced else None
    ctx.save_for_backward(*values, *positions, formats, *others)


def saved_operands(ctx: Any) -> tuple[list[Any], list[Any]]:
    """Returns what ``save_operands`` saved."""
    count = len(ctx.formats)
    saved = ctx.saved_tensors
    values, positions, replaced = saved[:count], saved[count : 2 * count], saved[2 * count]
    formats = ctx.formats if replaced is None else replaced.tolist()
    operands: list[Any] = []
    for integers, each, known in zip(values, positions, formats, strict=True):
        if integers is None:
            operands.append(None)
        elif each is None:
            operands.append(FixedPoint(integers, *known))
        else:
            operands.append(FixedPointBatch(integers, known[0], each, bool(known[2])))
    return operands, list(saved[2 * count + 1 :])


def _format(x: Operand) -> tuple[int, int, bool]:
    return x.bits, x.position if isinstance(x, FixedPoint) else 0, x.finite


def multiply_integers(a: Operand, b: Operand, quantizers: ModuleQuantizers, dtype: torch.dtype) -> Tensor:
    """Returns the product of two batches, broadcast against each other."""
    return multiply_operands(a, b, quantizers.config.exact_int31, quantizers.fqn, dtype)


def multiply_operands(a: Operand, b: Operand, exact: bool, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the product of two batches, broadcast against each other.

    Args:
        a: integers (*batch, M, K).
        b: integers (*batch, K, N).
        exact: whether int31 is exact.
        name: of the product.
        dtype: of the result, rounded to it from float32.
    """
    options: dict[str, Any] = {"exact_int31": exact, "dtype": dtype, "name": name}
    batch = torch.broadcast_shapes(a.values.shape[:-2], b.values.shape[:-2])
    if not batch and isinstance(a, FixedPoint) and isinstance(b, FixedPoint):
        return kernels.matmul(a, b, **options)
    return kernels.batched_matmul(_expanded(a, batch), _expanded(b, batch), **options)


def _expanded(x: Operand, batch: torch.Size) -> Operand:
    values = x.values.expand(*batch, -1, -1)
    if isinstance(x, FixedPoint):
        return x._replace(values=values)
    missing = len(batch) - x.positions.dim()
    return x._replace(values=values, positions=x.positions.view(*[1] * missing, *x.positions.shape))


def transposed(x: Operand) -> Operand:
    """Returns the integers with the last two dimensions exchanged."""
    return x._replace(values=x.values.transpose(-1, -2))

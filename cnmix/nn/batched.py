"""Products of two batches of matrices in fixed point, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..fixed_point import FixedPoint
from .quantizers import ModuleQuantizers
from .recomputation import saved_tensor_hooks


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
    return _BatchedProduct.apply(a, b, quantizers, training)


class _BatchedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, quantizers: ModuleQuantizers, training: bool) -> Tensor:
        qa, qb = quantizers.quantize(a, b, training)
        needs_a, needs_b = ctx.needs_input_grad[:2]
        ctx.formats = qa[1:], qb[1:]
        saved = qa.values if needs_b else None, qb.values if needs_a else None
        # Activation checkpointing replaces what is saved: the formats must come from where the integers do.
        formats = () if saved_tensor_hooks() is None else (torch.tensor([*qa[1:], *qb[1:]]),)
        ctx.save_for_backward(*saved, *formats)
        ctx.quantizers, ctx.training = quantizers, training
        ctx.sides = (a.shape, a.dtype), (b.shape, b.dtype)
        return multiply_integers(qa, qb, quantizers, torch.promote_types(a.dtype, b.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a_values, b_values, *formats = ctx.saved_tensors
        a_format, b_format = ctx.formats
        if formats:
            numbers = formats[0].tolist()
            a_format, b_format = numbers[:3], numbers[3:]
        quantizers = ctx.quantizers
        if ctx.training:
            quantizers.ranks.backward_begins()
        qg = quantizers.grad_output(grad_output, ctx.training)
        (a_shape, a_dtype), (b_shape, b_dtype) = ctx.sides
        grad_a = grad_b = None
        if b_values is not None:
            right = FixedPoint(b_values, *b_format)
            grad_a = multiply_integers(qg, transposed(right), quantizers, a_dtype).sum_to_size(a_shape)
        if a_values is not None:
            left = FixedPoint(a_values, *a_format)
            grad_b = multiply_integers(transposed(left), qg, quantizers, b_dtype).sum_to_size(b_shape)
        return grad_a, grad_b, None, None


def multiply_integers(a: FixedPoint, b: FixedPoint, quantizers: ModuleQuantizers, dtype: torch.dtype) -> Tensor:
    """Returns the product of two batches, broadcast against each other."""
    batch = torch.broadcast_shapes(a.values.shape[:-2], b.values.shape[:-2])
    a, b = (each._replace(values=each.values.expand(*batch, -1, -1)) for each in (a, b))
    if not batch:
        return kernels.matmul(a, b, exact_int31=quantizers.config.exact_int31, dtype=dtype, name=quantizers.fqn)
    return kernels.batched_matmul(a, b, exact_int31=quantizers.config.exact_int31, dtype=dtype, name=quantizers.fqn)


def transposed(x: FixedPoint) -> FixedPoint:
    """Returns the integers with the last two dimensions exchanged."""
    return x._replace(values=x.values.transpose(-1, -2))

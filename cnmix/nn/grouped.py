"""Rows that are multiplied group by group, each with a matrix of its own, as in a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..fixed_point import FixedPoint
from .batched import multiply_integers, multiply_operands, save_operands, saved_operands, transposed
from .card_tensors import apply_on_host
from .exported import is_exporting, multiply_groups_exported
from .function_calls import Call, is_multiplied, note_parameter
from .quantizers import ModuleQuantizers


def grouped_mm(
    call: Call,
    input: Tensor,
    mat2: Tensor,
    *rest: Any,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """``torch.nn.functional.grouped_mm`` of rows (M, K) by matrices (groups, K, N), or of two batches."""
    if rest or bias is not None or out_dtype not in (None, getattr(input, "dtype", None)):
        return NotImplemented
    if offs is None:
        return call.matmul(input, mat2) if input.dim() == mat2.dim() == 3 else NotImplemented
    if not is_multiplied(input, mat2) or input.dim() != 2 or mat2.dim() != 3 or input.shape[1] != mat2.shape[1]:
        return NotImplemented
    found = call.quantizers(input, mat2)
    if found is None:
        return NotImplemented
    quantizers, training = found
    note_parameter(quantizers, mat2)
    if quantizers.frozen and is_exporting():
        return multiply_groups_exported(input, mat2, offs, quantizers).to(input.dtype)
    return apply_on_host(_GroupedProduct, input, mat2, offs.tolist(), quantizers, training)


class _GroupedProduct(torch.autograd.Function):
    """One position for all rows and one for all matrices."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ends: list[int], quantizers: ModuleQuantizers, training: bool
    ) -> Tensor:
        qx, qw = quantizers.quantize(x, weight, training)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        save_operands(ctx, qx if needs_weight else None, qw if needs_x else None)
        ctx.quantizers, ctx.training, ctx.ends = quantizers, training, ends
        ctx.x_shape, ctx.weight_shape, ctx.dtypes = x.shape, weight.shape, (x.dtype, weight.dtype)
        return multiply_groups(qx, qw, ends, quantizers.config.exact_int31, quantizers.fqn, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (qx, qw), _ = saved_operands(ctx)
        quantizers = ctx.quantizers
        if ctx.training:
            quantizers.ranks.backward_begins()
        qg = quantizers.grad_output(grad_output, ctx.training)
        grad_x = grad_weight = None
        if qw is not None:
            grad_x = grad_output.new_zeros(ctx.x_shape, dtype=ctx.dtypes[0])
            for group, rows in _groups(ctx.ends):
                right = transposed(_part(qw, group))
                grad_x[rows] = multiply_integers(_part(qg, rows), right, quantizers, grad_x.dtype)
        if qx is not None:
            grad_weight = grad_output.new_zeros(ctx.weight_shape, dtype=ctx.dtypes[1])
            for group, rows in _groups(ctx.ends):
                left = transposed(_part(qx, rows))
                grad_weight[group] = multiply_integers(left, _part(qg, rows), quantizers, grad_weight.dtype)
        return grad_x, grad_weight, None, None, None


def multiply_groups(
    x: FixedPoint, weight: FixedPoint, ends: list[int], exact: bool, name: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Multiplies rows (M, K) by matrices (groups, K, N), of which each has the rows up to its end; (M, N) of ``dtype``.

    Rows behind the last group belong to none, and are zeros.
    """
    y = torch.zeros((x.values.shape[0], weight.values.shape[2]), dtype=dtype)
    for group, rows in _groups(ends):
        y[rows] = multiply_operands(_part(x, rows), _part(weight, group), exact, name, dtype)
    return y


def _groups(ends: list[int]) -> list[tuple[int, slice]]:
    """Returns the number and the rows of each group that has some."""
    return [
        (group, slice(first, end))
        for group, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
        if end > first
    ]


def _part(x: FixedPoint, index: int | slice) -> FixedPoint:
    return x._replace(values=x.values[index])

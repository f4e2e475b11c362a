"""Rows that are multiplied group by group, each with a matrix of its own, as in a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..fixed_point import FixedPoint
from .function_calls import Call, is_multiplied, is_parameter
from .quantizers import ModuleQuantizers
from .recomputation import saved_tensor_hooks


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
    quantizers.keeps_weight = is_parameter(mat2)
    return _GroupedProduct.apply(input, mat2, offs.tolist(), quantizers, training)


class _GroupedProduct(torch.autograd.Function):
    """One position for all rows and one for all matrices."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ends: list[int], quantizers: ModuleQuantizers, training: bool
    ) -> Tensor:
        qx, qw = quantizers.quantize(x, weight, training)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.formats = qx[1:], qw[1:]
        formats = () if saved_tensor_hooks() is None else (torch.tensor([*qx[1:], *qw[1:]]),)
        ctx.save_for_backward(qx.values if needs_weight else None, qw.values if needs_x else None, *formats)
        ctx.quantizers, ctx.training, ctx.ends = quantizers, training, ends
        ctx.x_shape, ctx.weight_shape, ctx.dtypes = x.shape, weight.shape, (x.dtype, weight.dtype)
        y = x.new_zeros(x.shape[0], weight.shape[2])  # rows behind the last group belong to none
        for group, rows in _groups(ends):
            y[rows] = _multiply(_part(qx, rows), _part(qw, group), quantizers, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x_values, weight_values, *formats = ctx.saved_tensors
        x_format, weight_format = ctx.formats
        if formats:
            numbers = formats[0].tolist()
            x_format, weight_format = numbers[:3], numbers[3:]
        quantizers = ctx.quantizers
        if ctx.training:
            quantizers.ranks.backward_begins()
        qg = quantizers.grad_output(grad_output, ctx.training)
        grad_x = grad_weight = None
        if weight_values is not None:
            qw = FixedPoint(weight_values, *weight_format)
            grad_x = grad_output.new_zeros(ctx.x_shape, dtype=ctx.dtypes[0])
            for group, rows in _groups(ctx.ends):
                columns = _part(qw, group)
                grad_x[rows] = _multiply(
                    _part(qg, rows), columns._replace(values=columns.values.t()), quantizers, grad_x.dtype
                )
        if x_values is not None:
            qx = FixedPoint(x_values, *x_format)
            grad_weight = grad_output.new_zeros(ctx.weight_shape, dtype=ctx.dtypes[1])
            for group, rows in _groups(ctx.ends):
                columns = _part(qx, rows)
                grad_weight[group] = _multiply(
                    columns._replace(values=columns.values.t()), _part(qg, rows), quantizers, grad_weight.dtype
                )
        return grad_x, grad_weight, None, None, None


def _groups(ends: list[int]) -> list[tuple[int, slice]]:
    """Returns the number and the rows of each group that has some."""
    return [
        (group, slice(first, end))
        for group, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
        if end > first
    ]


def _part(x: FixedPoint, index: int | slice) -> FixedPoint:
    return x._replace(values=x.values[index])


def _multiply(a: FixedPoint, b: FixedPoint, quantizers: ModuleQuantizers, dtype: torch.dtype) -> Tensor:
    return kernels.matmul(a, b, exact_int31=quantizers.config.exact_int31, dtype=dtype, name=quantizers.fqn)

"""Autograd functions whose three products run on the emulated core.

The forward pass saves the quantized input and weight, never the float tensors. The backward pass quantizes
grad_output once, for both of its products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..fixed_point import FixedPoint
from .quantizers import ModuleQuantizers


class ConvolutionGeometry(NamedTuple):
    """Stride, padding and dilation per spatial dimension, and the groups of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Product(torch.autograd.Function):
    """What Linear and convolution share: which operands are quantized when, and what is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        quantizers: ModuleQuantizers,
        training: bool,
        geometry: ConvolutionGeometry | None,
    ) -> Tensor:
        qx = quantizers.input(x, training)
        qw = quantizers.quantize_weight(weight, training)
        exact = quantizers.config.exact_int31
        if geometry is None:
            rows = _as_matrix(qx)
            columns = qw._replace(values=qw.values.t())
            y = kernels.matmul(rows, columns, bias=bias, exact_int31=exact).view(*x.shape[:-1], weight.shape[0])
        else:
            # Channels last once, for this product and grad_weight's.
            qx = kernels.to_channels_last(qx)
            ctx.channels_last = kernels.has_channels_last(x)
            y = kernels.convolution(qx, qw, *geometry, bias=bias, channels_last=ctx.channels_last, exact_int31=exact)

        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(qx.values if needs_weight else None, qw.values if needs_x else None)
        ctx.x_format, ctx.weight_format = qx[1:], qw[1:]
        ctx.x_shape, ctx.weight_shape = x.shape, weight.shape
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.quantizers, ctx.training, ctx.geometry = quantizers, training, geometry
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x_values, weight_values = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if needs_x or needs_weight:
            products = _linear_gradients if ctx.geometry is None else _convolution_gradients
            kept = None if not needs_bias else grad_output.dim() - 1 if ctx.geometry is None else 1
            qg, grad_bias = ctx.quantizers.grad_output.with_sums(grad_output, ctx.training, kept)
            qx = FixedPoint(x_values, *ctx.x_format) if needs_weight else None
            qw = FixedPoint(weight_values, *ctx.weight_format) if needs_x else None
            grad_x, grad_weight = products(ctx, qg, qx, qw)
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if grad_x is not None:
            grad_x = grad_x.to(x_dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_dtype)
        if needs_bias and grad_bias is None:
            grad_bias = kernels.channel_sums(grad_output, grad_output.dim() - 1 if ctx.geometry is None else 1)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def _linear_gradients(
    ctx: Any, qg: FixedPoint, qx: FixedPoint | None, qw: FixedPoint | None
) -> tuple[Tensor | None, Tensor | None]:
    exact = ctx.quantizers.config.exact_int31
    rows = _as_matrix(qg)
    grad_x = grad_weight = None
    if qw is not None:
        grad_x = kernels.matmul(rows, qw, exact_int31=exact).view(ctx.x_shape)
    if qx is not None:
        columns = rows._replace(values=rows.values.t())
        grad_weight = kernels.matmul(columns, _as_matrix(qx), exact_int31=exact)
    return grad_x, grad_weight


def _as_matrix(x: FixedPoint) -> FixedPoint:
    """Returns (..., K) as (M, K)."""
    *outer, inner = x.values.shape
    return x._replace(values=x.values.reshape(math.prod(outer), inner))


def _convolution_gradients(
    ctx: Any, qg: FixedPoint, qx: FixedPoint | None, qw: FixedPoint | None
) -> tuple[Tensor | None, Tensor | None]:
    exact = ctx.quantizers.config.exact_int31
    qg = kernels.to_channels_last(qg)
    grad_x = grad_weight = None
    if qw is not None:
        grad_x = kernels.convolution_grad_input(
            qg, qw, ctx.x_shape, *ctx.geometry, channels_last=ctx.channels_last, exact_int31=exact
        )
    if qx is not None:
        grad_weight = kernels.convolution_grad_weight(qg, qx, ctx.weight_shape, *ctx.geometry, exact_int31=exact)
    return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, quantizers: ModuleQuantizers, training: bool) -> Tensor:
    """Applies ``x @ weight.T + bias`` in fixed point.

    Args:
        x: float (..., K).
        weight: float (N, K).
        bias: float (N,), added in float after the product, or None.
        quantizers: of the module.
        training: whether statistics may move.

    Returns:
        (..., N) in the dtype of ``x``.
    """
    return _Product.apply(x, weight, bias, quantizers, training, None)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvolutionGeometry,
    quantizers: ModuleQuantizers,
    training: bool,
) -> Tensor:
    """Convolves (N, C, *spatial) with (O, C / groups, *kernel) in fixed point; (N, O, *output) in ``x``'s dtype."""
    return _Product.apply(x, weight, bias, quantizers, training, geometry)

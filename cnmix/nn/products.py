"""The three products of a module on the emulated core, each operand quantized once.

What is kept for the backward pass is the quantized input and weight, never the float tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..fixed_point import FixedPoint
from .quantizers import ModuleQuantizers


class ConvolutionGeometry(NamedTuple):
    """Stride, padding and dilation per spatial dimension, and the groups of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Saved(NamedTuple):
    """What the backward pass needs besides the integers.

    Attributes:
        training: whether statistics may move.
        geometry: of a convolution; None for Linear.
        x_shape: of the input.
        weight_shape: of the weight.
        channels_last: whether a convolution's input had its channels side by side in memory.
        x_dtype: of the input, and of its gradient.
    """

    training: bool
    geometry: ConvolutionGeometry | None
    x_shape: Sequence[int]
    weight_shape: Sequence[int]
    channels_last: bool
    x_dtype: torch.dtype


def forward_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantizers: ModuleQuantizers,
    training: bool,
    geometry: ConvolutionGeometry | None,
) -> tuple[Tensor, FixedPoint, FixedPoint, Saved]:
    """Quantizes input and weight, and multiplies them.

    Returns:
        The output in the dtype of ``x``, or the half type that the model computes in; both operands; and what else
        ``backward_products`` takes.
    """
    qx, qw = quantizers.quantize(x, weight, training)
    exact = quantizers.config.exact_int31
    dtype = quantizers.output_dtype or x.dtype
    channels_last = geometry is not None and kernels.has_channels_last(x)
    if geometry is None:
        columns = qw._replace(values=qw.values.t())
        y = kernels.matmul(_as_matrix(qx), columns, bias=bias, exact_int31=exact, dtype=dtype)
        y = y.view(*x.shape[:-1], weight.shape[0])
    else:
        qx = kernels.to_channels_last(qx)  # once, for this product and grad_weight's
        y = kernels.convolution(
            qx, qw, *geometry, bias=bias, channels_last=channels_last, exact_int31=exact, dtype=dtype
        )
    # Not as a view, on which autograd refuses to work in place: a ReLU(inplace=True) may follow.
    return y.data, qx, qw, Saved(training, geometry, x.shape, weight.shape, channels_last, x.dtype)


def backward_products(
    grad_output: Tensor,
    qx: FixedPoint | None,
    qw: FixedPoint | None,
    needs_bias: bool,
    quantizers: ModuleQuantizers,
    saved: Saved,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Quantizes grad_output once, for both products.

    Args:
        grad_output: float, of the output's shape.
        qx: the input where the weight's gradient is wanted.
        qw: the weight where the input's gradient is wanted.
        needs_bias: whether the bias's is.
        quantizers: of the module.
        saved: from ``forward_product``.

    Returns:
        The gradients of input (in its dtype), weight and bias (float32; the bias's may have grad_output's dtype), each
        None where not wanted.
    """
    if saved.training:
        quantizers.ranks.backward_begins()
    kept = grad_output.dim() - 1 if saved.geometry is None else 1
    if qx is None and qw is None:
        return None, None, kernels.channel_sums(grad_output, kept) if needs_bias else None
    qg, found = quantizers.grad_output.measured(grad_output, saved.training, channel_dim=kept if needs_bias else None)
    exact = quantizers.config.exact_int31
    if saved.geometry is None:
        return *_linear_gradients(qg, qx, qw, saved, exact), found.channel_sums
    return *_convolution_gradients(qg, qx, qw, saved, saved.geometry, exact), found.channel_sums


def _linear_gradients(
    qg: FixedPoint, qx: FixedPoint | None, qw: FixedPoint | None, saved: Saved, exact: bool
) -> tuple[Tensor | None, Tensor | None]:
    rows = _as_matrix(qg)
    grad_x = grad_weight = None
    if qw is not None:
        grad_x = kernels.matmul(rows, qw, exact_int31=exact, dtype=saved.x_dtype).view(saved.x_shape)
    if qx is not None:
        columns = rows._replace(values=rows.values.t())
        grad_weight = kernels.matmul(columns, _as_matrix(qx), exact_int31=exact)
    return grad_x, grad_weight


def _as_matrix(x: FixedPoint) -> FixedPoint:
    """Returns (..., K) as (M, K)."""
    if x.values.dim() == 2:
        return x
    *outer, inner = x.values.shape
    return x._replace(values=x.values.reshape(math.prod(outer), inner))


def _convolution_gradients(
    qg: FixedPoint,
    qx: FixedPoint | None,
    qw: FixedPoint | None,
    saved: Saved,
    geometry: ConvolutionGeometry,
    exact: bool,
) -> tuple[Tensor | None, Tensor | None]:
    qg = kernels.to_channels_last(qg)
    grad_x = grad_weight = None
    if qw is not None:
        grad_x = kernels.convolution_grad_input(
            qg,
            qw,
            saved.x_shape,
            *geometry,
            channels_last=saved.channels_last,
            exact_int31=exact,
            dtype=saved.x_dtype,
        )
    if qx is not None:
        grad_weight = kernels.convolution_grad_weight(qg, qx, saved.weight_shape, *geometry, exact_int31=exact)
    return grad_x, grad_weight

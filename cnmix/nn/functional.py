"""Linear and convolution in fixed point, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..fixed_point import FixedPoint
from .operators import traced_product
from .products import ConvolutionGeometry, backward_products, forward_product
from .quantizers import ModuleQuantizers


class _Product(torch.autograd.Function):
    """The three products of Linear and convolution, in eager mode."""

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
        y, qx, qw, ctx.saved = forward_product(x, weight, bias, quantizers, training, geometry)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.x_format, ctx.weight_format = qx[1:], qw[1:]
        saved = qx.values if needs_weight else None, qw.values if needs_x else None
        # Activation checkpointing replaces what is saved: the formats must come from where the integers do.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        ctx.save_for_backward(*saved, *((torch.tensor([*qx[1:], *qw[1:]]),) if hooked else ()))
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.quantizers = quantizers
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x_values, weight_values, *formats = ctx.saved_tensors
        x_format, weight_format = ctx.x_format, ctx.weight_format
        if formats:
            numbers = formats[0].tolist()
            x_format, weight_format = numbers[:3], numbers[3:]
        qx = None if x_values is None else FixedPoint(x_values, *x_format)
        qw = None if weight_values is None else FixedPoint(weight_values, *weight_format)
        gradients = backward_products(grad_output, qx, qw, ctx.needs_input_grad[2], ctx.quantizers, ctx.saved)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return *(None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs), None, None, None


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantizers: ModuleQuantizers,
    training: bool,
    geometry: ConvolutionGeometry | None = None,
) -> Tensor:
    """Multiplies in fixed point, differentiably: ``x @ weight.T + bias``, or a convolution.

    Args:
        x: float (..., K), or (N, C, *spatial) with a geometry.
        weight: float (N, K), or (O, C / groups, *kernel).
        bias: float, one per output feature or channel, added in float after the product, or None.
        quantizers: of the module.
        training: whether statistics may move.
        geometry: of a convolution.

    Returns:
        (..., N), or (N, O, *output), in the dtype of ``x`` or the half type that the model computes in.
    """
    if torch.compiler.is_compiling():
        return traced_product(x, weight, bias, quantizers, training, geometry)
    return _Product.apply(x, weight, bias, quantizers, training, geometry)

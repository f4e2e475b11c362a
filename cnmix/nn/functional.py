"""Matrix product and convolution in fixed point, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..fixed_point import FixedPoint
from .card_tensors import apply_on_host
from .exported import is_exporting, multiply_exported
from .operators import traced_product
from .products import ConvolutionGeometry, backward_products, forward_product
from .quantizers import ModuleQuantizers
from .recomputation import saved_tensor_hooks


class _Product(torch.autograd.Function):
    """The three products of a module, in eager mode."""

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
        formats = () if saved_tensor_hooks() is None else (torch.tensor([*qx[1:], *qw[1:]]),)
        ctx.save_for_backward(*saved, *formats)
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
        return *_cast(gradients, ctx.dtypes), None, None, None


class _TransformedProduct(torch.autograd.Function):
    """The same under a transform of ``torch.func``, which wants forward and context apart; that takes longer."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        quantizers: ModuleQuantizers,
        training: bool,
        geometry: ConvolutionGeometry | None,
    ) -> tuple[Any, ...]:
        y, qx, qw, saved = forward_product(x, weight, bias, quantizers, training, geometry)
        return y, qx.values, qw.values, (qx[1:], qw[1:], saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, x_values, weight_values, ctx.rest = output
        ctx.mark_non_differentiable(x_values, weight_values)
        ctx.save_for_backward(x_values, weight_values)
        ctx.dtypes = tuple(None if each is None else each.dtype for each in inputs[:3])
        ctx.quantizers = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:3]
        gradients = apply_on_host(
            _TransformedGradients, grad_output, *ctx.saved_tensors, ctx.rest, needs, ctx.dtypes, ctx.quantizers
        )
        return *gradients, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> None:
        raise _no_vmap(args[3])


class _TransformedGradients(torch.autograd.Function):
    """Its backward pass, as a function of its own: a transform hands integers on to a function only."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        x_values: Tensor,
        weight_values: Tensor,
        rest: tuple[Any, ...],
        needs: tuple[bool, ...],
        dtypes: tuple[torch.dtype | None, ...],
        quantizers: ModuleQuantizers,
    ) -> tuple[Tensor | None, ...]:
        x_format, weight_format, saved = rest
        qx = FixedPoint(x_values, *x_format) if needs[1] else None
        qw = FixedPoint(weight_values, *weight_format) if needs[0] else None
        gradients = backward_products(grad_output, qx, qw, needs[2], quantizers, saved)
        return _cast(gradients, dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.quantizers = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{ctx.quantizers.fqn!r} computes in fixed point, which has no second derivatives")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> None:
        raise _no_vmap(args[-1])


def _no_vmap(quantizers: ModuleQuantizers) -> RuntimeError:
    return RuntimeError(
        f"{quantizers.fqn!r} computes in fixed point, which torch.func.vmap (and with it jacrev and hessian) cannot "
        "batch: call it in a loop, or on a copy that cnmix.dequantize has made float again"
    )


def _cast(gradients: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype | None, ...]) -> tuple[Tensor | None, ...]:
    """Gives each gradient the dtype of what it is the gradient of."""
    return tuple(
        None if gradient is None else gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)
    )


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantizers: ModuleQuantizers,
    training: bool,
    geometry: ConvolutionGeometry | None = None,
) -> Tensor:
    """Multiplies in fixed point, differentiably: ``x @ weight.T + bias``, or a convolution, transposed or not.

    Args:
        x: float (..., K), or (N, C, *spatial) with a geometry.
        weight: float (N, K), whose K may be several dimensions, or (O, C / groups, *kernel).
        bias: float, one per output feature or channel, added in float after the product, or None.
        quantizers: of the module.
        training: whether statistics may move.
        geometry: of a convolution.

    Returns:
        (..., N), or (N, O, *output), in the dtype of ``x`` or the half type that the model computes in.
    """
    if torch.compiler.is_compiling():
        if quantizers.frozen and is_exporting():
            return multiply_exported(x, weight, bias, quantizers, geometry)
        return traced_product(x, weight, bias, quantizers, training, geometry)
    if torch._C._are_functorch_transforms_active():
        return apply_on_host(_TransformedProduct, x, weight, bias, quantizers, training, geometry)[0]
    return apply_on_host(_Product, x, weight, bias, quantizers, training, geometry)

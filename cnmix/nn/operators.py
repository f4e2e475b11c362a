"""The products of a module as operators of torch, for ``torch.compile``.

A compiled graph calls ``cnmix::product`` and ``cnmix::product_backward`` as they stand: inside, they do what eager mode
does, on the same quantizers, so that both train to the same numbers. To the compiler they are opaque, with fake
implementations that say what comes out. Shapes and widths are known when a graph is compiled; positions are not, and
travel as a tensor. Where a width grows within a call, its integers do not fit the tensor that the graph expects: they
wait with the quantizers for the backward pass, and the next call compiles the graph anew.

The operators count steps, so that no call may be dropped, repeated or merged with another: the tag says that they are
not pure, and each call gets an empty tensor of its own, which common subexpression elimination leaves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..fixed_point import FixedPoint, storage_dtype
from .card_tensors import to_device_of, to_host
from .handles import find_quantizers
from .products import ConvolutionGeometry, Saved, backward_products, forward_product
from .quantizers import ModuleQuantizers

_TAGS = (torch.Tag.nondeterministic_seeded,)


def traced_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantizers: ModuleQuantizers,
    training: bool,
    geometry: ConvolutionGeometry | None,
) -> Tensor:
    """Multiplies as ``functional`` does, by an operator that a graph can hold."""
    numbers = [] if geometry is None else _as_numbers(geometry)
    bits = (quantizers.input.state.bits, quantizers.weight.state.bits)  # guarded: a graph serves these widths
    call, dtype = torch.empty(0), quantizers.output_dtype or x.dtype
    keep = torch.is_grad_enabled()
    return product(x, weight, bias, call, quantizers.handle, training, numbers, *bits, dtype, keep)[0]


@torch.library.custom_op("cnmix::product", mutates_args=(), tags=_TAGS)
def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: Tensor,
    handle: Tensor,
    training: bool,
    geometry: Sequence[int],
    x_bits: int,
    weight_bits: int,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes input and weight, multiplies them, and returns what the backward pass needs.

    Args:
        x: float (..., K), or (N, C, *spatial) with a geometry.
        weight: float (N, K), whose K may be several dimensions, or (O, C / groups, *kernel).
        bias: float, one per output feature or channel, or None.
        call: an empty tensor made for this call.
        handle: of the module's quantizers; a tensor, so that one graph serves all layers of a shape.
        training: whether statistics may move.
        geometry: empty for a matrix product; else the number of spatial dimensions, stride, padding and dilation for
            each, groups, whether it is transposed, and if it is output_padding for each.
        x_bits: width of the input's integers that are returned.
        weight_bits: of the weight's.
        dtype: of the output.
        keep: whether a backward pass may follow; without, the integers are empty.

    Returns:
        The output; the integers of input and weight; and as int64 numbers their widths and positions, whether they are
        finite, and the number under which integers of other widths wait.
    """
    quantizers, given = find_quantizers(int(handle)), x
    x, weight, bias = to_host(x), to_host(weight), to_host(bias)
    y, qx, qw, _ = forward_product(x, weight, bias, quantizers, training, _geometry(geometry))
    empty_x, empty_weight = _integers(x, weight, geometry, x_bits, weight_bits, keep)
    waiting = 0
    if keep and (qx.bits, qw.bits) != (x_bits, weight_bits):
        waiting = quantizers.waiting.put((qx.values, qw.values))
    numbers = torch.tensor(
        [qx.bits, qx.position, qx.finite, qw.bits, qw.position, qw.finite, waiting], dtype=torch.int64
    )
    if not keep:
        return to_device_of(given, (y, empty_x, empty_weight, numbers))  # type: ignore[return-value]
    x_values = qx.values if qx.bits == x_bits else empty_x.zero_()
    # The quantizers keep the weight's integers for the next call; the graph may write over what it gets.
    weight_values = empty_weight.copy_(qw.values) if qw.bits == weight_bits else empty_weight.zero_()
    return to_device_of(given, (y, x_values, weight_values, numbers))  # type: ignore[return-value]


@product.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: Tensor,
    handle: Tensor,
    training: bool,
    geometry: Sequence[int],
    x_bits: int,
    weight_bits: int,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_values, weight_values = _integers(x, weight, geometry, x_bits, weight_bits, keep)
    numbers = x.new_empty(7, dtype=torch.int64)
    described = _geometry(geometry)
    if described is None:
        return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype), x_values, weight_values, numbers
    _, channels, *size = described.output_shape(x.shape, weight.shape)
    y = _image(x, channels, size, kernels.has_channels_last(x), dtype)
    return y, x_values, weight_values, numbers


@torch.library.custom_op("cnmix::product_backward", mutates_args=(), tags=_TAGS)
def product_backward(
    grad_output: Tensor,
    x_values: Tensor,
    weight_values: Tensor,
    numbers: Tensor,
    call: Tensor,
    handle: Tensor,
    training: bool,
    geometry: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes grad_output and returns the gradients of input, weight and bias, float32; empty where not needed."""
    quantizers, given = find_quantizers(int(handle)), grad_output
    grad_output, x_values, weight_values = map(to_host, (grad_output, x_values, weight_values))
    x_bits, x_position, x_finite, weight_bits, weight_position, weight_finite, waiting = numbers.tolist()
    if waiting:
        x_values, weight_values = quantizers.waiting.take(waiting, quantizers.fqn)
    qx = FixedPoint(x_values, x_bits, x_position, bool(x_finite)) if needs[1] else None
    qw = FixedPoint(weight_values, weight_bits, weight_position, bool(weight_finite)) if needs[0] else None
    shapes = torch.Size(x_shape), torch.Size(weight_shape)
    saved = Saved(training, _geometry(geometry), *shapes, channels_last, torch.float32)
    gradients = backward_products(grad_output, qx, qw, needs[2], quantizers, saved)
    grad_x, grad_weight, grad_bias = (
        grad_output.new_empty(0, dtype=torch.float32) if gradient is None else gradient.to(torch.float32)
        for gradient in gradients
    )
    # An operator's result must not be its argument.
    grad_bias = grad_bias.clone() if grad_bias is grad_output else grad_bias
    return to_device_of(given, (grad_x, grad_weight, grad_bias))  # type: ignore[return-value]


@product_backward.register_fake
def _(
    grad_output: Tensor,
    x_values: Tensor,
    weight_values: Tensor,
    numbers: Tensor,
    call: Tensor,
    handle: Tensor,
    training: bool,
    geometry: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = (grad_output.new_empty(0, dtype=torch.float32) for _ in range(3))
    if needs[0] and geometry:
        grad_x = _image(grad_output, x_shape[1], x_shape[2:], channels_last, torch.float32)
    elif needs[0]:
        grad_x = grad_output.new_empty(x_shape, dtype=torch.float32)
    if needs[1]:
        grad_weight = grad_output.new_empty(weight_shape, dtype=torch.float32)
    if needs[2]:
        grad_bias = grad_output.new_empty(grad_output.shape[1 if geometry else -1], dtype=torch.float32)
    return grad_x, grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, handle, ctx.training, ctx.geometry, *_ = inputs
    _, x_values, weight_values, numbers = output
    ctx.mark_non_differentiable(x_values, weight_values, numbers)
    ctx.save_for_backward(x_values, weight_values, numbers, handle)
    ctx.x_shape, ctx.weight_shape = x.shape, weight.shape
    ctx.channels_last = bool(ctx.geometry) and kernels.has_channels_last(x)
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    *saved, handle = ctx.saved_tensors
    gradients = product_backward(
        grad_output,
        *saved,
        torch.empty(0),
        handle,
        ctx.training,
        ctx.geometry,
        ctx.x_shape,
        ctx.weight_shape,
        ctx.channels_last,
        needs,
    )
    wanted = zip(gradients, needs, ctx.dtypes, strict=True)
    return *(gradient.to(dtype) if needed else None for gradient, needed, dtype in wanted), *([None] * 8)


product.register_autograd(_backward, setup_context=_setup_context)


def _as_numbers(geometry: ConvolutionGeometry) -> list[int]:
    stride, padding, dilation, groups, transposed, output_padding = geometry
    return [len(stride), *stride, *padding, *dilation, groups, int(transposed), *output_padding]


def _geometry(numbers: Sequence[int]) -> ConvolutionGeometry | None:
    if not numbers:
        return None
    n, *rest = numbers
    stride, padding, dilation = (tuple(rest[i * n : (i + 1) * n]) for i in range(3))
    groups, transposed, *output_padding = rest[3 * n :]
    return ConvolutionGeometry(stride, padding, dilation, groups, bool(transposed), tuple(output_padding))


def _integers(
    x: Tensor, weight: Tensor, geometry: Sequence[int], x_bits: int, weight_bits: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """Returns uninitialized integers in the layouts that ``forward_product`` gives them."""
    x_dtype, weight_dtype = storage_dtype(x_bits), storage_dtype(weight_bits)
    if not keep:
        return x.new_empty(0, dtype=x_dtype), x.new_empty(0, dtype=weight_dtype)
    if not geometry:
        return torch.empty_like(x, dtype=x_dtype), torch.empty_like(weight, dtype=weight_dtype)
    return (
        _image(x, x.shape[1], x.shape[2:], True, x_dtype),
        _image(weight, weight.shape[1], weight.shape[2:], True, weight_dtype),
    )


def _image(like: Tensor, channels: int, size: Sequence[int], channels_last: bool, dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized (N, channels, *size), with the first dimension of ``like``."""
    if channels_last:
        return like.new_empty((like.shape[0], *size, channels), dtype=dtype).movedim(-1, 1)
    return like.new_empty((like.shape[0], channels, *size), dtype=dtype)

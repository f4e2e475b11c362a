"""Products of float tensors as the 200 series computes them: each operand int31, the sum exact, rounded once.

The core of an MLU220, MLU270 or MLU290 multiplies integers only. A float model runs there with every operand of every
product quantized as it comes, at the position that its own largest magnitude asks for: float32 as int31, float16 and
bfloat16 as int16, both narrower where ``ct.set_quantized_bitwidth`` says so. float64, which a card has no arithmetic
for, is rounded to float32 first. The result has the dtype of the operands, and is NaN throughout where one of them is
not finite. Sums of int31 are those of ``cnmix.kernels`` in its default mode, whose normwise error is below 1e-14; a
batch of matrices has one position, and so has a convolution.

The card's library calls these operators for products of tensors on such a card, forward and backward, with the host's
tensors on the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..fixed_point import FixedPoint
from ..nn.card_tensors import host_by_default
from ..nn.products import ConvolutionGeometry
from .settings import settings

_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALF, torch.float32, torch.float64)


def fixed_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies as ``torch.mm``, ``bmm``, ``mv`` and ``dot`` do, by the dimensions of the operands.

    Args:
        a: float (M, K), (batch, M, K) or (K,).
        b: float (K, N), (batch, K, N) or (K,), of the same dtype.

    Returns:
        (M, N), (batch, M, N), (M,) or a number, in the dtype of the operands.

    Raises:
        RuntimeError: where torch's product would, for shapes that do not go together or dtypes that differ.
    """
    _check_dtypes(a, b)
    left = a.unsqueeze(0) if a.dim() == 1 else a
    right = b.unsqueeze(-1) if b.dim() == 1 else b
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        shapes = " and ".join("x".join(map(str, each.shape)) for each in (a, b))
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({shapes})")
    with host_by_default():
        if left.shape[-1] == 0:
            y = left.new_zeros((*left.shape[:-1], right.shape[-1]))
        elif left.dim() == 2:
            y = kernels.matmul(_quantize(left), _quantize(right), dtype=_kernel_dtype(a), name="fixed_matmul")
        else:
            y = kernels.batched_matmul(_quantize(left), _quantize(right), dtype=_kernel_dtype(a), name="fixed_matmul")
    y = y.to(a.dtype)
    y = y.squeeze(-1) if b.dim() == 1 else y
    return y.squeeze(0) if a.dim() == 1 else y


def fixed_convolution(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolves (N, C, *spatial) with (O, C / groups, *kernel), or transposed (C, O / groups, *kernel).

    Args:
        x: float.
        weight: float, of the same dtype.
        stride: per spatial dimension.
        padding: likewise.
        dilation: likewise.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed one, per spatial dimension.
        groups: of channels.

    Returns:
        (N, O, *output), in the dtype of the operands.

    Raises:
        RuntimeError: if the dtypes differ.
        ValueError: where no output would be left.
    """
    _check_dtypes(x, weight)
    geometry = _geometry(stride, padding, dilation, transposed, output_padding, groups)
    shape = geometry.output_shape(x.shape, weight.shape)
    with host_by_default():
        return _convolve(_quantize(x), _quantize(weight), shape, geometry, transposed, x)


def fixed_convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of a convolution's input and weight, each empty where it is not needed.

    Args:
        grad: of the output, (N, O, *output).
        x: of ``fixed_convolution``, and so on.
        weight: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        transposed: see there.
        output_padding: see there.
        groups: see there.
        needs_x: whether the input's gradient is wanted.
        needs_weight: whether the weight's is.
    """
    _check_dtypes(grad, x, weight)
    geometry = _geometry(stride, padding, dilation, transposed, output_padding, groups)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    with host_by_default():
        qg = _quantize(grad)
        if needs_x:
            grad_x = _convolve(qg, _quantize(weight), x.shape, geometry, not transposed, x)
        if needs_weight:
            # The weight of a transposed convolution is that of the convolution from its output to its input.
            qx = _quantize(x)
            output, source = (qx, qg) if transposed else (qg, qx)
            if 0 in weight.shape or 0 in output.values.shape or 0 in source.values.shape:
                grad_weight = torch.zeros_like(weight)
            else:
                grad_weight = kernels.convolution_grad_weight(
                    output, source, weight.shape, *geometry.of_kernels, name="fixed_convolution"
                ).to(weight.dtype)
    return grad_x, grad_weight


def _convolve(
    a: FixedPoint,
    weight: FixedPoint,
    shape: Sequence[int],
    geometry: ConvolutionGeometry,
    transposed: bool,
    like: Tensor,
) -> Tensor:
    """Returns the convolution of ``a``, or the transposed one, of this shape; in the layout and dtype of ``like``."""
    if 0 in shape or 0 in a.values.shape or 0 in weight.values.shape:
        return like.new_zeros(tuple(shape))
    options: dict[str, Any] = {
        "channels_last": kernels.has_channels_last(like),
        "dtype": _kernel_dtype(like),
        "name": "fixed_convolution",
    }
    if transposed:
        y = kernels.convolution_grad_input(a, weight, tuple(shape), *geometry.of_kernels, **options)
    else:
        y = kernels.convolution(a, weight, *geometry.of_kernels, **options)
    # Where a transposed convolution is dilated, its output_padding may hold whole strides, which no input stands for.
    y = y[tuple(slice(n) for n in shape)]
    return y.to(like.dtype)


def _quantize(x: Tensor) -> FixedPoint:
    """Quantizes a tensor at the position of its largest magnitude."""
    bits = min(settings().product_bits, 16 if x.dtype in _HALF else 31)
    x = x.resolve_neg()
    return kernels.quantize_measured(x.to(torch.float32) if x.dtype == torch.float64 else x, bits, None)[0]


def _kernel_dtype(like: Tensor) -> torch.dtype:
    return like.dtype if like.dtype in _HALF else torch.float32


def _geometry(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> ConvolutionGeometry:
    extra = tuple(output_padding) if transposed else ()
    return ConvolutionGeometry(tuple(stride), tuple(padding), tuple(dilation), groups, transposed, extra)


def _check_dtypes(*operands: Tensor) -> None:
    dtypes = {each.dtype for each in operands}
    if len(dtypes) > 1 or not dtypes <= set(_FLOATS):
        names = ", ".join(str(each.dtype) for each in operands)
        raise RuntimeError(f"a card multiplies tensors of one float dtype, got {names}: convert them with .to()")


_GEOMETRY = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups"
)
_OPERATORS: dict[str, Callable[..., object]] = {
    "fixed_matmul(Tensor a, Tensor b) -> Tensor": fixed_matmul,
    f"fixed_convolution(Tensor x, Tensor weight, {_GEOMETRY}) -> Tensor": fixed_convolution,
    f"fixed_convolution_backward(Tensor grad, Tensor x, Tensor weight, {_GEOMETRY}, bool needs_x, bool needs_weight)"
    " -> (Tensor, Tensor)": fixed_convolution_backward,
}


@functools.cache
def register_products() -> torch.library.Library:
    """Makes the operators known to torch, once."""
    library = torch.library.Library("cnmix", "FRAGMENT")  # kept: the operators would go with it
    for schema, function in _OPERATORS.items():
        library.impl(library.define(schema), function, "CPU")
    return library

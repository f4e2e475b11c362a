"""The three products of a module on the emulated core, each operand quantized once.

What is kept for the backward pass is the quantized input and weight, never the float tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..fixed_point import FixedPoint
from .quantizers import ModuleQuantizers


class ConvolutionGeometry(NamedTuple):
    """Stride, padding and dilation per spatial dimension, and the groups of a convolution.

    A transposed convolution computes what the convolution of the same geometry has as its input's gradient: its input
    has the shape of that one's output, its output that of its input, and its weight is that one's, (O, C / groups,
    *kernel) with O channels in and C out.

    Attributes:
        stride: per spatial dimension.
        padding: likewise.
        dilation: likewise.
        groups: of channels.
        transposed: whether this is a transposed convolution.
        output_padding: of a transposed convolution, per spatial dimension; empty for another.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        transposed: bool,
        output_padding: Sequence[int],
    ) -> ConvolutionGeometry:
        """Returns the geometry that an operator of torch got, as lists."""
        return cls(tuple(stride), tuple(padding), tuple(dilation), groups, transposed, tuple(output_padding))

    @property
    def of_kernels(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Stride, padding, dilation and groups, as ``kernels`` takes them."""
        return self[:4]

    def output_shape(self, x_shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Returns (N, channels, *output) for an input (N, channels, *spatial).

        Raises:
            ValueError: if no output would be left, or ``output_padding`` is too large.
        """
        images, _, *spatial = x_shape
        kernel = weight_shape[2:]
        if not self.transposed:
            size = kernels.reference.output_size(spatial, kernel, self.stride, self.padding, self.dilation)
            return images, weight_shape[0], *size
        each = zip(spatial, kernel, *self[:3], self.output_padding, strict=True)
        size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, s, p, d, extra in each]
        if any(extra >= max(s, d) for extra, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True)):
            raise ValueError(
                f"output_padding {self.output_padding} must be smaller than the stride {self.stride} or the dilation "
                f"{self.dilation}"
            )
        if any(n < 1 for n in size):
            raise ValueError(
                f"an input of spatial size {tuple(spatial)} would give an output of {tuple(size)}: take a larger "
                f"input, or less padding than {self.padding}"
            )
        return images, weight_shape[1] * self.groups, *size


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
    shape = () if geometry is None else geometry.output_shape(x.shape, weight.shape)  # refuses before anything moves
    qx, qw = quantizers.quantize(x, weight, training)
    options = _options(quantizers)
    dtype = quantizers.output_dtype or x.dtype
    channels_last = geometry is not None and kernels.has_channels_last(x)
    if geometry is None:
        columns = qw._replace(values=qw.values.flatten(1).t())
        y = kernels.matmul(_as_matrix(qx), columns, bias=bias, dtype=dtype, **options)
        y = y.view(*x.shape[:-1], weight.shape[0])
    else:
        qx = kernels.to_channels_last(qx)  # once, for this product and grad_weight's
        y = _convolve(
            qx,
            qw,
            shape,
            geometry,
            geometry.transposed,
            bias=bias,
            channels_last=channels_last,
            dtype=dtype,
            **options,
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
    options = _options(quantizers)
    if saved.geometry is None:
        return *_linear_gradients(qg, qx, qw, saved, options), found.channel_sums
    return *_convolution_gradients(qg, qx, qw, saved, saved.geometry, options), found.channel_sums


def _options(quantizers: ModuleQuantizers) -> dict[str, Any]:
    """Returns what every kernel is told of a product."""
    return {"exact_int31": quantizers.config.exact_int31, "name": quantizers.fqn}


def _linear_gradients(
    qg: FixedPoint, qx: FixedPoint | None, qw: FixedPoint | None, saved: Saved, options: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    rows = _as_matrix(qg)
    grad_x = grad_weight = None
    if qw is not None:
        matrix = qw._replace(values=qw.values.flatten(1))
        grad_x = kernels.matmul(rows, matrix, dtype=saved.x_dtype, **options).view(saved.x_shape)
    if qx is not None:
        columns = rows._replace(values=rows.values.t())
        grad_weight = kernels.matmul(columns, _as_matrix(qx), **options).view(saved.weight_shape)
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
    options: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None]:
    qg = kernels.to_channels_last(qg)
    grad_x = grad_weight = None
    if qw is not None:
        grad_x = _convolve(
            qg,
            qw,
            saved.x_shape,
            geometry,
            not geometry.transposed,
            channels_last=saved.channels_last,
            dtype=saved.x_dtype,
            **options,
        )
    if qx is not None:
        # The weight of a transposed convolution is that of the convolution from its output to its input.
        output, source = (qx, qg) if geometry.transposed else (qg, qx)
        grad_weight = kernels.convolution_grad_weight(
            output, source, saved.weight_shape, *geometry.of_kernels, **options
        )
    return grad_x, grad_weight


def _convolve(
    x: FixedPoint,
    weight: FixedPoint,
    shape: Sequence[int],
    geometry: ConvolutionGeometry,
    transposed: bool,
    *,
    channels_last: bool,
    **options: Any,
) -> Tensor:
    """Returns the convolution of ``x``, or the transposed one, of this shape and layout."""
    if transposed:
        product = kernels.convolution_grad_input
        return product(x, weight, shape, *geometry.of_kernels, channels_last=channels_last, **options)
    y = kernels.convolution(x, weight, *geometry.of_kernels, channels_last=channels_last, **options)
    if y.shape == shape:
        return y
    # Where a transposed convolution is dilated, its output_padding may hold whole strides, which no input stands for.
    y = y[tuple(slice(n) for n in shape)]
    return y.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else y.contiguous()

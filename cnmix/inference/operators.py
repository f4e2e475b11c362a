"""The products of integer models as operators of torch, so that an exported graph has a node for each.

``torch.ops.cnmix.integer_linear`` and ``torch.ops.cnmix.integer_convolution`` take a float tensor and a weight of
integers. They quantize the one at a position that is known, multiply exactly, round each sum once to float32, scale it
by a power of two and add the bias, in float32 too. ``integer_matmul``, of batches of matrices, and ``integer_filter``,
a convolution, take two float tensors and quantize both; ``integer_grouped`` multiplies groups of rows by a matrix each,
of integers or floats. Formats are width and position of the left operand, then of the right one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..fixed_point import FixedPoint, FixedPointBatch
from ..nn.batched import multiply_operands
from ..nn.card_tensors import on_host
from ..nn.exported import FITTING
from ..nn.grouped import multiply_groups
from ..nn.products import ConvolutionGeometry
from . import shapes


def quantize(x: Tensor, bits: int, position: int, rounding: str) -> FixedPoint:
    """Quantizes a float tensor of any dtype and shape; the result is marked where ``x`` has NaN or infinity."""
    return kernels.quantize_measured(x, bits, None if position == FITTING else position, rounding)[0]


def quantize_each(x: Tensor, bits: int, position: int, per_entry: bool, rounding: str) -> FixedPoint | FixedPointBatch:
    """Quantizes a batch of matrices (*batch, M, K): all alike, or each at the position that fits it."""
    if per_entry and x.dim() > 2:
        return kernels.quantize_batch(x, bits, None, rounding, batch_dims=x.dim() - 2)[0]
    return quantize(x, bits, FITTING if per_entry else position, rounding)


def multiply_rows(x: FixedPoint, weight: FixedPoint, bias: Tensor | None, exact: bool, name: str) -> Tensor:
    """Maps integers (..., K) by a weight (O, K) to float32 (..., O)."""
    rows = x._replace(values=x.values.reshape(-1, x.values.shape[-1]))
    columns = weight._replace(values=weight.values.t())
    y = kernels.matmul(rows, columns, bias=bias, exact_int31=exact, name=name)
    return y.view(*x.values.shape[:-1], weight.values.shape[0])


def convolve(
    x: FixedPoint, weight: FixedPoint, bias: Tensor | None, geometry: ConvolutionGeometry, exact: bool, name: str
) -> Tensor:
    """Convolves integers (N, C, *spatial), transposed or not; float32 (N, O, *output), in memory as ``x`` is."""
    stride, padding, dilation, groups, transposed, _ = geometry
    if not transposed:
        return kernels.convolution(
            x, weight, stride, padding, dilation, groups, bias=bias, exact_int31=exact, name=name
        )
    size = geometry.output_shape(x.values.shape, weight.values.shape)
    return kernels.convolution_grad_input(
        x, weight, size, stride, padding, dilation, groups, bias=bias, exact_int31=exact, name=name
    )


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, formats: list[int], rounding: str, exact: bool, name: str
) -> Tensor:
    qx, qw = quantize(x, formats[0], formats[1], rounding), FixedPoint(weight, formats[2], formats[3])
    return multiply_rows(qx, qw, bias, exact, name).to(x.dtype)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    *geometry, formats, rounding, exact, name = arguments
    qx, qw = quantize(x, formats[0], formats[1], rounding), FixedPoint(weight, formats[2], formats[3])
    return convolve(qx, qw, bias, ConvolutionGeometry.of(*geometry), exact, name).to(x.dtype)


def _matmul(
    a: Tensor,
    b: Tensor,
    formats: list[int],
    per_entry: list[bool],
    a_rounding: str,
    b_rounding: str,
    exact: bool,
    name: str,
) -> Tensor:
    qa = quantize_each(a, formats[0], formats[1], per_entry[0], a_rounding)
    qb = quantize_each(b, formats[2], formats[3], per_entry[1], b_rounding)
    return multiply_operands(qa, qb, exact, name)


def _filter(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    *geometry, formats, x_rounding, weight_rounding, exact, name = arguments
    qx, qw = quantize(x, formats[0], formats[1], x_rounding), quantize(weight, formats[2], formats[3], weight_rounding)
    return convolve(qx, qw, None, ConvolutionGeometry.of(*geometry), exact, name)


def _grouped(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    formats: list[int],
    x_rounding: str,
    weight_rounding: str,
    exact: bool,
    name: str,
) -> Tensor:
    qx = quantize(x, formats[0], formats[1], x_rounding)
    if weight.is_floating_point():
        qw = quantize(weight, formats[2], formats[3], weight_rounding)
    else:
        qw = FixedPoint(weight, formats[2], formats[3])
    return multiply_groups(qx, qw, ends.tolist(), exact, name)


_FORMATS = "int[] formats, str rounding, bool exact, str name"
_library = torch.library.Library("cnmix", "FRAGMENT")  # kept: with it the operators would go
_library.define(f"integer_linear(Tensor x, Tensor weight, Tensor? bias, {_FORMATS}) -> Tensor")
_library.define(
    "integer_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    f"int groups, bool transposed, int[] output_padding, {_FORMATS}) -> Tensor"
)
_BOTH = "int[] formats, {}str left_rounding, str right_rounding, bool exact, str name"
_library.define(f"integer_matmul(Tensor a, Tensor b, {_BOTH.format('bool[] per_entry, ')}) -> Tensor")
_library.define(
    "integer_filter(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, "
    f"bool transposed, int[] output_padding, {_BOTH.format('')}) -> Tensor"
)
_library.define(f"integer_grouped(Tensor x, Tensor weight, Tensor ends, {_BOTH.format('')}) -> Tensor")
for _name, _function, _returned in (
    ("integer_linear", _linear, shapes.linear),
    ("integer_convolution", _convolution, shapes.convolution),
    ("integer_matmul", _matmul, shapes.matmul),
    ("integer_filter", _filter, shapes.filtered),
    ("integer_grouped", _grouped, shapes.grouped),
):
    for _device in ("CPU", "PrivateUse1"):
        _library.impl(_name, on_host(_function), _device)
    torch.library.register_fake(f"cnmix::{_name}", _returned, lib=_library)

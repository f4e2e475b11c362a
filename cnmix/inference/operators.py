"""The products of integer models as operators of torch, so that an exported graph has a node for each.

``torch.ops.cnmix.integer_linear`` and ``torch.ops.cnmix.integer_convolution`` take a float tensor and a weight of
integers. They quantize the one at a position that is known, multiply exactly, round each sum once to float32, scale it
by a power of two and add the bias, in float32 too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..fixed_point import FixedPoint
from ..nn.card_tensors import to_device_of, to_host
from ..nn.products import ConvolutionGeometry


def quantize(x: Tensor, bits: int, position: int, rounding: str) -> FixedPoint:
    """Quantizes a float tensor of any dtype and shape; the result is marked where ``x`` has NaN or infinity."""
    return kernels.quantize_measured(x, bits, position, rounding)[0]


def multiply_rows(x: FixedPoint, weight: FixedPoint, bias: Tensor | None, exact: bool, name: str) -> Tensor:
    """Maps integers (..., K) by a weight (O, K) to float32 (..., O)."""
    rows = x._replace(values=x.values.reshape(-1, x.values.shape[-1]))
    columns = weight._replace(values=weight.values.t())
    y = kernels.matmul(rows, columns, bias=bias, exact_int31=exact, name=name)
    return y.view(*x.values.shape[:-1], weight.values.shape[0])


def convolve(
    x: FixedPoint,
    weight: FixedPoint,
    bias: Tensor | None,
    geometry: ConvolutionGeometry,
    exact: bool,
    name: str,
    channels_last: bool = True,
) -> Tensor:
    """Convolves integers (N, C, *spatial), transposed or not; float32 (N, O, *output), by default channels last."""
    stride, padding, dilation, groups, transposed, _ = geometry
    if not transposed:
        return kernels.convolution(
            x,
            weight,
            stride,
            padding,
            dilation,
            groups,
            bias=bias,
            channels_last=channels_last,
            exact_int31=exact,
            name=name,
        )
    size = geometry.output_shape(x.values.shape, weight.values.shape)
    return kernels.convolution_grad_input(
        x,
        weight,
        size,
        stride,
        padding,
        dilation,
        groups,
        bias=bias,
        channels_last=channels_last,
        exact_int31=exact,
        name=name,
    )


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, formats: list[int], rounding: str, exact: bool, name: str
) -> Tensor:
    given, x, weight, bias = x, to_host(x), to_host(weight), to_host(bias)
    bits, position, weight_bits, weight_position = formats
    qw = FixedPoint(weight, weight_bits, weight_position)
    y = multiply_rows(quantize(x, bits, position, rounding), qw, bias, exact, name)
    return to_device_of(given, (y.to(x.dtype),))[0]


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
    formats: list[int],
    rounding: str,
    exact: bool,
    name: str,
    channels_last: bool = True,
) -> Tensor:
    given, x, weight, bias = x, to_host(x), to_host(weight), to_host(bias)
    bits, position, weight_bits, weight_position = formats
    geometry = _geometry(stride, padding, dilation, groups, transposed, output_padding)
    qw = FixedPoint(weight, weight_bits, weight_position)
    y = convolve(quantize(x, bits, position, rounding), qw, bias, geometry, exact, name, channels_last)
    return to_device_of(given, (y.to(x.dtype),))[0]


def _geometry(
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
) -> ConvolutionGeometry:
    return ConvolutionGeometry(
        tuple(stride), tuple(padding), tuple(dilation), groups, transposed, tuple(output_padding)
    )


_FORMATS = "int[] formats, str rounding, bool exact, str name"
_library = torch.library.Library("cnmix", "FRAGMENT")  # kept: with it the operators would go
_library.define(f"integer_linear(Tensor x, Tensor weight, Tensor? bias, {_FORMATS}) -> Tensor")
_library.define(
    "integer_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    f"int groups, bool transposed, int[] output_padding, {_FORMATS}, "
    "bool channels_last=True) -> Tensor"
)
for _device in ("CPU", "PrivateUse1"):
    _library.impl("integer_linear", _linear, _device)
    _library.impl("integer_convolution", _convolution, _device)


@torch.library.register_fake("cnmix::integer_linear", lib=_library)
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("cnmix::integer_convolution", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
    formats: list[int],
    rounding: str,
    exact: bool,
    name: str,
    channels_last: bool = True,
) -> Tensor:
    geometry = _geometry(stride, padding, dilation, groups, transposed, output_padding)
    images, channels, *size = geometry.output_shape(x.shape, weight.shape)
    if not channels_last:
        return x.new_empty((images, channels, *size))
    return x.new_empty((images, *size, channels)).movedim(-1, 1)

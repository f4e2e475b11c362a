"""Products of a frozen model while ``torch.export`` goes through it, as operators that hold numbers and tensors alone.

``torch.ops.cnmix.integer_linear``, ``integer_convolution`` and their like are defined in ``cnmix.inference.operators``,
which is loaded where models are exported. Each computes what eager mode does of the same operands: a position that no
training step has found yet is ``FITTING``, the one that fits the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import kernels
from ..adaptive import OperandQuantizer
from ..fixed_point import FixedPoint
from .products import ConvolutionGeometry
from .quantizers import ModuleQuantizers

FITTING = 1 << 20
"""Stands for the position that fits a tensor, in formats; as a number it is out of every range."""


def is_exporting() -> bool:
    """Whether ``torch.export`` goes through the model's own Python code, whose tensors are fake then."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_fake(x: Any) -> bool:
    """Whether this is a tensor of such a pass."""
    return isinstance(x, FakeTensor) and is_exporting()


def formats_of(quantizers: ModuleQuantizers) -> list[int]:
    """Returns width and position of the left operand, then of the right one, as the operators take them."""
    return [*_format(quantizers.input), *_format(quantizers.weight)]


def frozen_weight(quantizers: ModuleQuantizers, weight: Tensor) -> FixedPoint:
    """Returns the integers of a parameter.

    Raises:
        ValueError: if there are none, since eager mode never came here, or if they are not finite.
    """
    if quantizers.of_function and quantizers.frozen_integers is None:
        raise ValueError(f"{quantizers.fqn!r} was not called when the model ran eagerly on the same inputs")
    integers = quantizers.quantize_weight(weight, training=False)
    if not integers.finite:
        raise ValueError(f"the weight of {quantizers.fqn!r} holds NaN or infinity, which no integer stands for")
    return integers


def multiply_exported(
    x: Tensor, weight: Tensor, bias: Tensor | None, quantizers: ModuleQuantizers, geometry: ConvolutionGeometry | None
) -> Tensor:
    """Multiplies as ``functional.multiply`` does."""
    dtype = quantizers.output_dtype or x.dtype
    source = x if x.dtype == dtype else x.to(torch.float32)
    if geometry is None:
        return _rows(source, weight, bias, quantizers).to(dtype)
    return _image(source, weight, bias, quantizers, geometry).to(dtype)


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, quantizers: ModuleQuantizers) -> Tensor:
    left, right = rounding_of(quantizers)
    if quantizers.keeps_weight:
        integers = frozen_weight(quantizers, weight)
        values = integers.values.flatten(1)
        formats = [*_format(quantizers.input), integers.bits, integers.position]
        return torch.ops.cnmix.integer_linear(x, values, bias, formats, left, *_named(quantizers))
    rows = x.reshape(-1, x.shape[-1])
    y = torch.ops.cnmix.integer_matmul(
        rows, weight.flatten(1).t(), formats_of(quantizers), [False, False], left, right, *_named(quantizers)
    )
    y = y.view(*x.shape[:-1], weight.shape[0])
    return (y if bias is None else y + bias).to(x.dtype)


def _image(
    x: Tensor, weight: Tensor, bias: Tensor | None, quantizers: ModuleQuantizers, geometry: ConvolutionGeometry
) -> Tensor:
    left, right = rounding_of(quantizers)
    if quantizers.keeps_weight:
        integers = frozen_weight(quantizers, weight)
        formats = [*_format(quantizers.input), integers.bits, integers.position]
        y = torch.ops.cnmix.integer_convolution(x, integers.values, bias, *geometry, formats, left, *_named(quantizers))
    else:
        y = torch.ops.cnmix.integer_filter(
            x, weight, *geometry, formats_of(quantizers), left, right, *_named(quantizers)
        )
        y = (y if bias is None else y + bias.view(-1, *[1] * len(geometry.stride))).to(x.dtype)
    return y if kernels.has_channels_last(x) else y.contiguous()


def multiply_batches_exported(a: Tensor, b: Tensor, quantizers: ModuleQuantizers) -> Tensor:
    """Multiplies as ``batched.multiply_batches`` does, to float32."""
    return torch.ops.cnmix.integer_matmul(
        a, b, formats_of(quantizers), per_entry(quantizers), *rounding_of(quantizers), *_named(quantizers)
    )


def multiply_groups_exported(x: Tensor, weight: Tensor, ends: Tensor, quantizers: ModuleQuantizers) -> Tensor:
    """Multiplies as ``grouped.grouped_mm`` does."""
    formats = formats_of(quantizers)
    if quantizers.keeps_weight:
        integers = frozen_weight(quantizers, weight)
        weight, formats[2:] = integers.values, [integers.bits, integers.position]
    return torch.ops.cnmix.integer_grouped(x, weight, ends, formats, *rounding_of(quantizers), *_named(quantizers))


def per_entry(quantizers: ModuleQuantizers) -> list[bool]:
    """Returns for the left and the right operand of a batch whether each matrix has a position of its own."""
    return [quantizers.input.config.per_entry, quantizers.weight.config.per_entry]


def rounding_of(quantizers: ModuleQuantizers) -> tuple[str, str]:
    """Returns how the left and the right operand are rounded."""
    return quantizers.input.rounding(training=False), quantizers.weight.rounding(training=False)


def _named(quantizers: ModuleQuantizers) -> tuple[bool, str]:
    return quantizers.config.exact_int31, quantizers.fqn


def _format(quantizer: OperandQuantizer) -> tuple[int, int]:
    state = quantizer.state
    return state.bits, FITTING if state.position is None else state.position

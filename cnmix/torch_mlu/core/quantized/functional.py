"""The products of quantized modules: floats on the host, integers on the card.

They are operators of PyTorch, so that a traced model has them too, whatever device it was traced on. What they know of
scales are plain numbers, which stay as they are when a traced model becomes half or goes to the card.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .... import kernels
from ....fixed_point import FixedPoint, choose_position, limits
from ....inference import operators  # noqa: F401  (defines the integer products)

PER_CHANNEL = {3: 8, 4: 16}
PER_TENSOR = {1: 8, 2: 16}
"""The width of each ``quantized_mode``."""


class Formats(NamedTuple):
    """The integers that a product's operands become on the card.

    Attributes:
        input_bits: width of the input.
        input_position: exponent of its step.
        weight_bits: width of the weight.
        weight_position: exponent of its step.
        fine: where each output channel's weight has a scale of its own, what its step is divided by: float32
            (channels,), else None.
    """

    input_bits: int
    input_position: int
    weight_bits: int
    weight_position: int
    fine: Tensor | None = None


def formats(scale: Sequence[float], mode: Sequence[int]) -> Formats:
    """Returns the formats that the card's kernels take from a module's ``scale`` and ``quantized_mode``.

    A scale multiplies, ``qmax / absmax``. The kernels keep of it the position ``floor(log2(qmax / scale)) - (bits -
    2)``. Only single channels of a weight have a fine scale besides, ``fine_c = 2**position_c * qmax / absmax_c``; one
    position serves them all, ``round((max + min) / 2)`` of theirs, and each fine scale is brought to it.

    Args:
        scale: of input and weight; or of the input, 0, and of each channel of the weight; or both widths.
        mode: one of 1 to 4; or both positions, where ``scale`` has the widths.
    """
    if len(mode) == 2:
        return Formats(int(scale[0]), mode[0], int(scale[1]), mode[1])
    if mode[0] in PER_TENSOR:
        bits = PER_TENSOR[mode[0]]
        return Formats(bits, _position(scale[0], bits), bits, _position(scale[1], bits))
    bits = PER_CHANNEL[mode[0]]
    largest, smallest = min(scale[2:]), max(scale[2:])  # magnitudes: a scale is the inverse of one
    middle = (_position(largest, bits) + _position(smallest, bits)) / 2
    position = int(math.copysign(math.floor(abs(middle) + 0.5), middle))
    of_weight = torch.tensor(scale[2:], dtype=torch.float32)
    qmax = torch.full_like(of_weight, limits(bits)[1])  # a number over a tensor would be rounded twice
    fine = qmax / (qmax / of_weight) * math.ldexp(1.0, position)
    return Formats(bits, _position(scale[0], bits), bits, position, fine)


def quantize_weight(weight: Tensor, chosen: Formats) -> FixedPoint:
    """Quantizes a weight (channels, ...) of any float dtype: ``clamp(round(w / step))``, each channel by its own."""
    if chosen.fine is None:
        return kernels.quantize_measured(weight, chosen.weight_bits, chosen.weight_position)[0]
    step = (math.ldexp(1.0, chosen.weight_position) / chosen.fine).view(-1, *[1] * (weight.dim() - 1))
    integers = kernels.quantize_measured(weight.float() / step, chosen.weight_bits, 0)[0]
    return integers._replace(position=chosen.weight_position)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Sequence[float], mode: Sequence[int], name: str = "linear"
) -> Tensor:
    """Maps (..., in_features) to (..., out_features), in the dtype of ``x``.

    Args:
        x: float.
        weight: (out_features, in_features), float.
        bias: (out_features,), or None.
        scale: as ``formats`` takes it.
        mode: likewise.
        name: of the module, for messages.
    """
    return torch.ops.torch_mlu.quantized_linear(x, weight, bias, scale, mode, name)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    scale: Sequence[float],
    mode: Sequence[int],
    name: str = "convolution",
) -> Tensor:
    """Maps (N, C, *spatial) or (C, *spatial) to (N, O, *output) or (O, *output), in the dtype of ``x``.

    Args:
        x: float; any numbers where there are a mean and a std.
        weight: (O, C / groups, *kernel), float.
        bias: (O,), or None.
        mean: (1, C, 1, 1), or None: the card computes with ``(x - mean) / std``. The host does not.
        std: likewise.
        stride: per spatial dimension.
        padding: before and after each spatial dimension, the last one first, as ``F.pad`` takes it.
        dilation: per spatial dimension.
        groups: of channels.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        scale: as ``formats`` takes it.
        mode: likewise.
        name: of the module, for messages.
    """
    return torch.ops.torch_mlu.quantized_convolution(
        x, weight, bias, mean, std, stride, padding, dilation, groups, padding_mode, scale, mode, name
    )


def _linear_on_host(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: list[float], mode: list[int], name: str
) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_on_card(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: list[float], mode: list[int], name: str
) -> Tensor:
    card = x.device.index
    x, weight, bias = _host_views(name, x, weight, bias)
    chosen = formats(scale, mode)
    return torch.ops.cnmix_card.card(integer_linear(x, quantize_weight(weight, chosen), bias, chosen, name), card)


def integer_linear(x: Tensor, weight: FixedPoint, bias: Tensor | None, chosen: Formats, name: str) -> Tensor:
    """Computes what the card does, of the host's tensors, with the operators that integer models have.

    Args:
        x: (..., in_features), float.
        weight: (out_features, in_features), as ``quantize_weight`` returns it.
        bias: (out_features,), or None.
        chosen: the formats.
        name: of the module, for messages.

    Returns:
        (..., out_features), in the dtype of ``x``.
    """
    _check_float(x, name)
    features = weight.values.shape[1]
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name!r} takes {features} features in the last dimension, got shape {tuple(x.shape)}")
    inside, outside = _biases(bias, chosen)
    y = torch.ops.cnmix.integer_linear(x.float(), weight.values, inside, chosen[:4], "nearest_even", False, name)
    return _finished(y, weight, chosen, outside, 0).to(x.dtype)


def _convolution_on_host(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, std: Tensor | None, *arguments: Any
) -> Tensor:
    stride, padding, dilation, groups, padding_mode = arguments[:5]
    padded, within = _pad(x, padding, padding_mode)
    batched = padded if x.dim() == weight.dim() else padded.unsqueeze(0)
    y = torch.convolution(batched, weight, bias, stride, within, dilation, False, [0] * len(stride), groups)
    return y if x.dim() == weight.dim() else y.squeeze(0)


def _convolution_on_card(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, std: Tensor | None, *arguments: Any
) -> Tensor:
    stride, padding, dilation, groups, padding_mode, scale, mode, name = arguments
    card = x.device.index
    x, weight, bias, mean, std = _host_views(name, x, weight, bias, mean, std)
    chosen = formats(scale, mode)
    qw = quantize_weight(weight, chosen)
    y = integer_convolution(x, qw, bias, mean, std, stride, padding, dilation, groups, padding_mode, chosen, name)
    return torch.ops.cnmix_card.card(y, card)


def integer_convolution(
    x: Tensor,
    weight: FixedPoint,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    chosen: Formats,
    name: str,
) -> Tensor:
    """Computes what the card does, of the host's tensors, with the operators that integer models have.

    Args:
        x: as ``convolution`` takes it, and what follows but for these.
        weight: (O, C / groups, *kernel), as ``quantize_weight`` returns it.
        bias: (O,), or None.
        mean: (1, C, 1, 1), or None.
        std: likewise.
        stride: per spatial dimension.
        padding: as ``F.pad`` takes it.
        dilation: per spatial dimension.
        groups: of channels.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        chosen: the formats.
        name: of the module, for messages.

    Returns:
        (N, O, *output) or (O, *output), in the dtype of ``x``, contiguous.
    """
    channels, dims = weight.values.shape[1] * groups, weight.values.dim()
    if x.dim() not in (dims - 1, dims) or x.shape[1 - dims] != channels:
        raise ValueError(
            f"{name!r} takes (batch, {channels} channels, {dims - 2} spatial dimensions), with or without the batch, "
            f"got shape {tuple(x.shape)}"
        )
    batched = x if x.dim() == dims else x.unsqueeze(0)
    if mean is not None and std is not None:
        batched = (batched - mean) / std
    _check_float(batched, name)
    padded, within = _pad(batched, padding, padding_mode)
    inside, outside = _biases(bias, chosen)
    y = torch.ops.cnmix.integer_convolution(
        padded.float(),
        weight.values,
        inside,
        stride,
        within,
        dilation,
        groups,
        False,
        [],
        chosen[:4],
        "nearest_even",
        False,
        name,
    )
    y = _finished(y, weight, chosen, outside, dims - 2).to(batched.dtype)
    return y if x.dim() == dims else y.squeeze(0)


def _biases(bias: Tensor | None, chosen: Formats) -> tuple[Tensor | None, Tensor | None]:
    """Returns the bias that the product adds, and the one that comes after the steps of channels."""
    bias = None if bias is None else bias.float()
    return (bias, None) if chosen.fine is None else (None, bias)


def _finished(y: Tensor, weight: FixedPoint, chosen: Formats, bias: Tensor | None, spatial: int) -> Tensor:
    if not weight.finite:
        return y * math.nan
    if chosen.fine is None:
        return y
    by_channel = (-1, *[1] * spatial)
    y = y * (1 / chosen.fine).view(by_channel)
    return y if bias is None else y + bias.view(by_channel)


def _pad(x: Tensor, padding: Sequence[int], mode: str) -> tuple[Tensor, list[int]]:
    """Returns what a convolution is to read, and the zeros that it pads itself with, per spatial dimension."""
    within = list(padding[::-2])
    if mode == "zeros" and within == list(padding[-2::-2]):
        return x, within
    return F.pad(x, list(padding), "constant" if mode == "zeros" else mode), [0] * len(within)


def _host_views(name: str, x: Tensor, *others: Tensor | None) -> list[Tensor]:
    for each in others:
        if each is None or each.device == x.device:
            continue
        raise RuntimeError(
            f"{name!r} is on {each.device} and got a tensor of {x.device}: bring both to one device with .to()"
        )
    return [each if each is None else torch.ops.cnmix_card.host(each) for each in (x, *others)]  # type: ignore[misc]


def _check_float(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"{name!r} takes float tensors, got {x.dtype}: a Conv2d with firstconv, mean and std takes images as bytes"
        )


def _position(scale: float, bits: int) -> int:
    return choose_position(limits(bits)[1] / scale, bits)


def _no_gradient(*_: object) -> None:
    raise RuntimeError(
        "a model quantized for inference has no gradients on the card: call it under torch.no_grad(), or train with "
        "mlu_quantize.adaptive_quantize"
    )


_OPERAND = "Tensor x, Tensor weight, Tensor? bias"
_SCALES = "float[] scale, int[] mode, str name"
_library = torch.library.Library("torch_mlu", "FRAGMENT")  # kept: with it the operators would go
_library.define(f"quantized_linear({_OPERAND}, {_SCALES}) -> Tensor")
_library.define(
    f"quantized_convolution({_OPERAND}, Tensor? mean, Tensor? std, int[] stride, int[] padding, int[] dilation, "
    f"int groups, str padding_mode, {_SCALES}) -> Tensor"
)
_library.impl("quantized_linear", _linear_on_host, "CPU")
_library.impl("quantized_linear", _linear_on_card, "PrivateUse1")
_library.impl("quantized_convolution", _convolution_on_host, "CPU")
_library.impl("quantized_convolution", _convolution_on_card, "PrivateUse1")
for _name in ("quantized_linear", "quantized_convolution"):
    torch.library.register_autograd(f"torch_mlu::{_name}", _no_gradient, lib=_library)

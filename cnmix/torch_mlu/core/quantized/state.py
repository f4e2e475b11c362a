"""What a file says of one quantized module, read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ....fixed_point import BITS, POSITION_MAX, POSITION_MIN
from .functional import PER_CHANNEL, PER_TENSOR

REQUIRED = ("use_symmetry", "scale", "quantized_mode")
"""The keys that every quantized module has in a file, besides those of its float module."""
GENERATED = ("scale_weight_per_channel", "quantized_by_channel")
"""The keys that go into ``scale`` and ``quantized_mode`` when a file is loaded."""


class Quantization(NamedTuple):
    """What a module's operands are quantized with; plain numbers, which ``half()`` and ``to()`` leave as they are.

    Attributes:
        scale: of input and weight; or of the input, 0, and of each channel of the weight; or both widths.
        mode: 1 int8, 2 int16, 3 and 4 the same with a scale per channel; or both positions, where ``scale`` has widths.
    """

    scale: tuple[float, ...]
    mode: tuple[int, ...]


def parse_quantization(values: Mapping[str, Tensor], prefix: str, channels: int, per_channel: bool) -> Quantization:
    """Reads ``scale`` and ``quantized_mode``, and brings a generated file's scales per channel into them.

    Args:
        values: tensors by the key without its prefix.
        prefix: of the keys, for messages.
        channels: outputs of the module.
        per_channel: whether it may have a scale per channel.

    Raises:
        ValueError: if a shape or value is wrong; the message names the key.
    """
    symmetric = _numbers(values, prefix, "use_symmetry") if "use_symmetry" in values else [1]
    if symmetric != [1]:
        raise ValueError(f"{prefix}use_symmetry must be 1, as quantization is symmetric, got {symmetric}")
    scale, modes = _numbers(values, prefix, "scale"), _numbers(values, prefix, "quantized_mode")
    if not all(float(each).is_integer() for each in modes):
        raise ValueError(f"{prefix}quantized_mode must have whole numbers, got {modes}")
    mode = [*map(int, modes)]
    if len(mode) == 2:
        return _widths_and_positions(scale, mode, prefix)
    if len(mode) != 1 or mode[0] not in (*PER_TENSOR, *PER_CHANNEL):
        raise ValueError(f"{prefix}quantized_mode must be one of 1, 2, 3, 4, or two positions, got {mode}")
    given = [name for name in GENERATED if name in values]
    if given:
        if len(given) == 1:
            absent = next(name for name in GENERATED if name not in given)
            raise ValueError(f"{prefix}{absent} is missing beside {prefix}{given[0]}")
        if _numbers(values, prefix, "quantized_by_channel") != [1]:
            raise ValueError(f"{prefix}quantized_by_channel must be 1, got {values['quantized_by_channel'].tolist()}")
        if mode[0] not in PER_TENSOR or len(scale) != 2:
            raise ValueError(
                f"{prefix}scale must have 2 values and {prefix}quantized_mode be 1 or 2 beside "
                f"{prefix}scale_weight_per_channel, got {len(scale)} values and mode {mode[0]}"
            )
        scale = [scale[0], 0.0, *_numbers(values, prefix, "scale_weight_per_channel")]
        mode = [mode[0] + 2]
    whole = mode[0] in PER_CHANNEL
    if whole and not per_channel:
        raise ValueError(f"{prefix}quantized_mode {mode[0]} has a scale per channel, which a Conv3d never has")
    wanted = 2 + channels if whole else 2
    if len(scale) != wanted:
        where = f"{prefix}scale_weight_per_channel" if given else f"{prefix}scale"
        less = 2 if given else 0
        raise ValueError(
            f"{where} must have {wanted - less} values for {channels} channels and quantized_mode {mode[0]}, "
            f"got {len(scale) - less}"
        )
    for index, value in enumerate(scale):
        if not (whole and index == 1) and not 0 < value < math.inf:
            raise ValueError(f"{prefix}scale must have positive numbers, got {value} at index {index}")
    return Quantization(tuple(scale), tuple(mode))


def _widths_and_positions(scale: list[float], mode: list[int], prefix: str) -> Quantization:
    if len(scale) != 2 or any(width not in BITS for width in scale):
        raise ValueError(f"{prefix}scale must have two widths of 8, 16 or 31 beside two positions, got {scale}")
    if not all(POSITION_MIN <= position <= POSITION_MAX for position in mode):
        raise ValueError(f"{prefix}quantized_mode must have positions in [{POSITION_MIN}, {POSITION_MAX}], got {mode}")
    return Quantization(tuple(scale), tuple(mode))


def _numbers(values: Mapping[str, Tensor], prefix: str, name: str) -> list[float]:
    value = values[name]
    if not isinstance(value, Tensor) or value.dim() > 1:
        shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{prefix}{name} must be a tensor of one dimension, got {shape}")
    # scales are float32 in a file: what was made half is what it is, but no wider number comes in
    number = torch.float32 if value.is_floating_point() else torch.int64
    return value.detach().cpu().to(number).reshape(-1).tolist()

"""Depthwise convolution, a channel to itself, directly on the pixels through the compiled part.

A matrix product per channel would be one row or column wide; here channels are the lanes of a vector. Sums of int8 and
int16 operands are exact.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ..fixed_point import FixedPoint
from . import native


def serve(a: FixedPoint, b: FixedPoint, groups: int, channels: int, out_channels: int) -> bool:
    """Whether this convolution is depthwise and the compiled part multiplies these operands."""
    return (
        native.library() is not None
        and groups == channels == out_channels > 1
        and max(a.bits, b.bits) <= 16
        and -126 <= a.position + b.position <= 127
    )


class Depthwise:
    """Describes to the compiled part the windows of contiguous (images, *size, channels).

    Args:
        pixels: int8 or int16.
        geometry: of the windows.
    """

    def __init__(self, pixels: Tensor, geometry: native.WindowGeometry) -> None:
        self.positions, self.taps = math.prod(geometry.size), math.prod(geometry.kernel)
        self._pixels = pixels
        self._windows = native.describe_windows(pixels, 1, geometry)

    def correlate(self, taps: Tensor, a: FixedPoint, b: FixedPoint, bias: Tensor | None, channels_last: bool) -> Tensor:
        """Multiplies each window by ``taps`` (taps, channels).

        Returns:
            float32 (images, positions, channels) where ``channels_last``, else (images, channels, positions).
        """
        images, channels = self._pixels.shape[0], self._pixels.shape[-1]
        out = native.empty((images, self.positions, channels), torch.float32)
        if bias is not None:
            bias = bias.detach().to(torch.float32).contiguous()
        self._call("cnmix_depthwise", taps.contiguous(), a, b, bias, out)
        library = native.library()
        if channels_last or library is None:
            return out
        return native.transpose(library, out)

    def correlate_all(self, gradients: Tensor, a: FixedPoint, b: FixedPoint) -> Tensor:
        """Multiplies contiguous (images, *size, channels) by the windows of its positions: float32 (taps, channels)."""
        out = torch.zeros((self.taps, self._pixels.shape[-1]), dtype=torch.float32)
        self._call("cnmix_depthwise_grad_weight", gradients, a, b, None, out)
        return out

    def _call(self, name: str, other: Tensor, a: FixedPoint, b: FixedPoint, bias: Tensor | None, out: Tensor) -> None:
        library = native.library()
        if library is None or out.numel() == 0:
            return
        job = native.structures.Depthwise(
            self._pixels.data_ptr(),
            other.data_ptr(),
            ctypes.pointer(self._windows),
            self._pixels.shape[-1],
            self._pixels.itemsize,
            other.itemsize,
            2.0 ** (a.position + b.position),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        getattr(library, name)(ctypes.byref(job))

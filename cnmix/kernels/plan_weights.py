"""The weights of a plan's products, arranged as the compiled part meets the rows that they multiply."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .native.structures import Windows

# Of plan.h: how a product meets its rows.
LYING_ROWS, IMAGE_LINES, GATHERED_WINDOWS, LINE_WINDOWS = range(4)
_QUICK_START = 32  # bytes, of plan.h: rows that begin elsewhere are copied
_DEPTH = 64  # of K in a tile
_ROWS = 16  # of a tile
_LANES = 64  # channels that a depthwise convolution multiplies at once
_LINE_BYTES = 512 << 10  # of fused_product.cpp: what a thread prepares at once
_FEW_LINES = 4
# Lines of an image are copied once, windows once for each tap: worth it even where K becomes longer by this factor.
_LONGER = 2.5


class Weights:
    """Weights to be packed.

    Args:
        tiles: of K; quads of taps where depthwise.
        corrections: int32, -128 times the sum of each column, for rows that hold 128 more.
        matrices: int8 (O / groups, K) per group, to be packed; or packed bytes already.
    """

    def __init__(self, tiles: int, corrections: Tensor, matrices: Sequence[Tensor], packed: bool) -> None:
        self.tiles, self.corrections = tiles, corrections
        self._matrices, self._packed = matrices, packed

    @property
    def bytes(self) -> int:
        """Bytes of memory that ``pack`` fills."""
        if self._packed:
            return self._matrices[0].numel()
        return sum(_up(len(matrix), _ROWS) for matrix in self._matrices) * self.tiles * _DEPTH

    def pack(self, library: ctypes.CDLL, address: int) -> None:
        """Writes the weights as the products read them."""
        for matrix in self._matrices:
            if self._packed:
                ctypes.memmove(address, matrix.data_ptr(), matrix.numel())
                continue
            rows, depth = matrix.shape
            library.cnmix_pack_columns(matrix.data_ptr(), rows, depth, address)
            address += _up(rows, _ROWS) * self.tiles * _DEPTH


def arrange(windows: Windows, groups: int) -> int:
    """Chooses how a product meets its rows: as they lie, from lines of the image, or gathered window by window."""
    kernel, stride, before = list(windows.kernel), list(windows.stride), list(windows.before)
    if math.prod(kernel) == math.prod(stride) == 1 and not any(before):
        return LYING_ROWS
    flat = windows.size[0] == kernel[0] == 1 and before[0] == 0
    if not flat or windows.images * windows.output[1] < _FEW_LINES:
        return GATHERED_WINDOWS
    line = (windows.output[2] * stride[2] + kernel[2] * windows.dilation[2]) * windows.pixel
    if line * kernel[1] > _LINE_BYTES:
        return GATHERED_WINDOWS
    runs = _runs(windows, groups)
    if windows.pixel % _QUICK_START and len(runs) == 1:
        return LINE_WINDOWS
    depth = kernel[1] * sum(_up(run, _DEPTH) for run in runs)
    return GATHERED_WINDOWS if depth > _LONGER * _up(math.prod(kernel) * windows.run, _DEPTH) else IMAGE_LINES


def gather_columns(weight: Tensor, arrangement: int, windows: Windows, groups: int) -> Weights:
    """Arranges int8 (O, C / groups, *kernel) as the columns of products.

    Args:
        weight: integers.
        arrangement: of the rows.
        windows: of the convolution.
        groups: groups of channels.
    """
    outputs, run = weight.shape[:2]
    taps = weight.detach().reshape(outputs, run, -1).movedim(1, -1)  # (O, taps, C / groups)
    if arrangement == IMAGE_LINES:
        runs = _runs(windows, groups)
        lines = taps.reshape(outputs, windows.kernel[1] * len(runs), runs[0])
        matrix = F.pad(lines, (0, _up(runs[0], _DEPTH) - runs[0])).flatten(1)
    else:
        matrix = taps.flatten(1)
    matrix = matrix.contiguous()
    matrices = matrix.chunk(groups) if groups > 1 else (matrix,)
    sums = matrix.sum(1, dtype=torch.int32).reshape(groups, -1) * -128
    corrections = F.pad(sums, (0, _up(sums.shape[1], _ROWS) - sums.shape[1])).contiguous()
    return Weights(max(1, _up(matrix.shape[1], _DEPTH) // _DEPTH), corrections, matrices, packed=False)


def pack_depthwise(weight: Tensor) -> Weights:
    """Arranges int8 (C, 1, *kernel) for sums of four taps at once, as unpacking leaves the lanes."""
    channels = weight.shape[0]
    taps = weight.detach().flatten(1)
    quads = -(-taps.shape[1] // 4)
    padded = F.pad(taps, (0, 4 * quads - taps.shape[1], 0, _up(channels, _LANES) - channels))
    # Channel 16 a + 4 b + c of a block is in register b, lane 4 a + c.
    packed = padded.view(-1, 4, 4, 4, quads, 4).permute(0, 4, 2, 1, 3, 5).contiguous()
    sums = padded.sum(1, dtype=torch.int32).view(-1, 4, 4, 4).transpose(1, 2).contiguous() * -128
    return Weights(quads, sums, (packed,), packed=True)


def _runs(windows: Windows, groups: int) -> list[int]:
    """Returns the lengths of K that the taps of one line make: one where they lie side by side, else one for each."""
    if groups == 1 and windows.dilation[2] == 1:
        return [windows.kernel[2] * windows.run]
    return [windows.run] * windows.kernel[2]


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit

"""The emulated core on the CPU, bit-equal to ``reference``.

The compiled part multiplies where it serves (``depthwise``, ``tiles``): exact for every width. Elsewhere int8 products
run on torch's integer kernel. An int16 operand is two int8 digits where that gains; else products with it run in
float64 on integer values, exact since every sum stays below 2**53, or is cut along K where it might not. int31 by
default rounds its sums to float64 (normwise error below 1e-14); its exact mode multiplies 16-bit halves. A convolution
is its windows gathered into a matrix, then a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..fixed_point import FixedPoint, scale_by_power_of_two
from . import depthwise, native, tiles
from .products import Sums, add_product, multiply_into, product_sums, round_into, rounded
from .profiling import count_convolution, count_grad_input, count_grad_weight, count_matmul, profiled
from .reference import output_size

# Elements gathered at a time, so that temporaries stay in the cache whatever the batch.
_MATRIX_BLOCK = 1 << 22


@profiled(count_matmul)
def matmul(
    a: FixedPoint,
    b: FixedPoint,
    *,
    bias: Tensor | None = None,
    exact_int31: bool = False,
    dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Tensor:
    """Multiplies matrices: (M, K) by (K, N) gives (M, N), plus ``bias`` (N,) in float32 where given.

    The result is float32; another ``dtype`` is rounded from that. ``name`` is what a profile calls the product, here
    and in the convolutions.
    """
    if not (a.finite and b.finite):
        return torch.full((a.values.shape[0], b.values.shape[1]), math.nan, dtype=dtype)
    if tiles.serve(a, b):
        return tiles.matmul(a, b, bias, dtype)
    return multiply_into(None, a.values, b.values, a, b, bias, exact_int31).to(dtype)


def to_channels_last(x: FixedPoint) -> FixedPoint:
    """Returns an operand (N, C, *spatial) with its channels side by side in memory, copied only where they are not."""
    return x._replace(values=_channels_last(x.values).movedim(-1, 1))


@profiled(count_convolution)
def convolution(
    x: FixedPoint,
    weight: FixedPoint,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    bias: Tensor | None = None,
    channels_last: bool | None = None,
    exact_int31: bool = False,
    dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Tensor:
    """Convolves (N, C, *spatial) with (O, C / groups, *kernel) and adds ``bias`` (O,): (N, O, *output).

    The result is float32; another ``dtype`` is rounded from that. Its memory has channels last where ``channels_last``
    says so; by default where that of ``x`` has.
    """
    kernel = weight.values.shape[2:]
    size = output_size(x.values.shape[2:], kernel, stride, padding, dilation)
    layout = has_channels_last(x.values) if channels_last is None else channels_last
    windows = native.WindowGeometry(size, kernel, stride, dilation, padding, [1] * len(size))
    finite = x.finite and weight.finite
    if finite and depthwise.serve(x, weight, groups, x.values.shape[1], weight.values.shape[0]):
        each = depthwise.Depthwise(_channels_last(x.values), windows)
        return _as_image(each.correlate(weight.values.flatten(1).t(), x, weight, bias, layout), size, layout).to(dtype)
    if finite and tiles.serve(x, weight):
        whole = tiles.Convolution(_channels_last(x.values), windows, groups)
        taps = _channels_last(weight.values)
        matrices = tiles.kernel_matrices(taps, groups)
        out = whole.correlate(matrices, taps.shape[0], x, weight, bias, layout, dtype)
        return _as_image(out, size, layout)
    gathered = _Windows(x.values, windows, padding, groups)
    # (O, C / groups, *kernel) -> (groups, kernel taps * C / groups, O / groups)
    matrix = _channels_last(weight.values).flatten(1).unflatten(0, (groups, -1)).transpose(1, 2)
    return _correlate(gathered, matrix, x, weight, bias, layout, exact_int31).to(dtype)


@profiled(count_grad_input)
def convolution_grad_input(
    grad_output: FixedPoint,
    weight: FixedPoint,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    bias: Tensor | None = None,
    channels_last: bool | None = None,
    exact_int31: bool = False,
    dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Tensor:
    """Returns the gradient of a convolution's input, of shape ``input_size``; float32, or ``dtype`` rounded from that.

    The transposed convolution as a plain one: grad_output spread out by the stride, kernel taps in reverse order. As a
    layer of its own it has ``bias`` (C,) added. The memory has channels last where ``channels_last`` says so; by
    default where that of ``grad_output`` has.
    """
    kernel = weight.values.shape[2:]
    spatial = tuple(input_size)[2:]
    before = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    after = [
        n - 1 - (g - 1) * s + p
        for n, g, s, p in zip(spatial, grad_output.values.shape[2:], stride, padding, strict=True)
    ]
    windows = native.WindowGeometry(spatial, kernel, [1] * len(kernel), dilation, before, stride)
    layout = has_channels_last(grad_output.values) if channels_last is None else channels_last
    finite = grad_output.finite and weight.finite
    if finite and depthwise.serve(grad_output, weight, groups, input_size[1], weight.values.shape[0]):
        each = depthwise.Depthwise(_channels_last(grad_output.values), windows)
        reverse = weight.values.flatten(1).flip(1).t()
        return _as_image(each.correlate(reverse, grad_output, weight, bias, layout), spatial, layout).to(dtype)
    by_tap = _channels_last(weight.values)
    if finite and tiles.serve(grad_output, weight):
        whole = tiles.Convolution(_channels_last(grad_output.values), windows, groups)
        matrices = tiles.transposed_kernel_matrices(by_tap, groups)
        out = whole.correlate(matrices, input_size[1], grad_output, weight, bias, layout, dtype)
        return _as_image(out, spatial, layout)
    gathered = _Windows(grad_output.values, windows, after, groups)
    # (O, C / groups, *kernel) -> (groups, kernel taps in reverse * O / groups, C / groups)
    by_tap = by_tap.flatten(1, -2).unflatten(0, (groups, -1))
    taps = [by_tap[:, :, tap] for tap in reversed(range(by_tap.shape[2]))]
    matrix = torch.stack(taps, dim=1).flatten(1, 2)
    return _correlate(gathered, matrix, grad_output, weight, bias, layout, exact_int31).to(dtype)


@profiled(count_grad_weight)
def convolution_grad_weight(
    grad_output: FixedPoint,
    x: FixedPoint,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    exact_int31: bool = False,
    name: str = "",
) -> Tensor:
    """Returns the gradient of a convolution's weight, float32 of shape ``weight_size`` = (O, C / groups, *kernel)."""
    out_channels, in_channels, *kernel = weight_size
    if not (grad_output.finite and x.finite):
        return torch.full(tuple(weight_size), math.nan, dtype=torch.float32)
    size = grad_output.values.shape[2:]
    windows = native.WindowGeometry(size, kernel, stride, dilation, padding, [1] * len(kernel))
    if depthwise.serve(grad_output, x, groups, x.values.shape[1], out_channels):
        each = depthwise.Depthwise(_channels_last(x.values), windows)
        sums = each.correlate_all(_channels_last(grad_output.values), grad_output, x)
        return sums.t().contiguous().view(tuple(weight_size))
    if tiles.serve(grad_output, x):
        whole = tiles.Convolution(_channels_last(x.values), windows, groups)
        sums = whole.correlate_all(_channels_last(grad_output.values).flatten(0, -2), grad_output, x)
    else:
        gathered = _Windows(x.values, windows, padding, groups)
        left = _channels_last(grad_output.values).flatten(1, -2).unflatten(-1, (groups, out_channels // groups))
        total: Sums = {}
        for batch in gathered.batches():
            rows = left[batch].flatten(0, 1).permute(1, 2, 0)
            columns = gathered.gather(batch)
            length = left.shape[0] * left.shape[1]
            add_product(total, rows, columns, grad_output.bits, x.bits, exact_int31, length)
        if not total:
            return torch.zeros(tuple(weight_size), dtype=torch.float32)
        sums = rounded(total, grad_output.position + x.position)
    # (groups, O / groups, kernel taps * C / groups) -> (O, C / groups, *kernel)
    by_tap = sums.view(out_channels, math.prod(kernel), in_channels)
    library = native.library()
    if library is not None and by_tap.numel() > 0:
        return native.transpose(library, by_tap).view(tuple(weight_size))
    return (
        torch.empty((out_channels, in_channels, math.prod(kernel)), dtype=torch.float32)
        .copy_(by_tap.transpose(1, 2))
        .view(tuple(weight_size))
    )


def _correlate(
    windows: _Windows,
    matrix: Tensor,
    a: FixedPoint,
    b: FixedPoint,
    bias: Tensor | None,
    channels_last: bool,
    exact_int31: bool,
) -> Tensor:
    """Multiplies the windows by ``matrix`` (groups, K, O / groups); float32 (N, O, *output)."""
    groups, _, out_channels = matrix.shape
    images, positions, channels = windows.images, math.prod(windows.size), groups * out_channels
    shape = (images, positions, channels) if channels_last else (images, channels, positions)
    out = native.empty(shape, torch.float32)
    if not (a.finite and b.finite):
        out.fill_(math.nan)
    elif groups == 1:
        right, scratch = matrix[0], None
        for batch in windows.batches():
            columns, target = windows.gather(batch)[0], out[batch]
            if channels_last:
                target = target.flatten(0, 1)
            elif scratch is None:  # the first piece is the largest
                scratch = native.empty((target.numel(),), torch.int32)
            multiply_into(target, columns, right, a, b, bias, exact_int31, scratch)
    else:
        for batch in windows.batches():
            target = out[batch] if channels_last else out[batch].transpose(1, 2)
            part = product_sums(windows.gather(batch), matrix, a.bits, b.bits, exact_int31)
            part = {shift: sums.unflatten(1, (-1, positions)) for shift, sums in part.items()}
            round_into(target.unflatten(-1, (groups, out_channels)).movedim(-2, 0), part)
        scale_by_power_of_two(out, a.position + b.position)
        if bias is not None:
            out += bias if channels_last else bias.view(-1, 1)
    return _as_image(out, windows.size, channels_last)


def _as_image(out: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    """Returns (N, positions, C) where ``channels_last``, else (N, C, positions), as (N, C, *size)."""
    return out.unflatten(1, tuple(size)).movedim(-1, 1) if channels_last else out.unflatten(2, tuple(size))


class _Windows:
    """The windows of a tensor (N, C, *spatial) that a convolution multiplies, gathered into matrices.

    Args:
        x: integers.
        geometry: of the windows.
        after: zeros behind the tensor; negative cuts off.
        groups: groups of channels.
    """

    def __init__(self, x: Tensor, geometry: native.WindowGeometry, after: Sequence[int], groups: int) -> None:
        size, kernel, stride, dilation, before, step = geometry
        self.images, channels = x.shape[:2]
        self.size = tuple(size)
        self._elements = math.prod(size) * math.prod(kernel) * channels
        library = native.library()
        self.gather: Callable[[slice], Tensor]
        """Returns the windows of some images: (groups, images * positions, taps * C / groups)."""
        if groups == 1 and geometry.points and self.size == tuple(x.shape[2:]):
            pixels = _channels_last(x)
            self.gather = lambda batch: pixels[batch].reshape(1, -1, channels)
        elif groups == 1 and library is not None:
            pixels = _channels_last(x)
            # Every piece is gathered into the same memory: a matrix is used up before the next is made.
            largest = min(self._images_at_once(), self.images) * self._elements
            buffer = native.empty((largest,), x.dtype)
            self.gather = lambda batch: native.gather(library, pixels[batch], geometry, buffer).unsqueeze(0)
        else:
            placed = _place(x, before, after, step)
            self.gather = lambda batch: _gather(placed[batch], size, kernel, stride, dilation, groups)

    def batches(self) -> list[slice]:
        """Cuts the batch so that one piece's windows hold about ``_MATRIX_BLOCK`` elements."""
        images = self._images_at_once()
        return [slice(start, start + images) for start in range(0, self.images, images)]

    def _images_at_once(self) -> int:
        return max(1, _MATRIX_BLOCK // max(1, self._elements))


def _channels_last(x: Tensor) -> Tensor:
    """Returns (N, C, *spatial) as contiguous (N, *spatial, C), copied only where it must be."""
    moved = x.movedim(1, -1)
    library = native.library()
    if moved.is_contiguous() or library is None or not x.is_contiguous():
        return moved.contiguous()
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return native.transpose(library, flat).view(moved.shape)


def has_channels_last(x: Tensor) -> bool:
    """Whether (N, C, *spatial) has its channels, and they alone, side by side in memory."""
    return x.dim() > 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _place(x: Tensor, before: Sequence[int], after: Sequence[int], step: Sequence[int]) -> Tensor:
    """Copies (N, C, *spatial) into zeros, channels last, ``step`` apart; negative padding cuts off.

    Returns:
        (N, *padded, C), where ``padded = before + (spatial - 1) * step + 1 + after``.
    """
    channels_last = x.movedim(1, -1)
    if not any(before) and not any(after) and all(s == 1 for s in step):
        return channels_last.contiguous()
    spread = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], step, strict=True)]
    size = [max(b, 0) + n + max(a, 0) for b, n, a in zip(before, spread, after, strict=True)]
    out = x.new_zeros((x.shape[0], *size, x.shape[1]))
    inside = out
    for dim, (b, n, s) in enumerate(zip(before, spread, step, strict=True), start=1):
        inside = inside.narrow(dim, max(b, 0), n)[(slice(None),) * dim + (slice(None, None, s),)]
    inside.copy_(channels_last)
    for dim, (b, a) in enumerate(zip(before, after, strict=True), start=1):
        out = out.narrow(dim, max(-b, 0), out.shape[dim] - max(-b, 0) - max(-a, 0))
    return out


def _gather(
    placed: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gathers the windows of (N, *padded, C) into a matrix per group: (groups, N * positions, taps * C / groups)."""
    dtype, run = placed.dtype, placed.shape[-1] // groups
    for wide in (torch.int64, torch.int32, torch.int16):
        # The channels of a tap lie side by side: copy as many of them as one word takes.
        ratio = wide.itemsize // dtype.itemsize
        if ratio > 1 and run % ratio == 0 and placed.storage_offset() % ratio == 0 and placed.is_contiguous():
            # view(dtype) also checks the strides of dimensions of size 1, which is_contiguous() passes over.
            fresh = placed.as_strided(placed.shape, _row_major(placed.shape)).view(wide)
            columns = _gather(fresh, size, kernel, stride, dilation, groups)
            if columns.stride() != _row_major(columns.shape):
                columns = torch.empty(columns.shape, dtype=wide).copy_(columns)
            return columns.view(dtype)
    images, channels = placed.shape[0], placed.shape[-1]
    steps = placed.stride()[1:-1]
    windows = placed.as_strided(
        (images, *size, *kernel, groups, channels // groups),
        (
            placed.stride(0),
            *(step * s for step, s in zip(steps, stride, strict=True)),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
            placed.stride(-1) * (channels // groups),
            placed.stride(-1),
        ),
    )
    spatial = len(kernel)
    by_group = windows.movedim(1 + 2 * spatial, 0)
    return by_group.reshape(groups, images * math.prod(size), math.prod(kernel) * (channels // groups))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))

"""The compiled part of the core: a plain C library, loaded with ctypes where it was built.

It needs no torch to build. Loaded after torch it shares torch's OpenMP, so that it follows ``torch.set_num_threads``
and both use one set of threads. ctypes releases the interpreter lock for the time of a call. ``CNMIX_NATIVE=0`` in the
environment leaves it out.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.utils.dlpack
from torch import Tensor

from .structures import Combine, FloatBatch, FoundLosses, FoundStatistics, Windows

# Bytes from which a tensor's memory is kept for the next one: glibc gives such memory back to the system.
_POOLED = 1 << 20
_MOST_DIMENSIONS = 8  # of memory.cpp

_ISA = ("portable", "AVX2", "AVX-512", "AVX-512 VNNI", "AMX")
_ABI = 13
_ROUNDING = {"nearest_even": 0, "half_up": 1, "half_away": 2, "stochastic": 3}


_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class Statistics(NamedTuple):
    """What one pass over a tensor finds.

    Attributes:
        absmax: largest magnitude; NaN or infinity where the tensor holds one.
        position: the position used.
        sum_x: sum of |x|, where measured.
        sum_q: sum of |q|, where measured.
        channel_sums: float sums of the channels, where asked for.
        checksum: as ``quantization.checksum`` returns it, where asked for.
    """

    absmax: float
    position: int
    sum_x: float = 0.0
    sum_q: float = 0.0
    channel_sums: Tensor | None = None
    checksum: int | None = None


class WindowGeometry(NamedTuple):
    """How the windows lie that a convolution multiplies; one number per spatial dimension each.

    Attributes:
        size: positions of the window.
        kernel: taps.
        stride: distance between positions.
        dilation: distance between taps.
        before: zeros in front of the tensor; negative cuts off.
        step: distance of the tensor's elements from each other, with zeros between.
    """

    size: Sequence[int]
    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    before: Sequence[int]
    step: Sequence[int]

    @property
    def points(self) -> bool:
        """Whether each window is one element, and the next one its neighbour."""
        return not any(self.before) and all(n == 1 for n in (*self.kernel, *self.stride, *self.step))


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled library, or None where it was not built or is switched off."""
    if _switched_off():
        return None
    path = _built()
    if path is None:
        return None
    try:
        native = ctypes.CDLL(str(path))
        return _declare(native) if native.cnmix_abi() == _ABI else None
    except (OSError, AttributeError):  # built for another system, or by an older version
        return None


def _switched_off() -> bool:
    return os.environ.get("CNMIX_NATIVE", "1").lower() in ("0", "no", "off", "false")


def _built() -> Path | None:
    candidates = (Path(__file__).with_name(f"_native{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def describe() -> str:
    """Says whether the compiled part serves, and with which instructions."""
    native = library()
    if native is not None:
        return f"compiled, {instructions(native)}, {native.cnmix_threads()} threads"
    if _switched_off():
        return "torch alone: CNMIX_NATIVE=0 switches the compiled part off"
    if _built() is not None:
        return f"torch alone: {_built()} is of another version or system; install cnmix again to build it"
    return "torch alone: the compiled part was not built (it needs a C++ compiler when cnmix is installed)"


def instructions(native: ctypes.CDLL) -> str:
    """Names the widest instructions in use."""
    return _ISA[native.cnmix_isa(-1)]


def empty(shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Tensor:
    """Returns an uninitialized tensor; the memory of large ones is kept and reused when they are gone.

    Args:
        shape: of the tensor.
        dtype: a floating or signed integer type.
        strides: of dense memory, in elements; row-major by default.
    """
    native = library()
    size = math.prod(shape) * dtype.itemsize
    if native is None or size < _POOLED or len(shape) > _MOST_DIMENSIONS:
        return torch.empty(shape, dtype=dtype) if strides is None else torch.empty_strided(shape, strides, dtype=dtype)
    if size > sys.maxsize // 2:  # ctypes would pass on the low bits alone
        raise MemoryError(f"no memory for {size} bytes")
    if strides is None:
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    dimensions = ctypes.c_int64 * len(shape)
    code = 4 if dtype == torch.bfloat16 else 2 if dtype.is_floating_point else 0  # of DLPack
    borrowed = native.cnmix_borrow(size, len(shape), dimensions(*shape), dimensions(*strides), code, 8 * dtype.itemsize)
    if not borrowed:
        raise MemoryError(f"no memory for {size} bytes")
    return torch.utils.dlpack.from_dlpack(_new_capsule(borrowed, b"dltensor", None))


def quantize(
    native: ctypes.CDLL,
    x: Tensor,
    out: Tensor,
    bits: int,
    position: int | None,
    rounding: str,
    seed: int,
    stream: int,
    measure: bool,
    channel_dim: int | None = None,
    checksum: bool = False,
    start: int = 0,
) -> Statistics:
    """Quantizes dense float32 or bfloat16 memory into ``out`` of the same layout.

    A position of None chooses the one that fits. ``channel_dim`` asks for the sums over all other dimensions,
    ``checksum`` for that of the memory; ``start`` is the index of the first element in the stream.
    """
    found = FoundStatistics()
    sums = None if channel_dim is None else torch.empty(x.shape[channel_dim], dtype=torch.float32)
    # The stride of a single channel may be anything.
    inner = 1 if channel_dim is None or x.shape[channel_dim] == 1 else x.stride(channel_dim)
    native.cnmix_quantize(
        x.data_ptr(),
        x.itemsize,
        out.data_ptr(),
        x.numel(),
        bits,
        position is None,
        position or 0,
        _ROUNDING[rounding],
        seed & 0xFFFFFFFFFFFFFFFF,
        stream,
        start,
        measure,
        checksum,
        0 if sums is None else sums.numel(),
        inner,
        None if sums is None else sums.data_ptr(),
        ctypes.byref(found),
    )
    return Statistics(
        found.absmax, found.position, found.sum_x, found.sum_q, sums, found.checksum if checksum else None
    )


def quantize_batch(
    native: ctypes.CDLL,
    batch: FloatBatch,
    out: Tensor,
    bits: int,
    positions: Tensor | None,
    rounding: str,
    seed: int,
    stream: int,
    measure: bool,
) -> dict[str, Tensor]:
    """Quantizes each entry of a batch into contiguous ``out``, at the positions given or those that fit.

    Returns:
        The fields of ``FoundStatistics``, each of shape (entries,).
    """
    names = [field[0] for field in FoundStatistics._fields_]
    found = torch.empty((batch.entries, len(names)), dtype=torch.int64)
    native.cnmix_quantize_batch(
        ctypes.byref(batch),
        out.data_ptr(),
        bits,
        None if positions is None else positions.data_ptr(),
        _ROUNDING[rounding],
        seed & 0xFFFFFFFFFFFFFFFF,
        stream,
        measure,
        found.data_ptr(),
    )
    columns = dict(zip(names, found.t().contiguous(), strict=True))
    return {name: c.view(torch.float64) if name in ("absmax", "sum_x") else c for name, c in columns.items()}


def losses(
    native: ctypes.CDLL, x: Tensor, integers: Tensor, distance: int, inverse: float
) -> tuple[float, int, list[int]]:
    """Returns what ``quantization.losses`` does, of contiguous float32 and integers."""
    found = FoundLosses()
    native.cnmix_losses(
        x.data_ptr(), integers.data_ptr(), integers.itemsize, x.numel(), distance, inverse, ctypes.byref(found)
    )
    return found.noise, found.underflown, list(found.exponents)


def places(x: Tensor, batch_dims: int) -> Tensor:
    """Returns where each entry of (*batch, ...) begins, in elements from the first: int64, flat."""
    total = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(x.shape[:batch_dims], x.stride(), strict=False):
        total = total.unsqueeze(-1) + torch.arange(size) * stride
    return total.reshape(-1)


def transpose(native: ctypes.CDLL, x: Tensor) -> Tensor:
    """Returns contiguous (images, rows, columns) as contiguous (images, columns, rows)."""
    images, rows, columns = x.shape
    out = empty((images, columns, rows), x.dtype)
    native.cnmix_transpose(x.data_ptr(), out.data_ptr(), images, rows, columns, x.itemsize)
    return out


def describe_windows(x: Tensor, groups: int, geometry: WindowGeometry) -> Windows:
    """Describes the windows of one group of channels of contiguous (images, *size, channels)."""
    images, *size, channels = x.shape
    missing = 3 - len(size)
    windows = Windows(images, channels // groups * x.itemsize, channels * x.itemsize)
    for name, values, neutral in (
        ("size", size, 1),
        ("output", geometry.size, 1),
        ("kernel", geometry.kernel, 1),
        ("stride", geometry.stride, 1),
        ("dilation", geometry.dilation, 1),
        ("before", geometry.before, 0),
        ("step", geometry.step, 1),
    ):
        getattr(windows, name)[:] = [neutral] * missing + list(values)
    return windows


def gather(native: ctypes.CDLL, x: Tensor, geometry: WindowGeometry, buffer: Tensor) -> Tensor:
    """Gathers the windows of contiguous (images, *size, channels) into (images * positions, taps * channels).

    The matrix lies at the beginning of ``buffer``, flat and of the same dtype.
    """
    windows = describe_windows(x, 1, geometry)
    rows, columns = x.shape[0] * math.prod(geometry.size), math.prod(geometry.kernel) * x.shape[-1]
    out = buffer[: rows * columns].view(rows, columns)
    native.cnmix_gather(x.data_ptr(), out.data_ptr(), ctypes.byref(windows))
    return out


def dequantize_(native: ctypes.CDLL, sums: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Turns contiguous int32 sums (rows, columns) into float32 in the same memory: ``sum * scale (+ bias)``."""
    native.cnmix_dequantize(sums.data_ptr(), *sums.shape, scale, None if bias is None else bias.data_ptr())
    return sums.view(torch.float32)


def dequantize_channels_first(
    native: ctypes.CDLL, sums: Tensor, out: Tensor, scale: float, bias: Tensor | None
) -> None:
    """Turns contiguous int32 sums (images, positions, channels) into float32 (images, channels, positions)."""
    bias_pointer = None if bias is None else bias.data_ptr()
    native.cnmix_dequantize_channels_first(sums.data_ptr(), out.data_ptr(), *sums.shape, scale, bias_pointer)


def split(native: ctypes.CDLL, x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a dense int16 tensor into int8 digits of the same layout: ``x = 256 * high + low + 128``."""
    high, low = torch.empty_like(x, dtype=torch.int8), torch.empty_like(x, dtype=torch.int8)
    native.cnmix_split(x.data_ptr(), high.data_ptr(), low.data_ptr(), x.numel())
    return high, low


def matrix_sums(native: ctypes.CDLL, x: Tensor, by_row: bool) -> Tensor:
    """Returns int64 row or column sums of an int8 or int16 matrix, contiguous or transposed contiguous."""
    if not x.is_contiguous():
        x, by_row = x.t(), not by_row
    rows, columns = x.shape
    out = torch.empty(rows if by_row else columns, dtype=torch.int64)
    native.cnmix_sums(x.data_ptr(), rows, columns, x.itemsize, by_row, out.data_ptr())
    return out


def combine(
    native: ctypes.CDLL,
    parts: dict[str, Tensor | None],
    constant: int,
    *,
    out: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Puts the digits' products together: rounded once into float32 ``out``, or added to int64 ``total``.

    ``parts`` has int32 products p16, p8a, p8b, p0 and int64 sums row and column; see digits.cpp.
    """
    target = out if out is not None else total
    if target is None:
        raise ValueError("combine needs out or total")
    pointers = {name: None if part is None else part.data_ptr() for name, part in parts.items()}
    job = Combine(*target.shape, constant=constant, scale=scale, **pointers)
    job.bias = None if bias is None else bias.data_ptr()
    job.out = None if out is None else out.data_ptr()
    job.total = None if total is None else total.data_ptr()
    native.cnmix_combine(ctypes.byref(job))


def _declare(native: ctypes.CDLL) -> ctypes.CDLL:
    pointer, long, whole, single = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    for name, arguments in {
        "cnmix_quantize": [
            *(pointer, whole, pointer, long, whole, whole, whole, whole),
            *(ctypes.c_uint64, ctypes.c_uint64, long, whole, whole, long, long, pointer, pointer),
        ],
        "cnmix_quantize_batch": [
            *(pointer, pointer, whole, pointer, whole, ctypes.c_uint64, ctypes.c_uint64, whole, pointer),
        ],
        "cnmix_losses": [pointer, pointer, whole, long, long, ctypes.c_double, pointer],
        "cnmix_transpose": [pointer, pointer, long, long, long, whole],
        "cnmix_gather": [pointer, pointer, pointer],
        "cnmix_dequantize": [pointer, long, long, single, pointer],
        "cnmix_dequantize_channels_first": [pointer, pointer, long, long, long, single, pointer],
        "cnmix_split": [pointer, pointer, pointer, long],
        "cnmix_sums": [pointer, long, long, whole, whole, pointer],
        "cnmix_combine": [pointer],
        "cnmix_depthwise": [pointer],
        "cnmix_depthwise_grad_weight": [pointer],
        "cnmix_pack_columns": [pointer, long, long, pointer],
    }.items():
        function = getattr(native, name)
        function.argtypes, function.restype = arguments, None
    native.cnmix_checksum.argtypes, native.cnmix_checksum.restype = [pointer, long], ctypes.c_uint64
    native.cnmix_isa.argtypes, native.cnmix_isa.restype = [whole], whole
    native.cnmix_borrow.argtypes = [long, whole, pointer, pointer, whole, whole]
    native.cnmix_borrow.restype = pointer
    native.cnmix_multiply.argtypes, native.cnmix_multiply.restype = [pointer], whole
    native.cnmix_multiply_batch.argtypes, native.cnmix_multiply_batch.restype = [pointer], whole
    native.cnmix_multiplies.argtypes, native.cnmix_multiplies.restype = [whole, whole], whole
    native.cnmix_run_plan.argtypes, native.cnmix_run_plan.restype = [pointer] * 2, whole
    native.cnmix_threads.argtypes, native.cnmix_threads.restype = [], whole
    return native

"""The structures that the compiled part takes, as it declares them."""

from __future__ import annotations

import ctypes


class FoundStatistics(ctypes.Structure):
    """What quantization found; see quantize.cpp. Every field has eight bytes."""

    _fields_ = [
        ("absmax", ctypes.c_double),
        ("checksum", ctypes.c_uint64),
        ("sum_x", ctypes.c_double),
        ("sum_q", ctypes.c_int64),
        ("position", ctypes.c_int64),
    ]


class FoundLosses(ctypes.Structure):
    """What is lost of some values; see quantize.cpp."""

    _fields_ = [("noise", ctypes.c_double), ("underflown", ctypes.c_int64), ("exponents", ctypes.c_int64 * 256)]


class FloatBatch(ctypes.Structure):
    """A batch of float tensors as they lie in memory; see quantize.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bytes", "entries")),
        ("places", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride")),
    ]


class Windows(ctypes.Structure):
    """The windows that a convolution multiplies; see windows.h."""

    _fields_ = [
        ("images", ctypes.c_int64),
        ("run", ctypes.c_int64),
        ("pixel", ctypes.c_int64),
        *((name, ctypes.c_int64 * 3) for name in ("size", "output", "kernel", "stride", "dilation", "before", "step")),
    ]


class Operand(ctypes.Structure):
    """An integer matrix (rows, K) as it lies in memory; see panels.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("by_k", "digits", "inner", "stride", "outer")),
        ("windows", ctypes.POINTER(Windows)),
    ]


class Product(ctypes.Structure):
    """A matrix product with its rounding; see product.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        ("a", Operand),
        ("b", Operand),
        ("scale", ctypes.c_float),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_bytes", "row_stride", "positions", "image_stride")),
    ]


class ProductBatch(ctypes.Structure):
    """Matrix products of a batch; see batch.cpp."""

    _fields_ = [
        ("first", Product),
        ("entries", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("a_places", "b_places", "scales")),
    ]


class Depthwise(ctypes.Structure):
    """A depthwise convolution; see depthwise.cpp."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("windows", ctypes.POINTER(Windows)),
        *((name, ctypes.c_int64) for name in ("channels", "x_bytes", "other_bytes")),
        ("scale", ctypes.c_float),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


class Combine(ctypes.Structure):
    """Products of digits to put together; see digits.cpp."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("p16", "p8a", "p8b", "p0", "row", "column")),
        ("constant", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("bias", "out", "total")),
    ]


class Place(ctypes.Structure):
    """Where a value of a plan lies; see plan.h."""

    _fields_ = [("base", ctypes.c_int64), ("offset", ctypes.c_int64)]


class Stage(ctypes.Structure):
    """One operation on every element of a step; see plan.h."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("number", ctypes.c_float),
        ("other", ctypes.c_float),
        ("place", Place),
        ("stride", ctypes.c_int64),
    ]


class Layout(ctypes.Structure):
    """How a step is cut into tasks; see plan.h. The compiled part fills it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("threads", "panels", "shares", "row_tasks", "rows_each")),
        *((name, ctypes.c_int64) for name in ("tasks_of_image", "width", "pitch", "lines_together")),
    ]


class Step(ctypes.Structure):
    """A step of a plan; see plan.h."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("source", Place),
        ("target", Place),
        ("windows", Windows),
        *((name, ctypes.c_int64) for name in ("rows", "channels", "bytes", "groups", "arrangement", "tiles")),
        ("weights", ctypes.c_void_p),
        ("corrections", ctypes.c_void_p),
        ("stages", ctypes.POINTER(Stage)),
        *((name, ctypes.c_int64) for name in ("stage_count", "source_stride", "target_stride")),
        ("layout", Layout),
    ]


class Steps(ctypes.Structure):
    """The steps of a plan; see plan.h."""

    _fields_ = [("steps", ctypes.POINTER(Step)), ("count", ctypes.c_int64)]


class Run(ctypes.Structure):
    """The tensors of a run of a plan; see plan.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bases", "strides", "planes")),
        ("turns", ctypes.c_int64),
        ("seconds", ctypes.c_void_p),
    ]

"""Quantized modules, their autograd functions, and the in-place conversion."""

from ..config import OPERANDS
from .convert import convert, convertible_modules, quantized_modules
from .modules import (
    QUANTIZED_CLASSES,
    QuantizedBilinear,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
    QuantizedLinear,
    QuantizedModule,
)
from .quantizers import ModuleQuantizers

__all__ = [
    "OPERANDS",
    "QUANTIZED_CLASSES",
    "ModuleQuantizers",
    "QuantizedBilinear",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedLinear",
    "QuantizedModule",
    "convert",
    "convertible_modules",
    "quantized_modules",
]

"""Quantized modules, their autograd functions, and the in-place conversion."""

from .convert import convert, convertible_modules, quantized_modules
from .modules import QuantizedConv1d, QuantizedConv2d, QuantizedConv3d, QuantizedLinear, QuantizedModule
from .quantizers import OPERANDS, ModuleQuantizers

__all__ = [
    "OPERANDS",
    "ModuleQuantizers",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedLinear",
    "QuantizedModule",
    "convert",
    "convertible_modules",
    "quantized_modules",
]

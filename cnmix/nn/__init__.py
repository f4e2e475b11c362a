"""Quantized modules, their autograd functions, and the in-place conversion."""

from ..config import OPERANDS
from .base import QuantizedModule
from .convert import convert, convertible_modules, convertible_products, quantized_modules
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
)
from .places import module_name, product_name, quantizer_sets, quantizers_of
from .quantizers import ModuleQuantizers
from .recurrent import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
)

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
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLinear",
    "QuantizedModule",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "convert",
    "convertible_modules",
    "convertible_products",
    "module_name",
    "product_name",
    "quantized_modules",
    "quantizer_sets",
    "quantizers_of",
]

"""Quantized modules, their autograd functions, and the in-place conversion."""

from ..config import OPERANDS
from .base import QuantizedModule
from .callers import callers, forget_functions, function_configs, make_products, set_steps_per_epoch
from .convert import convert, convertible_modules, convertible_products, plan_functions, quantized_modules
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
    "callers",
    "convert",
    "convertible_modules",
    "convertible_products",
    "forget_functions",
    "function_configs",
    "make_products",
    "module_name",
    "plan_functions",
    "product_name",
    "quantized_modules",
    "quantizer_sets",
    "quantizers_of",
    "set_steps_per_epoch",
]

"""What old scripts call of the vendor's compiled module."""

from .core.legacy import set_quantized_bitwidth as _set_quantized_bitwidth

__all__ = ["_set_quantized_bitwidth"]

"""The modules that take the places of Linear and the convolutions, often imported as ``cnq``."""

from .base import MLUQuantizedModule
from .conv import MLUConv1d, MLUConv2d, MLUConv3d
from .linear import MLULinear

__all__ = ["MLUConv1d", "MLUConv2d", "MLUConv3d", "MLULinear", "MLUQuantizedModule"]

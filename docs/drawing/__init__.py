"""The documentation's pictures, one function each, by the names of their files."""

from . import algorithm, measured, number_format
from .common import FIGURES, ROOT, STYLE

__all__ = ["FIGURES", "ROOT", "STYLE", "algorithm", "measured", "number_format"]

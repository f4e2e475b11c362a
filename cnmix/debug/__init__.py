"""What fixed point changes in a model: which products are inexact, which operands to widen, where a NaN comes from."""

from .comparison import ComparedProduct, Comparison, Errors, compare
from .nonfinite import NonFinite, NonFiniteWatch, detect_nonfinite
from .sensitivity import Effect, Sensitivity, sensitivity
from .suggestion import Suggestion

__all__ = [
    "ComparedProduct",
    "Comparison",
    "Effect",
    "Errors",
    "NonFinite",
    "NonFiniteWatch",
    "Sensitivity",
    "Suggestion",
    "compare",
    "detect_nonfinite",
    "sensitivity",
]

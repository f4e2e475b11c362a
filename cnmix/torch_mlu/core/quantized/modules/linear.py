"""``nn.Linear``, quantized."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .base import MLUQuantizedModule


class MLULinear(MLUQuantizedModule, nn.Linear):
    """``nn.Linear`` with integers on the card."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        if not self._is_integer(input) or self.quantization is None:
            return super().forward(input)
        return functional.linear(input, self.weight, self.bias, *self.quantization, self._name())

"""Linear and convolutions on the emulated core, and which class takes the place of which."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Product
from .base import QuantizedModule
from .functional import multiply
from .products import ConvolutionGeometry
from .recurrent import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
)


class QuantizedLinear(QuantizedModule, nn.Linear):
    """``nn.Linear`` in fixed point."""

    product: Product = "matmul"

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        input = self._check_input(input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.quantizers.fqn!r} takes {self.in_features} features in the last dimension, got a tensor "
                f"of shape {tuple(input.shape)}"
            )
        return multiply(input, self.weight, self.bias, self.quantizers, self._moves_statistics())


class _QuantizedConv(QuantizedModule, nn.modules.conv._ConvNd):
    product: Product = "convolution"

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, *spatial) or (C, *spatial) to (N, O, *output) or (O, *output)."""
        input = self._check_input(input)
        spatial = len(self.kernel_size)
        channels = input.shape[-spatial - 1] if input.dim() in (spatial + 1, spatial + 2) else None
        if channels != self.in_channels:
            raise ValueError(
                f"{self.quantizers.fqn!r} takes (batch, {self.in_channels} channels, {spatial} spatial dimensions), "
                f"with or without the batch, got a tensor of shape {tuple(input.shape)}"
            )
        batched = input if input.dim() == spatial + 2 else input.unsqueeze(0)
        padding = self.padding
        if self.padding_mode != "zeros":
            batched = F.pad(batched, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * spatial
        elif isinstance(padding, str):  # "same" may need one more on the far side; "valid" is none
            batched = F.pad(batched, self._reversed_padding_repeated_twice)
            padding = (0,) * spatial
        geometry = ConvolutionGeometry(self.stride, padding, self.dilation, self.groups)
        try:
            y = multiply(batched, self.weight, self.bias, self.quantizers, self._moves_statistics(), geometry)
        except ValueError as error:
            raise ValueError(f"{self.quantizers.fqn!r}: {error}") from error
        return y if batched.dim() == input.dim() else y.squeeze(0)


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """``nn.Conv1d`` in fixed point."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """``nn.Conv2d`` in fixed point."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """``nn.Conv3d`` in fixed point."""


QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedModule]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
    nn.RNN: QuantizedRNN,
    nn.LSTMCell: QuantizedLSTMCell,
    nn.GRUCell: QuantizedGRUCell,
    nn.RNNCell: QuantizedRNNCell,
}

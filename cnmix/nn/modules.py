"""Linear, Bilinear and convolutions, transposed ones too, on the emulated core, and which class takes whose place."""

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


class QuantizedBilinear(QuantizedModule, nn.Bilinear):
    """``nn.Bilinear`` in fixed point: ``y_o = x1.T @ W_o @ x2 + b_o`` as one product, of the weight with ``x1 * x2.T``.

    The outer product of the two inputs is computed in float, as other products of elements are, and is the operand
    ``input``: (..., in1_features * in2_features), with one format for both inputs together. It takes as much memory as
    ``x1 @ W`` where ``out_features`` is ``in1_features``, and is kept for the backward pass in integers. The gradients
    of the two inputs follow from its gradient, in float. The other way, ``(x1 @ W) @ x2``, would be two products on the
    core, the second of a float result that is quantized anew.
    """

    product: Product = "matmul"

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Maps (..., in1_features) and (..., in2_features) to (..., out_features)."""
        input1, input2 = self._check_input(input1), self._check_input(input2)
        features = tuple(x.shape[-1] if x.dim() else None for x in (input1, input2))
        if features != (self.in1_features, self.in2_features) or input1.shape[:-1] != input2.shape[:-1]:
            raise ValueError(
                f"{self.quantizers.fqn!r} takes {self.in1_features} and {self.in2_features} features in the last "
                "dimensions of two tensors that are otherwise of one shape, got tensors of shape "
                f"{tuple(input1.shape)} and {tuple(input2.shape)}"
            )
        outer = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return multiply(outer, self.weight, self.bias, self.quantizers, self._moves_statistics())


class _QuantizedConvNd(QuantizedModule, nn.modules.conv._ConvNd):
    product: Product = "convolution"

    def _check_image(self, input: Tensor) -> Tensor:
        """Returns the input (N, C, *spatial) to compute with."""
        input = self._check_input(input)
        spatial = len(self.kernel_size)
        if self.in_channels == 0:  # torch leaves it so in a lazy module that loaded its weights
            self.in_channels = self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups
        channels = input.shape[-spatial - 1] if input.dim() in (spatial + 1, spatial + 2) else None
        if channels != self.in_channels:
            raise ValueError(
                f"{self.quantizers.fqn!r} takes (batch, {self.in_channels} channels, {spatial} spatial dimensions), "
                f"with or without the batch, got a tensor of shape {tuple(input.shape)}"
            )
        return input if input.dim() == spatial + 2 else input.unsqueeze(0)

    def _convolve(self, batched: Tensor, geometry: ConvolutionGeometry) -> Tensor:
        try:
            return multiply(batched, self.weight, self.bias, self.quantizers, self._moves_statistics(), geometry)
        except ValueError as error:
            raise ValueError(f"{self.quantizers.fqn!r}: {error}") from error


class _QuantizedConv(_QuantizedConvNd):
    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, *spatial) or (C, *spatial) to (N, O, *output) or (O, *output)."""
        batched = self._check_image(input)
        spatial = len(self.kernel_size)
        padding = self.padding
        if self.padding_mode != "zeros":
            batched = F.pad(batched, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * spatial
        elif isinstance(padding, str):  # "same" may need one more on the far side; "valid" is none
            batched = F.pad(batched, self._reversed_padding_repeated_twice)
            padding = (0,) * spatial
        y = self._convolve(batched, ConvolutionGeometry(self.stride, padding, self.dilation, self.groups))
        return y if batched.dim() == input.dim() else y.squeeze(0)


class _QuantizedConvTranspose(_QuantizedConvNd, nn.modules.conv._ConvTransposeNd):
    padding: tuple[int, ...]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps (N, C, *spatial) or (C, *spatial) to (N, O, *output) or (O, *output).

        Args:
            input: float.
            output_size: of the output, with or without its first dimensions, where several sizes are possible; instead
                of the module's ``output_padding``.
        """
        batched = self._check_image(input)
        stride, padding, kernel, dilation = map(list, (self.stride, self.padding, self.kernel_size, self.dilation))
        try:
            extra = self._output_padding(input, output_size, stride, padding, kernel, len(kernel), dilation)
        except ValueError as error:
            raise ValueError(f"{self.quantizers.fqn!r}: {error}") from error
        geometry = ConvolutionGeometry(self.stride, self.padding, self.dilation, self.groups, True, tuple(extra))
        y = self._convolve(batched, geometry)
        return y if batched.dim() == input.dim() else y.squeeze(0)


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """``nn.Conv1d`` in fixed point."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """``nn.Conv2d`` in fixed point."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """``nn.Conv3d`` in fixed point."""


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` in fixed point."""


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` in fixed point."""


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` in fixed point."""


QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedModule]] = {
    nn.Linear: QuantizedLinear,
    nn.Bilinear: QuantizedBilinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
    nn.RNN: QuantizedRNN,
    nn.LSTMCell: QuantizedLSTMCell,
    nn.GRUCell: QuantizedGRUCell,
    nn.RNNCell: QuantizedRNNCell,
}

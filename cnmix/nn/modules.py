"""Linear and convolutions on the emulated core.

Conversion assigns one of these classes to an existing module. The module, its parameters, hooks and state_dict keys
stay; the quantizers are an ordinary attribute, neither parameter nor buffer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Product
from .functional import multiply
from .products import ConvolutionGeometry
from .quantizers import ModuleQuantizers
from .recomputation import reentrant_part

NO_TENSOR_PARALLELISM = (
    "is split by tensor parallelism (DTensor): each part of its weight would have a format of its own, and the "
    "processes other widths. Leave it out with exclude=[...], or share the model out with fully_shard or "
    "DistributedDataParallel alone"
)


def is_distributed(x: Tensor) -> bool:
    """Whether this is a DTensor."""
    return type(x).__module__.startswith("torch.distributed.tensor")  # without loading it


class QuantizedModule(nn.Module):
    """A module whose product runs in fixed point."""

    product: Product
    weight: Tensor
    quantizers: ModuleQuantizers

    def extra_repr(self) -> str:
        """Adds the width of each operand to the module's own description."""
        widths = ", ".join(f"{name}=int{quantizer.state.bits}" for name, quantizer in self.quantizers)
        return f"{super().extra_repr()}, {widths}"

    def _check_input(self, x: Tensor) -> Tensor:
        """Returns the input to compute with."""
        fqn = self.quantizers.fqn
        # Not self.weight: a parametrization would compute it once more.
        weight = self._parameters.get("weight")
        if not torch.compiler.is_compiling() and (is_distributed(x) or (weight is not None and is_distributed(weight))):
            raise RuntimeError(f"{fqn!r} {NO_TENSOR_PARALLELISM}")
        if not x.is_floating_point():
            raise TypeError(f"{fqn!r} takes a float tensor, got {x.dtype}")
        if x.device.type != "cpu":
            raise RuntimeError(f"{fqn!r} got a tensor on {x.device}: this version of cnmix computes on the CPU")
        if torch.compiler.is_compiling() or type(x).__module__ != "torch.distributed._functional_collectives":
            return x
        return x.clone()  # a tensor-parallel neighbour's collective is under way: any operation but a view waits for it

    def _moves_statistics(self) -> bool:
        if self.training and self.quantizers.frozen:
            raise RuntimeError(f"{self.quantizers.fqn!r} is frozen for integer inference: call model.eval() first")
        if not self.training or torch.compiler.is_compiling():
            return self.training and torch.is_grad_enabled()
        if torch.is_grad_enabled():
            return True
        self.quantizers.reentrant_part = reentrant_part()  # a training step's first pass, which runs without gradients
        return self.quantizers.reentrant_part is not None


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
}

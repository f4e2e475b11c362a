"""Integer models: a checkpoint's products with their weights stored as integers, everything else in float32."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import check
from ..checkpoint import load as read
from ..fixed_point import FixedPoint, dequantize
from ..nn import modules as quantized
from ..nn import quantized_modules, quantizer_sets
from ..nn.base import check_input
from ..nn.callers import forget_callers
from ..nn.exported import formats_of
from . import operators  # noqa: F401  (defines the operators)
from .freezing import prepare
from .weights import Weights

Model = TypeVar("Model", bound=nn.Module)


class IntegerModule(nn.Module):
    """What products with stored integers have in common.

    Attributes:
        integers: of the weight, int8, int16 or int32 (for 31 bits), a buffer.
        formats: bits and position of the input, bits and position of the weight.
        rounding: of the input.
        exact_int31: as in ``cnmix.QuantizeConfig``.
        fqn: fully qualified name of the module.
    """

    integers: Tensor
    bias: Any  # a Tensor or None, which each float class says in its own way
    formats: tuple[int, int, int, int]
    rounding: str
    exact_int31: bool
    fqn: str

    def __getattr__(self, name: str) -> Any:
        """Returns for ``weight`` the float32 values of the integers: a model's code may ask for its dtype."""
        if name == "weight" and "integers" in self._buffers:
            return dequantize(FixedPoint(self.integers, *self.formats[2:]))
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Adds the formats to the float module's own description."""
        bits, position, weight_bits, weight_position = self.formats
        described = f"input=int{bits} * 2**{position}, weight=int{weight_bits} * 2**{weight_position}"
        return f"{super().extra_repr()}, {described}"


class IntegerLinear(IntegerModule, nn.Linear):
    """``nn.Linear`` with integers."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        x = check_input(input, self, "weight", self.fqn)
        # While torch.jit traces, sizes are tensors, and comparing them warns.
        if x.dim() == 0 or (not torch.jit.is_tracing() and x.shape[-1] != self.integers.shape[1]):
            raise ValueError(
                f"{self.fqn!r} takes {self.integers.shape[1]} features in the last dimension, got a tensor of shape "
                f"{tuple(x.shape)}"
            )
        return torch.ops.cnmix.integer_linear(
            x, self.integers, self.bias, self.formats, self.rounding, self.exact_int31, self.fqn
        )


class _IntegerConv(IntegerModule, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps (N, C, *spatial) or (C, *spatial) to (N, O, *output) or (O, *output)."""
        x = check_input(input, self, "weight", self.fqn)
        spatial = len(self.kernel_size)
        channels = x.shape[-spatial - 1] if x.dim() in (spatial + 1, spatial + 2) else None
        if not torch.jit.is_tracing() and channels != self.in_channels:
            raise ValueError(
                f"{self.fqn!r} takes (batch, {self.in_channels} channels, {spatial} spatial dimensions), with or "
                f"without the batch, got a tensor of shape {tuple(x.shape)}"
            )
        batched = x if x.dim() == spatial + 2 else x.unsqueeze(0)
        padding: Any = self.padding
        extra: list[int] = []
        if self.transposed:
            lists = map(list, (self.stride, padding, self.kernel_size, self.dilation))
            stride, before, kernel, dilation = lists
            extra = self._output_padding(x, output_size, stride, before, kernel, spatial, dilation)
        elif self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            batched, padding = F.pad(batched, self._reversed_padding_repeated_twice, mode=mode), (0,) * spatial
        y = torch.ops.cnmix.integer_convolution(
            batched,
            self.integers,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.transposed,
            extra,
            self.formats,
            self.rounding,
            self.exact_int31,
            self.fqn,
        )
        return y if batched.dim() == x.dim() else y.squeeze(0)


class IntegerConv1d(_IntegerConv, nn.Conv1d):
    """``nn.Conv1d`` with integers."""


class IntegerConv2d(_IntegerConv, nn.Conv2d):
    """``nn.Conv2d`` with integers."""


class IntegerConv3d(_IntegerConv, nn.Conv3d):
    """``nn.Conv3d`` with integers."""


class IntegerConvTranspose1d(_IntegerConv, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with integers."""


class IntegerConvTranspose2d(_IntegerConv, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with integers."""


class IntegerConvTranspose3d(_IntegerConv, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with integers."""


class Affine(nn.Module):
    """A batch norm with its running statistics: ``x * factor + term``, each operation rounded to float32.

    The factor is ``weight / sqrt(running_var + eps)``, the term ``bias - running_mean * factor``, both computed in
    float64 and rounded once.
    """

    factor: Tensor
    term: Tensor
    fqn: str
    dimensions: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, *spatial) to the same shape."""
        fits = torch.jit.is_tracing() or (input.dim() in self.dimensions and input.shape[1] == self.factor.shape[0])
        if not fits:
            raise ValueError(
                f"{self.fqn!r} takes {' or '.join(map(str, self.dimensions))} dimensions, the second of size "
                f"{self.factor.shape[0]}, got a tensor of shape {tuple(input.shape)}"
            )
        shape = (-1, *[1] * (input.dim() - 2))
        return input * self.factor.view(shape) + self.term.view(shape)


_INTEGER_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    quantized.QuantizedLinear: IntegerLinear,
    quantized.QuantizedConv1d: IntegerConv1d,
    quantized.QuantizedConv2d: IntegerConv2d,
    quantized.QuantizedConv3d: IntegerConv3d,
    quantized.QuantizedConvTranspose1d: IntegerConvTranspose1d,
    quantized.QuantizedConvTranspose2d: IntegerConvTranspose2d,
    quantized.QuantizedConvTranspose3d: IntegerConvTranspose3d,
}
# Those whose forward pass is an affine map: a subclass may have one of its own.
_NORMS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}


def load(model: Model, checkpoint: Mapping[str, Any] | str | os.PathLike[str]) -> Model:
    """Turns a plain model into the integer model of a checkpoint, in place, with no calibration.

    Linear layers and convolutions store their weights as integers of the width that training ended with, and quantize
    their inputs at the positions that it found; other products in fixed point (recurrent layers, attention, what
    functions multiply, weights that are parametrized or that functions multiply too) keep their float parameters beside
    the integers. A batch norm becomes its affine map. The model is in evaluation mode, and cannot be trained any more.
    A checkpoint of O0 has nothing in fixed point: its model stays float.

    Args:
        model: a plain model of the checkpoint's architecture.
        checkpoint: a file that ``cnmix.checkpoint.load`` reads, or what it returned.

    Returns:
        The same model.

    Raises:
        ValueError: as ``prepare`` does, or if a weight holds NaN or infinity; the model is unchanged then.
        RuntimeError: if the weights do not fit.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = read(checkpoint)
    _check_finite(model, checkpoint)
    prepare(model, checkpoint)
    weights = Weights(model, (name for name, _ in quantizer_sets(model)))
    found: list[tuple[str, nn.Module]] = list(quantized_modules(model))
    for fqn, module in found:
        kind = _INTEGER_CLASSES.get(type(module))
        if kind is not None and not weights.serve_functions(fqn):
            _store_integers(fqn or type(module).__name__, module, kind)
    for fqn, module in list(model.named_modules()):
        if type(module) in _NORMS and module.running_mean is not None:
            _store_affine(fqn or type(module).__name__, module)
    forget_callers(model)
    return model


def _check_finite(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the weight, if one that is multiplied in fixed point holds NaN or infinity."""
    state = checkpoint["state_dict"]
    products = [name for each in check(checkpoint)["models"] for name in each["modules"]]
    weights = Weights(model, products)
    names = {name for product in products for name in weights.names(product)}
    for name in sorted(names & set(state)):
        if not bool(torch.isfinite(state[name]).all()):
            raise ValueError(
                f"the weight {name!r} holds NaN or infinity, which no integer stands for: take a checkpoint from "
                "before training diverged"
            )


def _store_integers(fqn: str, module: Any, kind: type[nn.Module]) -> None:
    quantizers = module.quantizers
    integers = quantizers.frozen_integers
    module.formats = (*formats_of(quantizers)[:2], integers.bits, integers.position)
    module.rounding = quantizers.input.rounding(training=False)
    module.exact_int31 = quantizers.config.exact_int31
    module.fqn = fqn
    del module._parameters["weight"]
    module.register_buffer("integers", integers.values)
    if module.bias is not None:
        module.bias.requires_grad_(False)
    del module.quantizers
    module.__class__ = kind


def _store_affine(fqn: str, module: Any) -> None:
    mean, variance = module.running_mean.double(), module.running_var.double()
    factor = (variance + module.eps).rsqrt()
    factor = factor if module.weight is None else factor * module.weight.detach().double()
    term = -mean * factor if module.bias is None else module.bias.detach().double() - mean * factor
    module.fqn, module.dimensions = fqn, _NORMS[type(module)]
    for name in [*module._parameters, *module._buffers]:
        delattr(module, name)
    module.register_buffer("factor", factor.float())
    module.register_buffer("term", term.float())
    module.__class__ = Affine

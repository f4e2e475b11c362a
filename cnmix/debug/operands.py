"""Operands whose products are of floats: as they are, or rounded to their format and back.

A product of such operands is summed in float64, from float32 values, by the kernels that multiply int31 without the
compiled part: so every function that multiplies in fixed point also multiplies in float, with the same gates, masks and
dropout around its products.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..adaptive import OperandQuantizer
from ..config import QuantizeConfig
from ..entries import quantize_entries
from ..fixed_point import FixedPoint, FixedPointBatch, dequantize
from ..nn import ModuleQuantizers, quantizers_of
from ..nn.places import attach


class FloatOperand(OperandQuantizer):
    """Takes a quantizer's place, and returns floats.

    Args:
        inner: the quantizer, whose settings and state are used, and which counts the steps.
        rounds: whether the floats are the values of its integers.
    """

    def __init__(self, inner: OperandQuantizer, rounds: bool) -> None:
        # Its settings are those of the quantizer, which rounds; here none matters.
        super().__init__(QuantizeConfig(bitwidth=31), inner.product, inner.name)
        self.inner = inner
        self.rounds = rounds

    def measured(
        self, x: Tensor, training: bool, *, channel_dim: int | None = None, with_checksum: bool = False
    ) -> tuple[FixedPoint, kernels.Statistics]:
        """Returns floats in the place of the integers; of the statistics, what products need."""
        if self.rounds:
            values = dequantize(quantize_entries(self.inner, x, training))
        else:
            values = x.detach().to(torch.float32, copy=True)
        sums = None if channel_dim is None else kernels.channel_sums(x, channel_dim)
        checksum = kernels.checksum(x) if with_checksum else None
        return _as_operand(values), kernels.Statistics(0.0, 0, channel_sums=sums, checksum=checksum)

    def repeated(
        self, x: Tensor, bits: int, position: int | None, stream: int, start: int = 0, training: bool = True
    ) -> FixedPoint:
        """Returns floats of a part of a tensor that comes piece by piece, or of one that is computed again."""
        if not self.rounds:
            return _as_operand(x.detach().to(torch.float32, copy=True))
        state = self.inner.state
        position = None if training and self.inner.due else state.position
        return _as_operand(dequantize(self.inner.repeated(x, state.bits, position, state.step, start, training)))

    def count(self, x: Tensor, quantized: FixedPoint, training: bool) -> None:
        """Takes a step whose floats are there already."""
        self.inner.state.step += training

    def repeat(self, quantized: FixedPoint) -> None:
        """Does the same in training."""
        self.inner.state.step += 1

    def notice(self, quantized: FixedPoint | FixedPointBatch, training: bool) -> None:
        """Says nothing of NaN and infinity, which floats go on with by themselves."""


def _as_operand(values: Tensor) -> FixedPoint:
    """Returns floats in the form of a 31-bit operand, which kernels multiply in float64."""
    return FixedPoint(values, 31, 0)


def with_float_operands(
    quantizers: ModuleQuantizers, rounds: Callable[[str], bool], counts: bool = True
) -> ModuleQuantizers:
    """Returns quantizers of a product whose operands are floats.

    Args:
        quantizers: of integers, or of floats.
        rounds: says which operands, by name, are rounded.
        counts: whether their steps count, in the states of the given ones.
    """
    changed = copy.copy(quantizers)
    for operand, quantizer in quantizers:
        inner = quantizer.inner if isinstance(quantizer, FloatOperand) else quantizer
        setattr(changed, operand, FloatOperand(inner if counts else copy.deepcopy(inner), rounds(operand)))
    return changed


def use_float_operands(model: nn.Module, rounds: Callable[[str, str], bool]) -> None:
    """Has all products of a model be of floats; ``rounds(fqn, operand)`` says which are rounded."""
    for fqn, module in model.named_modules():
        for place, quantizers in [*quantizers_of(module)]:
            attach(module, {place: with_float_operands(quantizers, lambda operand, fqn=fqn: rounds(fqn, operand))})  # type: ignore[misc]


def exchanged(value: Any, exchange: Callable[[ModuleQuantizers], ModuleQuantizers]) -> Any:
    """Returns an argument of a function that multiplies, with other quantizers in it."""
    if isinstance(value, ModuleQuantizers):
        return exchange(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(exchanged(each, exchange) for each in value))
    return value


def quantizers_in(*args: Any) -> Iterator[ModuleQuantizers]:
    """Yields the quantizers among the arguments of a function that multiplies."""
    for value in args:
        if isinstance(value, ModuleQuantizers):
            yield value
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            yield from quantizers_in(*value)


def function_name(names: Sequence[str]) -> str:
    """Returns what messages call a function that multiplies, by its products: an attention and a layer have several.

    Names as of products, ``att..forward+2:attention``, ``lstm..l0``; a recurrent cell has that of the module.
    """
    name = names[0]
    if len(names) == 1:
        return name
    whole, _, part = name.rpartition(".")
    return f"{whole}.attention" if whole.endswith(".") and part == "scores" else whole.rstrip(".")


def tensor_arguments(function: Any, args: Sequence[Any]) -> dict[str, Tensor]:
    """Returns the tensors among the arguments of a function that multiplies, by the names that it gives them."""
    names = [*inspect.signature(function.forward).parameters][1:]
    return {name: each for name, each in zip(names, args, strict=True) if isinstance(each, Tensor)}

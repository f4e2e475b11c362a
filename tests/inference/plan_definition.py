"""What a native plan computes, step by step in torch: slow, plain, and on any machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnmix.inference.norms import fused_multiply_add
from cnmix.kernels.plan import Add, AddValue, Clamp, LeakyRelu, Multiply, MultiplyAdd, Quantize, Relu, Store


class Value:
    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.tensor = torch.empty(0)

    def set(self, tensor: Tensor) -> None:
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype)
        self.tensor = tensor


class PlanDefinition:
    """Stands in for ``cnmix.kernels.plan.Plan``."""

    def __init__(self) -> None:
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._steps: list[Callable[[], None]] = []
        self._finite = True

    def input(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        self._inputs.append(Value(shape, dtype))
        return self._inputs[-1]

    def output(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        self._outputs.append(Value(shape, dtype))
        return self._outputs[-1]

    def value(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        return Value(shape, dtype)

    def finish(self) -> None:
        pass

    def product(self, source: Value, weight: Tensor, chain: Any, *, stride, padding, dilation, groups=1) -> None:
        def compute() -> None:
            x, w = source.tensor.double(), weight.double()
            if weight.dim() == 2:
                y = x @ w.t()
            else:
                y = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](x, w, None, stride, padding, dilation, groups)
            wanted = chain[-1].value.shape
            self._chain(y.float().reshape(wanted), chain)

        self._steps.append(compute)

    def elements(self, source: Value, chain: Any) -> None:
        self._steps.append(lambda: self._chain(source.tensor, chain))

    def max_pool(self, source: Value, target: Value, kernel, stride, padding, dilation) -> None:
        def compute() -> None:
            for ceil in (False, True):
                y = F.max_pool2d(source.tensor.float(), kernel, stride, padding, dilation, ceil)
                if tuple(y.shape) == target.shape:
                    break
            target.set(y.to(target.dtype))

        self._steps.append(compute)

    def concatenate(self, sources: Sequence[Value], target: Value) -> None:
        self._steps.append(lambda: target.set(torch.cat([each.tensor for each in sources], 1)))

    def upsample_nearest(self, source: Value, target: Value) -> None:
        def compute() -> None:
            y = source.tensor
            for dim in range(2, y.dim()):
                y = y.repeat_interleave(target.shape[dim] // y.shape[dim], dim)
            target.set(y)

        self._steps.append(compute)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        self._finite = True
        turns = outputs[0].shape[0] // self._outputs[0].shape[0]
        for turn in range(turns):
            for value, tensor in zip(self._inputs, inputs, strict=True):
                value.set(tensor.chunk(turns)[turn])
            for step in self._steps:
                step()
            for value, tensor in zip(self._outputs, outputs, strict=True):
                tensor.chunk(turns)[turn].copy_(value.tensor)
        return self._finite

    def _chain(self, y: Tensor, chain: Any) -> None:
        by_channel = (-1, *[1] * (y.dim() - 2))
        for stage in chain:
            if isinstance(stage, Multiply):
                y = y * (stage.factors.view(by_channel) if isinstance(stage.factors, Tensor) else stage.factors)
            elif isinstance(stage, Add):
                y = y + stage.terms.view(by_channel)
            elif isinstance(stage, MultiplyAdd):
                y = fused_multiply_add(y, stage.factors.view(by_channel), stage.terms.view(by_channel))
            elif isinstance(stage, AddValue):
                y = y + stage.value.tensor
            elif isinstance(stage, Relu):
                y = y.relu()
            elif isinstance(stage, LeakyRelu):
                y = F.leaky_relu(y, stage.slope)
            elif isinstance(stage, Clamp):
                y = y.clamp(stage.low, stage.high)
            elif isinstance(stage, Store):
                stage.value.set(y)
            else:
                assert isinstance(stage, Quantize)
                self._finite = self._finite and bool(y.isfinite().all())
                last = 2 ** (stage.bits - 1)
                integers = (y.double() * 2.0**-stage.position).round().clamp(-last, last - 1).nan_to_num(0)
                stage.value.set(integers.to(stage.value.dtype))

"""Groups of fused steps as native plans."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..kernels import native, plan
from .nodes import Floats, Fused, Integers, Key, Layout, images_of
from .program import Program


class _Source(NamedTuple):
    key: Key
    layout: Layout
    as_it_lies: bool


class Group:
    """One plan, and how its tensors lie outside of it."""

    def __init__(self, nodes: list[Fused], later: set[Key], program: Program) -> None:
        self.nodes = nodes
        self._program = program
        self._plan = plan.Plan()
        self._turns = images_of(nodes, program)
        self._made = {key for node in nodes for key in node.results()}
        self._values: dict[tuple[Key, Layout], plan.Value] = {}
        self._sources: list[_Source] = []
        self._results: list[tuple[Key, Layout]] = []
        for node in nodes:
            for key in node.inputs():
                self._add_source(key, node)
            for key in node.results():
                shape, dtype = self._shape(key, node.layout)
                if key in later:
                    self._results.append((key, node.layout))
                    self._values[key, node.layout] = self._plan.output(shape, dtype)
                else:
                    self._values[key, node.layout] = self._plan.value(shape, dtype)
            self._add_step(node)
        self._plan.finish()

    def keys(self) -> list[Key]:
        """Returns what it takes from outside, and makes for outside."""
        return [each.key for each in self._sources] + [key for key, _ in self._results]

    def run(self, values: dict[Any, Tensor]) -> bool:
        """Computes its results from values; returns False, and nothing of use, where one was not finite."""
        inputs = [_laid_out(values[name_of(key)], layout, as_it_lies) for key, layout, as_it_lies in self._sources]
        outputs = [self._empty(key, layout) for key, layout in self._results]
        as_rows = [
            out.view(-1, out.shape[-1]) if layout == "rows" else out
            for out, (_, layout) in zip(outputs, self._results, strict=True)
        ]
        if not self._plan.run(inputs, as_rows):
            return False
        for (key, _), out in zip(self._results, outputs, strict=True):
            values[name_of(key)] = self._as_called(key, out)
        return True

    def _shape(self, key: Key, layout: Layout) -> tuple[tuple[int, ...], torch.dtype]:
        shape = self._program.specs[key.value].shape
        dtype = torch.float32 if isinstance(key, Floats) else torch.int8
        shape = (shape[0] // self._turns, *shape[1:])
        return (shape if layout == "image" else (math.prod(shape[:-1]), shape[-1])), dtype

    def _empty(self, key: Key, layout: Layout) -> Tensor:
        shape = self._program.specs[key.value].shape
        dtype = torch.float32 if isinstance(key, Floats) else torch.int8
        if layout == "rows":
            return native.empty(shape, dtype)
        return native.empty((shape[0], *shape[2:], shape[1]), dtype).movedim(-1, 1)

    def _as_called(self, key: Key, made: Tensor) -> Tensor:
        """Returns a result as it lies where the model is called operator by operator."""
        spec = self._program.specs[key.value]
        if isinstance(key, Integers) or spec.strides == made.stride():
            return made
        if all(n == 1 or a == b for n, a, b in zip(spec.shape, spec.strides, made.stride(), strict=True)):
            return made.as_strided(spec.shape, spec.strides)  # torch.cat goes by strides of single elements, too
        return torch.empty_strided(spec.shape, spec.strides).copy_(made)

    def _add_source(self, key: Key, node: Fused) -> None:
        layout = key.layout if isinstance(key, Integers) else node.layout
        if key in self._made or (key, layout) in self._values:
            return
        shape, dtype = self._shape(key, layout)
        self._values[key, layout] = self._plan.input(shape, dtype)
        users = [each for each in self.nodes if key in each.inputs()]
        as_it_lies = all(each.kind == "elements" and key in each.sources for each in users)
        self._sources.append(_Source(key, layout, as_it_lies and layout == "image"))

    def _find(self, key: Key, layout: Layout) -> plan.Value:
        return self._values[key, key.layout if isinstance(key, Integers) else layout]

    def _add_step(self, node: Fused) -> None:
        sources = [self._find(key, node.layout) for key in node.sources]
        target = self._find(next(node.results()), node.layout)
        if node.kind == "max_pool":
            self._plan.max_pool(sources[0], target, *node.geometry)
        elif node.kind == "concatenate":
            self._plan.concatenate(sources, target)
        elif node.kind == "upsample":
            self._plan.upsample_nearest(sources[0], target)
        elif node.kind == "elements":
            self._plan.elements(sources[0], self._chain(node))
        else:
            stride, padding, dilation, groups = node.geometry or ((), (), (), 1)
            self._plan.product(
                sources[0],
                cast(Tensor, node.weight),
                self._chain(node),
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
            )

    def _chain(self, node: Fused) -> list[Any]:
        """Returns the stages as the plan takes them, each tensor stored where it is complete."""
        wanted: dict[int, list[Key]] = {}
        for key in node.results():
            wanted.setdefault(node.points[key.value], []).append(key)
        cuts = sorted({0, len(node.stages), *wanted})
        chain: list[Any] = []
        shape = self._program.specs[next(iter(node.points))].shape
        channels = shape[1 if node.layout == "image" else -1]
        for start, end in zip([0, *cuts], cuts, strict=False):
            part = node.stages[start:end]
            chain += [self._stage(each, node.layout, channels) for each in part]
            for key in wanted.get(end, ()):
                value = self._find(key, node.layout)
                if isinstance(key, Floats):
                    chain.append(plan.Store(value))
                else:
                    chain.append(plan.Quantize(value, key.bits, key.position))
        return chain

    def _stage(self, stage: Any, layout: Layout, channels: int) -> Any:
        kind, operand = stage
        if kind == "multiply":
            return plan.Multiply(operand.item() if operand.numel() == 1 else operand)
        if kind == "add":
            return plan.Add(operand.expand(channels) if operand.numel() == 1 else operand)
        if kind == "multiply_add":
            return plan.MultiplyAdd(*operand)
        if kind == "add_value":
            return plan.AddValue(self._find(Floats(operand), layout))
        if kind == "relu":
            return plan.Relu()
        return plan.LeakyRelu(operand) if kind == "leaky_relu" else plan.Clamp(*operand)


def name_of(key: Key) -> Any:
    """Returns under what a tensor is kept between parts."""
    return key.value if isinstance(key, Floats) else key


def _laid_out(x: Tensor, layout: Layout, as_it_lies: bool) -> Tensor:
    if layout == "rows":
        return x.reshape(-1, x.shape[-1]).contiguous()
    if as_it_lies and x.is_contiguous():
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1)

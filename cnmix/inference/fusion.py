"""Joins the steps of a program: products with what follows them, and quantization with where a tensor is made.

A product takes along the operations on its result that work element by element: one pass over the sums then computes
them, and stores floats, integers or both. Quantization moves up, through maxima, concatenations and repetitions, which
it commutes with, to where its tensor is computed, so that integers travel between products. No operation changes, and
so no bit does: what is computed twice less often is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..fixed_point import is_float32_exponent
from .names import CONVOLUTION, LINEAR
from .nodes import Call, Floats, Fused, Integers, Key, Layout, Node, Stage, grouped
from .norms import norm_stages
from .program import Program, Ref, Step, find_operator

# Sums of more products than this could leave int32.
LONGEST_SUM = (1 << 31) // (1 << 14) - 1
# A plan's chain has 32 places, for operations and for where their results go: a float for each operation, if need be;
# one step may be several.
_MOST_OPERATIONS = 11
_MOST_FORMATS = 7


def fuse_steps(program: Program) -> list[list[Fused] | Call]:
    """Joins the steps of a program, and arranges them in groups.

    Returns:
        In the order in which they are to be computed: groups of fused steps, each of which one plan can compute, and
        single calls.
    """
    plain: set[int] = set()
    norms = norm_stages(program)
    while True:
        nodes = _Joining(program, norms, plain).nodes()
        # Floats alone gain nothing from a plan, but would cut the calls around them into pieces.
        floats = {
            place
            for node in nodes
            if isinstance(node, Fused) and node.kind == "elements" and node.step is not None and not node.quantized
            for place in node.places
        }
        if not floats:
            return grouped(nodes)
        plain |= floats


class _Joining:
    """Finds the chains of a program.

    Args:
        program: to be fused.
        norms: the stages of its batch norms, by the places of their steps.
        plain: places of steps that shall begin no chain, and be no part of one.
    """

    def __init__(self, program: Program, norms: dict[int, list[Stage]], plain: set[int]) -> None:
        self.program, self.norms = program, norms
        self.makers: dict[str, int] = {}
        self.users: dict[str, list[int]] = {}
        for index, step in enumerate(program.steps):
            self.makers.update({name: index for name in step.outputs if name is not None})
            for name in dict.fromkeys(step.inputs()):
                self.users.setdefault(name, []).append(index)
        self.taken = set(plain)
        self.chain_of: dict[str, Fused] = {}
        for index, step in enumerate(program.steps):
            if index not in self.taken:
                self._begin_chain(index, step)
        self.made: dict[Any, Node] = {}

    def nodes(self) -> list[Node]:
        """Returns what is needed for the outputs, unordered."""
        wanted: list[Key] = [Floats(name) for name in self.program.outputs]
        seen: set[Key] = set()
        while wanted:
            key = wanted.pop()
            if key in seen:
                continue
            seen.add(key)
            before = len(self.made)
            node = self._maker(key)
            if node is not None and len(self.made) > before:
                wanted += list(node.inputs())
        for node in self.made.values():
            if isinstance(node, Fused) and node.points:  # what comes after the last that is wanted
                last = max(node.points[each] for each in (*node.stored, *(each.value for each in node.quantized)))
                del node.stages[last:]
        return list(self.made.values())

    def _maker(self, key: Key) -> Node | None:
        """Returns what makes this tensor, and lets it; None for inputs and constants."""
        chain = self.chain_of.get(key.value)
        if isinstance(key, Integers):
            fits = chain is not None and key.layout in (chain.layout, self._flat(key.value))
            if chain is not None and fits and len(chain.quantized) < _MOST_FORMATS:
                chain.quantized.append(key._replace(layout=key.layout))
                return self.made.setdefault(id(chain), chain)
            moved = self._moved(key)
            if moved is None:
                moved = Fused("elements", self.makers.get(key.value, -1), key.layout, [Floats(key.value)])
                moved.points[key.value] = 0
            moved.quantized.append(key)
            return self.made.setdefault(key, moved)
        if chain is not None:
            chain.stored.append(key.value)
            return self.made.setdefault(id(chain), chain)
        index = self.makers.get(key.value)
        if index is None:
            return None
        moved = self._moved(key)
        if moved is not None:
            moved.stored.append(key.value)
            return self.made.setdefault(key, moved)
        step = self.program.steps[index]
        names = dict.fromkeys(step.inputs())
        sources: list[Key] = [Floats(name) for name in names if name not in self.program.constants]
        return self.made.setdefault(index, Call(index, step, sources))

    def _flat(self, name: str) -> Layout | None:
        """Returns "rows" or "image" where both are one: of tensors (N, C)."""
        return None if len(self.program.specs[name].shape) != 2 else "rows"

    def _begin_chain(self, index: int, step: Step) -> None:
        if step.operator in (LINEAR, CONVOLUTION):
            made = self._product(index, step)
            if made is None:
                return
            value = step.output
        else:
            flow = next((name for name in step.inputs() if name not in self.program.constants), None)
            if flow is None or flow not in self.program.specs or self.program.specs[flow].dtype != torch.float32:
                return
            known = self.chain_of.get(flow)
            layout: Layout = known.layout if known is not None else "image" if len(self._shape(flow)) == 4 else "rows"
            stages = self._stages(index, flow, index, layout)
            if stages is None or len(self._shape(flow)) < 2 or 0 in self._shape(flow):
                return
            made = Fused("elements", index, layout, [Floats(flow)], step, stages=[*stages])
            value = _result(step)
        made.places.append(index)
        made.points[value] = len(made.stages)
        self.chain_of[value] = made
        while True:
            found = next(self._continuations(value, index, made.layout), None)
            if found is None or len(made.stages) >= _MOST_OPERATIONS:
                return
            user, stages = found
            self.taken.add(user)
            made.places.append(user)
            made.stages += stages
            value = _result(self.program.steps[user])
            made.points[value] = len(made.stages)
            self.chain_of[value] = made

    def _continuations(self, value: str, index: int, layout: Layout) -> Iterator[tuple[int, list[Stage]]]:
        for user in self.users.get(value, ()):
            stages = None if user in self.taken else self._stages(user, value, index, layout)
            if stages is not None:
                yield user, stages

    def _stages(self, place: int, flow: str, index: int, layout: Layout) -> list[Stage] | None:
        """Returns the step at a place as stages of the chain that began at ``index``, if it can be some of it."""
        norm = self.norms.get(place)
        if norm is not None:
            return norm if layout == "image" or len(self._shape(flow)) == 2 else None
        stage = self._stage(self.program.steps[place], flow, index, layout)
        return None if stage is None else [stage]

    def _stage(self, step: Step, flow: str, index: int, layout: Layout) -> Stage | None:
        """Returns a step as a stage of a chain in which ``flow`` is the tensor, if it can be one at this place."""
        operator, arguments = step.operator, step.arguments
        if operator == "aten.relu.default":
            return Stage("relu")
        if operator == "aten.leaky_relu.default":
            return Stage("leaky_relu", float(arguments[1]) if len(arguments) > 1 else 0.01)
        if operator in ("aten.hardtanh.default", "aten.clamp.default"):
            limits = [*arguments[1:], *step.keywords.values()]
            low, high = limits if len(limits) == 2 else (-1.0, 1.0)
            if len(limits) == 1 or low is None or high is None or low != low or high != high:
                return None
            return Stage("clamp", (float(low), float(high)))
        if operator not in ("aten.mul.Tensor", "aten.add.Tensor") or step.keywords:
            return None
        first, second = arguments
        other = second if isinstance(first, Ref) and first.name == flow else first
        kind: Any = "multiply" if operator == "aten.mul.Tensor" else "add"
        if not isinstance(other, Ref):
            return Stage(kind, torch.full((1,), float(other))) if isinstance(other, (int, float)) else None
        name = other.name
        if name in self.program.constants:
            operand = self._per_channel(self.program.constants[name], self._shape(flow), layout)
            return None if operand is None else Stage(kind, operand)
        if name == flow:
            return Stage("multiply", torch.full((1,), 2.0)) if kind == "add" else None
        before = self.makers.get(name, -1) < index
        known = self.chain_of.get(name)
        alike = self.program.specs[name][:2] == self.program.specs[flow][:2] and (
            known is None or known.layout == layout
        )
        return Stage("add_value", name) if kind == "add" and before and alike else None

    def _per_channel(self, constant: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor | None:
        """Returns a constant as one number for each channel, or for all, if it is that."""
        if constant.dtype != torch.float32:
            return None
        if constant.numel() == 1 and constant.dim() <= len(shape):
            return constant.reshape(1)
        dim = 1 if layout == "image" else len(shape) - 1
        wanted = [shape[each] if each == dim else 1 for each in range(len(shape))]
        padded = [1] * (len(shape) - constant.dim()) + list(constant.shape)
        return constant.reshape(-1).contiguous() if padded == wanted else None

    def _product(self, index: int, step: Step) -> Fused | None:
        """Returns a product of int8 operands as the beginning of a chain; None if plans have none like it."""
        linear = step.operator == LINEAR
        first, weight_ref, bias_ref, *rest = step.arguments
        bits, position, weight_bits, weight_position = rest[0 if linear else 6]
        weight = self.program.constants.get(weight_ref.name)
        source = first.name
        spec = self.program.specs[source]
        scale = position + weight_position
        rounding = rest[1 if linear else 7]
        if weight is None or (bits, weight_bits) != (8, 8) or rounding != "nearest_even" or spec.dtype != torch.float32:
            return None
        if math.prod(weight.shape[1:]) > LONGEST_SUM or not is_float32_exponent(scale):
            return None
        if len(spec.shape) < 2 or 0 in spec.shape or 0 in self._shape(step.output):
            return None
        layout: Layout = "rows" if linear else "image"
        geometry: tuple[Any, ...] = ()
        key_layout = layout
        if linear:
            image = self._flattened(source)
            if image is not None:  # the rows of K are windows as large as the image
                source, key_layout = image, "image"
                weight = weight.reshape(weight.shape[0], *self._shape(image)[1:])
                ones = (1,) * (weight.dim() - 2)
                geometry = (ones, (0,) * len(ones), ones, 1)
        else:
            stride, padding, dilation, groups, transposed, _ = rest[:6]
            if transposed:
                return None
            geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
        stages = [Stage("multiply", torch.full((1,), 2.0**scale))]
        if bias_ref is not None:
            bias = self.program.constants.get(bias_ref.name)
            if bias is None or bias.dtype != torch.float32:
                return None
            stages.append(Stage("add", bias.contiguous()))
        known = self.chain_of.get(source)
        if known is not None and known.layout != key_layout and len(self._shape(source)) > 2:
            return None
        key = Integers(source, bits, position, key_layout)
        return Fused("product", index, layout, [key], step, weight, geometry, stages)

    def _flattened(self, name: str) -> str | None:
        """Returns the image (N, C, *spatial) that this tensor (N, K) is flattened from."""
        index = self.makers.get(name)
        if index is None:
            return None
        step = self.program.steps[index]
        if step.operator not in ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"):
            return None
        image = step.arguments[0].name
        copy = self.program.steps[self.makers[image]] if image in self.makers else None
        if copy is not None and copy.operator == "aten.clone.default":
            image = copy.arguments[0].name
        shape = self.program.specs[image].shape if image in self.program.specs else ()
        flat = (shape[0], math.prod(shape[1:])) if len(shape) == 4 else None
        return image if flat == self._shape(name) else None

    def _moved(self, key: Key) -> Fused | None:
        """Returns the movement that makes integers of integers, or floats of what chains make, if there is one."""
        index = self.makers.get(key.value)
        if index is None or (isinstance(key, Integers) and key.layout != "image"):
            return None
        step = self.program.steps[index]
        arguments, shape = step.arguments, self._shape(key.value)
        geometry: tuple[Any, ...] = ()
        names: list[str]
        if step.operator == "aten.max_pool2d.default" and len(shape) == 4:
            numbers = [*arguments[1:], *[None] * 4][:4]
            kernel = _pair(numbers[0], 1)
            stride = _pair(numbers[1], kernel)
            geometry = (kernel, stride, _pair(numbers[2], 0), _pair(numbers[3], 1))
            if not _meet_pixels(shape[2:], self._shape(arguments[0].name)[2:], geometry):
                return None
            names, kind = [arguments[0].name], "max_pool"
        elif step.operator == "aten.cat.default" and (len(arguments) > 1 and arguments[1] in (1, 1 - len(shape))):
            names, kind = [each.name for each in arguments[0]], "concatenate"
        elif step.operator.startswith("aten.upsample_nearest2d."):
            if not _repeats_pixels(step, shape[2:], self._shape(arguments[0].name)[2:]):
                return None
            names, kind = [arguments[0].name], "upsample"
        else:
            return None
        sources: list[Key] = [key._replace(value=name) for name in names]
        if any(each.value in self.program.constants or not self._is_like(each.value, shape) for each in sources):
            return None
        chains = [self.chain_of.get(each.value) for each in sources]
        if any(each is not None and each.layout != "image" for each in chains):
            return None
        if isinstance(key, Floats) and None in chains:
            return None
        return Fused(kind, index, "image", sources, step, geometry=geometry)  # type: ignore[arg-type]

    def _is_like(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is float32, with elements, of as many dimensions: concatenations take others too."""
        spec = self.program.specs[name]
        return spec.dtype == torch.float32 and len(spec.shape) == len(shape) and 0 not in spec.shape

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.program.specs[name].shape


def _meet_pixels(output: tuple[int, ...], size: tuple[int, ...], geometry: tuple[Any, ...]) -> bool:
    """Whether every window of a pool meets the image: the largest of no element is minus infinity, which no int8 is."""
    return all(
        any(0 <= position * stride - padding + tap * dilation < pixels for tap in range(kernel))
        for positions, pixels, kernel, stride, padding, dilation in zip(output, size, *geometry, strict=True)
        for position in range(positions)
    )


def _repeats_pixels(step: Step, output: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Whether an enlargement takes each pixel a whole number of times, as its rounding of a factor may not do."""
    if 0 in size or any(after % before for after, before in zip(output, size, strict=True)):
        return False
    enlarge = find_operator(step.operator)
    pixels = torch.arange(math.prod(size), dtype=torch.float32).view(1, 1, *size)
    found = enlarge(pixels, *step.arguments[1:], **step.keywords)
    for dim, (after, before) in enumerate(zip(output, size, strict=True), 2):
        pixels = pixels.repeat_interleave(after // before, dim)
    return torch.equal(found, pixels)


def _result(step: Step) -> str:
    """Returns the one tensor of a chain's step: batch norms return others besides, which nothing takes."""
    return next(name for name in step.outputs if name is not None)


def _pair(given: Any, otherwise: Any) -> tuple[int, int]:
    given = otherwise if given in (None, []) else given
    numbers = [given] if isinstance(given, int) else list(given)
    return tuple(numbers * 2 if len(numbers) == 1 else numbers)  # type: ignore[return-value]

"""What a program becomes when its steps are joined: groups of fused steps, each for one plan, and single calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .program import Program, Step

Layout = Literal["image", "rows"]
"""How a tensor lies in a plan: (N, C, *spatial) with its channels side by side, or (..., C) as it is."""


class Floats(NamedTuple):
    """A tensor of the program as float32.

    Attributes:
        value: its name.
    """

    value: str


class Integers(NamedTuple):
    """A tensor of the program, quantized.

    Attributes:
        value: its name.
        bits: width.
        position: exponent of the step.
        layout: how it lies.
    """

    value: str
    bits: int
    position: int
    layout: Layout


Key = Floats | Integers


class Stage(NamedTuple):
    """An operation on each element of a product's result, or of a tensor.

    Attributes:
        kind: what it is.
        operand: a factor or term for each channel or for all, both for each channel, the other tensor, a slope, or two
            limits.
    """

    kind: Literal["multiply", "add", "multiply_add", "add_value", "relu", "leaky_relu", "clamp"]
    operand: Any = None


@dataclass
class Fused:
    """A step of a plan.

    Attributes:
        kind: what it computes: a product, a chain of element-wise stages alone, or a movement of integers.
        place: of the step in the program that it begins with.
        layout: of its results.
        sources: what it begins with: one tensor, or those to concatenate.
        step: of the program; None for a quantization alone.
        weight: int8, of a product: (O, C / groups, *kernel) or (O, K).
        geometry: stride, padding, dilation and groups of a convolution; kernel, stride, padding, dilation of a maximum.
        stages: of the chain.
        places: of all its steps in the program.
        points: after how many stages each tensor of the program is complete.
        stored: the tensors that are wanted as floats.
        quantized: those that are wanted as integers.
    """

    kind: Literal["product", "elements", "max_pool", "concatenate", "upsample"]
    place: int
    layout: Layout
    sources: list[Key]
    step: Step | None = None
    weight: Tensor | None = None
    geometry: tuple[Any, ...] = ()
    stages: list[Stage] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    points: dict[str, int] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)
    quantized: list[Integers] = field(default_factory=list)

    def inputs(self) -> Iterator[Key]:
        """Yields what it takes."""
        yield from self.sources
        yield from (Floats(each.operand) for each in self.stages if each.kind == "add_value")

    def results(self) -> Iterator[Key]:
        """Yields what it makes."""
        yield from (Floats(name) for name in self.stored)
        yield from self.quantized


@dataclass
class Call:
    """A step of the program that stays as it is.

    Attributes:
        place: in the program.
        step: of the program.
        sources: what it takes, without constants.
    """

    place: int
    step: Step
    sources: list[Key]

    def inputs(self) -> Iterator[Key]:
        """Yields what it takes."""
        yield from self.sources

    def results(self) -> Iterator[Key]:
        """Yields what it makes."""
        yield from (Floats(name) for name in self.step.outputs if name is not None)


Node = Fused | Call


def grouped(nodes: list[Node]) -> list[list[Fused] | Call]:
    """Arranges nodes so that each group of fused ones is as large as it can be."""
    made_by = {key: node for node in nodes for key in node.results()}
    waiting = sorted(nodes, key=lambda node: (node.place, isinstance(node, Call)))
    done: set[int] = set()
    arranged: list[list[Fused] | Call] = []

    def take(kind: type[Node]) -> list[Any]:
        """Takes the nodes of a kind that wait for nothing, or only for each other."""
        taken: list[Node] = []
        before = -1
        while len(taken) > before:
            before = len(taken)
            for node in [each for each in waiting if isinstance(each, kind)]:
                if all(id(made_by[key]) in done for key in node.inputs() if key in made_by):
                    taken.append(node)
                    done.add(id(node))
                    waiting.remove(node)
        return taken

    while waiting:
        group, calls = take(Fused), take(Call)
        if not group and not calls:
            raise RuntimeError("the steps of the program wait for each other")
        arranged += [group, *calls] if group else calls
    return arranged


def parted(group: list[Fused], program: Program) -> list[list[Fused]]:
    """Parts a group into what computes image by image, and what computes one row of each, best of all at once.

    A plan takes the images of a batch in turns, so that what is between its steps stays in the cache. A product of
    single rows would read its whole weight in each turn.
    """
    flat: set[Key] = set()
    images: list[Fused] = []
    rows: list[Fused] = []
    for node in group:
        shapes = [program.specs[key.value].shape for key in node.results()]
        if any(key in flat for key in node.inputs()) or any(
            math.prod(shape) == shape[0] * shape[1] for shape in shapes
        ):
            flat.update(node.results())
            rows.append(node)
        else:
            images.append(node)
    return [part for part in (images, rows) if part]


def images_of(group: list[Fused], program: Program) -> int:
    """Returns in how many turns a plan is to compute a group: one for each image, or 1 where that cannot be or pay."""
    first = {program.specs[key.value].shape[0] for node in group for key in (*node.inputs(), *node.results())}
    few = any(_rows_of_image(key, node, program) < _FEW_ROWS[node.layout] for node in group for key in node.results())
    return 1 if len(first) > 1 or few else first.pop()


# Rows of channels below which an image does not pay a turn. Where positions come before the batch, an "image" has as
# few rows as the batch has, and each turn would read whole weights for them.
_FEW_ROWS: dict[Layout, int] = {"image": 2, "rows": 16}


def _rows_of_image(key: Key, node: Fused, program: Program) -> int:
    """Returns how many rows of channels a result has for each image."""
    shape = program.specs[key.value].shape
    return math.prod(shape[2:]) if node.layout == "image" else math.prod(shape[1:-1])

"""A model as a list of calls of torch's operators, on values and constants.

A program says what an exported model computes, and ``run`` computes it operator by operator: the same operators on the
same numbers as the model itself, so the same bits. Fused execution, offline models and the ONNX export all begin here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators, recurrence  # noqa: F401  (define the operators)


@dataclass(frozen=True)
class Ref:
    """Stands for a value or a constant among the arguments of a step.

    Attributes:
        name: of the value.
    """

    name: str


class Spec(NamedTuple):
    """What a value is.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        strides: how it lies in memory, in elements. Some operators compute the elements that fill no register in
            another way than the others, so that their last bits depend on it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Spec:
        """Returns what a tensor is."""
        return cls(tuple(int(n) for n in x.shape), x.dtype, tuple(int(n) for n in x.stride()))


@dataclass
class Step:
    """A call of an operator.

    Attributes:
        operator: its name, as "aten.relu.default".
        arguments: as the operator takes them, with a ``Ref`` for each tensor, also in lists.
        keywords: likewise.
        outputs: names of the tensors that it returns; None for one that nothing takes.
    """

    operator: str
    arguments: list[Any]
    keywords: dict[str, Any]
    outputs: list[str | None]

    def inputs(self) -> Iterator[str]:
        """Yields the names of the values and constants that it takes."""
        yield from references([self.arguments, self.keywords])

    @property
    def output(self) -> str:
        """The name of the only tensor that it returns.

        Raises:
            ValueError: if it returns several.
        """
        if len(self.outputs) != 1 or self.outputs[0] is None:
            raise ValueError(f"{self.operator} returns {len(self.outputs)} tensors")
        return self.outputs[0]


@dataclass
class Program:
    """What a model computes for inputs of given shapes.

    Attributes:
        inputs: names of the values that are given.
        outputs: names of the values, or constants, that are returned.
        steps: in an order in which they can be computed; none writes to a tensor that another reads.
        constants: by name.
        specs: of inputs and of what the steps return, by name.
    """

    inputs: list[str]
    outputs: list[str]
    steps: list[Step]
    constants: dict[str, Tensor] = field(default_factory=dict)
    specs: dict[str, Spec] = field(default_factory=dict)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Computes the outputs operator by operator."""
        values: dict[str, Tensor] = {**self.constants, **dict(zip(self.inputs, inputs, strict=True))}
        last = self.last_uses()
        for index, step in enumerate(self.steps):
            run_step(step, values)
            for name in last.get(index, ()):
                values.pop(name, None)
        return self.returned(values)

    def returned(self, values: Mapping[Any, Tensor]) -> tuple[Tensor, ...]:
        """Returns the outputs among values: copies of constants, since callers may write to what they get."""
        return tuple(values[name].clone() if name in self.constants else values[name] for name in self.outputs)

    def last_uses(self) -> dict[int, list[str]]:
        """Returns the values that no step needs after each step, and that are no outputs."""
        last: dict[str, int] = {}
        for index, step in enumerate(self.steps):
            last.update(dict.fromkeys(step.inputs(), index))
            last.update({name: index for name in step.outputs if name is not None})
        found: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in self.outputs and name not in self.constants:
                found.setdefault(index, []).append(name)
        return found

    def check_inputs(self, inputs: Sequence[Tensor], what: str) -> None:
        """Raises unless the inputs are tensors of the program's shapes and dtypes, however they lie in memory.

        Args:
            inputs: what was given.
            what: takes them, for messages.

        Raises:
            ValueError: if there are others.
        """
        wanted = [self.specs[name] for name in self.inputs]
        given = [Spec.of(x) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
        if [each[:2] for each in given] != [each[:2] for each in wanted]:
            raise ValueError(f"{what} takes {_described(wanted)}, got {_described(given)}")


def run_step(step: Step, values: dict[str, Tensor]) -> None:
    """Computes one step; its results join the values."""
    function = find_operator(step.operator)
    result = function(*resolved(step.arguments, values), **resolved(step.keywords, values))
    results = [result] if isinstance(result, Tensor) else result
    for name, each in zip(step.outputs, results, strict=True):
        if name is not None:
            values[name] = each


def find_operator(name: str) -> Callable[..., Any]:
    """Returns the operator of torch of this name.

    Raises:
        ValueError: if there is none.
    """
    if name == "aten.view.default":  # of memory that need not lie as it did where the graph was made
        return torch.ops.aten.reshape.default
    namespace, packet, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError as error:
        raise ValueError(f"this version of torch has no operator {name}") from error


def references(arguments: Any) -> Iterator[str]:
    """Yields the names in arguments, also in lists and dicts."""
    if isinstance(arguments, Ref):
        yield arguments.name
    elif isinstance(arguments, Mapping):
        yield from references(list(arguments.values()))
    elif isinstance(arguments, (list, tuple)):
        for each in arguments:
            yield from references(each)


def resolved(arguments: Any, values: Mapping[str, Tensor]) -> Any:
    """Returns arguments with the tensors themselves."""
    if isinstance(arguments, Ref):
        return values[arguments.name]
    if isinstance(arguments, Mapping):
        return {name: resolved(each, values) for name, each in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return [resolved(each, values) for each in arguments]
    return arguments


def _described(specs: Sequence[Spec | str]) -> str:
    names = [
        each if isinstance(each, str) else f"{str(each.dtype).removeprefix('torch.')} {each.shape}" for each in specs
    ]
    return " and ".join(names) or "nothing"

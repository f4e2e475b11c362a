"""Whether a program from a file is one: its names, its sizes, and what its steps return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .allowed import check_call
from .names import STORED_WEIGHTS
from .program import Program, Spec, Step, find_operator, resolved
from .shapes import returned_by_rule

# Of calls for which there is no rule of shapes, and that no other one is like: each takes half a millisecond.
MAX_DIFFERENT = 1_500
# Of the values that are alive at the same time, and of the constants.
MAX_BYTES = 8 * 2**30


def check_references(program: Program) -> None:
    """Checks that every name is made once, before it is used, and described where it is made.

    Raises:
        ValueError: if one is not, naming it.
    """
    made = set(program.constants)
    described = set()

    def add(name: str, where: str) -> None:
        if name in made:
            raise ValueError(f"{where} makes {name}, which there is already")
        if name not in program.specs:
            raise ValueError(f"{where} makes {name}, which its values do not describe")
        made.add(name)
        described.add(name)

    for name in program.inputs:
        add(name, "its list of inputs")
    for index, step in enumerate(program.steps):
        for name in step.inputs():
            if name not in made:
                raise ValueError(f"its step {index}, {step.operator}, takes {name}, which nothing makes before it")
        for each in step.outputs:
            if each is not None:
                add(each, f"its step {index}, {step.operator},")
    for name in program.outputs:
        if name not in made:
            raise ValueError(f"its output {name} is made by nothing")
    if set(program.specs) != described:
        raise ValueError(f"its values describe {min(set(program.specs) - described)}, which nothing makes")


def check_sizes(program: Program) -> None:
    """Checks that the values which are alive at once fit into ``MAX_BYTES``.

    Raises:
        ValueError: if they do not.
    """
    alive = peak = sum(_bytes(program.specs[name]) for name in program.inputs)
    last = program.last_uses()
    for index, step in enumerate(program.steps):
        alive += sum(_bytes(program.specs[name]) for name in step.outputs if name is not None)
        peak = max(peak, alive)
        alive -= sum(_bytes(program.specs[name]) for name in last.get(index, ()))
    if peak > MAX_BYTES:
        raise ValueError(f"its values take {peak / 2**30:.1f} GiB at once; {MAX_BYTES // 2**30} are the most")


def check_values(program: Program, bounds: list[dict[str, Any]]) -> None:
    """Checks that the steps return what the values are said to be.

    Args:
        program: whose names have been checked.
        bounds: the arguments of its steps by name.

    Raises:
        ValueError: if a step cannot be computed, or returns something else.
    """
    values = {name: _on_meta(program.specs[name]) for name in program.inputs}
    values |= {name: constant.to("meta") for name, constant in program.constants.items()}
    known: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for index, (step, bound) in enumerate(zip(program.steps, bounds, strict=True)):
            try:
                returned = _returned(step, resolved(bound, values), values, known)
                for name, value in zip(step.outputs, returned, strict=True):
                    if name is not None:
                        _check_value(name, program.specs[name], value)
                        values[name] = value
                for argument in STORED_WEIGHTS.get(step.operator, ()):
                    if bound[argument] is not None and not values[bound[argument].name].is_floating_point():
                        _check_weight(program.constants.get(bound[argument].name))
            except Exception as error:  # whatever operators of torch raise for what they cannot take
                lines = str(error).splitlines() or [type(error).__name__]
                raise ValueError(f"its step {index}, {step.operator}: {ascii(lines[0])[1:-1][:200]}") from None


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Returns how many numbers lie between the first and the last of a tensor."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True) if n)


def _bytes(spec: Spec) -> int:
    return max(math.prod(spec.shape), extent(spec.shape, spec.strides)) * spec.dtype.itemsize


def _returned(
    step: Step, bound: Mapping[str, Any], values: Mapping[str, Tensor], known: dict[str, list[Tensor]]
) -> list[Tensor]:
    """Returns what a step returns, on the meta device.

    Args:
        step: to be computed.
        bound: its arguments there, by name.
        values: all that there is.
        known: what the device itself returned for such arguments before; gets what it returns now.
    """
    check_call(step.operator, bound)
    by_rule = returned_by_rule(step.operator, bound)
    if by_rule is not None:
        return by_rule
    key = f"{step.operator} {_told(bound)}"
    if key not in known:
        if len(known) == MAX_DIFFERENT:
            raise ValueError(f"the program has more than {MAX_DIFFERENT} calls that differ in their shapes or numbers")
        keywords = resolved(step.keywords, values)
        if next(step.inputs(), None) is None:
            keywords["device"] = "meta"  # it makes a tensor of nothing
        result = find_operator(step.operator)(*resolved(step.arguments, values), **keywords)
        known[key] = [result] if isinstance(result, Tensor) else list(result)
    return known[key]


def _told(bound: Any) -> Any:
    """Returns arguments with the specs of tensors in their place."""
    if isinstance(bound, Tensor):
        return Spec.of(bound)
    if isinstance(bound, Mapping):
        return {name: _told(each) for name, each in bound.items()}
    return [_told(each) for each in bound] if isinstance(bound, list) else bound


def _on_meta(spec: Spec) -> Tensor:
    return torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device="meta")


def _check_value(name: str, spec: Spec, value: Tensor) -> None:
    if (tuple(value.shape), value.dtype) != spec[:2]:
        dtypes = [str(each).removeprefix("torch.") for each in (value.dtype, spec.dtype)]
        raise ValueError(f"returns {dtypes[0]} {tuple(value.shape)}, but {name} is said to be {dtypes[1]} {spec.shape}")


def _check_weight(weight: Tensor | None) -> None:
    if weight is None:
        raise ValueError("the weight must be a constant")
    if weight.dtype == torch.int32 and (int(weight.min()) < -(2**30) or int(weight.max()) >= 2**30):
        raise ValueError("the weight has numbers of more than 31 bits")

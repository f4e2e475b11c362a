"""A program cut into fusion groups, with what runs between them on the operator backend."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inference.fused import FusedProgram
from ..inference.names import CONVOLUTION, LINEAR
from ..inference.program import Program, Ref, Spec, Step, resolved, run_step
from .core.dumptool import write_value
from .fused_operators import is_supported
from .logs import read_levels

_BACKENDS = {"cnnl": "catch_cnnl_jitouttensor", "cpu": "cpu_jitouttensor"}


class FusionGroup(NamedTuple):
    """Steps that are computed in one call.

    Attributes:
        name: as ``MLUFusionGroup_0``.
        program: the steps, with what they take from outside as inputs.
        fused: what computes them.
    """

    name: str
    program: Program
    fused: FusedProgram


class SegmentedProgram:
    """Computes a program on a card: group by group, and operator by operator between them.

    Args:
        program: of the host's tensors.
        card: number of the card.
        originals: tensors of the card that constants of the program lie on.
        forced: operators that are to be no part of a group.
        in_float: whether the card multiplies float tensors in float.

    Attributes:
        parts: groups and steps, in the order in which they are computed.
    """

    def __init__(
        self, program: Program, card: int, originals: Sequence[Tensor], forced: frozenset[str], in_float: bool
    ) -> None:
        self.program, self.card = program, card
        self.parts: list[FusionGroup | Step] = []
        for part in _arranged(program, forced, in_float):
            self.parts.append(part if isinstance(part, Step) else self._group(part))
        self._constants = self._on_card(originals)
        self._last = self._last_uses()
        self._log()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Computes the outputs, on the card."""
        values: dict[str, Tensor] = {**self._constants, **dict(zip(self.program.inputs, inputs, strict=True))}
        backend = debug_backend()
        for index, part in enumerate(self.parts):
            if isinstance(part, Step):
                run_step(self._of_card(part), values)
            else:
                given = [_host(values[name]) for name in part.program.inputs]
                found = part.fused.run(*given)
                if backend is not None:
                    self._compare(part, given, found, backend)
                values.update(zip(part.program.outputs, (self._bring(each) for each in found), strict=True))
            for name in self._last.get(index, ()):
                values.pop(name, None)
        return [values[name] for name in self.program.outputs]

    def text(self) -> str:
        """Returns it as TorchScript writes graphs, the groups as subgraphs."""
        lines = _text_of_parts(self.program, self.parts)
        for part in self.parts:
            if isinstance(part, FusionGroup):
                lines += _text_of_parts(part.program, part.program.steps, f"with mlu::{part.name} = ")
        return "\n".join(lines)

    def _group(self, steps: list[Step]) -> FusionGroup:
        made = {name for step in steps for name in step.outputs}
        taken = dict.fromkeys(name for step in steps for name in step.inputs() if name not in made)
        inside = {id(step) for step in steps}
        later = {*self.program.outputs}
        later |= {name for step in self.program.steps if id(step) not in inside for name in step.inputs()}
        constants = {name: self.program.constants[name] for name in taken if name in self.program.constants}
        program = Program(
            [name for name in taken if name not in constants],
            [name for step in steps for name in step.outputs if name is not None and name in later],
            steps,
            constants,
            self.program.specs,
        )
        number = sum(isinstance(each, FusionGroup) for each in self.parts)
        return FusionGroup(f"MLUFusionGroup_{number}", program, FusedProgram(program))

    def _on_card(self, originals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns the constants that are needed outside of groups: the card's own tensors, where they are those."""
        needed = {name for step in self.parts if isinstance(step, Step) for name in step.inputs()}
        known = {_place(_host(each)): each for each in originals}
        found: dict[str, Tensor] = {}
        for name, value in self.program.constants.items():
            if name in needed or name in self.program.outputs:
                as_number = value.dim() == 0 and name not in self.program.outputs  # the host's serve everywhere
                own = value if as_number else known.get(_place(value))
                found[name] = self._bring(value) if own is None else own
        return found

    def _bring(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.cnmix_card.card(x, self.card)
        return found

    def _of_card(self, step: Step) -> Step:
        if "device" not in step.keywords:
            return step
        device = torch.device("mlu", self.card)
        return Step(step.operator, step.arguments, {**step.keywords, "device": device}, step.outputs)

    def _compare(self, group: FusionGroup, given: list[Tensor], found: Sequence[Tensor], backend: str) -> None:
        """Writes what a group computed, and what another backend computes of the same."""
        values = dict(zip(group.program.inputs, given, strict=True))
        if backend == "cpu":
            values |= group.program.constants
            for step in group.program.steps:
                _run_in_float(step, values)
        else:
            values = {name: self._bring(each) for name, each in values.items()}
            values |= {name: self._bring(each) for name, each in group.program.constants.items()}
            for step in group.program.steps:
                run_step(self._of_card(step), values)
        name = group.name.replace("_", "")
        for number, (output, result) in enumerate(zip(group.program.outputs, found, strict=True)):
            _write(f"mmouttensor_{name}_{number}", result)
            _write(f"{_BACKENDS[backend]}_{name}_{number}", values[output])

    def _last_uses(self) -> dict[int, list[str]]:
        last: dict[str, int] = {}
        for index, part in enumerate(self.parts):
            ends = [part] if isinstance(part, Step) else part.program.steps
            last.update({name: index for step in ends for name in (*step.inputs(), *step.outputs) if name is not None})
        found: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in self.program.outputs:
                found.setdefault(index, []).append(name)
        return found

    def _log(self) -> None:
        read_levels()
        logger = logging.getLogger("torch_mlu")
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("the graph in fusion groups:\n%s", self.text())
        for part in self.parts:
            if isinstance(part, FusionGroup):
                count = len(part.program.steps)
                logging.getLogger("torch_mlu.magicmind").info(
                    "%s computes %d operator%s", part.name, count, "" if count == 1 else "s"
                )


def debug_backend() -> str | None:
    """Returns which backend ``FUSED_KERNEL_DEBUG`` wants groups to be compared with: "cnnl", "cpu", or None.

    Raises:
        ValueError: if it is another.
    """
    wanted = os.environ.get("FUSED_KERNEL_DEBUG", "").strip()
    if wanted and wanted not in _BACKENDS:
        raise ValueError(f"FUSED_KERNEL_DEBUG={wanted!r} is no backend: take 'cnnl' or 'cpu', or unset it")
    return wanted or None


def _arranged(program: Program, forced: frozenset[str], in_float: bool) -> list[list[Step] | Step]:
    """Cuts a program into groups, each as large as it can be, and single steps between them."""
    ready = {*program.inputs, *program.constants}
    waiting = list(program.steps)
    supported = {id(step): is_supported(step, program, forced, in_float) for step in waiting}
    arranged: list[list[Step] | Step] = []

    def take(of_group: bool) -> list[Step]:
        taken = []
        for step in [*waiting]:
            if supported[id(step)] == of_group and all(name in ready for name in step.inputs()):
                ready.update(name for name in step.outputs if name is not None)
                waiting.remove(step)
                taken.append(step)
        return taken

    while waiting:
        group = take(True)
        arranged += [group] if group else []
        arranged += take(False)
    return arranged


def _run_in_float(step: Step, values: dict[str, Tensor]) -> None:
    """Computes a step as the CPU does, which multiplies floats: the weight's integers times their step."""
    if step.operator not in (LINEAR, CONVOLUTION):
        run_step(step, values)
        return
    x, weight, bias, *rest = resolved(step.arguments, values)
    *_, position = rest[0 if step.operator == LINEAR else 6]
    weight = weight.to(x.dtype) * 2.0**position
    if step.operator == LINEAR:
        values[step.output] = torch.nn.functional.linear(x, weight, bias)
        return
    stride, padding, dilation, groups, transposed, output_padding = rest[:6]
    values[step.output] = torch.convolution(
        x, weight, bias, stride, padding, dilation, transposed, output_padding or [0] * len(stride), groups
    )


def _write(name: str, x: Tensor) -> None:
    made = Path(f".{name}.{os.getpid()}.tmp")
    with made.open("w", encoding="utf-8") as file:
        write_value(file, x, "Tuple", 2)
    made.replace(name)


def _place(x: Tensor) -> Any:
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _host(x: Tensor) -> Tensor:
    view: Tensor = torch.ops.cnmix_card.host(x) if not x.is_cpu else x
    return view


# As TorchScript writes graphs.


def _text_of_parts(program: Program, parts: Sequence[FusionGroup | Step], before: str = "") -> list[str]:
    given = ", ".join(f"%{name} : {_type(program.specs[name])}" for name in program.inputs)
    lines = [f"{before}graph({given}):"]
    for part in parts:
        if isinstance(part, Step):
            namespace, packet = part.operator.split(".")[:2]
            keywords = [f"{name}={_written(value, program.constants)}" for name, value in part.keywords.items()]
            arguments = ", ".join([*(_written(each, program.constants) for each in part.arguments), *keywords])
            outputs, call = part.outputs, f"{namespace}::{packet}({arguments})"
        else:
            outputs = part.program.outputs  # type: ignore[assignment]
            call = f"mlu::{part.name}({', '.join(f'%{name}' for name in part.program.inputs)})"
        made = [f"%{name} : {_type(program.specs[name])}" for name in outputs if name is not None]
        lines.append(f"  {', '.join(made)} = {call}")
    return [*lines, f"  return ({', '.join(f'%{name}' for name in program.outputs)})", ""]


def _type(spec: Spec) -> str:
    kind = {torch.float32: "Float", torch.float16: "Half", torch.uint8: "Byte"}.get(spec.dtype)
    return f"{kind or str(spec.dtype).removeprefix('torch.')}({', '.join(map(str, spec.shape))})"


def _written(value: Any, constants: Mapping[str, Tensor]) -> str:
    if isinstance(value, Ref):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(each, constants) for each in value)}]"
    return repr(value)

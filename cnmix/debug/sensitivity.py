"""What each operand's rounding does to a step, and which operands to widen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import OPERANDS, OperandConfigs
from ..fixed_point import BITS
from ..kernels.profiling import add_listener, remove_listener
from ..nn import module_name, quantizer_sets
from ..rules import matches, no_module_called
from ..tables import format_table
from .comparison import relative_error, show_error
from .operands import use_float_operands
from .steps import Outcome, Steps
from .suggestion import CountedMacs, Suggestion, Width, make_rules, widen


@dataclass(frozen=True)
class Effect:
    """What rounding one operand of one module changes in a step, where all others are float.

    Attributes:
        module: fully qualified name; "" is the model itself.
        operand: input, weight or grad_output, of all products of the module.
        bits: width in this step; the widest, where the module has several products.
        output: relative error of the model's output.
        gradient: relative error of the gradients of all parameters together; None without a backward pass.
    """

    module: str
    operand: str
    bits: int
    output: float | None
    gradient: float | None

    @property
    def error(self) -> float:
        """The error of the gradients, without a backward pass of the output; infinity where it is NaN."""
        error = self.output if self.gradient is None else self.gradient
        return 0.0 if error is None else math.inf if math.isnan(error) else error


@dataclass(frozen=True)
class Sensitivity:
    """The effects of all operands alone, the largest first, and of all together; its text is a table.

    Attributes:
        effects: of each operand of each module.
        output: relative error of the model's output where all are rounded.
        gradient: of the gradients of all parameters together.
    """

    effects: tuple[Effect, ...]
    output: float | None
    gradient: float | None
    _measure: _Measure = field(repr=False, compare=False)

    @property
    def error(self) -> float:
        """What ``suggest`` lowers: the error of the gradients, without a backward pass that of the output."""
        return Effect("", "", 8, self.output, self.gradient).error

    @property
    def modules(self) -> dict[str, float]:
        """The effect of all operands of each module, the largest first, as if they were independent of each other."""
        found: dict[str, float] = {}
        for each in self.effects:
            found[each.module] = math.hypot(found.get(each.module, 0.0), each.error)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def suggest(self, error: float | None = None) -> Suggestion:
        """Finds operands to widen so that the step's error comes down to ``error``, and measures what it then is.

        They are taken in the order of their effects alone, each at the next width, until the step with all of them
        widened, which is run, is as exact as that, or none is left.

        Args:
            error: relative error of the gradients (without a backward pass of the output) to come down to. Default:
                half of the present one.

        Returns:
            The rules, what the step's error was and is, and what they cost. The model is not changed.

        Raises:
            ValueError: for an ``error`` that is no positive number, and without one where the step has none to halve.
                If the model was trained since.
        """
        if error is not None and not (isinstance(error, (int, float)) and 0 < error < math.inf):
            raise ValueError(f"error must be a positive number, such as 0.01 for 1 %, got {error!r}")
        if error is None and self.error == math.inf:
            raise ValueError(
                "the error of the step is infinite or NaN, and has no half: give error=0.01, say, or find what is not "
                "finite with cnmix.debug.detect_nonfinite"
            )
        self._measure.check_model()
        wanted = self.error / 2 if error is None else error
        left = [each for each in self.effects if each.error > 0 and each.bits < BITS[-1]]
        chosen: dict[tuple[str, str], Width] = {}
        reached = self.error
        while reached > wanted and left:
            # Independent errors add up as squares; what that misses the measurement finds.
            rest = [math.hypot(*(each.error for each in left[count:])) for count in range(1, len(left) + 1)]
            count = next((n for n, each in enumerate(rest, 1) if each <= wanted), len(left))
            if chosen:
                count = min(count, max(1, len(chosen) // 2))
            for each in left[:count]:
                chosen[each.module, each.operand] = self._measure.next_width(each)
            left = left[count:]
            reached = self._measure.error_with(chosen)
        before, after = self._measure.macs(chosen)
        return Suggestion(make_rules(self._measure.configs(), chosen), self.error, reached, wanted, before, after)

    def __str__(self) -> str:
        table = [("module", "operand", "width", "error of the output", "error of the gradients")]
        for each in self.effects:
            errors = show_error(each.output), show_error(each.gradient)
            table.append((each.module or "(the model)", each.operand, f"int{each.bits}", *errors))
        table.append(("(all together)", "", "", show_error(self.output), show_error(self.gradient)))
        return format_table(table)


def sensitivity(
    model: nn.Module,
    *example: Any,
    loss: Callable[[Any], Tensor] | None = None,
    modules: Sequence[str] = (),
    **kwargs: Any,
) -> Sensitivity:
    """Finds what rounding each operand of each module does to a step by itself, all others being float.

    It runs a step in float, one with all operands rounded, and one for each operand of each module: three for a Linear.
    Each is one of trial, from the same state, as ``cnmix.debug.compare`` says, and leaves the model as it was.

    Args:
        model: initialized with ``cnmix.initialize``; it runs in the mode that it is in.
        *example: what to call the model with; it gets copies.
        loss: as in ``compare``.
        modules: patterns of fully qualified names, of which one must match, to look at these alone; a name covers all
            below it. Empty: all.
        **kwargs: arguments of the model by name.

    Returns:
        A ``Sensitivity``; print it, or ask it for rules: ``.suggest(error=0.01).save("rules.yaml")``.

    Raises:
        TypeError: if ``modules`` is no list of names.
        ValueError: if a name is not in the model or has no products in fixed point, nothing in the model computes in
            fixed point, or it is frozen for inference.
    """
    if isinstance(modules, str):
        raise TypeError(f"modules must be a list of names, got {modules!r}: write [{modules!r}]")
    steps = Steps(model, example, kwargs, loss)
    names = [name for name, _ in steps.model.named_modules()]
    for pattern in modules:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(no_module_called(pattern, names))
    measure = _Measure(steps)
    everything, bits = measure.rounding(lambda fqn, operand: True)
    for pattern in modules:
        if not any(matches(fqn, pattern) for fqn in bits):
            some = ", ".join(repr(fqn) for fqn in [*bits][:5])
            raise ValueError(f"nothing in {pattern!r} computes in fixed point, as it does in {some}")
    looked_at = [fqn for fqn in bits if not modules or any(matches(fqn, pattern) for pattern in modules)]
    effects = []
    for fqn, operand in itertools.product(looked_at, OPERANDS):
        outcome, _ = measure.rounding(lambda *each, only=(fqn, operand): each == only)
        effects.append(Effect(fqn, operand, bits[fqn][operand], *measure.errors(outcome)))
    effects.sort(key=lambda each: -each.error)
    return Sensitivity(tuple(effects), *measure.errors(everything), measure)


class _Measure:
    """Runs a model's step with some operands rounded, or wider, and holds it against the step in float."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._versions = self._present_versions()
        self._float, _ = self.rounding(lambda fqn, operand: False)

    def _present_versions(self) -> list[int]:
        return [each._version for each in self._steps.model.parameters()]

    def check_model(self) -> None:
        """Raises ValueError if the parameters are others than they were."""
        if self._present_versions() != self._versions:
            raise ValueError("the model was trained since: call cnmix.debug.sensitivity again")

    def rounding(
        self, rounds: Callable[[str, str], bool], wider: Mapping[tuple[str, str], Width] | None = None
    ) -> tuple[Outcome, dict[str, dict[str, int]]]:
        """Runs the step with these operands rounded, and others float; returns the widths by module too."""
        with self._steps.prepared():
            widen(self._steps.model, wider or {})
            sets = [*quantizer_sets(self._steps.model)]
            use_float_operands(self._steps.model, rounds)
            outcome = self._steps.run()
            bits: dict[str, dict[str, int]] = {}
            for name, quantizers in sets:
                found = bits.setdefault(module_name(name), dict.fromkeys(OPERANDS, 0))
                found.update({operand: max(found[operand], width) for operand, width in quantizers.bits.items()})
        return outcome, bits

    def errors(self, outcome: Outcome) -> tuple[float | None, float | None]:
        """Returns the relative errors of the output, and of the gradients."""
        output = relative_error(outcome.outputs, self._float.outputs)
        return output, _of_gradients(outcome.gradients, self._float.gradients)

    def error_with(self, wider: Mapping[tuple[str, str], Width]) -> float:
        """Returns the error of the step with all operands rounded, these to a wider format."""
        outcome, _ = self.rounding(lambda fqn, operand: True, wider)
        return Effect("", "", 8, *self.errors(outcome)).error

    def configs(self) -> dict[str, OperandConfigs]:
        """Returns the settings of the operands of each module, by name."""
        with self._steps.prepared():
            return {module_name(name): quantizers.configs for name, quantizers in quantizer_sets(self._steps.model)}

    def next_width(self, effect: Effect) -> Width:
        """Returns the width to begin with, and the largest, to give an operand more bits than it has."""
        bits = next(each for each in BITS if each > effect.bits)
        return Width(bits, max(bits, self.configs()[effect.module][effect.operand].max_bitwidth))

    def macs(self, wider: Mapping[tuple[str, str], Width]) -> tuple[dict[str, int], dict[str, int]]:
        """Returns the multiply-accumulates of a step by the widths of their operands, before and after."""
        found = []
        for each in ({}, wider):
            with self._steps.prepared():
                widen(self._steps.model, each)
                counted = CountedMacs()
                add_listener(counted)
                try:
                    self._steps.run()
                finally:
                    remove_listener(counted)
            found.append(counted.by_widths)
        return found[0], found[1]


def _of_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float | None:
    if found.keys() != expected.keys():
        return None
    return relative_error(_values(found, expected), expected.values())


def _values(found: Mapping[str, Tensor], order: Iterable[str]) -> list[Tensor]:
    return [found[name] for name in order]

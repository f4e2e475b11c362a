"""One step in float and in fixed point, compared product by product."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ModuleQuantizers, module_name, quantizer_sets
from ..nn.places import place_within
from ..tables import format_table
from .operands import (
    exchanged,
    function_name,
    quantizers_in,
    tensor_arguments,
    use_float_operands,
    with_float_operands,
)
from .steps import Steps

RESULTS = ("output", "grad_input", "grad_weight")

# Whose gradient an argument of a function that multiplies has.
_GRADIENTS = {
    "x": "grad_input",
    "a": "grad_input",
    "query": "grad_input",
    "weight": "grad_weight",
    "b": "grad_weight",
    "key": "grad_weight",
    "value": "grad_weight",
    "w_input": "grad_weight",
    "w_hidden": "grad_weight",
    "w_projection": "grad_weight",
}


@dataclass(frozen=True)
class Errors:
    """Relative errors of a product's results: norm of the difference from float, over the norm of float.

    Attributes:
        output: None where nothing was computed, or the two steps computed tensors of different shapes.
        grad_input: of a function, the gradient of its left operand; of attention, of the query.
        grad_weight: of a function, the gradient of its right operand; of attention, of key and value.
    """

    output: float | None
    grad_input: float | None
    grad_weight: float | None

    def snr(self, result: str) -> float | None:
        """Returns the signal-to-noise ratio of a result, in decibels: 20 dB for each digit that is right."""
        error = getattr(self, result)
        if error is None or math.isnan(error):
            return error
        return math.inf if error == 0 else -20 * math.log10(error) if error < math.inf else -math.inf

    @property
    def worst(self) -> float:
        """The largest error; infinity where one is NaN, 0 where there is none."""
        known = [each for each in (self.output, self.grad_input, self.grad_weight) if each is not None]
        return max((math.inf if math.isnan(each) else each for each in known), default=0.0)


@dataclass(frozen=True)
class ComparedProduct:
    """What fixed point changes in one product, over all calls of a step.

    Attributes:
        name: of the product; of attention or a layer of a recurrent network, which have several, of these together.
        module: fully qualified name of the module that it is in; "" is the model itself.
        own: errors of this product alone, given the operands and the gradient that the step in float has.
        accumulated: errors in the step in fixed point, in which what comes before is in fixed point too.
        operands: errors of this product alone where only one operand is rounded, by its name.
        bits: width of each operand in the step in fixed point.
    """

    name: str
    module: str
    own: Errors
    accumulated: Errors
    operands: dict[str, Errors]
    bits: dict[str, int]

    @property
    def worst_operand(self) -> str | None:
        """Name of the operand whose rounding makes the largest error; None where nothing was rounded."""
        return max(self.operands, key=lambda name: self.operands[name].worst, default=None)


@dataclass(frozen=True)
class Comparison:
    """The products of a step, those with the largest error of their own first; its text is a table.

    Attributes:
        rows: one for each product.
        loss: of the step in fixed point, None where there is none.
        float_loss: of the step in float.
        gradient: relative error of the gradients of all parameters together; None without a backward pass.
        output: relative error of the model's output.
    """

    rows: tuple[ComparedProduct, ...]
    loss: float | None
    float_loss: float | None
    gradient: float | None
    output: float | None

    def __str__(self) -> str:
        heads = [*(f"own {name}" for name in RESULTS), *(f"accumulated {name}" for name in RESULTS)]
        table = [("product", *heads, "worst operand")]
        for row in self.rows:
            cells = [show_error(getattr(each, name)) for each in (row.own, row.accumulated) for name in RESULTS]
            worst, operand = row.worst_operand, "–"
            if worst is not None:
                operand = f"{worst} int{row.bits[worst]} {show_error(row.operands[worst].worst)}"
            table.append((row.name, *cells, operand))
        text = format_table(table)
        if self.loss is not None and self.float_loss is not None:
            text += f"\nloss: {self.loss:.6g} in fixed point, {self.float_loss:.6g} in float"
        for name, error in (("output", self.output), ("gradients of the parameters", self.gradient)):
            if error is not None:
                text += f"\n{name}: {show_error(error)}"
        return text


def show_error(error: float | None) -> str:
    """Returns a relative error, and the signal-to-noise ratio in decibels, as text."""
    if error is None:
        return "–"
    if error == 0 or not math.isfinite(error):
        return f"{error:.2g}"
    return f"{error:.2g} ({-20 * math.log10(error):.0f} dB)"


def compare(model: nn.Module, *example: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Comparison:
    """Runs one step in float and one in fixed point, from the same state, and ranks the products by their error.

    The step in fixed point is the one that the model would take next: in training it measures and widens operands that
    are due. In the step in float every product is of float32 operands, summed in float64; all else is the same, dropout
    included, and at O2 and O3 what flows between products in half types. Errors of int31 are not resolved below
    float32's own 1e-7. A compiled model runs eagerly.

    Afterwards the model, its gradients, buffers, quantizers and torch's random numbers are what they were. It takes the
    memory of two training steps, and of a float32 copy of every product's operands, results and gradients: choose a
    small batch. Where several processes train the model, one may call it alone, between two training steps: it decides
    by its own batch, outside of DistributedDataParallel.

    Args:
        model: initialized with ``cnmix.initialize``; it runs in the mode that it is in.
        *example: what to call the model with; it gets copies.
        loss: returns the scalar to go backwards from, given the model's output. By default the output's ``loss`` where
            it has one, else the sum of all floating tensors in it.
        **kwargs: arguments of the model by name.

    Returns:
        A ``Comparison``; print it.

    Raises:
        ValueError: if nothing in the model computes in fixed point, or it is frozen for inference.
    """
    steps = Steps(model, example, kwargs, loss)
    with steps.prepared():
        rounded = _Calls(_names_in(steps.model), repeats=False)
        fixed_outcome = steps.run(rounded)
        bits = {name: quantizers.bits for name, quantizers in quantizer_sets(steps.model)}
    with steps.prepared():
        use_float_operands(steps.model, lambda fqn, operand: False)
        names = _names_in(steps.model)
        floats = _Calls(names, repeats=True)
        float_outcome = steps.run(floats)
        rows: dict[str, _Row] = {}
        for key, call in floats.found.items():
            row = rows.setdefault(key[0], _Row(call.sets))
            _add(row.accumulated, rounded.found.pop(key, None), call)
            for name, (quantizers, operand) in _operands(call.sets).items():
                _add(row.operands[name], call.rounding(quantizers, operand), call)
            _add(row.own, call.rounding(), call)
    found = [
        ComparedProduct(
            name=name,
            module=module_name(names[row.sets[0]]),
            own=_errors(row.own),
            accumulated=_errors(row.accumulated),
            operands={each: _errors(differences) for each, differences in row.operands.items()},
            bits={each: bits[names[of]][operand] for each, (of, operand) in _operands(row.sets).items()},
        )
        for name, row in rows.items()
    ]
    found.sort(key=lambda each: -each.own.worst)
    return Comparison(
        tuple(found),
        fixed_outcome.loss,
        float_outcome.loss,
        relative_error(fixed_outcome.gradients.values(), float_outcome.gradients.values()),
        relative_error(fixed_outcome.outputs, float_outcome.outputs),
    )


def _names_in(model: nn.Module) -> dict[ModuleQuantizers, str]:
    return {quantizers: name for name, quantizers in quantizer_sets(model)}


def relative_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float | None:
    """Returns the relative error of tensors together; None where there are none, or of other shapes."""
    found, expected = [*found], [*expected]
    if not expected or [each.shape for each in found] != [each.shape for each in expected]:
        return None
    difference = Difference()
    for one, other in zip(found, expected, strict=True):
        difference.add(one, other)
    return difference.relative


class Difference:
    """How far tensors are from what they should be, over all elements of all of them."""

    def __init__(self) -> None:
        self._squared, self._magnitude, self.known = 0.0, 0.0, False

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Takes in one tensor, and what it should be."""
        expected = expected.detach().to(torch.float64)
        self._squared += float((found.detach().to(torch.float64) - expected).square().sum())
        self._magnitude += float(expected.square().sum())
        self.known = True

    @property
    def relative(self) -> float | None:
        """Norm of the difference over the norm of what is expected; None where nothing was taken in."""
        if not self.known:
            return None
        if self._magnitude == 0:
            return 0.0 if self._squared == 0 else math.inf if self._squared > 0 else math.nan
        return math.sqrt(self._squared / self._magnitude)


def _differences() -> dict[str, Difference]:
    return {name: Difference() for name in RESULTS}


@dataclass
class _Row:
    sets: list[ModuleQuantizers]
    own: dict[str, Difference] = field(default_factory=_differences)
    accumulated: dict[str, Difference] = field(default_factory=_differences)
    operands: dict[str, dict[str, Difference]] = field(default_factory=lambda: defaultdict(_differences))


class _Call:
    """One call of a function that multiplies, and what it computed.

    Args:
        apply: computes the function, given it and its arguments.
        function: see above.
        args: its arguments.
        repeats: whether it will be computed ``again``.
    """

    def __init__(self, apply: Callable[..., Any], function: Any, args: tuple[Any, ...], repeats: bool) -> None:
        self._apply, self._function = apply, function
        # Copied before it computes: what calls it may write over them later.
        self._args = [
            each.detach().clone().requires_grad_(each.requires_grad) if isinstance(each, Tensor) else each
            for each in (args if repeats else ())
        ]
        self._draws = torch.get_rng_state()
        self._roles = [_GRADIENTS.get(name) for name in tensor_arguments(function, args)]
        self._grad_outputs: tuple[Tensor | None, ...] = ()
        self.results: dict[str, list[Tensor]] = {name: [] for name in RESULTS}
        self.sets = [*quantizers_in(*args)]

    def watch(self, result: Any) -> None:
        """Keeps the result, and the gradients when they come."""
        first = result[0] if isinstance(result, tuple) else result
        self.results["output"] = [first.detach().clone()]
        if first.grad_fn is not None:
            first.grad_fn.register_hook(self._keep_gradients)

    def _keep_gradients(self, found: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
        self._grad_outputs = tuple(None if each is None else each.detach().clone() for each in given)
        self._keep(found)

    def _keep(self, gradients: Iterable[Tensor | None]) -> None:
        for role, each in zip(self._roles, gradients, strict=True):
            if role is not None and each is not None:
                self.results[role].append(each.detach().clone())

    def rounding(self, only: ModuleQuantizers | None = None, operand: str = "") -> _Call:
        """Computes the function once more, of the same operands and gradients, with its operands rounded, or one."""
        if only is None:
            changed = {id(each): with_float_operands(each, lambda name: True) for each in self.sets}
        else:
            changed = {
                id(each): with_float_operands(each, lambda name, of=each: of is only and name == operand, counts=False)  # type: ignore[misc]
                for each in self.sets
            }
        return self._again(lambda each: changed[id(each)])

    def _again(self, exchange: Callable[[ModuleQuantizers], ModuleQuantizers]) -> _Call:
        args = tuple(exchanged(each, exchange) for each in self._args)
        other = _Call(self._apply, self._function, args, repeats=False)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._draws)
            result = self._apply(self._function, *args)
        results = result if isinstance(result, tuple) else (result,)
        other.results["output"] = [results[0].detach()]
        if self._grad_outputs:
            pairs = [pair for pair in zip(results, self._grad_outputs, strict=True) if pair[1] is not None]
            tensors = [each for each in args if isinstance(each, Tensor)]
            wanted = [each for each in tensors if each.requires_grad]
            gradients = torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            by_tensor = {id(each): gradient for each, gradient in zip(wanted, gradients, strict=True)}
            other._keep([by_tensor.get(id(each)) for each in tensors])
        return other


class _Calls:
    """Watches the products of a step, and keeps them by name and number of the call; ``repeats`` as in ``_Call``."""

    def __init__(self, names: Mapping[ModuleQuantizers, str], repeats: bool) -> None:
        self._names, self._repeats = names, repeats
        self.found: dict[tuple[str, int], _Call] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def __call__(self, apply: Callable[..., Any], function: Any, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return apply(function, *args)
        names = {each: self._names.get(each) for each in quantizers_in(*args)}
        if None in names.values():  # a product of another model, as of a teacher's in the loss
            return apply(function, *args)
        call = _Call(apply, function, args, self._repeats)
        result = apply(function, *args)
        call.watch(result)
        # As this model has it, whose parts may have been initialized by themselves; there its own product is "".
        name = function_name([name if name and module_name(name) else each.fqn for each, name in names.items()])
        self.found[name, self._counts[name]] = call
        self._counts[name] += 1
        return result


def _add(differences: dict[str, Difference], found: _Call | None, expected: _Call) -> None:
    """Adds the difference of a call from the same one in float."""
    if found is None:
        return
    for name, difference in differences.items():
        pairs = zip(found.results[name], expected.results[name], strict=False)
        for one, other in pairs:
            if one.shape == other.shape:
                difference.add(one.cpu(), other.cpu())


def _operands(sets: list[ModuleQuantizers]) -> dict[str, tuple[ModuleQuantizers, str]]:
    """Returns the operands of a function that multiplies by name, with its part of several products."""
    found = {}
    for quantizers in sets:
        part = "" if len(sets) == 1 else f"{place_within(quantizers.fqn).rpartition('.')[2]} "
        found.update({part + operand: (quantizers, operand) for operand, _ in quantizers})
    return found


def _errors(differences: dict[str, Difference]) -> Errors:
    return Errors(**{name: difference.relative for name, difference in differences.items()})

"""What a forward and a backward pass multiplied, on the core and in float, counted by ``torch.profiler``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from . import float_products
from .kernels import profiling
from .nn import QuantizedModule
from .nn.classes import plain_class
from .nn.function_calls import function_products
from .overview import why_float
from .registry import unwrap
from .tables import format_table
from .trial import compiled_modules, copied, total_of, trial

_MODULE, _BACKWARD = "cnmix module ", "cnmix backward pass"
_NODE = "autograd::engine::evaluate_function: "
_OPERATION = 0  # the profiler's scope of operations in forward direction


@dataclass(frozen=True)
class ExecutedProduct:
    """Products of one kind, at one place.

    Attributes:
        place: name of the product, or fully qualified name of the module whose forward pass multiplied, or whose
            backward pass this is; "" is the model itself.
        executed: the kernel of the core, as "matmul", or torch's operation, as "aten::bmm".
        phase: "forward", "backward", or "recompute", a forward pass that activation checkpointing repeats.
        calls: how many.
        macs: multiply-accumulates of them all; None where they are not known.
        share: of those of all products, where they are known.
        bits: widths of the two operands on the core; None in float.
        reason: why it is float; "" on the core.
    """

    place: str
    executed: str
    phase: str
    calls: int
    macs: int | None
    share: float | None
    bits: tuple[int, int] | None
    reason: str


@dataclass(frozen=True)
class ExecutedProducts:
    """The products that were executed, in the order of their first calls; its text is a table."""

    rows: tuple[ExecutedProduct, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all products, as far as they are known."""
        return sum(row.macs or 0 for row in self.rows)

    @property
    def share(self) -> float | None:
        """Share of the multiply-accumulates that ran on the core; None where nothing multiplied."""
        return sum(row.macs or 0 for row in self.rows if row.bits) / self.macs if self.macs else None

    @property
    def floating(self) -> tuple[ExecutedProduct, ...]:
        """The products in float."""
        return tuple(row for row in self.rows if not row.bits)

    @property
    def unknown(self) -> tuple[ExecutedProduct, ...]:
        """The products in float whose multiply-accumulates are not known, and not in any share."""
        return tuple(row for row in self.rows if row.macs is None)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("place", "executed", "pass", "calls", "MACs", "share", "operands", "")]
        for row in self.rows:
            macs = "unknown" if row.macs is None else f"{row.macs:,}"
            share = "–" if row.share is None else f"{row.share:.1%}"
            operands = "float" if row.bits is None else " × ".join(f"int{bits}" for bits in row.bits)
            place = row.place or "(the model)"
            table.append((place, row.executed, row.phase, f"{row.calls}", macs, share, operands, row.reason))
        text = format_table(table)
        if self.share is not None:
            text += f"\n{self.share:.1%} of {self.macs:,} executed multiply-accumulates ran on the core"
        if self.unknown:
            text += f"\nnot counted: {sum(row.calls for row in self.unknown)} calls of operations without a formula"
        return text


def executed_products(
    model: nn.Module, *example: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any
) -> ExecutedProducts:
    """Runs a forward and a backward pass under ``torch.profiler``, and lists every product that they executed.

    The model runs in the mode that it is in: call ``model.train()`` for a training step. Parameters and inputs that
    need no gradient get none. Under ``torch.no_grad()`` there is a forward pass only. A compiled model, or part of one,
    runs eagerly, with the products that it has when compiled.

    Afterwards parameters, their gradients, buffers, quantizers and torch's random numbers are what they were. Buffers
    and the quantizers' numbers are copied for that, parameters are not: beside the model it takes the memory of a
    training step, in which gradients that are there already wait beside the new ones. Attributes that a forward pass of
    your own changes stay changed.

    Counted are matrix products, convolutions, attention and recurrent layers, each once: as a kernel of the core, or
    as the outermost operation of torch whose multiply-accumulates are known. What multiplies by its name, and has no
    formula, is listed as unknown. Not seen are products of elements, as ``(x * w).sum()``, scans, decompositions of
    matrices (``torch.linalg``), and what extensions multiply in operations whose names do not say so.

    Args:
        model: converted or not.
        *example: what to call the model with; it gets copies.
        loss: returns the scalar to go backwards from, given the model's output. By default the output's ``loss`` where
            it has one, else the sum of all floating tensors in it.
        **kwargs: arguments of the model by name.

    Returns:
        An ``ExecutedProducts``; print it, or ``assert counted.share >= 0.99, counted``.

    Raises:
        RuntimeError: if a profiler is on already.
        ValueError: if the model has lazy modules without weights yet.
    """
    if torch.autograd._profiler_enabled():
        raise RuntimeError("a profiler is on, and torch runs one at a time: call executed_products outside of it")
    compiled = compiled_modules(model)
    whole, model = model, unwrap(model)
    with trial(whole, loss), _ranges(model), profile(record_shapes=True) as profiled:
        args, named = copied((example, kwargs))
        output = model(*args, **named)
        total = total_of(output) if loss is None else loss(output)
        if total is not None and total.requires_grad:
            with record_function(_BACKWARD):
                total.backward()
    counts = _Counts()
    for event in profiled.function_events or ():
        if event.cpu_parent is None:
            counts.add(event, _Context(None, "forward"))
    why = _reasons(model, compiled)
    macs = sum(count.macs or 0 for count in counts.found.values())
    return ExecutedProducts(
        tuple(
            ExecutedProduct(
                "(outside of the model)" if key.place is None else _in_state(key.place, model),
                key.executed,
                key.phase,
                count.calls,
                count.macs,
                count.macs / macs if count.macs is not None and macs else None,
                key.bits,
                "" if key.bits else why(key.place),
            )
            for key, count in counts.found.items()
        )
    )


def _in_state(name: str, model: nn.Module) -> str:
    """Returns a product's name as the state has it, where messages say the class of the model for the model itself."""
    root = plain_class(model).__name__
    return name.removeprefix(root) if name == root or name.startswith(f"{root}..") else name


class _Context(NamedTuple):
    """Where an event is: the innermost module, None outside of the model, and the pass."""

    place: str | None
    phase: str


class _Key(NamedTuple):
    place: str | None
    executed: str
    phase: str
    bits: tuple[int, int] | None
    known: bool


@dataclass
class _Count:
    calls: int = 0
    macs: int | None = None


class _Counts:
    """Adds up the products in a tree of events, in the order of time.

    A node of the graph has the number that its forward operation was given, by which its module is found again.
    """

    def __init__(self) -> None:
        self.found: dict[_Key, _Count] = {}
        self._places: dict[tuple[int, int], str | None] = {}

    def add(self, event: Any, context: _Context, counted: bool = False) -> bool:
        """Adds an event and those inside of it; returns whether there was a product.

        Args:
            event: of the profiler.
            context: where it is.
            counted: whether it is inside of a product that is counted.
        """
        context = self._enter(event, context)
        on_core = profiling.parse(event.name)
        arguments = event.concrete_inputs or ()
        macs = on_core.macs if on_core else float_products.count(event.name, event.input_shapes or (), arguments)
        if not counted and on_core:
            self._note(_Key(on_core.name or context.place, on_core.kind, context.phase, on_core.bits, True), macs)
        elif not counted and macs is not None:
            self._note(_Key(context.place, event.name, context.phase, None, True), macs)
        inside = [self.add(child, context, counted or macs is not None) for child in event.cpu_children]
        if counted or macs is not None or any(inside):
            return True
        if event.scope == _OPERATION and float_products.multiplies(event.name):
            self._note(_Key(context.place, event.name, context.phase, None, False), None)
            return True
        return False

    def _enter(self, event: Any, context: _Context) -> _Context:
        """Returns where the inside of an event is, and keeps the place of the nodes that it makes."""
        if event.name.startswith(_MODULE):
            return context._replace(place=event.name.removeprefix(_MODULE))
        if event.name == _BACKWARD:
            return context._replace(phase="backward")
        if event.name.startswith(_NODE):
            return _Context(self._places.get((event.fwd_thread, event.sequence_nr)), "backward")
        if event.sequence_nr >= 0 and event.scope == _OPERATION:
            # Several have the number of the node that comes next: the last of them makes it.
            self._places[event.thread, event.sequence_nr] = context.place
            if context.phase == "backward":
                return context._replace(phase="recompute")
        return context

    def _note(self, key: _Key, macs: int | None) -> None:
        count = self.found.setdefault(key, _Count())
        count.calls += 1
        if macs is not None:
            count.macs = (count.macs or 0) + macs


def _reasons(model: nn.Module, compiled: set[nn.Module]) -> Callable[[str | None], str]:
    """Returns what says why a product at a place is float."""
    modules = dict(model.named_modules())
    of_module = why_float(model)

    def why(place: str | None) -> str:
        if place is None:
            return "outside of the model's forward pass"
        module = modules[place]
        name = plain_class(module).__name__
        if isinstance(module, QuantizedModule):
            return f"beside the products of {name}"
        if module in compiled and function_products(module) is not None:
            return f"called in {name}.forward, which is compiled: functions stay float there"
        if function_products(module) is None:
            return of_module(module)
        return f"called in {name}.forward with constants, with another dtype, or a function that is not converted"

    return why


@contextmanager
def _ranges(model: nn.Module) -> Iterator[None]:
    """Makes every call of a module a range with its name.

    By hooks of all modules, as torch's transformer layers take another way where they have hooks of their own.
    """
    names = {module: fqn for fqn, module in model.named_modules()}
    entered: list[record_function] = []

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            entered.append(record_function(_MODULE + names[module]))
            entered[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in names:
            entered.pop().__exit__(None, None, None)

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

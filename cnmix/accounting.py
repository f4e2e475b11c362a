"""What a forward and a backward pass multiplied, on the core and in float, counted by ``torch.profiler``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from . import float_products
from .kernels import profiling
from .nn import QuantizedModule, quantizers_of
from .nn.classes import plain_class
from .nn.function_calls import function_products, set_function_products
from .nn.places import ATTRIBUTES, detach
from .overview import why_float
from .registry import unwrap
from .tables import format_table

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
    compiled = _compiled(model)
    model = unwrap(model)
    lazy = next((fqn for fqn, each in model.named_parameters() if is_lazy(each)), None)
    if lazy is not None:
        raise ValueError(f"{lazy!r} has no shape yet, and a forward pass would give it one: run one first")
    with _unchanged(model), _in_float(compiled), _eagerly(), _ranges(model), profile(record_shapes=True) as profiled:
        args, named = _copied((example, kwargs))
        output = model(*args, **named)
        total = _sum(output) if loss is None else loss(output)
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


def _compiled(model: nn.Module) -> set[nn.Module]:
    """Returns the modules that are compiled, and those in them."""
    roots = [each for each in model.modules() if getattr(each, "_compiled_call_impl", None) is not None]
    roots += [each for each in model.modules() if isinstance(getattr(each, "_orig_mod", None), nn.Module)]
    return {inside for root in roots for inside in root.modules()}


@contextmanager
def _in_float(modules: set[nn.Module]) -> Iterator[None]:
    """Has the functions that these modules call multiply in float, as they do where they are compiled."""
    before = [(module, products) for module in modules if (products := function_products(module)) is not None]
    try:
        for module, _ in before:
            set_function_products(module, None)
        yield
    finally:
        for module, products in before:
            set_function_products(module, products)


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


def _eagerly() -> AbstractContextManager[Any]:
    """Runs compiled functions eagerly: in a graph operations are fused, and modules have no hooks."""
    used = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # from torch 2.6 on
    return torch.compiler.set_stance("force_eager") if used else nullcontext()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts aside what a training step changes, and puts it back."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    # What is to happen to a new gradient, as an optimizer's step.
    hooks = [(each, dict(each)) for p in parameters if (each := p._post_accumulate_grad_hooks) is not None]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    quantizers = [
        (module, {name: vars(module)[name] for name in ATTRIBUTES if name in vars(module)})
        for module in model.modules()
        if not any(each.frozen for _, each in quantizers_of(module))
    ]
    with torch.random.fork_rng(devices=[]):
        try:
            copies = copy.deepcopy([originals for _, originals in quantizers])  # together, for what they share
            for (module, _), copied in zip(quantizers, copies, strict=True):
                vars(module).update(copied)
            for parameter in parameters:
                parameter.grad = None
            for each, _ in hooks:
                each.clear()
            yield
        finally:
            for module, originals in quantizers:
                detach(module)
                vars(module).update(originals)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for each, before in hooks:
                each.update(before)
            for module, before in buffers:
                module._buffers.update(before)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):  # others keep the counter of their versions
                        buffer.copy_(value)


def _copied(values: Any) -> Any:
    """Copies the tensors in nested tuples, lists and dicts; the model's call may change them, and so may gradients."""
    known: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            known[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        return known[id(value)]

    return tree_map(copied, values)


def _sum(output: Any) -> Tensor | None:
    """Returns a scalar to go backwards from; None where nothing in the output needs a gradient."""
    loss = getattr(output, "loss", None)
    found = [each.sum() for each in _tensors(output if loss is None else loss) if each.requires_grad]
    return torch.stack(found).sum() if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors([*value.values()])
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)

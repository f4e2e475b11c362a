"""Forward passes that activation checkpointing repeats within a backward pass, and which calls they repeat.

A repeated forward pass must quantize as the first one did: it counts no step, and takes the formats and random draws of
its own call, whatever has moved since. A checkpointed part of a model may call a module several times, and there may be
several parts, computed again in any order. So calls are kept with their part, as long as that is kept itself.

What stands for a part differs: the kind of checkpointing that is not reentrant has a frame, which its hooks for saved
tensors hold in the first pass and again in the repeated one; the reentrant kind, whose first pass runs without
gradients, has the context of its autograd function, which is on the stack both times.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils import checkpoint

from ..fixed_point import FixedPoint
from ..sequence import SequenceQuantizer

# Under these names the hooks of torch.utils.checkpoint hold the frame: in the first pass, and, weakly, in the repeated.
_FIRST, _REPEATED = "frame", "target_frame_ref"


class FirstPass(NamedTuple):
    """One forward pass of a module in training.

    Attributes:
        bits: width of the input.
        position: of the input; None where each matrix of a batch has its own, or it is not known.
        step: the step that numbers the input's random draws.
        weight: the integers of the weight; of another right operand, which is computed again, width, position and step.
        sequence: what quantized the input, where that came time step by time step.
    """

    bits: int
    position: int | None
    step: int
    weight: FixedPoint | tuple[int, int | None, int]
    sequence: SequenceQuantizer | None = None


class Calls:
    """The calls of one module in checkpointed parts."""

    def __init__(self) -> None:
        self._by_part: weakref.WeakKeyDictionary[Any, _Part] = weakref.WeakKeyDictionary()

    def add(self, part: Any, call: FirstPass) -> None:
        """Keeps a call of a first pass."""
        self._by_part.setdefault(part, _Part()).calls.append(call)

    def next(self, part: Any) -> FirstPass | None:
        """Returns the call that comes next as this part is repeated, None where it is not known."""
        known = self._by_part.get(part)
        return None if known is None else known.next(current_backward())

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:  # a copy has no graphs
        return Calls, ()


class _Part:
    """The calls of one module in one part, in their order, and how far they have been repeated."""

    def __init__(self) -> None:
        self.calls: list[FirstPass] = []
        self._backward, self._next = -1, 0

    def next(self, backward: int) -> FirstPass | None:
        if backward != self._backward:  # a graph that is kept may be gone through again
            self._backward, self._next = backward, 0
        self._next += 1
        return self.calls[self._next - 1] if self._next <= len(self.calls) else None


def current_backward() -> int:
    """Returns the id of the backward pass that this thread is in, -1 outside of one."""
    return torch._C._current_graph_task_id()


def saved_tensor_hooks() -> Any:
    """Returns the hooks for saved tensors that are in force, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def part_of_hooks(hooks: Any, repeated: bool) -> Any:
    """Returns the part whose hooks these are, in its first or repeated pass; None for hooks of other kinds."""
    pack = inspect.unwrap(hooks[0])
    code, cells = getattr(pack, "__code__", None), getattr(pack, "__closure__", None)
    if code is None or cells is None:
        return None
    name = _REPEATED if repeated else _FIRST
    found = dict(zip(code.co_freevars, cells, strict=True)).get(name)
    value = None if found is None else found.cell_contents
    if repeated and isinstance(value, weakref.ref):
        value = value()
    return value if isinstance(value, checkpoint._CheckpointFrame) else None


def reentrant_part() -> Any:
    """Returns the part of the reentrant kind that is being computed, in its first pass or again; None outside of one.

    A first pass whose inputs need no gradient is none: it runs under ``torch.no_grad``, or no backward pass follows.
    """
    first, again = checkpoint.CheckpointFunction.forward.__code__, checkpoint.CheckpointFunction.backward.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is again or frame.f_code is first:
            context = frame.f_locals["ctx"]
            return context if frame.f_code is again or any(context.needs_input_grad) else None
        frame = frame.f_back
    return None


def first_pass(training: bool) -> Any:
    """Returns the part of either kind whose first pass this is, None outside of one.

    Args:
        training: whether the module that asks is in training: nothing is checkpointed without gradients else.
    """
    if current_backward() != -1:
        return None
    if not torch.is_grad_enabled():
        return reentrant_part() if training else None
    hooks = saved_tensor_hooks()
    return None if hooks is None else part_of_hooks(hooks, False)


def replace_repetition(part: Any, replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Has a part be repeated by what ``replace`` returns for what would have repeated it."""
    name = "recompute_fn" if isinstance(part, checkpoint._CheckpointFrame) else "run_function"
    setattr(part, name, replace(getattr(part, name)))


def in_reentrant_backward() -> bool:
    """Whether this is the backward pass of one part of the reentrant kind, which runs within that of the whole."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is checkpoint.CheckpointFunction.backward.__code__:
            return True
        frame = frame.f_back
    return False

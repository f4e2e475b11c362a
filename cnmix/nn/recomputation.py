"""Forward passes that activation checkpointing repeats within a backward pass, and which calls they repeat.

A repeated forward pass must quantize as the first one did: it counts no step, and takes the formats and random draws of
its own call, whatever has moved since. In a part of a model that is checkpointed a module may be called several times,
and there may be several such parts. Parts come back in reverse order, the calls within one in their own.

Both kinds of checkpointing are recognised by what they leave to see: the kind that is not reentrant sets hooks for
saved tensors, other ones for each part; the reentrant kind, whose first pass is without gradients, is on the stack.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from types import FrameType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from ..fixed_point import FixedPoint

# Calls of the reentrant kind to keep: no graph refers to them, and for some no backward pass may come.
_MOST_KEPT = 64


class Call:
    """One forward pass of a module in training.

    Attributes:
        input: width and position of the input, and the step that numbers its random draws.
        weight: the integers of the weight.
        part: what all calls in one checkpointed part have in common, and no others; None outside of checkpointing: the
            hooks for saved tensors, or the context of the reentrant kind.
        backward: id of the backward pass that has used the call, -1 before one has.
    """

    __slots__ = ("__weakref__", "backward", "input", "part", "weight")

    def __init__(self, input: tuple[int, int, int], weight: FixedPoint, reentrant: Any = None) -> None:
        self.input = input
        self.weight = weight
        self.part = _hooks_in_force() if reentrant is None else reentrant
        self.backward = -1


class Calls:
    """The calls of a module that a backward pass may come for, in their order."""

    def __init__(self) -> None:
        self._calls: list[weakref.ref[Call]] = []
        self._kept: deque[Call] = deque(maxlen=_MOST_KEPT)
        self._repeating: tuple[Any, Any] = (None, None)  # the part as it is repeated, and as it was

    def add(self, call: Call, keep: bool) -> None:
        """Takes a call, which is known as long as something refers to it or, where it is to be kept, for many calls."""
        self._calls = [reference for reference in self._calls if reference() is not None]
        self._calls.append(weakref.ref(call))
        if keep:
            self._kept.append(call)

    def find(self) -> Call | None:
        """Returns the call that this forward pass, within a backward pass, repeats; None where it is not known."""
        backward = current_backward()
        unused = [call for reference in self._calls if (call := reference()) is not None and call.backward != backward]
        if not unused:
            return None
        now = _hooks_in_force() or reentrant_checkpoint()
        if self._repeating[0] is not now:
            parts = [call.part for call in unused]
            self._repeating = now, now if now in parts else parts[-1]  # reentrant: the same in both passes
        part = self._repeating[1]
        found = unused[-1] if part is None else next((call for call in unused if call.part is part), unused[-1])
        found.backward = backward
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_calls": [], "_kept": deque(maxlen=_MOST_KEPT), "_repeating": (None, None)}


def current_backward() -> int:
    """Returns the id of the backward pass that this thread is in, -1 outside of one."""
    return torch._C._current_graph_task_id()


def saved_tensor_hooks() -> Any:
    """Returns the hooks for saved tensors that are in force, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def reentrant_checkpoint() -> Any:
    """Returns the context of the reentrant checkpoint that is being computed, in its first pass or again; or None."""
    codes = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in codes:
            return frame.f_locals["ctx"]
        frame = frame.f_back
    return None


def _hooks_in_force() -> Any:
    hooks = saved_tensor_hooks()
    return None if hooks is None else weakref.ref(hooks[0])  # one object for one function, another once that is gone

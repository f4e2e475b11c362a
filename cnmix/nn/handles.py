"""What a compiled graph needs of quantizers: a number to find them by, and a place for integers that it cannot take."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .quantizers import ModuleQuantizers

# Forward passes whose integers may wait for a backward pass.
_MOST_WAITING = 64

# Operators of torch take tensors and numbers: a compiled graph knows its quantizers by number. Weak, so that nothing
# lives longer for it.
_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, ModuleQuantizers] = weakref.WeakValueDictionary()


class WaitingIntegers:
    """Integers of input and weight that wait for a backward pass, where a compiled graph could not take them."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}
        self._count = 0

    def put(self, integers: tuple[Tensor, Tensor]) -> int:
        """Keeps the integers of input and weight for a backward pass; returns the number to fetch them with."""
        self._count += 1
        self._waiting[self._count] = integers
        while len(self._waiting) > _MOST_WAITING:  # of forward passes that no backward pass followed
            del self._waiting[min(self._waiting)]
        return self._count

    def take(self, number: int, fqn: str) -> tuple[Tensor, Tensor]:
        """Returns what ``put`` kept.

        Raises:
            RuntimeError: if it is gone: a backward pass ran a second time, or very many forward passes came between.
        """
        if number not in self._waiting:
            raise RuntimeError(
                f"the integers of a forward pass of {fqn!r} are gone: run the backward pass once, soon after it"
            )
        return self._waiting.pop(number)


def register(quantizers: ModuleQuantizers) -> Tensor:
    """Returns a new handle for these quantizers."""
    handle = next(_handles)
    _by_handle[handle] = quantizers
    return torch.tensor(handle, device="cpu")


def find_quantizers(handle: int) -> ModuleQuantizers:
    """Returns the quantizers with this handle.

    Raises:
        RuntimeError: if their module is gone.
    """
    quantizers = _by_handle.get(handle)
    if quantizers is None:
        raise RuntimeError("a compiled graph ran whose cnmix module is gone: compile the model again")
    return quantizers

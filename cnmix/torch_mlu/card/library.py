"""What Python calls of the card's library."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import NamedTuple

from .sources import build

_SPEAK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class Memory(NamedTuple):
    """Memory of one card.

    Attributes:
        allocated: bytes that its tensors have now.
        peak: the most that they had since the process began, or since ``reset_peak``.
        allocations: made so far.
    """

    allocated: int
    peak: int
    allocations: int


class Library:
    """The card's library, loaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build()))
        self._say = _SPEAK(_warn)  # kept: the library calls it

    def register(self, cards: int) -> None:
        """Registers device, memory and operators with PyTorch; once in a process."""
        self._library.cnmix_card_register(cards, self._say)

    def set(self, cards: int, strict: bool, fixed_point: bool, memory: int) -> None:
        """Sets the number of cards, strict mode, whether float tensors are multiplied as int31, and a card's bytes."""
        self._library.cnmix_card_set(cards, strict, fixed_point, ctypes.c_int64(memory))

    def current(self) -> int:
        """Returns the current card of this thread."""
        return int(self._library.cnmix_card_current())

    def memory(self, card: int) -> Memory:
        """Returns the memory of a card, in bytes."""
        counts = (ctypes.c_int64 * 3)()
        self._library.cnmix_card_memory(card, counts)
        return Memory(*counts)

    def reset_peak(self, card: int) -> None:
        """Lets the peak begin at what is allocated now."""
        self._library.cnmix_card_reset_peak(card)

    def exchange(self, card: int) -> int:
        """Makes this the thread's current card, and returns the one before. The card must exist."""
        return int(self._library.cnmix_card_exchange(card))


def _warn(text: bytes) -> None:
    logging.getLogger("torch_mlu").warning(text.decode())


@functools.cache
def library() -> Library:
    """Returns the library; compiles it first where that is needed."""
    return Library()

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
        self._library = _load()
        self._library.cnmix_card_failure.restype = ctypes.c_char_p
        self._say = _SPEAK(_warn)  # kept: the library calls it

    def register(self) -> None:
        """Registers device, memory and operators with PyTorch; once in a process.

        Raises:
            RuntimeError: if PyTorch refuses them.
        """
        self._checked(self._library.cnmix_card_register(self._say))

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
        """Makes this the thread's current card, and returns the one before.

        Raises:
            RuntimeError: if there is no such card.
        """
        return self._checked(self._library.cnmix_card_exchange(card))

    def _checked(self, result: int) -> int:
        if result < 0:
            raise RuntimeError(self._library.cnmix_card_failure().decode())
        return result


def _load() -> ctypes.CDLL:
    path = build()
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # A disk that was full, or another system's compiler and libraries on the same home: once more.
        try:
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(build()))
        except OSError as error:
            raise RuntimeError(
                f"the compiled card cannot be loaded: {error}. Delete {path}, or set XDG_CACHE_HOME to another folder"
            ) from error


def _warn(text: bytes) -> None:
    logging.getLogger("torch_mlu").warning(text.decode())


@functools.cache
def library() -> Library:
    """Returns the library; compiles it first where that is needed."""
    return Library()

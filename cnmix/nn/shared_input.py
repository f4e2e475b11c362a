"""The integers of an input that several modules get one after the other."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from ..fixed_point import FixedPoint


class LatestInput:
    """The input that was quantized last in a model, which the next module may get as well (query, key and value).

    Sharing its integers saves quantizing it again, and keeping it more than once for the backward passes. Like
    autograd, it trusts the version counter of a tensor that an operation computed.
    """

    def __init__(self) -> None:
        self._latest: tuple[weakref.ref[Tensor], tuple[Any, ...], FixedPoint] | None = None

    def find(self, x: Tensor, form: tuple[Any, ...]) -> FixedPoint | None:
        """Returns the integers of ``x`` in this form, where they are known."""
        latest = self._latest  # once: another thread may replace it
        return latest[2] if latest is not None and latest[0]() is x and latest[1] == form else None

    def keep(self, x: Tensor, form: tuple[Any, ...], integers: FixedPoint) -> None:
        """Takes the place of the one before."""
        self._latest = weakref.ref(x, self._forget), form, integers

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._latest is not None and self._latest[0] is gone:
            self._latest = None

    def __reduce__(self) -> tuple[type[LatestInput], tuple[()]]:
        return LatestInput, ()

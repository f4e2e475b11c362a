"""``torch.backends.mlufusion``: whether a recurrent layer computes all its gates in one product, or one for each.

The results are the same. It governs the recurrent layers that cnmix has converted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ...nn.recurrent import _Recurrent as Recurrent


class _MluFusion(ModuleType):
    @property
    def enabled(self) -> bool:
        """Whether all gates are computed in one product."""
        return Recurrent.fused

    @enabled.setter
    def enabled(self, flag: bool) -> None:
        Recurrent.fused = bool(flag)


def set_flags(flag: bool) -> tuple[bool]:
    """Sets whether all gates are computed in one product, and returns what was set before, in a tuple."""
    before = Recurrent.fused
    Recurrent.fused = bool(flag)
    return (before,)


@contextmanager
def flags(enabled: bool = False) -> Iterator[None]:
    """Sets it within ``with``."""
    before = set_flags(enabled)
    try:
        yield
    finally:
        set_flags(*before)


sys.modules[__name__].__class__ = _MluFusion

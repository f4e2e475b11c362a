"""Who watches the products of tensors on a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar

from torch import Tensor

ProductObserver = Callable[[str, str, Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, int]], None]

product_observers: ContextVar[tuple[ProductObserver, ...]] = ContextVar("product_observers", default=())

"""Automatic mixed precision under the vendor's name, ``torch.mlu.amp``."""

from __future__ import annotations

from typing import Any

import torch


class autocast(torch.autocast):
    """``torch.autocast`` of the cards.

    Args:
        enabled: whether it does anything.
        dtype: float16 or bfloat16.
        cache_enabled: whether a weight is cast once within the block.
    """

    def __init__(self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True) -> None:
        super().__init__("mlu", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` of the cards; takes its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("mlu", *args, **kwargs)

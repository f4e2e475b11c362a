"""The backend ``cncl`` of ``torch.distributed``, on gloo."""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed as dist


def register_cncl() -> None:
    """Makes ``init_process_group("cncl")`` known; gloo computes, on the cards' tensors where they lie."""
    if not dist.is_available() or "cncl" in dist.Backend.backend_list:
        return
    dist.Backend.register_backend("cncl", _create, devices=["cpu", "mlu"])


def _create(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout)

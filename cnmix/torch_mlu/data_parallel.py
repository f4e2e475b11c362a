"""What ``torch.nn.DataParallel`` asks of a PyTorch that was built with CUDA, for the cards."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import comm


def register_data_parallel() -> None:
    """Gives PyTorch the functions that scatter, gather and copy tensors among devices, where it has none."""
    for function in (_scatter, _gather, _broadcast, _broadcast_coalesced):
        if not hasattr(torch._C, function.__name__):
            setattr(torch._C, function.__name__, function)
    if not hasattr(torch._C, "_nccl_all_reduce"):
        # A backward pass asks nccl whether it can add, which warns that it is not there.
        vars(comm)["nccl"] = SimpleNamespace(is_available=lambda _: False)


def _scatter(
    x: Tensor, devices: Sequence[int], sizes: Sequence[int] | None = None, dim: int = 0, streams: Any = None
) -> tuple[Tensor, ...]:
    parts = x.chunk(len(devices), dim) if sizes is None else x.split(list(sizes), dim)
    return tuple(part.to(f"mlu:{device}") for part, device in zip(parts, devices, strict=False))


def _gather(parts: Sequence[Tensor], dim: int, device: int | None = None) -> Tensor:
    to = "cpu" if device == -1 else parts[0].device if device is None else f"mlu:{device}"
    return torch.cat([part.to(to) for part in parts], dim)


def _broadcast(x: Tensor, devices: Sequence[int]) -> list[Tensor]:
    return [x.to(f"mlu:{device}") for device in devices]


def _broadcast_coalesced(xs: Sequence[Tensor], devices: Sequence[int], buffer_size: int) -> list[list[Tensor]]:
    return [[x.to(f"mlu:{device}") for x in xs] for device in devices]

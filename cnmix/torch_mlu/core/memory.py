"""Memory of the cards. All of it is the host's; what a card has allocated is what its tensors take."""

from __future__ import annotations

from typing import Any

import torch

from ..card import library
from ..settings import settings
from .device.cards import DeviceLike, card_index


def memory_allocated(device: DeviceLike = None) -> int:
    """Returns the bytes that a card's tensors take now."""
    return library().memory(card_index(device)).allocated


def max_memory_allocated(device: DeviceLike = None) -> int:
    """Returns the most bytes that a card's tensors took, since the start or ``reset_peak_memory_stats``."""
    return library().memory(card_index(device)).peak


# The emulated card keeps no freed memory, so that what is reserved is what is allocated.
memory_reserved = memory_cached = memory_allocated
max_memory_reserved = max_memory_cached = max_memory_allocated


def reset_peak_memory_stats(device: DeviceLike = None) -> None:
    """Lets the peak begin at what is allocated now."""
    library().reset_peak(card_index(device))


reset_max_memory_allocated = reset_max_memory_reserved = reset_max_memory_cached = reset_peak_memory_stats


def memory_stats(device: DeviceLike = None) -> dict[str, Any]:
    """Returns the counts under the names that ``torch.cuda.memory_stats`` has for them."""
    memory = library().memory(card_index(device))
    stats: dict[str, Any] = {"allocation.all.allocated": memory.allocations}
    for name in ("allocated_bytes", "reserved_bytes", "active_bytes"):
        stats |= {f"{name}.all.current": memory.allocated, f"{name}.all.peak": memory.peak}
    return stats


def memory_summary(device: DeviceLike = None, abbreviated: bool = False) -> str:
    """Returns a line about a card's memory."""
    index = card_index(device)
    memory, mib = library().memory(index), 1 << 20
    return (
        f"mlu:{index} ({settings().card.name}, emulated): {memory.allocated / mib:.1f} MiB allocated, at most "
        f"{memory.peak / mib:.1f} MiB of {settings().card.memory / mib:.0f}"
    )


def mem_get_info(device: DeviceLike = None) -> tuple[int, int]:
    """Returns the free bytes and all bytes of a card."""
    total = settings().card.memory
    return max(total - memory_allocated(device), 0), total


def empty_cache() -> None:
    """Frees what the allocator keeps, which is nothing."""


empty_cached_memory = empty_cache


def set_memory_strategy(native_memory_strategy: bool) -> None:
    """Takes the choice of the card's allocator; the emulated card has one."""


def memory_debug(*_: Any, **__: Any) -> None:
    """Takes the switch of the allocator's debug output, which the emulated card does not have."""


def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a host tensor in pinned memory."""
    return tensor.pin_memory()


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a host tensor is in pinned memory."""
    return tensor.is_pinned()

"""How callers name a card."""

from __future__ import annotations

import torch

from ...card import library
from ...settings import settings

DeviceLike = torch.device | str | int | None


def card_index(device: DeviceLike = None) -> int:
    """Returns the number of the card that is meant: an int, ``"mlu:1"``, a device, or None for the current one.

    Raises:
        ValueError: if it is a device of another type.
        RuntimeError: if there is no such card.
        TypeError: if it is nothing that names a card.
    """
    if device is None:
        return library().current()
    if isinstance(device, int) and not isinstance(device, bool):
        index = device
    elif isinstance(device, (str, torch.device)):
        found = torch.device(device)
        if found.type != "mlu":
            raise ValueError(f"expected an MLU, got {found}: name a card as 'mlu', 'mlu:1' or 1")
        index = library().current() if found.index is None else found.index
    else:
        raise TypeError(f"expected a device, a string or a number that names a card, got {device!r}")
    count = settings().cards
    if not 0 <= index < count:
        raise RuntimeError(
            f"there is no card mlu:{index}: this process has {count} (set MLU_VISIBLE_DEVICES, or run with "
            "cnmix run --cards N, for another number)"
        )
    return index

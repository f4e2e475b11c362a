"""The vendor's ``torch_mlu.core.mlu_model``, often imported as ``ct``, and ``torch.mlu``."""

from __future__ import annotations

from typing import Any

import torch

from ..card import library
from ..settings import settings


def is_available() -> bool:
    """Whether there is a card."""
    return settings().cards > 0


def device_count() -> int:
    """Returns how many cards there are."""
    return settings().cards


def current_device() -> int:
    """Returns the current card of this thread."""
    return library().current()


def mlu_device() -> torch.device:
    """Returns the device of the cards, without a number: the current one."""
    return torch.device("mlu")


def is_initialized() -> bool:
    return True


def _lazy_init() -> None:
    pass


def _is_in_bad_fork() -> bool:
    return False


def manual_seed_all(seed: int) -> None:
    pass


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def set_device(card: Any) -> None:
    library().exchange(torch.device(card).index if not isinstance(card, int) else card)


class device:
    def __init__(self, card: Any) -> None:
        self.card = card if isinstance(card, int) else torch.device(card).index or 0

    def __enter__(self) -> None:
        self.before = library().exchange(self.card)

    def __exit__(self, *_: Any) -> None:
        library().exchange(self.before)

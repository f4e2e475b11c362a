"""What PyTorch's own names have to know of the card, where it does not ask the device."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch


def register_names() -> None:
    """Teaches printing, the profiler, the default tensor type and imports about the card."""
    from .core import amp

    sys.modules["torch.mlu.amp"] = amp  # scripts write "from torch.mlu.amp import autocast"
    _print_on_host()
    _profile_cards()
    _take_typed_tensors()


def _print_on_host() -> None:
    """Lets the values of the card's tensors be formatted on the host: it takes float64, and many operators."""
    from torch import _tensor_str

    on_device = _tensor_str._tensor_str

    def on_host(x: torch.Tensor, indent: int) -> str:
        return on_device(x.cpu() if x.device.type == "mlu" else x, indent)

    _tensor_str._tensor_str = on_host


def _profile_cards() -> None:
    """Lets ``torch.autograd.profiler.profile`` take ``use_mlu=True``, as the vendor's PyTorch does."""
    from torch.autograd.profiler import profile

    init: Any = profile.__init__

    @functools.wraps(init)
    def with_cards(self: Any, *args: Any, use_mlu: bool = False, **kwargs: Any) -> None:
        init(self, *args, **({"use_device": "mlu"} if use_mlu else {}), **kwargs)

    profile.__init__ = with_cards  # type: ignore[method-assign]


def _take_typed_tensors() -> None:
    """Lets ``torch.set_default_tensor_type`` take ``torch.mlu.FloatTensor`` and its name."""
    from .core import typed_tensors

    host_alone = torch.set_default_tensor_type

    @functools.wraps(host_alone)
    def set_default_tensor_type(t: Any) -> None:
        full = t if isinstance(t, str) else f"{t.__module__}.{t.__qualname__}"
        prefix, _, name = full.rpartition(".")
        if prefix == "torch.mlu" and hasattr(typed_tensors, name):
            host_alone(getattr(torch, name))
            torch.set_default_device("mlu")
        else:
            host_alone(t)
            if torch.get_default_device().type == "mlu":
                torch.set_default_device(None)

    torch.set_default_tensor_type = set_default_tensor_type

"""The vendor's ``torch_mlu.core.mlu_model``, which scripts import as ``ct``, and ``torch.mlu``: the same module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..card import library
from ..settings import settings
from . import amp, memory, random
from .device.cards import DeviceLike, card_index
from .device.notifier import Notifier
from .device.queue import Queue, as_queue
from .legacy import (
    get_running_mode,
    save_as_cambricon,
    set_cnml_enabled,
    set_core_number,
    set_core_version,
    set_input_format,
    set_quantized_bitwidth,
)
from .memory import (
    empty_cache,
    empty_cached_memory,
    is_pinned,
    max_memory_allocated,
    max_memory_cached,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_cached,
    memory_debug,
    memory_reserved,
    memory_stats,
    memory_summary,
    pin_memory,
    reset_max_memory_allocated,
    reset_max_memory_cached,
    reset_max_memory_reserved,
    reset_peak_memory_stats,
    set_memory_strategy,
)
from .random import (
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)
from .typed_tensors import (
    BFloat16Tensor,
    BoolTensor,
    ByteTensor,
    CharTensor,
    DoubleTensor,
    FloatTensor,
    HalfTensor,
    IntTensor,
    LongTensor,
    ShortTensor,
)

__all__ = [
    "BFloat16Tensor",
    "BoolTensor",
    "ByteTensor",
    "CharTensor",
    "Device",
    "DoubleTensor",
    "Event",
    "FloatTensor",
    "HalfTensor",
    "IntTensor",
    "LongTensor",
    "Notifier",
    "Queue",
    "ShortTensor",
    "Stream",
    "amp",
    "current_device",
    "current_queue",
    "current_stream",
    "default_queue",
    "default_stream",
    "device",
    "device_count",
    "device_of",
    "empty_cache",
    "empty_cached_memory",
    "enable_floating_point_calculation",
    "get_amp_supported_dtype",
    "get_device",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "get_running_mode",
    "init",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "is_mlu_tensor",
    "is_pinned",
    "is_using_floating_device",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_cached",
    "max_memory_reserved",
    "mem_get_info",
    "memory",
    "memory_allocated",
    "memory_cached",
    "memory_debug",
    "memory_reserved",
    "memory_stats",
    "memory_summary",
    "mlu_device",
    "pin_memory",
    "random",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_max_memory_reserved",
    "reset_peak_memory_stats",
    "save_as_cambricon",
    "seed",
    "seed_all",
    "set_cnml_enabled",
    "set_core_number",
    "set_core_version",
    "set_device",
    "set_input_format",
    "set_memory_strategy",
    "set_quantized_bitwidth",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
    "to",
]

Stream = Queue
Event = Notifier


class DeviceProperties(NamedTuple):
    """What is known of a card.

    Attributes:
        name: of the card.
        major: of its capability.
        minor: likewise.
        total_memory: in bytes.
        cluster_count: of cores.
        core_num_per_cluster: in each.
        multi_processor_count: clusters, under the name that CUDA has.
    """

    name: str
    major: int
    minor: int
    total_memory: int
    cluster_count: int
    core_num_per_cluster: int
    multi_processor_count: int


def init() -> None:
    """Initializes the cards, which is done."""


_lazy_init = init


def is_initialized() -> bool:
    """Whether the cards are initialized."""
    return True


def is_available() -> bool:
    """Whether there is a card."""
    return settings().cards > 0


def _is_in_bad_fork() -> bool:
    """Whether a forked process may not use the card; the emulated one may."""
    return False


def device_count() -> int:
    """Returns how many cards there are."""
    return settings().cards


def current_device() -> int:
    """Returns the number of this thread's current card."""
    return library().current()


def get_device() -> int:
    """Returns the number of this thread's current card."""
    return library().current()


def mlu_device() -> torch.device:
    """Returns the device of the cards without a number, which stands for the current one."""
    return torch.device("mlu")


def set_device(device: DeviceLike) -> None:
    """Makes a card this thread's current one. None changes nothing; −1 is for offline generation, without a card.

    Raises:
        RuntimeError: if there is no such card.
    """
    if device is None or device == -1:
        return
    library().exchange(card_index(device))


class Device:
    """Makes a card the current one within ``with``; None or −1 changes nothing.

    Raises:
        RuntimeError: if there is no such card.
    """

    def __init__(self, device: DeviceLike) -> None:
        self.idx = -1 if device is None or device == -1 else card_index(device)
        self.prev_idx = -1

    def __enter__(self) -> Device:
        self.prev_idx = library().current() if self.idx < 0 else library().exchange(self.idx)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.prev_idx < settings().cards:  # else that card is gone, and this one stays
            library().exchange(self.prev_idx)


device = Device


class device_of(Device):
    """Makes the card of a tensor the current one within ``with``; a host tensor changes nothing."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.device.index if is_mlu_tensor(tensor) else -1)


def get_device_name(device: DeviceLike = None) -> str:
    """Returns the name of a card, as ``MLU370``."""
    card_index(device)
    return settings().card.name


def get_device_capability(device: DeviceLike = None) -> tuple[int, int]:
    """Returns major and minor of a card's capability."""
    card_index(device)
    return settings().card.capability


def get_device_properties(device: DeviceLike = None) -> DeviceProperties:
    """Returns what is known of a card."""
    card_index(device)
    card = settings().card
    each = card.cores // card.clusters
    return DeviceProperties(card.name, *card.capability, card.memory, card.clusters, each, card.clusters)


def synchronize(device: DeviceLike = None) -> None:
    """Waits for a card, whose operations have finished when their calls return."""
    card_index(device)


def current_stream(device: DeviceLike = None) -> Queue:
    """Returns the current queue of a card."""
    return as_queue(torch.accelerator.current_stream(torch.device("mlu", card_index(device))))


def default_stream(device: DeviceLike = None) -> Queue:
    """Returns the default queue of a card."""
    found = current_stream(device)
    return Queue(stream_id=0, device_index=found.device_index, device_type=found.device_type)


def current_queue(device_index: DeviceLike = -1) -> Queue:
    """Returns the current queue of a card; −1 is the current card."""
    return current_stream(None if device_index == -1 else device_index)


def default_queue(device_index: DeviceLike = -1) -> Queue:
    """Returns the default queue of a card; −1 is the current card."""
    return default_stream(None if device_index == -1 else device_index)


def set_stream(stream: torch.Stream) -> None:
    """Makes a queue the current one of its card."""
    torch.accelerator.set_stream(stream)


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Makes a queue the current one within ``with``; None changes nothing."""
    if stream is None:
        yield
        return
    with stream:
        yield


def is_mlu_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is on a card."""
    return tensor.device.type == "mlu"


def to(optimizer: torch.optim.Optimizer, device: torch.device | str) -> torch.optim.Optimizer:
    """Moves the tensors of an optimizer's state to a device, in place, and returns the optimizer."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.to(device)
    return optimizer


def is_using_floating_device() -> bool:
    """Whether the card multiplies float tensors in float, as the 300 series does; the 200 series does it in int31."""
    return settings().multiplies_in_float


def enable_floating_point_calculation(flag: bool) -> None:
    """Lets products of float tensors be computed in float, or in fixed point as the 200 series does."""
    from ..settings import configure

    configure(floating=bool(flag))


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Returns the dtypes that autocast can lower to."""
    return [torch.float16, torch.bfloat16]


def is_bf16_supported() -> bool:
    """Whether the card computes in bfloat16."""
    return settings().card.floating


def _jit_override_can_fuse_on_mlu(flag: bool) -> None:
    """Switches fused inference on (the default) or off, of what ``torch.jit.trace`` and ``torch.jit.load`` return."""
    from ..settings import configure

    configure(fuses=bool(flag))

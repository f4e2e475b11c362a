"""Puts the emulation in the place of the vendor's package."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

# The vendor's names, and where this package has what they stand for.
_ALIASES = {"torch_mlu": "cnmix.torch_mlu", "catch_perf": "cnmix.torch_mlu.catch_perf"}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``torch_mlu`` and what is below it as the modules of this package, the same objects under two names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        ours = _ours(name)
        found = None if ours is None else importlib.util.find_spec(ours)
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(name, _Loader(found.name), is_package=is_package)


class _Loader(importlib.abc.Loader):
    """Loads one module under its second name; imports in other threads have their own."""

    def __init__(self, ours: str) -> None:
        self._ours = ours

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._ours)
        self._own = module.__spec__, module.__loader__, module.__package__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system wrote those of the second name over them.
        module.__spec__, module.__loader__, module.__package__ = self._own


def _ours(name: str) -> str | None:
    for theirs, ours in _ALIASES.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
    return None


def is_installed() -> bool:
    """Whether this process has the emulated ``torch_mlu``."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def vendor_package() -> str | None:
    """Returns where the vendor's own package is, or None."""
    if is_installed():
        return None
    if "torch_mlu" in sys.modules and getattr(sys.modules["torch_mlu"], "__spec__", None) is None:
        return None  # a module that the script made, or nothing
    spec = importlib.util.find_spec("torch_mlu")
    return None if spec is None else spec.origin  # a folder of that name without __init__.py has none


def install(cards: int | None = None, *, strict: bool | None = None, card_name: str | None = None) -> None:
    """Puts the emulated ``torch_mlu`` and the device ``mlu`` in place, for this process, until it ends.

    Calling it again changes the settings that are given. Call it on the thread that trains: a backward pass runs there
    then, where another thread's runs on PyTorch's threads, of which there is one for each card that the first one saw.

    Args:
        cards: how many cards there are. None is as many as ``MLU_VISIBLE_DEVICES`` names, or one.
        strict: whether an operator refuses what a card would refuse, tensors of host and card mixed foremost; without,
            it says so once in the log and computes. None is what ``CNMIX_STRICT_DEVICE`` says, or False.
        card_name: MLU220, MLU270, MLU290, MLU370 or MLU590. None is ``DEFAULT_MLU_DEVICE_NAME``, or MLU370.

    Raises:
        RuntimeError: if the vendor's own package is installed, which is never replaced, or another private-use device
            is in use.
        ValueError: if there is no card of that name, or the number of cards is not one that can be had.
    """
    vendor = vendor_package()
    if vendor is not None:
        raise RuntimeError(f"the vendor's torch_mlu is installed ({vendor}): it serves, and is never replaced")
    from .cards import find_card
    from .core import mlu_model
    from .logs import set_up_logs
    from .settings import changed, put_in_force

    changes: dict[str, Any] = {}
    if cards is not None:
        changes["cards"] = cards
    if strict is not None:
        changes["strict"] = strict
    if card_name is not None:
        changes |= {"card": find_card(card_name), "floating": None}
    wanted = changed(**changes)  # what cannot be had is refused before anything changes
    if not is_installed():
        name = torch._C._get_privateuse1_backend_name()
        if name not in ("privateuseone", "mlu"):
            raise RuntimeError(f"PyTorch's one private-use device is {name!r} in this process: run without it")
        _register(mlu_model)
        sys.meta_path.insert(0, _Finder())
        sys.modules.pop("torch_mlu", None)  # a folder or a module of that name, if something looked at it
    put_in_force(wanted)
    set_up_logs()


def _register(mlu_model: ModuleType) -> None:
    from .card import library
    from .collectives import register_cncl
    from .data_parallel import register_data_parallel
    from .fixed_products import register_products
    from .pytorch_names import register_names
    from .queues import register_queues
    from .traced_modules import register_traces

    loaded = library()
    torch.utils.rename_privateuse1_backend("mlu")
    loaded.register()
    register_products()
    torch._register_device_module("mlu", mlu_model)
    torch.utils.generate_methods_for_privateuse1_backend(
        for_tensor=True, for_module=True, for_packed_sequence=True, for_storage=True
    )
    torch.is_mlu_available = mlu_model.is_available  # type: ignore[attr-defined]
    from .backends import mlufusion

    torch.backends.mlufusion = mlufusion  # type: ignore[attr-defined]
    sys.modules["torch.backends.mlufusion"] = mlufusion
    register_cncl()
    register_data_parallel()
    register_queues()
    register_names()
    register_traces()
    # A backward pass on this thread: another thread would have OpenMP threads of its own, on the same cores.
    torch.autograd.set_multithreading_enabled(False)

"""Lets what ``torch.jit.trace`` and ``torch.jit.load`` return run fused on the card.

The module stays PyTorch's own. What TorchScript keeps as its ``forward`` is an object of here, which computes tensors
of the card in fusion groups, and calls the module's own method for everything else.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..inference.program import Spec
from .fused_operators import forced_fallbacks
from .fusion_groups import SegmentedProgram
from .offline_requests import write_requested
from .settings import settings
from .traced_graphs import TracedGraph


class FusingForward:
    """The ``forward`` of a traced module, fused where it can be.

    Programs are made when inputs of new shapes come, and anew when the module's tensors have changed.

    Args:
        method: the module's own.
        module: the module's own object.
    """

    def __init__(self, method: torch._C.ScriptMethod, module: Any) -> None:
        self._method, self._module = method, module
        self._lock = threading.RLock()
        self._traced: TracedGraph | None = None
        self._made: dict[Any, tuple[SegmentedProgram, Any] | None] = {}
        self._said: set[str] = set()

    def __getattr__(self, name: str) -> Any:  # graph, code, schema and so on
        return getattr(self._method, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes what the module computes."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        device = self._card(leaves)
        made = None if device is None else self._fused(args, kwargs, leaves, structure, device)
        if made is None:
            return self._method(*args, **kwargs)
        program, returned = made
        with torch.no_grad():
            outputs = program.run([each for each in leaves if isinstance(each, Tensor)])
        return pytree.tree_unflatten(outputs, returned)

    def _card(self, leaves: list[Any]) -> torch.device | None:
        """Returns the card that all inputs are on; None where the module's own method is to compute."""
        devices = {each.device for each in leaves if isinstance(each, Tensor)}
        if len(devices) != 1 or torch._C._get_tracing_state() is not None:
            return None
        (device,) = devices
        if device.type != "mlu" or not settings().fuses or torch.is_autocast_enabled("mlu"):
            return None
        if torch.is_grad_enabled():
            self._say("gradients are enabled: call torch.set_grad_enabled(False) first")
            return None
        plain = all(type(each) in (Tensor, torch.nn.Parameter) for each in leaves if isinstance(each, Tensor))
        return device if plain else None

    def _fused(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], structure: Any, device: torch.device
    ) -> tuple[SegmentedProgram, Any] | None:
        forced, in_float = forced_fallbacks(), settings().multiplies_in_float
        specs = (Spec.of(each) if isinstance(each, Tensor) else each for each in leaves)
        key = (structure, *specs, device, forced, in_float)
        with self._lock:
            try:
                if self._traced is None or not self._traced.is_current():
                    self._made.clear()
                    self._traced = TracedGraph(self._module)
                if key not in self._made:
                    self._made[key] = None  # unless it can be made
                    if kwargs:
                        raise ValueError("it is called with arguments by name: give them in their order")
                    if self._traced.device() not in (None, device):
                        return None  # the module's own method says so
                    program, returned = self._traced.program(args, device)
                    originals = list(self._traced.tensors.values())
                    self._made[key] = SegmentedProgram(program, device.index, originals, forced, in_float), returned
            except ValueError as error:
                self._say(str(error))
            return self._made.get(key)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logging.getLogger("torch_mlu").warning(
                "%s runs operator by operator, not fused: %s", self._module._type().name(), reason
            )


def register_traces() -> None:
    """Puts forms of ``torch.jit.trace`` and ``torch.jit.load`` in place whose modules run fused on the card."""
    torch.jit.trace = _with_fusion(torch.jit.trace, write_requested)
    torch.jit.load = _with_fusion(torch.jit.load)


def _with_fusion(
    function: Callable[..., Any], then: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], None] | None = None
) -> Callable[..., Any]:
    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        module = function(*args, **kwargs)
        if isinstance(module, torch.jit.ScriptModule) and module._c._has_method("forward"):
            # Where TorchScript itself keeps the method, once it was asked for.
            module.__dict__["forward"] = FusingForward(module._c._get_method("forward"), module._c)
        if then is not None:
            then(module, args, kwargs)
        return module

    return made

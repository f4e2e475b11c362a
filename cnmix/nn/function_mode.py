"""Finds the products that a module's forward pass computes by calling functions: ``q @ k``, ``F.linear(x, w)``.

While a module of the user's is being called, a ``TorchFunctionMode`` sees the functions of torch that Python code
calls, and sends those that multiply to the core. Two hooks begin and end that, so that it costs nothing elsewhere, and
some 1.5 microseconds for each call of a function inside. Nothing is replaced in torch, in the module or in its code;
helper functions and subclasses are covered; what torch does inside its own modules is left to it. Other ways were
weighed: a tensor subclass costs more with each operation, and shows in what users print and save; a graph
(``torch.fx``) needs code that can be traced; replaced functions of torch would change other models of the process; a
mode below autograd would see a product and its gradients as unrelated calls.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack

from .exported import is_exporting
from .function_calls import Call, function_products
from .function_places import call_within, called_module, calling_frames, place_of
from .functions import FUNCTIONS
from .half import HALF_TYPES, cast_tensors
from .recomputation import first_pass, replace_repetition

logger = logging.getLogger("cnmix")


class _ProductMode(TorchFunctionMode):
    """Sends functions that multiply to the core, for the innermost of the modules that are being called."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[nn.Module] = []

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A part of a module that is compiled by itself: a graph takes this mode in.
        handler = None if torch.compiler.is_compiling() and not is_exporting() else FUNCTIONS.get(func)
        if handler is not None and self.modules:
            call = self._find_call(func)
            if call is not None:
                result = handler(call, *args, **kwargs)
                return _in_float(func, args, kwargs) if result is NotImplemented else result
        return func(*args, **kwargs)

    def _find_call(self, func: Any) -> Call | None:
        """Returns the call of a function that multiplies; None where it stays float."""
        module = self.modules[-1]
        products = function_products(module)
        if products is None or torch._C._are_functorch_transforms_active():
            return None
        if func is nn.functional.multi_head_attention_forward and isinstance(module, nn.MultiheadAttention):
            return Call(module, products, "")
        frames = calling_frames(module)
        if frames is None:
            return None
        part = first_pass(module.training)
        if part is not None:
            replace_repetition(part, self._repeat)
        return Call(module, products, place_of(frames, func.__name__))

    def _repeat(self, function: Callable[..., Any]) -> _Repetition:
        """Returns what repeats a checkpointed part of a forward pass, given what did so until now."""
        # The part belongs to the least deep of the modules that call a function in it.
        if isinstance(function, _Repetition) and function.depth <= len(self.modules):
            return function
        again = function.function if isinstance(function, _Repetition) else function
        return _Repetition(again, self.modules[-1], len(self.modules))

    def forget_interrupted(self) -> None:
        """Forgets modules whose calls have ended without their hooks, which Ctrl-C leaves out."""
        while self.modules and not _calls_another(self.modules[-1]):
            self.modules.pop()


def _in_float(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls a function of torch, which refuses float32 parameters beside activations in a half type."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.is_floating_point()]
    halves = [each.dtype for each in tensors if each.dtype in HALF_TYPES]
    if not halves or all(each.dtype == halves[0] for each in tensors):
        return func(*args, **kwargs)
    result = func(*cast_tensors(tuple(args), torch.float32), **cast_tensors(dict(kwargs), torch.float32))
    return cast_tensors(result, halves[0])


class _Repetition:
    """What activation checkpointing repeats: a part of a module's forward pass, whose functions go to the core again.

    Args:
        function: computes the part.
        module: in whose forward pass it is.
        depth: how many modules were being called, this one included.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module, depth: int) -> None:
        self.function = function
        self.module = module
        self.depth = depth

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the part."""
        with _ProductMode() as mode:
            mode.modules.append(self.module)
            return call_within(self.module, self.function, *args, **kwargs)


class _Enter:
    """A forward pre-hook: functions that this module calls from here on are its own."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            products, mode = function_products(module), _mode_of_export()
            if mode is not None and (products is None or products.frozen):
                mode.modules.append(module)
            elif products is not None:
                _announce(products.fqn)
            return
        mode = _get_current_function_mode()
        if isinstance(mode, _ProductMode):
            mode.forget_interrupted()
        else:
            mode = _ProductMode()
            mode.__enter__()
        mode.modules.append(module)


class _Leave:
    """A forward hook, also of a pass that failed: functions are again those of the module that called this one."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            mode = _mode_of_export()
            if mode is not None and any(each is module for each in mode.modules):
                while mode.modules.pop() is not module:
                    pass
            return
        mode = _get_current_function_mode()
        if not isinstance(mode, _ProductMode) or not any(each is module for each in mode.modules):
            return
        while mode.modules.pop() is not module:  # Ctrl-C leaves without hooks
            pass
        if not mode.modules:
            mode.__exit__(None, None, None)
        products = function_products(module)
        if products is not None and products.unexpected:
            products.report_unexpected()


def exported_functions() -> AbstractContextManager[Any]:
    """Returns a context in which ``torch.export`` sees what the functions of a frozen model multiply on the core.

    Hooks do not begin and end it, as they do in eager mode: where a module raises in a graph, none of them is called.
    """
    return _ProductMode()


def _mode_of_export() -> _ProductMode | None:
    if not is_exporting():
        return None
    return next((each for each in _get_current_function_mode_stack() if isinstance(each, _ProductMode)), None)


def watch(module: nn.Module) -> None:
    """Has this module's functions that multiply go to the core, where it has ``function_products``."""
    unwatch(module)
    module.register_forward_pre_hook(_Enter(), prepend=True)
    module.register_forward_hook(_Leave(), always_call=True)


def unwatch(module: nn.Module) -> None:
    """Takes that back."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, (_Enter, _Leave))]:
            del hooks[number]
            module._forward_hooks_always_called.pop(number, None)


def _calls_another(module: nn.Module) -> bool:
    """Whether this module is being called, and has called the one that is being called now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and called_module(frame) is None:
        frame = frame.f_back
    frame = None if frame is None else frame.f_back
    while frame is not None and called_module(frame) is not module:
        frame = frame.f_back
    return frame is not None


def _announce(fqn: str) -> None:
    logger.warning(
        "%r is compiled: what functions in its forward pass multiply stays float32; leave it eager to have that on the "
        "core, as with torch.compiler.disable(module)",
        fqn,
    )


# What torch.compiler.assume_constant_result does, but for loading the compiler: it is called once, for each graph.
_announce._dynamo_marked_constant = True  # type: ignore[attr-defined]

"""Names for the places in a module's code that call a function of torch, stable from step to step and run to run."""

from __future__ import annotations

import dis
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import checkpoint

_TORCH = os.path.dirname(torch.__file__) + os.sep
_CNMIX = os.path.dirname(os.path.dirname(__file__)) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep
# Functions of torch that are written in Python hand a call on from here: it was made further up.
_PASSING_ON = tuple(
    _TORCH + name.replace("/", os.sep)
    for name in (
        *("overrides.py", "functional.py", "_tensor.py", "nn/functional.py"),
        *("_export/non_strict_utils.py", "fx/experimental/proxy_tensor.py"),  # modes of torch.export
    )
)
# What torch.compile has made goes through this one, also where no graph could be made and Python runs it.
_COMPILED = "compile_wrapper"
_MODULE_CALL = nn.Module._call_impl.__code__
_SHORT_NAMES = {"scaled_dot_product_attention": "attention", "multi_head_attention_forward": "multi_head_attention"}
# in_proj.query and in_proj.key_value where the key is another tensor than the query.
ATTENTION_PLACES = (
    *("in_proj", "in_proj.query", "in_proj.key_value", "q_proj", "k_proj", "v_proj"),
    *("scores", "values", "value_gradient", "out_proj"),
)
_STEP = r"[\w<>]+\+\d+(\.\d+)?"
_PLACE = re.compile(rf"({_STEP}>)*{_STEP}:\w+(\([\w.]+\))?(\.\w+)*")
_INLINED = ("<listcomp>", "<setcomp>", "<dictcomp>")  # a part of the code around them from Python 3.12 on
# Packages that put code of theirs around a forward pass, and those that put a training step in its place for DDP.
_WRAPPERS, _LOOPS = ("accelerate",), ("lightning", "pytorch_lightning", "lightning_fabric")
_MATMUL_OPERATORS = ("@", "@=")


def call_within(module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a part of this module's forward pass outside of the call of the module."""
    return function(*args, **kwargs)


_PART_CALL = call_within.__code__


def calling_frames(module: nn.Module) -> list[FrameType] | None:
    """Returns the frames of the user's code that lead to the function of torch that is being handled.

    Those of this module's forward pass, the one that called the function first. None where that is code of torch or of
    cnmix, such as a module that was left in float, or is compiled; where a training step is called in place of the
    forward pass, as Lightning does for DDP, whose loss stays float as it does without; and where this module is not
    being called: Ctrl-C leaves a call without its hooks.
    """
    frame: FrameType | None = sys._getframe(3)  # past the mode's two
    while frame is not None and _origin(frame.f_code.co_filename) == "passing on":
        frame = frame.f_back
    if frame is None or _origin(frame.f_code.co_filename) != "user":
        return None
    found: list[FrameType] = []
    whole = False
    while frame is not None and called_module(frame) is not module:
        origin = _origin(frame.f_code.co_filename)
        if origin == "loop" or (origin == "library" and frame.f_code.co_name == _COMPILED):
            return None
        # What activation checkpointing calls again is called from elsewhere then.
        whole |= frame.f_code.co_filename == checkpoint.__file__
        if not whole and origin == "user":
            found.append(frame)
        frame = frame.f_back
    return None if frame is None else found


def called_module(frame: FrameType) -> nn.Module | None:
    """Returns the module, where this is the frame of a module's call."""
    if frame.f_code is _MODULE_CALL:
        module: nn.Module = frame.f_locals["self"]
        return module
    return frame.f_locals["module"] if frame.f_code is _PART_CALL else None


def is_place(name: str) -> bool:
    """Whether this is a name that a place may have, or that of a product of ``nn.MultiheadAttention``."""
    return name in ATTENTION_PLACES or _PLACE.fullmatch(name) is not None


def place_of(frames: Sequence[FrameType], function: str) -> str:
    """Returns the name of the place, the way through the module's functions that leads to it.

    ``forward+3:matmul`` is the ``matmul`` three lines below ``def forward``, and ``forward+3>attend+1:matmul`` is in
    ``attend``, which is called there. A second call of that function in the same line is ``forward+3.1:matmul``.

    Args:
        frames: as ``calling_frames`` returns them.
        function: name of the function of torch.
    """
    return _place(tuple((frame.f_code, frame.f_lasti) for frame in frames), function)


@functools.cache
def _origin(file: str) -> Literal["passing on", "library", "wrapper", "loop", "user"]:
    if file in _PASSING_ON:
        return "passing on"
    standard = file.startswith(_PYTHON) and "-packages" + os.sep not in file
    if any(f"-packages{os.sep}{name}{os.sep}" in file for name in _WRAPPERS):
        return "wrapper"
    if any(f"-packages{os.sep}{name}{os.sep}" in file for name in _LOOPS):
        return "loop"
    return "library" if standard or file.startswith((_TORCH, _CNMIX)) else "user"


@functools.lru_cache(maxsize=1 << 14)  # more than any model has; a recursion brings one for each depth
def _place(calls: tuple[tuple[CodeType, int], ...], function: str) -> str:
    names: list[str] = []
    seen: set[CodeType] = set()
    called, top = "matmul" if function == "__rmatmul__" else function, 0
    inside: tuple[int, str] | None = None
    for code, instruction in calls:
        if code in seen:  # a recursion has one place, however deep it goes
            continue
        seen.add(code)
        line, rank = inside or _line(code, instruction, called)
        inside = (line, rank) if code.co_name in _INLINED else None
        if inside is not None:
            continue
        names.append(f"{code.co_name}+{line - code.co_firstlineno}{rank}")
        called = code.co_name
        if called == "forward":
            top = len(names)  # what is above decorates it
    names = names[:top] or names
    return ">".join(reversed(names)) + f":{_SHORT_NAMES.get(function, function.strip('_'))}"


def _line(code: CodeType, instruction: int, called: str) -> tuple[int, str]:
    """Returns the line in its file, and a suffix that tells calls in one line apart."""
    lines = [(start, end, line) for start, end, line in code.co_lines() if line is not None]
    here = next((line for start, end, line in lines if start <= instruction < end), code.co_firstlineno)
    in_line = [
        each
        for each in dis.get_instructions(code)
        if any(start <= each.offset < end for start, end, line in lines if line == here)
    ]
    rank = _rank(in_line, instruction, called)
    return here, f".{rank}" if rank else ""


def _rank(in_line: list[dis.Instruction], instruction: int, called: str) -> int:
    """Returns how many calls stand before this one in its line that may be of the same function."""
    candidates = [each.offset for each in in_line if called == "matmul" and _is_matmul_operator(each)]
    named = sum(each.argval == called and each.opname.startswith("LOAD") for each in in_line)
    if len(candidates) + named == 1:
        return 0
    if instruction not in candidates or named:
        candidates += [each.offset for each in in_line if each.opname.startswith("CALL")]
    # Depending on how often it ran, Python may be at the instruction before the call, or behind it, in its cache.
    present = max((each.offset for each in in_line if each.offset <= instruction), default=instruction)
    return sum(offset < present for offset in candidates)


def _is_matmul_operator(instruction: dis.Instruction) -> bool:
    if instruction.opname == "BINARY_OP":
        return instruction.argrepr in _MATMUL_OPERATORS
    return instruction.opname in ("BINARY_MATRIX_MULTIPLY", "INPLACE_MATRIX_MULTIPLY")  # until Python 3.10

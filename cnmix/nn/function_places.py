"""Names for the places in a module's code that call a function of torch, stable from step to step and run to run."""

from __future__ import annotations

import dis
import functools
import os
import sys
from types import CodeType, FrameType
from typing import Literal

import torch
from torch import nn

_TORCH = os.path.dirname(torch.__file__) + os.sep
_CNMIX = os.path.dirname(os.path.dirname(__file__)) + os.sep
# Functions of torch that are written in Python hand a call on from here: it was made further up.
_PASSING_ON = tuple(
    _TORCH + name for name in ("overrides.py", "functional.py", "_tensor.py", f"nn{os.sep}functional.py")
)
_MODULE_CALL = nn.Module._call_impl.__code__
_MATMUL_OPERATORS = ("@", "@=")


def calling_frame() -> FrameType | None:
    """Returns the frame whose code called the function of torch that is being handled.

    None where that is code of torch or of cnmix, such as a module that was left in float, and where no module is being
    called: Ctrl-C may have left a call without its hooks.
    """
    frame: FrameType | None = sys._getframe(3)  # past the mode's two
    while frame is not None and _origin(frame.f_code) == "passing on":
        frame = frame.f_back
    if frame is None or _origin(frame.f_code) != "user":
        return None
    above: FrameType | None = frame
    while above is not None and above.f_code is not _MODULE_CALL:
        above = above.f_back
    return None if above is None else frame


def place_of(frame: FrameType, function: str) -> str:
    """Returns the name of the place: ``attend+3:matmul`` is the ``matmul`` three lines below ``def attend``.

    A second call of that function in the same line is ``attend+3.1:matmul``.
    """
    return _place(frame.f_code, frame.f_lasti, function)


@functools.cache
def _origin(code: CodeType) -> Literal["passing on", "library", "user"]:
    if code.co_filename in _PASSING_ON:
        return "passing on"
    return "library" if code.co_filename.startswith((_TORCH, _CNMIX)) else "user"


@functools.cache
def _place(code: CodeType, instruction: int, function: str) -> str:
    lines = [(start, end, line) for start, end, line in code.co_lines() if line is not None]
    here = next((line for start, end, line in lines if start <= instruction < end), code.co_firstlineno)
    in_line = [
        each
        for each in dis.get_instructions(code)
        if any(start <= each.offset < end for start, end, line in lines if line == here)
    ]
    rank = _rank(in_line, instruction, function)
    return f"{code.co_name}+{here - code.co_firstlineno}{f'.{rank}' if rank else ''}:{function}"


def _rank(in_line: list[dis.Instruction], instruction: int, function: str) -> int:
    """Returns how many calls stand before this one in its line that may be of the same function."""
    candidates = [each.offset for each in in_line if function == "matmul" and _is_matmul_operator(each)]
    named = sum(each.argval == function and each.opname.startswith("LOAD") for each in in_line)
    if len(candidates) + named == 1:
        return 0
    if instruction not in candidates or named:
        candidates += [each.offset for each in in_line if each.opname.startswith("CALL")]
    return sorted(candidates).index(instruction) if instruction in candidates else 0


def _is_matmul_operator(instruction: dis.Instruction) -> bool:
    if instruction.opname == "BINARY_OP":
        return instruction.argrepr in _MATMUL_OPERATORS
    return instruction.opname in ("BINARY_MATRIX_MULTIPLY", "INPLACE_MATRIX_MULTIPLY")  # until Python 3.10

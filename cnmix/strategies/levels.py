"""The optimize levels."""

from __future__ import annotations

import difflib

import torch

from ..config import QuantizeConfig
from ..tables import format_table
from .base import Strategy


class O0(Strategy):
    """Everything float32: the baseline under the same script."""

    name = "O0"
    summary = "the baseline"
    quantizes = False


class O1(Strategy):
    """Operands of products in adaptive fixed point, everything else float32."""

    name = "O1"
    summary = "training that just works"
    quantizes = True


class O2(Strategy):
    """Operands of products adaptive up to int16, activations between them in bfloat16."""

    name = "O2"
    summary = "speed and memory"
    quantizes = True
    defaults = QuantizeConfig(max_bitwidth=16)
    activation_dtype = torch.bfloat16


class O3(Strategy):
    """Operands of products int8 throughout, activations between them in bfloat16."""

    name = "O3"
    summary = "the speed limit"
    quantizes = True
    defaults = QuantizeConfig(max_bitwidth=8)
    activation_dtype = torch.bfloat16


LEVELS: dict[str, type[Strategy]] = {level.name: level for level in (O0, O1, O2, O3)}


def find_level(name: str) -> type[Strategy]:
    """Returns the level called ``name``.

    Raises:
        ValueError: if there is none, naming the nearest.
    """
    if not isinstance(name, str) or name not in LEVELS:
        near = difflib.get_close_matches(str(name).upper(), LEVELS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown opt_level {name!r}: this version has {', '.join(LEVELS)}{hint}")
    return LEVELS[name]


def register_level(level: type[Strategy]) -> type[Strategy]:
    """Adds a level of one's own, so that ``opt_level`` finds it; usable as a decorator.

    Raises:
        TypeError: if it is no subclass of ``Strategy``, or lacks one of its attributes.
        ValueError: if its name is taken by another class.
    """
    if not (isinstance(level, type) and issubclass(level, Strategy)):
        raise TypeError(f"a level is a subclass of cnmix.strategies.Strategy, got {level!r}")
    for name, kind in (("name", str), ("summary", str), ("quantizes", bool)):
        if not isinstance(getattr(level, name, None), kind):
            raise TypeError(f"the level {level.__name__} must have a {kind.__name__} called {name}")
    before = LEVELS.get(level.name)
    if before is not None and before.__qualname__ != level.__qualname__:
        raise ValueError(f"there is an opt_level {level.name!r} already: choose another name")
    LEVELS[level.name] = level
    return level


def levels() -> str:
    """Returns a table of the levels and their properties: ``print(cnmix.levels())``."""
    rows = [("level", "operands of products", "activations", "loss scale", "meant for")]
    for level in LEVELS.values():
        config = level.defaults
        operands = "float32"
        if level.quantizes and config.bitwidth == config.max_bitwidth:
            operands = f"int{config.bitwidth}"
        elif level.quantizes:
            operands = f"adaptive, int{config.bitwidth} to int{config.max_bitwidth}"
        activations = level.activation_dtype
        scale = level.choose_loss_scale(None, activations)
        shown = f"{scale:g}" if isinstance(scale, float) else str(scale)
        rows.append((level.name, operands, str(activations).removeprefix("torch."), shown, level.summary))
    return format_table(rows)

"""The optimize levels."""

from __future__ import annotations

import difflib

from .base import Strategy


class O0(Strategy):
    """Everything float32: the baseline under the same script."""

    name = "O0"
    summary = "float32 throughout: the baseline"
    quantizes = False


class O1(Strategy):
    """Operands of products in adaptive fixed point, everything else float32."""

    name = "O1"
    summary = "operands of products adaptive from int8 up to int31, all else float32: training that just works"
    quantizes = True


LEVELS: dict[str, type[Strategy]] = {level.name: level for level in (O0, O1)}


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

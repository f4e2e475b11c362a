"""Checks of what is saved of one module's quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import OPERANDS, OperandConfigs
from ..operand import parse_operand_state

_DRAWN_FIELDS = {"checksum": int, "stream": int, "measured": bool}


def check_trained(steps: Mapping[str, int], fqn: str) -> None:
    """Raises ValueError, naming the module, if its input or weight was never quantized in training."""
    missing = [name for name in ("input", "weight") if steps[name] == 0]
    if missing:
        raise ValueError(
            f"{fqn!r} has no stored position for {' and '.join(missing)}: integer inference needs the cnmix "
            "state of a training run (cnmix.load_state_dict), and a module that took part in it"
        )


def check_widths(state: Mapping[str, Any], fqn: str, configs: OperandConfigs) -> None:
    """Raises ValueError, naming operand and module, if a saved width is over the largest that the settings allow."""
    for name, operand in state["operands"].items():
        allowed = configs[name].max_bitwidth
        if operand["bits"] > allowed:
            saved = f"int{operand['bits']}"
            raise ValueError(f"{name} of {fqn!r} is saved at {saved}, over max_bitwidth {allowed}: raise it")


def check_module_state(state: Any, fqn: str) -> None:
    """Raises ValueError unless ``state`` is what ``ModuleQuantizers.state_dict`` returns."""
    if not isinstance(state, Mapping) or set(state) != {"settings", "operands", "drawn_weight"}:
        raise ValueError(f"the saved state of {fqn!r} must have settings, operands and drawn_weight")
    for part in ("settings", "operands"):
        if not isinstance(state[part], Mapping) or set(state[part]) != set(OPERANDS):
            raise ValueError(f"the saved {part} of {fqn!r} must have the operands {', '.join(OPERANDS)}")
    for name in OPERANDS:
        parse_operand_state(state["operands"][name], f"{name} of {fqn!r}")
    drawn = state["drawn_weight"]
    if drawn is not None and (
        not isinstance(drawn, Mapping) or {name: type(value) for name, value in drawn.items()} != _DRAWN_FIELDS
    ):
        raise ValueError(f"the saved drawn_weight of {fqn!r} must be None or have {', '.join(_DRAWN_FIELDS)}")


def upgrade_module_state(state: Any) -> Any:
    """Returns what version 1 saved of a module in the form of this version; what is no state stays as it is."""
    if not isinstance(state, Mapping) or set(state) != {"settings", "operands"}:
        return state
    operands = state["operands"]
    if isinstance(operands, Mapping):
        operands = {
            name: {"saturation": 0.0, **each} if isinstance(each, Mapping) else each for name, each in operands.items()
        }
    return {"settings": dict.fromkeys(OPERANDS, state["settings"]), "operands": operands, "drawn_weight": None}

"""What the quantizers and loss scalers know, to save beside a model's weights and to load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from .nn import callers, forget_functions, function_configs, make_products, module_name, quantizer_sets
from .nn.function_places import is_place
from .nn.module_state import check_module_state, check_widths, upgrade_module_state
from .nn.places import place_within
from .optim import check_scalers
from .registry import registry, unwrap

logger = logging.getLogger("cnmix")

STATE_VERSION = 2
_KEYS = {"version", "models", "loss_scalers"}


def state_dict(model: nn.Module | None = None) -> dict[str, Any]:
    """Returns what the quantizers and loss scalers know: plain numbers, strings, lists and dicts.

    It belongs beside ``model.state_dict()`` in a checkpoint, which it leaves as a plain model's.

    Args:
        model: only this model, converted or holding converted modules. Default: every model of this process, in the
            order of their initialization, and every loss scale.

    Returns:
        ``{"version", "models": [{"modules": {fqn: {"settings", "operands", "drawn_weight"}}}], "loss_scalers"}``,
        with a list of loss scales for each optimizer. A module with several products has an entry for each:
        ``"lstm..l0.input"``, and ``"attention..forward+12:matmul"`` for a function that its forward pass calls.
    """
    chosen = list(registry.models) if model is None else [unwrap(model)]
    scalers = list(registry.optimizers.values()) if model is None else []
    if model is None and registry.waiting_models:
        logger.warning(
            "%d models of the state that was loaded were not initialized yet: what is saved now lacks them",
            len(registry.waiting_models),
        )
    return {
        "version": STATE_VERSION,
        "models": [_model_state(each) for each in chosen],
        "loss_scalers": [[scaler.state_dict() for scaler in each] for each in scalers],
    }


def load_state_dict(state: Mapping[str, Any], model: nn.Module | None = None, *, strict: bool = True) -> list[str]:
    """Restores what ``state_dict`` returned, before or after ``initialize``.

    States of models and optimizers that are not there yet wait for their ``initialize``.

    Args:
        state: the saved state.
        model: the model it belongs to. Default: the models of this process, in the order of their initialization.
        strict: whether the modules must be exactly the model's. If not, those that both have are restored.

    Returns:
        What could not be placed, one line each, which also goes to the log; empty where everything was.

    Raises:
        TypeError: if ``state`` is no dict.
        ValueError: if it is no cnmix state, of a newer version, or its modules are not the model's; the message names
            them, and nothing has been changed.
    """
    state = upgrade(state)
    if model is not None:
        target = unwrap(model)
        if len(state["models"]) != 1:
            raise ValueError(f"the state holds {len(state['models'])} models, and one model was given")
        placed, scalers, lines = [(target, state["models"][0])], [], []
        if state["loss_scalers"]:
            lines.append(f"left: the loss scales of {len(state['loss_scalers'])} optimizers, as one model was given")
    else:
        present = list(registry.models)
        placed = list(zip(present, state["models"], strict=False))
        scalers = list(zip(registry.optimizers.values(), state["loss_scalers"], strict=False))
        lines = [f"without a state: the model {type(each).__name__}" for each in present[len(placed) :]]
        without = list(registry.optimizers)[len(scalers) :]
        lines += [f"without a loss scale: the optimizer {type(each).__name__}" for each in without]
    for each, saved in placed:
        lines += check_fits(each, saved, strict)
    for own, saved_scales in scalers:
        check_scalers(own, saved_scales)

    # Everything has been checked; from here on things change.
    for own, saved_scales in scalers:
        for scaler, saved_scale in zip(own, saved_scales, strict=True):
            scaler.load_state_dict(saved_scale)
    for each, saved in placed:
        load_model_state(each, saved, strict)
    for line in lines:
        logger.warning("loading a cnmix state: %s", line)
    if model is None:
        registry.waiting_models = [{**each, "strict": strict} for each in state["models"][len(placed) :]]
        registry.waiting_scalers = state["loss_scalers"][len(scalers) :]
        waits = [f"a model with {first_names(set(each['modules']))}" for each in registry.waiting_models]
        waits += ["the loss scales of an optimizer"] * len(registry.waiting_scalers)
        for what in waits:
            lines.append(f"waiting for cnmix.initialize: the state of {what}")
            logger.info("loading a cnmix state: %s", lines[-1])
    return lines


def is_state(entry: Any) -> bool:
    """Whether an entry of a checkpoint looks like what ``state_dict`` returned."""
    return isinstance(entry, Mapping) and set(entry) == _KEYS


def upgrade(state: Any) -> dict[str, Any]:
    """Returns the state in this version's form.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it is no cnmix state, or of a newer version.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"load_state_dict takes the dict that cnmix.state_dict() returned, got {type(state).__name__}")
    if not is_state(state):
        hint = "; did you mean its entry 'cnmix'?" if "cnmix" in state else ""
        keys = sorted(map(str, state))[:8]
        raise ValueError(f"this is no cnmix state: it has the keys {keys}, not version, models, loss_scalers{hint}")
    version = state["version"]
    if not isinstance(version, int) or version > STATE_VERSION:
        raise ValueError(
            f"this state has version {version!r}, and this cnmix reads up to {STATE_VERSION}: upgrade cnmix"
        )
    for part in ("models", "loss_scalers"):
        if not isinstance(state[part], (list, tuple)):
            raise ValueError(f"this is no cnmix state: its {part} are a {type(state[part]).__name__}, not a list")
    models, scales = [], list(state["loss_scalers"])
    for saved in state["models"]:
        if not isinstance(saved, Mapping) or not isinstance(saved.get("modules"), Mapping):
            raise ValueError("this is no cnmix state: a model in it has no modules")
        modules = dict(saved["modules"])
        if version == 1:
            modules = {fqn: upgrade_module_state(each) for fqn, each in modules.items()}
        for fqn, module_state in modules.items():
            check_module_state(module_state, fqn)
        models.append({"modules": modules})
    if version == 1:  # one loss for each optimizer
        scales = [[{**each, "pending": False}] if isinstance(each, Mapping) else each for each in scales]
    return {"version": STATE_VERSION, "models": models, "loss_scalers": scales}


def check_names_fit(model: str, present: set[str], saved: Mapping[str, Any], calling: set[str]) -> None:
    """Raises ValueError, naming them, unless the modules in fixed point are those of the saved model.

    Args:
        model: name of the model's class.
        present: names of the products of its modules.
        saved: the model's state.
        calling: names of the modules that call functions, whose products come to be as they are called.
    """
    different = _differences(present, saved, calling)
    if different:
        raise ValueError(f"the cnmix state does not fit this {model}: {'; '.join(different)}")


def check_fits(model: nn.Module, saved: Mapping[str, Any], strict: bool = True) -> list[str]:
    """Raises ValueError where a model's state does not fit; returns what of it a loading that is not strict leaves."""
    present = {name: quantizers for name, quantizers in quantizer_sets(model) if not quantizers.of_function}
    calling = {fqn for fqn, _, _ in callers(model)}
    if strict:
        check_names_fit(type(model).__name__, set(present), saved, calling)
    configs = {name: quantizers.configs for name, quantizers in present.items()}
    configs.update(function_configs(model, saved["modules"]))
    for name in sorted({*configs} & {*saved["modules"]}):
        check_widths(saved["modules"][name], name, configs[name])
    return _differences(set(present), saved, calling)


def load_model_state(model: nn.Module, saved: Mapping[str, Any], strict: bool = True) -> None:
    """Gives the quantizers of each product their saved state, where there is one.

    With ``strict`` the products of functions are then those that the saved run had called.
    """
    if strict:
        for module in model.modules():
            forget_functions(module)
    make_products(model, saved["modules"])
    for name, quantizers in quantizer_sets(model):
        if name in saved["modules"]:
            quantizers.load_state_dict(saved["modules"][name])


def first_names(names: set[str], limit: int = 5) -> str:
    """Returns the first few names in words."""
    listed = ", ".join(repr(name) if name else "the model itself" for name in sorted(names)[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def _model_state(model: nn.Module) -> dict[str, Any]:
    sets = quantizer_sets(model)
    # A function that was called in evaluation alone has learned nothing.
    return {
        "modules": {
            name: quantizers.state_dict()
            for name, quantizers in sets
            if not quantizers.of_function or quantizers.input.state.step
        }
    }


def _differences(present: set[str], saved: Mapping[str, Any], calling: set[str]) -> list[str]:
    functions = {
        name for name in {*saved["modules"]} - present if module_name(name) in calling and is_place(place_within(name))
    }
    stored, parts = set(saved["modules"]) - functions, []
    if stored - present:
        parts.append(f"the state has {first_names(stored - present)}, which the model does not compute in fixed point")
    if present - stored:
        parts.append(f"the model has {first_names(present - stored)}, which the state lacks")
    return parts

"""Integer inference from a training checkpoint: frozen weights and the positions that training stored.

No calibration pass: what the quantizers learned is all that is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ..checkpoint import check, load
from ..config import QuantizeConfig
from ..nn import convert, convertible_modules, quantized_modules
from ..nn.convert import is_convertible
from ..nn.module_state import check_trained
from ..rules import leave_out
from ..state import check_names_fit, load_state_dict

__all__ = ["freeze", "prepare"]

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model, checkpoint: Mapping[str, Any] | str | os.PathLike[str]) -> Model:
    """Turns a plain model into one that infers with the checkpoint's integers, in place.

    Args:
        model: a plain model of the checkpoint's architecture.
        checkpoint: a file that ``cnmix.checkpoint.load`` reads, or what it returned.

    Returns:
        The same model, in evaluation mode, its modules in fixed point computing on stored integers.

    Raises:
        ValueError: if it is no checkpoint of cnmix, its modules are not the model's, one of them was not trained in
            fixed point, or it holds several models; the model is unchanged then.
        RuntimeError: if the weights do not fit.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = load(checkpoint)
    state = check(checkpoint)
    if len(state["models"]) != 1:
        raise ValueError(f"the checkpoint holds the state of {len(state['models'])} models, not of one")
    saved = state["models"][0]["modules"]
    stays_float = [fqn for fqn, module in model.named_modules() if is_convertible(module) and fqn not in saved]
    rules = leave_out(stays_float)
    present = {*convertible_modules(model, rules), *(fqn for fqn, _ in quantized_modules(model))}
    check_names_fit(type(model).__name__, present, state["models"][0])
    configs = {
        fqn: {operand: QuantizeConfig().replace(**settings) for operand, settings in saved[fqn]["settings"].items()}
        for fqn in saved
    }
    for fqn in saved:
        check_trained({name: each["step"] for name, each in saved[fqn]["operands"].items()}, fqn)
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    convert(model, QuantizeConfig(), rules)
    load_state_dict({**state, "loss_scalers": []}, model)  # inference needs none
    for fqn, module in quantized_modules(model):
        module.quantizers.configs = configs[fqn]
    return freeze(model)


def freeze(model: Model) -> Model:
    """Fixes the integers of every weight and puts the model into evaluation mode, in place.

    Raises:
        ValueError: if a module took no part in training, naming it.
    """
    modules = dict(quantized_modules(model))
    for module in modules.values():
        module.quantizers.check_trained()
    model.eval()
    for module in modules.values():
        module.quantizers.freeze(module.weight)
    return model

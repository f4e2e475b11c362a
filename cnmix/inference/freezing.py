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
from ..nn import (
    convert,
    convertible_products,
    module_name,
    plan_functions,
    quantized_modules,
    quantizer_sets,
    quantizers_of,
)
from ..nn.callers import callers
from ..nn.convert import is_convertible
from ..nn.module_state import check_trained
from ..rules import leave_out
from ..state import check_names_fit, load_state_dict
from .weights import Weights

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
    if not state["models"]:  # nothing was in fixed point, as at O0
        state = {**state, "models": [{"modules": {}}]}
    if len(state["models"]) != 1:
        raise ValueError(f"the checkpoint holds the state of {len(state['models'])} models, not of one")
    saved = state["models"][0]["modules"]
    trained = {module_name(name) for name in saved}
    stays_float = [fqn for fqn, module in model.named_modules() if is_convertible(module) and fqn not in trained]
    rules = leave_out(stays_float)
    present = {*convertible_products(model, rules), *(name for name, _ in quantizer_sets(model))}
    calling = {fqn for fqn, settings in plan_functions(model, QuantizeConfig(), rules).items() if settings}
    check_names_fit(type(model).__name__, present, state["models"][0], calling)
    configs = {
        name: {operand: QuantizeConfig().replace(**settings) for operand, settings in saved[name]["settings"].items()}
        for name in saved
    }
    weights = Weights(model, saved)
    for name in saved:
        if not weights.serve_functions(name):
            check_trained({operand: each["step"] for operand, each in saved[name]["operands"].items()}, name)
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    convert(model, QuantizeConfig(), rules)
    load_state_dict({**state, "loss_scalers": []}, model)  # inference needs none
    for name, quantizers in quantizer_sets(model):
        quantizers.configs = configs[name]
    return freeze(model)


def freeze(model: Model) -> Model:
    """Fixes the integers of every weight and puts the model into evaluation mode, in place.

    Raises:
        ValueError: if a module took no part in training, naming it; one whose weight functions multiply need not have.
    """
    sets = dict(quantizer_sets(model))
    weights = Weights(model, sets)
    idle: set[int] = set()  # of modules whose weight functions multiply, without calling them
    for name, quantizers in sets.items():
        if quantizers.of_function:
            quantizers.freeze_integers()
        elif weights.serve_functions(name) and not quantizers.input.state.step:
            idle.add(id(quantizers))
        else:
            quantizers.check_trained()
    model.eval()
    for _, _, products in callers(model):
        products.frozen = True
    for _, module in quantized_modules(model):
        names = module.places(module)
        for place, quantizers in quantizers_of(module):
            if place in names and id(quantizers) not in idle:
                quantizers.freeze(getattr(module, names[place]))
    return model

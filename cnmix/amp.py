"""What a script calls: initialize, scale_loss, state_dict, load_state_dict."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .config import Product, QuantizeConfig
from .nn import quantized_modules
from .nn.convert import revert
from .nn.quantizers import check_module_state, check_widths
from .optim import LossScaler, attach_scaler, gradients_of, scaler_of
from .strategies import Strategy, find_level

logger = logging.getLogger("cnmix")

STATE_VERSION = 1


@dataclass(frozen=True)
class _Setup:
    """How a model was initialized."""

    level: type[Strategy]
    config: QuantizeConfig
    exclude: tuple[str, ...]
    activations: torch.dtype


@dataclass
class _Registry:
    """The models and optimizers of this process, for the calls of the original interface that name none of them.

    Attributes:
        models: live models in the order of their initialization.
        optimizers: live optimizers with their scalers, likewise.
        settings: what ``cnmix.core`` was told before a model was there, by kind of product.
        waiting_models: states given to ``load_state_dict`` before the models they belong to, by place.
        waiting_scalers: likewise of loss scales.
    """

    models: WeakKeyDictionary[nn.Module, _Setup] = field(default_factory=WeakKeyDictionary)
    optimizers: WeakKeyDictionary[Any, LossScaler] = field(default_factory=WeakKeyDictionary)
    settings: dict[Product, dict[str, Any]] = field(default_factory=lambda: {"convolution": {}, "matmul": {}})
    waiting_models: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    waiting_scalers: dict[int, Mapping[str, Any]] = field(default_factory=dict)


registry = _Registry()


def initialize(
    models: Any,
    optimizers: Any = None,
    opt_level: str = "O1",
    *,
    bitwidth: int | None = None,
    max_bitwidth: int | None = None,
    steps_per_epoch: int | None = None,
    loss_scale: float | str | None = None,
    activation_dtype: torch.dtype | str | None = None,
    exclude: Sequence[str] = (),
    **settings: Any,
) -> tuple[Any, Any]:
    """Prepares models and optimizers for training in fixed point, in place.

    The objects returned are the objects given; modules and parameters stay the same, and ``state_dict`` keeps its keys
    and dtypes. Call it after the optimizer is built and before the model is wrapped (DDP, DataParallel). A second call
    with the same arguments changes nothing.

    Args:
        models: a model, or a list of models.
        optimizers: its optimizer, a list of optimizers, or None (for inference, or where another call has it).
        opt_level: "O0" (float32), "O1" (adaptive fixed point), "O2" (the same up to int16, with bfloat16 between
            products), "O3" (int8 and bfloat16), or one that ``cnmix.strategies.register_level`` was given. The keywords
            below override its properties one by one; ``print(cnmix.levels())`` shows them.
        bitwidth: width that operands start with: 8 (default), 16 or 31.
        max_bitwidth: width that none exceeds: 8, 16 or 31 (default).
        steps_per_epoch: training steps in an epoch; the update schedule is written in epochs.
        loss_scale: a factor, or "dynamic". Default: "dynamic" where activations are float16, else 1.
        activation_dtype: what flows between products: float32, bfloat16 or float16. Parameters are float32 always,
            and are themselves the master weights. Default: the level's.
        exclude: fully qualified names of modules to leave in float32; a name covers all below it.
        **settings: any other field of ``cnmix.QuantizeConfig``: mode, interval, quantify_rate, threshold, alpha, beta,
            gamma, delta, error_measure, rounding, online, exact_int31.

    Returns:
        ``(models, optimizers)`` as given.

    Raises:
        TypeError: if a model is no ``nn.Module`` or an optimizer has no parameter groups.
        ValueError: for an unknown level or setting (with the nearest known one), a value out of its range, a model
            whose weights are not float32 or are shared with a module that stays float, or a model that was
            initialized otherwise before. Nothing has been changed then.
    """
    level = find_level(opt_level)
    model_list, optimizer_list = _as_list(models), _as_list(optimizers)
    for model in model_list:
        if not isinstance(model, nn.Module):
            raise TypeError(f"initialize takes a torch.nn.Module, or a list of them, got {type(model).__name__}")
    for optimizer in optimizer_list:
        if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
            raise TypeError(
                f"initialize takes a torch optimizer, a list of them or None, got {type(optimizer).__name__}"
            )
    given = {"bitwidth": bitwidth, "max_bitwidth": max_bitwidth, "steps_per_epoch": steps_per_epoch, **settings}
    config = level.configure({name: value for name, value in given.items() if value is not None})
    activations = level.choose_activations(activation_dtype)
    scale = level.choose_loss_scale(loss_scale, activations)
    setup = _Setup(level, config, tuple(exclude), activations)
    new_models = [model for model in model_list if not _is_initialized(model, setup)]
    for place, model in enumerate(new_models, start=len(registry.models)):
        names = level.check(model, exclude)
        if level.quantizes and not names and not any(quantized_modules(model)):
            logger.warning("no Linear or convolution to convert in %s", type(model).__name__)
        if place in registry.waiting_models:
            present = {*names, *(fqn for fqn, _ in quantized_modules(model))}
            check_names_fit(type(model).__name__, present, registry.waiting_models[place])
            for fqn in sorted(present):
                check_widths(registry.waiting_models[place]["modules"][fqn], fqn, config)
    for optimizer in optimizer_list:
        before = scaler_of(optimizer)
        if before is not None and loss_scale is not None and before.requested != loss_scale:
            raise ValueError(
                f"this {type(optimizer).__name__} was initialized before, with loss_scale {before.requested!r} and not "
                f"{loss_scale!r}: initialize a fresh optimizer"
            )
    new_optimizers = [optimizer for optimizer in optimizer_list if scaler_of(optimizer) is None]
    scalers = [LossScaler(scale) for _ in new_optimizers]
    for place, scaler in enumerate(scalers, start=len(registry.optimizers)):
        if place in registry.waiting_scalers:
            scaler.load_state_dict(registry.waiting_scalers[place])

    # Everything has been checked; from here on things change.
    explicit = {name for name, value in given.items() if value is not None}
    for model in new_models:
        level.apply(model, config, exclude, activations)
        waiting = registry.waiting_models.pop(len(registry.models), None)
        registry.models[model] = setup
        _apply_settings(model, skip=explicit)
        if waiting is not None:
            _load_model_state(model, waiting)
    for optimizer, scaler in zip(new_optimizers, scalers, strict=True):
        registry.waiting_scalers.pop(len(registry.optimizers), None)
        registry.optimizers[optimizer] = scaler
        attach_scaler(optimizer, scaler)
    return models, optimizers


def dequantize(model: nn.Module) -> nn.Module:
    """Gives the plain model back, in place: float32 products, the same modules, parameters and ``state_dict``.

    Returns:
        ``model``.
    """
    target = unwrap(model)
    revert(target)
    registry.models.pop(target, None)
    return model


@contextlib.contextmanager
def scale_loss(loss: Tensor, optimizers: Any) -> Iterator[Tensor]:
    """Yields the loss times its scale, and unscales the gradients on leaving.

    After the block the optimizer's parameters have ordinary gradients, to clip or to accumulate; gradients that were
    there before keep their meaning. With a dynamic scale an overflow makes the next ``optimizer.step()`` skip.

    Args:
        loss: scalar float tensor.
        optimizers: an optimizer that ``initialize`` was given, or a list of them with the same scale.

    Yields:
        The tensor to call ``backward()`` on.

    Raises:
        RuntimeError: if an optimizer was not initialized.
        ValueError: if several optimizers have different scales.
    """
    optimizer_list = _as_list(optimizers)
    scalers = [scaler_of(optimizer) for optimizer in optimizer_list]
    for optimizer, scaler in zip(optimizer_list, scalers, strict=True):
        if scaler is None:
            raise RuntimeError(
                f"scale_loss got a {type(optimizer).__name__} that was not initialized: pass it to "
                "cnmix.initialize(model, optimizer) first"
            )
    known = [scaler for scaler in scalers if scaler is not None]
    if not known:
        raise RuntimeError("scale_loss needs the optimizer that cnmix.initialize was given")
    scale = known[0].scale
    if any(scaler.scale != scale for scaler in known):
        raise ValueError("scale_loss got optimizers with different loss scales: scale a loss for each of them")
    if scale != 1.0:  # what accumulated so far is brought to the scale of what will be added
        for gradient in gradients_of(optimizer_list):
            gradient.mul_(scale)
    try:
        yield loss if scale == 1.0 else loss * scale
    finally:
        known[0].unscale(gradients_of(optimizer_list))
        for scaler in known[1:]:
            scaler.overflow |= known[0].overflow


def state_dict(model: nn.Module | None = None) -> dict[str, Any]:
    """Returns what the quantizers and loss scalers know: plain numbers, strings, lists and dicts.

    It belongs beside ``model.state_dict()`` in a checkpoint, which it leaves as a plain model's.

    Args:
        model: only this model, converted or holding converted modules. Default: every model of this process, in the
            order of their initialization, and every loss scale.

    Returns:
        ``{"version", "models": [{"modules": {fqn: {"settings", "operands"}}}], "loss_scalers"}``.
    """
    chosen = list(registry.models) if model is None else [unwrap(model)]
    scalers = list(registry.optimizers.values()) if model is None else []
    return {
        "version": STATE_VERSION,
        "models": [_model_state(each) for each in chosen],
        "loss_scalers": [scaler.state_dict() for scaler in scalers],
    }


def load_state_dict(state: Mapping[str, Any], model: nn.Module | None = None) -> None:
    """Restores what ``state_dict`` returned, before or after ``initialize``.

    States of models that are not there yet wait for their ``initialize``.

    Args:
        state: the saved state.
        model: the model it belongs to. Default: the models of this process, in the order of their initialization.

    Raises:
        TypeError: if ``state`` is no dict.
        ValueError: if it is no cnmix state, of a newer version, or its modules are not the model's; the message names
            them, and nothing has been changed.
    """
    check_state(state)
    if model is not None:
        target = unwrap(model)
        if len(state["models"]) != 1:
            raise ValueError(f"the state holds {len(state['models'])} models, and one model was given")
        check_names_fit(type(target).__name__, {fqn for fqn, _ in quantized_modules(target)}, state["models"][0])
        _check_model_widths(target, state["models"][0])
        _load_model_state(target, state["models"][0])
        return
    present = list(registry.models)
    placed = list(zip(present, state["models"], strict=False))
    scalers = list(zip(registry.optimizers.values(), state["loss_scalers"], strict=False))
    for each, saved in placed:
        check_names_fit(type(each).__name__, {fqn for fqn, _ in quantized_modules(each)}, saved)
        _check_model_widths(each, saved)
    for scaler, saved in scalers:
        scaler.check_state(saved)
    for scaler, saved in scalers:
        scaler.load_state_dict(saved)
    for each, saved in placed:
        _load_model_state(each, saved)
    registry.waiting_models = dict(list(enumerate(state["models"]))[len(present) :])
    registry.waiting_scalers = dict(list(enumerate(state["loss_scalers"]))[len(scalers) :])


def check_state(state: Any) -> None:
    """Raises TypeError or ValueError unless ``state`` has the form that ``state_dict`` returns."""
    if not isinstance(state, Mapping):
        raise TypeError(f"load_state_dict takes the dict that cnmix.state_dict() returned, got {type(state).__name__}")
    if set(state) != {"version", "models", "loss_scalers"}:
        raise ValueError(
            f"this is no cnmix state: it has the keys {sorted(map(str, state))[:8]}, not version, models, loss_scalers"
        )
    if not isinstance(state["version"], int) or state["version"] > STATE_VERSION:
        raise ValueError(
            f"this state has version {state['version']!r}, and this cnmix reads up to {STATE_VERSION}: upgrade cnmix"
        )
    for part in ("models", "loss_scalers"):
        if not isinstance(state[part], (list, tuple)):
            raise ValueError(f"this is no cnmix state: its {part} are a {type(state[part]).__name__}, not a list")
    for saved in state["models"]:
        if not isinstance(saved, Mapping) or not isinstance(saved.get("modules"), Mapping):
            raise ValueError("this is no cnmix state: a model in it has no modules")
        for fqn, module_state in saved["modules"].items():
            check_module_state(module_state, fqn)


def set_settings(products: Sequence[Product], changes: Mapping[str, Any]) -> None:
    """Changes operand settings of every live model, and of those initialized later (what ``cnmix.core`` calls)."""
    QuantizeConfig().replace(**changes)  # refuses bad names and values before anything is changed
    for model in registry.models:
        for _, module in quantized_modules(model):
            if module.product in products:
                module.quantizers.config = module.quantizers.config.replace(**changes)
    for product in products:
        registry.settings[product].update(changes)


def steps_in_epoch(data_num: float, batch_size: float) -> int:
    """Returns the steps in an epoch of ``data_num`` samples in batches of ``batch_size``."""
    return max(1, math.ceil(data_num / batch_size))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside DDP, DataParallel or torch.compile, whose names the state uses."""
    while True:
        wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        inner = getattr(model, "module" if wrapped else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _is_initialized(model: nn.Module, setup: _Setup) -> bool:
    before = registry.models.get(model)
    if before is not None and before != setup:
        raise ValueError(
            f"this {type(model).__name__} was initialized before, with opt_level {before.level.name!r} and other "
            "settings: initialize a fresh model"
        )
    return before is not None


def _apply_settings(model: nn.Module, skip: set[str]) -> None:
    for _, module in quantized_modules(model):
        changes = {name: v for name, v in registry.settings[module.product].items() if name not in skip}
        if changes:
            module.quantizers.config = module.quantizers.config.replace(**changes)


def _model_state(model: nn.Module) -> dict[str, Any]:
    return {"modules": {fqn: module.quantizers.state_dict() for fqn, module in quantized_modules(model)}}


def check_names_fit(model: str, present: set[str], saved: Mapping[str, Any]) -> None:
    """Raises ValueError, naming them, unless the modules in fixed point are those of the saved model."""
    stored = set(saved["modules"])
    if present != stored:
        parts = []
        if stored - present:
            parts.append(f"the state has {_some(stored - present)}, which the model does not compute in fixed point")
        if present - stored:
            parts.append(f"the model has {_some(present - stored)}, which the state lacks")
        raise ValueError(f"the cnmix state does not fit this {model}: {'; '.join(parts)}")


def _check_model_widths(model: nn.Module, saved: Mapping[str, Any]) -> None:
    for fqn, module in quantized_modules(model):
        check_widths(saved["modules"][fqn], fqn, module.quantizers.config)


def _load_model_state(model: nn.Module, saved: Mapping[str, Any]) -> None:
    for fqn, module in quantized_modules(model):
        module.quantizers.load_state_dict(saved["modules"][fqn])


def _some(names: set[str], limit: int = 5) -> str:
    listed = ", ".join(repr(name) if name else "the model itself" for name in sorted(names)[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"

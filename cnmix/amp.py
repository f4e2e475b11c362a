"""What a script calls: initialize, scale_loss, dequantize."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .closing import strategy_count
from .config import OperandConfigs, Product, QuantizeConfig
from .nn import (
    QUANTIZED_CLASSES,
    QuantizedModule,
    callers,
    plan_functions,
    quantized_modules,
    quantizer_sets,
    quantizers_of,
)
from .nn.callers import is_caller, ranks_of
from .nn.classes import find_conversion, multiplies_by_functions, plain_class
from .nn.convert import is_convertible, name_modules, product_names, revert
from .nn.module_state import check_widths
from .optim import LossScaler, attach_scalers, check_scalers, gradients_of, scalers_of
from .registry import Setup, registry, unwrap
from .rules import TOO_SMALL, Rule, RuleBook, leave_out, parse_rules
from .state import check_names_fit, first_names, load_model_state
from .strategies import find_level

logger = logging.getLogger("cnmix")


def initialize(
    models: Any,
    optimizers: Any = None,
    opt_level: str = "O1",
    *,
    bitwidth: int | None = None,
    max_bitwidth: int | None = None,
    steps_per_epoch: int | None = None,
    loss_scale: float | str | None = None,
    num_losses: int = 1,
    activation_dtype: torch.dtype | str | None = None,
    exclude: Sequence[str] = (),
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    process_group: Any = None,
    **settings: Any,
) -> tuple[Any, Any]:
    """Prepares models and optimizers for training in fixed point, in place.

    The objects returned are the objects given; modules and parameters stay the same, and ``state_dict`` keeps its keys
    and dtypes. Call it after the optimizer is built, before or after the model is wrapped (DDP, DataParallel) or
    compiled. A second call with the same arguments converts modules that came since, and changes nothing else.

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
        num_losses: losses with a scale of their own that drive each optimizer; ``scale_loss`` takes the ``loss_id``.
        activation_dtype: what flows between products: float32, bfloat16 or float16. Parameters are float32 always,
            and are themselves the master weights. Default: the level's.
        exclude: fully qualified names of modules to leave in float32; a name covers all below it, and may have
            wildcards.
        rules: other settings for some modules or operands, as mappings: ``{"modules": "encoder.*", "bitwidth": 16}``,
            ``{"types": "Conv2d", "operands": "grad_output", "rounding": "stochastic"}``, ``{"small": True,
            "leave_out": True}``; see ``cnmix.rules.Rule``. A later rule goes over an earlier one.
        process_group: the processes (a ``torch.distributed`` group) that train the model together, which then choose
            one format. Default: those of the DistributedDataParallel or fully_shard that the model trains in.
        **settings: any other field of ``cnmix.QuantizeConfig``: mode, interval, quantify_rate, threshold, alpha, beta,
            gamma, delta, error_measure, rounding, online, saturation, narrowing, per_entry, exact_int31.

    Returns:
        ``(models, optimizers)`` as given.

    Raises:
        TypeError: if a model is no ``nn.Module``, an optimizer has no parameter groups, or ``process_group`` is none.
        ValueError: for an unknown level or setting (with the nearest known one), a value out of its range, a rule
            that holds for nothing, a model whose weights are not float32 or are shared with a module that stays
            float, a model or a part of one that was initialized otherwise before, or a state that waits for the model
            and does not fit it, or a bad value of ``MLU_ADAPTIVE_STRATEGY_COUNT``. Nothing has been changed then.
    """
    level, close_after = find_level(opt_level), strategy_count()
    if process_group is not None and not hasattr(process_group, "allreduce"):
        raise TypeError(
            "process_group takes a torch.distributed.ProcessGroup, as torch.distributed.group.WORLD after "
            f"init_process_group, got {process_group!r}"
        )
    model_list, optimizer_list = _as_list(models), _as_list(optimizers)
    for model in model_list:
        if not isinstance(model, nn.Module):
            raise TypeError(f"initialize takes a torch.nn.Module, or a list of them, got {type(model).__name__}")
    for optimizer in optimizer_list:
        if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
            raise TypeError(
                f"initialize takes a torch optimizer, a list of them or None, got {type(optimizer).__name__}"
            )
    model_list = list(dict.fromkeys(unwrap(model) for model in model_list))
    optimizer_list = list({id(optimizer): optimizer for optimizer in optimizer_list}.values())
    given = {"bitwidth": bitwidth, "max_bitwidth": max_bitwidth, "steps_per_epoch": steps_per_epoch, **settings}
    config = level.configure({name: value for name, value in given.items() if value is not None})
    activations = level.choose_activations(activation_dtype)
    scale = level.choose_loss_scale(loss_scale, activations)
    own_rules = (*leave_out(exclude), *parse_rules(rules))
    setup = Setup(level, config, own_rules, activations)
    # What cnmix.core was told before goes under the rules, except where a keyword says otherwise.
    core: dict[Product, dict[str, Any]] = {
        product: {name: value for name, value in changes.items() if given.get(name) is None}
        for product, changes in registry.settings.items()
    }
    to_convert: dict[nn.Module, tuple[Rule, ...]] = {}
    new_models: list[nn.Module] = []
    for model in model_list:
        known = _is_initialized(model, setup)
        present_rules = RuleBook(model, own_rules).without_gone() if known else own_rules
        core_rules = _core_rules(model, core) if level.quantizes else []
        all_rules = (*core_rules, *present_rules)
        configs = level.check(model, config, all_rules)
        if not known:
            _check_parts(model, setup, all_rules, core)
            functions = plan_functions(model, config, all_rules) if level.quantizes else {}
            calling = {fqn for fqn, settings in functions.items() if settings is not None}
            _check_waiting(model, configs, registry.waiting_models[len(new_models) :][:1], calling)
            new_models.append(model)
            if level.quantizes and not configs and not calling and not any(quantized_modules(model)):
                which = "left of" if any(is_convertible(module) for module in model.modules()) else "in"
                logger.warning("no module to convert %s %s", which, type(model).__name__)
        if configs or not known:  # of a model that was initialized before, modules that came since
            to_convert[model] = all_rules
    new_optimizers, scalers = _new_scalers(optimizer_list, scale, num_losses, loss_scale)

    # Everything has been checked; from here on things change.
    for model, its_rules in to_convert.items():
        before = {module for _, module, _ in callers(model)}
        level.apply(model, config, its_rules, activations)
        book = RuleBook(model, its_rules)
        for _, module, made in callers(model):
            if module not in before:
                made.configs = _function_configs(book, module, config, core)
        _report_small(model, own_rules)
        if level.quantizes:
            _report_subclasses(model, its_rules)
    for model in model_list:
        name_modules(model)
        for ranks in {*ranks_of(model)}:
            ranks.choose(process_group)
            ranks.close_after(close_after)
    for model in new_models:
        registry.models[model] = setup
        if registry.waiting_models:
            waiting = registry.waiting_models.pop(0)
            load_model_state(model, waiting, waiting["strict"])
    for optimizer, own_scalers in zip(new_optimizers, scalers, strict=True):
        del registry.waiting_scalers[:1]
        registry.optimizers[optimizer] = own_scalers
        attach_scalers(optimizer, own_scalers)
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
def scale_loss(loss: Tensor, optimizers: Any, loss_id: int = 0) -> Iterator[Tensor]:
    """Yields the loss times its scale, and unscales the gradients on leaving.

    After the block the optimizer's parameters have ordinary gradients, to clip or to accumulate; gradients that were
    there before keep their meaning. With a dynamic scale an overflow makes the next ``optimizer.step()`` skip.

    Args:
        loss: scalar float tensor.
        optimizers: an optimizer that ``initialize`` was given, or a list of them with the same scale.
        loss_id: which of the optimizer's losses this is, from 0 to ``num_losses - 1`` of ``initialize``.

    Yields:
        The tensor to call ``backward()`` on.

    Raises:
        RuntimeError: if an optimizer was not initialized, or the block is within another one of it.
        ValueError: if several optimizers have different scales, or there is no such loss.
    """
    optimizer_list = _as_list(optimizers)
    all_scalers = [scalers_of(optimizer) for optimizer in optimizer_list]
    for optimizer, own in zip(optimizer_list, all_scalers, strict=True):
        if not own:
            raise RuntimeError(
                f"scale_loss got a {type(optimizer).__name__} that was not initialized: pass it to "
                "cnmix.initialize(model, optimizer) first"
            )
        if not isinstance(loss_id, int) or not 0 <= loss_id < len(own):
            raise ValueError(
                f"loss_id must be from 0 to {len(own) - 1}, got {loss_id!r}: this {type(optimizer).__name__} was "
                f"initialized with num_losses={len(own)}"
            )
    if not all_scalers:
        raise RuntimeError("scale_loss needs the optimizer that cnmix.initialize was given")
    scalers = [own[loss_id] for own in all_scalers]
    scale = scalers[0].scale
    if any(scaler.scale != scale for scaler in scalers):
        raise ValueError("scale_loss got optimizers with different loss scales: scale a loss for each of them")
    if scale != 1.0 and any(scaler.active for own in all_scalers for scaler in own):
        raise RuntimeError(
            "scale_loss within scale_loss of the same optimizer: the gradients of one would get the scale of the "
            "other. Add the losses, or give them one block after the other"
        )
    # Where another loss overflowed in this step, its gradients say nothing of this one.
    blamed = any(scaler.overflow for own in all_scalers for scaler in own if scaler not in scalers)
    if scale != 1.0:  # what accumulated so far is brought to the scale of what will be added
        for gradient in gradients_of(optimizer_list):
            gradient.mul_(scale)
    for scaler in scalers:
        scaler.active = True
    try:
        yield loss if scale == 1.0 else loss * scale
    finally:
        for scaler in scalers:
            scaler.active = False
        scalers[0].unscale(gradients_of(optimizer_list), look_for_overflow=not blamed)
        for scaler in scalers[1:]:
            scaler.overflow |= scalers[0].overflow
            scaler.pending |= scalers[0].pending


def set_settings(products: Sequence[Product], changes: Mapping[str, Any]) -> None:
    """Changes operand settings of every live model, and of those initialized later (what ``cnmix.core`` calls)."""
    QuantizeConfig().replace(**changes)  # refuses bad names and values before anything is changed
    for model in registry.models:
        for _, quantizers in quantizer_sets(model):
            if quantizers.product in products:
                quantizers.change_settings(**changes)
        for _, _, functions in callers(model):
            functions.change_settings(products, **changes)
    for product in products:
        registry.settings[product].update(changes)


def steps_in_epoch(data_num: float, batch_size: float) -> int:
    """Returns the steps in an epoch of ``data_num`` samples in batches of ``batch_size``."""
    return max(1, math.ceil(data_num / batch_size))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _new_scalers(
    optimizers: Sequence[Any], scale: float | str, num_losses: int, requested: float | str | None
) -> tuple[list[Any], list[list[LossScaler]]]:
    """Returns the optimizers that have no scalers yet, with theirs, as a state that waits for them left them."""
    if not isinstance(num_losses, int) or isinstance(num_losses, bool) or num_losses < 1:
        raise ValueError(f"num_losses must be a whole number, at least 1, got {num_losses!r}")
    for optimizer in optimizers:
        before = scalers_of(optimizer)
        if before and requested is not None and before[0].requested != requested:
            raise ValueError(
                f"this {type(optimizer).__name__} was initialized before, with loss_scale {before[0].requested!r} and "
                f"not {requested!r}: initialize a fresh optimizer"
            )
        if before and num_losses not in (1, len(before)):
            raise ValueError(
                f"this {type(optimizer).__name__} was initialized before, with num_losses={len(before)} and not "
                f"{num_losses}: initialize a fresh optimizer"
            )
    LossScaler(scale)  # refuses a wrong one where there is no optimizer, too
    new = [optimizer for optimizer in optimizers if not scalers_of(optimizer)]
    scalers = [[LossScaler(scale) for _ in range(num_losses)] for _ in new]
    for own, waiting in zip(scalers, registry.waiting_scalers, strict=False):
        check_scalers(own, waiting)
        for scaler, saved in zip(own, waiting, strict=True):
            scaler.load_state_dict(saved)
    return new, scalers


def _check_waiting(
    model: nn.Module, configs: Mapping[str, OperandConfigs], waiting: Sequence[Mapping[str, Any]], calling: set[str]
) -> None:
    """Refuses a state that waits for this model and does not fit it."""
    for state in waiting:
        present = {name: quantizers.configs for name, quantizers in quantizer_sets(model)}
        for fqn, chosen in configs.items():
            present.update(dict.fromkeys(product_names(fqn, model.get_submodule(fqn)), chosen))
        if state["strict"]:
            try:
                check_names_fit(type(model).__name__, set(present), state, calling)
            except ValueError as error:
                raise ValueError(
                    f"{error} (it was loaded before and waits for this model; to drop it: "
                    "cnmix.load_state_dict(cnmix.state_dict()))"
                ) from error
        for name in sorted({*present} & {*state["modules"]}):
            check_widths(state["modules"][name], name, present[name])


def _function_configs(
    book: RuleBook, module: nn.Module, config: QuantizeConfig, core: Mapping[Product, Mapping[str, Any]]
) -> dict[Product, OperandConfigs]:
    """Returns the settings for functions that a module calls, by kind of product."""
    return {product: book.configure(module, config.replace(**changes)) for product, changes in core.items()}


def _check_parts(
    model: nn.Module, setup: Setup, rules: Sequence[Rule], core: Mapping[Product, Mapping[str, Any]]
) -> None:
    """Refuses rules without effect, and a model with parts that another call converted with other settings."""
    book, parts = RuleBook(model, rules), dict(quantized_modules(model))
    convertible = [module for module in model.modules() if is_convertible(module) or is_caller(module)]
    if setup.level.quantizes:
        book.check_effect([*convertible, *parts.values()])
    calling = {fqn: (module, functions) for fqn, module, functions in callers(model)}
    initialized: dict[str, nn.Module] = {**parts, **{fqn: module for fqn, (module, _) in calling.items()}}
    for fqn, module in initialized.items():
        asked = book.configure(module, setup.config)
        half = None if setup.activations == torch.float32 else setup.activations
        same = setup.level.quantizes and not book.why_left_out(module)
        own = [quantizers for _, quantizers in quantizers_of(module) if not quantizers.of_function]
        settings: list[tuple[OperandConfigs, OperandConfigs]] = [(quantizers.configs, asked) for quantizers in own]
        if fqn in calling:
            of_functions = _function_configs(book, module, setup.config, core)
            settings += [(configs, of_functions[kind]) for kind, configs in calling[fqn][1].configs.items()]
        for quantizers in own:
            same &= quantizers.output_dtype == half
        for configs, wanted in settings:
            for operand, now in configs.items():  # the steps in an epoch may have been told later
                same &= now == wanted[operand].replace(steps_per_epoch=now.steps_per_epoch)
        if not same:
            raise ValueError(
                f"{fqn!r} of this {type(model).__name__} was initialized before, with other settings: initialize the "
                "model once, as a whole, or make it float again with cnmix.dequantize(model)"
            )


def _core_rules(model: nn.Module, core: Mapping[Product, Mapping[str, Any]]) -> list[Rule]:
    """Returns what ``cnmix.core`` was told of each kind of product as rules for the modules of this model."""
    rules, present = [], {each for module in model.modules() for each in type(module).__mro__}
    for product, changes in core.items():
        types = tuple(
            plain for plain, ours in QUANTIZED_CLASSES.items() if ours.product == product and plain in present
        )
        if changes and types:
            rules.append(Rule(types=types, settings=changes))
    return rules


def _report_small(model: nn.Module, rules: Sequence[Rule]) -> None:
    """Says which modules a rule left out for their size."""
    book = RuleBook(model, rules)
    candidates = ((fqn, module) for fqn, module in model.named_modules() if is_convertible(module))
    small = {fqn for fqn, module in candidates if book.why_left_out(module) == TOO_SMALL}
    if small:
        logger.warning("%s, left in float32: %s", TOO_SMALL, first_names(small, limit=20))


def _report_subclasses(model: nn.Module, rules: Sequence[Rule]) -> None:
    """Says which modules stay float because their classes changed what they were derived from."""
    book = RuleBook(model, rules)
    left: dict[str, set[str]] = {}
    attention = [each for each in model.modules() if isinstance(each, nn.MultiheadAttention)]
    inside = {part for each in attention for part in each.modules()}
    for fqn, module in model.named_modules():
        derived = any(isinstance(module, kind) for kind in QUANTIZED_CLASSES) and not isinstance(
            module, QuantizedModule
        )
        silent = module in inside or multiplies_by_functions(plain_class(module))
        reason = "" if silent or not derived else find_conversion(plain_class(module))[1]
        if reason and not book.why_left_out(module):
            left.setdefault(f"{plain_class(module).__name__} is {reason}", set()).add(fqn)
    for reason, names in left.items():
        logger.warning("left in float32: %s: %s", first_names(names), reason)


def _is_initialized(model: nn.Module, setup: Setup) -> bool:
    before = registry.models.get(model)
    if before is not None and before != setup:
        raise ValueError(
            f"this {type(model).__name__} was initialized before, with opt_level {before.level.name!r} and other "
            "settings: initialize a fresh model"
        )
    return before is not None

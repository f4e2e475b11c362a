"""Converts a model's modules that multiply by weights, and functions that its modules call, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..config import OperandConfigs, QuantizeConfig
from ..rules import Rule, RuleBook
from .base import NO_TENSOR_PARALLELISM, QuantizedModule, is_distributed
from .callers import callers, install, is_caller, ranks_of, uninstall
from .classes import converted_class, find_conversion, plain_class, set_class
from .half import use_float32
from .places import attach, detach, product_name, quantizers_of
from .quantizers import ModuleQuantizers
from .ranks import Ranks, fully_sharded_modules
from .shared_input import LatestInput


def convert(model: nn.Module, config: QuantizeConfig, rules: Sequence[Rule] = ()) -> list[str]:
    """Makes every module of the model whose class ``QUANTIZED_CLASSES`` has compute in fixed point, in place.

    Modules and parameters stay the same objects and ``state_dict`` keeps its keys. Modules that are converted already
    are left as they are. A parametrized module (weight norm, spectral norm) quantizes the weight that its
    parametrization computes; a subclass stays one (see ``find_conversion``); a lazy module begins with the first
    forward pass, which gives it its weights. Functions that multiply, where a forward pass of the user's calls them, go
    to the core too (see ``function_mode``). Everything is checked before anything is changed.

    Args:
        model: the model; may itself be one of those modules.
        config: settings of every operand.
        rules: what to leave in float, and other settings for some modules or operands.

    Returns:
        The names of the modules converted by this call.

    Raises:
        ValueError: as ``convertible_modules`` does.
    """
    planned, functions = plan(model, config, rules), plan_functions(model, config, rules)
    latest_input = LatestInput()
    ranks = next(ranks_of(model), None) or Ranks()
    for fqn, configs in planned.items():
        module = model.get_submodule(fqn)
        converted = converted_class(plain_class(module))
        name = fqn or type(module).__name__
        by_place = {
            place: ModuleQuantizers(configs, converted.product, product_name(name, place), latest_input, ranks)
            for place in converted.places(module)
        }
        attach(module, by_place)
        set_class(module, converted)
    install(model, functions, latest_input, ranks)
    for module in model.modules():
        # In evaluation this layer would hand its float weights to a fused kernel.
        on_core = any(quantized_modules(module)) or any(callers(module))
        if isinstance(module, nn.TransformerEncoderLayer) and on_core:
            module.activation_relu_or_gelu = 0
    return list(planned)


def plan(model: nn.Module, config: QuantizeConfig, rules: Sequence[Rule] = ()) -> dict[str, OperandConfigs]:
    """Returns the settings of the operands of each module that ``convert`` would change, by name; changes nothing.

    Raises:
        ValueError: as ``convertible_modules`` does, or if the rules for a module contradict each other.
    """
    book = RuleBook(model, rules)
    return {fqn: book.configure(module, config) for fqn, module in convertible_modules(model, rules).items()}


def plan_functions(
    model: nn.Module, config: QuantizeConfig, rules: Sequence[Rule] = ()
) -> dict[str, OperandConfigs | None]:
    """Returns the settings for functions that modules call, by the module's name; None where they are to stay float.

    Raises:
        ValueError: if the rules for a module contradict each other.
    """
    book = RuleBook(model, rules)
    found = ((fqn, module) for fqn, module in model.named_modules() if is_caller(module))
    return {fqn: None if book.why_left_out(module) else book.configure(module, config) for fqn, module in found}


def name_modules(model: nn.Module) -> None:
    """Tells converted modules their present names, which messages use."""
    for fqn, module, products in callers(model):
        products.fqn = fqn or plain_class(module).__name__
    for fqn, module in model.named_modules():
        for place, quantizers in quantizers_of(module):
            quantizers.fqn = product_name(fqn or plain_class(module).__name__, place)


def revert(model: nn.Module) -> list[str]:
    """Makes the converted modules plain ones again, in place; returns their names.

    Modules and parameters stay the same objects.
    """
    use_float32(model)
    uninstall(model)
    found = dict(quantized_modules(model))
    for module in found.values():
        set_class(module, plain_class(module))
    for each in model.modules():
        detach(each)
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            relu = layer.activation is nn.functional.relu or isinstance(layer.activation, nn.ReLU)
            gelu = layer.activation is nn.functional.gelu or isinstance(layer.activation, nn.GELU)
            layer.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0
    return list(found)


def convertible_products(model: nn.Module, rules: Sequence[Rule] = ()) -> list[str]:
    """Returns the names of the products of ``convertible_modules``, and raises as that does."""
    found = convertible_modules(model, rules)
    return [name for fqn, module in found.items() for name in product_names(fqn, module)]


def product_names(fqn: str, module: nn.Module) -> list[str]:
    """Returns the names that the products of this module have, or will have once it is converted."""
    return [product_name(fqn, place) for place in _places(module)]


def _places(module: nn.Module) -> dict[str, str]:
    """Returns the name of the weight of each product of a module that is converted or convertible, by place."""
    converted, reason = find_conversion(plain_class(module))
    if converted is None:
        raise TypeError(reason)
    return converted.places(module)


def convertible_modules(model: nn.Module, rules: Sequence[Rule] = ()) -> dict[str, nn.Module]:
    """Returns the modules, by fully qualified name, that ``convert`` would change; changes nothing.

    Raises:
        ValueError: if a rule names a module or class that is not there, or goes by the size of a module that is not
            known yet, a weight is not float32, or is shared with a module that stays float.
    """
    book = RuleBook(model, rules)
    book.check()
    found = {fqn: module for fqn, module in model.named_modules() if is_convertible(module)}
    book.check_sizes(found.values())
    chosen = {fqn: module for fqn, module in found.items() if not book.why_left_out(module)}
    _check_weights(chosen, fully_sharded_modules(model))
    _check_shared_weights(model, {id(module) for module in chosen.values()})
    return chosen


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    """Yields the converted modules of the model with their fully qualified names."""
    for fqn, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            yield fqn, module


def is_convertible(module: nn.Module) -> bool:
    """Whether ``convert`` would change a module of this class; a converted one is not."""
    return not isinstance(module, QuantizedModule) and find_conversion(plain_class(module))[0] is not None


def _check_weights(chosen: dict[str, nn.Module], fully_sharded: set[nn.Module]) -> None:
    for fqn, module in chosen.items():
        split = any(parameter is not None and is_distributed(parameter) for parameter in module._parameters.values())
        if split and module not in fully_sharded:
            raise ValueError(f"{fqn!r} {NO_TENSOR_PARALLELISM}")
        dtypes = (_weight_dtype(module, name) for name in _places(module).values())
        dtype = next((each for each in dtypes if each != torch.float32), torch.float32)
        if dtype != torch.float32:
            raise ValueError(
                f"the weight of {fqn!r} has dtype {dtype}, and this level trains float32 "
                "parameters: call model.float() first, or leave the module out with exclude=[...]"
            )


def _weight_dtype(module: nn.Module, name: str) -> torch.dtype | None:
    if is_parametrized(module, name):  # reading the weight would compute it, which moves spectral norm's buffers
        behind = module.parametrizations[name]._parameters.values()  # type: ignore[index, union-attr]
        dtypes = {each.dtype for each in behind if each is not None and each.is_floating_point()}
        return next(iter(dtypes - {torch.float32}), torch.float32)
    return getattr(getattr(module, name), "dtype", None)


def _check_shared_weights(model: nn.Module, converted: set[int]) -> None:
    """Refuses a weight that a converted module shares with one that is left out, which would multiply by its floats.

    An embedding, and a module with code of its own, may share it.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            continue
        for part in (module, *(module.parametrizations.values() if is_parametrized(module) else ())):
            for parameter in part._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((fqn, module))
    for sharing in owners.values():
        fixed = [fqn for fqn, module in sharing if id(module) in converted or isinstance(module, QuantizedModule)]
        floating = [
            (fqn, type(module).__name__)
            for fqn, module in sharing
            if id(module) not in converted and is_convertible(module)
        ]
        if fixed and floating:
            fqn, kind = floating[0]
            raise ValueError(
                f"{fixed[0]!r} shares a parameter with {fqn!r} ({kind}), which stays float: leave it out with "
                f"exclude=[{fixed[0]!r}], or untie them"
            )

"""Modules whose forward passes call functions: which they are, and their products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch.fx
from torch import nn

from ..config import OperandConfigs
from .classes import plain_class
from .function_calls import FunctionProducts, function_products, kind_of, set_function_products
from .function_mode import unwatch, watch
from .places import attach, detach, module_name, place_within, quantizer_sets, quantizers_of
from .ranks import Ranks
from .shared_input import LatestInput


def is_caller(module: nn.Module) -> bool:
    """Whether a module's forward pass may call functions that multiply: code of the user's, attention, graphs."""
    kind = plain_class(module)
    if issubclass(kind, (nn.MultiheadAttention, torch.fx.GraphModule)):
        return True
    return any(
        callable(value) and not name.startswith("__")
        for each in kind.__mro__
        if each.__module__.partition(".")[0] not in ("torch", "cnmix", "builtins", "typing", "abc")
        for name, value in vars(each).items()
    )


def callers(model: nn.Module) -> Iterator[tuple[str, nn.Module, FunctionProducts]]:
    """Yields the modules whose functions go to the core, with their names and what makes their quantizers."""
    for fqn, module in model.named_modules():
        products = function_products(module)
        if products is not None:
            yield fqn, module, products


def ranks_of(model: nn.Module) -> Iterator[Ranks]:
    """Yields those that the products of the model know, of functions that are still to be called too."""
    for _, quantizers in quantizer_sets(model):
        yield quantizers.ranks
    for _, _, products in callers(model):
        yield products.ranks


def install(
    model: nn.Module, configs: Mapping[str, OperandConfigs | None], latest_input: LatestInput, ranks: Ranks
) -> None:
    """Has functions that multiply go to the core.

    Args:
        model: whose modules call them.
        configs: settings of the operands of each calling module, by name; None where its functions are to stay float,
            which they do not by themselves within another one.
        latest_input: shared with the other modules of the model.
        ranks: likewise.
    """
    if not any(configs.values()):
        return
    for fqn, settings in configs.items():
        module = model.get_submodule(fqn)
        if settings is not None and function_products(module) is None:
            name = fqn or type(module).__name__
            set_function_products(module, FunctionProducts(settings, name, latest_input, ranks))
        watch(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):  # or it would make a nested tensor, for fused kernels alone
            watch(module)


def uninstall(model: nn.Module) -> None:
    """Takes that back."""
    for module in model.modules():
        unwatch(module)
        set_function_products(module, None)


def forget_callers(model: nn.Module) -> None:
    """Stops watching the modules of a model none of which has called a function that multiplies.

    If one has, all are watched: what a module within it calls is not its own.
    """
    if not any(quantizers.of_function for _, quantizers in quantizer_sets(model)):
        uninstall(model)


def forget_functions(module: nn.Module) -> None:
    """Takes the quantizers of functions that it has called away from a module."""
    products = function_products(module)
    if products is not None:
        products.expected, products.unexpected = set(), set()
    by_place = dict(quantizers_of(module))
    kept = {place: quantizers for place, quantizers in by_place.items() if not quantizers.of_function}
    if len(kept) < len(by_place):
        detach(module)
        attach(module, kept)


def set_steps_per_epoch(model: nn.Module, steps_of: Callable[[str], int]) -> None:
    """Tells every product, of functions that are still to be called too, the training steps in an epoch.

    Args:
        model: converted.
        steps_of: returns them for a module of this name.
    """
    for name, quantizers in quantizer_sets(model):
        quantizers.change_settings(steps_per_epoch=steps_of(module_name(name)))
    for fqn, _, products in callers(model):
        products.change_settings(steps_per_epoch=steps_of(fqn))


def make_products(model: nn.Module, names: Iterable[str]) -> None:
    """Makes the quantizers of those function products, by name, that the model may call; others are left."""
    for _, module, products, place in _named_functions(model, names):
        if place not in dict(quantizers_of(module)):
            products.make(module, place)
        products.expected.add(place)


def function_configs(model: nn.Module, names: Iterable[str]) -> dict[str, OperandConfigs]:
    """Returns the settings that those function products, by name, have or would have that the model may call."""
    return {name: products.configs[kind_of(place)] for name, _, products, place in _named_functions(model, names)}


def _named_functions(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module, FunctionProducts, str]]:
    found = {fqn: (module, products) for fqn, module, products in callers(model)}
    for name in names:
        fqn = module_name(name)
        if fqn in found and name != fqn:
            yield name, *found[fqn], place_within(name)

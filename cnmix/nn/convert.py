"""Converts a model's modules that multiply by weights, in place."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..config import OperandConfigs, QuantizeConfig
from ..rules import Rule, RuleBook
from .base import NO_TENSOR_PARALLELISM, QuantizedModule, is_distributed
from .half import use_float32
from .modules import QUANTIZED_CLASSES
from .places import ATTRIBUTES, attach, detach, product_name, quantizer_sets, quantizers_of
from .quantizers import ModuleQuantizers
from .ranks import Ranks, fully_sharded_modules, is_fully_sharded
from .shared_input import LatestInput

# Methods that torch's forward passes call and ours do not: a subclass may have one of its own.
_NOT_CALLED = ("_conv_forward", "check_input", "check_hidden_size", "check_forward_args", "permute_hidden")


def convert(model: nn.Module, config: QuantizeConfig, rules: Sequence[Rule] = ()) -> list[str]:
    """Makes every module of the model whose class ``QUANTIZED_CLASSES`` has compute in fixed point, in place.

    Modules and parameters stay the same objects and ``state_dict`` keeps its keys. Modules that are converted already
    are left as they are. A parametrized module (weight norm, spectral norm) quantizes the weight that its
    parametrization computes; a subclass stays one (see ``find_conversion``); a lazy module begins with the first
    forward pass, which gives it its weights. Everything is checked before anything is changed.

    Args:
        model: the model; may itself be one of those modules.
        config: settings of every operand.
        rules: what to leave in float, and other settings for some modules or operands.

    Returns:
        The names of the modules converted by this call.

    Raises:
        ValueError: as ``convertible_modules`` does.
    """
    planned = plan(model, config, rules)
    latest_input = LatestInput()
    ranks = next((quantizers.ranks for _, quantizers in quantizer_sets(model)), None) or Ranks()
    for fqn, configs in planned.items():
        module = model.get_submodule(fqn)
        converted = _converted_class(plain_class(module))
        name = fqn or type(module).__name__
        by_place = {
            place: ModuleQuantizers(configs, converted.product, product_name(name, place), latest_input, ranks)
            for place in converted.places(module)
        }
        attach(module, by_place)
        _set_class(module, converted)
    for module in model.modules():
        # In evaluation this layer would hand the float weights of its Linear modules to a fused kernel.
        if isinstance(module, nn.TransformerEncoderLayer) and any(quantized_modules(module)):
            module.activation_relu_or_gelu = 0
    return list(planned)


def plan(model: nn.Module, config: QuantizeConfig, rules: Sequence[Rule] = ()) -> dict[str, OperandConfigs]:
    """Returns the settings of the operands of each module that ``convert`` would change, by name; changes nothing.

    Raises:
        ValueError: as ``convertible_modules`` does, or if the rules for a module contradict each other.
    """
    book = RuleBook(model, rules)
    return {fqn: book.configure(module, config) for fqn, module in convertible_modules(model, rules).items()}


def name_modules(model: nn.Module) -> None:
    """Tells converted modules their present names, which messages use."""
    for fqn, module in model.named_modules():
        for place, quantizers in quantizers_of(module):
            quantizers.fqn = product_name(fqn or plain_class(module).__name__, place)


def revert(model: nn.Module) -> list[str]:
    """Makes the converted modules plain ones again, in place; returns their names.

    Modules and parameters stay the same objects.
    """
    use_float32(model)
    found = dict(quantized_modules(model))
    for module in found.values():
        _set_class(module, plain_class(module))
        detach(module)
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


def find_conversion(kind: type[nn.Module]) -> tuple[type[QuantizedModule] | None, str]:
    """Says how modules of a class are converted.

    A subclass is converted if it keeps the forward pass of its parent in torch, or has one that calls it by
    ``super().forward(...)``: our class takes the place in front of that parent. One that multiplies otherwise stays
    float: it would not use what conversion gives it. A lazy module is converted as what it becomes.

    Args:
        kind: the class in the plain model, as ``plain_class`` returns it.

    Returns:
        The class of ours that computes its forward pass, and ""; or None, and the reason.
    """
    parent = next((each for each in kind.__mro__ if each in QUANTIZED_CLASSES), None)
    if parent is None:
        return None, f"{kind.__name__} is not converted in this version"
    if issubclass(kind, NonDynamicallyQuantizableLinear):
        return None, "nn.MultiheadAttention multiplies by its weight without calling it"
    ours, above = QUANTIZED_CLASSES[parent], kind.__mro__[: kind.__mro__.index(parent)]
    prefix, own_classes = f"a subclass of {parent.__name__}", ours.__mro__[: ours.__mro__.index(parent)]
    names = {name for each in own_classes for name in vars(each) if not name.startswith("__")} | {*ATTRIBUTES}
    for each in above:
        if "forward" in vars(each) and not _calls_super_forward(vars(each)["forward"]):
            return None, f"{prefix} with a forward of its own, which does not call super().forward"
        changed = next((name for name in _NOT_CALLED if name in vars(each)), None)
        if changed:
            return None, f"{prefix} with a {changed} of its own"
        taken = sorted(names & {*vars(each)} - {"forward", "extra_repr"})
        if taken:
            return None, f"{prefix} with an attribute {taken[0]!r} of its own, a name that cnmix uses"
    becomes = _becomes(kind)
    return (ours, "") if becomes is None else find_conversion(becomes)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Returns the module's class in the plain model, under those that parametrizations and ``fully_shard`` put over."""
    kind = type(module)
    while _put_over(kind):
        kind = kind.__bases__[-1]
    if not issubclass(kind, QuantizedModule):
        return kind
    return next((plain for plain, ours in QUANTIZED_CLASSES.items() if ours is kind), kind.__bases__[0])


def _converted_class(kind: type[nn.Module]) -> type[QuantizedModule]:
    """Returns the class for modules of a plain class: ours, or one made of a subclass and ours."""
    ours, reason = find_conversion(kind)
    if ours is None:
        raise TypeError(f"{kind.__name__} is not converted: {reason}")
    if kind in QUANTIZED_CLASSES:
        return ours
    for known in type.__subclasses__(kind):  # a class keeps them, weakly: each of ours is made once
        if known.__bases__ == (kind, ours) and issubclass(known, QuantizedModule):
            return known
    own: dict[str, Any] = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": _reduce}
    becomes = _becomes(kind)
    if becomes is not None:
        own["cls_to_become"] = _converted_class(becomes)
    made: type[QuantizedModule] = type(f"Quantized{kind.__name__}", (kind, ours), own)
    return made


def _becomes(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the class that a lazy module takes in its first forward pass."""
    return kind.cls_to_become if issubclass(kind, LazyModuleMixin) else None


def _calls_super_forward(forward: Any) -> bool:
    """Whether the code of a method says ``super().forward``, without following what else it calls."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and {"super", "forward"} <= {*code.co_names}


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Reduces a module for pickle and copy: its class is made again from the plain one, which can be imported."""
    plain = plain_class(module)
    reduced: Any = plain.__reduce_ex__(module, max(protocol, 2))
    if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced  # the class has a way of its own
    return _new_converted, (plain,), *reduced[2:]


def _new_converted(kind: type[nn.Module]) -> QuantizedModule:
    converted = _converted_class(kind)
    return converted.__new__(converted)


def _put_over(kind: type) -> str:
    """Returns the prefix of the name that torch gives such a class; empty for any other class."""
    if is_fully_sharded(kind.__bases__[0]):
        return "FSDP"
    parametrized = kind.__module__ == parametrize.__name__ and kind.__name__.startswith("Parametrized")
    return "Parametrized" if parametrized else ""


def _set_class(module: nn.Module, chosen: type[nn.Module]) -> None:
    """Assigns a class under those that torch put over the present one."""
    over, kind = [], type(module)
    while prefix := _put_over(kind):
        over.append((prefix, kind))
        kind = kind.__bases__[-1]
    for prefix, kind in reversed(over):
        own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        chosen = type(f"{prefix}{chosen.__name__}", (*kind.__bases__[:-1], chosen), own)
    module.__class__ = chosen


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
    """Refuses a weight that a converted and a float module share: the two would compute with different values."""
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
            if id(module) not in converted and not isinstance(module, QuantizedModule)
        ]
        if fixed and floating:
            fqn, kind = floating[0]
            raise ValueError(
                f"{fixed[0]!r} shares a parameter with {fqn!r} ({kind}), which stays float: leave it out with "
                f"exclude=[{fixed[0]!r}], or untie them"
            )

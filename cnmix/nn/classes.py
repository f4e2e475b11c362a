"""Which class of ours takes the place of a module's class, and how it is assigned."""

from __future__ import annotations

import copyreg
import inspect
import itertools
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .base import QuantizedModule
from .modules import QUANTIZED_CLASSES
from .places import ATTRIBUTES
from .ranks import is_fully_sharded

# Methods that torch's forward passes call and ours do not: a subclass may have one of its own.
_NOT_CALLED = ("_conv_forward", "check_input", "check_hidden_size", "check_forward_args", "permute_hidden")


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


def multiplies_by_functions(kind: type[nn.Module]) -> bool:
    """Whether a class derived from one of torch's has code of its own in the place of that one's product.

    The functions that it calls go to the core, as those of any code of the user's do. There is none for a whole
    recurrent network.
    """
    above = itertools.takewhile(lambda each: each not in QUANTIZED_CLASSES, kind.__mro__)
    changed = any(name in vars(each) for each in above for name in ("forward", "_conv_forward"))
    return changed and not issubclass(kind, (nn.RNNBase, nn.RNNCellBase))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Returns the module's class in the plain model, under those that parametrizations and ``fully_shard`` put over."""
    kind = type(module)
    while _put_over(kind):
        kind = kind.__bases__[-1]
    if not issubclass(kind, QuantizedModule):
        return kind
    return next((plain for plain, ours in QUANTIZED_CLASSES.items() if ours is kind), kind.__bases__[0])


def converted_class(kind: type[nn.Module]) -> type[QuantizedModule]:
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
        own["cls_to_become"] = converted_class(becomes)
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
    converted = converted_class(kind)
    return converted.__new__(converted)


def _put_over(kind: type) -> str:
    """Returns the prefix of the name that torch gives such a class; empty for any other class."""
    if is_fully_sharded(kind.__bases__[0]):
        return "FSDP"
    parametrized = kind.__module__ == parametrize.__name__ and kind.__name__.startswith("Parametrized")
    return "Parametrized" if parametrized else ""


def set_class(module: nn.Module, chosen: type[nn.Module]) -> None:
    """Assigns a class under those that torch put over the present one."""
    over, kind = [], type(module)
    while prefix := _put_over(kind):
        over.append((prefix, kind))
        kind = kind.__bases__[-1]
    for prefix, kind in reversed(over):
        own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        chosen = type(f"{prefix}{chosen.__name__}", (*kind.__bases__[:-1], chosen), own)
    module.__class__ = chosen

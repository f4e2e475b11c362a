"""Puts quantized modules into the places of float ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from ....nn import QuantizedModule
from .default_mappings import DEFAULT_DYNAMIC_MODULE_MAPPING
from .modules import MLUConv2d, MLUConv3d, MLUQuantizedModule
from .qscheme import BITS, QConfig

Mapped = Mapping[type[nn.Module], type[nn.Module]]
Model = TypeVar("Model", bound=nn.Module)

_FIRST_CHANNELS = (1, 3, 4)


def mapped_class(module: nn.Module, mapping: Mapped | None = None) -> type[nn.Module] | None:
    """Returns the class that takes this module's place, or None.

    Args:
        module: any.
        mapping: by the exact class; None is the default, by which whatever is called Conv2d becomes an MLUConv2d.
    """
    if mapping is not None:
        return mapping.get(type(module))
    if module._get_name() == "Conv2d" and isinstance(module, nn.Conv2d):
        return MLUConv2d
    return DEFAULT_DYNAMIC_MODULE_MAPPING.get(type(module))


def propagate_qconfig_(
    module: nn.Module,
    qconfig: QConfig,
    mapping: Mapped | None = None,
    mixed_layer: Mapping[str, str] | None = None,
) -> None:
    """Gives each module below this one that is to be quantized a ``qconfig``; others get none.

    Of those that become an MLUConv2d the first one, in the order of ``named_modules``, has ``firstconv``.

    Args:
        module: the model.
        qconfig: for all.
        mapping: which modules; see ``mapped_class``.
        mixed_layer: other widths, by names: ``{"features.0,classifier": "int16"}``, each with all below it; those with
            "float16" are not quantized.

    Raises:
        ValueError: if mixed_layer names nothing that is quantized or another width, a class of the mapping has no
            from_float, or the first convolution or a Conv3d cannot be what the scheme asks for; the model is unchanged
            then.
    """
    for made in (mapping or {}).values():
        if not hasattr(made, "from_float"):
            raise ValueError(f"mapping: {made!r} has no from_float(module), which makes a module of this class")
    chosen: dict[str, nn.Module] = dict(_quantizable(module, mapping))
    widths = _widths(type(module).__name__, chosen, mixed_layer or {})
    plan: dict[str, QConfig] = {}
    first = qconfig.scheme.firstconv
    for fqn, each in chosen.items():
        if widths.get(fqn) == "float16":
            continue
        kind = mapped_class(each, mapping)
        dtype = widths.get(fqn, qconfig.dtype) if qconfig.dtype is not None else None
        scheme = qconfig.scheme
        if kind is not None and issubclass(kind, MLUConv3d) and scheme.per_channel:
            raise ValueError(
                f"{fqn!r} is a Conv3d, which never has a scale per channel: set per_channel to False, or leave it "
                f"float with mixed_layer={{{fqn!r}: 'float16'}}"
            )
        takes_images = first and kind is not None and issubclass(kind, MLUConv2d)
        if takes_images:
            _check_first(fqn, each, scheme.mean or ())
            first = False
        plan[fqn] = QConfig(scheme if takes_images else scheme.__class__(**{**vars(scheme), "firstconv": False}), dtype)
    for fqn, its_own in plan.items():
        chosen[fqn].qconfig = its_own  # type: ignore[assignment]


def add_observer_(module: nn.Module) -> None:
    """Lets each module with a ``qconfig`` observe its inputs, which its scale is generated from."""
    for each in module.modules():
        qconfig = each.__dict__.get("qconfig")
        if isinstance(qconfig, QConfig) and each.__dict__.get("activation_post_process") is None:
            each.activation_post_process = qconfig.activation()  # type: ignore[assignment]
            each.register_forward_hook(_observe, with_kwargs=True)


def _observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
    observer = module.__dict__.get("activation_post_process")
    if observer is not None:
        fqn = module.__dict__.get("fqn") or type(module).__name__
        observer.name = f"the input of {fqn!r}"
        observer(args[0] if args else next(iter(kwargs.values())))


def swap_module(module: nn.Module, mapping: Mapped | None = None) -> nn.Module:
    """Returns the quantized module for one that has a ``qconfig`` and a class in the mapping, else the module itself.

    It has the same parameters and hooks; the float module stays as it is.
    """
    kind = mapped_class(module, mapping)
    if kind is None or not isinstance(module.__dict__.get("qconfig"), QConfig):
        return module
    if module._parameters.get("weight") is None:
        warnings.warn(
            f"a {type(module).__name__} whose weight is computed from others (weight norm, pruning) stays float: make "
            "its weight a parameter again first",
            stacklevel=2,
        )
        return module
    made: nn.Module = kind.from_float(module)  # type: ignore[attr-defined]
    return made


def convert(module: Model, mapping: Mapped | None = None, inplace: bool = False) -> Model:
    """Puts quantized modules in the places of the modules below this one that have a ``qconfig``.

    Args:
        module: the model; itself it is not replaced.
        mapping: see ``mapped_class``.
        inplace: change ``module`` itself, and no copy of it.

    Returns:
        The model.
    """
    target = module if inplace else copy_of(module)
    made: dict[nn.Module, nn.Module] = {}  # a module at two places stays one
    for fqn, parent in [*target.named_modules()]:
        for name, child in [*parent._modules.items()]:
            if child is None or isinstance(child, MLUQuantizedModule):
                continue
            if child not in made:
                made[child] = swap_module(child, mapping)
                if isinstance(made[child], MLUQuantizedModule):
                    made[child].fqn = f"{fqn}.{name}" if fqn else name  # type: ignore[assignment]
            if made[child] is not child:
                parent._modules[name] = made[child]
                # In evaluation this layer would hand its float weights to a fused kernel.
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0
    return target


def copy_of(model: Model) -> Model:
    """Returns a deep copy, or with a warning the model itself where it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        warnings.warn(
            f"this {type(model).__name__} cannot be copied ({error}), and is changed in place instead", stacklevel=3
        )
        return model


def _quantizable(model: nn.Module, mapping: Mapped | None) -> Iterator[tuple[str, nn.Module]]:
    for fqn, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            raise ValueError(
                f"{fqn or type(model).__name__!r} is quantized for adaptive training: call "
                "mlu_quantize.dequantize(model) first"
            )
        if mapped_class(module, mapping) is None:
            continue
        if module is model:
            warnings.warn(
                f"the model itself is a {type(model).__name__}, which stays as it is, as only modules inside of a "
                "model are replaced: wrap it in nn.Sequential",
                stacklevel=4,
            )
        elif not isinstance(module, MLUQuantizedModule):
            yield fqn, module


def _widths(model: str, chosen: Mapping[str, nn.Module], mixed: Mapping[str, str]) -> dict[str, str]:
    """Returns the widths of single modules, by their names."""
    widths = {}
    for names, dtype in mixed.items():
        if dtype not in (*BITS, "float16"):
            raise ValueError(f"mixed_layer: {names!r} must be 'int8', 'int16' or 'float16', got {dtype!r}")
        for name in (name.strip() for name in names.split(",")):
            covered = [fqn for fqn in chosen if fqn == name or fqn.startswith(f"{name}.")]
            if not covered:
                raise ValueError(f"mixed_layer: this {model} has nothing to quantize at {name!r}")
            widths.update(dict.fromkeys(covered, dtype))
    return widths


def _check_first(fqn: str, module: nn.Module, mean: tuple[float, ...]) -> None:
    channels = module.in_channels
    if channels not in _FIRST_CHANNELS or channels != len(mean):
        raise ValueError(
            f"firstconv takes images of 1, 3 or 4 channels, and a mean and std for each: {fqn!r} has {channels} input "
            f"channels, and mean and std have {len(mean)} values"
        )

"""Activations in bfloat16 or float16 between the products of a model, parameters in float32.

A converted module answers in the half type and so do the layers behind it, which have no parameters or take mixed types
(norms, whose arithmetic is float32 inside). Two kinds of module need help, given as forward hooks: embeddings, whose
output is cast; and those that have float32 parameters and take inputs of no other type (a layer left out, a
module with a free parameter), whose inputs are cast to float32 and whose outputs to half. The model's own inputs are
cast to half, and its output to float32, so that losses are computed in float32.

The parameters are themselves the master weights: there is no second copy to keep in step, to save or to clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .base import QuantizedModule
from .places import quantizers_of

HALF_TYPES = (torch.bfloat16, torch.float16)

# These take inputs of a half type beside float32 parameters, and compute in float32 inside.
_MIXED = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
)
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


class CastInputs:
    """A forward pre-hook that casts floating tensors among the arguments.

    Values beyond float16's range become its largest: scripts mask attention with numbers like -2**32, and an infinity
    in their place would make NaN.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments to call the module with."""
        saturate = self.dtype == torch.float16
        return cast_tensors(args, self.dtype, saturate), cast_tensors(kwargs, self.dtype, saturate)


class CastOutput:
    """A forward hook that casts floating tensors in the output."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Returns the output to go on with."""
        return cast_tensors(output, self.dtype)


def cast_tensors(value: Any, dtype: torch.dtype, saturate: bool = False) -> Any:
    """Casts the floating tensors in nested tuples, lists and dicts; other values stay the same objects.

    With ``saturate``, finite values beyond the range of ``dtype`` become its limits; infinities do too.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.dtype == dtype:
            return value
        limits = torch.finfo(dtype)
        return (value.clamp(limits.min, limits.max) if saturate else value).to(dtype)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast_tensors(each, dtype, saturate) for each in value))
    if type(value) in (tuple, list):
        return type(value)(cast_tensors(each, dtype, saturate) for each in value)
    if isinstance(value, dict):
        cast = {name: cast_tensors(each, dtype, saturate) for name, each in value.items()}
        if all(cast[name] is each for name, each in value.items()):
            return value
        if type(value) is dict:
            return cast
        for name, each in cast.items():  # an ordered dict, or an output class of a model library
            value[name] = each
    return value


def use_half(model: nn.Module, dtype: torch.dtype) -> None:
    """Lets activations flow in ``dtype``, in place; doing it again changes nothing.

    Args:
        model: with its converted modules.
        dtype: bfloat16 or float16.
    """
    use_float32(model)
    # What computes a parametrized weight is float32 throughout.
    parametrized = [module.parametrizations for module in model.modules() if is_parametrized(module)]
    parametrizations = {part for each in parametrized for part in each.modules()}  # type: ignore[union-attr]
    for module in model.modules():
        if module in parametrizations:
            continue
        if isinstance(module, QuantizedModule):
            for _, quantizers in quantizers_of(module):
                quantizers.output_dtype = dtype
        elif isinstance(module, _LOOKUPS):
            module.register_forward_hook(CastOutput(dtype))
        elif _has_parameters(module) and not isinstance(module, _MIXED):
            module.register_forward_pre_hook(CastInputs(torch.float32), with_kwargs=True)
            if module is not model:
                module.register_forward_hook(CastOutput(dtype))
    frame(model, dtype)


def frame(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts floating inputs to ``dtype`` where the module is a model in itself, and outputs to float32, for a loss."""
    if any(isinstance(h, CastOutput) and h.dtype == torch.float32 for h in module._forward_hooks.values()):
        return
    if not _has_parameters(module) and len(list(module.children())) > 0:
        module.register_forward_pre_hook(CastInputs(dtype), with_kwargs=True)
    module.register_forward_hook(CastOutput(torch.float32))


def use_float32(model: nn.Module) -> None:
    """Takes back what ``use_half`` did."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for _, quantizers in quantizers_of(module):
                quantizers.output_dtype = None
        _remove_hooks(module, lambda hook: isinstance(hook, (CastInputs, CastOutput)))


def _has_parameters(module: nn.Module) -> bool:
    """Whether it holds parameters itself, parametrized ones included."""
    return bool(module._parameters) or is_parametrized(module)


def _remove_hooks(module: nn.Module, ours: Callable[[Any], bool]) -> None:
    for hooks, with_kwargs in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for number in [number for number, hook in hooks.items() if ours(hook)]:
            del hooks[number]
            with_kwargs.pop(number, None)

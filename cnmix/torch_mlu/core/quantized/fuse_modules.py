"""Folds a batch norm into the convolution or Linear before it, for inference: one product less to quantize around."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

Model = TypeVar("Model", bound=nn.Module)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fuse_modules(
    model: Model, modules_to_fuse: Sequence[str] | Sequence[Sequence[str]], inplace: bool = False
) -> Model:
    """Folds batch norms into what comes before them; call it before ``quantize_dynamic_mlu``.

    Args:
        model: in evaluation mode.
        modules_to_fuse: names of modules that follow each other, or a list of such lists: a convolution or Linear, its
            batch norm and, as other packages take it, an activation, which stays as it is.
        inplace: change ``model`` itself, and no copy of it.

    Returns:
        The model, with ``nn.Identity`` in the place of each batch norm.

    Raises:
        ValueError: if there is no such module, it is another kind, it trains, or its norm has no running statistics;
            nothing has been changed then.
    """
    groups = [[each] if isinstance(each, str) else [*each] for each in modules_to_fuse]
    if all(isinstance(each, str) for each in modules_to_fuse):
        groups = [[name for group in groups for name in group]]
    for names in groups:
        _check(model, names)
    target = model if inplace else copy.deepcopy(model)
    for product, norm, *_ in groups:
        before: Any = target.get_submodule(product)
        after: Any = target.get_submodule(norm)
        fuse = fuse_conv_bn_eval if isinstance(before, _CONVOLUTIONS) else fuse_linear_bn_eval
        _set(target, product, fuse(before, after))
        _set(target, norm, nn.Identity())
    return target


def _check(model: nn.Module, names: list[str]) -> None:
    if len(names) not in (2, 3):
        raise ValueError(f"fuse_modules takes names of a product, its batch norm and maybe an activation, got {names}")
    found = []
    for name in names:
        try:
            found.append(model.get_submodule(name))
        except AttributeError as error:
            raise ValueError(f"fuse_modules: this {type(model).__name__} has no module {name!r}") from error
    product, norm = found[:2]
    if type(product) not in (*_CONVOLUTIONS, nn.Linear):
        raise ValueError(f"fuse_modules: {names[0]!r} must be a Conv or a Linear, is {type(product).__name__}")
    if not isinstance(norm, _NORMS):
        raise ValueError(f"fuse_modules: {names[1]!r} must be a BatchNorm, is {type(norm).__name__}")
    if product.training or norm.training:
        raise ValueError(f"fuse_modules: {names[0]!r} and {names[1]!r} are in training mode: call model.eval() first")
    if norm.running_mean is None:
        raise ValueError(f"fuse_modules: {names[1]!r} has no running statistics to fold")


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)

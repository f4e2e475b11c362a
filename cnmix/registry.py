"""The models and optimizers of this process: the one piece of state of the package.

The calls of the original interface name neither (``cnmix.state_dict()``, ``cnmix.core.…``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .config import Product, QuantizeConfig
from .optim import LossScaler
from .rules import Rule
from .strategies import Strategy


@dataclass(frozen=True)
class Setup:
    """How a model was initialized."""

    level: type[Strategy]
    config: QuantizeConfig
    rules: tuple[Rule, ...]
    activations: torch.dtype


@dataclass
class Registry:
    """What is alive in this process, and what it waits for.

    Attributes:
        models: live models in the order of their initialization.
        optimizers: live optimizers with the scalers of their losses, likewise.
        settings: what ``cnmix.core`` was told before a model was there, by kind of product.
        waiting_models: states given to ``load_state_dict`` before the models they belong to, which take them in order.
        waiting_scalers: likewise of each optimizer's loss scales.
    """

    models: WeakKeyDictionary[nn.Module, Setup] = field(default_factory=WeakKeyDictionary)
    optimizers: WeakKeyDictionary[Any, list[LossScaler]] = field(default_factory=WeakKeyDictionary)
    settings: dict[Product, dict[str, Any]] = field(default_factory=lambda: {"convolution": {}, "matmul": {}})
    waiting_models: list[Mapping[str, Any]] = field(default_factory=list)
    waiting_scalers: list[list[Mapping[str, Any]]] = field(default_factory=list)


registry = Registry()


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside DDP, DataParallel or torch.compile, whose names the state uses."""
    while True:
        wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        inner = getattr(model, "module" if wrapped else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner

"""The names that scripts written for the original call under ``cnmix.core``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .amp import set_settings, steps_in_epoch
from .config import Product, check_names

__all__ = ["cnmix_set_amp_quantify_params", "cnmix_set_amp_use_online"]

_PRODUCTS: dict[str, tuple[Product, ...]] = {
    "all": ("convolution", "matmul"),
    "conv": ("convolution",),
    "matmul": ("matmul",),
}

# The settings a script may give besides batch_size and data_num, under the names of catch's QuantifyParams.
_SETTINGS = {
    "quantify_rate": "quantify_rate",
    "steps_per_epoch": "steps_per_epoch",
    "alpha": "alpha",
    "beta": "beta",
    "gamma": "gamma",
    "delta": "delta",
    "th": "threshold",
}


def cnmix_set_amp_quantify_params(products: str, params: Mapping[str, Any]) -> None:
    """Sets how the operands of every model adapt, those initialized already and those still to come.

    Args:
        products: "all", "conv" or "matmul": the kind of products to set.
        params: ``batch_size`` and ``data_num`` together give the steps in an epoch; further ``quantify_rate``,
            ``steps_per_epoch``, ``alpha``, ``beta``, ``gamma``, ``delta`` and ``th`` (the threshold).

    Raises:
        ValueError: for an unknown kind, name or a value out of its range; nothing has been changed then.
    """
    check_names([products], _PRODUCTS, "kind of products")
    if not isinstance(params, Mapping):
        raise TypeError(f"cnmix_set_amp_quantify_params takes a dict of parameters, got {type(params).__name__}")
    check_names(params, ["batch_size", "data_num", *_SETTINGS], "quantify parameter")
    changes = {_SETTINGS[name]: value for name, value in params.items() if name in _SETTINGS}
    if ("batch_size" in params) != ("data_num" in params):
        raise ValueError("batch_size and data_num go together: their quotient is the number of steps in an epoch")
    if "batch_size" in params:
        for name in ("batch_size", "data_num"):
            number = isinstance(params[name], (int, float)) and not isinstance(params[name], bool)
            if not number or not 0 < params[name] < math.inf:
                raise ValueError(f"{name} must be a positive number, got {params[name]!r}")
        changes.setdefault("steps_per_epoch", steps_in_epoch(params["data_num"], params["batch_size"]))
    set_settings(_PRODUCTS[products], changes)


def cnmix_set_amp_use_online(online: bool) -> None:
    """Makes operands choose their format on every step (True), or by the adaptive schedule (False)."""
    set_settings(_PRODUCTS["all"], {"online": bool(online)})

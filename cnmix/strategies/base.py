"""What an optimize level is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ..config import QuantizeConfig
from ..nn import convert, convertible_modules


class Strategy:
    """One optimize level: a bundle of properties, and what it does to a model.

    Attributes:
        name: what ``opt_level`` calls it.
        summary: what it is for, in half a line.
        quantizes: whether the operands of products are fixed point.
        defaults: operand settings that ``initialize`` starts from; keywords override them one by one.
        loss_scale: default loss scale.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    quantizes: ClassVar[bool]
    defaults: ClassVar[QuantizeConfig] = QuantizeConfig()
    loss_scale: ClassVar[float] = 1.0

    @classmethod
    def check(cls, model: nn.Module, exclude: Sequence[str]) -> list[str]:
        """Returns the names of the modules that ``apply`` would convert; raises where it would, and changes nothing."""
        return list(convertible_modules(model, exclude)) if cls.quantizes else []

    @classmethod
    def apply(cls, model: nn.Module, config: QuantizeConfig, exclude: Sequence[str]) -> None:
        """Prepares the model in place, checking everything before it changes anything."""
        if cls.quantizes:
            convert(model, config, exclude)

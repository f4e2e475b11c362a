"""What an optimize level is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import OperandConfigs, QuantizeConfig
from ..nn.convert import convert, plan
from ..nn.half import HALF_TYPES, use_half
from ..rules import Rule, RuleBook


class Strategy:
    """One optimize level: a bundle of properties, and what it does to a model.

    To add one, subclass and pass the class to ``register_level``.

    Attributes:
        name: what ``opt_level`` calls it.
        summary: what it is for, in half a line.
        quantizes: whether the operands of products are fixed point.
        defaults: operand settings that ``initialize`` starts from; keywords override them one by one.
        activation_dtype: what flows between products: float32, bfloat16 or float16.
        loss_scale: default loss scale; None is "dynamic" where activations are float16, else 1.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    quantizes: ClassVar[bool]
    defaults: ClassVar[QuantizeConfig] = QuantizeConfig()
    activation_dtype: ClassVar[torch.dtype] = torch.float32
    loss_scale: ClassVar[float | str | None] = None

    @classmethod
    def configure(cls, settings: Mapping[str, Any]) -> QuantizeConfig:
        """Returns the operand settings: the level's, with these changed.

        Raises:
            ValueError: for an unknown setting, a value out of its range, or a setting that this level has no use for.
        """
        config = cls.defaults.replace(**settings)
        if not cls.quantizes:
            for name in ("bitwidth", "max_bitwidth"):
                if name in settings and settings[name] != getattr(cls.defaults, name):
                    raise ValueError(
                        f"opt_level {cls.name!r} keeps every product in float32, so {name}={settings[name]!r} would "
                        "have no effect: take 'O1', or drop it"
                    )
        return config

    @classmethod
    def choose_activations(cls, dtype: torch.dtype | str | None) -> torch.dtype:
        """Returns what flows between products: ``dtype``, or the level's where it is None.

        Raises:
            ValueError: for any other dtype than float32, bfloat16 and float16, or a half type at a level in float32.
        """
        if dtype is None:
            return cls.activation_dtype
        known = {str(each).removeprefix("torch."): each for each in (torch.float32, *HALF_TYPES)}
        chosen = known.get(str(dtype).removeprefix("torch."))
        if chosen is None:
            raise ValueError(f"activation_dtype must be one of {', '.join(known)}, got {dtype!r}")
        if not cls.quantizes and chosen != torch.float32:
            raise ValueError(
                f"opt_level {cls.name!r} is float32 throughout, so activation_dtype={dtype!r} contradicts it: "
                "take 'O2', or torch.autocast for half-precision products"
            )
        return chosen

    @classmethod
    def choose_loss_scale(cls, given: float | str | None, activations: torch.dtype) -> float | str:
        """Returns the loss scale: ``given``, the level's, or what the activations need."""
        if given is not None:
            return given
        if cls.loss_scale is not None:
            return cls.loss_scale
        return "dynamic" if activations == torch.float16 else 1.0

    @classmethod
    def check_rules(cls, rules: Sequence[Rule]) -> None:
        """Raises ValueError for rules that this level has no use for, whatever the model."""
        if not cls.quantizes and any(not rule.leave_out for rule in rules):
            raise ValueError(
                f"opt_level {cls.name!r} keeps every product in float32, so a rule with settings would have no "
                "effect: take 'O1', or drop it"
            )

    @classmethod
    def check(cls, model: nn.Module, config: QuantizeConfig, rules: Sequence[Rule]) -> dict[str, OperandConfigs]:
        """Returns the settings of the operands of each module that ``apply`` would convert, by its name.

        Raises where ``apply`` would, and changes nothing.
        """
        cls.check_rules(rules)
        if not cls.quantizes:
            RuleBook(model, rules).check()
            return {}
        return plan(model, config, rules)

    @classmethod
    def apply(
        cls,
        model: nn.Module,
        config: QuantizeConfig,
        rules: Sequence[Rule] = (),
        activations: torch.dtype = torch.float32,
    ) -> None:
        """Prepares the model in place, checking everything before it changes anything."""
        if cls.quantizes:
            convert(model, config, rules)
            if activations != torch.float32:
                use_half(model, activations)

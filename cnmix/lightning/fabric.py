"""The precision plugin for Lightning Fabric, which holds the logic of both plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.plugins import Precision
from torch.nn import Module

from .. import state
from ..amp import initialize
from ..nn import quantized_modules
from ..nn.half import frame
from ..rules import Rule, leave_out, parse_rules
from ..strategies import find_level


class FabricCnmixPlugin(Precision):
    """Trains in adaptive fixed point under ``lightning.fabric.Fabric(plugins=[FabricCnmixPlugin()])``.

    Args:
        opt_level: "O0" to "O3", see ``cnmix.initialize``.
        bitwidth: width that operands start with: 8, 16 or 31.
        max_bitwidth: width that none exceeds: 8, 16 or 31.
        steps_per_epoch: training steps in an epoch; the Trainer plugin takes it from the trainer where it is None.
        exclude: fully qualified names of modules to leave in float32.
        rules: other settings for some modules or operands, see ``cnmix.initialize``.
        activation_dtype: what flows between products: "float32", "bfloat16" or "float16"; the level's by default.
        settings: further fields of ``cnmix.QuantizeConfig``.

    Raises:
        TypeError: if ``exclude`` or ``rules`` is no list.
        ValueError: for an unknown level or setting, or a value out of its range.
    """

    # Any other string makes Lightning's model summary warn.
    precision = "32-true"

    def __init__(
        self,
        opt_level: str = "O1",
        bitwidth: int | None = None,
        max_bitwidth: int | None = None,
        steps_per_epoch: int | None = None,
        exclude: Sequence[str] = (),
        rules: Sequence[Rule | Mapping[str, Any]] = (),
        activation_dtype: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        given = {"bitwidth": bitwidth, "max_bitwidth": max_bitwidth, "steps_per_epoch": steps_per_epoch}
        given.update(settings or {})
        self.opt_level = opt_level
        self.settings = {name: value for name, value in given.items() if value is not None}
        self.rules = (*leave_out(exclude), *parse_rules(rules))
        # Refuse bad settings where the plugin is written, not when training starts.
        level = find_level(opt_level)
        level.configure(self.settings)
        level.check_rules(self.rules)
        self.activation_dtype = activation_dtype
        self._activations = level.choose_activations(activation_dtype)
        self._module: Module | None = None

    def convert_module(self, module: Module) -> Module:
        """Converts the model in place; Lightning calls this at the start of every fit, validate, test and predict."""
        settings: dict[str, Any] = dict(self.settings)
        initialize(module, None, self.opt_level, rules=self.rules, activation_dtype=self.activation_dtype, **settings)
        if self._activations != torch.float32:
            # A LightningModule computes its loss outside of forward, from what its parts return.
            for part in module.children():
                frame(part, self._activations)
        self._module = module
        return module

    def state_dict(self) -> dict[str, Any]:
        """Returns what the quantizers know; Lightning keeps it in the checkpoint under the name of the class."""
        return {} if self._module is None else state.state_dict(self._module)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: if the state's modules are not the model's.
        """
        if self._module is not None:
            state.load_state_dict(state_dict, self._module)

    def set_steps_per_epoch(self, steps: int) -> None:
        """Tells every operand how many training steps an epoch has."""
        if self._module is not None:
            for _, module in quantized_modules(self._module):
                module.quantizers.change_settings(steps_per_epoch=steps)

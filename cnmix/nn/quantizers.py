"""The operand quantizers of one module, and the integers of its weight."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..adaptive import OperandQuantizer, parse_operand_state
from ..config import Product, QuantizeConfig
from ..fixed_point import FixedPoint

OPERANDS = ("input", "weight", "grad_output")

# Weights up to this size are compared whole with the values they were quantized from; of larger ones, a sample of it.
_FINGERPRINT_SIZE = 4096


class ModuleQuantizers:
    """Quantizes the three operands of one Linear or convolution.

    Args:
        config: the settings of all three operands.
        product: "convolution" or "matmul".
        fqn: fully qualified name of the module, for messages.

    Attributes:
        input: quantizer of the module's input.
        weight: quantizer of its weight.
        grad_output: quantizer of the gradient of its output.
        fqn: fully qualified name of the module.
        product: "convolution" or "matmul".
    """

    def __init__(self, config: QuantizeConfig, product: Product, fqn: str) -> None:
        self.fqn = fqn
        self.product: Product = product
        # The key of stochastic rounding: a seed of the run, and a number per operand that any process finds again.
        run = torch.initial_seed() & 0xFFFFFFFF
        self.input, self.weight, self.grad_output = (
            OperandQuantizer(
                config, product, f"{operand} of {fqn!r}", run << 32 | zlib.crc32(f"{fqn}.{operand}".encode())
            )
            for operand in OPERANDS
        )
        self._weight_key: tuple[Any, ...] | None = None
        self._weight_sample: Tensor | None = None
        self._weight_integers: FixedPoint | None = None
        self._weight_measured = False  # whether the last update measured the very values of these integers
        self._frozen = False

    def __iter__(self) -> Iterator[tuple[str, OperandQuantizer]]:
        """Yields (operand name, quantizer)."""
        for name in OPERANDS:
            yield name, getattr(self, name)

    @property
    def config(self) -> QuantizeConfig:
        """The settings of the operands; assignment replaces them and keeps what was learned."""
        return self.input.config

    @config.setter
    def config(self, config: QuantizeConfig) -> None:
        for _, quantizer in self:
            quantizer.config = config
        self._weight_measured = False  # what was measured may come out otherwise now

    @property
    def frozen(self) -> bool:
        """Whether the weight's integers are fixed for inference."""
        return self._frozen

    def quantize_weight(self, weight: Tensor, training: bool) -> FixedPoint:
        """Quantizes the weight once per version of it; micro-batches and both backward products share the integers.

        A version is the tensor's counter of in-place writes and its memory. Writes through ``.data`` do not count, so
        its values, or of a large weight a sample of them, are compared too.
        """
        if self._frozen and self._weight_integers is not None:
            return self._weight_integers
        if weight.is_inference():  # inference tensors count no versions
            return self.weight(weight, training)
        quantizer = self.weight
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), quantizer.rounding(training))
        sample = _fingerprint(weight)
        known = self._weight_integers
        if (
            known is not None
            and self._weight_sample is not None
            and key == self._weight_key
            and (known.bits, known.position) == (quantizer.state.bits, quantizer.state.position)
            and not (training and quantizer.due and not self._weight_measured)
            and torch.equal(sample, self._weight_sample)
        ):
            if training:
                quantizer.repeat()
            return known
        integers = quantizer(weight, training)
        if self.product == "convolution":  # as its products want it
            integers = kernels.to_channels_last(integers)
        if integers.finite:
            self._weight_key, self._weight_sample, self._weight_integers = key, sample.clone(), integers
            state = quantizer.state
            self._weight_measured = training and state.updates > 0 and state.last_update == state.step - 1
        return integers

    def check_trained(self) -> None:
        """Raises RuntimeError, naming the module, if its input or weight has no stored position."""
        missing = [name for name in ("input", "weight") if getattr(self, name).state.position is None]
        if missing:
            raise RuntimeError(
                f"{self.fqn!r} has no stored position for {' and '.join(missing)}: integer inference needs the cnmix "
                "state of a training run (cnmix.load_state_dict), and a module that took part in it"
            )

    def freeze(self, weight: Tensor) -> None:
        """Fixes the weight's integers, quantized with the stored format, for inference.

        Raises:
            RuntimeError: as ``check_trained`` does.
        """
        self.check_trained()
        self._weight_integers = self.weight(weight, training=False)
        self._frozen = True

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Returns ``{"settings", "operands"}``: the settings in force and the state of each operand, plain numbers."""
        return {
            "settings": dataclasses.asdict(self.config),
            "operands": {name: quantizer.state_dict() for name, quantizer in self},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores the operands' states from what ``state_dict`` returned; the settings stay as they are.

        Raises:
            ValueError: if an operand or one of its numbers is missing or wrong; nothing is changed then.
        """
        check_module_state(state, self.fqn)
        for name, quantizer in self:
            quantizer.load_state_dict(state["operands"][name])
        self._weight_integers = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self._frozen:  # a copy has its own weight, and quantizes it when it first needs to
            state.update(_weight_key=None, _weight_sample=None, _weight_integers=None)
        return state


def check_module_state(state: Any, fqn: str) -> None:
    """Raises ValueError unless ``state`` is what ``ModuleQuantizers.state_dict`` returns."""
    if not isinstance(state, Mapping) or set(state) != {"settings", "operands"}:
        raise ValueError(f"the saved state of {fqn!r} must have settings and operands")
    if not isinstance(state["operands"], Mapping) or set(state["operands"]) != set(OPERANDS):
        raise ValueError(f"the saved state of {fqn!r} must have the operands {', '.join(OPERANDS)}")
    for name in OPERANDS:
        parse_operand_state(state["operands"][name], f"{name} of {fqn!r}")


def _fingerprint(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    step = max(1, flat.numel() // _FINGERPRINT_SIZE)
    while math.gcd(step, weight.shape[-1]) > 1:  # or whole columns would never be looked at
        step += 1
    return flat[::step]

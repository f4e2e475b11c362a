"""The operand quantizers of one module, and the integers of its weight."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
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

# Forward passes whose integers may wait for a backward pass, where a compiled graph could not take them.
_MOST_ASIDE = 64

# Operators of torch take tensors and numbers: a compiled graph knows its quantizers by number. Weak, so that nothing
# lives longer for it.
_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, ModuleQuantizers] = weakref.WeakValueDictionary()


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
        output_dtype: dtype of the module's output; None is that of its input.
        handle: int64 number by which a compiled graph finds these quantizers; a copy has its own.
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
        self._weight_checksum: int | None = None
        self._weight_integers: FixedPoint | None = None
        self._weight_measured = False  # whether the last update measured the very values of these integers
        self._frozen = False
        self.output_dtype: torch.dtype | None = None
        self._aside: dict[int, tuple[Tensor, Tensor]] = {}
        self._aside_count = 0
        self.handle = _register(self)

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

        A version is the tensor's counter of in-place writes, its memory and, since writes through ``.data`` are not
        counted, a checksum of its values: one pass over the weight, which quantizing it includes.
        """
        if self._frozen and self._weight_integers is not None:
            return self._weight_integers
        quantizer = self.weight
        if weight.is_inference() or weight.dtype != torch.float32:  # inference tensors count no versions
            return self._weight_layout(quantizer(weight, training))
        rounding = quantizer.rounding(training)
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), rounding)
        known, state = self._weight_integers, quantizer.state
        if (
            known is not None
            and key == self._weight_key
            and (known.bits, known.position) == (state.bits, state.position)
            and not (training and quantizer.due and not self._weight_measured)
            and kernels.checksum(weight) == self._weight_checksum
        ):
            if training:
                quantizer.repeat()
            return known
        quantized, found = quantizer.measured(weight, training, with_checksum=True)
        integers = self._weight_layout(quantized)
        # Evaluation between micro-batches must not take away the integers that training drew at random.
        if integers.finite and rounding == quantizer.rounding(training=True):
            self._weight_key, self._weight_checksum, self._weight_integers = key, found.checksum, integers
            self._weight_measured = training and state.updates > 0 and state.last_update == state.step - 1
        return integers

    def _weight_layout(self, integers: FixedPoint) -> FixedPoint:
        """Returns the weight's integers in the layout that the module's products want."""
        return kernels.to_channels_last(integers) if self.product == "convolution" else integers

    def put_aside(self, integers: tuple[Tensor, Tensor]) -> int:
        """Keeps the integers of input and weight for a backward pass; returns the number to fetch them with."""
        self._aside_count += 1
        self._aside[self._aside_count] = integers
        while len(self._aside) > _MOST_ASIDE:  # of forward passes that no backward pass followed
            del self._aside[min(self._aside)]
        return self._aside_count

    def take_back(self, number: int) -> tuple[Tensor, Tensor]:
        """Returns what ``put_aside`` kept.

        Raises:
            RuntimeError: if it is gone: a backward pass ran a second time, or very many forward passes came between.
        """
        if number not in self._aside:
            raise RuntimeError(
                f"the integers of a forward pass of {self.fqn!r} are gone: run the backward pass once, soon after it"
            )
        return self._aside.pop(number)

    def check_trained(self) -> None:
        """Raises ValueError, naming the module, if it took no part in training."""
        check_trained({name: quantizer.state.step for name, quantizer in self}, self.fqn)

    def freeze(self, weight: Tensor) -> None:
        """Fixes the weight's integers, quantized with the stored format, for inference.

        Raises:
            ValueError: as ``check_trained`` does.
        """
        self.check_trained()
        self._weight_integers = self._weight_layout(self.weight(weight, training=False))
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
            state.update(_weight_key=None, _weight_integers=None)
        state["_aside"] = {}
        del state["handle"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = _register(self)


def _register(quantizers: ModuleQuantizers) -> Tensor:
    handle = next(_handles)
    _by_handle[handle] = quantizers
    return torch.tensor(handle)


def find_quantizers(handle: int) -> ModuleQuantizers:
    """Returns the quantizers with this handle.

    Raises:
        RuntimeError: if their module is gone.
    """
    quantizers = _by_handle.get(handle)
    if quantizers is None:
        raise RuntimeError("a compiled graph ran whose cnmix module is gone: compile the model again")
    return quantizers


def check_trained(steps: Mapping[str, int], fqn: str) -> None:
    """Raises ValueError, naming the module, if its input or weight was never quantized in training."""
    missing = [name for name in ("input", "weight") if steps[name] == 0]
    if missing:
        raise ValueError(
            f"{fqn!r} has no stored position for {' and '.join(missing)}: integer inference needs the cnmix "
            "state of a training run (cnmix.load_state_dict), and a module that took part in it"
        )


def check_widths(state: Mapping[str, Any], fqn: str, config: QuantizeConfig) -> None:
    """Raises ValueError, naming operand and module, if a saved width is over the largest that the settings allow."""
    for name, operand in state["operands"].items():
        if operand["bits"] > config.max_bitwidth:
            raise ValueError(
                f"{name} of {fqn!r} is saved at int{operand['bits']}, over max_bitwidth {config.max_bitwidth}: raise it"
            )


def check_module_state(state: Any, fqn: str) -> None:
    """Raises ValueError unless ``state`` is what ``ModuleQuantizers.state_dict`` returns."""
    if not isinstance(state, Mapping) or set(state) != {"settings", "operands"}:
        raise ValueError(f"the saved state of {fqn!r} must have settings and operands")
    if not isinstance(state["operands"], Mapping) or set(state["operands"]) != set(OPERANDS):
        raise ValueError(f"the saved state of {fqn!r} must have the operands {', '.join(OPERANDS)}")
    for name in OPERANDS:
        parse_operand_state(state["operands"][name], f"{name} of {fqn!r}")

"""The operand quantizers of one module, and the integers of its weight."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..adaptive import OperandQuantizer
from ..config import OPERANDS, OperandConfigs, Product, QuantizeConfig
from ..entries import quantize_entries, repeat_entries
from ..fixed_point import FixedPoint, FixedPointBatch
from ..sequence import SequenceQuantizer
from .card_tensors import known_as, to_host
from .handles import WaitingIntegers, register
from .module_state import check_module_state, check_trained
from .ranks import Ranks
from .recomputation import Calls, FirstPass, current_backward, part_of_hooks, reentrant_part, saved_tensor_hooks
from .shared_input import LatestInput


class ModuleQuantizers:
    """Quantizes the three operands of one product: a Linear, a convolution, or one of several in a module.

    Args:
        config: the settings of all three operands, or of each.
        product: "convolution" or "matmul".
        fqn: fully qualified name of the module, for messages.
        latest_input: shared with the other modules of the model.
        ranks: likewise.
        of_function: whether the product is a function's that a module calls, which comes to be when it is first called.

    Attributes:
        input: quantizer of the module's input; of a function's left operand.
        weight: quantizer of its weight; of a function's right operand.
        grad_output: quantizer of the gradient of its output.
        ranks: the processes that train the model.
        weight_is_integers: whether the float weight is what its integers stand for, as ``sharded`` gathers it.
        fqn: fully qualified name of the module.
        product: "convolution" or "matmul".
        output_dtype: dtype of the module's output; None is that of its input.
        reentrant_part: the checkpointed part that the next forward pass is in, where that is its first pass and of the
            reentrant kind; see ``recomputation``.
        waiting: integers of forward passes that a compiled graph could not take.
        handle: int64 number by which a compiled graph finds these quantizers; a copy has its own.
        of_function: see above.
        keeps_weight: whether the next right operand is a parameter, whose integers serve until it changes.
    """

    def __init__(
        self,
        config: QuantizeConfig | OperandConfigs,
        product: Product,
        fqn: str,
        latest_input: LatestInput | None = None,
        ranks: Ranks | None = None,
        of_function: bool = False,
    ) -> None:
        configs = dict.fromkeys(OPERANDS, config) if isinstance(config, QuantizeConfig) else config
        self.product: Product = product
        # The key of stochastic rounding: a seed of the run, and a number per operand that any process finds again.
        run = torch.initial_seed() & 0xFFFFFFFF
        self.input, self.weight, self.grad_output = (
            OperandQuantizer(configs[operand], product, operand, run << 32 | zlib.crc32(f"{fqn}.{operand}".encode()))
            for operand in OPERANDS
        )
        self.fqn = fqn
        self._weight_key: tuple[Any, ...] | None = None
        self._weight_checksum: int | None = None
        self._weight_integers: FixedPoint | None = None
        self._weight_measured = False  # whether the last update measured the very values of these integers
        self._weight_observation: Any = None  # what it noted, where processes decide together
        self._drawn: Mapping[str, Any] | None = None  # how they were drawn, where that was at random
        self._latest_input = latest_input or LatestInput()
        self._frozen = False
        self._calls = Calls()
        self.reentrant_part: Any = None
        self.output_dtype: torch.dtype | None = None
        self.weight_is_integers = False
        self.waiting = WaitingIntegers()
        self.of_function = of_function
        self.keeps_weight = not of_function
        self.handle = register(self)
        self.ranks = ranks or Ranks()
        self.ranks.add(self)
        for _, quantizer in self:
            quantizer.closing = self.ranks.closing

    def __iter__(self) -> Iterator[tuple[str, OperandQuantizer]]:
        """Yields (operand name, quantizer)."""
        for name in OPERANDS:
            yield name, getattr(self, name)

    @property
    def fqn(self) -> str:
        """Fully qualified name of the module, for messages."""
        return self._fqn

    @fqn.setter
    def fqn(self, fqn: str) -> None:
        self._fqn = fqn
        for operand, quantizer in self:
            quantizer.name = f"{operand} of {fqn!r}"

    @property
    def config(self) -> QuantizeConfig:
        """The settings of the input, and of the module; assignment gives them to all operands, keeping their state."""
        return self.input.config

    @config.setter
    def config(self, config: QuantizeConfig) -> None:
        self.configs = dict.fromkeys(OPERANDS, config)

    @property
    def configs(self) -> OperandConfigs:
        """The settings of each operand; assignment replaces them and keeps what was learned."""
        return {name: quantizer.config for name, quantizer in self}

    @configs.setter
    def configs(self, configs: OperandConfigs) -> None:
        for name, quantizer in self:
            quantizer.config = configs[name]
        self._weight_measured = False  # what was measured may come out otherwise now

    def change_settings(self, **changes: Any) -> None:
        """Changes these settings of every operand and leaves the others.

        Raises:
            ValueError: as ``QuantizeConfig.replace`` does.
        """
        self.configs = {name: config.replace(**changes) for name, config in self.configs.items()}

    @property
    def bits(self) -> dict[str, int]:
        """Present width by operand."""
        return {name: quantizer.state.bits for name, quantizer in self}

    @property
    def frozen(self) -> bool:
        """Whether the weight's integers are fixed for inference."""
        return self._frozen

    @property
    def frozen_integers(self) -> FixedPoint | None:
        """The weight's integers, where they are fixed for inference; a function's are with its first call."""
        return self._weight_integers if self._frozen else None

    def quantize_weight(self, weight: Tensor, training: bool) -> FixedPoint:
        """Quantizes the weight once per version of it; micro-batches and both backward products share the integers.

        A version is the tensor's counter of in-place writes, its memory and, since writes through ``.data`` are not
        counted, a checksum of its values: one pass over the weight, which quantizing it includes.
        """
        if self._frozen:
            if self._weight_integers is None:
                with torch.inference_mode(False):
                    self._weight_integers = self._weight_layout(self.weight(weight, training=False))
            return self._weight_integers
        quantizer = self.weight
        if self.weight_is_integers and training and quantizer.look_next:
            # What became zero became so before it was gathered: nothing is left to see here.
            quantizer.look_next, quantizer.shares = False, None
        if weight.is_inference() or weight.dtype != torch.float32:  # inference tensors count no versions
            return self._weight_layout(quantizer(weight, training))
        rounding = quantizer.rounding(training)
        key = (weight._version, weight.shape, weight.stride(), rounding)
        known, state = self._weight_integers, quantizer.state
        if (
            known is not None
            and key == self._weight_key
            and (known.bits, known.position) == (state.bits, state.position)
            and not (training and quantizer.due and not self._is_measured)
            and kernels.checksum(weight) == self._weight_checksum
        ):
            if training:
                quantizer.repeat(known)
                if quantizer.look_next:
                    quantizer.look(weight, known)
            return known
        if training and known is None and self._drawn is not None and self._draw_again(weight, key):
            return self.quantize_weight(weight, training)
        if torch.is_inference_mode_enabled():  # an ordinary tensor, or the next training step could not save it
            with torch.inference_mode(False):
                return self.quantize_weight(weight, training)
        if self.weight_is_integers and training and quantizer.due and state.position is not None:
            # Gathered for a forward pass that no backward pass followed: the next gather brings what can be measured.
            quantizer.state.step += 1
            return self._weight_layout(quantizer.repeated(weight, state.bits, state.position, state.step))
        quantized, found = quantizer.measured(weight, training, with_checksum=True)
        integers = self._weight_layout(quantized)
        # Evaluation between micro-batches must not take away the integers that training drew at random.
        if integers.finite and rounding == quantizer.rounding(training=True):
            self._weight_key, self._weight_checksum, self._weight_integers = key, found.checksum, integers
            self._weight_measured = training and quantizer.measured_last
            self._weight_observation = quantizer.observation
            if rounding == "stochastic":
                self._drawn = {"checksum": found.checksum, "stream": state.step, "measured": self._weight_measured}
        return integers

    @property
    def _is_measured(self) -> bool:
        """Whether the weight whose integers are known needs no measuring again in this update."""
        return self._weight_measured and self._weight_observation is self.weight.observation

    def _draw_again(self, weight: Tensor, key: tuple[Any, ...]) -> bool:
        """Draws the integers anew that a run had when it was saved between two micro-batches, if it is that weight."""
        drawn, state = self._drawn, self.weight.state
        self._drawn = None
        if drawn is None or state.position is None or kernels.checksum(weight) != drawn["checksum"]:
            return False
        integers = self.weight.repeated(weight, state.bits, state.position, drawn["stream"])
        self._weight_integers = self._weight_layout(integers)
        self._weight_key, self._weight_checksum = key, drawn["checksum"]
        self._weight_measured, self._drawn = drawn["measured"], drawn
        self._weight_observation = self.weight.observation
        return True

    def _weight_layout(self, integers: FixedPoint) -> FixedPoint:
        """Returns the weight's integers in the layout that the module's products want."""
        return kernels.to_channels_last(integers) if self.product == "convolution" else integers

    def quantize(self, x: Tensor, weight: Tensor, training: bool) -> tuple[FixedPoint, FixedPoint]:
        """Quantizes input and weight of a forward pass.

        One that activation checkpointing repeats counts no step, and quantizes as the first one did.
        """
        if not training:
            return self._quantize_input(x, False), self._quantize_right(weight, False)
        part, repeated = self._begin()
        if repeated:
            call = self._calls.next(part)
            if call is not None:
                return self.input.repeated(x, call.bits, call.position, call.step), self._repeat_right(weight, call)
            state = self.input.state  # a part within a part, which torch makes anew each time
            return self.input.repeated(x, state.bits, state.position, state.step), self._quantize_right(weight, False)
        qx, qw = self._quantize_input(x, True), self._quantize_right(weight, True)
        if part is not None:
            kept = qw if self.keeps_weight else (qw.bits, qw.position, self.weight.state.step)
            self._calls.add(part, FirstPass(qx.bits, qx.position, self.input.state.step, kept))
        return qx, qw

    def quantize_batches(
        self, a: Tensor, b: Tensor, training: bool
    ) -> tuple[FixedPoint | FixedPointBatch, FixedPoint | FixedPointBatch]:
        """Quantizes both operands of a product of batches of matrices, whose entries may have their own positions.

        In a pass that activation checkpointing repeats as ``quantize`` does.
        """
        operands = (self.input, a), (self.weight, b)
        forms: list[tuple[int, int | None, int]]  # width, position and step of each
        part, repeated = self._begin() if training else (None, False)
        if repeated:
            call = self._calls.next(part)
            forms = [(each.state.bits, each.state.position, each.state.step) for each, _ in operands]
            if call is not None and not isinstance(call.weight, FixedPoint):
                forms = [(call.bits, call.position, call.step), call.weight]
            left, right = (repeat_entries(*each, form) for each, form in zip(operands, forms, strict=True))
            return left, right
        left, right = (quantize_entries(*each, training) for each in operands)
        if part is not None:
            forms = [
                (x.bits, x.position if isinstance(x, FixedPoint) else None, quantizer.state.step)
                for x, (quantizer, _) in zip((left, right), operands, strict=True)
            ]
            self._calls.add(part, FirstPass(*forms[0], forms[1]))
        return left, right

    def _quantize_right(self, weight: Tensor, training: bool) -> FixedPoint:
        if self.keeps_weight:
            return self.quantize_weight(weight, training)
        return self._weight_layout(self.weight(weight, training))

    def _repeat_right(self, weight: Tensor, call: FirstPass) -> FixedPoint:
        if isinstance(call.weight, FixedPoint):
            return call.weight
        return self._weight_layout(self.weight.repeated(weight, *call.weight))

    def quantize_sequence(
        self, rows: int, columns: int, weight: Tensor, training: bool
    ) -> tuple[SequenceQuantizer, FixedPoint]:
        """Quantizes the weight, and returns what quantizes an input (rows, columns) time step by time step."""
        part, repeated = self._begin() if training else (None, False)
        if repeated:
            call = self._calls.next(part)
            if call is not None and call.sequence is not None:
                return call.sequence.again(), self._repeat_right(weight, call)
            training_again = SequenceQuantizer(self.input, rows, columns, training=True, counts=False)
            return training_again, self.quantize_weight(weight, False)
        sequence = SequenceQuantizer(self.input, rows, columns, training, counts=training)
        qw = self.quantize_weight(weight, training)
        if part is not None:
            state = self.input.state
            self._calls.add(part, FirstPass(state.bits, state.position or 0, state.step, qw, sequence))
        return sequence, qw

    def _begin(self) -> tuple[Any, bool]:
        """Begins a forward pass in training; returns the checkpointed part it is in, and whether it repeats one."""
        hooks, reentrant = saved_tensor_hooks(), self.reentrant_part
        part, repeated = None, False
        if hooks is not None or reentrant is not None or current_backward() != -1:  # hardly ever
            self.reentrant_part = None
            repeated = current_backward() != -1
            part = reentrant or (reentrant_part() if hooks is None else part_of_hooks(hooks, repeated))
        if part is None or not repeated:
            self.ranks.forward_begins()
        return part, repeated and part is not None

    def _quantize_input(self, x: Tensor, training: bool) -> FixedPoint:
        quantizer = self.input
        rounding = quantizer.rounding(training)
        # Every module draws its own random numbers. A tensor that no operation computed may be a buffer that is filled
        # anew behind the back of its version counter, by NumPy for one.
        whole = known_as(x)  # of the card, where x is its host view
        if rounding == "stochastic" or whole.grad_fn is None:
            return quantizer(x, training)
        place = (x._version, x.data_ptr(), self.product, rounding)
        if not (training and quantizer.due):
            known = self._latest_input.find(whole, (*place, quantizer.state.bits, quantizer.state.position))
            if known is not None:
                quantizer.count(x, known, training)
                return known
        integers = quantizer(x, training)
        if self.product == "convolution":
            integers = kernels.to_channels_last(integers)  # once, for every product with it
        if integers.finite:
            self._latest_input.keep(whole, (*place, integers.bits, integers.position), integers)
        return integers

    def check_trained(self) -> None:
        """Raises ValueError, naming the module, if it took no part in training."""
        check_trained({name: quantizer.state.step for name, quantizer in self}, self.fqn)

    def freeze(self, weight: Tensor) -> None:
        """Fixes the weight's integers, quantized with the stored format, for inference.

        Raises:
            ValueError: as ``check_trained`` does, or if it is a part of a weight that ``fully_shard`` has split.
        """
        self.check_trained()
        if hasattr(weight, "device_mesh"):
            raise ValueError(
                f"the weight of {self.fqn!r} is shared out among processes: prepare a plain model from a checkpoint, "
                "with cnmix.inference.prepare"
            )
        self._weight_integers = self._weight_layout(self.weight(to_host(weight.detach()), training=False))
        self._frozen = True

    def freeze_integers(self, integers: FixedPoint | None = None) -> None:
        """Fixes the weight's integers for inference: these, or those of the parameter that a function next gets."""
        self._weight_integers, self._frozen = integers, True

    def state_dict(self) -> dict[str, Any]:
        """Returns the settings in force, the state of each operand, and how the weight was drawn at random; plain data.

        The last is what training goes on from between two micro-batches, which share the weight's integers.
        """
        return {
            "settings": {name: dataclasses.asdict(config) for name, config in self.configs.items()},
            "operands": {name: quantizer.state_dict() for name, quantizer in self},
            "drawn_weight": self._drawn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the operands' states from what ``state_dict`` returned; the settings stay as they are.

        Raises:
            ValueError: if an operand or one of its numbers is missing or wrong; nothing is changed then.
        """
        check_module_state(state, self.fqn)
        for name, quantizer in self:
            quantizer.load_state_dict(state["operands"][name])
        self._weight_integers = None
        self._drawn = state["drawn_weight"]
        self.ranks.states_were_loaded()

    def follow(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` returned in another process that trains the same model."""
        if state == self.state_dict():
            return
        self.load_state_dict(state)
        for name, quantizer in self:
            quantizer.config = QuantizeConfig(**state["settings"][name])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self._frozen:  # a copy has its own weight, and quantizes it when it first needs to
            state.update(_weight_key=None, _weight_integers=None)
        state.update(waiting=WaitingIntegers(), reentrant_part=None, _weight_observation=None)
        del state["handle"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = register(self)
        self.ranks.add(self)

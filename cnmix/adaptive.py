"""How an operand's width, position and update interval are chosen.

Adaptive precision training (Zhang et al., arXiv 1911.00361) as Cambricon's CNNL user guide and catch describe it: on
update steps QEM measures the quantization error, and QPA widens the operand until the error is under a threshold,
then sets the number of steps for which width and position are kept.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from . import kernels
from .closing import Closing
from .config import Product, QuantizeConfig
from .decisions import Decision, QuantizerListener, why_measured
from .fixed_point import BITS, FixedPoint, FixedPointBatch, Rounding, choose_position
from .kernels.profiling import timed
from .measures import error_sums, measure_again, update_interval
from .operand import Observation, OperandState, Rounds, parse_operand_state, relative_error

logger = logging.getLogger("cnmix")


class OperandQuantizer:
    """Quantizes one operand of one module: chooses its format on update steps, and reuses it in between.

    Where several processes train a model together, each quantizes on an update step with the format that fits its own
    tensor, and notes what it measured; ``agree`` then gives all of them one state.

    Args:
        config: the settings; may be replaced by assignment between steps.
        product: "convolution" or "matmul", which decides the default threshold.
        name: how messages call the operand, for example ``"grad_output of 'encoder.fc1'"``.
        seed: key of the random numbers for stochastic rounding.

    Attributes:
        observation: what this process saw, where it decides together with others; None where it decides alone.
        draw_key: what the seed is combined with, so that processes with different data draw different numbers.
        look_next: set it to have the next training step look at its ``shares``, once, in a few passes over the tensor,
            and show the tensor to the listener; "values" does the latter alone.
        shares: what the format did not hold of the tensor that was looked at last. Not part of the state.
        listener: is told of every decision, of NaN and infinity, and of tensors that are looked at. A copy has none.
        closing: says when it has measured for the last time, and width and position stay. Not part of the state.
    """

    look_next: bool | Literal["values"] = False
    closing: Closing | None = None
    shares: kernels.Shares | None = None
    listener: QuantizerListener | None = None

    def __init__(self, config: QuantizeConfig, product: Product, name: str, seed: int = 0) -> None:
        self.config = config
        self.product: Product = product
        self.name = name
        self.state = OperandState(bits=config.bitwidth, seed=seed)
        self.observation: Observation | None = None
        self.draw_key = 0
        self._saw_nonfinite = False

    def __call__(self, x: Tensor, training: bool) -> FixedPoint:
        """Quantizes ``x`` (float, any shape); ``training`` counts a step and allows an update.

        Outside training nothing is changed: the stored format serves, or before the first update one that fits ``x``.
        """
        return self.measured(x, training)[0]

    def measured(
        self, x: Tensor, training: bool, *, channel_dim: int | None = None, with_checksum: bool = False
    ) -> tuple[FixedPoint, kernels.Statistics]:
        """Does the same, and returns what the pass over ``x`` found; see ``kernels.quantize_measured``."""
        state = self.state
        due = training and self.due
        state.step += training
        if due:
            quantized, found = self._update(x, channel_dim, with_checksum)
        else:
            rounding = self.rounding(training)
            quantized, found = kernels.quantize_measured(
                x,
                state.bits,
                state.position,
                rounding,
                seed=self.draw_seed,
                stream=state.step,
                channel_dim=channel_dim,
                with_checksum=with_checksum,
            )
            if training:
                self._watch_saturation(quantized)
        if self.look_next and training:
            self.look(x, quantized)
        self.notice(quantized, training)
        return quantized, found

    def notice(self, quantized: FixedPoint | FixedPointBatch, training: bool) -> None:
        """Warns of the first tensor of a row with NaN or infinity; a finite one in training ends the row."""
        if quantized.finite:
            self._saw_nonfinite = self._saw_nonfinite and not training
        elif not self._saw_nonfinite:
            self._saw_nonfinite = True
            when = f"training step {self.state.step - 1}" if training else "outside training"
            logger.warning("NaN or infinity in %s (%s): the products with it are NaN", self.name, when)
            if self.listener is not None:
                self.listener.met_nonfinite(self)

    @property
    def _closed(self) -> bool:
        return self.closing is not None and self.closing.closed

    @property
    def due(self) -> bool:
        """Whether the next training step measures."""
        if self._closed and self.state.position is not None:
            return False
        if self.observation is not None:
            return self.observation.due
        return self.state.step >= self.state.next_update

    @property
    def measured_last(self) -> bool:
        """Whether the last training step measured."""
        if self.observation is not None:
            return self.observation.absmax > 0
        return self.state.updates > 0 and self.state.last_update == self.state.step - 1

    def rounding(self, training: bool) -> Rounding:
        """Returns the rounding of data: as configured, but never random outside training."""
        rounding = self.config.rounding
        return rounding if training or rounding != "stochastic" else "nearest_even"

    def count(self, x: Tensor, quantized: FixedPoint, training: bool) -> None:
        """Takes a step without an update, whose tensor another quantizer gave these integers in the same format."""
        self.state.step += training
        if training:
            self._watch_saturation(quantized)
            if self.look_next:
                self.look(x, quantized)

    @timed("look")
    def look(self, x: Tensor, quantized: FixedPoint | FixedPointBatch) -> None:
        """Looks at a training step's tensor, as ``look_next`` asks for, which ends with it."""
        everything, self.look_next = self.look_next is True, False
        with torch._C.DisableTorchFunction():  # what looking calls is not the model's, which may be watched for that
            if everything:
                self.shares = kernels.shares(x, quantized)
            if self.listener is not None:
                self.listener.looked(self, x, quantized)

    def repeated(
        self, x: Tensor, bits: int, position: int | None, stream: int, start: int = 0, training: bool = True
    ) -> FixedPoint:
        """Quantizes as an earlier step did, without counting one: in that format, with its random draws.

        ``x`` may be a part of that step's tensor, from the element ``start`` on.
        """
        rounding, seed = self.rounding(training), self.draw_seed
        return kernels.quantize_measured(x, bits, position, rounding, seed=seed, stream=stream, start=start)[0]

    def repeat(self, quantized: FixedPoint) -> None:
        """Counts a training step on the very tensor that gave these integers before, without measuring it again."""
        state, due = self.state, self.due
        state.step += 1
        if not due:
            self._watch_saturation(quantized)
        elif self.observation is None and state.position is not None:
            self._adopt(state.bits, state.position, state.error, {state.bits: state.error})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "listener"}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers."""
        return dataclasses.asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: if a number is missing, unknown or out of its range.
        """
        self.state = parse_operand_state(state, self.name)
        if self.observation is not None:
            self.observe(self.observation.rounds)

    def observe(self, rounds: Rounds, steps_per_round: float = 1.0) -> None:
        """Begins anew to note what this process sees, and to decide together with others.

        Args:
            rounds: those of all processes; the next update comes in one of them.
            steps_per_round: steps that the operand takes in a round.
        """
        quiet = max(self.state.next_update - self.state.step, 0)
        due_round = rounds.present + math.ceil(quiet / steps_per_round)
        self.observation = Observation(self.state.step, rounds, due_round)

    def agree(self, step: int, seen: Observation, steps_per_round: float) -> None:
        """Takes what all processes saw together, which gives each of them the same state, and begins anew to observe.

        Args:
            step: training steps seen, after which they agree.
            seen: the largest magnitude, and the sums, over all processes; ``saturation`` is their mean. Its rounds are
                in the one that comes next.
            steps_per_round: steps that the operand takes in a round.
        """
        state = self.state
        state.step = step
        state.saturation += seen.saturation
        if seen.absmax > 0:
            bits, error = self._choose_width(seen.error)
            self._adopt(bits, choose_position(seen.absmax, bits), error, {each: seen.error(each) for each in seen.sums})
        elif self.config.saturation is not None:
            self._look_for_saturation()
        self.observe(seen.rounds, steps_per_round)

    @property
    def draw_seed(self) -> int:
        """Key of this process's random numbers."""
        return self.state.seed ^ self.draw_key

    def _update(self, x: Tensor, channel_dim: int | None, with_checksum: bool) -> tuple[FixedPoint, kernels.Statistics]:
        """Measures, adjusts the format, schedules the next update, and quantizes.

        A tensor with NaN or infinity, and one of zeros alone, says nothing of the range: nothing is adjusted, and the
        next step looks again.
        """
        state = self.state
        first, found = kernels.quantize_measured(
            x, state.bits, None, measure=True, channel_dim=channel_dim, with_checksum=with_checksum
        )
        if not found.absmax > 0 or not first.finite:
            return first, found
        return self._adjust(x, first, found)

    @timed("adapt")
    def _adjust(self, x: Tensor, first: FixedPoint, found: kernels.Statistics) -> tuple[FixedPoint, kernels.Statistics]:
        """Decides by what the pass at the present width found, and returns the integers that were decided for."""
        state = self.state
        tried = {state.bits: (first, found)}

        def sums_at(bits: int) -> tuple[float, float]:
            if bits not in tried:
                tried[bits] = measure_again(x, bits, found)
            return error_sums(x, tried[bits][0], self.config.error_measure, tried[bits][1])

        bits = self.decide(found.absmax, sums_at)
        quantized, found = tried[bits]
        rounding = self.rounding(training=True)
        if rounding == "nearest_even":
            return quantized, found
        values = kernels.quantize(x, bits, quantized.position, rounding, seed=self.draw_seed, stream=state.step)
        return quantized._replace(values=values), found

    def decide(self, absmax: float, sums_at: Callable[[int], tuple[float, float]]) -> int:
        """Decides on an update step which width to go on with, or notes what it takes for all processes to decide.

        Args:
            absmax: largest magnitude, finite and over 0.
            sums_at: returns the sums that QEM takes at a width, see ``error_sums``.

        Returns:
            The width that this process's own tensor wants.
        """
        differences: dict[int, tuple[float, float]] = {}
        errors: dict[int, float | None] = {}

        def error_at(bits: int) -> float:
            differences[bits] = sums_at(bits)
            errors[bits] = error = relative_error(*differences[bits])
            return error

        bits, error = self._choose_width(error_at)
        if self.observation is None:
            self._adopt(bits, choose_position(absmax, bits), error, errors)
        else:
            self.observation.add(absmax, differences)
        return bits

    def _choose_width(self, error_at: Callable[[int], float | None]) -> tuple[int, float]:
        """Returns the width to go on with, and its error.

        Args:
            error_at: returns the quantization error at a width; None for one that no process measured.
        """
        config, present = self.config, self.state.bits
        threshold = config.threshold_for(self.product)
        bits, error = present, error_at(present) or 0.0
        if config.mode == "fixed_width":
            return bits, error
        for width in BITS:
            if error <= threshold or width > config.max_bitwidth:
                break
            wider = error_at(width) if width > present else None
            if wider is not None:
                bits, error = width, wider
        narrower = [width for width in BITS if config.bitwidth <= width < bits]
        if config.narrowing is not None and bits == present and narrower:
            narrow = error_at(narrower[-1])
            if narrow is not None and narrow <= config.narrowing * threshold:
                bits, error = narrower[-1], narrow
        return bits, error

    def _adopt(self, bits: int, position: int, error: float, errors: Mapping[int, float | None]) -> None:
        """Takes a format over and sets the next update; ``errors`` are those that it was chosen by."""
        config, state, listener = self.config, self.state, self.listener
        before, reason = (state.bits, state.position), ""
        if listener is not None:  # while the state still has what it follows from
            reason = why_measured(state, config, self.observation is not None)
        interval_reason = self._schedule(position, error, widened=bits - state.bits)
        state.bits = bits
        threshold = config.threshold_for(self.product)
        state.exceeds_max_bitwidth = error > threshold
        if listener is not None:
            bits_then, position_then = before
            outcome = "widened" if bits > bits_then else "narrowed" if bits < bits_then else "kept"
            listener.decided(
                self,
                Decision(
                    step=state.step - 1,
                    reason=reason,
                    errors=errors,
                    threshold=threshold,
                    bits=(bits_then, bits),
                    position=(position_then, position),
                    outcome="over" if error > threshold else outcome,
                    interval=state.interval,
                    interval_reason=interval_reason,
                ),
            )

    def _watch_saturation(self, quantized: FixedPoint) -> None:
        """Brings the next update forward where too many values since the last one lay at the limits of the format."""
        if self.config.saturation is None or self._closed:
            return
        share = kernels.saturated_share(quantized)
        if self.observation is not None:
            self.observation.saturation += share
            return
        self.state.saturation += share
        self._look_for_saturation()

    def _look_for_saturation(self) -> None:
        state, bound = self.state, self.config.saturation
        if bound is not None and state.saturation > bound * (state.step - 1 - state.last_update):
            state.next_update = state.step

    def _schedule(self, position: int, error: float, widened: int = 0) -> str:
        """Takes this step's position and error into the state and sets the next update; returns why it comes then."""
        config, state = self.config, self.state
        step = state.step - 1
        # Between updates the position stood still, and its average went on towards it.
        idle = step - state.last_update - 1
        if state.position is not None and idle > 0:
            kept = (1 - config.alpha) ** idle
            state.moving_position = kept * state.moving_position + (1 - kept) * state.position
        # A wider format puts its step at a lower position.
        state.moving_position -= widened
        state.interval, reason = self._next_interval(step, position, error)
        state.moving_position = config.alpha * position + (1 - config.alpha) * state.moving_position
        state.position, state.error = position, error
        state.next_update = step + state.interval
        state.last_update = step
        state.updates += 1
        state.saturation = 0.0
        return reason

    def _next_interval(self, step: int, position: int, error: float) -> tuple[int, str]:
        config = self.config
        if config.online:
            return 1, "online"
        if config.mode == "fixed_interval":
            return config.interval, "fixed"
        epoch = config.steps_per_epoch
        if step < config.quantify_rate * epoch:
            return 1, "first share of the epoch"
        if step >= epoch:
            return epoch - step % epoch, "end of the epoch"  # the next epoch's first step
        interval, reason = update_interval(position, self.state.moving_position, error, config)
        return (interval, reason) if interval < epoch - step else (epoch - step, "end of the epoch")

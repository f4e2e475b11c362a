"""What an operand's quantizer decides on an update step, and whom it tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .config import QuantizeConfig
from .fixed_point import FixedPoint, FixedPointBatch
from .operand import OperandState

if TYPE_CHECKING:
    from torch import Tensor

    from .adaptive import OperandQuantizer


class Decision(NamedTuple):
    """What one update step of one operand measured, and what followed from it.

    Attributes:
        step: the operand's own training step, from 0.
        reason: why it measured: "first", "nothing measured before" (where the step that was due had zeros alone, NaN or
            infinity), "online", "fixed interval", "saturation", "first share of the epoch", "new epoch" or
            "interval ended".
        errors: quantization error (QEM) at each width that was tried.
        threshold: over which the width grows.
        bits: width before and after.
        position: position before, None where there was none, and after.
        outcome: "kept", "widened" or "narrowed"; "over" where the error is over the threshold at the widest width that
            is allowed, whatever became of the width.
        interval: steps until the next update.
        interval_reason: what it follows from: "range moves" (how far the position is from its average), "coarse format"
            (the error), "first share of the epoch", "end of the epoch", "fixed" or "online".
    """

    step: int
    reason: str
    errors: Mapping[int, float | None]
    threshold: float
    bits: tuple[int, int]
    position: tuple[int | None, int]
    outcome: str
    interval: int
    interval_reason: str


class QuantizerListener(Protocol):
    """Is told what a quantizer does, while it does it."""

    def decided(self, quantizer: OperandQuantizer, decision: Decision) -> None:
        """Takes note of an update step."""

    def met_nonfinite(self, quantizer: OperandQuantizer) -> None:
        """Takes note of the first tensor of a row with NaN or infinity."""

    def looked(self, quantizer: OperandQuantizer, x: Tensor, quantized: FixedPoint | FixedPointBatch) -> None:
        """Takes note of a tensor, float of any shape, that ``look_next`` asked for, and of its integers."""


def why_measured(state: OperandState, config: QuantizeConfig, together: bool) -> str:
    """Returns the reason of the update of the step that ``state`` has just counted; see ``Decision``.

    Args:
        state: before the update.
        config: settings of the operand.
        together: whether several processes decide, in rounds that need not end with the step that was due.
    """
    step, epoch = state.step - 1, config.steps_per_epoch
    if state.updates == 0 and (together or step == state.next_update):
        return "first"
    if step > state.next_update and not together:
        return "nothing measured before"
    if config.online:
        return "online"
    if state.next_update < state.last_update + state.interval:
        return "saturation"
    if config.mode == "fixed_interval":
        return "fixed interval"
    if step < config.quantify_rate * epoch:
        return "first share of the epoch"
    return "new epoch" if step // epoch > state.last_update // epoch else "interval ended"

"""Loss scaling, kept with the optimizer that it serves."""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("cnmix")

# Below this no gradient of a float32 model overflows for its scale: it is not finite by itself.
_SMALLEST_SCALE = 2.0**-24
_ATTRIBUTE = "_cnmix_scaler"


class LossScaler:
    """The scale of a loss, static or dynamic, and what happens when gradients overflow.

    A dynamic scale starts at 2**16, halves when a gradient is not finite, and doubles after 2000 steps without that
    (the constants of apex.amp and of ``torch.amp.GradScaler``). A step with such gradients is skipped.

    Args:
        scale: a positive finite factor, or "dynamic".

    Raises:
        ValueError: for any other scale.
    """

    def __init__(self, scale: float | str = 1.0) -> None:
        self.requested = scale
        self.dynamic = scale == "dynamic"
        if not self.dynamic and (
            isinstance(scale, (str, bool)) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf
        ):
            raise ValueError(f'loss_scale must be a positive finite number or "dynamic", got {scale!r}')
        self.scale = 2.0**16 if self.dynamic else float(scale)
        self.steps_without_overflow = 0
        self.overflow = False

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divides gradients by the scale in place; a dynamic scale also looks for overflow in them."""
        if not gradients:
            return
        if self.scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / self.scale)
        if self.dynamic:
            # One non-finite element makes the sum of the norms non-finite.
            total = torch.stack([norm.double() for norm in torch._foreach_norm(gradients)]).sum()
            self.overflow |= not math.isfinite(total.item())

    def adjust(self) -> bool:
        """Ends an optimizer step: adapts the dynamic scale; returns whether the step must be skipped."""
        if not self.dynamic:
            return False
        skip, self.overflow = self.overflow, False
        if skip:
            self.scale = max(self.scale / 2, _SMALLEST_SCALE)
            self.steps_without_overflow = 0
            logger.info("gradient overflow: step skipped, loss scale now %g", self.scale)
            return True
        self.steps_without_overflow += 1
        if self.steps_without_overflow == 2000:
            self.scale *= 2
            self.steps_without_overflow = 0
        return False

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers."""
        return {
            "dynamic": self.dynamic,
            "scale": self.scale,
            "steps_without_overflow": self.steps_without_overflow,
            "overflow": self.overflow,
        }

    def check_state(self, state: Any) -> None:
        """Raises ValueError if a number is missing, or the saved scale was dynamic and this one is not, or reverse."""
        if not isinstance(state, Mapping) or set(state) != set(self.state_dict()):
            raise ValueError(f"the saved loss scale must have exactly {sorted(self.state_dict())}")
        if state["dynamic"] != self.dynamic:
            kinds = {True: '"dynamic"', False: "a number"}
            raise ValueError(
                f"the saved loss scale is {kinds[state['dynamic']]}, and initialize was given {kinds[self.dynamic]}"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: as ``check_state`` does; nothing is changed then.
        """
        self.check_state(state)
        self.__dict__.update(state)


def attach_scaler(optimizer: Any, scaler: LossScaler) -> None:
    """Keeps the scaler with the optimizer; with a dynamic scale its ``step`` skips after an overflow.

    ``step`` is replaced on the instance, as a bound method, so that schedulers and wrappers find what they expect.
    """
    setattr(optimizer, _ATTRIBUTE, scaler)
    if not scaler.dynamic:
        return
    original = optimizer.step

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if scaler.adjust():
            self._opt_called = True  # what a scheduler looks for; a skipped step is no mistake in the script
            return None
        return original(*args, **kwargs)

    optimizer.step = types.MethodType(step, optimizer)


def scaler_of(optimizer: Any) -> LossScaler | None:
    """Returns the scaler that ``initialize`` attached, or None."""
    return getattr(optimizer, _ATTRIBUTE, None)


def gradients_of(optimizers: Iterable[Any]) -> list[Tensor]:
    """Returns the gradients of the optimizers' parameters, each once; of sparse ones the values."""
    parameters = {
        id(parameter): parameter
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    return [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]

"""The loss scale of a precision plugin."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optim import LossScaler, gradients_at, step_unless_overflow, which_are_finite


class PluginScale:
    """One loss scale for all optimizers of a plugin, as a backward pass may be for any of them.

    Gradients are ordinary ones outside of a backward pass, whatever the scale is then, so that several optimizers may
    step at rates of their own. Each skips its step by its own gradients, and every overflow halves the scale.

    Attributes:
        scaler: the scale.
        needed: whether it can be any other than 1.

    Args:
        scale: a positive finite factor, or "dynamic".

    Raises:
        ValueError: for any other scale.
    """

    def __init__(self, scale: float | str) -> None:
        self.scaler = LossScaler(scale)
        self.needed = self.scaler.dynamic or self.scaler.scale != 1.0
        self._overflowed: set[Tensor] = set()  # parameters whose gradients were not finite since their last step

    @contextlib.contextmanager
    def scale(self, loss: Tensor, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the loss times the scale, and unscales the gradients on leaving.

        Args:
            loss: scalar float tensor.
            parameters: all that the backward pass may reach; of those that ``fully_shard`` has split, the parts.
        """
        scale = self.scaler.scale
        # What has no gradient any more was reached by a loss that was not for its optimizer (a generator's, say).
        self._overflowed = {parameter for parameter in self._overflowed if parameter.grad is not None}
        for gradient in gradients_at(parameters):  # what accumulated so far
            gradient.mul_(scale)
        try:
            yield loss * scale
        finally:
            self.scaler.unscale(gradients_at(parameters))
            if self.scaler.overflow:
                reached = [parameter for parameter in parameters if parameter.grad is not None]
                finite = which_are_finite([parameter.grad for parameter in reached if parameter.grad is not None])
                self._overflowed.update(each for each, fine in zip(reached, finite, strict=True) if not fine)

    def step(
        self,
        optimizer: Any,
        parameters: Sequence[Tensor],
        closure: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Takes an optimizer's step, unless gradients of its parameters overflowed since its last one.

        Args:
            optimizer: a torch optimizer.
            parameters: those that ``scale`` is given.
            closure: what computes loss and gradients, if that is still to be done. It is called once; of an optimizer
                that cannot step without one (LBFGS) as often as that calls it, and again where gradients overflow.
            **kwargs: handed on to the optimizer's step.

        Returns:
            What the step or the closure returns.

        Raises:
            RuntimeError: if the optimizer has a parameter with a gradient that is not among ``parameters``.
        """
        result = None
        if closure is not None and not _needs_closure(optimizer):
            with torch.enable_grad():
                result = closure()
            closure = None
        own = _parameters_of(optimizer)
        for foreign in own.difference(parameters):
            if foreign.grad is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__} has a parameter of shape {tuple(foreign.shape)} that is in no module "
                    "which was set up, so that its gradient still has the loss scale: put it into one"
                )

        def evaluate() -> Any:
            assert closure is not None
            loss = closure()
            self._blame(own)
            return loss

        self._blame(own)
        taken = step_unless_overflow(
            optimizer, [self.scaler], optimizer.step, None if closure is None else evaluate, **kwargs
        )
        return result if taken is None else taken

    def before_clipping(self, optimizer: Any) -> None:
        """Sets gradients that will not be stepped with to zero: Fabric refuses to clip what is not finite."""
        own = _parameters_of(optimizer)
        if not self._overflowed.isdisjoint(own):
            for gradient in gradients_at(own):
                gradient.zero_()

    def _blame(self, own: set[Tensor]) -> None:
        """Says whether there was an overflow in the gradients of the optimizer that steps now."""
        self.scaler.overflow = not self._overflowed.isdisjoint(own)
        self._overflowed -= own


def _parameters_of(optimizer: Any) -> set[Tensor]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _needs_closure(optimizer: Any) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty

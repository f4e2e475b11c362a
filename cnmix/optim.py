"""Loss scaling, kept with the optimizer that it serves."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    Attributes:
        requested: what ``initialize`` was given.
        dynamic: whether the scale adapts.
        scale: the present factor.
        steps_without_overflow: since the scale changed.
        overflow: whether gradients of this loss were not finite since the last step.
        pending: whether this loss took part since the last step.
        active: whether a block of ``scale_loss`` is open.

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
        self.pending = False
        self.active = False

    def unscale(self, gradients: list[Tensor], look_for_overflow: bool = True) -> None:
        """Divides gradients by the scale in place; a dynamic scale also looks for overflow in them."""
        if not gradients:
            return
        if self.scale != 1.0:
            torch._foreach_mul_(_local_parts(gradients), 1.0 / self.scale)
        if self.dynamic and look_for_overflow:
            self.pending = True
            self.overflow |= not _are_finite(gradients)

    def adjust(self) -> None:
        """Ends an optimizer step: adapts a dynamic scale to what this loss's gradients were."""
        if self.overflow:
            self.scale = max(self.scale / 2, _SMALLEST_SCALE)
            self.steps_without_overflow = 0
        elif self.pending:
            self.steps_without_overflow += 1
            if self.steps_without_overflow == 2000:
                self.scale *= 2
                self.steps_without_overflow = 0
        self.overflow = self.pending = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers."""
        return {
            "dynamic": self.dynamic,
            "scale": self.scale,
            "steps_without_overflow": self.steps_without_overflow,
            "overflow": self.overflow,
            "pending": self.pending,
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


def _are_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether all elements are finite; of gradients that ``fully_shard`` has split, in every process."""
    local = _local_parts(gradients)
    # One non-finite element makes the sum of the norms non-finite; so does the square of a very large one.
    total = torch.stack([norm.double() for norm in torch._foreach_norm(local)]).sum()
    finite = math.isfinite(total.item()) or all(bool(gradient.isfinite().all()) for gradient in local)
    return _in_every_process(gradients, [finite])[0]


def which_are_finite(gradients: Sequence[Tensor]) -> list[bool]:
    """Says of each gradient whether its elements are finite, in every process that has a part of it."""
    return _in_every_process(gradients, [bool(each.isfinite().all()) for each in _local_parts(gradients)])


def _local_parts(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [getattr(gradient, "_local_tensor", gradient) for gradient in gradients]


def _in_every_process(gradients: Sequence[Tensor], flags: list[bool]) -> list[bool]:
    """Returns what is true in all processes that the gradients are shared out among."""
    meshes = {gradient.device_mesh for gradient in gradients if hasattr(gradient, "device_mesh")}
    if not meshes:
        return flags
    found = torch.tensor(flags, dtype=torch.float32, device=_local_parts(gradients)[0].device)
    for mesh in meshes:
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, mesh.get_group(dimension))
    return [bool(flag) for flag in found.tolist()]


def check_scalers(scalers: Sequence[LossScaler], states: Any) -> None:
    """Raises ValueError unless the saved loss scales of an optimizer are for these scalers."""
    if not isinstance(states, (list, tuple)):
        raise ValueError(f"the saved loss scales of an optimizer must be a list, got {type(states).__name__}")
    if len(states) != len(scalers):
        raise ValueError(f"{len(states)} losses of an optimizer are saved, and num_losses is {len(scalers)}")
    for scaler, state in zip(scalers, states, strict=True):
        scaler.check_state(state)


def attach_scalers(optimizer: Any, scalers: list[LossScaler]) -> None:
    """Keeps the scalers of its losses with the optimizer; with a dynamic scale its ``step`` skips after an overflow.

    A skipped step leaves parameters and optimizer state alone. Where ``step`` is given a closure (LBFGS), which scales
    its loss inside, an overflow in it evaluates it again with a smaller scale, and each evaluation counts as a step.

    ``step`` is replaced on the instance, as a bound method, so that schedulers and wrappers find what they expect.
    """
    setattr(optimizer, _ATTRIBUTE, scalers)
    if not scalers[0].dynamic and scalers[0].scale == 1.0:
        return
    original = optimizer.step

    @functools.wraps(original)
    def step(self: Any, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        if any(scaler.active for scaler in scalers):
            raise RuntimeError(
                f"{type(self).__name__}.step() within a scale_loss block, where gradients are still scaled: call it "
                "behind the block"
            )
        return step_unless_overflow(self, scalers, original, closure, *args, **kwargs)

    optimizer.step = types.MethodType(step, optimizer)


def step_unless_overflow(
    optimizer: Any, scalers: Sequence[LossScaler], step: Callable[..., Any], closure: Any, *args: Any, **kwargs: Any
) -> Any:
    """Takes the step of an optimizer, or skips it where gradients of one of its losses overflowed; adapts the scales.

    Args:
        optimizer: whose step it is.
        scalers: of its losses.
        step: takes the step, of a closure or of none, and the other arguments.
        closure: None, or what computes loss and gradients: where they overflow it is called again with a smaller scale.
        *args: handed on.
        **kwargs: likewise.

    Returns:
        What ``step`` returns; None where it was skipped.
    """
    overflow = adjust_all(scalers)
    if closure is None and not overflow:
        return step(*args, **kwargs)
    if not overflow:
        with contextlib.suppress(_NeverFinite):
            return step(_Evaluation(closure, scalers), *args, **kwargs)
    _say_overflow("step skipped", scalers)
    optimizer._opt_called = True  # what a scheduler looks for; a skipped step is no mistake in the script
    return None


def adjust_all(scalers: Sequence[LossScaler]) -> bool:
    """Adapts the scales of an optimizer's losses; returns whether one had overflowed since the last step."""
    overflow = any(scaler.overflow for scaler in scalers)
    for scaler in scalers:
        scaler.adjust()
    return overflow


def _say_overflow(consequence: str, scalers: Sequence[LossScaler]) -> None:
    scales = ", ".join(f"{scaler.scale:g}" for scaler in scalers)
    logger.warning("gradient overflow: %s, loss scale now %s", consequence, scales)


class _NeverFinite(Exception):
    """The gradients of a closure are not finite at any scale."""


class _Evaluation:
    """An optimizer's closure, evaluated until its gradients are finite or no smaller scale can make them so.

    If they never are, the first evaluation of a step raises ``_NeverFinite``, as the optimizer has changed nothing yet;
    a later one returns what it found, as it does without a loss scale.
    """

    def __init__(self, closure: Callable[[], Any], scalers: Sequence[LossScaler]) -> None:
        self.closure = closure
        self.scalers = scalers
        self.first = True

    def __call__(self) -> Any:
        repeated = False
        while True:
            loss = self.closure()
            hopeless = all(scaler.scale <= _SMALLEST_SCALE for scaler in self.scalers if scaler.overflow)
            overflow = adjust_all(self.scalers)
            if not overflow or hopeless:
                break
            repeated = True
        if overflow and self.first:
            raise _NeverFinite
        self.first = False
        if repeated:
            _say_overflow("closure evaluated again", self.scalers)
        return loss


def scalers_of(optimizer: Any) -> list[LossScaler]:
    """Returns the scalers that ``initialize`` attached; none for an optimizer that it was not given."""
    return getattr(optimizer, _ATTRIBUTE, [])


def gradients_of(optimizers: Iterable[Any]) -> list[Tensor]:
    """Returns the gradients of the optimizers' parameters, each once; of sparse ones the values."""
    return gradients_at(
        parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    )


def gradients_at(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns the gradients of these parameters, each once; of sparse ones the values."""
    distinct = {id(parameter): parameter for parameter in parameters}
    gradients = [parameter.grad for parameter in distinct.values() if parameter.grad is not None]
    return [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]

"""Where the first NaN or infinity of a training run comes from."""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..nn.card_tensors import product_watcher
from ..registry import unwrap
from ..trial import eagerly, tensors_in
from .operands import function_name, quantizers_in, tensor_arguments

logger = logging.getLogger("cnmix")

# What a function that multiplies calls its operands, where cnmix has a name for them.
_OPERANDS = {"x": "input", "a": "left operand", "b": "right operand"}


@dataclass(frozen=True)
class NonFinite:
    """The first NaN or infinity; its text says all of it.

    Attributes:
        module: fully qualified name of the module, or name of the product; "" is the model itself.
        operand: "input", "output", "grad_output", "grad_input", the name of a parameter or buffer, as "weight", or of
            its gradient, as "gradient of weight"; of an attention "query", "key" or "value".
        step: optimizer steps taken before.
        value: "NaN", "infinity" or "-infinity".
        backward: whether it came in the backward pass.
        users: modules that the tensor is the input of, whose backward pass made its gradient.
    """

    module: str
    operand: str
    step: int
    value: str
    backward: bool
    users: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"of {self.module!r}" if self.module else "of the model"
        text = f"{self.value} in {self.operand} {where}, in the {('forward', 'backward')[self.backward]} pass of step "
        text += f"{self.step}, the first that was found"
        if self.users:
            text += f"; the backward pass of {', '.join(map(repr, self.users))} made it"
        elif self.operand == "grad_output":
            text += "; the backward pass of what takes its output made it"
        return text


class NonFiniteWatch:
    """What ``detect_nonfinite`` gives.

    Attributes:
        found: the first NaN or infinity, None as long as there is none.
        ended: whether it looks no longer; gradients of what was computed before may come later.
        step: optimizer steps taken so far; may be set.
    """

    def __init__(self, model: nn.Module, raises: bool, first_step: int) -> None:
        self.found: NonFinite | None = None
        self.ended = False
        self.step = first_step
        self._raises = raises
        self._names = weakref.WeakKeyDictionary({module: fqn for fqn, module in model.named_modules()})
        self._parameters = {id(each) for each in model.parameters()}
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._users: Any = WeakTensorKeyDictionary()  # of the tensors that modules returned

    def count(self, optimizer: Optimizer, *_: Any) -> None:
        """Counts the steps of the first optimizer that has parameters of the model."""
        if self._optimizer is None:
            owned = (id(each) for group in optimizer.param_groups for each in group["params"])
            if not self._parameters.isdisjoint(owned):
                self._optimizer = weakref.ref(optimizer)
        if self._optimizer is not None and self._optimizer() is optimizer:
            self.step += 1

    def enter(self, module: nn.Module, args: Any) -> None:
        """Looks at what a module gets, before it computes."""
        name = self._names.get(module)
        if name is None or self._is_over():
            return
        for each in tensors_in(args):
            # Masks of attention have -infinity.
            self._look(each, name, "input", allowed=(-math.inf,))
            if each in self._users:
                self._users[each].append(name)
            elif each.requires_grad and not each.is_leaf:
                each.register_hook(self._backward_hook(name, "grad_input"))
        for named in (module._parameters, module._buffers):
            for own, tensor in named.items():
                if tensor is not None and not is_lazy(tensor):
                    self._look(tensor, name, own, allowed=() if named is module._parameters else (-math.inf,))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Looks at what a module returns, and has its gradient looked at."""
        name = self._names.get(module)
        if name is None or self._is_over():
            return
        for each in tensors_in(output):
            self._look(each, name, "output", allowed=() if each.requires_grad else (-math.inf,))
            if each.requires_grad and each not in self._users:  # else it is that of a module within this one
                users: list[str] = []
                self._users[each] = users
                each.register_hook(self._backward_hook(name, "grad_output", users))

    def product(self, apply: Callable[..., Any], function: Any, *args: Any) -> Any:
        """Looks at the operands of a product in fixed point, and at its result."""
        sets = [*quantizers_in(*args)]
        if self._is_over() or not sets:
            return apply(function, *args)
        name = function_name([each.fqn for each in sets])
        for argument, each in tensor_arguments(function, args).items():
            if argument != "mask":
                self._look(each, name, _OPERANDS.get(argument, argument))
        result = apply(function, *args)
        first = result[0] if isinstance(result, tuple) else result
        self._look(first, name, "output")
        if first.grad_fn is not None:
            first.grad_fn.register_prehook(lambda given: self._look_at_gradients(given, name))
        return result

    def gradient(self, fqn: str) -> Callable[[Tensor], None]:
        """Returns a hook for a parameter of this name."""
        module, _, name = fqn.rpartition(".")
        return self._backward_hook(module, f"gradient of {name}")

    def _look_at_gradients(self, gradients: Sequence[Tensor | None], name: str) -> None:
        for each in gradients:
            if each is not None:
                self._look(each, name, "grad_output", backward=True)

    def _backward_hook(self, name: str, operand: str, users: Sequence[str] = ()) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self._look(gradient, name, operand, backward=True, users=tuple(dict.fromkeys(users)))

        return hook

    def _is_over(self) -> bool:
        return self.found is not None or torch._C._are_functorch_transforms_active()

    def _look(
        self,
        x: Tensor,
        name: str,
        operand: str,
        allowed: tuple[float, ...] = (),
        backward: bool = False,
        users: tuple[str, ...] = (),
    ) -> None:
        """Takes note of a tensor with NaN or infinity, if it is the first one.

        Raises:
            FloatingPointError: if it is to be raised.
        """
        if self.found is not None or self.ended:
            return
        value = _not_finite(x, allowed)
        if value is None:
            return
        shown = {math.inf: "infinity", -math.inf: "-infinity"}.get(value, "NaN")
        self.found = NonFinite(name, operand, self.step, shown, backward, users)
        if self._raises:
            raise FloatingPointError(str(self.found))
        logger.warning("%s", self.found)


def _not_finite(x: Tensor, allowed: tuple[float, ...]) -> float | None:
    """Returns NaN or the infinity that a tensor has; None where it has none, or none but what is allowed."""
    if x.layout is not torch.strided or x.is_nested or x.is_meta or x.numel() == 0:
        return None
    x = x.detach()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    if not x.is_floating_point():
        return None
    if x.itemsize == 1:  # 8-bit floats, which torch does not compare
        x = x.to(torch.float32)
    low, high = (float(each) for each in torch.aminmax(x))
    return next((each for each in (low, high) if not math.isfinite(each) and each not in allowed), None)


@contextmanager
def detect_nonfinite(model: nn.Module, *, raises: bool = True, first_step: int = 0) -> Iterator[NonFiniteWatch]:
    """Looks for the first NaN or infinity in what the modules of a model get, hold, return, and have as gradients.

    ::

        with cnmix.debug.detect_nonfinite(model):
            train(model)

    It looks at the inputs, parameters, buffers and outputs of every module as it is called, at the operands of products
    in fixed point that functions compute, at the gradients of outputs and parameters. What is found first is nearest to
    the cause: its module had finite operands. Inputs by name, and what is in objects that are no dataclasses, are seen
    where they come next. -infinity is no fault in inputs, in buffers and in outputs that need no gradient, for masks
    have it. The model may be converted or not; a compiled one runs eagerly. It takes a pass over every tensor: a tool
    to find a fault with, not to train with.

    Infinite gradients are part of dynamic loss scaling, which skips such steps: there, look with a fixed loss scale.

    Args:
        model: to look at.
        raises: raise an error at the first one; else it is logged, and what comes after it is not looked at.
        first_step: number of the first step; it counts the steps of the model's optimizer.

    Yields:
        A ``NonFiniteWatch``, with what was ``found``.

    Raises:
        FloatingPointError: within, at the first NaN or infinity, naming its module, operand and step.
    """
    model = unwrap(model)
    watch = NonFiniteWatch(model, raises, first_step)
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        stack.enter_context(warnings.catch_warnings())
        # Of a compiled model, which is run eagerly here, and looked at once.
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules", category=UserWarning)
        # For all modules, as torch's transformer layers take another way where they have hooks of their own.
        handles = [
            register_module_forward_pre_hook(watch.enter),
            register_module_forward_hook(watch.leave),
            register_optimizer_step_post_hook(watch.count),
        ]
        trained = ((fqn, each) for fqn, each in model.named_parameters() if each.requires_grad and not is_lazy(each))
        handles += [each.register_hook(watch.gradient(fqn)) for fqn, each in trained]
        for handle in handles:
            stack.callback(handle.remove)
        token = product_watcher.set(watch.product)
        stack.callback(product_watcher.reset, token)
        stack.callback(setattr, watch, "ended", True)
        yield watch

"""Steps of a model for trial: as it is, in float, or with some operands rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import quantizer_sets, quantizers_of
from ..nn.card_tensors import product_watcher
from ..nn.function_calls import function_products
from ..registry import unwrap
from ..trial import copied, tensors_in, total_of, trial


@dataclass
class Outcome:
    """What a step computed.

    Attributes:
        loss: None where there is nothing to go backwards from.
        outputs: the floating tensors in the model's output.
        gradients: of the parameters, by name; empty without a backward pass.
    """

    loss: float | None = None
    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Steps:
    """Runs a model's step again and again from the same state.

    Args:
        model: initialized; as it is called.
        example: arguments of the model.
        named: arguments by name.
        loss: see ``cnmix.debug.compare``.

    Raises:
        TypeError: if ``loss`` is no function, or what it returns no tensor.
        ValueError: if nothing in it computes in fixed point, or it is frozen for inference; if what it returns has no
            floating tensor and there is no ``loss``, or that returns several numbers.
    """

    def __init__(
        self, model: nn.Module, example: tuple[Any, ...], named: dict[str, Any], loss: Callable[[Any], Tensor] | None
    ) -> None:
        self._whole, self.model = model, unwrap(model)
        self._example, self._named, self._loss = example, named, loss
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be a function of the model's output, got {type(loss).__name__}")
        if any(quantizers.frozen for _, quantizers in quantizer_sets(self.model)):
            raise ValueError(
                f"{type(self.model).__name__} is frozen for integer inference: its formats are no longer to be chosen; "
                "look at the model in training"
            )
        # Functions that multiply come to have quantizers when they are first called, which is late for a choice.
        self._places: list[tuple[nn.Module, str]] = []
        with self.prepared():
            self._step()
            self._places = [
                (module, place) for module in self.model.modules() for place, _ in quantizers_of(module) if place
            ]
            if not any(True for _ in quantizer_sets(self.model)):
                raise ValueError(
                    f"nothing in {type(self.model).__name__} computes in fixed point: call cnmix.initialize first, "
                    "with a level that is not O0"
                )

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Gives the model copies of its quantizers, of all products that it calls, for what is within."""
        with trial(self._whole, self._loss):
            for module, place in self._places:
                products = function_products(module)
                if products is not None and place not in dict(quantizers_of(module)):
                    products.make(module, place)
            yield

    def run(self, watcher: Callable[..., Any] | None = None) -> Outcome:
        """Runs the step, within ``prepared``; a watcher sees its products, see ``nn.card_tensors.product_watcher``."""
        token = product_watcher.set(watcher)
        try:
            return self._step()
        finally:
            product_watcher.reset(token)

    def _step(self) -> Outcome:
        args, named = copied((self._example, self._named))
        with torch.random.fork_rng(devices=[]):  # each run draws the same numbers
            output = self.model(*args, **named)
            floats = [each for each in tensors_in(output) if each.is_floating_point()]
            loss = self._loss_of(output, floats)
            if loss is not None and loss.requires_grad:
                loss.backward()
        return Outcome(
            None if loss is None else float(loss.detach()),
            [each.detach().cpu().to(torch.float32, copy=True) for each in floats],
            {n: p.grad.detach().cpu().clone() for n, p in self.model.named_parameters() if p.grad is not None},
        )

    def _loss_of(self, output: Any, floats: list[Tensor]) -> Tensor | None:
        if self._loss is not None:
            loss = self._loss(output)
            if not isinstance(loss, Tensor):
                raise TypeError(f"loss must return a tensor to go backwards from, got {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(f"loss must return one number, got one of shape {tuple(loss.shape)}: take its mean")
            return loss
        if not floats:
            raise ValueError(
                f"{type(self.model).__name__} returned {type(output).__name__}, which has no floating tensor: "
                "give loss=..., a function of it that returns a tensor"
            )
        return total_of(output)

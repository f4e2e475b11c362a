"""LSTM, GRU and RNN, and their cells, on the emulated core.

A layer has in each direction a product of its input and one of its hidden state, and an LSTM with projections a third.
Each has quantizers of its own, by place: ``l0.input``, ``l1_reverse.hidden``, ``l0.projection``; those of a cell are
``input`` and ``hidden``. A product's operands are called as everywhere: what ``l0.hidden`` calls its input is the
hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..config import Product
from .base import QuantizedModule, check_input, moves_statistics
from .gates import KINDS
from .places import module_name
from .quantizers import ModuleQuantizers
from .recurrence import Layer, run_layer

# What torch calls the weight of each product.
_WEIGHTS = {"input": "weight_ih", "hidden": "weight_hh", "projection": "weight_hr"}


class _Recurrent(QuantizedModule):
    """What layers of time steps and single steps have in common.

    Attributes:
        quantizers_by_place: of each product.
        fused: whether a product computes all gates at once, or one does for each; with the same results.
    """

    product: Product = "matmul"
    quantizers_by_place: dict[str, ModuleQuantizers]
    fused = True
    mode: str

    def extra_repr(self) -> str:
        """Adds the width of each operand to the module's own description."""
        widths = [
            f"{place}=int{'/'.join(str(quantizer.state.bits) for _, quantizer in quantizers)}"
            for place, quantizers in self.quantizers_by_place.items()
        ]
        return ", ".join([super(QuantizedModule, self).extra_repr(), *widths])

    @property
    def _fqn(self) -> str:
        return module_name(next(iter(self.quantizers_by_place.values())).fqn)

    def _check(self, x: Tensor, input_size: int, dimensions: Sequence[int]) -> Tensor:
        """Returns the input to compute with."""
        for name in self.places(self).values():
            x = check_input(x, self, name, self._fqn)
        if x.dim() not in dimensions or x.shape[-1] != input_size:
            raise ValueError(
                f"{self._fqn!r} takes {input_size} features in the last of {' or '.join(map(str, dimensions))} "
                f"dimensions, got a tensor of shape {tuple(x.shape)}"
            )
        return x

    def _check_state(self, state: Tensor, shape: Sequence[int], name: str) -> Tensor:
        if not state.is_floating_point():
            raise TypeError(f"{self._fqn!r} takes float tensors as {name}, got {state.dtype}")
        if tuple(state.shape) != tuple(shape):
            raise ValueError(f"{self._fqn!r} takes {name} of shape {tuple(shape)}, got {tuple(state.shape)}")
        return state

    def _run(
        self, x: Tensor, batch_sizes: Sequence[int], h: Tensor, c: Tensor | None, layer: str, training: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Runs one layer in one direction; ``layer`` is "l0" or "l0_reverse", and "" in a cell."""
        before, after = (f"{layer}.", f"_{layer}") if layer else ("", "")
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        weights: Any = tuple(getattr(self, name + after, None) for name in names)
        described = Layer(
            product=self.mode.partition("_")[0].lower(),
            gates=KINDS[self.mode],
            input=self.quantizers_by_place[f"{before}input"],
            hidden=self.quantizers_by_place[f"{before}hidden"],
            projection=self.quantizers_by_place.get(f"{before}projection"),
            batch_sizes=batch_sizes,
            reverse=layer.endswith("_reverse"),
            training=training,
            keep=torch.is_grad_enabled(),
            fused=self.fused,
        )
        return run_layer(x, weights, h, c, described)


class _QuantizedRNNBase(_Recurrent, nn.RNNBase):
    @classmethod
    def places(cls, module: nn.Module) -> dict[str, str]:
        """Returns the name of the weight of each product, by place."""
        layers = [
            f"l{layer}{direction}"
            for layer in range(module.num_layers)  # type: ignore[arg-type]
            for direction in ("", "_reverse")[: 1 + bool(module.bidirectional)]
        ]
        products = list(_WEIGHTS)[: 3 if module.proj_size else 2]
        return {f"{layer}.{name}": f"{_WEIGHTS[name]}_{layer}" for layer in layers for name in products}

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Runs the layers over sequences; arguments and results are those of torch's module."""
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            x = self._check(data, self.input_size, (2,))
            hx = self._first_states(hx, x, int(sizes[0]), True)
            if order is not None:
                hx = tuple(state.index_select(1, order) for state in hx)
            y, states = self._run_layers(x, sizes.tolist(), hx)
            if back is not None:
                states = tuple(state.index_select(1, back) for state in states)
            return PackedSequence(y, sizes, order, back), self._as_given(states)
        x = self._check(input, self.input_size, (2, 3))
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        length, batch, _ = x.shape
        if length == 0:
            raise ValueError(f"{self._fqn!r} takes sequences of at least one time step, got {tuple(input.shape)}")
        hx = self._first_states(hx, x, batch, batched)
        y, states = self._run_layers(x.flatten(0, 1), [batch] * length, hx)
        y = y.unflatten(0, (length, batch))
        if not batched:
            return y.squeeze(1), self._as_given(tuple(state.squeeze(1) for state in states))
        return y.transpose(0, 1) if self.batch_first else y, self._as_given(states)

    def _first_states(self, hx: Any, x: Tensor, batch: int, batched: bool) -> tuple[Tensor, ...]:
        """Returns h_0, and of an LSTM c_0, as (layers * directions, batch, size)."""
        count = self.num_layers * (1 + bool(self.bidirectional))
        sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 1 + (self.mode == "LSTM")]
        if hx is None:
            return tuple(torch.zeros((count, batch, size), device=x.device) for size in sizes)
        given = hx if self.mode == "LSTM" else (hx,)
        if not isinstance(given, (tuple, list)) or len(given) != len(sizes):
            raise TypeError(f"{self._fqn!r} takes the pair (h_0, c_0), got a {type(hx).__name__}")
        shapes = [(count, batch, size) if batched else (count, size) for size in sizes]
        states = [
            self._check_state(state, shape, name)
            for state, shape, name in zip(given, shapes, ("h_0", "c_0"), strict=False)
        ]
        return tuple(state if batched else state.unsqueeze(1) for state in states)

    def _as_given(self, states: tuple[Tensor, ...]) -> Any:
        return states if self.mode == "LSTM" else states[0]

    def _run_layers(
        self, x: Tensor, batch_sizes: Sequence[int], hx: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        training = moves_statistics(self, *self.quantizers_by_place.values())
        directions = ("", "_reverse")[: 1 + bool(self.bidirectional)]
        lasts: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in directions:
                first = [state[len(lasts)] for state in hx]
                y, h, c = self._run(
                    x, batch_sizes, first[0], first[1] if len(first) > 1 else None, f"l{layer}{direction}", training
                )
                outputs.append(y)
                lasts.append((h,) if c is None else (h, c))
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        return x, tuple(torch.stack(each) for each in zip(*lasts, strict=True))


class QuantizedLSTM(_QuantizedRNNBase, nn.LSTM):
    """``nn.LSTM`` in fixed point."""


class QuantizedGRU(_QuantizedRNNBase, nn.GRU):
    """``nn.GRU`` in fixed point."""


class QuantizedRNN(_QuantizedRNNBase, nn.RNN):
    """``nn.RNN`` in fixed point."""


class _QuantizedCell(_Recurrent, nn.RNNCellBase):
    @classmethod
    def places(cls, module: nn.Module) -> dict[str, str]:
        """Returns the name of the weight of each product, by place."""
        return {name: _WEIGHTS[name] for name in ("input", "hidden")}

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Computes one time step; arguments and results are those of torch's module."""
        x = self._check(input, self.input_size, (1, 2))
        batch = x.shape[:-1]
        count = 1 + (self.mode == "LSTM")
        if hx is None:
            states = [torch.zeros((*batch, self.hidden_size), device=x.device) for _ in range(count)]
        else:
            given = hx if self.mode == "LSTM" else (hx,)
            if not isinstance(given, (tuple, list)) or len(given) != count:
                raise TypeError(f"{self._fqn!r} takes the pair (h_0, c_0), got a {type(hx).__name__}")
            states = [
                self._check_state(state, (*batch, self.hidden_size), name)
                for state, name in zip(given, ("h_0", "c_0"), strict=False)
            ]
        training = moves_statistics(self, *self.quantizers_by_place.values())
        x, *states = (each if batch else each.unsqueeze(0) for each in (x, *states))
        _, h, c = self._run(x, [x.shape[0]], states[0], states[1] if count > 1 else None, "", training)
        found = [state if batch else state.squeeze(0) for state in (h, c) if state is not None]
        return tuple(found) if count > 1 else found[0]


class QuantizedLSTMCell(_QuantizedCell, nn.LSTMCell):
    """``nn.LSTMCell`` in fixed point."""

    mode = "LSTM"


class QuantizedGRUCell(_QuantizedCell, nn.GRUCell):
    """``nn.GRUCell`` in fixed point."""

    mode = "GRU"


class QuantizedRNNCell(_QuantizedCell, nn.RNNCell):
    """``nn.RNNCell`` in fixed point."""

    @property
    def mode(self) -> str:  # type: ignore[override]
        """Torch's name of the kind of network."""
        return f"RNN_{self.nonlinearity.upper()}"

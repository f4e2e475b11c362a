"""A layer of a recurrent network in one direction as an operator of torch, ``torch.ops.cnmix.integer_recurrence``.

Its loop over time steps stays inside: a graph has one node for it, however long the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..fixed_point import FixedPoint
from ..nn.card_tensors import on_host
from ..nn.exported import FITTING
from ..nn.gates import KINDS
from ..nn.quantizers import ModuleQuantizers
from ..nn.recurrence import Layer, run_layer
from . import shapes


def _recurrence(
    x: Tensor,
    w_input: Tensor,
    w_hidden: Tensor,
    b_input: Tensor | None,
    b_hidden: Tensor | None,
    w_projection: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    mode: str,
    batch_sizes: list[int],
    reverse: bool,
    fused: bool,
    formats: list[int],
    roundings: list[str],
    exact: list[bool],
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a layer over a sequence, as ``nn.recurrence.run_layer`` does.

    Args:
        x: float (rows of all time steps, input size).
        w_input: integers, of the input's product.
        w_hidden: integers, of the hidden state's.
        b_input: float, or None.
        b_hidden: likewise.
        w_projection: integers, of the projection's, or None.
        h: first hidden state.
        c: first cell state of an LSTM, or None.
        mode: LSTM, GRU, RNN_TANH or RNN_RELU.
        batch_sizes: rows of each time step.
        reverse: whether the last time step comes first.
        fused: whether a product computes all gates at once.
        formats: width and position of the input and of the weight, for each of the two or three products.
        roundings: of the input of each.
        exact: for each, whether int31 multiplies exactly.
        name: of the module.

    Returns:
        The hidden states of all time steps, the last one of each row, and its cell state, empty where there is none;
        float32.
    """
    made: list[Any] = []
    for number, weight in enumerate((w_input, w_hidden, w_projection)):
        if weight is None:
            made.append(None)
            continue
        bits, position, weight_bits, weight_position = formats[4 * number : 4 * number + 4]
        config = QuantizeConfig(rounding=roundings[number], exact_int31=exact[number])  # type: ignore[arg-type]
        quantizers = ModuleQuantizers(config, "matmul", name)
        quantizers.output_dtype = torch.float32
        quantizers.input.state.bits = bits
        quantizers.input.state.position = None if position == FITTING else position
        quantizers.freeze_integers(FixedPoint(weight, weight_bits, weight_position))
        made.append(quantizers)
    layer = Layer(
        product=mode.partition("_")[0].lower(),
        gates=KINDS[mode],
        input=made[0],
        hidden=made[1],
        projection=made[2],
        batch_sizes=batch_sizes,
        reverse=reverse,
        training=False,
        keep=False,
        fused=fused,
    )
    with torch.no_grad():
        y, h, c = run_layer(x, (w_input, w_hidden, b_input, b_hidden, w_projection), h, c, layer)
    return y, h, y.new_empty(0) if c is None else c


_library = torch.library.Library("cnmix", "FRAGMENT")
_library.define(
    "integer_recurrence(Tensor x, Tensor w_input, Tensor w_hidden, Tensor? b_input, Tensor? b_hidden, "
    "Tensor? w_projection, Tensor h, Tensor? c, str mode, int[] batch_sizes, bool reverse, bool fused, int[] formats, "
    "str[] roundings, bool[] exact, str name) -> (Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "PrivateUse1"):
    _library.impl("integer_recurrence", on_host(_recurrence), _device)
torch.library.register_fake("cnmix::integer_recurrence", shapes.recurrence, lib=_library)

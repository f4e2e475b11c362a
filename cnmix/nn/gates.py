"""What recurrent networks compute in float between their products, for one time step, forwards and backwards.

All tensors are float32 (rows, columns), and may be views of larger ones that they are written into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten

_Forward = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", Tensor], None]
_Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], "Tensor | None"]


class Gates(NamedTuple):
    """The gates of one kind of network.

    Attributes:
        number: of gates, whose columns lie side by side.
        kept: columns in units of the hidden size that a backward pass needs besides the gates.
        shared: whether the products of input and hidden state have the same gradient, as what goes into them adds up.
        forward: ``(gates, hidden, h, c, kept, out)``, from the product of the input, which becomes the gates; that of
            the hidden state; the hidden state before; and the cell state, which becomes the next one where there is
            one. Writes what is to be kept, unless that is None, and the next hidden state.
        backward: ``(dh, dc, gates, kept, d_input, d_hidden)``, from the gradients of the next hidden state, and of the
            next cell state, which becomes that of the one before. Writes the gradients of the products, which share
            memory where they are ``shared``; returns what reaches the hidden state before by other ways, if anything.
    """

    number: int
    kept: int
    shared: bool
    forward: _Forward
    backward: _Backward


def _tanh_forward(gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor, kept: Tensor | None, out: Tensor) -> None:
    out.copy_(gates.add_(hidden).tanh_())


def _tanh_backward(dh: Tensor, dc: Tensor, gates: Tensor, kept: Tensor, d_input: Tensor, d_hidden: Tensor) -> None:
    _aten.tanh_backward(dh, gates, grad_input=d_input)


def _relu_forward(gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor, kept: Tensor | None, out: Tensor) -> None:
    out.copy_(gates.add_(hidden).relu_())


def _relu_backward(dh: Tensor, dc: Tensor, gates: Tensor, kept: Tensor, d_input: Tensor, d_hidden: Tensor) -> None:
    _aten.threshold_backward(dh, gates, 0, grad_input=d_input)


# c = f * c + i * g, h = o * tanh(c), with the input, forget, cell and output gate. Kept: the cell state before.
def _lstm_forward(gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor, kept: Tensor | None, out: Tensor) -> None:
    size = c.shape[1]
    gates.add_(hidden)
    gates[:, : 2 * size].sigmoid_()
    i, f, g, o = gates.chunk(4, 1)
    g.tanh_()
    o.sigmoid_()
    if kept is not None:
        kept.copy_(c)
    c.mul_(f).addcmul_(i, g)
    torch.mul(o, c.tanh(), out=out)


def _lstm_backward(dh: Tensor, dc: Tensor, gates: Tensor, kept: Tensor, d_input: Tensor, d_hidden: Tensor) -> None:
    i, f, g, o = gates.chunk(4, 1)
    di, df, dg, do = d_input.chunk(4, 1)
    tanh_c = (kept * f).addcmul_(i, g).tanh_()
    _aten.sigmoid_backward(dh * tanh_c, o, grad_input=do)
    dc.add_(_aten.tanh_backward(dh * o, tanh_c))
    _aten.sigmoid_backward(dc * g, i, grad_input=di)
    _aten.sigmoid_backward(dc * kept, f, grad_input=df)
    _aten.tanh_backward(dc * i, g, grad_input=dg)
    dc.mul_(f)


# n = tanh(input + r * hidden), h = n + z * (h - n), with the reset, update and new gate. Kept: the hidden state's
# product for the new gate, and h - n.
def _gru_forward(gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor, kept: Tensor | None, out: Tensor) -> None:
    size = h.shape[1]
    gates[:, : 2 * size].add_(hidden[:, : 2 * size]).sigmoid_()
    r, z, n = gates.chunk(3, 1)
    hidden_n = hidden[:, 2 * size :]
    n.addcmul_(r, hidden_n).tanh_()
    difference = h - n
    if kept is not None:
        kept[:, :size], kept[:, size:] = hidden_n, difference
    torch.addcmul(n, z, difference, out=out)


def _gru_backward(dh: Tensor, dc: Tensor, gates: Tensor, kept: Tensor, d_input: Tensor, d_hidden: Tensor) -> Tensor:
    size = dh.shape[1]
    r, z, n = gates.chunk(3, 1)
    dr, dz, dn = d_input.chunk(3, 1)
    direct = dh * z
    _aten.tanh_backward(dh - direct, n, grad_input=dn)
    _aten.sigmoid_backward(dh * kept[:, size:], z, grad_input=dz)
    _aten.sigmoid_backward(dn * kept[:, :size], r, grad_input=dr)
    d_hidden[:, : 2 * size] = d_input[:, : 2 * size]
    torch.mul(dn, r, out=d_hidden[:, 2 * size :])
    return direct


KINDS = {
    "LSTM": Gates(4, 1, True, _lstm_forward, _lstm_backward),
    "GRU": Gates(3, 2, False, _gru_forward, _gru_backward),
    "RNN_TANH": Gates(1, 0, True, _tanh_forward, _tanh_backward),
    "RNN_RELU": Gates(1, 0, True, _relu_forward, _relu_backward),
}
"""By torch's names of the modes of ``nn.RNNBase``."""

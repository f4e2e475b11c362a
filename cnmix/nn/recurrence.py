"""One layer of a recurrent network in one direction, differentiable: its products in fixed point, its gates in float.

Of a sequence, the input is multiplied in one product for all time steps, and the hidden state in one product a step for
all gates. Backwards the hidden state's gradient takes one product a step; those of the weights and of the input are one
product each, over all time steps. Every product counts one training step for each of its operands, however long the
sequence; ``cnmix.sequence`` says how the operands are quantized that come time step by time step: the hidden state,
what is projected, and their gradients.

Rows lie as in a ``PackedSequence``: those of the first time step, then those of the second, whose number never grows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..fixed_point import FixedPoint
from ..kernels import native
from ..sequence import SequenceQuantizer
from .card_tensors import apply_on_host, widest
from .exported import formats_of, frozen_weight, is_exporting, rounding_of
from .gates import KINDS, Gates
from .places import module_name
from .quantizers import ModuleQuantizers


class Layer(NamedTuple):
    """What a layer computes with in one direction.

    Attributes:
        product: lstm, gru or rnn.
        gates: of the network.
        input: quantizers of the product of the input.
        hidden: of the hidden state's.
        projection: of the projection's, where the hidden state is projected.
        batch_sizes: rows of each time step.
        reverse: whether the last time step comes first.
        training: whether statistics may move.
        keep: whether a backward pass may follow.
        fused: whether a product computes all gates at once, or one does for each gate. The results are the same, for
            every value is rounded once from its exact sum: int31's default mode, within its tolerance. The gradient of
            the hidden state sums over the gates, and is one product in both forms.
    """

    product: str
    gates: Gates
    input: ModuleQuantizers
    hidden: ModuleQuantizers
    projection: ModuleQuantizers | None
    batch_sizes: Sequence[int]
    reverse: bool
    training: bool
    keep: bool
    fused: bool

    @property
    def fqn(self) -> str:
        """Fully qualified name of the module."""
        return module_name(self.hidden.fqn)

    @property
    def bits(self) -> dict[str, int]:
        """The widest of its products by operand."""
        return widest(self.input.bits, self.hidden.bits)

    def steps(self) -> list[tuple[int, int]]:
        """Returns the first row and the number of rows of each time step, in the order of the computation."""
        ends = itertools.accumulate(self.batch_sizes)
        steps = [(end - rows, rows) for end, rows in zip(ends, self.batch_sizes, strict=True)]
        return steps[::-1] if self.reverse else steps


def run_layer(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    h: Tensor,
    c: Tensor | None,
    layer: Layer,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs a layer over a sequence.

    Args:
        x: float (rows of all time steps, input size).
        weights: of input and hidden state, their biases, and that of the projection, as torch has them.
        h: first hidden state, float (rows of the first time step, hidden or projected size).
        c: first cell state, float (rows of the first time step, hidden size), of an LSTM.
        layer: what to compute with.

    Returns:
        The hidden states of all time steps, the last one of each row, and its cell state; in the dtype of ``x`` or the
        half type that the model computes in.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{layer.hidden.fqn!r} computes in fixed point over a sequence, which no transform of torch.func can "
            "go through: call it without, or on a copy that cnmix.dequantize has made float again"
        )
    if layer.hidden.frozen and is_exporting():
        return _export_layer(x, weights, h, c, layer)
    if torch.compiler.is_compiling():  # a graph breaks here, as it does at torch's own recurrent modules
        return torch.compiler.disable(apply_on_host)(_Recurrence, x, *weights, h, c, layer)
    return apply_on_host(_Recurrence, x, *weights, h, c, layer)


def _export_layer(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    h: Tensor,
    c: Tensor | None,
    layer: Layer,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs a layer as an operator that holds numbers and tensors alone."""
    sets = [each for each in (layer.input, layer.hidden, layer.projection) if each is not None]
    integers = [frozen_weight(each, weights[0]) for each in sets]
    values = [each.values for each in integers]
    mode = next(mode for mode, gates in KINDS.items() if gates is layer.gates)
    formats: list[int] = []
    for each, weight in zip(sets, integers, strict=True):
        formats += [*formats_of(each)[:2], weight.bits, weight.position]
    y, h, cell = torch.ops.cnmix.integer_recurrence(
        x,
        *values[:2],
        *weights[2:4],
        values[2] if len(values) > 2 else None,
        h,
        c,
        mode,
        list(layer.batch_sizes),
        layer.reverse,
        layer.fused,
        formats,
        [rounding_of(each)[0] for each in sets],
        [each.config.exact_int31 for each in sets],
        layer.fqn,
    )
    dtype = layer.hidden.output_dtype or x.dtype
    return y.to(dtype), h.to(dtype), None if c is None else cell.to(dtype)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_input: Tensor,
        w_hidden: Tensor,
        b_input: Tensor | None,
        b_hidden: Tensor | None,
        w_projection: Tensor | None,
        h_0: Tensor,
        c_0: Tensor | None,
        layer: Layer,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, size = x.shape[0], w_hidden.shape[0] // layer.gates.number
        qx, qw_input = layer.input.quantize(x, w_input, layer.training)
        gates = _multiply_gates(qx, qw_input, b_input, layer, layer.input)
        hiddens, qw_hidden = layer.hidden.quantize_sequence(rows, h_0.shape[1], w_hidden, layer.training)
        h = h_0.to(torch.float32, copy=True)
        c = h.new_empty((h.shape[0], 0)) if c_0 is None else c_0.to(torch.float32, copy=True)
        y = _empty(rows, h.shape[1])
        kept = _empty(rows, layer.gates.kept * size) if layer.keep else None
        needs_whole = layer.keep or layer.training
        before = _empty(rows, h.shape[1]) if needs_whole and hiddens.wants_whole else None
        if layer.projection is not None and w_projection is not None:
            projections, qw_projection = layer.projection.quantize_sequence(rows, size, w_projection, layer.training)
            wide = _empty(rows, size) if needs_whole and projections.wants_whole else None
        for start, count in layer.steps():
            place = slice(start, start + count)
            state = h[:count]
            if before is not None:
                before[place] = state
            recurrent = _multiply_gates(hiddens(state, start), qw_hidden, b_hidden, layer, layer.hidden)
            out = y[place] if layer.projection is None else _empty(count, size)
            layer.gates.forward(gates[place], recurrent, state, c[:count], None if kept is None else kept[place], out)
            if layer.projection is not None:
                if wide is not None:
                    wide[place] = out
                y[place] = _multiply(projections(out, start), _transposed(qw_projection), layer.projection)
            state.copy_(y[place])
        operands: list[FixedPoint | None] = [qx, qw_input, None, qw_hidden, None, None]
        if needs_whole or not hiddens.wants_whole:
            operands[2] = hiddens.whole(before)
        if layer.projection is not None:
            operands[5] = qw_projection
            if needs_whole or not projections.wants_whole:
                operands[4] = projections.whole(wide)
        if layer.keep:
            _save(ctx, operands, gates, kept)
            ctx.dtypes = [None if each is None else each.dtype for each in (x, h_0, c_0)]
            ctx.layer = layer
        ctx.set_materialize_grads(False)
        dtype = layer.hidden.output_dtype or x.dtype
        return y.to(dtype), h.to(dtype), None if c_0 is None else c.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        layer: Layer = ctx.layer
        needs_x, needs_input, needs_hidden, *needs_biases, needs_projection, needs_h, _, _ = ctx.needs_input_grad
        (qx, qw_input, qh, qw_hidden, qp, qw_projection), gates, kept = _load(ctx)
        rows, width = gates.shape
        size = width // layer.gates.number
        training = layer.training
        if training:
            layer.hidden.ranks.backward_begins()
        steps = layer.steps()
        batch = max(layer.batch_sizes)
        h_size = size if qw_projection is None else qw_projection.values.shape[0]
        dh = torch.zeros((batch, h_size)) if grad_h is None else grad_h.to(torch.float32, copy=True)
        dc = torch.zeros((batch, size)) if grad_c is None else grad_c.to(torch.float32, copy=True)
        d_input = _empty(rows, width)
        d_hidden = d_input if layer.gates.shared else _empty(rows, width)
        gradients = SequenceQuantizer(layer.hidden.grad_output, rows, width, training, training)
        if layer.projection is not None:
            outer = SequenceQuantizer(layer.projection.grad_output, rows, h_size, training, training)
            d_projection = _empty(rows, h_size) if outer.wants_whole else None
        for start, count in reversed(steps):
            place = slice(start, start + count)
            gradient = dh[:count]
            if grad_y is not None:
                gradient.add_(grad_y[place])
            if layer.projection is not None and qw_projection is not None:
                if d_projection is not None:
                    d_projection[place] = gradient
                gradient = _multiply(outer(gradient, start), qw_projection, layer.projection)
            direct = layer.gates.backward(
                gradient, dc[:count], gates[place], kept[place], d_input[place], d_hidden[place]
            )
            quantized = gradients(d_hidden[place], start)
            if needs_h or start != steps[0][0]:
                gradient = _multiply(quantized, qw_hidden, layer.hidden)
                dh[:count] = gradient if direct is None else gradient.add_(direct)

        found: list[Tensor | None] = [None] * 9
        qg = gradients.whole(d_hidden)
        if needs_hidden:
            found[2] = _weight_gradient(qg, qh, layer, layer.hidden)
        if needs_x or needs_input:
            shares = layer.gates.shared and gradients.same_format(layer.input.grad_output)
            qg_input, found[3] = _quantize_gates(d_input, qg if shares else None, layer, needs_biases[0])
            if needs_x:
                found[0] = _multiply(qg_input, qw_input, layer.input, dtype=ctx.dtypes[0])
            if needs_input:
                found[1] = _weight_gradient(qg_input, qx, layer, layer.input)
        elif needs_biases[0]:
            found[3] = kernels.channel_sums(d_input, 1)
        if needs_biases[1]:
            sums = found[3] if layer.gates.shared else None
            found[4] = kernels.channel_sums(d_hidden, 1) if sums is None else sums.clone()
        if layer.projection is not None:
            q_outer = outer.whole(d_projection)
            if needs_projection:
                found[5] = _multiply(_transposed(q_outer), qp, layer.projection)
        if needs_h:
            found[6] = dh.to(ctx.dtypes[1])
        if ctx.needs_input_grad[7]:
            found[7] = dc.to(ctx.dtypes[2])
        return tuple(found)


def _quantize_gates(
    gradient: Tensor, known: FixedPoint | None, layer: Layer, with_sums: bool
) -> tuple[FixedPoint, Tensor | None]:
    """Quantizes the gradient of the input's product, unless it is ``known``; also returns its column sums if wanted."""
    quantizer = layer.input.grad_output
    if known is None:
        quantized, found = quantizer.measured(gradient, layer.training, channel_dim=1 if with_sums else None)
        return quantized, found.channel_sums
    quantizer.count(gradient, known, layer.training)
    quantizer.notice(known, layer.training)
    return known, kernels.channel_sums(gradient, 1) if with_sums else None


def _multiply(a: FixedPoint, b: FixedPoint, quantizers: ModuleQuantizers, **options: Any) -> Tensor:
    return kernels.matmul(a, b, exact_int31=quantizers.config.exact_int31, name=quantizers.fqn, **options)


def _multiply_gates(
    x: FixedPoint, weight: FixedPoint, bias: Tensor | None, layer: Layer, quantizers: ModuleQuantizers
) -> Tensor:
    """Multiplies (M, K) by the weight (gates * hidden size, K), transposed, and adds the bias."""
    if layer.fused or layer.gates.number == 1:
        return _multiply(x, _transposed(weight), quantizers, bias=bias)
    count = layer.gates.number
    biases = [None] * count if bias is None else bias.chunk(count)
    parts = [
        _multiply(x, weight._replace(values=values.t()), quantizers, bias=own)
        for values, own in zip(weight.values.chunk(count), biases, strict=True)
    ]
    return torch.cat(parts, 1)


def _weight_gradient(gradient: FixedPoint, x: FixedPoint, layer: Layer, quantizers: ModuleQuantizers) -> Tensor:
    """Multiplies the gradient (M, gates * hidden size), transposed, by (M, K)."""
    if layer.fused or layer.gates.number == 1:
        return _multiply(_transposed(gradient), x, quantizers)
    parts = [
        _multiply(gradient._replace(values=values.t()), x, quantizers)
        for values in gradient.values.chunk(layer.gates.number, 1)
    ]
    return torch.cat(parts)


def _empty(rows: int, columns: int) -> Tensor:
    return native.empty((rows, columns), torch.float32)


def _transposed(x: FixedPoint) -> FixedPoint:
    return x._replace(values=x.values.t())


def _save(ctx: Any, operands: Sequence[FixedPoint | None], gates: Tensor, kept: Tensor | None) -> None:
    needs_x, needs_input, needs_hidden, _, _, needs_projection, *_ = ctx.needs_input_grad
    needed = (needs_input, needs_x, needs_hidden, True, needs_projection, True)
    values = [each.values if each is not None and need else None for each, need in zip(operands, needed, strict=True)]
    # Activation checkpointing replaces what is saved: the formats must come from where the integers do.
    formats = torch.tensor([(0, 0, 0) if each is None else each[1:] for each in operands])
    ctx.save_for_backward(*values, gates, kept, formats)


def _load(ctx: Any) -> tuple[list[Any], Tensor, Tensor]:
    *values, gates, kept, formats = ctx.saved_tensors
    operands = [
        None if each is None else FixedPoint(each, bits, position, bool(finite))
        for each, (bits, position, finite) in zip(values, formats.tolist(), strict=True)
    ]
    return operands, gates, kept

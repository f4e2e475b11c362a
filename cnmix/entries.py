"""Operands of products of batches of matrices, which may give each matrix a position of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import kernels
from .adaptive import OperandQuantizer
from .fixed_point import FixedPoint, FixedPointBatch, dequantize
from .kernels.profiling import timed


def quantize_entries(quantizer: OperandQuantizer, x: Tensor, training: bool) -> FixedPoint | FixedPointBatch:
    """Quantizes a batch of matrices: all at one position, or, as its settings say, each at the one that fits it.

    The width adapts in either case as that of any operand does, by the error of the batch as a whole, and the position
    in the state is one for the whole.

    Args:
        quantizer: of the operand.
        x: float (*batch, rows, columns).
        training: whether this counts a step and allows an update.
    """
    if not quantizer.config.per_entry:
        return quantizer(x, training)
    state = quantizer.state
    due = training and quantizer.due
    state.step += training
    if due:
        _update(quantizer, x)
    quantized = repeat_entries(quantizer, x, (state.bits, 0, state.step), training)
    if quantizer.look_next and training:
        quantizer.look(x, quantized)
    quantizer.notice(quantized, training)
    return quantized


def repeat_entries(
    quantizer: OperandQuantizer, x: Tensor, form: tuple[int, int | None, int], training: bool = True
) -> FixedPoint | FixedPointBatch:
    """Quantizes as the step did that had this width, position and number, without counting one.

    The position is of no account where each entry has its own.
    """
    bits, position, stream = form
    if not quantizer.config.per_entry:
        return quantizer.repeated(x, bits, position, stream, training=training)
    rounding, seed = quantizer.rounding(training), quantizer.draw_seed
    return kernels.quantize_batch(x, bits, None, rounding, batch_dims=x.dim() - 2, seed=seed, stream=stream)[0]


@timed("adapt")
def _update(quantizer: OperandQuantizer, x: Tensor) -> None:
    dims = x.dim() - 2

    def sums_at(bits: int) -> tuple[float, float]:
        quantized, found = kernels.quantize_batch(x, bits, batch_dims=dims, measure=True)
        if quantizer.config.error_measure == "l1" or found.sum_x is None or found.sum_q is None:
            difference = kernels.sum_of_magnitudes(x.detach().to(torch.float32) - dequantize(quantized))
            return difference, kernels.sum_of_magnitudes(x)
        each = (sums.flatten().tolist() for sums in (found.sum_x, found.sum_q, quantized.positions))
        entries = [(sum_x, sum_x - math.ldexp(sum_q, position)) for sum_x, sum_q, position in zip(*each, strict=True)]
        return math.fsum(difference for _, difference in entries), math.fsum(sum_x for sum_x, _ in entries)

    absmax = float(kernels.quantize_batch(x, quantizer.state.bits, batch_dims=dims)[1].absmax.max())
    if absmax > 0 and math.isfinite(absmax):
        quantizer.decide(absmax, sums_at)

"""An operand that comes into being time step by time step: the hidden state of a recurrent network, and its gradient.

Its width, position and statistics are those of one tensor, all time steps together, as if a single product took it.
Between updates every time step is quantized in the stored format, so that the integers of all steps together are those
of that tensor. Where an update is due, or nothing is stored yet, the tensor that decides is known only after the last
time step: until then each step takes the position that fits it, at the present width; at the end the whole tensor is
measured, and quantized for the products over all time steps, as any other operand is.
"""

from __future__ import annotations

import copy

from torch import Tensor

from .adaptive import OperandQuantizer
from .fixed_point import FixedPoint, storage_dtype
from .kernels import native


class SequenceQuantizer:
    """Quantizes one operand in one pass over a sequence.

    Args:
        quantizer: of the operand.
        rows: of all time steps together.
        columns: of every time step.
        training: whether this is a pass in training, which may round at random.
        counts: whether it moves the statistics: one step, however long the sequence.

    Attributes:
        wants_whole: whether ``whole`` needs the float tensor.
    """

    def __init__(self, quantizer: OperandQuantizer, rows: int, columns: int, training: bool, counts: bool) -> None:
        state = quantizer.state
        fits_each = state.position is None or (counts and quantizer.due)
        self._quantizer = quantizer
        self._shape = rows, columns
        self._training, self._counts = training, counts
        self._bits, self._position = state.bits, None if fits_each else state.position
        self._stream = state.step + counts
        self._whole_format: tuple[int, int | None] = self._bits, self._position
        self._fits_each, self._finite = fits_each, True
        self._integers: Tensor | None = None
        self.wants_whole = fits_each or (counts and quantizer.look_next)

    def __call__(self, x: Tensor, row: int) -> FixedPoint:
        """Quantizes the rows of a time step, float32 (rows, columns), the first of which is ``row`` of the whole."""
        start = row * self._shape[1]
        quantized = self._quantizer.repeated(x, self._bits, self._position, self._stream, start, self._training)
        if not self._fits_each:
            if self._integers is None:
                self._integers = native.empty(self._shape, storage_dtype(self._bits))
            self._integers[row : row + x.shape[0]] = quantized.values
            self._finite &= quantized.finite
        return quantized

    def whole(self, x: Tensor | None) -> FixedPoint:
        """Returns all time steps as one operand, and takes a step of the statistics if this pass counts.

        Args:
            x: their float values, (rows, columns), where ``wants_whole``.
        """
        quantizer = self._quantizer
        if self._integers is not None and self._position is not None:
            quantized = FixedPoint(self._integers, self._bits, self._position, self._finite)
            self._integers = None  # this may be kept for a pass that repeats it
            if self._counts:
                quantizer.count(quantized.values if x is None else x, quantized, True)
            quantizer.notice(quantized, self._counts)
            return quantized
        if x is None:
            raise ValueError("the float values of the time steps are wanted")
        if self._training and not self._counts:
            return quantizer.repeated(x, *self._whole_format, self._stream)
        quantized = quantizer(x, self._counts)
        self._whole_format = quantized.bits, quantized.position
        return quantized

    def same_format(self, other: OperandQuantizer) -> bool:
        """Whether another operand, of the same values, has these integers too in a step that does not measure."""
        state = other.state
        return (
            not self._fits_each
            and not (self._counts and other.due)
            and (state.bits, state.position) == (self._bits, self._position)
            and other.rounding(self._training) == self._quantizer.rounding(self._training) != "stochastic"
        )

    def again(self) -> SequenceQuantizer:
        """Returns one that quantizes as this pass did, and counts nothing: for a forward pass that is repeated."""
        repeated = copy.copy(self)
        repeated._counts, repeated._finite = False, True
        repeated.wants_whole = self._fits_each
        return repeated

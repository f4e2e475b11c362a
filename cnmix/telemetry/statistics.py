"""What is measured of a step that is sampled: its operands' statistics, and where its time goes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..fixed_point import FixedPoint, FixedPointBatch, dequantize
from ..kernels.profiling import Work

SAMPLE_SIZE = 4096
"""Values of a tensor that its histogram is of, and the noise of its ratio of signal to noise, at most."""

# Of float32 values in steps of a format: exponents from -149 - 127 to 127 + 128, and 0 for the value zero.
_OFFSET = 149 + 127
_EXPONENTS = _OFFSET + 127 + 128 + 2


class StepSample:
    """Adds up what the kernels do in a step.

    Attributes:
        seconds: by work.
        macs: multiply-accumulates by the widths of the operands, the narrower first: ``"8x16"``.
    """

    def __init__(self) -> None:
        self.seconds: dict[Work, float] = {"quantize": 0.0, "product": 0.0, "adapt": 0.0, "look": 0.0}
        self.macs: dict[str, int] = {}

    def multiplied(self, bits: tuple[int, int], macs: int, numbers: tuple[int, int]) -> None:
        """Counts a product."""
        key = "x".join(map(str, sorted(bits)))
        self.macs[key] = self.macs.get(key, 0) + macs

    def spent(self, work: Work, seconds: float) -> None:
        """Counts time."""
        self.seconds[work] += seconds

    def split(self, seconds: float) -> dict[str, float]:
        """Returns where the wall seconds of the step went; what was spent on looking is no part of them."""
        parts = {name: self.seconds[name] for name in ("quantize", "product", "adapt")}
        seconds = max(seconds - self.seconds["look"], sum(parts.values()))
        return {"seconds": seconds, **parts, "other": seconds - sum(parts.values())}


class ValueSamples:
    """Takes values of operands while a step runs, and measures all of them together, in few calls, behind it."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []  # in steps of the format, float64
        self._integers: list[Tensor] = []
        self._positions: list[int] = []
        self._signals: list[float] = []  # sum of the squares of the whole, in steps
        self._sizes: list[int] = []

    def take(self, x: Tensor, quantized: FixedPoint | FixedPointBatch, position: int) -> int:
        """Takes at most ``SAMPLE_SIZE`` values, at equal distances in memory; returns their number for ``measure``.

        Args:
            x: float, of any shape, finite, not empty.
            quantized: its integers.
            position: of the operand as a whole.
        """
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        flat = x.detach().permute(order).reshape(-1)
        integers, factor = quantized.values, math.ldexp(1.0, -position)
        if isinstance(quantized, FixedPointBatch):  # each entry has a step of its own
            integers = dequantize(quantized).to(torch.float64) * factor
        distance = max(1, math.ceil(flat.numel() / SAMPLE_SIZE))
        while math.gcd(distance, flat.numel()) > 1:  # else it might meet the same columns again and again
            distance += 1
        # Squares of numbers below 2**-60 are too small for float32.
        whole = flat.to(torch.float32 if position > -60 else torch.float64)
        self._signals.append(torch.dot(whole, whole).item() * factor * factor)
        self._values.append(flat[::distance].to(torch.float64) * factor)
        self._integers.append(integers.permute(order).reshape(-1)[::distance].to(torch.float64))
        self._positions.append(position)
        self._sizes.append(flat.numel())
        return len(self._sizes) - 1

    def measure(self) -> list[tuple[float | None, dict[str, Any]]]:
        """Returns of all that was taken signal to noise and histogram.

        The former is ``10 log10(sum x² / sum (x - x̂)²)`` in dB, whose noise is that of the sample, as many times as it
        goes into the whole; None where nothing is lost, or all is zero. The latter has ``first``, the smallest exponent
        ``floor(log2 |x|)``, None where all are zeros; ``counts`` of the exponents from it on; and that of ``zeros``.
        """
        if not self._values:
            return []
        count = len(self._values)
        lengths = [len(each) for each in self._values]
        values = torch.cat(self._values)
        rows = torch.repeat_interleave(torch.arange(count), torch.tensor(lengths))
        errors = (values - torch.cat(self._integers)).square_()
        noises = torch.zeros(count, dtype=torch.float64).index_add_(0, rows, errors).tolist()
        exponents = torch.frexp(values).exponent.add_(_OFFSET).masked_fill_(values == 0, 0)
        table = torch.bincount(rows * _EXPONENTS + exponents, minlength=count * _EXPONENTS).view(count, _EXPONENTS)
        found = []
        for i, (zeros, *counts) in enumerate(table.tolist()):
            signal, noise = self._signals[i], noises[i] * self._sizes[i] / lengths[i]
            snr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
            used = [index for index, number in enumerate(counts) if number]
            first = used[0] - _OFFSET + self._positions[i] if used else None
            histogram = {"first": first, "counts": counts[used[0] : used[-1] + 1] if used else [], "zeros": zeros}
            found.append((snr, histogram))
        return found

"""What is measured of a step that is sampled: its operands' statistics, and where its time goes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..fixed_point import FixedPoint, FixedPointBatch, dequantize
from ..kernels.profiling import Work

SAMPLE_SIZE = 4096
"""Values of a tensor, at most, that underflow, histogram and the noise in its ratio of signal to noise are of."""


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
        self._values: list[Tensor] = []
        self._rounded: list[Tensor] = []
        self._steps: list[tuple[float, float]] = []  # of the format, inverse: for the values, and for what was rounded
        self._signals: list[float] = []  # sum of the squares of the whole, in steps
        self._sizes: list[int] = []

    def take(self, x: Tensor, quantized: FixedPoint | FixedPointBatch, position: int) -> int:
        """Takes at most ``SAMPLE_SIZE`` values, at equal distances in memory; returns their number for ``measure``.

        Args:
            x: float, of any shape, finite, not empty.
            quantized: its integers.
            position: of the operand as a whole.
        """
        x, integers, inverse = x.detach(), quantized.values, math.ldexp(1.0, -position)
        whole_batch = isinstance(quantized, FixedPointBatch)  # whose entries have steps of their own
        if whole_batch:
            integers = dequantize(quantized)
        if x.is_contiguous():
            x, integers = x.view(-1), integers.reshape(-1)
        else:
            order = sorted(range(x.dim()), key=x.stride, reverse=True)
            x, integers = x.permute(order).reshape(-1), integers.permute(order).reshape(-1)
        size = x.numel()
        distance = max(1, math.ceil(size / SAMPLE_SIZE))
        while math.gcd(distance, size) > 1:  # else it might meet the same columns again and again
            distance += 1
        # Else squares may be too small or too large for float32.
        x = x.to(torch.float32 if -60 < position < 30 else torch.float64)
        self._signals.append(torch.dot(x, x).item() * inverse * inverse)
        self._values.append(x[::distance].to(torch.float32, copy=True))
        self._rounded.append(integers[::distance].clone())
        self._steps.append((inverse, inverse if whole_batch else 1.0))
        self._sizes.append(size)
        return len(self._sizes) - 1

    def measure(self) -> list[dict[str, Any]]:
        """Returns of all that was taken ``underflow``, ``snr`` and ``histogram``.

        Underflow is the share of the values that are not zero and whose integer is. The ratio of signal to noise is
        ``10 log10(sum x² / sum (x - x̂)²)`` in dB, whose noise is that of the sample, as many times as it goes into the
        whole; None where nothing is lost, or all is zero. The histogram has ``first``, the smallest exponent
        ``floor(log2 |x|)``, None where all are zeros; ``counts`` of the exponents from it on; and that of ``zeros``,
        among which are float32's subnormals.
        """
        if not self._values:
            return []
        count, lengths = len(self._sizes), torch.tensor([len(each) for each in self._values])
        values, rows = torch.cat(self._values), torch.repeat_interleave(torch.arange(count), lengths)
        steps = torch.tensor(self._steps, dtype=torch.float64)[rows]
        rounded = torch.cat(self._rounded)
        lost = torch.bincount(rows[rounded.eq(0) & values.ne(0)], minlength=count).tolist()
        errors = values * steps[:, 0] - rounded * steps[:, 1]
        noises = torch.bincount(rows, errors.square_(), count).tolist()
        exponents = values.view(torch.int32) >> 23 & 255  # as float32 has them, with 127 added
        table = torch.bincount(rows * 256 + exponents, minlength=count * 256).view(count, 256).tolist()
        found = []
        each = zip(self._signals, noises, lost, self._sizes, lengths.tolist(), table, strict=True)
        for signal, noise, underflown, size, taken, (zeros, *counts) in each:
            noise *= size / taken
            snr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
            used = [index for index, number in enumerate(counts) if number]
            first, within = (used[0] - 126, counts[used[0] : used[-1] + 1]) if used else (None, [])
            histogram = {"first": first, "counts": within, "zeros": zeros}
            found.append({"underflow": underflown / taken, "snr": snr, "histogram": histogram})
        return found

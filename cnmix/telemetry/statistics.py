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


def measure_values(x: Tensor, quantized: FixedPoint | FixedPointBatch, position: int) -> dict[str, Any]:
    """Returns ``underflow``, ``snr`` and ``histogram`` of an operand.

    Underflow is the share of the values that are not zero and whose integer is. The ratio of signal to noise is
    ``10 log10(sum x² / sum (x - x̂)²)`` in dB, whose noise is that of the sample, as many times as it goes into the
    whole; None where nothing is lost, or all is zero. The histogram has ``first``, the smallest exponent
    ``floor(log2 |x|)``, None where all are zeros; ``counts`` of the exponents from it on; and that of ``zeros``,
    among which are float32's subnormals. The sample has values at equal distances in memory.

    Args:
        x: float, of any shape, finite, not empty.
        quantized: its integers.
        position: of the operand as a whole.
    """
    # Entries with positions of their own have no integers in steps of the whole.
    rounded = dequantize(quantized) if isinstance(quantized, FixedPointBatch) else quantized.values
    x = x.detach()
    if not x.is_contiguous():
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        x, rounded = x.permute(order), rounded.permute(order)
    x, rounded = x.reshape(-1), rounded.reshape(-1)
    size, inverse = x.numel(), math.ldexp(1.0, -position)
    distance = max(1, math.ceil(size / SAMPLE_SIZE))
    while math.gcd(distance, size) > 1:  # else it might meet the same columns again and again
        distance += 1
    # Else squares may be too small or too large for float32.
    x = x.to(torch.float32 if -60 < position < 30 else torch.float64)
    signal = torch.dot(x, x).item() * inverse * inverse
    x, rounded = x[::distance].to(torch.float32).contiguous(), rounded[::distance].contiguous()
    taken = x.numel()
    # Zero is zero in every format and rounding, so that the zeros that are too many underflowed.
    underflown = int(x.count_nonzero()) - int(rounded.count_nonzero())
    errors = x.double().mul_(inverse)
    errors.sub_(rounded, alpha=inverse if rounded.is_floating_point() else 1)
    noise = torch.dot(errors, errors).item() * size / taken
    exponents = (x.view(torch.int32) >> 23).bitwise_and_(255)  # as float32 has them, with 127 added
    zeros, *counts = torch.bincount(exponents, minlength=2).tolist()
    first = next((index for index, number in enumerate(counts) if number), None)
    return {
        "underflow": underflown / taken,
        "snr": 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None,
        "histogram": {
            "first": None if first is None else first - 126,
            "counts": [] if first is None else counts[first:],
            "zeros": zeros,
        },
    }

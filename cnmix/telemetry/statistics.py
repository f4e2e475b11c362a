"""What is measured of a step that is sampled: its operands' statistics, and where its time goes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..fixed_point import FixedPoint, FixedPointBatch, dequantize
from ..kernels import losses
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
    x, rounded = x.reshape(-1).contiguous(), rounded.reshape(-1).contiguous()  # expanded ones are no memory
    size, inverse = x.numel(), math.ldexp(1.0, -position)
    distance = max(1, math.ceil(size / SAMPLE_SIZE))
    while math.gcd(distance, size) > 1:  # else it might meet the same columns again and again
        distance += 1
    # Squares may be too small for float32, or too large: also where the format no longer fits what it saturates.
    wide = x.to(torch.float32 if position > -60 else torch.float64)
    signal = torch.dot(wide, wide).item()
    if not math.isfinite(signal):
        signal = torch.dot(wide.double(), wide.double()).item()
    signal *= inverse * inverse
    noise, underflown, (zeros, *counts) = losses(x.to(torch.float32), rounded, distance, inverse)
    taken = math.ceil(size / distance)
    noise *= size / taken
    used = [index for index, number in enumerate(counts) if number]
    return {
        "underflow": underflown / taken,
        "snr": 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None,
        "histogram": {
            "first": used[0] - 126 if used else None,  # float32 adds 127
            "counts": counts[used[0] : used[-1] + 1] if used else [],
            "zeros": zeros,
        },
    }

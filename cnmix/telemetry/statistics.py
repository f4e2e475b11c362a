"""What is measured of a step that is sampled: its operands' statistics, and where its time goes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..fixed_point import FixedPoint, FixedPointBatch, dequantize
from ..kernels.profiling import Work

HISTOGRAM_SAMPLE = 4096
"""Values of a tensor that its histogram is of, at most."""

# Elements whose error is summed at a time, so that the temporaries stay in the cache.
_BLOCK = 1 << 18
# To float32's smallest exponent, as frexp has it, makes 1.
_OFFSET = 149


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


def signal_to_noise(x: Tensor, quantized: FixedPoint | FixedPointBatch) -> float | None:
    """Returns ``10 log10(sum x² / sum (x - x̂)²)`` in dB; None where nothing is lost, or all is zero.

    Args:
        x: float, of any shape, finite.
        quantized: its integers.
    """
    values = x.detach()
    # In steps of the format: squares of small gradients are too small for float32. The factor is exact.
    integers, factor, dtype = quantized.values, 1.0, torch.float64
    if isinstance(quantized, FixedPointBatch):  # each entry has a step of its own
        integers = dequantize(quantized)
    else:
        factor = math.ldexp(1.0, -quantized.position)
        dtype = torch.float32 if abs(quantized.position) <= 126 else torch.float64
    order = _order(values)
    signal = noise = 0.0
    parts = (each.permute(order).reshape(-1).split(_BLOCK) for each in (values, integers))
    for part, rounded in zip(*parts, strict=True):
        scaled = part.to(dtype) * factor
        signal += float(torch.dot(scaled, scaled))
        scaled -= rounded.to(dtype)
        noise += float(torch.dot(scaled, scaled))
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def exponent_histogram(x: Tensor) -> dict[str, Any]:
    """Counts the exponents ``floor(log2 |x|)`` of at most ``HISTOGRAM_SAMPLE`` values, at equal distances in memory.

    Args:
        x: float, of any shape, finite.

    Returns:
        ``first``, the smallest exponent, None where all are zeros; ``counts`` from it on; and the number of ``zeros``.
    """
    flat = x.detach().permute(_order(x)).reshape(-1)
    distance = max(1, math.ceil(flat.numel() / HISTOGRAM_SAMPLE))
    while math.gcd(distance, flat.numel()) > 1:  # else it might meet the same columns again and again
        distance += 1
    sample = flat[::distance].to(torch.float32)
    exponents = torch.frexp(sample).exponent.add_(_OFFSET).masked_fill_(sample == 0, 0)
    zeros, *counts = torch.bincount(exponents).tolist()
    first = next((index for index, count in enumerate(counts) if count), None)
    if first is None:
        return {"first": None, "counts": [], "zeros": zeros}
    return {"first": first - _OFFSET, "counts": counts[first:], "zeros": zeros}


def _order(x: Tensor) -> list[int]:
    """Returns the dimensions in the order of memory."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)

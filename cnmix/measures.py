"""QEM and QPA: how large an operand's quantization error is, and how long its format is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import kernels
from .config import QuantizeConfig
from .fixed_point import FixedPoint, dequantize
from .operand import relative_error


def measure_again(x: Tensor, bits: int, found: kernels.Statistics) -> tuple[FixedPoint, kernels.Statistics]:
    """Measures at another width; what does not depend on it is in ``found``."""
    quantized, other = kernels.quantize_measured(x, bits, None, measure=True)
    return quantized, other._replace(channel_sums=found.channel_sums, checksum=found.checksum)


def quantization_error(
    x: Tensor, quantized: FixedPoint, measure: str = "mean", found: kernels.Statistics | None = None
) -> float:
    """Measures the quantization error (QEM).

    ``log2(|mean|x| - mean|x_q|| / mean|x| + 1)`` for "mean", with ``mean|x - x_q|`` in the numerator for "l1"
    (the forms of two public implementations of arXiv 1911.00361). 0 for an all-zero tensor.

    Args:
        x: float tensor, finite.
        quantized: the same tensor, quantized to nearest (under stochastic rounding the first form changes its meaning).
        measure: "mean" or "l1".
        found: the sums of magnitudes, where they are known already.
    """
    return relative_error(*error_sums(x, quantized, measure, found))


def error_sums(
    x: Tensor, quantized: FixedPoint, measure: str, found: kernels.Statistics | None = None
) -> tuple[float, float]:
    """Returns the sum that QEM's numerator is made of (signed for "mean"), and the sum of the magnitudes.

    Both add up over the parts of a tensor that several processes hold. Arguments as in ``quantization_error``.
    """
    sum_x = kernels.sum_of_magnitudes(x) if found is None else found.sum_x
    if measure == "l1":
        return kernels.sum_of_magnitudes(x.detach().to(torch.float32) - dequantize(quantized)), sum_x
    sum_q = kernels.sum_of_magnitudes(quantized.values) if found is None else found.sum_q
    return sum_x - math.ldexp(sum_q, quantized.position), sum_x


def update_interval(position: int, moving_position: float, error: float, config: QuantizeConfig) -> tuple[int, str]:
    """Returns the steps until the next update (QPA): ``clamp(beta / max(I1, I2) - gamma, 1, steps_per_epoch)``.

    ``I1 = alpha * |position - moving_position|`` is how far the range moves, ``I2 = delta * error**2`` how coarse the
    format is; ``moving_position`` is the average before this step's position entered it.

    Returns:
        The steps, and which of the two they follow from: "range moves" (I1) or "coarse format" (I2).
    """
    moves, coarse = config.alpha * abs(position - moving_position), config.delta * error**2
    reason, demand = ("range moves", moves) if moves >= coarse else ("coarse format", coarse)
    if demand == 0:
        return config.steps_per_epoch, reason
    steps = config.beta / demand - config.gamma
    return int(min(max(round(min(steps, config.steps_per_epoch)), 1), config.steps_per_epoch)), reason

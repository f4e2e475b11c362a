"""The emulated MLU core: quantize, matmul and convolution on integers.

``reference`` defines the results; ``cpu`` computes the same bits on torch's CPU kernels.
"""

from __future__ import annotations

import torch

from . import native, reference
from .batches import BatchStatistics, batched_matmul, quantize_batch
from .cpu import (
    convolution,
    convolution_grad_input,
    convolution_grad_weight,
    has_channels_last,
    matmul,
    to_channels_last,
)
from .int8_product import serving_variant
from .native import Statistics
from .quantization import (
    Shares,
    channel_sums,
    checksum,
    losses,
    quantize,
    quantize_measured,
    saturated_share,
    shares,
    sum_of_magnitudes,
)

__all__ = [
    "BatchStatistics",
    "Shares",
    "Statistics",
    "batched_matmul",
    "channel_sums",
    "checksum",
    "convolution",
    "convolution_grad_input",
    "convolution_grad_weight",
    "describe",
    "has_channels_last",
    "losses",
    "matmul",
    "quantize",
    "quantize_batch",
    "quantize_measured",
    "reference",
    "saturated_share",
    "shares",
    "show_config",
    "sum_of_magnitudes",
    "to_channels_last",
]


def describe() -> dict[str, str]:
    """Says which kernel serves each width, and why; runs the self-test if it has not run."""
    variant = serving_variant()
    return {
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "compiled part": native.describe(),
        "int8 product": _served(1) or f"{variant.name}: {variant.reason}",
        "int16 product": _served(2) or _int16_product(variant.name),
        "int31 product": _served(4)
        or "float64 (normwise error below 1e-14); exact_int31=True multiplies 16-bit halves",
        "batched product": "the product of its widths, one call for the batch"
        if _served(1)
        else "small entries together, int8 in float32 up to K = 1024 and else float64; large ones one by one",
        "convolution": "the product of its widths, over windows"
        + (" read where they lie; depthwise directly" if _served(1) else " gathered into a matrix"),
    }


def show_config() -> None:
    """Prints which kernel serves each width, and why."""
    entries = describe()
    width = max(map(len, entries))
    for name, text in entries.items():
        print(f"{name:<{width}}  {text}")


def _served(digits: int) -> str | None:
    """Says how the compiled part multiplies operands of this many bytes, or None where torch does."""
    library = native.library()
    if library is None or not library.cnmix_multiplies(digits, digits):
        return None
    number = "" if digits == 1 else f", {digits} digits of 8 bits"
    return f"compiled part, {native.instructions(library)}{number}, exact"


def _int16_product(int8_variant: str) -> str:
    if native.library() is not None and int8_variant == "int_mm":
        return "int8 digits, exact; float64 for small ones, exact too"
    return "float64, exact: K is cut where a sum could reach 2**53"

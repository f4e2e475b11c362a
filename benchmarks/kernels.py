"""Times single products and quantization beside float32 and bfloat16.

    python benchmarks/kernels.py --repeats 9 --threads 2 --output benchmarks/results/kernels.json

A Linear or convolution step is forward and backward through autograd, quantization included, after the phase in which
cnmix measures on every step.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from report import Bar, Timing, describe, machine, plot, save_json, table, time_arms
from torch import Tensor, nn

import cnmix
from cnmix import kernels
from cnmix.fixed_point import FixedPoint, FixedPointBatch, limits, storage_dtype

Arms = dict[str, Callable[[], object]]
LINEARS = ((1024, 1024, 1024), (4096, 768, 3072))
SMALL_LINEARS = tuple((rows, width, width) for rows in (64, 512, 4096) for width in (64, 128, 256))
SMALL_CONVOLUTIONS = ((3, 16, 32), (3, 32, 16), (3, 64, 8))
# Attention of 32 images with 8 heads of 64 channels, and the products of its backward pass.
BATCHES = (
    ((256, 128, 64, 128), "b", "Q·Kᵀ and its like"),
    ((256, 128, 128, 64), "", "P·V and dS·K"),
    ((256, 128, 128, 64), "a", "Pᵀ·dO and dSᵀ·Q"),
    ((256, 128, 64, 128), "", "contiguous"),
)
CONVOLUTIONS = ((3, 64, 56), (3, 128, 28), (3, 256, 14), (3, 512, 7), (1, 256, 56))


def module_arms(module: nn.Module, x: Tensor, grad: Tensor) -> Arms:
    """Returns a training step of the module in float32, bfloat16 autocast and int8; int8 is past its first epoch."""
    quantized = copy.deepcopy(module)
    cnmix.initialize(quantized, None, max_bitwidth=8, steps_per_epoch=10)

    def step(stepped: nn.Module, bfloat16: bool = False) -> None:
        stepped.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            y = stepped(x)
        y.backward(grad.to(y.dtype))

    for _ in range(11):
        step(quantized)
    return {
        "float32": lambda: step(module),
        "bfloat16 autocast": lambda: step(module, bfloat16=True),
        "cnmix int8": lambda: step(quantized),
    }


def linear_arms(rows: int, inner: int, columns: int) -> Arms:
    """Returns the arms of a Linear step: (rows, inner) to (rows, columns)."""
    x = torch.randn(rows, inner).requires_grad_()
    return module_arms(nn.Linear(inner, columns), x, torch.randn(rows, columns) * 0.01)


def convolution_arms(kernel: int, channels: int, size: int, channels_last: bool) -> Arms:
    """Returns the arms of a convolution step on 32 images; a 1x1 convolution goes from 256 to 64 channels."""
    out_channels = channels if kernel > 1 else 64
    module: nn.Module = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2)
    x, grad = torch.randn(32, channels, size, size), torch.randn(32, out_channels, size, size) * 0.01
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
        x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    return module_arms(module, x.requires_grad_(), grad)


def product_arms(size: int, bits: int) -> Arms:
    """Returns a square product of operands of this width beside float32's; int31 in both of its modes."""
    low, high = limits(bits)
    a, b = (
        FixedPoint(torch.randint(low, high + 1, (size, size)).to(storage_dtype(bits)), bits, -bits) for _ in range(2)
    )
    fa, fb = torch.randn(size, size), torch.randn(size, size)
    arms: Arms = {"float32": lambda: fa @ fb, f"cnmix int{bits}": lambda: kernels.matmul(a, b)}
    if bits == 31:
        arms["cnmix int31 exact"] = lambda: kernels.matmul(a, b, exact_int31=True)
    return arms


def batch_arms(entries: int, m: int, k: int, n: int, transposed: str) -> Arms:
    """Returns products of a batch of heads beside torch.bmm's; operands named in ``transposed`` lie the other way."""

    def operand(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        swap = name in transposed
        shape = (entries, columns, rows) if swap else (entries, rows, columns)
        floats, integers = torch.randn(shape), torch.randint(-128, 128, shape, dtype=torch.int8)
        return (floats.mT, integers.mT) if swap else (floats, integers)

    (fa, ia), (fb, ib) = operand("a", m, k), operand("b", k, n)
    ha, hb = fa.bfloat16(), fb.bfloat16()
    a, b = FixedPoint(ia, 8, -5), FixedPoint(ib, 8, -5)
    each_a, each_b = (FixedPointBatch(values, 8, torch.randint(-9, -1, (entries,))) for values in (ia, ib))
    wide_a, wide_b = (FixedPoint(values.to(torch.int16) * 256, 16, -13) for values in (ia, ib))
    return {
        "float32": lambda: torch.bmm(fa, fb),
        "bfloat16": lambda: torch.bmm(ha, hb),
        "cnmix int8": lambda: kernels.batched_matmul(a, b),
        "cnmix int8, a position for each entry": lambda: kernels.batched_matmul(each_a, each_b),
        "cnmix int8, to bfloat16": lambda: kernels.batched_matmul(a, b, dtype=torch.bfloat16),
        "cnmix int16": lambda: kernels.batched_matmul(wide_a, wide_b),
    }


def quantize_batch_arms(split: bool) -> Arms:
    """Returns int8 quantization of (32, 8, 128, 64) beside a copy; ``split`` heads lie side by side in a projection."""
    x, target = torch.randn(32, 8, 128, 64), torch.empty(32, 8, 128, 64)
    if split:
        x = torch.randn(32, 128, 3, 8, 64)[:, :, 0].transpose(1, 2)
    given = torch.full((32, 8), -5)
    return {
        "copy": lambda: target.copy_(x),
        "cnmix, one position, stored": lambda: kernels.quantize_measured(x, 8, -5),
        "cnmix, one position, from absmax": lambda: kernels.quantize_measured(x, 8, None),
        "cnmix, by entry, stored": lambda: kernels.quantize_batch(x, 8, given, batch_dims=2),
        "cnmix, by entry, from absmax": lambda: kernels.quantize_batch(x, 8, batch_dims=2),
        "cnmix, by entry, and QEM's sums": lambda: kernels.quantize_batch(x, 8, batch_dims=2, measure=True),
    }


def quantize_arms(rows: int, columns: int) -> Arms:
    """Returns int8 quantization of a float32 matrix beside a copy of it."""
    x, target = torch.randn(rows, columns), torch.empty(rows, columns)
    return {
        "copy": lambda: target.copy_(x),
        "cnmix, stored position, absmax found": lambda: kernels.quantize_measured(x, 8, -5),
        "cnmix, position from absmax": lambda: kernels.quantize_measured(x, 8, None),
        "cnmix, and QEM's sums": lambda: kernels.quantize_measured(x, 8, None, measure=True),
        "cnmix, stochastic": lambda: kernels.quantize_measured(x, 8, -5, "stochastic", seed=1),
        "torch, one operation after the other": lambda: (x * 32).round_().clamp_(-128, 127).to(torch.int8),
    }


def all_rows() -> dict[str, Callable[[], Arms]]:
    """Returns what is measured by name; each makes its arms when it is its turn."""
    rows: dict[str, Callable[[], Arms]] = {}
    for shape in LINEARS:
        rows["Linear step " + "×".join(map(str, shape))] = lambda shape=shape: linear_arms(*shape)
    for channels_last in (False, True):
        layout = "channels last" if channels_last else "NCHW"
        for kernel, channels, size in CONVOLUTIONS:
            name = f"{kernel}×{kernel} step {channels} at {size}×{size}, {layout}"
            rows[name] = lambda case=(kernel, channels, size, channels_last): convolution_arms(*case)
    for shape in SMALL_LINEARS:
        rows["small Linear step " + "×".join(map(str, shape))] = lambda shape=shape: linear_arms(*shape)
    for kernel, channels, size in SMALL_CONVOLUTIONS:
        name = f"small {kernel}×{kernel} step {channels} at {size}×{size}, NCHW"
        rows[name] = lambda case=(kernel, channels, size, False): convolution_arms(*case)
    rows["int8 product 2048³"] = lambda: product_arms(2048, 8)
    rows["int16 product 2048³"] = lambda: product_arms(2048, 16)
    rows["int31 product 1024³"] = lambda: product_arms(1024, 31)
    for shape, transposed, what in BATCHES:
        name = "batched " + " × ".join(map(str, shape)) + f", {what}"
        rows[name] = lambda case=(*shape, transposed): batch_arms(*case)
    for split in (False, True):
        rows["quantize 32×8×128×64" + (", heads of a projection" if split else "")] = lambda split=split: (
            quantize_batch_arms(split)
        )
    rows["quantize 4096×3072"] = lambda: quantize_arms(4096, 3072)
    return rows


def main() -> None:
    """Measures, prints a table for each row, writes the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = machine()
    print(describe(found))
    print("; ".join(f"{name}: {text}" for name, text in kernels.describe().items() if name != "torch"))
    timings: dict[str, dict[str, Timing]] = {}
    for name, make in all_rows().items():
        if options.only in name:
            timings[name] = time_arms(make(), options.repeats, warmup=2)
    rows = [
        (name if index == 0 else "", arm, f"{1e3 * timing.median:.2f}", f"{first.median / timing.median:.2f}")
        for name, arms in timings.items()
        for first in [next(iter(arms.values()))]
        for index, (arm, timing) in enumerate(arms.items())
    ]
    table("Kernels", ("what", "arm", "ms", "× first arm"), rows, caption="medians of interleaved rounds")
    results = {name: {arm: timing.to_dict() for arm, timing in arms.items()} for name, arms in timings.items()}
    save_json(options.output, {"machine": found, "kernels": kernels.describe(), "results": results})
    panels = {}
    for name, arms in timings.items():
        first = next(iter(arms.values())).median
        panels[name] = [
            Bar(arm, first / t.median, f"{1e3 * t.median:.2f} ms", highlight="cnmix" in arm) for arm, t in arms.items()
        ]
    plot(options.output.with_suffix(".png"), "Kernels", panels, "speed over the first arm of each", reference=1.0)


if __name__ == "__main__":
    main()

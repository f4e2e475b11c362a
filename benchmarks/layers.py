"""Compares a training step of recurrent layers and of attention in fixed point with torch's own in float32.

    python benchmarks/layers.py --kinds LSTM attention

One layer, forward and backward pass, at the same sizes for both, in turns. Of attention float32 takes its fused kernel;
"math path" is its other one, whose probabilities exist as a whole, as they do in fixed point. "between updates" are the
steps on which no operand is measured, nearly all of a training; "updating" those on which all of them are.
``--profile`` prints where the time between updates goes, ``--memory`` what attention takes at several lengths, each in
a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
import statistics
import sys
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from memory import check_system, release, resident, restart_peak
from report import begin, save_json, table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_step import count_saved

from cnmix import QuantizeConfig
from cnmix.nn import convert

OUTPUT = Path(__file__).parent / "results" / "layers.json"


class Attention(nn.MultiheadAttention):
    """Self-attention with heads of 64 features, on (length, batch, features)."""

    def __init__(self, features: int, _: int) -> None:
        super().__init__(features, features // 64)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Returns the output, and None."""
        y, _ = super().forward(x, x, x, need_weights=False)
        return y, None


class CausalAttention(nn.Module):
    """The same as language models write it, in which a position sees those before it."""

    def __init__(self, features: int, _: int) -> None:
        super().__init__()
        self.heads = features // 64
        self.into, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Returns the output, and None."""
        q, k, v = (each.unflatten(-1, (self.heads, 64)).permute(1, 2, 0, 3) for each in self.into(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.permute(2, 0, 1, 3).flatten(2)), None


RECURRENT = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
ATTENTION = {"attention": Attention, "causal attention": CausalAttention}
KINDS: dict[str, Any] = {**RECURRENT, **ATTENTION}
# Both stay at one width, for the time depends on it.
ARMS = {
    "between updates": {"mode": "fixed_interval", "interval": 10_000, "quantify_rate": 0.0},
    "updating": {"online": True},
}


def step(module: nn.Module, x: Tensor, arm: str = "") -> tuple[float, float]:
    """Returns the seconds of a forward and of a backward pass."""
    with sdpa_kernel(SDPBackend.MATH) if arm.endswith("math path") else nullcontext():
        start = time.perf_counter()
        y, _ = module(x)
        middle = time.perf_counter()
        y.sum().backward()
        return middle - start, time.perf_counter() - middle


def run_kind(kind: str, hidden: int, length: int, batch: int, bits: int, repeats: int) -> dict[str, list[float]]:
    """Returns the median seconds of forward and backward pass, of float32 and of each arm."""
    torch.manual_seed(0)
    plain = KINDS[kind](hidden, hidden)
    arms = {"float32": plain}
    if kind in ATTENTION:
        arms["float32, math path"] = copy.deepcopy(plain)
    for name, settings in ARMS.items():
        arms[name] = copy.deepcopy(plain)
        convert(arms[name], QuantizeConfig(bitwidth=bits, max_bitwidth=bits, **settings))
    x = torch.randn(length, batch, hidden, requires_grad=True)
    for module in arms.values():
        step(module, x)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, module in arms.items():
            found[name].append(step(module, x, name))
    return {name: [statistics.median(each) for each in zip(*measured, strict=True)] for name, measured in found.items()}


def attend_once(length: int, arm: str) -> dict[str, int]:
    """Returns the bytes that a step of attention alone saves, and by which memory grows in it, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = CausalAttention(512, 512)
    if arm in ARMS:
        convert(module, QuantizeConfig(bitwidth=8, max_bitwidth=8, **ARMS[arm]))
    x = torch.randn(length, 4, 512)
    step(module, x, arm)
    with count_saved(module) as saved:
        step(module, x, arm)
    release()
    before = resident()
    restart_peak()
    step(module, x, arm)
    return {"saved": sum(saved.values()), "grown": resident("VmHWM") - before}


def compare_memory() -> dict[str, dict[str, dict[str, int]]]:
    """Returns what ``attend_once`` does for several lengths, batch 4, 8 heads of 64 features."""
    check_system()
    found: dict[str, dict[str, dict[str, int]]] = {}
    for length in (128, 512, 1024):
        for arm in ("float32", "float32, math path", "between updates", "updating"):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found.setdefault(str(length), {})[arm] = pool.submit(attend_once, length, arm).result()
    rows = [
        [length, arm, f"{each['saved'] / 2**20:.1f}", f"{each['grown'] / 2**20:.1f}"]
        for length, arms in found.items()
        for arm, each in arms.items()
    ]
    table("causal attention, batch 4, int8", ["length", "arm", "MiB saved for the backward pass", "MiB grown"], rows)
    return found


class Calls(nn.Module):
    """Calls a function a thousand times, or is one of a hundred modules that call each other."""

    def __init__(self, depth: int = 0) -> None:
        super().__init__()
        self.inner = Calls(depth - 1) if depth > 1 else None
        self.deep = depth > 0

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x``."""
        if not self.deep:
            for _ in range(1000):
                x.add_(1)
        return x if self.inner is None else self.inner(x)


def watching() -> dict[str, float]:
    """Returns what it costs in microseconds that functions are watched, for each call of one and of a module."""
    found = {}
    sys.setrecursionlimit(10_000)
    for name, depth, count in (("function", 0, 1000), ("module", 100, 100)):
        module, x = Calls(depth), torch.zeros(4)
        seconds = min(timeit.repeat(lambda module=module, x=x: module(x), number=1, repeat=50))
        convert(module, QuantizeConfig())
        watched = min(timeit.repeat(lambda module=module, x=x: module(x), number=1, repeat=50))
        found[name] = (watched - seconds) / count * 1e6
    return found


def profile(kind: str, hidden: int, length: int, batch: int, bits: int) -> None:
    """Prints where the time between updates goes."""
    module = KINDS[kind](hidden, hidden)
    convert(module, QuantizeConfig(bitwidth=bits, max_bitwidth=bits, **ARMS["between updates"]))
    x = torch.randn(length, batch, hidden, requires_grad=True)
    step(module, x)
    profiler = cProfile.Profile()
    profiler.runcall(step, module, x)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--hidden", type=int, default=512, help="size of input and hidden state")
    parser.add_argument("--length", type=int, default=128, help="time steps")
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--bits", type=int, default=8, choices=(8, 16, 31), help="width of every operand")
    parser.add_argument("--repeats", type=int, default=7, help="measured steps of each")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, and measure nothing else")
    parser.add_argument("--memory", action="store_true", help="measure the memory of attention, and nothing else")
    parser.add_argument("--watching", action="store_true", help="measure what finding functions costs, alone")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = args.hidden, args.length, args.batch, args.bits
    if args.profile:
        for kind in args.kinds:
            profile(kind, *sizes)
        return
    if args.watching:
        print(", ".join(f"{cost:.1f} microseconds a {name}" for name, cost in watching().items()))
        return
    if args.memory:
        result = begin("layers memory") | {"lengths": compare_memory()}
        print(save_json(args.output.with_stem(args.output.stem + "_memory"), result))
        return
    result = begin("layers", sizes=sizes, kinds={})
    rows = []
    for kind in args.kinds:
        times = result["kinds"][kind] = run_kind(kind, *sizes, args.repeats)
        for name, (forward, backward) in times.items():
            ratio = sum(times["float32"]) / (forward + backward)
            row = [kind, name, f"{1e3 * forward:.0f}", f"{1e3 * backward:.0f}", f"{ratio:.2f} ×"]
            rows.append(row)
    title = f"hidden {args.hidden}, {args.length} time steps, batch {args.batch}, int{args.bits}"
    table(title, ["layer", "arm", "ms forward", "ms backward", "of float32's speed"], rows)
    print(save_json(args.output, result))


if __name__ == "__main__":
    main()

"""Times whole training steps of five networks in cnmix and its peers, and what their gradients are worth.

``python benchmarks/training_step.py`` runs everything; README.md in this folder says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm, Gradients, onednn_product
from networks import TASKS, Task
from report import Bar, begin, describe, plot, save_json, table, time_arms
from torch import Tensor, nn
from torch.nn import functional as F

from cnmix import kernels
from cnmix.nn import quantizer_sets

OUTPUT = Path(__file__).resolve().parent / "results" / "training_step.json"
WARMUP = 1

# A gradient below this share of the largest one is rounding of a zero: BERT's softmax does not see the keys' biases.
NEGLIGIBLE = 1e-10


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Turns the model's dropout off, and nothing else."""
    active = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


def exact_gradients(task: Task, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Computes the gradients at ``weights`` in float64, without dropout."""
    model = task.build()
    model.load_state_dict(weights)
    arm = Arm(task, model.double(), model)
    arm.inputs = arm.inputs.double()
    arm.targets = arm.targets.double() if arm.targets.is_floating_point() else arm.targets
    with without_dropout(model):
        arm.backward()
    return {name: grad for name, grad in arm.gradients().items() if grad is not None}


def compare(gradients: Gradients, exact: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compares gradients with float64's.

    Returns:
        ``median_error`` and ``largest_error`` over the parameters, of ``|g - exact| / |exact|`` in the 2-norm, and
        ``dead``: the parameters whose gradient is missing, zero or not finite where the exact one is neither.
    """
    norms = {name: grad.norm().item() for name, grad in exact.items()}
    counted = [name for name, norm in norms.items() if norm > NEGLIGIBLE * max(norms.values())]
    errors, dead = [], []
    for name in counted:
        grad = gradients.get(name)
        if grad is None or not grad.any() or not grad.isfinite().all():
            dead.append(name)
            errors.append(1.0)
        else:
            errors.append((grad.double() - exact[name]).norm().item() / norms[name])
    return {"median_error": statistics.median(errors), "largest_error": max(errors), "dead": dead}


@contextlib.contextmanager
def count_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collects the bytes that autograd saves for backward, without the model's own parameters.

    A saved view counts with its whole storage, which it keeps, and several views of one storage count once.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """Counts the operands of cnmix's products by width: ``{"input": {"8": 4}, "weight": ..., "grad_output": ...}``."""
    found: dict[str, Counter[str]] = {}
    for _, quantizers in quantizer_sets(model):
        for operand, quantizer in quantizers:
            found.setdefault(operand, Counter())[str(quantizer.state.bits)] += 1
    return {operand: dict(sorted(counts.items())) for operand, counts in found.items()}


def run_network(name: str, arms: list[str], repeats: int, settle: int) -> dict[str, dict[str, Any]]:
    """Measures the arms on one network.

    Args:
        name: key of ``networks.TASKS``.
        arms: keys of ``ARMS``.
        repeats: timed rounds.
        settle: steps in an epoch of cnmix; its arms train one epoch and a step before anything is measured.

    Returns:
        What was found of each arm, or its error.
    """
    task = TASKS[name]
    torch.manual_seed(0)
    initial = task.build()
    at_start = exact_gradients(task, initial.state_dict())
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Arm] = {}
    for key in arms:
        print(f"{name}: preparing {key}", file=sys.stderr, flush=True)
        try:
            arm = ARMS[key][1](task, copy.deepcopy(initial), settle)
            moved = any(
                not torch.equal(a, b) for a, b in zip(arm.model.parameters(), initial.parameters(), strict=True)
            )
            exact = exact_gradients(task, arm.model.state_dict()) if moved else at_start
            with without_dropout(arm.model), count_saved(arm.model) as saved:
                arm.backward()
            rows[key] = compare(arm.gradients(), exact) | {"saved_bytes": sum(saved.values())}
            arm.step()
            ready[key] = arm
        except Exception as error:  # whatever a peer raises, its row says so and the others go on
            lines = str(error).strip().splitlines() or [""]
            rows[key] = {"error": f"{type(error).__name__}: {lines[0]}"}
    before = {key: arm.updates() for key, arm in ready.items()}
    timings = time_arms({key: arm.step for key, arm in ready.items()}, repeats, WARMUP)
    for key, arm in ready.items():
        row = rows[key]
        row["step"] = timings[key].to_dict()
        row["note"] = arm.note
        row["dead"] = sorted({*row["dead"], *compare(arm.gradients(), at_start)["dead"]})
        if "float32" in timings:
            row["speedup"] = timings["float32"].median / timings[key].median
        if arm.scale:
            row["widths"] = widths(arm.model)
            row["updates_while_timed"] = arm.updates() - before[key]
    torch._dynamo.reset()
    gc.collect()
    return rows


def float32_products(repeats: int, size: int = 2048) -> dict[str, float]:
    """Returns GFLOP/s of a float32 matrix product in MKL, which torch calls, and in oneDNN."""
    x, weight = torch.randn(size, size), torch.randn(size, size)
    timings = time_arms({"mkl": lambda: F.linear(x, weight), "onednn": lambda: onednn_product(x, weight)}, repeats)
    return {name: 2e-9 * size**3 / timing.median for name, timing in timings.items()}


def _share(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Returns the widths in words: ``input 8: 100 %; grad_output 8: 25 %, 16: 75 %``."""
    return "; ".join(
        f"{operand} " + ", ".join(f"int{bits} {n / sum(by_width.values()):.0%}" for bits, n in by_width.items())
        for operand, by_width in counts.items()
    )


def _remark(row: Mapping[str, Any]) -> str:
    parts = [row.get("error", ""), row.get("note", "")]
    if "widths" in row:
        parts.append(_share(row["widths"]))
    if row.get("updates_while_timed"):
        parts.append(f"{row['updates_while_timed']} updates while timed")
    return "; ".join(part for part in parts if part)


def show(name: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the rows of one network."""
    cells = []
    for key, row in rows.items():
        if "step" not in row:
            cells.append([ARMS[key][0], *"–––––––", _remark(row)])
            continue
        step = row["step"]
        cells.append(
            [
                ARMS[key][0],
                f"{1e3 * step['median']:.1f}",
                f"{1e3 * step['lower']:.1f} – {1e3 * step['upper']:.1f}",
                f"{row['speedup']:.2f}" if "speedup" in row else "–",
                f"{row['median_error']:.2g}",
                f"{row['largest_error']:.2g}",
                f"{row['saved_bytes'] / 1e6:.0f}",
                str(len(row["dead"])),
                _remark(row),
            ]
        )
    columns = ["arm", "ms", "quartiles", "× float32", "error", "worst", "saved MB", "dead", "remarks"]
    table(TASKS[name].title, columns, cells)


def draw(path: Path, result: Mapping[str, Any]) -> Path | None:
    """Draws the speed of every arm over float32's, with the gradients' error beside it."""
    panels = {}
    for name, rows in result["networks"].items():
        bars = []
        for key, row in rows.items():
            title, ours = ARMS[key][0], key.startswith("cnmix")
            if "speedup" not in row:
                bars.append(Bar(title, None, row.get("error", "")[:60], highlight=ours))
                continue
            step, speed = row["step"], row["speedup"]
            label = f"{speed:.2f}×, error {row['median_error']:.2g}"
            label += f", {len(row['dead'])} dead gradients" if row["dead"] else ""
            base = speed * step["median"]
            bars.append(Bar(title, speed, label, base / step["upper"], base / step["lower"], ours))
        panels[TASKS[name].title] = bars
    title = "Training step: speed over eager float32, median relative error of the gradients\n"
    return plot(path, title + describe(result["machine"]), panels, "× eager float32 (quartiles)", reference=1.0)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NETWORK", help=", ".join(TASKS)
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--settle", type=int, default=50, help="steps that cnmix trains first: one of its epochs")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file; the plot goes beside it as a PNG")
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1 or args.settle < 1:
        parser.error("--repeats, --threads and --settle must be at least 1")
    settle = max(args.settle, args.repeats + WARMUP + 4)
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64
    arms = [key for key in ARMS if key in args.arms or key == "float32"]
    settings = {"repeats": args.repeats, "threads": args.threads, "settle": settle}
    result = begin("training_step", kernels=kernels.describe(), settings=settings)
    speeds = result["float32_product_gflops"] = float32_products(args.repeats)
    result["networks"] = {}
    print(f"float32 product 2048³: MKL {speeds['mkl']:.0f} GFLOP/s, oneDNN {speeds['onednn']:.0f} GFLOP/s")
    for name in args.networks:
        result["networks"][name] = run_network(name, arms, args.repeats, settle)
        show(name, result["networks"][name])
        save_json(args.output, result)
    picture = draw(args.output.with_suffix(".png"), result)
    print(f"{args.output}; {picture or 'no plot: matplotlib is not installed'}")


if __name__ == "__main__":
    main()

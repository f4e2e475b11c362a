"""Measures the peak memory of a training step in cnmix and its peers, each arm in processes of its own.

``python benchmarks/memory.py`` runs everything; README.md in this folder says how to read it. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm
from networks import TASKS
from report import Bar, begin, describe, plot, save_json, table
from torch import nn
from training_step import count_saved, widths, without_dropout

from cnmix import kernels
from cnmix.kernels import native

OUTPUT = Path(__file__).resolve().parent / "results" / "memory.json"
DEFAULT_ARMS = ("float32", "bfloat16", "cnmix_adaptive", "cnmix_int8", "cnmix_o2", "cnmix_o3")
WARMUP = 3  # steps of every arm before its memory is read: allocators and caches settle in the first

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def resident(field: str = "VmRSS") -> int:
    """Reads a field of this process's status in bytes: VmRSS, VmHWM (the peak) or RssFile (mapped files, as code)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return 1024 * int(found[1])


def restart_peak() -> None:
    """Sets VmHWM to what is resident now."""
    CLEAR_REFS.write_text("5", encoding="ascii")


def check_system() -> None:
    """Exits with a message where the peak cannot be measured."""
    try:
        restart_peak()
        resident("VmHWM")
    except OSError as error:
        sys.exit(
            "memory.py needs Linux: it restarts the peak of the resident memory through /proc/self/clear_refs and "
            f"reads VmHWM in /proc/self/status ({error})"
        )


def release() -> None:
    """Gives idle memory back to the system: cnmix's pool, and the C library's where that is glibc."""
    gc.collect()
    library = native.library()
    if library is not None:
        library.cnmix_release_memory()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def parameter_bytes(model: nn.Module) -> int:
    """Returns the bytes of the parameters; their gradients have as many."""
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


def saved_bytes(arm: Arm) -> int:
    """Returns what autograd saves for backward, in bytes."""
    with count_saved(arm.model) as saved:
        arm.backward()
    return sum(saved.values())


def measure(network: str, key: str, settle: int, steps: int) -> dict[str, Any]:
    """Measures one arm on one network in this process, which has done nothing else.

    Args:
        network: key of ``networks.TASKS``.
        key: of ``ARMS``.
        settle: steps in an epoch of cnmix; its arms train one epoch and a step first.
        steps: whose peak is read.

    Returns:
        Resident bytes: ``process`` before the model, ``before`` the steps, ``peak`` in them, ``held`` after idle memory
        was given back, ``lone_peak`` in one step from there, and ``files``, by how much mapped files had grown before;
        ``saved_bytes`` and ``saved_without_dropout``; ``updates_while_measured``; cnmix's ``widths``.
    """
    gc.collect()
    found: dict[str, Any] = {"process": resident()}
    files = resident("RssFile")
    torch.manual_seed(0)
    task = TASKS[network]
    arm = ARMS[key][1](task, task.build(), settle)
    for _ in range(WARMUP):
        arm.step()
    gc.collect()
    updates = arm.updates()
    found["before"] = resident()
    restart_peak()
    for _ in range(steps):
        arm.step()
    found["peak"] = resident("VmHWM")
    found["files"] = resident("RssFile") - files
    release()
    found["held"] = resident()
    restart_peak()
    arm.step()
    found["lone_peak"] = resident("VmHWM")
    found["updates_while_measured"] = arm.updates() - updates
    found["saved_bytes"] = saved_bytes(arm)
    with without_dropout(arm.model):
        found["saved_without_dropout"] = saved_bytes(arm)
    return found | {"note": arm.note, "widths": widths(arm.model)}


def measure_apart(network: str, key: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs ``measure`` in a fresh process.

    Raises:
        RuntimeError: with the last line that the process printed, if it failed.
    """
    command = [sys.executable, __file__, "--child", network, key]
    command += [f"--{name}={getattr(args, name)}" for name in ("settle", "steps", "threads")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def summarize(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Puts the repeats of one arm together.

    Returns:
        Of ``peak``, ``before``, ``held`` and ``lone_peak``, each over the process before the model, and of ``step``,
        the peak over what was there before: median, lowest and highest in bytes. What else is the same in every repeat,
        and the repeats themselves.
    """
    measured = {
        "peak": [each["peak"] - each["process"] for each in found],
        "before": [each["before"] - each["process"] for each in found],
        "step": [each["peak"] - each["before"] for each in found],
        "held": [each["held"] - each["process"] for each in found],
        "lone_peak": [each["lone_peak"] - each["process"] for each in found],
    }
    row: dict[str, Any] = {
        name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name, values in measured.items()
    }
    for name in ("saved_bytes", "saved_without_dropout", "updates_while_measured", "note", "widths"):
        row[name] = found[-1][name]
    return row | {"repeats": list(found)}


def run_network(network: str, keys: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measures the arms on one network; an arm that fails has its error in its row."""
    rows: dict[str, dict[str, Any]] = {}
    for key in keys:
        print(f"{network}: {key}", file=sys.stderr, flush=True)
        try:
            rows[key] = summarize([measure_apart(network, key, args) for _ in range(args.repeats)])
        except RuntimeError as error:
            rows[key] = {"error": str(error)}
    reference = rows["float32"].get("peak")
    for row in rows.values():
        if reference is not None and "peak" in row:
            row["peak_over_float32"] = row["peak"]["median"] / reference["median"]
    return rows


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f}"


def _remark(row: Mapping[str, Any]) -> str:
    parts = [row.get("error", ""), row.get("note", "")]
    if row.get("updates_while_measured"):
        parts.append(f"{row['updates_while_measured']} updates while measured")
    return "; ".join(part for part in parts if part)


def show(network: str, result: Mapping[str, Any]) -> None:
    """Prints the rows of one network."""
    cells = []
    for key, row in result["arms"].items():
        if "peak" not in row:
            cells.append([ARMS[key][0], *"–––––––––", _remark(row)])
            continue
        peak = row["peak"]
        cells.append(
            [
                ARMS[key][0],
                _megabytes(peak["median"]),
                f"{_megabytes(peak['lowest'])} – {_megabytes(peak['highest'])}",
                f"{row['peak_over_float32']:.2f}" if "peak_over_float32" in row else "–",
                _megabytes(row["before"]["median"]),
                _megabytes(row["step"]["median"]),
                _megabytes(row["held"]["median"]),
                _megabytes(row["lone_peak"]["median"]),
                _megabytes(row["saved_bytes"]),
                _megabytes(row["saved_without_dropout"]),
                _remark(row),
            ]
        )
    columns = ["arm", "peak MB", "range", "/ float32", "before", "step", "held", "lone step", "saved", "no dropout"]
    title = f"{TASKS[network].title}; parameters {_megabytes(result['parameter_bytes'])} MB, gradients as many"
    table(title, [*columns, "remarks"], cells)


def draw(path: Path, result: Mapping[str, Any]) -> Path | None:
    """Draws the peak of every arm, with what autograd saves beside it."""
    panels = {}
    for network, found in result["networks"].items():
        bars = []
        for key, row in found["arms"].items():
            title, ours = ARMS[key][0], key.startswith("cnmix")
            if "peak" not in row:
                bars.append(Bar(title, None, row["error"][:60], highlight=ours))
                continue
            peak = {name: value / 1e6 for name, value in row["peak"].items()}
            share = f" ({row['peak_over_float32']:.2f}×)" if "peak_over_float32" in row else ""
            label = f"{peak['median']:.0f}{share}, saved {_megabytes(row['saved_bytes'])}"
            bars.append(Bar(title, peak["median"], label, peak["lowest"], peak["highest"], ours))
        parameters = _megabytes(found["parameter_bytes"])
        panels[f"{TASKS[network].title}; parameters {parameters} MB"] = bars
    title = "Training step: peak resident memory over the process before the model, and what autograd saves\n"
    return plot(path, title + describe(result["machine"]), panels, "MB (lowest and highest of the repeats)")


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", choices=TASKS, default=["bert", "gpt"], metavar="NETWORK", help=", ".join(TASKS)
    )
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(DEFAULT_ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes per arm")
    parser.add_argument("--steps", type=int, default=5, help="steps in a process whose peak is read")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--settle", type=int, default=20, help="steps that cnmix trains first: one of its epochs")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file; the plot goes beside it as a PNG")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.repeats, args.steps, args.threads, args.settle) < 1:
        parser.error("--repeats, --steps, --threads and --settle must be at least 1")
    args.settle = max(args.settle, args.steps + WARMUP + 5)  # no update of the third epoch while measured
    torch.set_num_threads(args.threads)
    check_system()
    if args.child:
        print(json.dumps(measure(args.child[0], args.child[1], args.settle, args.steps)))
        return
    settings = {name: getattr(args, name) for name in ("repeats", "steps", "threads", "settle")}
    result = begin("memory", kernels=kernels.describe(), settings=settings, networks={})
    result["machine"]["huge_pages"] = HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else None
    keys = [key for key in ARMS if key in args.arms or key == "float32"]
    for network in args.networks:
        size = parameter_bytes(TASKS[network].build())
        result["networks"][network] = {"parameter_bytes": size, "arms": run_network(network, keys, args)}
        show(network, result["networks"][network])
        save_json(args.output, result)
    picture = draw(args.output.with_suffix(".png"), result)
    print(f"{args.output}; {picture or 'no plot: matplotlib is not installed'}")


if __name__ == "__main__":
    main()

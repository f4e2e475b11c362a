"""Times inference of ResNet-50 and VGG-19 in float32, int8 of torch and onnxruntime, and cnmix, and what it takes.

``python benchmarks/inference.py`` runs everything; README.md in this folder says how to read it. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from inference_arms import ARMS, Case, imagenet
from memory import check_system, release, resident, restart_peak
from report import Bar, begin, describe, plot, save_json, time_arms
from torch import Tensor

from cnmix import kernels

ROOT = Path(__file__).resolve().parent
OUTPUT = ROOT / "results" / "inference.json"
FOLDER = ROOT.parent / "runs" / "inference"
CASES = (("resnet50", 1), ("resnet50", 16), ("vgg19", 1))
TITLES = {"resnet50": "ResNet-50", "vgg19": "VGG-19"}
SETTLE = 0.1  # seconds before an arm's turn, in which the threads of the last one's pool stop spinning
WARMUP = 2


def measure_memory(case: Case, key: str) -> dict[str, int]:
    """Measures one arm in this process, which has done nothing else.

    Returns:
        Resident bytes over those of the process with its packages imported and the images drawn: ``loaded``, after
        loading and the first calls, idle memory given back; ``load_peak`` until then; ``peak`` in the calls after.
    """
    arm = ARMS[key]
    arm.import_packages()
    x = imagenet.images(case.batch, seed=2)[0]
    gc.collect()
    restart_peak()
    before = resident()
    with torch.no_grad():
        run = arm.load(case)
        run(x)
        load_peak = resident("VmHWM") - before
        release()
        loaded = resident() - before
        restart_peak()
        for _ in range(3):
            run(x)
        return {"loaded": loaded, "load_peak": load_peak, "peak": resident("VmHWM") - before}


def measure_memory_apart(case: Case, key: str) -> dict[str, int]:
    """Runs ``measure_memory`` in a fresh process; raises RuntimeError with its last line if that failed."""
    command = [sys.executable, __file__, "--child", case.network, str(case.batch), key]
    command += ["--folder", str(case.folder), "--threads", str(case.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def compare(outputs: Tensor, reference: Tensor) -> dict[str, Any]:
    """Compares logits, (N, classes), with other ones: top-1 agreement, differences, and whether all bits are equal.

    The differences are those of the classes that the images have: the other logits hardly move.
    """
    difference = (outputs - reference)[:, : imagenet.CLASSES].abs()
    return {
        "agreement": (outputs.argmax(1) == reference.argmax(1)).float().mean().item(),
        "largest": difference.max().item(),
        "mean": difference.mean().item(),
        "equal": torch.equal(outputs, reference),
    }


def attempt(rows: dict[str, dict[str, Any]], key: str, action: Callable[[], Any]) -> Any:
    """Returns what ``action`` does, or None and leaves its error in the arm's row: the others go on."""
    try:
        return action()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        rows[key]["error"] = f"{type(error).__name__}: {lines[0]}"
        return None


def run_case(case: Case, keys: Sequence[str], repeats: int, images: int) -> dict[str, dict[str, Any]]:
    """Measures the arms on one network at one batch size.

    Args:
        case: the network and the batch size.
        keys: of ``ARMS``.
        repeats: timed rounds.
        images: whose logits are compared; a multiple of the batch size.

    Returns:
        What was found of each arm, or its error.
    """
    rows: dict[str, dict[str, Any]] = {key: {} for key in keys}
    runs: dict[str, Callable[[Tensor], Tensor]] = {}
    batches = imagenet.images(images, seed=3)[0].split(case.batch)
    outputs: dict[str, Tensor] = {}
    for key in keys:
        print(f"{case.network}, batch {case.batch}: preparing {key}", file=sys.stderr, flush=True)
        attempt(rows, key, lambda key=key: ARMS[key].make(case))
        run = None if "error" in rows[key] else attempt(rows, key, lambda key=key: ARMS[key].load(case))
        if run is None:
            continue
        logits = attempt(rows, key, lambda run=run: torch.cat([run(batch).clone() for batch in batches]))
        if logits is not None:
            runs[key], outputs[key] = run, logits
    x = imagenet.images(case.batch, seed=2)[0]
    calls = {key: lambda run=run: run(x) for key, run in runs.items()}
    timings = time_arms(calls, repeats, WARMUP, SETTLE)
    for key, timing in timings.items():
        row = rows[key]
        row["seconds"] = timing.to_dict()
        row["speedup"] = timings["float32"].median / timing.median
        row["against_float32"] = compare(outputs[key], outputs["float32"])
        if "cnmix_fused" in outputs and key.startswith("cnmix"):
            row["against_fused"] = compare(outputs[key], outputs["cnmix_fused"])
        suffix = ARMS[key].suffix
        row["file_bytes"] = case.file(suffix).stat().st_size if suffix else None
    del runs, calls
    torch._dynamo.reset()
    release()
    for key in timings:
        print(f"{case.network}, batch {case.batch}: memory of {key}", file=sys.stderr, flush=True)
        rows[key]["memory"] = attempt(rows, key, lambda key=key: measure_memory_apart(case, key))
    return rows


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of one case as Markdown."""
    columns = ("", "ms", "quartiles", "× float32", "top-1 as float32", "difference: mean, largest", "as fused")
    columns += ("file, MB", "loaded, MB", "peak, MB")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for key, row in rows.items():
        if "seconds" not in row:
            lines.append(f"| {ARMS[key].title} | {row['error']} |" + " |" * (len(columns) - 2))
            continue
        seconds, against, memory = row["seconds"], row["against_float32"], row["memory"]
        cells = [
            ARMS[key].title,
            f"{1e3 * seconds['median']:.1f}",
            f"{1e3 * seconds['lower']:.1f} – {1e3 * seconds['upper']:.1f}",
            f"{row['speedup']:.2f}",
            f"{against['agreement']:.1%}",
            f"{against['mean']:.2g}, {against['largest']:.2g}",
            _fused(row.get("against_fused")),
            f"{row['file_bytes'] / 1e6:.1f}" if row["file_bytes"] else "–",
            *(f"{memory[name] / 1e6:.0f}" if memory else "–" for name in ("loaded", "peak")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _fused(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    return "same bits" if found["equal"] else f"{found['agreement']:.1%}, {found['largest']:.2g}"


def draw(path: Path, result: Mapping[str, Any]) -> Path | None:
    """Draws the speed of every arm over eager float32's."""
    panels = {}
    for title, rows in result["cases"].items():
        bars = []
        for key, row in rows.items():
            name, ours = ARMS[key].title, key.startswith("cnmix")
            if "seconds" not in row:
                bars.append(Bar(name, None, row["error"][:60], highlight=ours))
                continue
            seconds, speed = row["seconds"], row["speedup"]
            base = speed * seconds["median"]
            label = f"{speed:.2f}×, {1e3 * seconds['median']:.1f} ms"
            bars.append(Bar(name, speed, label, base / seconds["upper"], base / seconds["lower"], ours))
        panels[title] = bars
    title = "Inference: speed over eager float32\n"
    return plot(path, title + describe(result["machine"]), panels, "× eager float32 (quartiles)", reference=1.0)


def name_case(network: str, batch: int) -> str:
    """Returns what tables call a case."""
    return f"{TITLES[network]}, {batch} × 3 × {imagenet.SIDE} × {imagenet.SIDE}"


def choose_cases(chosen: Iterable[str]) -> list[tuple[str, int]]:
    """Reads ``network:batch`` pairs; raises argparse's error for others."""
    pairs = []
    for text in chosen:
        network, _, batch = text.partition(":")
        if network not in TITLES or not batch.isdecimal() or int(batch) < 1:
            raise argparse.ArgumentTypeError(f"a case is NETWORK:BATCH, as resnet50:16, got {text!r}")
        pairs.append((network, int(batch)))
    return pairs


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[f"{network}:{batch}" for network, batch in CASES])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads and onnxruntime's")
    parser.add_argument("--images", type=int, default=64, help="images whose logits are compared")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="keeps the checkpoint and the peers' ONNX files for the next run"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file; the plot goes beside it as a PNG")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # of the peers' packages
    if args.child:
        network, batch, key = args.child
        print(json.dumps(measure_memory(Case(network, int(batch), args.folder, args.threads), key)))
        return
    try:
        cases = choose_cases(args.cases)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if min(args.repeats, args.threads) < 1 or any(args.images % batch for _, batch in cases):
        parser.error("--repeats and --threads must be at least 1, and --images a multiple of every batch size")
    check_system()
    args.folder.mkdir(parents=True, exist_ok=True)
    keys = [key for key in ARMS if key in args.arms or key == "float32"]
    settings = {"repeats": args.repeats, "threads": args.threads, "images": args.images, "settle": SETTLE}
    result = begin("inference", kernels=kernels.describe(), settings=settings, cases={})
    for network, batch in cases:
        case = Case(network, batch, args.folder, args.threads)
        case.make_checkpoint()
        with torch.no_grad():
            rows = run_case(case, keys, args.repeats, args.images)
        title = name_case(network, batch)
        result["cases"][title] = rows
        print(f"\n{title}\n\n{markdown(rows)}", flush=True)
        save_json(args.output, result)
    picture = draw(args.output.with_suffix(".png"), result)
    print(f"\n{args.output}; {picture or 'no plot: matplotlib is not installed'}")


if __name__ == "__main__":
    main()

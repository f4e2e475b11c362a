"""Measures what choosing widths and intervals costs in the course of an epoch.

    python benchmarks/adapting.py --networks mlp gpt --epoch 1000

Trains cnmix's O1 for one epoch and compares the steps on which some operand was measured (QEM, QPA) with those on which
none was. Widths stay int8 meanwhile: a step is slower after a width has grown, whether it measures or not. The first
hundredth of the epoch, where every step measures by definition, is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from arms import Arm
from networks import TASKS, Task
from report import begin, save_json, table

import cnmix

OUTPUT = Path(__file__).parent / "results" / "adapting.json"


def run_network(task: Task, epoch: int) -> dict[str, float]:
    """Trains one epoch and returns seconds of a step without updates, and what the others add over all steps."""
    torch.manual_seed(0)
    model = task.build()
    arm = Arm(task, model, model, scale=True)
    cnmix.initialize(model, arm.optimizer, opt_level="O1", steps_per_epoch=epoch, max_bitwidth=8)
    with_updates: list[float] = []
    without: list[float] = []
    for step in range(epoch):
        before, start = arm.updates(), time.perf_counter()
        arm.step()
        seconds = time.perf_counter() - start
        if step >= epoch / 100:
            (with_updates if arm.updates() > before else without).append(seconds)
    plain = statistics.median(without)
    more = statistics.median(with_updates) - plain if with_updates else 0.0
    steps = len(with_updates) + len(without)
    return {
        "plain_step": plain,
        "update_step": plain + more,
        "updating_steps": len(with_updates),
        "steps": steps,
        "cost": more * len(with_updates) / (plain * steps),
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=["mlp", "mnist"], metavar="NETWORK")
    parser.add_argument("--epoch", type=int, default=1000, help="steps in the epoch")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = begin("adapting", epoch=args.epoch, networks={})
    rows = []
    for name in args.networks:
        row = result["networks"][name] = run_network(TASKS[name], args.epoch)
        rows.append(
            [
                TASKS[name].title,
                f"{1e3 * row['plain_step']:.1f}",
                f"{1e3 * row['update_step']:.1f}",
                f"{row['updating_steps']} of {row['steps']}",
                f"{row['cost']:.2%}",
            ]
        )
    columns = ["network", "ms without update", "ms with", "steps with updates", "cost over the epoch"]
    table(f"Cost of adapting in an epoch of {args.epoch} steps, after its first hundredth", columns, rows)
    print(save_json(args.output, result))


if __name__ == "__main__":
    main()

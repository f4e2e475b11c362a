"""Measures what two processes send each other in a training step, with weights in float32 and in fixed point.

    python benchmarks/processes.py

Six GPT blocks train in two processes of this machine (gloo, one thread each), under DistributedDataParallel and under
fully_shard with each block split. Bytes are what one process gives to a kind of collective in a step, counted where
torch calls it; DistributedDataParallel averages its gradients inside torch, and sends a float32 of each parameter.
The seconds say little of a cluster: both processes share one memory.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from networks import TASKS, GptBlock
from report import begin, save_json, table
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cnmix

OUTPUT = Path(__file__).parent / "results" / "processes.json"
COLLECTIVES = ("all_gather_single", "reduce_scatter_single", "all_reduce")
WRAPPERS = ("DistributedDataParallel", "fully_shard")
LEVELS = ("O0", "O1", "O3")


def count(sent: Counter[str]) -> None:
    """Has torch's collectives note the bytes that this process gives them."""

    def call(name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [each.nbytes for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        # Of what is gathered a process gives the smaller one, its part; of what is scattered the larger one, all.
        sent[name] += min(tensors) if name == "all_gather_single" else max(tensors)
        return original(*args, **kwargs)

    for name in COLLECTIVES:
        setattr(dist, name, functools.partial(call, name, getattr(dist, name)))


def train(rank: int, store: str, wrapper: str, level: str, args: argparse.Namespace, results: Any) -> None:
    """Trains in one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    sent: Counter[str] = Counter()
    count(sent)
    task = TASKS["gpt"]
    torch.manual_seed(0)
    model = task.build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs, targets = task.batch()
    half = inputs.shape[0] // 2
    inputs, targets = inputs[rank * half : (rank + 1) * half], targets[rank * half : (rank + 1) * half]
    if level != "O0":
        cnmix.initialize(model, None, level, steps_per_epoch=args.settle)
    if wrapper == "fully_shard":
        for block in (each for each in model.modules() if isinstance(each, GptBlock)):
            fully_shard(block)
        fully_shard(model)
    trained = DistributedDataParallel(model) if wrapper == "DistributedDataParallel" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = []
    for _ in range(args.settle + 1 + args.steps):
        sent.clear()
        start = time.perf_counter()
        optimizer.zero_grad()
        task.loss(trained(inputs), targets).backward()
        optimizer.step()
        rows.append({"seconds": time.perf_counter() - start, **sent})
    if rank == 0:
        settled = rows[args.settle + 1 :]
        results.put(
            {
                "parameters": parameters,
                "seconds": statistics.median(row["seconds"] for row in settled),
                "settled": {name: statistics.median(row.get(name, 0) for row in settled) for name in COLLECTIVES},
                "first": {name: rows[0].get(name, 0) for name in COLLECTIVES},
                "steps_with_agreement": sum(row.get("all_reduce", 0) > 0 for row in rows),
                "steps": len(rows),
            }
        )
    dist.barrier()
    dist.destroy_process_group()


def run(wrapper: str, level: str, args: argparse.Namespace) -> dict[str, Any]:
    """Starts both processes and returns what the first one counted."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (str(Path(folder) / "store"), wrapper, level, args, results)
        torch.multiprocessing.spawn(train, given, nprocs=2)
    return results.get()


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settle", type=int, default=20, help="steps of the first epoch, in which widths are chosen")
    parser.add_argument("--steps", type=int, default=10, help="steps measured after it")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args()
    result = begin("processes", runs={})
    rows = []
    for wrapper in WRAPPERS:
        for level in LEVELS:
            one = result["runs"][f"{wrapper} {level}"] = run(wrapper, level, args)
            settled = one["settled"]
            gradients = settled["reduce_scatter_single"] or 4 * one["parameters"]
            rows.append(
                [
                    wrapper,
                    level,
                    f"{settled['all_gather_single'] / 1e6:.2f}",
                    f"{gradients / 1e6:.2f}",
                    f"{one['first']['all_reduce'] / 1e3:.1f}",
                    f"{one['steps_with_agreement']} of {one['steps']}",
                    f"{1e3 * one['seconds']:.0f}",
                ]
            )
    columns = ["wrapper", "level", "weights, MB", "gradients, MB", "formats, kB", "steps that agree on formats", "ms"]
    table(f"What a process sends in a step, {one['parameters'] / 1e6:.1f} million parameters", columns, rows)
    print(save_json(args.output, result))


if __name__ == "__main__":
    main()

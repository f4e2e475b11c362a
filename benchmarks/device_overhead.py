"""Measures what a training step on the emulated card costs beside the same step on the host.

    python benchmarks/device_overhead.py
    python benchmarks/device_overhead.py --networks mnist tiny --arms float32 --repeats 41

Every network trains in float32 and with cnmix at O1, on the host and on an emulated MLU370, which multiplies float
tensors in float. Each of the four has a process of its own, so that the host's has no emulation in it; they take turns,
some steps each, in rounds that begin with another one every time. Both devices compute the same bits, which is checked.
The networks are those of ``training_step.py`` and, as the worst case, eight Linears of 32 × 32, a step of which is
little else than calls.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from networks import TASKS, Task
from report import Timing, describe, machine, save_json, table
from torch import nn
from torch.nn import functional as F

import cnmix

OUTPUT = Path(__file__).parent / "results" / "device_overhead.json"
ARMS = {"float32": "float32", "cnmix": "cnmix O1"}
DEVICES = ("cpu", "mlu")
CARD = "MLU370"
# Steps before anything is timed: of cnmix an epoch, while which it measures often, and some of the next.
EPOCH = 20
SETTLE = {"float32": 3, "cnmix": EPOCH + 3}
SHORTEST = 0.05  # seconds that are timed at once


def _tiny_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 32, generator=generator), torch.randn(32, 32, generator=generator)


def _tiny() -> nn.Module:
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))


NETWORKS: dict[str, Task] = {
    **TASKS,
    "tiny": Task("8 × Linear 32, batch 32", _tiny, _tiny_batch, F.mse_loss, 0.1),
}


def work(connection: Connection, network: str, arm: str, device: str, threads: int | None) -> None:
    """Trains in a process of its own: answers a number of steps with the seconds that they took.

    Args:
        connection: to the process that asks; 0 steps ask for the loss of the next one, None ends it.
        network: key of ``NETWORKS``.
        arm: key of ``ARMS``.
        device: "cpu" or "mlu".
        threads: of torch; None leaves its default.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "mlu":
        from cnmix.torch_mlu import install

        install(card_name=CARD)
    task = NETWORKS[network]
    torch.manual_seed(0)
    model = task.build().to(device)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=task.learning_rate)
    if arm == "cnmix":
        cnmix.initialize(model, optimizer, opt_level="O1", steps_per_epoch=EPOCH)
    inputs, targets = (each.to(device) for each in task.batch())

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        if arm == "cnmix":
            with cnmix.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
        else:
            loss.backward()
        optimizer.step()
        return loss

    for _ in range(SETTLE[arm]):
        step()
    connection.send("ready")
    while (steps := connection.recv()) is not None:
        if steps == 0:
            connection.send(step().item())
            continue
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        connection.send((time.perf_counter() - begin) / steps)


def measure(network: str, arms: list[str], repeats: int, threads: int | None) -> dict[str, dict[str, Any]]:
    """Times the arms of one network on both devices.

    Args:
        network: key of ``NETWORKS``.
        arms: keys of ``ARMS``.
        repeats: rounds.
        threads: of torch; None leaves its default.

    Returns:
        For each arm the seconds of a step by device, their ratio in each round, and whether the losses are the same.
    """
    context = multiprocessing.get_context("spawn")
    connections: dict[tuple[str, str], Connection] = {}
    processes = []
    try:
        for key in [(arm, device) for arm in arms for device in DEVICES]:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, network, *key, threads), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections[key] = ours
            ours.recv()  # one after the other: they have the same cores

        def ask(key: tuple[str, str], steps: int) -> float:
            connections[key].send(steps)
            return float(connections[key].recv())

        steps = {arm: max(1, math.ceil(SHORTEST / ask((arm, "cpu"), 1))) for arm in arms}
        for arm in arms:
            ask((arm, "mlu"), 1)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in connections}
        order = list(connections)
        for index in range(repeats):
            start = index % len(order)
            for key in order[start:] + order[:start]:
                seconds[key].append(ask(key, steps[key[0]]))
        losses = {key: ask(key, 0) for key in order}
        for connection in connections.values():
            connection.send(None)
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
    rows = {}
    for arm in arms:
        host, card = (seconds[arm, device] for device in DEVICES)
        ratios = Timing(tuple(b / a for a, b in zip(host, card, strict=True)))
        rows[arm] = {
            "host": Timing(tuple(host)).to_dict(),
            "card": Timing(tuple(card)).to_dict(),
            "ratio": statistics.median(card) / statistics.median(host),
            "ratio_quartiles": list(ratios.quartiles),
            "steps_at_once": steps[arm],
            "same_loss": losses[arm, "cpu"] == losses[arm, "mlu"],
        }
    return rows


def show(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Prints what was found."""
    cells = []
    for network, rows in found.items():
        for arm, row in rows.items():
            lower, upper = row["ratio_quartiles"]
            cells.append(
                [
                    NETWORKS[network].title,
                    ARMS[arm],
                    f"{1e3 * row['host']['median']:.2f}",
                    f"{1e3 * row['card']['median']:.2f}",
                    f"{row['ratio']:.3f}",
                    f"{lower:.3f} – {upper:.3f}",
                    "same" if row["same_loss"] else "other",
                ]
            )
    table(
        f"A training step on an emulated {CARD} and on the host",
        ["network", "arm", "host ms", "card ms", "card / host", "quartiles of the rounds", "loss"],
        cells,
        "medians of interleaved rounds, a process for each",
    )


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--repeats", type=int, default=21, help="rounds")
    parser.add_argument("--threads", type=int, help="of torch; its default otherwise")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    found_machine = machine()
    print(describe(found_machine))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for network in args.networks:
        print(f"{network} …", file=sys.stderr, flush=True)
        found[network] = measure(network, args.arms, args.repeats, args.threads)
        result = {"machine": found_machine, "repeats": args.repeats, "networks": found}
        saved = save_json(args.output, result)
    show(found)
    print(f"saved {saved}")


if __name__ == "__main__":
    main()

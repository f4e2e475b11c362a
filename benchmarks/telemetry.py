"""Measures what recording a run costs, on two recipes.

    python benchmarks/telemetry.py --threads 2

Two models of the same seed take the same steps in turns, one recorded as ``cnmix train`` does by default, one not;
which goes first changes with every step. Both compute the same numbers: their times differ by the recording alone.
Times are the processor's, of all threads, so that other programs disturb less. What recording costs while it is off is
too small to be seen so: it is the calls that a step makes of what asks whether anybody listens, times what one takes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from report import describe, machine, save_json, table
from torch.utils.data.distributed import DistributedSampler

import cnmix
from cnmix.kernels.profiling import add_listener, remove_listener, timed
from cnmix.recipe import build_model, build_optimizer, load_data, load_recipe
from cnmix.task import batches, call, load_task
from cnmix.telemetry import Recorder

ROOT = Path(__file__).parent
OUTPUT = ROOT / "results" / "telemetry.json"


class Run:
    """A model that is trained step by step.

    Args:
        recipe: of the model.
        steps_per_epoch: of its data.
        folder: where it is recorded; None: not at all.
        every_n_steps: from one sampled step to the next.
    """

    def __init__(self, recipe: Any, steps_per_epoch: int, folder: Path | None, every_n_steps: int) -> None:
        torch.manual_seed(0)
        model = build_model(recipe)
        optimizer, self.scheduler = build_optimizer(recipe, model.parameters())
        level = recipe.cnmix.opt_level
        self.model, self.optimizer = cnmix.initialize(model, optimizer, level, steps_per_epoch=steps_per_epoch)
        self.loss = load_task(recipe).loss
        self.recorder = None if folder is None else Recorder(model, folder, every_n_steps)
        self.seconds: list[float] = []

    def step(self, batch: Any) -> None:
        """Trains a step, and notes its time."""
        inputs, targets = batch
        torch.manual_seed(len(self.seconds))  # for dropout: both draw the same
        started = time.process_time()
        if self.recorder is not None:
            self.recorder.begin_step()
        loss = self.loss(call(self.model, inputs), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.recorder is not None:
            self.recorder.end_step()
        self.seconds.append(time.process_time() - started)


class Calls:
    """Counts the calls that ask whether anybody listens, but for those within others."""

    def __init__(self) -> None:
        self.count = 0

    def multiplied(self, *_: Any) -> None:
        """Is counted by ``spent`` too."""

    def spent(self, *_: Any) -> None:
        """Counts one."""
        self.count += 1


def epochs_of(recipe: Any, epochs: int) -> tuple[int, Iterator[list[Any]]]:
    """Returns the steps in an epoch, and the batches of each epoch."""
    data = load_data(recipe)[0]
    sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=0)  # type: ignore[var-annotated]
    loader = batches(data, recipe.batch_size, sampler=sampler, workers=0, seed=0)

    def each() -> Iterator[list[Any]]:
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            yield list(loader)

    return len(loader), each()


def run_recipe(name: str, epochs: int | None, every_n_steps: int) -> dict[str, Any]:
    """Trains a recipe with and without being recorded, and returns what that took."""
    recipe = load_recipe(ROOT.parent / "recipes" / f"{name}.yaml")
    steps_per_epoch, every_epoch = epochs_of(recipe, epochs or recipe.epochs)
    with tempfile.TemporaryDirectory() as folder:
        off = Run(recipe, steps_per_epoch, None, every_n_steps)
        on = Run(recipe, steps_per_epoch, Path(folder), every_n_steps)
        for data in every_epoch:
            for batch in data:
                for run in (on, off) if len(on.seconds) % 2 else (off, on):
                    run.step(batch)
            for run in (on, off):
                if run.scheduler is not None:
                    run.scheduler.step()
        size = sum(each.stat().st_size for each in Path(folder).iterdir())
    same = all(map(torch.equal, on.model.state_dict().values(), off.model.state_dict().values()))
    # Pages of memory and other things that come once fall into the first steps.
    pairs = list(itertools.islice(zip(on.seconds, off.seconds, strict=True), 1, None))
    sampled = [pair for step, pair in enumerate(pairs, 1) if step % every_n_steps == 0]
    others = [pair for step, pair in enumerate(pairs, 1) if step % every_n_steps]
    calls = Calls()
    add_listener(calls)
    off.step(data[0])
    remove_listener(calls)
    step = statistics.median(off.seconds)
    return {
        "steps": len(on.seconds),
        "step": step,
        "over_the_run": sum(a for a, _ in pairs) / sum(b for _, b in pairs) - 1,
        "typical": typical(sampled, others, every_n_steps),
        "sampled_step": statistics.median(a / b for a, b in sampled) - 1,
        "other_step": statistics.median(a / b for a, b in others) - 1,
        "off": calls.count * seconds_of_asking() / step,
        "calls": calls.count,
        "bytes": size,
        "same_weights": same,
    }


def typical(sampled: list[tuple[float, float]], others: list[tuple[float, float]], every_n_steps: int) -> float:
    """Returns what recording adds to a step on average, from the medians of what it adds to either kind."""
    more = [statistics.median(a - b for a, b in pairs) for pairs in (sampled, others)]
    step = statistics.median(b for _, b in sampled + others)
    return (more[0] + (every_n_steps - 1) * more[1]) / every_n_steps / step


def seconds_of_asking(repeats: int = 200_000) -> float:
    """Returns what a call takes longer where it asks whether anybody listens, and nobody does."""

    def nothing(x: int) -> int:
        return x

    asking = timed("quantize")(nothing)
    took = []
    for function in (nothing, asking):
        rounds = []
        for _ in range(5):
            started = time.process_time()
            for i in range(repeats):
                function(i)
            rounds.append(time.process_time() - started)
        took.append(min(rounds) / repeats)
    return took[1] - took[0]


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["digits", "text"], metavar="RECIPE")
    parser.add_argument("--epochs", type=int, help="the recipe's own where it is not given")
    parser.add_argument("--every", type=int, default=50, help="steps from one sampled step to the next")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = machine()
    print(describe(found))
    result: dict[str, Any] = {"benchmark": "telemetry", "machine": found, "every": args.every, "recipes": {}}
    rows = []
    for name in args.recipes:
        row = result["recipes"][name] = run_recipe(name, args.epochs, args.every)
        rows.append(
            [
                name,
                f"{row['steps']}",
                f"{1e3 * row['step']:.2f}",
                f"{row['over_the_run']:+.2%}",
                f"{row['typical']:+.2%}",
                f"{row['sampled_step']:+.1%}",
                f"{row['other_step']:+.2%}",
                f"{row['off']:+.3%}",
                f"{row['bytes'] / 1024:.0f}",
                "yes" if row["same_weights"] else "NO",
            ]
        )
    columns = ["recipe", "steps", "ms a step", "over the run", "typical", "sampled step", "other steps", "off"]
    table(f"Cost of recording every {args.every} steps", [*columns, "KiB", "same weights"], rows)
    print(save_json(args.output, result))


if __name__ == "__main__":
    main()

"""Measures what the Lightning plugin adds to a training step, on the network of the digits recipe.

    python benchmarks/plugin.py

Three ways to take the same step: a hand-written loop after ``cnmix.initialize``; Lightning's Trainer on a model that
was initialized by hand; and the Trainer with ``CnmixPlugin``. The last two differ by the plugin alone. They take turns,
an epoch each, in one process; a step is from the start of a batch to its end, without loading it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from report import begin, save_json, table
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import cnmix
from cnmix.lightning import CnmixPlugin
from cnmix.recipe import build_model, load_data, load_recipe
from cnmix.training import Training

ROOT = Path(__file__).parent
OUTPUT = ROOT / "results" / "plugin.json"
WAYS = {"loop": "hand-written loop", "trainer": "Trainer, initialized by hand", "plugin": "Trainer with CnmixPlugin"}


class Stopwatch(Callback):
    """Notes the seconds of each training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Starts a step."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Ends it."""
        self.seconds.append(time.perf_counter() - self._start)


class Task(Training):
    """The recipe's task, without logging, which the hand-written loop does not do either."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Returns the loss."""
        inputs, classes = batch
        return cross_entropy(self.model(inputs), classes)


class Way:
    """One way to train, an epoch at a time.

    Args:
        name: "loop", "trainer" or "plugin".
        recipe: of the network and its data.
    """

    def __init__(self, name: str, recipe: Any) -> None:
        torch.manual_seed(0)
        self.name = name
        self.task = Task(build_model(recipe), recipe, "O1", 0)
        self.watch = Stopwatch()
        self.loader = DataLoader(load_data(recipe)[0], recipe.batch_size)
        self.optimizer = torch.optim.SGD(self.task.parameters(), lr=0.05, momentum=0.9)
        self.task.configure_optimizers = lambda: self.optimizer  # type: ignore[method-assign]
        if name != "plugin":
            cnmix.initialize(self.task, self.optimizer, steps_per_epoch=len(self.loader))
        self.trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=0,
            plugins=[CnmixPlugin()] if name == "plugin" else None,
            callbacks=[self.watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def epoch(self) -> None:
        """Trains for one epoch."""
        if self.name != "loop":
            self.trainer.fit_loop.max_epochs += 1
            self.trainer.fit(self.task, self.loader)
            return
        for batch in self.loader:
            self.watch.on_train_batch_start()
            loss = self.task.training_step(batch, 0)
            self.optimizer.zero_grad()
            with cnmix.scale_loss(loss, self.optimizer) as scaled_loss:
                scaled_loss.backward()
            self.optimizer.step()
            self.watch.on_train_batch_end()


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each way, after ten to settle")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    result = begin("plugin", epochs=args.epochs)
    recipe = load_recipe(ROOT.parent / "recipes" / "digits.yaml")
    settle = 10
    ways = [Way(name, recipe) for name in WAYS]
    epochs: dict[str, list[float]] = {name: [] for name in WAYS}
    for epoch in range(settle + args.epochs):
        for way in itertools.islice(itertools.cycle(ways), epoch % 3, epoch % 3 + 3):
            way.watch.seconds.clear()
            way.epoch()
            if epoch >= settle:
                epochs[way.name].append(statistics.median(way.watch.seconds))
    steps = {name: statistics.median(medians) for name, medians in epochs.items()}
    # Epoch by epoch, so that a slow minute counts on both sides.
    pairs = zip(epochs["plugin"], epochs["trainer"], strict=True)
    more = statistics.median(plugin - trainer for plugin, trainer in pairs)
    cost = more / steps["loop"]
    rows = [[WAYS[name], f"{1e6 * seconds:.0f}", f"{seconds / steps['loop']:.3f}"] for name, seconds in steps.items()]
    table("A training step of the digits recipe", ["way", "µs", "× the loop"], rows)
    print(f"the plugin alone, epoch against epoch: {1e6 * more:+.0f} µs, {cost:+.2%} of the loop's step")
    print(save_json(args.output, result | {"seconds": steps, "cost": cost}))


if __name__ == "__main__":
    main()

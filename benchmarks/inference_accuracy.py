"""Compares a run's checkpoints in float32, with the integers of training, and with int8 calibrated after training.

    cnmix train recipes/digits.yaml
    python benchmarks/inference_accuracy.py runs/digits/<time>

The calibrated models take the same float weights, measure their inputs on training data, and run on the emulated card,
fused by ``torch.jit.trace``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset

import cnmix.torch_mlu
from cnmix import inference
from cnmix.evaluation import MODEL_FILE, evaluate, read_checkpoint
from cnmix.recipe import build_model, load_data, merge_recipe
from cnmix.torch_mlu.core import mlu_quantize

CALIBRATION = 256  # training images


class OnCard(nn.Module):
    """A quantized model on the card, traced for each shape of its input.

    Args:
        model: of ``quantize_dynamic_mlu``, with its scales.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.to("mlu")
        self.traced: dict[torch.Size, Callable[[Tensor], Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Computes on the card; returns to the host."""
        x = x.to("mlu")
        if x.shape not in self.traced:
            self.traced[x.shape] = torch.jit.trace(self.model, x, check_trace=False)
        return self.traced[x.shape](x).cpu()


def calibrated(make: Callable[[], nn.Module], weights: dict[str, Tensor], images: Tensor, per_channel: bool) -> OnCard:
    """Quantizes float weights to int8, with scales measured on some images."""
    model = make()
    model.load_state_dict(weights)
    spec = {"per_channel": per_channel}
    measuring = mlu_quantize.quantize_dynamic_mlu(model, spec, dtype="int8", gen_quant=True)
    with torch.no_grad():
        measuring(images)
    quantized = mlu_quantize.quantize_dynamic_mlu(make())
    quantized.load_state_dict(measuring.state_dict())
    return OnCard(quantized.eval())


def accuracies(file: Path) -> tuple[str, dict[str, float]]:
    """Returns the level of a checkpoint, and the share of test data predicted correctly by each way of inference."""
    saved = read_checkpoint(file)
    recipe = merge_recipe(saved["recipe"], {}, where=f"the recipe in {file}", folder=file.parent)
    train, test = load_data(recipe)
    images = _inputs(train, CALIBRATION)

    def make() -> nn.Module:
        return build_model(recipe)

    plain = make()
    plain.load_state_dict(saved["state_dict"])
    integers = inference.load(make(), saved)
    found = {
        "float32": evaluate(plain, test)[0],
        "integers of training": evaluate(integers, test)[0],
        "the same, fused": evaluate(inference.fuse(integers, images[:2]), test)[0],
    }
    for name, per_channel in (("calibrated int8", False), ("calibrated int8, per channel", True)):
        found[name] = evaluate(calibrated(make, saved["state_dict"], images, per_channel), test)[0]
    return saved["result"]["level"], found


def _inputs(data: Dataset, count: int) -> Tensor:
    return torch.stack([data[index][0] for index in range(count)])


def main() -> None:
    """Prints a table with a row for each level, means over its seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a run of cnmix train")
    folder = parser.parse_args().folder
    files = sorted(folder.rglob(MODEL_FILE))
    if not files:
        parser.error(f"there is no {MODEL_FILE} in {folder}: it is what `cnmix train` leaves")
    cnmix.torch_mlu.install(cards=1)
    by_level: dict[str, list[dict[str, float]]] = {}
    for file in files:
        level, found = accuracies(file)
        by_level.setdefault(level, []).append(found)
    table = Table(title="Test accuracy, mean over seeds")
    table.add_column("level")
    names = list(next(iter(by_level.values()))[0])
    for name in names:
        table.add_column(name, justify="right")
    for level, runs in by_level.items():
        table.add_row(level, *(f"{statistics.mean(run[name] for run in runs):.2%}" for name in names))
    Console().print(table)


if __name__ == "__main__":
    main()

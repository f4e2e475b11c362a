"""Evaluates trained recipes, in float32 and with integers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, Dataset

from . import checkpoint, inference
from .nn import quantizer_sets
from .recipe import build_model, load_data, merge_recipe
from .task import CLASSIFICATION, Task, arguments, batches, call, load_task

MODEL_FILE = "model.pt"
LAST_FILE = "last.ckpt"


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Dataset[Any] | DataLoader[Any], task: Task = CLASSIFICATION
) -> tuple[float, float]:
    """Evaluates a model, in evaluation mode.

    Args:
        model: the network.
        data: the test data, of (inputs, targets); in batches of 500, or in those of a loader.
        task: what is evaluated; the classification of single inputs by default.

    Returns:
        The share that the score says is right, and the mean loss. Batches weigh as many as the score counts in them, so
        that the mean of each batch's classes becomes the mean of all.

    Raises:
        ValueError: if the score counts nothing in all of the data.
    """
    model.eval()
    right, loss, count = 0, 0.0, 0
    for inputs, targets in data if isinstance(data, DataLoader) else batches(data, 500):
        outputs = call(model, inputs)
        batch_right, batch_count = task.score(outputs, targets)
        if batch_count:
            loss += batch_count * float(task.loss(outputs, targets))
        right, count = right + batch_right, count + batch_count
    if not count:
        raise ValueError("the test data has nothing that the score counts")
    return right / count, loss / count


def evaluation_batches(recipe: DictConfig, data: Dataset[Any]) -> DataLoader[Any]:
    """Loads a recipe's test data, in order."""
    return batches(data, recipe.test_batch_size, workers=recipe.workers)


@dataclass
class Evaluation:
    """What one checkpoint comes to on the test data, in float and integers.

    Attributes:
        file: the checkpoint.
        level: opt level that it was trained at.
        seed: of its run.
        float_accuracy: share that is right by the recipe's score, in [0, 1].
        float_loss: mean loss.
        integer_accuracy: likewise with integers; None where it was not trained in fixed point.
        integer_loss: likewise.
    """

    file: str
    level: str
    seed: int
    float_accuracy: float
    float_loss: float
    integer_accuracy: float | None = None
    integer_loss: float | None = None


def evaluate_checkpoints(
    path: str | os.PathLike[str], module: str | os.PathLike[str] | None = None
) -> Iterator[Evaluation]:
    """Evaluates a run's checkpoints, or one of them, on the test data of the recipe they were trained with.

    The integer accuracy uses the positions that training stored; there is no calibration pass.

    Args:
        path: a run's folder or any folder in it, its ``model.pt``, or Lightning's ``last.ckpt``.
        module: the recipe's Python file, which is run; by default where it was when training ran.

    Raises:
        FileNotFoundError: if there is no checkpoint, or the recipe's Python file is gone.
        ValueError: if a file is no checkpoint of a recipe.
    """
    for file in find_checkpoints(path):
        saved, recipe, model = restore(file, module)
        _, test = load_data(recipe)
        model.load_state_dict(saved["state_dict"], strict=True)
        result = {"level": recipe.cnmix.opt_level, "seed": recipe.seeds[0], **saved.get("result", {})}
        loader, task = evaluation_batches(recipe, test), load_task(recipe)
        found = Evaluation(str(file), result["level"], result["seed"], *evaluate(model, loader, task))
        if has_integers(saved):
            integers = _integer_model(model, saved, loader)
            found.integer_accuracy, found.integer_loss = evaluate(integers, loader, task)
        yield found


def find_checkpoints(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the checkpoints in a folder, or the one that this is.

    Raises:
        FileNotFoundError: if there is none.
    """
    place = Path(path)
    files = [place]
    if place.is_dir():  # of a run that did not end there is only Lightning's
        files = sorted(place.rglob(MODEL_FILE))
        files += [last for last in sorted(place.rglob(LAST_FILE)) if not last.with_name(MODEL_FILE).is_file()]
    if not files:
        raise FileNotFoundError(
            f"there is no {MODEL_FILE} or {LAST_FILE} in {place}: {LAST_FILE} comes with an epoch's end"
        )
    return files


def restore(
    file: Path, module: str | os.PathLike[str] | None = None
) -> tuple[Mapping[str, Any], DictConfig, nn.Module]:
    """Returns a checkpoint, its recipe, and the recipe's network, which its weights fit but which has not got them.

    Args:
        file: the checkpoint.
        module: the recipe's Python file, which is run; by default where it was when training ran.

    Raises:
        FileNotFoundError: if there is no such file, or the recipe's Python file is gone.
        ValueError: if it is no checkpoint of a recipe, or of another network than the recipe's.
    """
    saved = read_checkpoint(file)
    moved = {} if module is None else {"module": str(Path(module).resolve())}
    recipe = merge_recipe(saved["recipe"], moved, where=f"the recipe in {file}", folder=file.parent)
    model = build_model(recipe)
    check_weights_fit(model, saved["state_dict"], file)
    return saved, recipe, model


def has_integers(saved: Mapping[str, Any]) -> bool:
    """Says whether a checkpoint was trained in fixed point."""
    return any(model["modules"] for model in saved["cnmix"]["models"])


def _integer_model(model: nn.Module, saved: Mapping[str, Any], data: DataLoader[Any]) -> nn.Module:
    """Returns the integer model of a checkpoint, fused where all of it can be: the bits are the same."""
    model = inference.load(model, saved)
    inputs, _ = next(iter(data))
    try:
        return inference.fuse(model, *arguments(inputs))
    except ValueError:
        return model


def operand_rows(model: nn.Module) -> Iterator[tuple[str, str, int, int | None, int, int, float]]:
    """Yields (product, operand, bits, position, interval, updates, error) for every operand of the model."""
    for name, quantizers in quantizer_sets(model):
        for operand, quantizer in quantizers:
            state = quantizer.state
            yield name, operand, state.bits, state.position, state.interval, state.updates, state.error


def read_checkpoint(file: Path) -> Mapping[str, Any]:
    """Reads a model's checkpoint, or Lightning's, in the form of the former.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of ``cnmix train``.
    """
    saved = checkpoint.read_plain(file)
    if "pytorch-lightning_version" in saved:
        prefix = "model."
        known = saved.get(checkpoint.LIGHTNING_KEY, {})
        state = {"version": known.get("version", 1), "models": [], "loss_scalers": []}
        for model in known.get("models", []):
            modules = {fqn.removeprefix(prefix): each for fqn, each in model["modules"].items()}
            state["models"].append({"modules": modules})
        run = saved.get("hyper_parameters", {})
        saved = {
            "state_dict": {key.removeprefix(prefix): value for key, value in saved["state_dict"].items()},
            "cnmix": state,
            "recipe": run.get("recipe"),
            "result": {key: run[key] for key in ("level", "seed") if key in run},
            "epoch": saved.get("epoch"),
        }
    missing = [key for key in ("state_dict", "cnmix", "recipe") if saved.get(key) is None]
    if missing:
        raise ValueError(f"{file} is no checkpoint of `cnmix train`: it has no {', '.join(missing)}")
    try:
        return {**saved, "cnmix": checkpoint.check(saved)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def check_weights_fit(model: nn.Module, weights: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError, naming the first few, if a weight is missing, unknown or of another shape."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    different = sorted(name for name in {*expected, *given} if expected.get(name) != given.get(name))
    if different:
        raise ValueError(f"{file} is of another network than the recipe's: {', '.join(different[:5])} differ")

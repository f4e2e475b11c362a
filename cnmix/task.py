"""What a recipe trains for: its loss and its score, how its network is called, and its data in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from .recipe_code import check_arguments, getattr_or_explain, load_module


def class_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross entropy of classes, in nats.

    Args:
        outputs: logits or log-probabilities, (N, classes), or with further dimensions, such as positions, between the
            two: (N, ..., classes).
        targets: classes, int64, (N,) or (N, ...).

    Raises:
        ValueError: if the shapes do not belong together.
    """
    return F.cross_entropy(*_one_row_each(outputs, targets))


def class_score(outputs: Tensor, targets: Tensor) -> tuple[int, int]:
    """Returns how many classes are predicted correctly, and of how many; shapes as ``class_loss`` has them."""
    scores, classes = _one_row_each(outputs, targets)
    return int((scores.argmax(1) == classes).sum()), len(classes)


class Task(NamedTuple):
    """What a network is trained and evaluated for.

    Attributes:
        loss: returns the loss of a batch, a scalar, from the network's outputs and the targets.
        score: returns how many are right and of how many, from the same.
    """

    loss: Callable[[Any, Any], Tensor] = class_loss
    score: Callable[[Any, Any], tuple[int, int]] = class_score


CLASSIFICATION = Task()
"""Of the classes of inputs, what a recipe without a loss and a score is for."""


def load_task(recipe: DictConfig) -> Task:
    """Returns a recipe's task, ``CLASSIFICATION`` where it names nothing else.

    Raises:
        FileNotFoundError: if the recipe's Python file is missing.
        ValueError: if it has no function of such a name, or that takes no argument of such a name.
    """
    return Task(
        _function(recipe, "loss", _check_loss) or class_loss,
        _function(recipe, "score", _check_score) or class_score,
    )


def _function(recipe: DictConfig, key: str, check: Callable[[Any, str], Any]) -> Callable[[Any, Any], Any] | None:
    name = recipe[key].name
    if name is None:
        return None
    function = getattr_or_explain(load_module(recipe.module), name)
    arguments = check_arguments(function, recipe[key].args, f"{key}.args", given=2)
    return lambda outputs, targets: check(function(outputs, targets, **arguments), name)


def _check_loss(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != ():
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"the loss {name} must return a tensor without dimensions, got {found}")
    return value


def _check_score(value: Any, name: str) -> tuple[int, int]:
    if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, int) for each in value)):
        raise ValueError(
            f"the score {name} must return two integers, how many are right and of how many, got {value!r}"
        )
    return value


def call(model: nn.Module, inputs: Any) -> Any:
    """Returns what a network makes of a batch's inputs, a tensor or a tuple (or list) of its arguments."""
    return model(*arguments(inputs))


def arguments(inputs: Any) -> tuple[Any, ...]:
    """Returns a batch's inputs as the arguments of the network."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def batches(
    data: Dataset[Any],
    batch_size: int,
    *,
    sampler: Sampler[int] | None = None,
    workers: int = 0,
    seed: int = 0,
) -> DataLoader[Any]:
    """Loads a data set in batches of (inputs, targets).

    Args:
        data: a map-style data set of (inputs, targets). Where it has a method ``collate``, that makes a batch of a list
            of samples, else they are stacked.
        batch_size: samples in a batch; the last one has what is left.
        sampler: the order; as they stand where None.
        workers: processes that load; 0 is this one.
        seed: of the generator that seeds the workers. Loaders draw from one whenever they start: from one of their own,
            that leaves dropout's random state alone.
    """
    return DataLoader(
        data,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=getattr(data, "collate", None),
        generator=torch.Generator().manual_seed(seed),
    )


def _one_row_each(scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scores (N, ..., classes) as (M, classes), and their classes (N, ...) as (M,)."""
    if scores.shape[:-1] != classes.shape:
        raise ValueError(
            f"the network's output has shape {tuple(scores.shape)} and the classes {tuple(classes.shape)}: return "
            "logits with the classes in the last dimension, and data with a class for each of the other places"
        )
    return scores.flatten(0, -2), classes.flatten()

"""Estimates what a training step takes on the vendor's cards.

A step runs once on the emulated card, under ``catch_perf``, in the widths that the timed run closed with. That lists
every operator, with its products and bytes; ``cnmix.torch_mlu.cost_model`` says what each would take on each card.
Nothing is measured on a card. The emulation is put in place in a process of its own, as it stays until the end of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from omegaconf import DictConfig, OmegaConf
from torch.utils._pytree import tree_map

from ..closing import STRATEGY_COUNT

CARDS = ("MLU220", "MLU270", "MLU290", "MLU370", "MLU590")
_FILE = "estimates.json"


def estimate_steps(
    recipe: dict[str, Any], levels: Sequence[str], folder: Path
) -> tuple[dict[str, dict[str, float]], str]:
    """Estimates the seconds of a training step by level and card.

    Args:
        recipe: as ``load_recipe`` returns it, as plain data.
        levels: that have been trained.
        folder: what each left, ``<level>.pt``: its weights, and the state of its quantizers.

    Returns:
        The estimates, and why there are none, "" where there are.
    """
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(recipe, tuple(levels), str(folder)))
    process.start()
    process.join()
    file = folder / _FILE
    if not file.is_file():
        return {}, f"the emulated card's process ended with {process.exitcode}"
    found = json.loads(file.read_text())
    return found["estimates"], found["reason"]


def _run(recipe: dict[str, Any], levels: Sequence[str], folder: str) -> None:
    estimates: dict[str, dict[str, float]] = {}
    reason = ""
    os.environ.pop(STRATEGY_COUNT, None)  # what was kept has closed already
    try:
        from ..torch_mlu import install

        install(1, card_name="MLU370", strict=False)
        for level in levels:
            estimates[level] = _estimate(OmegaConf.create(recipe), level, Path(folder) / f"{level}.pt")
    except Exception as error:  # an estimate is an extra: the times are there without it
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        estimates = {}
    (Path(folder) / _FILE).write_text(json.dumps({"estimates": estimates, "reason": reason}))


def _estimate(recipe: DictConfig, level: str, file: Path) -> dict[str, float]:
    """Returns the seconds of a training step on each card; runs where the emulation is in place."""
    from .. import state
    from ..nn.callers import ranks_of
    from ..recipe import load_data
    from ..task import batches, load_task
    from ..torch_mlu.catch_perf import profiler
    from .runs import prepare, train_step

    saved = torch.load(file)
    data = load_data(recipe)[0]
    torch.manual_seed(recipe.seeds[0])
    model, optimizer = prepare(recipe, level, data)
    model.load_state_dict(saved["weights"])
    if saved["cnmix"] is not None:
        state.load_state_dict(saved["cnmix"], model)
    model.to("mlu").train()
    for ranks in ranks_of(model):
        ranks.closing.closed = True
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes what the optimizer keeps, which later steps find there
    inputs, targets = tree_map(_to_card, next(iter(batches(data, recipe.batch_size))))
    with profiler.profile("MLU370") as profiled:
        train_step(model, optimizer, load_task(recipe).loss, inputs, targets, level)
    return {card: _seconds_on(card, profiled.operators) for card in CARDS}


def _to_card(value: Any) -> Any:
    return value.to("mlu") if isinstance(value, torch.Tensor) else value


def _seconds_on(name: str, operators: Sequence[Any]) -> float:
    """Returns the estimate of these operators, profiled for a card that multiplies in float, for another one."""
    from ..torch_mlu.cards import find_card
    from ..torch_mlu.cost_model import CostModel, Product

    model = CostModel.of(find_card(name))

    def kind(type_: str) -> str:
        return type_ if type_.startswith("int") else model.operand(getattr(torch, type_))

    total = 0.0
    for each in operators:
        if each.estimate is not None:  # but for copies between host and card
            products = [Product(macs, kind(left), kind(right)) for macs, left, right in each.estimate.products]
            total += model.products(products, each.estimate.traffic).seconds
    return total

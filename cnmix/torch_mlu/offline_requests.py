"""The offline model that ``ct.save_as_cambricon`` asks a trace for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .settings import configure, settings
from .traced_graphs import TracedGraph


def write_requested(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Writes what was asked for, if anything was, and takes the request back.

    Args:
        module: what ``torch.jit.trace`` returned.
        args: what it was called with.
        kwargs: likewise.

    Raises:
        ValueError: if it is no module that was traced, or one that no program can be made of.
    """
    name = settings().offline_model
    if not name:
        return
    configure(offline_model="")
    given = args[1] if len(args) > 1 else kwargs.get("example_inputs")
    if given is None or not isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"save_as_cambricon({name!r}) asks for an offline model, which needs a model and its inputs in their "
            "order: torch.jit.trace(model, example_inputs)"
        )
    inputs = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    traced = TracedGraph(module._c)
    devices = {each.device for each in pytree.tree_leaves(inputs) if isinstance(each, torch.Tensor)}
    try:
        if len(devices) != 1:
            raise ValueError("its inputs are on several devices, or on none")
        program, structure = traced.program(inputs, next(iter(devices)))
    except ValueError as error:
        raise ValueError(f"{name}.cambricon cannot be made of {traced.name}: {error}") from error
    from ..inference.offline import save_offline

    found = settings()
    save_offline(
        f"{name}.cambricon",
        program,
        structure,
        name=name,
        core_number=found.core_number,
        core_version=found.core_version or found.card.name,
        metadata={"input_format": str(found.input_format)},
    )

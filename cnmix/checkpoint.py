"""The checkpoint file: an ordinary PyTorch checkpoint with the quantizers' state beside the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import replacing
from .registry import unwrap
from .state import is_state, state_dict, upgrade

# Where Lightning keeps the state of CnmixPlugin; that of a subclass is under its own name.
LIGHTNING_KEY = "CnmixPlugin"
# What it calls the plain data in the folder of a distributed checkpoint.
_METADATA = "meta.pt"


def save(path: str | os.PathLike[str], model: nn.Module, optimizer: Any = None, **extra: Any) -> None:
    """Writes a checkpoint that ``torch.load(path, weights_only=True)`` reads.

    It is a dict with ``state_dict`` (a strict load into the plain model works), ``cnmix`` (see ``cnmix.state_dict``),
    ``optimizer`` where one is given, and the entries of ``extra``. The file is written under a temporary name and
    renamed, so that a failure leaves what was there before.

    Args:
        path: the file; its folder is made where it is missing.
        model: the model, initialized or plain.
        optimizer: its optimizer.
        **extra: plain numbers, strings, lists, dicts and tensors.

    Raises:
        ValueError: if an entry of ``extra`` has a reserved name, or ``fully_shard`` has split the weights.
    """
    taken = {"state_dict", "cnmix"} & set(extra)
    if taken:
        raise ValueError(f"checkpoint entries called {sorted(taken)} are written by save itself: choose other names")
    weights = unwrap(model).state_dict()
    split = [name for name, value in weights.items() if hasattr(value, "device_mesh")]
    if split:
        raise ValueError(
            f"{split[0]!r} is shared out among processes, and this one has a part of it: put the weights together with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True)) in every process, and save them with cnmix.state_dict(model) in one"
        )
    checkpoint = {"state_dict": weights, "cnmix": state_dict(model), **extra}
    if optimizer is not None:
        checkpoint["optimizer"] = optimizer.state_dict()
    write(path, checkpoint)


def write(path: str | os.PathLike[str], checkpoint: Any) -> None:
    """Does what ``torch.save`` does, under a temporary name beside the file, which is renamed once it is complete."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(checkpoint, file)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, plain data only, and checks that it is one.

    Returns:
        What ``save`` wrote; or Lightning's checkpoint of a run with ``CnmixPlugin`` or a subclass, a file or the
        folder that ``ModelParallelStrategy`` writes, its state under ``cnmix`` too.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, no PyTorch checkpoint, or lacks ``state_dict`` or ``cnmix``.
    """
    checkpoint = read_plain(path)
    name = find_state(checkpoint)
    if name is not None:
        checkpoint["cnmix"] = checkpoint[name]
    try:
        return {**checkpoint, "cnmix": check(checkpoint)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def find_state(checkpoint: Mapping[str, Any]) -> str | None:
    """Returns the entry that has the cnmix state, which may be under any name if no other looks like one."""
    for name in ("cnmix", LIGHTNING_KEY):
        if name in checkpoint:
            return name
    found = [name for name, entry in checkpoint.items() if is_state(entry)]
    return found[0] if len(found) == 1 else None


def check(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the cnmix state of a checkpoint; raises ValueError or TypeError unless it has one and ``state_dict``."""
    missing = {"state_dict", "cnmix"} - set(checkpoint)
    if missing:
        has = ", ".join(sorted(map(str, checkpoint))[:8])
        lacks = " and ".join(sorted(missing))
        if "pytorch-lightning_version" in checkpoint:
            lacks += " (Lightning saves it for CnmixPlugin, but not with weights only)"
        raise ValueError(f"this is no checkpoint of training with cnmix: it lacks {lacks}; it has {has}")
    return upgrade(checkpoint["cnmix"])


def read_plain(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads any dict that ``torch.save`` wrote, or the folder of Lightning's distributed checkpoint; plain data only.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, or no PyTorch checkpoint with a dict of plain data.
    """
    if Path(path, _METADATA).is_file():
        return {**_read_shards(Path(path)), **read_plain(Path(path, _METADATA))}
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make the unpickler fail in any way
        # Torch's own text recommends weights_only=False, which would run code from the file.
        raise ValueError(f"{path} is truncated, or no PyTorch checkpoint of tensors and plain data") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not the dict of a checkpoint")
    return dict(checkpoint)


def _read_shards(folder: Path) -> dict[str, Any]:
    """Puts the parts together that the processes of a run wrote, in this process alone."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    parts: dict[str, Any] = {}
    try:
        _load_state_dict(parts, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{folder} is incomplete, or no distributed checkpoint of PyTorch") from error
    return parts

"""Weights of YOLOv3 from and to files: darknet's own ``.weights``, and ``.pth`` with a state_dict."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from cnmix import checkpoint

# Major, minor and revision that darknet has written since its counter of images takes 64 bits.
VERSION = (0, 2, 0)


def load(model: nn.Module, path: str | os.PathLike[str]) -> int | None:
    """Loads weights into a model, in place; the model is unchanged where the file does not fit.

    A file called ``*.weights``, or ``*.conv.N`` as darknet calls backbones, is read as darknet's. Any other is one that
    ``torch.save`` wrote, with a state_dict, or with one under ``state_dict`` or ``model``.

    Args:
        model: a ``YOLOv3``.
        path: the file.

    Returns:
        How many images darknet had trained it on; None of a file that is not darknet's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, too long, or of another network.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there are no weights {file}")
    if file.suffix == ".weights" or ".conv." in file.name:
        return load_darknet(model, file, backbone=".conv." in file.name)
    saved = checkpoint.read_plain(file)
    for name in ("state_dict", "model"):
        saved = saved[name] if isinstance(saved.get(name), dict) else saved
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(getattr(value, "shape", ())) for name, value in saved.items()}
    different = sorted(name for name in {*expected, *given} if expected.get(name) != given.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{file} is of another network: {len(different)} entries differ, such as {name}, of shape "
            f"{given.get(name, 'none')} in the file and {expected.get(name, 'none')} in the model. Numbers of classes "
            "and widths must agree"
        )
    model.load_state_dict(saved)
    return None


def load_darknet(model: nn.Module, path: str | os.PathLike[str], backbone: bool = False) -> int:
    """Loads a file of darknet's into a model, in place; the model is unchanged where the file does not fit.

    The file has three int32, the version; the number of images seen, 64 bits since version 0.2 and 32 before; then
    float32, little-endian, convolution by convolution: bias of the batch normalization (of the convolution where there
    is none), scale, running mean, running variance, weight (out, in, height, width).

    Args:
        model: a ``YOLOv3``.
        path: the file.
        backbone: whether it has the backbone alone, as ``darknet53.conv.74`` has; the heads stay as they are then.

    Returns:
        How many images darknet had trained it on.

    Raises:
        ValueError: if it is truncated, too long, or of another network.
    """
    targets = list(_tensors(model, backbone))
    needed = 4 * sum(target.numel() for target in targets)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        seen = _read_header(file, path)
        here = size - file.tell()
        if here != needed:  # before anything is read: a file may be of any size
            raise ValueError(
                f"{path} has {here:,} bytes of weights, and {'the backbone' if backbone else 'the network'} takes "
                f"{needed:,}: {'it is truncated, or' if here < needed else 'it is'} of another network"
                f"{_guess(model, here, needed, backbone)}"
            )
        values = torch.from_numpy(np.fromfile(file, dtype="<f4").astype(np.float32, copy=False))
    if len(values) * 4 != needed:
        raise ValueError(f"{path} was cut while it was read")
    with torch.no_grad():
        for target, part in zip(targets, values.split([target.numel() for target in targets]), strict=True):
            target.copy_(part.view(target.shape))
    return seen


def save_darknet(model: nn.Module, path: str | os.PathLike[str], seen: int = 0, backbone: bool = False) -> None:
    """Writes weights as darknet reads them, under a temporary name that is renamed at the end.

    Args:
        model: a ``YOLOv3``, of any width.
        path: the file.
        seen: how many images it was trained on.
        backbone: whether to leave the heads out.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.asarray(VERSION, dtype="<i4").tofile(file)
            np.asarray([seen], dtype="<u8").tofile(file)
            for tensor in _tensors(model, backbone):
                tensor.detach().cpu().numpy().astype("<f4", copy=False).tofile(file)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_header(file: BinaryIO, path: str | os.PathLike[str]) -> int:
    version = np.fromfile(file, dtype="<i4", count=3)
    if len(version) < 3:
        raise ValueError(f"{path} is truncated: it ends within the header")
    major, minor = int(version[0]), int(version[1])
    if not (0 <= major < 1000 and 0 <= minor < 1000):
        raise ValueError(f"{path} is no file of darknet's: its version would be {major}.{minor}")
    seen = np.fromfile(file, dtype="<u8" if major * 10 + minor >= 2 else "<u4", count=1)
    if not len(seen):
        raise ValueError(f"{path} is truncated: it ends within the header")
    return int(seen[0])


def _convolutions(model: nn.Module, backbone: bool) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
    """Yields each convolution, in darknet's order, with its batch normalization."""
    parts = model.backbone() if backbone else [model]
    for part in parts:
        conv = None
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                if module.bias is not None:
                    yield module, None
                conv = module
            elif isinstance(module, nn.BatchNorm2d):
                yield conv, module


def _tensors(model: nn.Module, backbone: bool) -> Iterator[Tensor]:
    """Yields the tensors that a file has, in its order."""
    for conv, norm in _convolutions(model, backbone):
        if norm is None:
            yield conv.bias
        else:
            yield from (norm.bias, norm.weight, norm.running_mean, norm.running_var)
        yield conv.weight


def _guess(model: nn.Module, here: int, needed: int, backbone: bool) -> str:
    """Says how many classes the weights would be for, where that is a whole number."""
    if backbone:
        return ""
    maps = [conv for conv, norm in _convolutions(model, False) if norm is None]
    each = 4 * sum(3 * (conv.in_channels + 1) for conv in maps)  # bytes of one class
    more, rest = divmod(here - needed, each)
    classes = model.classes + more
    return "" if rest or classes < 1 else f", such as one for {classes} classes and not {model.classes}"

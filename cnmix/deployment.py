"""From a recipe's checkpoint to files that infer, and what ``cnmix infer`` does with these."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import inference
from .evaluation import evaluation_batches, find_checkpoints, has_integers, restore
from .files import replacing
from .inference import OfflineModel
from .recipe import build_model, load_data
from .task import arguments
from .torch_mlu.cards import find_card


class Exported(NamedTuple):
    """What ``export_checkpoint`` wrote.

    Attributes:
        checkpoint: that it read.
        files: that it wrote, the offline model first.
        digest: of the offline model.
    """

    checkpoint: Path
    files: list[Path]
    digest: str


def export_checkpoint(
    path: str | os.PathLike[str],
    output: Path | None = None,
    *,
    onnx: bool = False,
    vendor: bool = False,
    batch: int = 1,
    core_number: int = 1,
    core_version: str = "",
    module: str | os.PathLike[str] | None = None,
) -> Exported:
    """Writes the offline model of a recipe's checkpoint.

    Args:
        path: a checkpoint of ``cnmix train``, or a folder with one that was trained in fixed point.
        output: the offline model; beside the checkpoint, with the suffix ``.cambricon``, by default.
        onnx: also write the quantized ONNX form, beside it with the suffix ``.onnx``.
        vendor: also write the vendor's quantized ``state_dict``, beside it with the suffix ``.pth``.
        batch: how many samples the offline model takes at once.
        core_number: cores that it is for.
        core_version: card that it is for, as "MLU270"; "" for any.
        module: the recipe's Python file, which is run; by default where it was when training ran.

    Raises:
        FileNotFoundError: if there is no checkpoint, or the recipe's Python file is gone.
        ValueError: if there are several, none was trained in fixed point, the card is none or has fewer cores, or the
            model cannot be exported.
    """
    if batch < 1:
        raise ValueError(f"--batch must be at least 1, got {batch}")
    if core_version:
        card = find_card(core_version)
        core_version = card.name
        if not 1 <= core_number <= card.cores:
            raise ValueError(f"an {card.name} has 1 to {card.cores} cores to take, not {core_number}")
    checkpoint, saved, recipe, model = _only_checkpoint(path, module)
    model = inference.load(model, saved)
    _, test = load_data(recipe)
    inputs, _ = next(iter(evaluation_batches(recipe, test)))
    example = pytree.tree_map(lambda each: each[:1].expand(batch, *each.shape[1:]).contiguous(), arguments(inputs))
    fused = inference.fuse(model, *example)
    target = checkpoint.with_suffix(".cambricon") if output is None else output
    metadata = {"checkpoint": checkpoint.name, "opt_level": recipe.cnmix.opt_level}
    name = recipe.model.name
    digest = fused.save(target, name=name, core_number=core_number, core_version=core_version, metadata=metadata)
    files = [target]
    if onnx:
        from .inference import to_onnx

        files.append(target.with_suffix(".onnx"))
        to_onnx(fused, files[-1])
    if vendor:
        from .checkpoint import write
        from .inference import vendor_state_dict

        files.append(target.with_suffix(".pth"))
        write(files[-1], vendor_state_dict(build_model(recipe), saved))
    return Exported(checkpoint, files, digest)


def _only_checkpoint(path: str | os.PathLike[str], module: Any) -> tuple[Path, Any, Any, nn.Module]:
    """Returns the one checkpoint there that was trained in fixed point, and what ``restore`` returns of it."""
    files = find_checkpoints(path)
    found = [(file, *restore(file, module)) for file in files]
    found = [each for each in found if has_integers(each[1])]
    if not found:
        raise ValueError(f"{path} has no checkpoint that was trained in fixed point (O1, O2, O3)")
    if len(found) > 1:
        named = ", ".join(str(each[0]) for each in found[:5])
        raise ValueError(f"{path} has {len(found)} checkpoints: give one of them, as {named}")
    return found[0]


def read_inputs(model: OfflineModel, files: Sequence[Path]) -> list[Tensor]:
    """Returns what a model is to be run on, from files.

    Args:
        model: for its inputs' names.
        files: ``.npy``, ``.pt`` (a tensor, or a list or dict of them) or ``.safetensors`` (by the inputs' names).

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is of another kind, or names inputs that the model has not.
    """
    read: list[Tensor] = []
    for file in files:
        given = _read(file)
        if isinstance(given, dict):
            names = [each.name for each in model.inputs]
            if len(given) == 1 == len(names):
                given = list(given.values())
            elif set(given) != set(names):
                raise ValueError(f"{file} has {', '.join(map(str, given))}; the model takes {', '.join(names)}")
            else:
                given = [given[name] for name in names]
        leaves = pytree.tree_leaves(given)
        if not all(isinstance(each, Tensor) for each in leaves):
            raise ValueError(f"{file} holds something else than tensors")
        read += leaves
    return read


def _read(file: Path) -> Any:
    if file.suffix == ".npy":
        import numpy

        try:
            return torch.from_numpy(numpy.load(file, allow_pickle=False))
        except (TypeError, EOFError) as error:
            raise ValueError(f"{file}: {error}") from error
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
    if file.suffix == ".pt":
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} holds no plain tensors: {str(error).splitlines()[0]}") from error
    raise ValueError(f"{file} must end in .npy, .pt or .safetensors")


def random_inputs(model: OfflineModel) -> list[Tensor]:
    """Returns inputs that fit a model: normally distributed floats, zeros for integers."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(dtype)
        if dtype.is_floating_point
        else torch.zeros(shape, dtype=dtype)
        for _, shape, dtype in model.inputs
    ]


def write_outputs(model: OfflineModel, outputs: Any, file: Path) -> None:
    """Writes what a model returned: ``.npy`` takes one tensor, ``.safetensors`` any number, by their names.

    Raises:
        ValueError: if the file is of another kind, or cannot take as many.
    """
    tensors = pytree.tree_leaves(outputs)
    if file.suffix == ".npy" and len(tensors) == 1:
        import numpy

        with replacing(file) as temporary, open(temporary, "wb") as opened:
            numpy.save(opened, tensors[0].numpy())
    elif file.suffix == ".safetensors":
        from safetensors.torch import save_file

        named = {
            info.name: each.clone(memory_format=torch.contiguous_format)
            for info, each in zip(model.outputs, tensors, strict=True)
        }
        with replacing(file) as temporary:
            save_file(named, temporary)
    else:
        raise ValueError(f"{file} must end in .safetensors, or in .npy for one output; the model has {len(tensors)}")


def seconds_per_run(model: nn.Module, inputs: Sequence[Tensor], repeat: int) -> float:
    """Returns the mean time of a run in seconds, of ``repeat`` after one that is not counted."""
    model(*inputs)
    start = time.perf_counter()
    for _ in range(repeat):
        model(*inputs)
    return (time.perf_counter() - start) / repeat

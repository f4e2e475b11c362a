"""Offline models: a program in a file, which runs without the model's Python code.

``docs/offline_format.md`` describes the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..version import __version__
from . import container
from .encoding import MAX_NAME, decode, encode, structured
from .fused import FusedProgram
from .program import Program, Spec

_ENTRIES = (
    "program",
    "name",
    "core_number",
    "core_version",
    "batch_size",
    "cnmix_version",
    "torch_version",
    "metadata",
)


class TensorInfo(NamedTuple):
    """What a tensor is that an offline model takes or returns.

    Attributes:
        name: in its program.
        shape: of the tensor.
        dtype: of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def save_offline(
    path: str | os.PathLike[str],
    program: Program,
    structure: pytree.TreeSpec,
    *,
    name: str = "",
    core_number: int = 1,
    core_version: str = "",
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes a program as an offline model, under a temporary name, which is renamed.

    Args:
        path: the file.
        program: what to compute.
        structure: of what the model returns.
        name: of the model; the file's own without its suffix where it is empty.
        core_number: cores that it is for; kept, and of no effect here.
        core_version: card that it is for, as "MLU370"; likewise.
        metadata: texts to keep with it, by name.

    Returns:
        The file's digest, which ``OfflineModel`` takes.

    Raises:
        ModuleNotFoundError: if safetensors is not installed.
        ValueError: if the program calls or returns what an offline model cannot, or it is too large for one.
    """
    text, tensors = encode(program, structure)
    entries = {
        "program": text,
        "name": name or os.path.splitext(os.path.basename(path))[0],
        "core_number": str(core_number),
        "core_version": core_version,
        "batch_size": str(_batch_size(program)),
        "cnmix_version": __version__,
        "torch_version": str(torch.__version__),
        "metadata": json.dumps(dict(metadata or {}), sort_keys=True),
    }
    _Described(entries)
    decode(text, tensors)  # what is refused when it is read is not written
    return container.write(path, tensors, entries)


class OfflineModel(nn.Module):
    """A model from a file, fused, for inputs of the shapes that it was saved with.

    Nothing in the file is code: it is safe to load from strangers. It is checked whole before it is used. A digest
    finds what happened to it by accident; against somebody who changes the file and the digest in it, give the digest
    that its maker told you. The weights are mapped from the file: replace it, do not write into it, while it is in use.

    Args:
        path: the file.
        sha256: the digest that the file must have; any where None.

    Attributes:
        inputs: what it takes: name, shape and dtype of each tensor.
        outputs: what it returns, likewise, in order.
        name: of the model.
        core_number: cores that it is for.
        core_version: card that it is for; "" for any.
        batch_size: first dimension of the first input; 1 where there is none.
        metadata: texts that were saved with it.
        cnmix_version: that wrote it.
        torch_version: likewise.
        digest: SHA-256 of the file.
        size: of the file, in bytes.
        program: what it computes.

    Raises:
        ModuleNotFoundError: if safetensors is not installed.
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is no offline model, is damaged, of a newer format, or not what it may be; in one line.
    """

    def __init__(self, path: str | os.PathLike[str], sha256: str | None = None) -> None:
        super().__init__()
        try:
            entries, tensors, self.digest, self.size = container.read(path, sha256)
            described = _Described(entries)
            self.program, self._structure = decode(entries["program"], tensors)
            if described.batch_size != _batch_size(self.program):
                raise ValueError(f"its batch size {described.batch_size} is not that of its inputs")
            self._fused = FusedProgram(self.program)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no offline model {os.fspath(path)}") from error
        except (OSError, ModuleNotFoundError):
            raise
        except Exception as error:  # a file of a stranger's may be anything
            raise ValueError(f"{os.fspath(path)}: {error}") from error
        self.name, self.metadata = described.name, described.metadata
        self.core_number, self.core_version = described.core_number, described.core_version
        self.batch_size = described.batch_size
        self.cnmix_version, self.torch_version = entries["cnmix_version"], entries["torch_version"]
        self.inputs = [TensorInfo(name, *self.program.specs[name][:2]) for name in self.program.inputs]
        self.outputs = [TensorInfo(name, *_spec_of(self.program, name)[:2]) for name in self.program.outputs]
        self.eval()

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """Computes what the model computed that was saved, to the bit.

        Args:
            *inputs: tensors on the CPU, also in lists and dicts as the model took them.

        Returns:
            Tensors, as the model returned them: alone or in tuples, lists and dicts.

        Raises:
            ValueError: if the inputs are of other shapes, dtypes or number.
        """
        leaves = pytree.tree_leaves(inputs)
        self.program.check_inputs(leaves, f"the offline model {self.name!r}")
        elsewhere = [str(x.device) for x in leaves if x.device.type != "cpu"]
        if elsewhere:
            raise ValueError(f"the offline model {self.name!r} takes tensors on the CPU, got one on {elsewhere[0]}")
        return structured(self._structure, self._fused.run(*leaves))

    def extra_repr(self) -> str:
        """Says name, steps and digest."""
        return f"{self.name!r}, {len(self.program.steps)} steps, sha256={self.digest}"


class _Described:
    """The entries of a file beside its program, checked."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        if set(entries) != set(_ENTRIES):
            raise ValueError(f"its metadata must have {', '.join(_ENTRIES)}, and nothing else")
        self.name = entries["name"]
        for key in ("name", "core_version", "cnmix_version", "torch_version"):
            if len(entries[key]) > MAX_NAME or not entries[key].isprintable():
                raise ValueError(f"its {key} must be a text of at most {MAX_NAME} letters that can be printed")
        self.core_number, self.batch_size = (self._number(entries, key) for key in ("core_number", "batch_size"))
        self.core_version = entries["core_version"]
        self.metadata: dict[str, str] = container.read_json(entries["metadata"], "its metadata")
        if not all(isinstance(each, str) for each in self.metadata.values()):
            raise ValueError("its metadata must be texts")

    @staticmethod
    def _number(entries: Mapping[str, str], key: str) -> int:
        if not re.fullmatch(r"0|[1-9][0-9]{0,11}", entries[key]):
            raise ValueError(f"its {key} must be a number, got {ascii(entries[key])[:40]}")
        return int(entries[key])


def _batch_size(program: Program) -> int:
    shape = program.specs[program.inputs[0]].shape if program.inputs else ()
    return shape[0] if shape else 1


def _spec_of(program: Program, name: str) -> Spec:
    constant: Tensor | None = program.constants.get(name)
    return program.specs[name] if constant is None else Spec.of(constant)

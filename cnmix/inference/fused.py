"""Fused inference: a program's groups of steps as native plans, the rest operator by operator."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..kernels import plan
from ..nn import module_name, quantizer_sets
from .agreement import copied, is_close, is_same
from .fusion import fuse_steps
from .groups import Group, name_of
from .integers import IntegerModule
from .lowering import export
from .nodes import Call, Floats, Fused, parted
from .program import Program, Spec, run_step
from .weights import Weights


class FusedProgram:
    """Computes a program with as few passes over its tensors as its plans allow.

    Where this machine has no kernels for plans, it computes operator by operator. So it does when a tensor that is to
    be quantized holds NaN or infinity, which plans only find.

    Args:
        program: of float32 tensors on the CPU.

    Attributes:
        program: the same.
        parts: what is computed, in order: plans, and calls of operators.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.parts: list[Group | Call] = []
        if not plan.serves():
            return
        arranged: list[list[Fused] | Call] = []
        for each in fuse_steps(program):
            arranged += [each] if isinstance(each, Call) else parted(each, program)
        for index, part in enumerate(arranged):
            if isinstance(part, Call):
                self.parts.append(part)
                continue
            behind = [node for each in arranged[index + 1 :] for node in ([each] if isinstance(each, Call) else each)]
            later = {key for node in behind for key in node.inputs()}
            self.parts.append(Group(part, later | {Floats(name) for name in program.outputs}, program))
        self._last = self._last_uses()

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Computes the outputs; the inputs must have the program's shapes."""
        if not self.parts:
            return self.program.run(*inputs)
        values: dict[Any, Tensor] = {**self.program.constants, **dict(zip(self.program.inputs, inputs, strict=True))}
        for index, part in enumerate(self.parts):
            if isinstance(part, Call):
                run_step(part.step, values)
            elif not part.run(values):
                return self.program.run(*inputs)
            for name in self._last.get(index, ()):
                values.pop(name, None)
        return self.program.returned(values)

    def _last_uses(self) -> dict[int, list[Any]]:
        last: dict[Any, int] = {}
        for index, part in enumerate(self.parts):
            for key in part.keys() if isinstance(part, Group) else (*part.inputs(), *part.results()):
                last[name_of(key)] = index
        found: dict[int, list[Any]] = {}
        for name, index in last.items():
            if name not in self.program.outputs:
                found.setdefault(index, []).append(name)
        return found


_exporting = threading.Lock()  # torch.export changes how any module is called, and takes no second one beside it
_MOST_SHAPES = 32  # that a model keeps fused: each has its weights once more, packed
_Made = tuple[FusedProgram, Any]  # with the structure of the outputs


class FusedModel(nn.Module):
    """A model, fused for inputs of given shapes; other shapes are fused when they first come.

    The shapes that came last stay fused, 32 of them. What is fused stays as it is when the model changes. It cannot be
    pickled or copied; its model can. Any thread may call it, but while one fuses, no other may call plain modules.

    Args:
        model: the integer model.
        inputs: an example of each.
        keywords: likewise of those that it takes by name.

    Attributes:
        model: the integer model.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self._made: dict[Any, _Made] = {}
        self._lock = threading.Lock()
        self.first = self._fused(inputs, keywords or {})[0]
        self._example = next(iter(self._made.items()))
        self.eval()

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Calls it as a module is called, also while another thread exports, which replaces ``nn.Module.__call__``."""
        return self._wrapped_call_impl(*inputs, **keywords)

    @torch.no_grad()
    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Computes what the model computes, to the bit."""
        fused, structure = self._fused(inputs, keywords)
        with torch.autocast("cpu", enabled=False):  # its casts are steps of the program
            outputs = fused.run(*_tensors((inputs, keywords)))
        return pytree.tree_unflatten(list(outputs), structure)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "",
        core_number: int = 1,
        core_version: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Writes an offline model, for the shapes of the example that this was made with.

        ``OfflineModel(path)`` runs it, without the model's Python code.

        Args:
            path: the file, by custom with the suffix ``.cambricon``; its folder is made where it is missing.
            name: of the model; the file's own without its suffix where it is empty.
            core_number: cores that it is for; kept, and of no effect on this machine.
            core_version: card that it is for, as "MLU370"; likewise.
            metadata: texts to keep with it, by name.

        Returns:
            The file's digest, SHA-256, which ``OfflineModel`` takes.

        Raises:
            ModuleNotFoundError: if safetensors is not installed.
            ValueError: if the model calls or returns what an offline model cannot.
        """
        from .offline import save_offline

        return save_offline(
            path,
            *self.stored(),
            name=name,
            core_number=core_number,
            core_version=core_version,
            metadata=metadata,
        )

    def stored(self) -> tuple[Program, Any]:
        """Returns the program of the first example, for a file, and the structure of what it returns.

        Raises:
            ValueError: if one tensor was several of its inputs: a file is called with any.
        """
        (_, same, *_), (_, structure) = self._example
        if len(set(same)) < len(same):
            raise ValueError(
                "the example that this was fused with has one tensor as several inputs, and its program is for that "
                "alone: fuse with copies (x.clone()), or a module that takes the tensor once"
            )
        return self.first.program, structure

    def train(self, mode: bool = True) -> FusedModel:
        """Raises ValueError in training mode."""
        if mode:
            raise ValueError("a fused model is in evaluation mode for good: train the model that it was made of")
        return super().train(mode)

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Raises ValueError: what is fused would keep the weights that it was made with."""
        raise ValueError("a fused model keeps its weights: load others into the model, then fuse it again")

    def __reduce__(self) -> Any:
        """Raises TypeError, for copies and pickles."""
        raise TypeError("a fused model cannot be copied or pickled: copy its model and fuse that, or use save()")

    def _apply(self, fn: Any, recurse: bool = True) -> FusedModel:
        for each in (*self.parameters(), *self.buffers()):
            one = torch.empty(0, dtype=each.dtype, device=each.device)
            if (fn(one).dtype, fn(one).device) != (each.dtype, each.device):
                raise ValueError("a fused model keeps its dtype and device: convert the model, then fuse it again")
        return super()._apply(fn, recurse)

    def _fused(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> _Made:
        leaves, structure = pytree.tree_flatten((inputs, dict(keywords)))
        # Code may ask whether two of its inputs are one tensor, as attention does of query, key and value.
        same = tuple(next(i for i, other in enumerate(leaves) if other is x) for x in leaves if isinstance(x, Tensor))
        casts = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        # 1, 1.0 and True are equal, and other arguments.
        kinds = (Spec.of(x) if isinstance(x, Tensor) else (type(x), repr(x)) for x in leaves)
        shapes = (structure, same, casts, *kinds)
        with self._lock:
            made = self._made.pop(shapes, None)
            if made is None:
                with _exporting:
                    made = self._make(inputs, keywords)
            self._made[shapes] = made
            if len(self._made) > _MOST_SHAPES:
                del self._made[next(iter(self._made))]
            return made

    def _make(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> _Made:
        for fqn, module in self.model.named_modules():
            if hasattr(type(module), "quantized_mode"):  # of the vendor's package, which this does not load
                raise ValueError(
                    f"{fqn!r} is a {type(module).__name__} of quantize_dynamic_mlu, which computes in float on the "
                    "host: bring the model to the card, and fuse it there with torch.jit.trace"
                )
        sets = dict(quantizer_sets(self.model))
        weights = Weights(self.model, sets)
        trains = [name for name, each in sets.items() if not each.frozen and not weights.serve_functions(name)]
        if trains:
            raise ValueError(
                f"{module_name(trains[0])!r} trains in fixed point: fuse what cnmix.inference.load makes of it"
            )
        with torch.no_grad():  # says what is wrong with inputs, and fixes the integers of what functions multiply by
            expected = self.model(*copied(inputs), **copied(dict(keywords)))
        program, structure = export(self.model, inputs, keywords)
        fused = FusedProgram(program)
        with torch.autocast("cpu", enabled=False):
            found = fused.run(*_tensors((inputs, keywords)))
        # Torch computes some modules in a fused kernel of its own, which rounds otherwise than the graph's operators.
        integers = bool(sets) or any(isinstance(module, IntegerModule) for module in self.model.modules())
        is_right = is_same if integers else is_close
        if not all(map(is_right, pytree.tree_leaves(expected), found)):
            raise ValueError(
                f"the graph that torch.export makes of {type(self.model).__name__} computes other numbers than the "
                "model does, which code can cause that asks torch.compiler.is_compiling(), or that draws random "
                "numbers: keep the model as it is, or fuse the parts of it that are free of such code"
            )
        return fused, structure


def _tensors(inputs: Any) -> list[Tensor]:
    """Returns what a program takes of inputs: numbers and the like are a part of it."""
    return [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]


def fuse(model: nn.Module, *inputs: Any, **keywords: Any) -> FusedModel:
    """Fuses a model: its products take along what follows them, and tensors stay integers between them.

    Args:
        model: an integer model of ``load``, in evaluation mode. It stays as it is.
        *inputs: an example of what it is called with: tensors, lists and dicts of them, and numbers and the like, for
            which one is fused each.
        **keywords: likewise, by name.

    Returns:
        A module that computes the same: an integer model's numbers to the bit, a float model's but for rounding.

    Raises:
        ValueError: if the model is in training, or ``torch.export`` cannot follow it, or makes something else of it.
    """
    return FusedModel(model, inputs, keywords)

"""Makes a program of what ``torch.jit.trace`` recorded.

The graph of a traced module is called node by node, and ``torch.export`` follows that: operators that write become
functional, sizes become numbers, shapes are known. So a trace comes by the same road as every other model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..fixed_point import FixedPoint
from ..inference.lowering import export
from ..inference.program import Program, Ref, Step
from ..nn.card_tensors import host_by_default, to_host
from .core.quantized import functional

# What graphs have numbers for.
_NUMBERED: dict[str, tuple[Any, ...]] = {
    "ScalarType": (
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64),
        *(torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32),
        torch.bfloat16,
    ),
    "MemoryFormat": (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d),
    "Layout": (torch.strided,),
}

_LINEAR, _CONVOLUTION = "torch_mlu::quantized_linear", "torch_mlu::quantized_convolution"


class TracedGraph:
    """The graph of a traced module, with the tensors that it takes from the module.

    Args:
        module: the module's own object, ``_c`` of a ``torch.jit.ScriptModule``.

    Attributes:
        name: of the module's class.
        nodes: of the graph, with those of its blocks in place.
        tensors: parameters, buffers and constants as they are now, by the names of their values in the graph.
        known: other values that are no matter of the inputs, likewise.

    Raises:
        ValueError: if it has loops.
    """

    def __init__(self, module: Any) -> None:
        graph = module._get_method("forward").inlined_graph
        self.name: str = module._type().name()
        self.graph = graph
        self.tensors: dict[str, Tensor] = {}
        self.known: dict[str, Any] = {}
        self._places: list[tuple[Any, str, Tensor]] = []
        modules = {next(graph.inputs()).debugName(): module}
        for node in _all_nodes(graph):
            if node.kind() == "prim::Loop":
                raise ValueError("it has control flow (prim::Loop)")
            if node.kind() == "prim::GetAttr":
                owner, attribute, name = modules[node.input().debugName()], node.s("name"), node.output().debugName()
                value = owner.getattr(attribute)
                if isinstance(value, torch._C.ScriptModule):
                    modules[name] = value
                    continue
                if isinstance(value, Tensor):
                    self._places.append((owner, attribute, value))
                self._hold(name, value)
            elif node.kind() == "prim::Constant":
                self._hold(node.output().debugName(), node.output().toIValue())
            elif node.kind() == "prim::ListConstruct" and all(each.debugName() in self.known for each in node.inputs()):
                self.known[node.output().debugName()] = [self.known[each.debugName()] for each in node.inputs()]
        self._seen = [(each, each.data_ptr(), _version(each)) for each in self.tensors.values()]

    def is_current(self) -> bool:
        """Whether the module has these tensors still, and nothing was written to them."""
        return all(owner.getattr(name) is held for owner, name, held in self._places) and all(
            held.data_ptr() == address and _version(held) == version for held, address, version in self._seen
        )

    def device(self) -> torch.device | None:
        """Returns where the module's tensors are; None if it has none.

        Raises:
            ValueError: if they are on several devices.
        """
        found = {held.device for _, _, held in self._places}
        if len(found) > 1:
            raise ValueError(f"its tensors are on {' and '.join(sorted(map(str, found)))}")
        return next(iter(found), None)

    def program(self, inputs: tuple[Any, ...], device: torch.device) -> tuple[Program, Any]:
        """Makes a program of it for inputs of these shapes; tensors of the card become the host's, on the same bytes.

        Args:
            inputs: what the module is called with: tensors, or lists, tuples and dicts of them.
            device: where the module is called.

        Returns:
            The program, and the structure of what the module returns, as ``torch.utils._pytree`` describes it.

        Raises:
            ValueError: if it has control flow, or something else that no program has.
        """
        # Outside of whatever watches or moves tensors at the moment, and of inference mode, which export does not know.
        with _disable_current_modes(), host_by_default(), torch.inference_mode(False), torch.no_grad():
            examples = pytree.tree_map_only(Tensor, _alike, inputs)
            try:
                program, structure = export(_Followed(self, device).eval(), examples)
            except ValueError as error:
                reason = str(error.__cause__ or error).splitlines()
                raise ValueError(reason[0] if reason else repr(error.__cause__)) from error
            return _with_plain_numbers(program), structure

    def _hold(self, name: str, value: Any) -> None:
        (self.tensors if isinstance(value, Tensor) else self.known)[name] = value


@dataclass
class _Number:
    """A tensor without dimensions that is known when the graph is followed, as sizes are."""

    value: Tensor


class _Product(NamedTuple):
    """A quantized product: the buffer of its weight's integers, whether they are finite, and its formats."""

    buffer: str
    finite: bool
    formats: functional.Formats


class _Followed(nn.Module):
    """Calls the operators of a graph, one after the other.

    Args:
        traced: the graph.
        device: the one that its operators name, if any; in the program it is the host.
    """

    def __init__(self, traced: TracedGraph, device: torch.device) -> None:
        super().__init__()
        self._traced, self._device = traced, device
        self._buffer_of: dict[str, str] = {}
        for name, each in traced.tensors.items():
            if each.dim() and each.device != device:
                raise ValueError(f"it has a constant of {each.device}")
            self._buffer_of[name] = f"t{len(self._buffer_of)}"
            self.register_buffer(self._buffer_of[name], to_host(each.detach()))
        self._products: dict[str, _Product] = {}
        for node in _all_nodes(traced.graph):
            if node.kind() in (_LINEAR, _CONVOLUTION):
                self._quantize(node)

    def forward(self, *inputs: Any) -> Any:
        """Computes what the traced module computes."""
        graph = self._traced.graph
        values: dict[str, Any] = dict(self._traced.known)
        values |= {name: getattr(self, buffer) for name, buffer in self._buffer_of.items()}
        names = [each.debugName() for each in list(graph.inputs())[1:]]
        values.update(zip(names, inputs, strict=True))
        self._run(graph.nodes(), values)
        results = [_unwrapped(values[each.debugName()]) for each in graph.outputs()]
        return results[0] if len(results) == 1 else tuple(results)

    def _quantize(self, node: Any) -> None:
        """Keeps the integers of a product's weight, which is a parameter."""
        names = [each.debugName() for each in node.inputs()]
        scale, mode = (self._traced.known[each] for each in names[-3:-1])
        chosen = functional.formats(scale, mode)
        if names[1] not in self._buffer_of:
            raise ValueError(f"{node.kind()} has a weight that is computed")
        weight = functional.quantize_weight(getattr(self, self._buffer_of[names[1]]), chosen)
        buffer = f"q{len(self._products)}"
        self.register_buffer(buffer, weight.values)
        if chosen.fine is not None:
            self.register_buffer(f"{buffer}_fine", chosen.fine)
        self._products[node.output().debugName()] = _Product(buffer, weight.finite, chosen)

    def _run(self, nodes: Iterable[Any], values: dict[str, Any]) -> None:
        for node in nodes:
            kind = node.kind()
            outputs = [each.debugName() for each in node.outputs()]
            if kind in ("prim::Constant", "prim::GetAttr") or (outputs and outputs[0] in self._traced.known):
                continue
            given: list[Any] = [values.get(each.debugName()) for each in node.inputs()]
            if kind == "prim::If":
                self._branch(node, given[0], values)
            elif kind in ("prim::TupleUnpack", "prim::ListUnpack"):
                values.update(zip(outputs, given[0], strict=True))
            elif kind in (_LINEAR, _CONVOLUTION):
                values[outputs[0]] = self._multiply(kind, outputs[0], given)
            else:
                found = self._call(node, given)
                values.update(zip(outputs, found if len(outputs) > 1 else [found], strict=True))

    def _branch(self, node: Any, condition: Any, values: dict[str, Any]) -> None:
        if not isinstance(condition, bool):
            raise ValueError("it has control flow (prim::If) that depends on values")
        block = list(node.blocks())[0 if condition else 1]
        self._run(block.nodes(), values)
        for name, each in zip(node.outputs(), block.outputs(), strict=True):
            values[name.debugName()] = values[each.debugName()]

    def _multiply(self, kind: str, key: str, given: list[Any]) -> Tensor:
        buffer, finite, chosen = self._products[key]
        weight = FixedPoint(getattr(self, buffer), chosen.weight_bits, chosen.weight_position, finite)
        chosen = chosen._replace(fine=getattr(self, f"{buffer}_fine", None))
        x, _, bias, *rest = given
        if kind == _LINEAR:
            return functional.integer_linear(x, weight, bias, chosen, rest[-1])
        mean, std, stride, padding, dilation, groups, mode, _, _, name = rest
        return functional.integer_convolution(
            x, weight, bias, mean, std, stride, padding, dilation, groups, mode, chosen, name
        )

    def _call(self, node: Any, given: list[Any]) -> Any:
        kind = node.kind()
        if kind in ("prim::ListConstruct", "prim::TupleConstruct"):
            return given if kind == "prim::ListConstruct" else tuple(given)
        if kind == "prim::DictConstruct":
            return dict(zip(given[::2], given[1::2], strict=True))
        if kind == "aten::__getitem__":
            return given[0][given[1]]
        if kind == "prim::NumToTensor":
            with _disable_current_modes():
                return _Number(torch.tensor(given[0]))
        if kind.startswith("prim::") or not node.schema().startswith(kind):
            raise ValueError(f"it has a {kind} ({node.sourceRange().strip().splitlines()[-1].strip() or 'no source'})")
        function, arguments, keywords = self._as_called(node, given)
        leaves = pytree.tree_leaves((arguments, keywords))
        if any(isinstance(each, Tensor) for each in leaves) or not _makes_numbers(function, leaves):
            return function(*_unwrapped(arguments), **_unwrapped(keywords))
        with _disable_current_modes():
            arguments, keywords = pytree.tree_map_only(_Number, lambda each: each.value, (arguments, keywords))
            return pytree.tree_map_only(Tensor, _Number, function(*arguments, **keywords))

    def _as_called(self, node: Any, given: list[Any]) -> tuple[Any, list[Any], dict[str, Any]]:
        if node.kind() == "aten::_convolution":  # the same with settings of other devices' libraries
            return torch.ops.aten.convolution.default, given[:9], {}
        if node.kind() == "aten::_convolution_mode":
            return getattr(torch.ops.aten, f"conv{given[1].dim() - 2}d").padding, given, {}
        schema = torch._C.parse_schema(node.schema())
        namespace, packet = schema.name.split("::")
        function = getattr(getattr(getattr(torch.ops, namespace), packet), schema.overload_name or "default")
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        for value, declared in zip(given, function._schema.arguments, strict=True):
            value = self._translated(value, str(declared.real_type))
            if declared.kwarg_only:
                keywords[declared.name] = value
            else:
                arguments.append(value)
        return function, arguments, keywords

    def _translated(self, value: Any, declared: str) -> Any:
        if isinstance(value, torch.device):
            here = self._device
            if value.type != here.type or value.index not in (None, here.index):
                raise ValueError(f"it was traced with {value} among its constants, and is called on {here}")
            return torch.device("cpu")
        if isinstance(value, int) and not isinstance(value, bool):
            for name, numbered in _NUMBERED.items():
                if name in declared:
                    return numbered[value]
        return value


def _unwrapped(values: Any) -> Any:
    """Returns values with the numbers themselves in the place of tensors that hold them."""
    return pytree.tree_map_only(_Number, lambda each: each.value.item(), values)


def _makes_numbers(function: Any, leaves: list[Any]) -> bool:
    """Whether a call that takes no tensor is a computation with numbers, not one that makes a tensor."""
    returned = [str(each.type) for each in function._schema.returns]
    return "Tensor" not in "".join(returned) or any(isinstance(each, _Number) for each in leaves)


def _all_nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for each in node.blocks():
            yield from _all_nodes(each)


def _alike(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _with_plain_numbers(program: Program) -> Program:
    """Puts numbers in the place of constants without dimensions, as graphs have them for ``x + 1``."""
    steps = []
    for step in program.steps:
        named = {each.name for each in step.arguments if isinstance(each, Ref)}
        constants = {name for name in named if name in program.constants and program.constants[name].dim() == 0}
        wide = step.operator in ("aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor", "aten.div.Tensor") and all(
            program.specs[name].dtype == torch.float32 and program.specs[name].shape
            for name in (*(named - program.constants.keys()), step.output)
        )
        if wide and constants and not named <= program.constants.keys():
            arguments = [
                program.constants[each.name].item() if isinstance(each, Ref) and each.name in constants else each
                for each in step.arguments
            ]
            step = Step(step.operator, arguments, step.keywords, step.outputs)
        steps.append(step)
    used = {name for step in steps for name in step.inputs()} | {*program.outputs}
    kept = {name: value for name, value in program.constants.items() if name in used}
    return Program(program.inputs, program.outputs, steps, kept, program.specs)

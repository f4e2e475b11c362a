"""Makes a program of a model, with ``torch.export``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask
from torch.overrides import TorchFunctionMode

from ..nn.function_mode import exported_functions
from ..nn.function_places import called_module
from .program import Program, Ref, Spec, Step, find_operator, run_step

# Make the same tensor each time.
_FACTORIES = {
    f"aten.{name}"
    for name in (
        *("arange.default", "arange.start", "arange.start_step", "full.default", "ones.default", "zeros.default"),
        *("scalar_tensor.default", "eye.default", "linspace.default"),
    )
}


def export(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any] | None = None) -> tuple[Program, Any]:
    """Makes a program of a model for inputs of these shapes.

    Args:
        model: in evaluation mode.
        inputs: an example of each; tensors, or lists and dicts of them.
        keywords: likewise of those that it takes by name.

    Returns:
        The program, and the structure of what the model returns, as ``torch.utils._pytree`` describes it.

    Raises:
        ValueError: if the model is in training, ``torch.export`` cannot follow it, or it writes to its buffers or
            inputs.
    """
    name = type(model).__name__
    if model.training:
        raise ValueError(f"{name} is in training: call model.eval() first")
    try:
        with torch.no_grad(), warnings.catch_warnings(), _Answers(), exported_functions():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, inputs, dict(keywords or {})).run_decompositions(
                {}
            )  # functional, but whole operators
    except Exception as error:  # whatever code meets that cannot be followed
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch.export cannot follow {_place_of(error, model)}, so that {name} cannot be fused: keep it as it is, "
            f"or fuse the parts of it whose code does not go by the numbers in tensors. It says: {reason}"
        ) from error
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise ValueError(f"{name} writes to {', '.join(written)}, so that it cannot be fused")
    try:
        program = _program(exported)
    except RuntimeError as error:  # of a size that is no number
        raise ValueError(f"{name} has tensors whose sizes depend on numbers, so that it cannot be fused") from error
    return simplified(program), exported.call_spec.out_spec


def _place_of(error: Exception, model: nn.Module) -> str:
    """Returns what to call the innermost module of the model that was being called."""
    names = {id(module): fqn for fqn, module in model.named_modules()}
    found, trace = "", error.__traceback__
    while trace is not None:
        module = called_module(trace.tb_frame)
        found = names.get(id(module), found)
        trace = trace.tb_next
    return repr(found) if found else type(model).__name__


class _Answers(TorchFunctionMode):
    """Answers a question that only numbers could: whether a mask of ``nn.Transformer`` is the causal one.

    The answer is no: it goes on to use the mask then, whatever is in it.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                if frame.f_code is _detect_is_causal_mask.__code__:
                    return False
                frame = frame.f_back
        return func(*args, **(kwargs or {}))


def simplified(program: Program) -> Program:
    """Computes what depends on constants alone, and drops the steps that return a tensor as it is.

    A copy stays where an output lies in it: callers may write to what they get.
    """
    returned = _memory_of_outputs(program)
    made = Program(list(program.inputs), list(program.outputs), [], dict(program.constants), program.specs)
    same: dict[str, str] = {}
    for step in program.steps:
        names = [same.get(name, name) for name in step.inputs()]
        step = Step(step.operator, _renamed(step.arguments, same), _renamed(step.keywords, same), step.outputs)
        if (names or step.operator in _FACTORIES) and all(name in made.constants for name in names):
            with torch.no_grad():
                run_step(step, made.constants)
        elif _is_identity(step, program) and step.output not in returned:
            same[step.output] = names[0]
        else:
            made.steps.append(step)
    used = {name for step in made.steps for name in step.inputs()}
    made.constants = {name: made.constants[name] for name in made.constants if name in used or name in made.outputs}
    return made


def _memory_of_outputs(program: Program) -> set[str]:
    """Returns the values whose memory an output may lie in: the outputs, and what they are views of."""
    found = set(program.outputs)
    for step in reversed(program.steps):
        operator: Any = find_operator(step.operator)
        views = any(each.alias_info is not None for each in operator._schema.returns)
        if views and not found.isdisjoint(step.outputs):
            found.update(step.inputs())
    return found


def _is_identity(step: Step, program: Program) -> bool:
    if step.operator in ("aten.clone.default", "aten.alias.default", "aten.detach.default"):
        return not step.keywords
    if step.operator == "aten.adaptive_avg_pool2d.default":  # the mean of one element is the element
        return program.specs.get(step.arguments[0].name) == program.specs[step.output]
    return False


def _renamed(arguments: Any, names: dict[str, str]) -> Any:
    if isinstance(arguments, Ref):
        return Ref(names.get(arguments.name, arguments.name))
    if isinstance(arguments, dict):
        return {name: _renamed(each, names) for name, each in arguments.items()}
    return [_renamed(each, names) for each in arguments] if isinstance(arguments, list) else arguments


def _program(exported: torch.export.ExportedProgram) -> Program:
    signature = exported.graph_signature
    kinds = torch.export.graph_signature.InputKind
    sources = {
        each.arg.name: each
        for each in signature.input_specs
        if not isinstance(each.arg, (int, float, bool, type(None)))
    }
    made = Program([], [], [])
    names: dict[torch.fx.Node, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            source = sources[node.name]
            names[node] = Ref(node.name)
            if source.kind == kinds.USER_INPUT:
                if not isinstance(node.meta.get("val"), Tensor):
                    if node.users:
                        raise ValueError(f"the model takes {node.name}, which is no tensor: give it tensors only")
                    continue  # a number, which the graph is made for
                made.inputs.append(node.name)
                made.specs[node.name] = Spec.of(node.meta["val"])
            elif node.users:
                target = source.target
                state = exported.state_dict if target in exported.state_dict else exported.constants
                made.constants[node.name] = state[target].detach()
        elif node.op == "call_function" and "val" in node.meta:  # others check, and return nothing
            _add_call(made, node, names)
        elif node.op == "output":
            returned = _arguments(list(node.args[0]), names)
            wrong = [each for each in returned if not isinstance(each, Ref)]
            if wrong:
                raise ValueError(f"the model returns {wrong[0]!r}, which is no tensor: return tensors only")
            made.outputs = [each.name for each in returned]
    return made


def _add_call(made: Program, node: torch.fx.Node, names: dict[torch.fx.Node, Any]) -> None:
    target = node.target
    if getattr(target, "__name__", "") == "getitem":
        whole, index = node.args
        made.steps[names[whole]].outputs[index] = node.name  # type: ignore[index]
        names[node] = Ref(node.name)
        made.specs[node.name] = Spec.of(node.meta["val"])
        return
    if not isinstance(target, torch._ops.OpOverload):
        raise ValueError(f"the model calls {target}, which is no operator on tensors")
    value = node.meta.get("val")
    if value is None:  # a check of what is known when it is fused
        return
    several = not isinstance(value, Tensor)
    outputs: list[str | None] = [None] * len(value) if several else [node.name]
    if several:
        names[node] = len(made.steps)
    else:
        names[node] = Ref(node.name)
        made.specs[node.name] = Spec.of(value)
    arguments, keywords = _arguments(list(node.args), names), _arguments(dict(node.kwargs), names)
    made.steps.append(Step(str(target), arguments, keywords, outputs))


def _arguments(arguments: Any, names: dict[torch.fx.Node, Any]) -> Any:
    if isinstance(arguments, torch.fx.Node):
        return names[arguments]
    if isinstance(arguments, dict):
        return {name: _arguments(each, names) for name, each in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return [_arguments(each, names) for each in arguments]
    return arguments

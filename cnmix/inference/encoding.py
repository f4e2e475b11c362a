"""Programs as JSON, and back: everything that a program from a stranger says is checked before it is computed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .allowed import ALLOWED, MAX_ELEMENTS, bound_arguments
from .checking import check_references, check_sizes, check_values, extent
from .container import is_size, read_json
from .program import Program, Ref, Spec, Step

MAX_STEPS = 5_000
MAX_NAME = 200
_MAX_DEPTH = 8

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_MEMORY_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
}
_SPECIAL_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
# Where and how tensors lie when nothing is said.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "device": (None, torch.device("cpu")),
    "layout": (None, torch.strided),
    "pin_memory": (None, False),
    "non_blocking": (None, False),
}


def encode(program: Program, structure: pytree.TreeSpec) -> tuple[str, dict[str, Tensor]]:
    """Returns a program as JSON, and its constants as they are stored.

    Args:
        program: to be stored.
        structure: of what the model returns.

    Raises:
        ValueError: if it calls what an offline model may not, or returns what is no tensor, list, tuple or dict.
    """
    same: dict[Any, str] = {}
    names: dict[str, str] = {}
    orders: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in program.constants.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        names[name] = same.setdefault(memory, name)
        if names[name] == name:
            strides = tensor.stride()
            orders[name] = sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)
            tensors[name] = _stored(tensor.detach().permute(orders[name]))
    for step in program.steps:
        if step.operator not in ALLOWED:
            raise ValueError(f"the model calls {step.operator}, which an offline model cannot: compute it outside")
    described = {
        "inputs": program.inputs,
        "outputs": [names.get(name, name) for name in program.outputs],
        "structure": _encode_structure(pytree.tree_unflatten(list(range(structure.num_leaves)), structure)),
        "constants": {name: {"order": order} for name, order in orders.items()},
        "values": {name: _encode_spec(spec) for name, spec in _needed_specs(program)},
        "steps": [
            {
                "operator": step.operator,
                "arguments": _encode(step.arguments, names),
                "keywords": {
                    name: _encode(value, names)
                    for name, value in step.keywords.items()
                    if name not in _DEFAULTS or value not in _DEFAULTS[name]
                },
                "outputs": step.outputs,
            }
            for step in program.steps
        ],
    }
    return json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=False), tensors


def decode(text: str, tensors: Mapping[str, Tensor]) -> tuple[Program, Any]:
    """Returns the program that JSON describes, and the structure of what it returns.

    No tensor of its sizes is made: it is computed on torch's meta device, which knows shapes and dtypes alone.

    Args:
        text: of ``encode``.
        tensors: the constants, as they are stored.

    Raises:
        ValueError: if it is not what ``encode`` returns, calls what it may not, is too large, or describes values that
            its operators do not return.
    """
    described = read_json(text, "its program")
    _check_keys(described, ("inputs", "outputs", "structure", "constants", "values", "steps"), "its program")
    inputs, outputs = (_names(described[key], f"its {key}") for key in ("inputs", "outputs"))
    specs = _decode_specs(described["values"])
    constants = dict(_decode_constants(described["constants"], tensors))
    steps = _list(described["steps"], "its steps")
    if len(steps) > MAX_STEPS:
        raise ValueError(f"its program has {len(steps)} steps; {MAX_STEPS} are the most")
    decoded = [_decode_step(*each) for each in enumerate(steps)]
    program = Program(inputs, outputs, [step for step, _ in decoded], constants, specs)
    check_references(program)
    leaves = list(_leaves(described["structure"], 0))
    if leaves != list(range(len(outputs))):
        raise ValueError("its structure does not name each output once, in order")
    check_sizes(program)
    check_values(program, [bound for _, bound in decoded])
    return program, described["structure"]


def structured(structure: Any, outputs: tuple[Tensor, ...]) -> Any:
    """Returns outputs as the model returned them: a tensor, or tuples, lists and dicts of them."""
    if isinstance(structure, int):
        return outputs[structure]
    ((kind, inner),) = structure.items()
    if kind == "dict":
        return {key: structured(each, outputs) for key, each in inner}
    made = [structured(each, outputs) for each in inner]
    return tuple(made) if kind == "tuple" else made


def _stored(tensor: Tensor) -> Tensor:
    # A copy where it is part of a larger tensor: a file has each number once.
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _needed_specs(program: Program) -> Iterator[tuple[str, Spec]]:
    for name in (*program.inputs, *(name for step in program.steps for name in step.outputs if name is not None)):
        yield name, program.specs[name]


def _encode(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, Ref):
        return {"value": names.get(value.name, value.name)}
    if isinstance(value, (list, tuple)):
        return [_encode(each, names) for each in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"an argument {value!r} has no place in an offline model")


def _encode_structure(value: Any) -> Any:
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _encode_structure(each)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_encode_structure(each) for each in value]}
    raise ValueError(f"the model returns a {type(value).__name__}: return tensors, or lists, tuples and dicts of them")


def _encode_spec(spec: Spec) -> dict[str, Any]:
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"shape": list(spec.shape), "dtype": dtype, "strides": list(spec.strides)}


def _check_keys(given: Any, wanted: tuple[str, ...], what: str) -> None:
    if not isinstance(given, dict) or set(given) != set(wanted):
        raise ValueError(f"{what} must be an object with {', '.join(wanted)}, and nothing else")


def _list(given: Any, what: str) -> list[Any]:
    if not isinstance(given, list):
        raise ValueError(f"{what} must be a list")
    return given


def _name(given: Any, what: str) -> str:
    if not (isinstance(given, str) and given.isascii() and given.isidentifier() and len(given) <= MAX_NAME):
        raise ValueError(f"{what}: {ascii(given)[:60]} is no name (letters, digits and _, at most {MAX_NAME})")
    return given


def _names(given: Any, what: str) -> list[str]:
    return [_name(each, what) for each in _list(given, what)]


def _decode_specs(given: Any) -> dict[str, Spec]:
    if not isinstance(given, dict):
        raise ValueError("its values must be an object")
    made = {}
    for name, each in given.items():
        where = f"its value {_name(name, 'its values')}"
        _check_keys(each, ("shape", "dtype", "strides"), where)
        shape, strides = (_list(each[key], f"the {key} of {where}") for key in ("shape", "strides"))
        if len(shape) > 64 or not all(map(is_size, shape)) or math.prod(shape) > MAX_ELEMENTS:
            raise ValueError(f"{where} has the shape {ascii(shape)[:80]}: at most {MAX_ELEMENTS} numbers")
        if len(strides) != len(shape) or not all(map(is_size, strides)) or extent(shape, strides) > MAX_ELEMENTS:
            raise ValueError(f"{where} has the strides {ascii(strides)[:80]}, which do not fit {ascii(shape)[:80]}")
        made[name] = Spec(tuple(shape), _dtype(each["dtype"], where), tuple(strides))
    return made


def _dtype(given: Any, where: str) -> torch.dtype:
    if not isinstance(given, str) or given not in _DTYPES:
        raise ValueError(f"{where} has the dtype {ascii(given)[:40]}: it may be one of {', '.join(_DTYPES)}")
    return _DTYPES[given]


def _decode_constants(given: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(given, dict) or set(given) != set(tensors):
        raise ValueError("the constants of its program are not the tensors of the file")
    for name, each in given.items():
        where, stored = f"its constant {_name(name, 'its constants')}", tensors[name]
        _check_keys(each, ("order",), where)
        order = _list(each["order"], f"the order of {where}")
        if not all(map(is_size, order)) or sorted(order) != list(range(stored.dim())):
            raise ValueError(f"{where} has {stored.dim()} dimensions, which its order {ascii(order)[:80]} does not fit")
        yield name, stored.permute([order.index(dim) for dim in range(stored.dim())])


def _decode_step(index: int, given: Any) -> tuple[Step, dict[str, Any]]:
    """Returns a step, and its arguments by name."""
    where = f"its step {index}"
    _check_keys(given, ("operator", "arguments", "keywords", "outputs"), where)
    operator = given["operator"]
    if not isinstance(operator, str) or operator not in ALLOWED:
        raise ValueError(f"{where} calls {ascii(operator)[:80]}, which is not among what an offline model may call")
    if not isinstance(given["keywords"], dict):
        raise ValueError(f"the keywords of {where} must be an object")
    arguments = [_decode(each, where, 0) for each in _list(given["arguments"], f"the arguments of {where}")]
    keywords = {name: _decode(each, where, 0) for name, each in given["keywords"].items()}
    outputs = [
        each if each is None else _name(each, f"the outputs of {where}")
        for each in _list(given["outputs"], f"the outputs of {where}")
    ]
    try:
        bound = bound_arguments(operator, arguments, keywords)
    except ValueError as error:
        raise ValueError(f"{where}, {operator}: {error}") from None
    return Step(operator, arguments, keywords, outputs), bound


def _decode(given: Any, where: str, depth: int) -> Any:
    if given is None or isinstance(given, (bool, int)):
        return given
    if isinstance(given, float):
        if not math.isfinite(given):
            raise ValueError(f"{where} has a number that is too large")
        return given
    if isinstance(given, str):
        if len(given) > MAX_NAME or not given.isprintable():
            raise ValueError(f"{where} has a text that is too long, or cannot be printed")
        return given
    if isinstance(given, list):
        if depth == _MAX_DEPTH:
            raise ValueError(f"{where} has lists that are nested too deeply")
        return [_decode(each, where, depth + 1) for each in given]
    ((kind, value),) = given.items() if len(given) == 1 else (("", None),)
    kinds: dict[str, Mapping[str, Any]] = {
        "dtype": _DTYPES, "memory_format": _MEMORY_FORMATS, "float": _SPECIAL_FLOATS
    }  # fmt: skip
    if kind == "value":
        return Ref(_name(value, where))
    if kind not in kinds or not isinstance(value, str) or value not in kinds[kind]:
        raise ValueError(f"{where} has an argument {ascii(given)[:80]} that stands for nothing")
    return kinds[kind][value]


def _leaves(structure: Any, depth: int) -> Iterator[int]:
    if is_size(structure):
        yield structure
        return
    if depth > _MAX_DEPTH or not isinstance(structure, dict) or len(structure) != 1:
        raise ValueError("its structure is made of something else than tensors, tuples, lists and dicts")
    ((kind, inner),) = structure.items()
    if kind not in ("tuple", "list", "dict"):
        raise ValueError(f"its structure has a {ascii(kind)[:40]}: it may have a tuple, list or dict")
    seen = set()
    for each in _list(inner, "what a structure has in it"):
        if kind == "dict":
            pair = _list(each, "what a dict of its structure has in it")
            if len(pair) != 2 or not isinstance(pair[0], str) or len(pair[0]) > MAX_NAME or pair[0] in seen:
                raise ValueError("a dict of its structure must have pairs of a text, each another, and what it names")
            seen.add(pair[0])
            each = pair[1]
        yield from _leaves(each, depth + 1)

"""The standard quantized ONNX form of an integer model: QuantizeLinear and DequantizeLinear around float operators."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import replacing
from ..nn.exported import FITTING
from ..version import __version__
from .allowed import bound_arguments
from .fused import FusedModel
from .names import CONVOLUTION, FILTER, GROUPED, LINEAR, MATMUL, RECURRENCE, STORED_WEIGHTS
from .program import Program, Step, run_step

_WITHOUT_FORM = {RECURRENCE: "a recurrent layer", GROUPED: "groups of rows, each by a matrix of its own"}
_ONNX_TYPES = {torch.int8: 3, torch.int16: 5}  # numbers of onnx.TensorProto


def to_onnx(fused: FusedModel, path: str | os.PathLike[str]) -> None:
    """Writes an integer model as an ONNX file, for the shapes of the inputs that it was fused with.

    A product is its float operator, with QuantizeLinear and DequantizeLinear at its input and DequantizeLinear at its
    weight, whose integers are in the file; a product of two activations, as in attention, has the pair at both.
    Products that take a tensor in one format share the pair. Scales are powers of two, zero points 0. Everything else
    is in float32, as in the model; a batch norm is Mul and Add. Operands of 31 bits, which QuantizeLinear has not, are
    rounded by Round and Clip. Models with int16 need opset 21, others 20.

    Args:
        fused: what ``fuse`` returned.
        path: of the file, which is written under a temporary name and renamed.

    Raises:
        ModuleNotFoundError: if onnx or onnxscript is not installed.
        ValueError: if ONNX has no form of something that the model does, as of recurrent layers, groups of rows and
            positions that fit each tensor anew; the message names it.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is missing, which writes ONNX: pip install 'cnmix[onnx]'") from error
    name = type(fused.model).__name__
    exported = _export(fused.stored()[0], name)
    model = exported.model
    model.producer_name, model.producer_version, model.graph.name = "cnmix", __version__, name
    model.metadata_props["cnmix"] = __version__
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # lines of the code that it was traced from
    with replacing(path) as temporary:
        exported.save(str(temporary))
        onnx.checker.check_model(str(temporary), full_check=True)


def _export(program: Program, name: str) -> Any:
    specs = [program.specs[each] for each in program.inputs]
    inputs = tuple(torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs)
    many = len(program.outputs) > 1
    module = _Dequantized(program)
    try:
        with torch.no_grad(), _quiet():
            return torch.onnx.export(
                module.eval(),
                inputs,
                input_names=list(program.inputs),
                output_names=[f"output_{index}" if many else "output" for index in range(len(program.outputs))],
                opset_version=module.opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # an operator without translation, or any that fails
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ValueError(f"{name} has no ONNX form: {reason}") from error


class _Dequantized(nn.Module):
    """Computes a program in float32, its products on what their integers stand for.

    It is there to be exported: the operators of ONNX in it return no numbers here.

    Args:
        program: of an integer model.

    Attributes:
        opset: version of ONNX's operators that it needs.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program
        formats = [_formats(step) for step in program.steps if _is_product(step)]
        self.opset = 21 if any(16 in (bits, weight_bits) for bits, _, weight_bits, _ in formats) else 20
        for name, value in program.constants.items():
            self.register_buffer(name, value)
        for position in {each for formats_of_product in formats for each in formats_of_product[1::2]}:
            self.register_buffer(_scale(position), torch.tensor(2.0**position))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int8))
        for step in program.steps:
            if step.operator == LINEAR:  # MatMul takes it the other way around
                weight = step.arguments[1].name
                self.register_buffer(f"{weight}_transposed", program.constants[weight].t().contiguous())
            elif step.operator == CONVOLUTION and step.arguments[2] is not None:
                bias = step.arguments[2].name
                channels = (-1, *[1] * (len(program.specs[step.output].shape) - 2))
                self.register_buffer(f"{bias}_of_channels", program.constants[bias].view(channels).contiguous())

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Computes the outputs."""
        program = self._program
        values: dict[str, Tensor] = {name: getattr(self, name) for name in program.constants}
        values.update(zip(program.inputs, inputs, strict=True))
        rounded: dict[Any, Tensor] = {}
        for step in program.steps:
            if not _is_product(step):
                run_step(step, values)
                continue
            bits, position, right_bits, right_position = _formats(step)
            operands = [(step.arguments[0].name, bits, position)]
            if step.operator in (MATMUL, FILTER):
                operands.append((step.arguments[1].name, right_bits, right_position))
            for each in operands:
                if each not in rounded:
                    rounded[each] = self._rounded(values[each[0]].float(), *each[1:])
            if len(operands) == 2:
                values[step.output] = _multiplied(step, *(rounded[each] for each in operands))
            else:
                source = values[step.arguments[0].name]
                values[step.output] = self._product(step, rounded[operands[0]], values).to(source.dtype)
        return [values[name] for name in program.outputs]

    def _product(self, step: Step, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        position = _formats(step)[3]
        weight = values[step.arguments[1].name]
        bias = None if step.arguments[2] is None else values[step.arguments[2].name]
        # The bias is added by itself: onnxruntime would quantize one that a Conv or Gemm has.
        if step.operator == CONVOLUTION:
            y = _convolved(x, self._dequantized(weight, position), step.arguments[3:9])
            return y if bias is None else y + getattr(self, f"{step.arguments[2].name}_of_channels")
        if x.dim() == 2:
            y = F.linear(x, self._dequantized(weight, position))
        else:
            y = torch.matmul(x, self._dequantized(getattr(self, f"{step.arguments[1].name}_transposed"), position))
        return y if bias is None else y + bias

    def _rounded(self, x: Tensor, bits: int, position: int) -> Tensor:
        """Returns the multiples of 2**position that a product takes."""
        if bits == 31:
            return (x / 2.0**position).round().clamp(-(2.0**30), 2.0**30 - 1) * 2.0**position
        dtype = torch.int8 if bits == 8 else torch.int16
        return self._dequantized(self._linear("QuantizeLinear", x, position, dtype, dtype), position)

    def _dequantized(self, integers: Tensor, position: int) -> Tensor:
        return self._linear("DequantizeLinear", integers, position, torch.float32, integers.dtype)

    def _linear(self, operator: str, x: Tensor, position: int, dtype: torch.dtype, stored: torch.dtype) -> Tensor:
        operands = [x, getattr(self, _scale(position))]
        attributes: dict[str, Any] = {}
        if self.opset == 20 and stored == torch.int8:
            operands.append(self.zero)
        elif operator == "QuantizeLinear":  # onnxruntime 1.31 mistakes the dtype of zero points in opset 21
            attributes = {"output_dtype": _ONNX_TYPES[stored]}
        version = 21 if self.opset == 21 else 19
        return torch.onnx.ops.symbolic(operator, operands, attributes, dtype=dtype, shape=x.shape, version=version)


def _scale(position: int) -> str:
    return f"scale_2_to_{'minus_' if position < 0 else ''}{abs(position)}"


def _is_product(step: Step) -> bool:
    return step.operator in STORED_WEIGHTS


def _multiplied(step: Step, a: Tensor, b: Tensor) -> Tensor:
    """Returns a product of two activations, float32."""
    return torch.matmul(a, b) if step.operator == MATMUL else _convolved(a, b, step.arguments[2:8])


def _convolved(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
    stride, padding, dilation, groups, transposed, extra = geometry
    return torch.convolution(x, weight, None, stride, padding, dilation, transposed, extra or [0] * len(stride), groups)


def _formats(step: Step) -> tuple[int, int, int, int]:
    """Returns bits and position of both operands.

    Raises:
        ValueError: if ONNX has no such product.
    """
    name = step.arguments[-1]
    if step.operator in _WITHOUT_FORM:
        raise ValueError(
            f"{name!r} multiplies {_WITHOUT_FORM[step.operator]}, in integers, which ONNX has no operator for: save an "
            "offline model, or leave it out of fixed point in training (exclude)"
        )
    bound = bound_arguments(step.operator, step.arguments, step.keywords)
    roundings = [value for argument, value in bound.items() if argument.endswith("rounding")]
    wrong = next((each for each in roundings if each != "nearest_even"), None)
    if wrong is not None:
        raise ValueError(
            f"{name!r} rounds its input by {wrong!r}, and ONNX rounds to nearest, ties to even: train with "
            "rounding='nearest_even'"
        )
    per_matrix = any(bound.get("per_entry", ()))
    if per_matrix or FITTING in bound["formats"]:
        cure = "with per_entry=False" if per_matrix else "until it has found one"
        raise ValueError(
            f"{name!r} quantizes at the position that fits each {'matrix' if per_matrix else 'tensor'} anew, and "
            f"QuantizeLinear at one that is known: train {cure}, or save an offline model"
        )
    return tuple(bound["formats"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what torch says while it exports, as that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

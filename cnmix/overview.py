"""What computes in fixed point in a model, with which widths, and what stayed float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from .nn import QUANTIZED_CLASSES, QuantizedModule, callers, module_name, product_name, quantizer_sets
from .nn.callers import is_caller
from .nn.classes import find_conversion, plain_class
from .nn.convert import is_convertible
from .nn.function_calls import function_products
from .registry import registry, unwrap
from .rules import RuleBook
from .tables import format_table

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# Modules that multiply by weights of their own, converted in this version or not.
_MULTIPLYING = (*_RECURRENT, nn.MultiheadAttention, nn.Bilinear, nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class SummaryRow:
    """One product of a module that multiplies.

    Attributes:
        fqn: fully qualified name of the module; with the place, as ``lstm..l0.input``, where it has several products.
        kind: class of the module, as in the plain model.
        product: "matmul" or "convolution", "" where neither is known of its class.
        weight: shape of its weight, where it has one.
        shapes: of the module's input and output in the last call of one forward pass; None where none was seen.
        widths: of input, weight and grad_output; None where it stayed float.
        macs: multiply-accumulates of one forward pass; None where it was not seen in one.
        reason: why it stayed float, or "".
    """

    fqn: str
    kind: str
    product: str
    weight: tuple[int, ...] | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None
    widths: tuple[int, int, int] | None
    macs: int | None
    reason: str


@dataclass(frozen=True)
class Summary:
    """The modules of a model that multiply; its text is a table."""

    rows: tuple[SummaryRow, ...]

    @property
    def share(self) -> float | None:
        """Share of multiply-accumulates in fixed point, where a forward pass was seen."""
        total = sum(row.macs or 0 for row in self.rows)
        return sum(row.macs or 0 for row in self.rows if row.widths) / total if total else None

    def __str__(self) -> str:
        total = sum(row.macs or 0 for row in self.rows)
        table: list[tuple[str, ...]] = [
            ("module", "class", "product", "weight", "shapes", "input", "weight bits", "grad_output", "MACs", "")
        ]
        for row in self.rows:
            widths = tuple(f"int{bits}" for bits in row.widths) if row.widths else ("float", "float", "float")
            weight = "–" if row.weight is None else _by(row.weight)
            shapes = "–" if row.shapes is None else " → ".join(map(_by, row.shapes))
            macs = f"{row.macs / total:.1%}" if row.macs is not None and total else "–"
            name = row.fqn or "(the model)"
            table.append((name, row.kind, row.product or "–", weight, shapes, *widths, macs, row.reason))
        text = format_table(table)
        if self.share is not None:
            text += f"\n{self.share:.1%} of {total / 1e6:,.1f} million multiply-accumulates are in fixed point"
        return text


def summary(model: nn.Module, *example: Any) -> Summary:
    """Lists the modules of a model that multiply: their widths, their share of the work, and what stayed float and why.

    Args:
        model: converted or not.
        *example: what to call the model with, to count multiply-accumulates: one forward pass in evaluation mode,
            without gradients, which changes no statistics. Without it they are not counted.

    Returns:
        A ``Summary``; print it. It counts what modules multiply by their weights, as their shapes say;
        ``cnmix.executed_products`` what really multiplied, forwards and backwards, products without weights too.
    """
    chosen: dict[str, nn.Module] = {
        fqn: module for fqn, module in model.named_modules() if isinstance(module, _MULTIPLYING)
    }
    counted: dict[str, int] = {}
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    weights: dict[str, dict[str, Any]] = {}  # by place; None of a module without one of its own
    with _evaluation(model), torch.no_grad():  # in training spectral norm would move when its weight is read
        for fqn, module in chosen.items():
            kinds = (ours for plain, ours in QUANTIZED_CLASSES.items() if isinstance(module, plain))
            places = next(kinds, QuantizedModule).places(module)
            weights[fqn] = {place: getattr(module, name, None) for place, name in places.items()}
        if example:
            with _counting(chosen, counted, seen):
                model(*example)
    rows = []
    quantizers = dict(quantizer_sets(model))
    why = why_float(model)
    inside = tuple(f"{fqn}." for fqn, module in chosen.items() if isinstance(module, nn.MultiheadAttention))
    for fqn, module in chosen.items():
        product = next((ours.product for plain, ours in QUANTIZED_CLASSES.items() if isinstance(module, plain)), "")
        kind, reason = plain_class(module).__name__, ""
        if not isinstance(module, QuantizedModule):
            if fqn.startswith(inside):
                continue
            reason = why(module)
        for place, weight in weights[fqn].items():
            name = product_name(fqn, place)
            # Now, as a lazy module may just have got its weights.
            shape = tuple(weight.shape) if isinstance(weight, Tensor) and not is_lazy(weight) else None
            macs = counted[fqn] * math.prod(shape[1:]) if shape and fqn in counted else None
            if macs is not None and isinstance(module, _RECURRENT):
                macs *= weight.shape[0]
            if reason and function_products(module) is not None:
                macs = None  # they are those of functions, which are not counted here
            bits = [quantizer.state.bits for _, quantizer in quantizers.get(name, ())]
            widths = (bits[0], bits[1], bits[2]) if bits else None
            rows.append(SummaryRow(name, kind, product, shape, seen.get(fqn), widths, macs, reason))
    for name, each in quantizers.items():
        if each.of_function:
            kind = plain_class(model.get_submodule(module_name(name))).__name__
            bits = [quantizer.state.bits for _, quantizer in each]
            rows.append(SummaryRow(name, kind, each.product, None, None, (bits[0], bits[1], bits[2]), None, ""))
    return Summary(tuple(rows))


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def why_float(model: nn.Module) -> Callable[[nn.Module], str]:
    """Returns what says of a module of this model, which is not converted, why it computes in float."""
    setup = registry.models.get(unwrap(model))
    converted = any(quantizer_sets(model)) or any(callers(model))
    # Of a copy or a part of a model that was initialized the rules are not known.
    left_out = RuleBook(unwrap(model), setup.rules).why_left_out if setup else lambda module: "left out"

    def why(module: nn.Module) -> str:
        if not converted:
            return "the model is not converted"
        if function_products(module) is not None:
            return "the functions that it calls go to the core, and are listed once they have been trained"
        if is_convertible(module) or is_caller(module):
            return left_out(module) or "came after initialize: call it again"
        return find_conversion(plain_class(module))[1]

    return why


@contextmanager
def _counting(
    chosen: dict[str, nn.Module],
    counted: dict[str, int],
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> Iterator[None]:
    """Adds up the numbers that the weights' rows multiply for as modules are called, and notes their shapes.

    Those of a recurrent network multiply for each time step.
    """
    hooks = []
    for fqn, each in chosen.items():

        def count(module: nn.Module, args: Any, output: Any, fqn: str = fqn) -> None:
            recurrent = isinstance(module, _RECURRENT)
            output = output[0] if recurrent and isinstance(output, tuple) else output
            output = output.data if isinstance(output, PackedSequence) else output
            x = args[0] if args and getattr(module, "transposed", False) else output
            if isinstance(x, Tensor):
                numbers = x.numel() // x.shape[-1] if recurrent else x.numel()
                counted[fqn] = counted.get(fqn, 0) + numbers
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen[fqn] = tuple(args[0].shape), tuple(output.shape)

        hooks.append(each.register_forward_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training

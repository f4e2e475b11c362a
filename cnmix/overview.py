"""What computes in fixed point in a model, with which widths, and what stayed float."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .nn import QUANTIZED_CLASSES, QuantizedModule, product_name, quantizer_sets
from .nn.convert import is_convertible, plain_class
from .registry import registry, unwrap
from .rules import RuleBook
from .tables import format_table

# Modules that multiply by weights of their own and that this version does not convert.
_UNCONVERTED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear, nn.modules.conv._ConvNd, nn.Linear)


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
        A ``Summary``; print it.
    """
    chosen: dict[str, nn.Module] = {
        fqn: module for fqn, module in model.named_modules() if isinstance(module, _UNCONVERTED)
    }
    macs: dict[str, int] = {}
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    # The weights' shapes, None for a module without a weight of its own, by place and module.
    shapes: dict[str, dict[str, tuple[int, ...] | None]] = {}
    with _evaluation(model), torch.no_grad():  # in training spectral norm would move when its weight is read
        for fqn, module in chosen.items():
            ours = next(
                (ours for plain, ours in QUANTIZED_CLASSES.items() if isinstance(module, plain)), QuantizedModule
            )
            weights = {place: getattr(module, name, None) for place, name in ours.places(module).items()}
            shapes[fqn] = {
                place: tuple(weight.shape) if isinstance(weight, Tensor) else None for place, weight in weights.items()
            }
        if example:
            with _counting(chosen, shapes, macs, seen):
                model(*example)
    rows = []
    quantizers = dict(quantizer_sets(model))
    setup = registry.models.get(unwrap(model))
    # Of a copy or a part of a model that was initialized the rules are not known.
    left_out = RuleBook(unwrap(model), setup.rules).why_left_out if setup else lambda module: "left out"
    inside = tuple(f"{fqn}." for fqn, module in chosen.items() if isinstance(module, nn.MultiheadAttention))
    for fqn, module in chosen.items():
        product = next((ours.product for plain, ours in QUANTIZED_CLASSES.items() if isinstance(module, plain)), "")
        reason = ""
        if isinstance(module, QuantizedModule):
            kind = next(plain.__name__ for plain, ours in QUANTIZED_CLASSES.items() if isinstance(module, ours))
        elif fqn.startswith(inside):
            continue
        else:
            kind = plain_class(module).__name__
            reason = _reason(module, left_out(module)) if quantizers else "the model is not converted"
        for place, shape in shapes[fqn].items():
            name = product_name(fqn, place)
            bits = [quantizer.state.bits for _, quantizer in quantizers.get(name, ())]
            widths = (bits[0], bits[1], bits[2]) if bits else None
            rows.append(SummaryRow(name, kind, product, shape, seen.get(fqn), widths, macs.get(name), reason))
    return Summary(tuple(rows))


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _reason(module: nn.Module, left_out: str) -> str:
    if is_convertible(module):
        return left_out or "came after initialize: call it again"
    if isinstance(module, tuple(QUANTIZED_CLASSES)):
        return f"a subclass of {type(module).__mro__[1].__name__}: only the class itself is converted"
    return f"{type(module).__name__} is not converted in this version"


@contextmanager
def _counting(
    chosen: dict[str, nn.Module],
    shapes: dict[str, dict[str, tuple[int, ...] | None]],
    macs: dict[str, int],
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> Iterator[None]:
    """Adds up the multiply-accumulates of the products of modules as they are called, and notes their shapes."""
    hooks = []
    for fqn, by_place in shapes.items():

        def count(module: nn.Module, args: Any, output: Any, fqn: str = fqn, by_place: Any = by_place) -> None:
            recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
            output = output[0] if recurrent and isinstance(output, tuple) else output
            output = output.data if isinstance(output, PackedSequence) else output
            counted = args[0] if getattr(module, "transposed", False) else output
            for place, shape in by_place.items():
                if isinstance(counted, Tensor) and shape is not None:
                    # Every layer of a recurrent network goes through all time steps.
                    times = counted.numel() // counted.shape[-1] * shape[0] if recurrent else counted.numel()
                    name = product_name(fqn, place)
                    macs[name] = macs.get(name, 0) + times * math.prod(shape[1:])
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen[fqn] = tuple(args[0].shape), tuple(output.shape)

        hooks.append(chosen[fqn].register_forward_hook(count))
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

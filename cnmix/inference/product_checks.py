"""What a file may ask of the operators of integer models: their kernels take every argument at its word."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..fixed_point import BITS, POSITION_MAX, POSITION_MIN, ROUNDINGS
from ..nn.exported import FITTING
from ..nn.gates import KINDS
from .names import CONVOLUTION, FILTER, GROUPED, LINEAR, MATMUL, RECURRENCE
from .shapes import broadcast

MAX_ELEMENTS = 2**31
_ROUNDINGS = tuple(name for name in ROUNDINGS if name != "stochastic")
_WEIGHTS = {8: torch.int8, 16: torch.int16, 31: torch.int32}

Bound = Mapping[str, Any]


def check_product(operator: str, bound: Bound) -> None:
    """Checks the arguments of a product against each other.

    Args:
        operator: one of ``names.STORED_WEIGHTS``.
        bound: its arguments by name; tensors are on the meta device.

    Raises:
        ValueError: if they do not belong together.
    """
    _CHECKS[operator](bound)


def need(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def _check_operand(x: Tensor, bits: int, position: int, rounding: str) -> None:
    """Checks a tensor that a product quantizes: its position may be the one that fits."""
    need(bits in BITS, f"bits must be 8, 16 or 31, got {bits}")
    in_range = POSITION_MIN <= position <= POSITION_MAX or position == FITTING
    need(in_range, f"positions must lie in [{POSITION_MIN}, {POSITION_MAX}], or be {FITTING}, got {position}")
    need(x.is_floating_point(), f"what is quantized must be of a float dtype, got {x.dtype}")
    _check_rounding(rounding)


def _check_rounding(rounding: str) -> None:
    need(rounding in _ROUNDINGS, f"rounding must be one of {', '.join(_ROUNDINGS)}")


def _check_weight(weight: Tensor, bits: int, position: int) -> None:
    need(bits in BITS, f"bits must be 8, 16 or 31, got {bits}")
    in_range = POSITION_MIN <= position <= POSITION_MAX
    need(in_range, f"positions of weights must lie in [{POSITION_MIN}, {POSITION_MAX}], got {position}")
    need(weight.dtype == _WEIGHTS[bits], f"a weight of {bits} bits must be {_WEIGHTS[bits]}, got {weight.dtype}")


def _check_bias(bias: Tensor | None, length: int) -> None:
    need(bias is None or bias.dtype == torch.float32, "the bias must be float32")
    need(bias is None or tuple(bias.shape) == (length,), f"the bias must have a number for each of {length} outputs")


def _formats(bound: Bound, products: int = 1) -> list[int]:
    formats = list(bound["formats"])
    need(len(formats) == 4 * products, "formats must be bits and position of both operands of each product")
    return formats


def _check_stored(bound: Bound) -> None:
    bits, position, weight_bits, weight_position = _formats(bound)
    _check_operand(bound["x"], bits, position, bound["rounding"])
    _check_weight(bound["weight"], weight_bits, weight_position)


def _check_linear(bound: Bound) -> None:
    _check_stored(bound)
    x, weight = bound["x"], bound["weight"]
    need(weight.dim() == 2 and 0 not in weight.shape, f"the weight must have shape (O, K), got {tuple(weight.shape)}")
    fits = x.dim() > 0 and x.shape[-1] == weight.shape[1]
    need(fits, f"an input {tuple(x.shape)} does not fit a weight {tuple(weight.shape)}")
    _check_bias(bound["bias"], weight.shape[0])


def _check_convolution(bound: Bound) -> None:
    _check_stored(bound)
    _check_bias(bound["bias"], _check_geometry(bound))


def _check_filter(bound: Bound) -> None:
    bits, position, weight_bits, weight_position = _formats(bound)
    _check_operand(bound["x"], bits, position, bound["left_rounding"])
    _check_operand(bound["weight"], weight_bits, weight_position, bound["right_rounding"])
    _check_geometry(bound)


def _check_geometry(bound: Bound) -> int:
    """Returns how many channels a convolution makes."""
    x, weight, groups = bound["x"], bound["weight"], bound["groups"]
    spatial = weight.dim() - 2
    need(1 <= spatial <= 3 and 0 not in weight.shape, f"the weight has shape {tuple(weight.shape)}")
    need(x.dim() == weight.dim(), f"an input {tuple(x.shape)} does not fit a weight {tuple(weight.shape)}")
    lists = {name: bound[name] for name in ("stride", "padding", "dilation")}
    if bound["transposed"]:
        lists["output_padding"] = bound["output_padding"]
    for name, numbers in lists.items():
        least = 1 if name in ("stride", "dilation") else 0
        need(
            len(numbers) == spatial and all(least <= n < MAX_ELEMENTS for n in numbers),
            f"{name} must be {spatial} numbers of at least {least}, got {ascii(numbers)[:80]}",
        )
    need(bound["transposed"] or all(n == 0 for n in bound["output_padding"]), "output_padding is for transposed ones")
    outputs, inputs = weight.shape[:2] if not bound["transposed"] else (weight.shape[1] * groups, weight.shape[0])
    inputs = inputs if bound["transposed"] else inputs * groups
    need(
        groups >= 1 and weight.shape[0] % groups == 0 and x.shape[1] == inputs,
        f"an input {tuple(x.shape)} does not fit a weight {tuple(weight.shape)} in {groups} groups",
    )
    padded = [n + 2 * p for n, p in zip(x.shape[2:], bound["padding"], strict=True)]
    need(x.shape[0] * x.shape[1] * math.prod(padded) <= MAX_ELEMENTS, "the padded input is too large")
    return outputs


def _check_matmul(bound: Bound) -> None:
    a, b = bound["a"], bound["b"]
    bits, position, right_bits, right_position = _formats(bound)
    _check_operand(a, bits, position, bound["left_rounding"])
    _check_operand(b, right_bits, right_position, bound["right_rounding"])
    need(len(bound["per_entry"]) == 2, "per_entry must be one answer for each operand")
    fits = a.dim() >= 2 and b.dim() >= 2 and a.shape[-1] == b.shape[-2] and a.shape[-1] > 0
    need(fits, f"(..., M, K) and (..., K, N) are multiplied, got {tuple(a.shape)} and {tuple(b.shape)}")
    check_batches(a, b)


def check_batches(a: Tensor, b: Tensor) -> None:
    """Raises ValueError if two batches of matrices, each repeated for the other's batch, take too many numbers."""
    batch = math.prod(broadcast(a.shape[:-2], b.shape[:-2]))
    most = batch * max(math.prod(a.shape[-2:]), math.prod(b.shape[-2:]))
    need(most <= MAX_ELEMENTS, f"its operands have {most} numbers for all of the batch, more than {MAX_ELEMENTS}")


def _check_grouped(bound: Bound) -> None:
    x, weight, ends = bound["x"], bound["weight"], bound["ends"]
    bits, position, weight_bits, weight_position = _formats(bound)
    _check_operand(x, bits, position, bound["left_rounding"])
    if weight.is_floating_point():
        _check_operand(weight, weight_bits, weight_position, bound["right_rounding"])
    else:
        _check_weight(weight, weight_bits, weight_position)
        _check_rounding(bound["right_rounding"])
    fits = x.dim() == 2 and weight.dim() == 3 and x.shape[1] == weight.shape[1] and 0 not in weight.shape
    need(fits, f"rows {tuple(x.shape)} do not fit groups {tuple(weight.shape)}")
    of_integers = ends.dtype in (torch.int32, torch.int64)
    need(of_integers and tuple(ends.shape) == (weight.shape[0],), "it takes one end for each group, an integer")


def _check_recurrence(bound: Bound) -> None:
    x, h, c, mode = bound["x"], bound["h"], bound["c"], bound["mode"]
    weights = [bound[name] for name in ("w_input", "w_hidden", "w_projection") if bound[name] is not None]
    need(mode in KINDS, f"the mode must be one of {', '.join(KINDS)}")
    need(len(weights) == 2 or mode == "LSTM", "only an LSTM projects its hidden state")
    need((c is not None) == (mode == "LSTM"), "an LSTM has a cell state, and nothing else has one")
    formats = _formats(bound, len(weights))
    answers = (bound["roundings"], bound["exact"])
    need(all(len(each) == len(weights) for each in answers), "roundings and exact must have one for each product")
    for number, weight in enumerate(weights):
        bits, position, weight_bits, weight_position = formats[4 * number : 4 * number + 4]
        _check_operand((x, h, h)[number], bits, position, bound["roundings"][number])
        _check_weight(weight, weight_bits, weight_position)
        need(weight.dim() == 2 and 0 not in weight.shape, f"a weight has shape {tuple(weight.shape)}")
    need(x.dim() == 2 and h.dim() == 2, "it takes rows of all time steps, and a first hidden state for each sequence")
    rows, size = sum(bound["batch_sizes"]), weights[1].shape[0] // KINDS[mode].number
    hidden = size if len(weights) == 2 else weights[2].shape[0]
    wanted = [(KINDS[mode].number * size, x.shape[1]), (KINDS[mode].number * size, hidden), (hidden, size)]
    shapes = [tuple(each.shape) for each in weights]
    need(size > 0 and shapes == wanted[: len(weights)], f"weights {shapes} do not fit inputs {tuple(x.shape)}")
    for name in ("b_input", "b_hidden"):
        _check_bias(bound[name], KINDS[mode].number * size)
    _check_steps(bound["batch_sizes"], x.shape[0], h.shape[0])
    need(h.shape[1] == hidden, f"the hidden state has {h.shape[1]} columns, the weights {hidden}")
    for each in (h, c):
        need(each is None or each.dtype == torch.float32, "states must be float32")
    need(c is None or tuple(c.shape) == (h.shape[0], size), f"the cell state must have {size} columns")
    need(rows * wanted[0][0] <= MAX_ELEMENTS, "its gates are too large")


def _check_steps(batch_sizes: list[int], rows: int, sequences: int) -> None:
    falls = all(before >= after > 0 for before, after in zip(batch_sizes, [*batch_sizes[1:], 1], strict=True))
    need(
        bool(batch_sizes) and falls and (batch_sizes[0], sum(batch_sizes)) == (sequences, rows),
        f"the time steps must have {sequences} rows, then never more than the one before, {rows} in all",
    )


_CHECKS: dict[str, Callable[[Bound], None]] = {
    LINEAR: _check_linear,
    CONVOLUTION: _check_convolution,
    MATMUL: _check_matmul,
    FILTER: _check_filter,
    GROUPED: _check_grouped,
    RECURRENCE: _check_recurrence,
}

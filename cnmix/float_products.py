"""Multiply-accumulates of torch's operations, from the shapes that ``torch.profiler`` records.

Formulas are for the outermost operation that has one: ``aten::linear`` rather than the ``aten::addmm`` inside of it.
Those of attention are ``torch.utils.flop_counter``'s, in which a masked product counts whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Shapes = Sequence[Sequence[int]]
_Formula = Callable[[Shapes, Sequence[Any]], int]

# Parts of the names of operations that multiply, known here or not.
_MULTIPLY = {
    *("mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "dot", "vdot", "matmul", "linear"),
    *("conv", "conv1d", "conv2d", "conv3d", "convolution", "attention", "rnn", "lstm", "gru"),
}
_PREPARE = {"prepack", "unpack", "reorder", "cell"}


def count(name: str, shapes: Shapes, arguments: Sequence[Any]) -> int | None:
    """Returns the multiply-accumulates of one call.

    Args:
        name: of the operation, as ``aten::addmm``.
        shapes: of its arguments, in their order; empty for those that are no tensors.
        arguments: its arguments that are numbers, and lists of them; None for others.

    Returns:
        None where there is no formula, or none for such arguments (nested tensors have no shapes).
    """
    formula = _FORMULAS.get(name.removeprefix("aten::")) if name.startswith("aten::") else None
    if formula is None:
        return None
    try:
        return formula(shapes, arguments)
    except (IndexError, TypeError, ValueError):
        return None


def multiplies(name: str) -> bool:
    """Whether an operation surely multiplies matrices, by its name."""
    space, _, operation = name.partition("::")
    parts = {*operation.split("_")}
    return space.isidentifier() and bool(parts & _MULTIPLY) and not parts & _PREPARE


def _matrices(left: int, right: int) -> _Formula:
    """Returns the formula for the product of the arguments (..., K) and (..., K, N), or (K,), with these indices."""

    def formula(shapes: Shapes, _: Sequence[Any]) -> int:
        return math.prod(_shape(shapes, left)) * (shapes[right][-1] if len(_shape(shapes, right)) > 1 else 1)

    return formula


def _linear(shapes: Shapes, _: Sequence[Any]) -> int:
    return math.prod(_shape(shapes, 0)) * math.prod(_shape(shapes, 1)[:-1])


def _convolution(shapes: Shapes, arguments: Sequence[Any]) -> int:
    x, weight = _shape(shapes, 0), _shape(shapes, 1)
    stride, padding, dilation, transposed = arguments[3:7]
    if transposed:
        return math.prod(x) * math.prod(weight[1:])
    spatial = range(len(weight) - 2)
    stride, padding, dilation = (
        [*each] * len(spatial) if len(each) == 1 else each for each in (stride, padding, dilation)
    )
    size = [(x[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1 for i in spatial]
    return x[0] * math.prod(size) * math.prod(weight)


def _convolution_backward(shapes: Shapes, arguments: Sequence[Any]) -> int:
    transposed, needs = arguments[7], arguments[10]
    image = _shape(shapes, 1 if transposed else 0)
    return math.prod(image) * math.prod(_shape(shapes, 2)[1:]) * sum(needs[:2])


def _convolution_backward_overrideable(shapes: Shapes, arguments: Sequence[Any]) -> int:
    """Counts a device's own kernel, which is not told the size of the bias."""
    return _convolution_backward([*shapes[:3], (), *shapes[3:]], [*arguments[:3], None, *arguments[3:]])


def _attention(shapes: Shapes, _: Sequence[Any]) -> int:
    scores, values = _attention_products(shapes, 0)
    return scores + values


def _attention_backward(shapes: Shapes, _: Sequence[Any]) -> int:
    scores, values = _attention_products(shapes, 1)
    return 3 * scores + 2 * values  # the scores are computed once more


def _attention_products(shapes: Shapes, first: int) -> tuple[int, int]:
    """Returns the multiply-accumulates of query by key, and of the scores by value."""
    query, key, value = (_shape(shapes, first + i) for i in range(3))
    return math.prod(query) * key[-2], math.prod(query[:-1]) * math.prod(value[-2:])


def _recurrent_layer(shapes: Shapes, _: Sequence[Any]) -> int:
    return math.prod(_shape(shapes, 0)[:-1]) * (math.prod(_shape(shapes, 1)) + math.prod(_shape(shapes, 2)))


def _native_attention(shapes: Shapes, _: Sequence[Any], weights: Sequence[int] = (5, 7)) -> int:
    """Counts self-attention: its two projections, and the scores by keys and by values."""
    batch, length, width = _shape(shapes, 0)
    projections = sum(math.prod(_shape(shapes, i)) for i in weights)
    return batch * length * projections + 2 * batch * length * length * width


def _encoder_layer(shapes: Shapes, arguments: Sequence[Any]) -> int:
    return _native_attention(shapes, arguments, (3, 5, 14, 16))


def _shape(shapes: Shapes, index: int) -> Sequence[int]:
    if not shapes[index]:
        raise ValueError(f"argument {index} has no shape")
    return shapes[index]


_FORMULAS: dict[str, _Formula] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm"), _matrices(0, 1)),
    **dict.fromkeys(("addmm", "addbmm", "baddbmm", "addmv", "_addmm_activation"), _matrices(1, 2)),
    **dict.fromkeys(("linear", "mkldnn_linear"), _linear),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _convolution),
    "convolution_backward": _convolution_backward,
    "convolution_backward_overrideable": _convolution_backward_overrideable,
    "mkldnn_rnn_layer": _recurrent_layer,
    "mkldnn_rnn_layer_backward": lambda shapes, arguments: 2 * _recurrent_layer(shapes, arguments),
    "_native_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
_DEVICES = ("flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")
for _kind in ("flash_attention_for_cpu", *_DEVICES):
    _FORMULAS[f"_scaled_dot_product_{_kind}"] = _attention
    _FORMULAS[f"_scaled_dot_product_{_kind}_backward"] = _attention_backward

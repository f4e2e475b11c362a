"""What operators return, as tensors without memory.

Of the products of integer models this is the definition, which ``operators`` and ``recurrence`` register with torch. Of
common operators of torch it is a rule beside torch's own way, the meta device, which is slow and at first imports the
compiler. Such a rule says nothing (None) where it is not sure; torch then does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..nn.products import ConvolutionGeometry
from .names import CONVOLUTION, FILTER, GROUPED, LINEAR, MATMUL, RECURRENCE

Bound = Mapping[str, Any]

_ELEMENTWISE = """
relu relu6 leaky_relu elu gelu silu mish hardtanh hardswish hardsigmoid sigmoid tanh softplus exp log neg abs sqrt rsqrt
clamp clamp_min clamp_max alias detach batch_norm instance_norm
"""


def returned_by_rule(operator: str, bound: Bound) -> list[Tensor] | None:
    """Returns what an operator returns, on the meta device; None where no rule says it.

    Args:
        operator: its name; ``check_call`` has seen it.
        bound: its arguments by name, in the order of its schema; tensors are on the meta device.

    Raises:
        RuntimeError, ValueError: if the arguments do not belong together.
    """
    product = _PRODUCTS.get(operator)
    rule = _RULES.get(operator)
    returned = product(*bound.values()) if product is not None else None if rule is None else rule(bound)
    return [returned] if isinstance(returned, Tensor) else None if returned is None else list(returned)


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Does what ``torch.broadcast_shapes`` does, whose first call imports sympy.

    Raises:
        ValueError: if the shapes do not broadcast.
    """
    rank = max(map(len, shapes), default=0)
    columns = list(zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True))
    sizes = [next((n for n in column if n != 1), 1) for column in columns]
    if any(n not in (1, size) for column, size in zip(columns, sizes, strict=True) for n in column):
        raise ValueError(f"the shapes {' and '.join(str(tuple(shape)) for shape in shapes)} do not go together")
    return tuple(sizes)


def linear(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    """Returns what ``integer_linear`` does."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """Returns what ``integer_convolution`` does."""
    return _image(x, weight, x.dtype, *arguments)


def matmul(a: Tensor, b: Tensor, *_: object) -> Tensor:
    """Returns what ``integer_matmul`` does."""
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=torch.float32)


def filtered(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    """Returns what ``integer_filter`` does."""
    return _image(x, weight, torch.float32, *arguments)


def grouped(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    """Returns what ``integer_grouped`` does."""
    return x.new_empty((x.shape[0], weight.shape[2]), dtype=torch.float32)


def recurrence(
    x: Tensor,
    w_input: Tensor,
    w_hidden: Tensor,
    b_input: Tensor | None,
    b_hidden: Tensor | None,
    w_projection: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what ``integer_recurrence`` does."""
    shapes = ((x.shape[0], h.shape[1]), h.shape, (0,) if c is None else c.shape)
    y, last, cell = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return y, last, cell


def _image(x: Tensor, weight: Tensor, dtype: torch.dtype, *arguments: Any) -> Tensor:
    """Returns a convolution's (N, channels, *output), which lies in memory as ``x`` does."""
    geometry = ConvolutionGeometry.of(*arguments[:6])
    images, channels, *size = geometry.output_shape(x.shape, weight.shape)
    if not kernels.has_channels_last(x):
        return x.new_empty((images, channels, *size), dtype=dtype)
    return x.new_empty((images, *size, channels), dtype=dtype).movedim(-1, 1)


def _same(bound: Bound) -> Tensor | None:
    x = bound["self"] if "self" in bound else bound["input"]
    return x if x.is_floating_point() else None


def _broadcast(bound: Bound, dtype: torch.dtype | None = None) -> Tensor | None:
    operands = [bound["self"], bound["other"]]
    tensors = [each for each in operands if isinstance(each, Tensor)]
    if not all(each.is_floating_point() for each in tensors) or not tensors:
        return None
    shape = broadcast(*(each.shape for each in tensors))
    return torch.empty(shape, dtype=dtype or torch.result_type(*operands), device="meta")


def _compared(bound: Bound) -> Tensor | None:
    return _broadcast(bound, torch.bool)


def _masked(bound: Bound) -> Tensor | None:
    x, mask = bound["self"], bound["mask"]
    fits = mask.dtype == torch.bool and broadcast(x.shape, mask.shape) == x.shape
    return x if fits and x.is_floating_point() else None


def _concatenated(bound: Bound) -> Tensor | None:
    tensors, dim = bound["tensors"], bound["dim"]
    first = tensors[0] if tensors else None
    if first is None or not first.dim() or not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    rest = {(each.dtype, each.shape[:dim], each.shape[dim + 1 :]) for each in tensors}
    if len(rest) > 1:
        return None
    size = sum(each.shape[dim] for each in tensors)
    return first.new_empty((*first.shape[:dim], size, *first.shape[dim + 1 :]))


def _stacked(bound: Bound) -> Tensor | None:
    tensors, dim = bound["tensors"], bound["dim"]
    if len({(each.dtype, each.shape) for each in tensors}) != 1:
        return None
    rank = tensors[0].dim() + 1
    if not -rank <= dim < rank:
        return None
    shape = list(tensors[0].shape)
    shape.insert(dim % rank, len(tensors))
    return tensors[0].new_empty(shape)


def _mean(bound: Bound) -> Tensor | None:
    x, dims = bound["self"], bound["dim"]
    dims = [dims] if isinstance(dims, int) else dims
    if not x.is_floating_point() or bound["dtype"] is not None or not dims:
        return None
    if not all(-x.dim() <= dim < x.dim() for dim in dims) or len({dim % x.dim() for dim in dims}) < len(dims):
        return None
    gone = {dim % x.dim() for dim in dims}
    sizes = [1 if dim in gone else n for dim, n in enumerate(x.shape) if bound["keepdim"] or dim not in gone]
    return x.new_empty(sizes)


def _pooled(bound: Bound) -> Tensor | None:
    x, size = bound["self"], bound["output_size"]
    if isinstance(size, int) or x.dim() not in (3, 4) or len(size) != 2 or not x.is_floating_point() or min(size) < 1:
        return None
    return x.new_empty((*x.shape[:-2], *size))


def _max_pooled(bound: Bound) -> Tensor | None:
    x = bound["self"]
    lists = [bound["kernel_size"], bound["stride"] or bound["kernel_size"], bound["padding"], bound["dilation"]]
    lists = [[each] if isinstance(each, int) else each for each in lists]
    if (
        x.dim() != 4
        or bound["ceil_mode"]
        or not x.is_floating_point()
        or any(len(each) not in (1, 2) for each in lists)
    ):
        return None
    windows = list(zip(*(each * 2 if len(each) == 1 else each for each in lists), strict=True))
    if any(k < 1 or s < 1 or d < 1 or not 0 <= p <= k // 2 for k, s, p, d in windows) or 0 in x.shape:
        return None
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, (k, s, p, d) in zip(x.shape[2:], windows, strict=True)]
    return x.new_empty((*x.shape[:2], *sizes)) if min(sizes) > 0 else None


def _layer_norm(bound: Bound) -> Tensor | None:
    x, shape = bound["input"], tuple(bound["normalized_shape"])
    parts = (bound["weight"], bound["bias"])
    fits = shape and tuple(x.shape[-len(shape) :]) == shape
    alike = all(each is None or (tuple(each.shape) == shape and each.dtype == x.dtype) for each in parts)
    return x if fits and alike and x.is_floating_point() else None


def _group_norm(bound: Bound) -> Tensor | None:
    x, groups = bound["input"], bound["num_groups"]
    if x.dim() < 2 or not x.is_floating_point() or groups < 1 or x.shape[1] % groups:
        return None
    wanted = (tuple(x.shape[1:2]), x.dtype)
    parts = (bound["weight"], bound["bias"])
    return x if all(each is None or (tuple(each.shape), each.dtype) == wanted for each in parts) else None


def _attention(bound: Bound) -> Tensor | None:
    query, key, value = (bound[name] for name in ("query", "key", "value"))
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.dtype == key.dtype == value.dtype
    if not alike or bound["enable_gqa"] or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return None
    mask = bound["attn_mask"]
    scores = (*query.shape[:-1], key.shape[-2])
    if mask is not None and broadcast(mask.shape, scores) != scores:
        return None
    return query.new_empty((*query.shape[:-1], value.shape[-1])) if query.is_floating_point() else None


def _prelu(bound: Bound) -> Tensor | None:
    x, weight = bound["self"], bound["weight"]
    wanted = (1, x.shape[1]) if x.dim() > 1 else (1,)
    return x if weight.dim() == 1 and weight.shape[0] in wanted and weight.dtype == x.dtype else None


_RULES: dict[str, Callable[[Bound], Tensor | None]] = {
    **{f"aten.{name}.default": _same for name in _ELEMENTWISE.split()},
    "aten.pow.Tensor_Scalar": _same,
    **{f"aten.{name}.Tensor": _broadcast for name in ("add", "sub", "mul", "div", "rsub")},
    **{f"aten.{name}.Scalar": _broadcast for name in ("add", "sub", "mul", "div", "rsub")},
    **{
        f"aten.{name}.{kind}": _compared
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind in ("Tensor", "Scalar")
    },
    "aten.masked_fill.Scalar": _masked,
    "aten.cat.default": _concatenated,
    "aten.stack.default": _stacked,
    "aten.mean.dim": _mean,
    "aten.adaptive_avg_pool2d.default": _pooled,
    "aten.max_pool2d.default": _max_pooled,
    "aten.layer_norm.default": _layer_norm,
    "aten.group_norm.default": _group_norm,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.prelu.default": _prelu,
}
_PRODUCTS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    LINEAR: linear,
    CONVOLUTION: convolution,
    MATMUL: matmul,
    FILTER: filtered,
    GROUPED: grouped,
    RECURRENCE: recurrence,
}

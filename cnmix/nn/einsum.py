"""Sums of products over named dimensions as one batched product."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .function_calls import Call


def einsum(call: Call, equation: Any, *operands: Any) -> Any:
    """``torch.einsum`` of two operands; others stay float, as do equations in which nothing is summed."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(isinstance(each, Tensor) for each in operands):
        return NotImplemented
    terms = _parse(equation, operands)
    return NotImplemented if terms is None else _contract(call, *operands, *terms)


def tensordot(call: Call, a: Tensor, b: Tensor, dims: Any = 2, *rest: Any, **others: Any) -> Any:
    """``torch.tensordot``."""
    if rest or others or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return NotImplemented
    if isinstance(dims, int):
        pairs = [*range(a.dim() - dims, a.dim())], [*range(dims)]
    elif isinstance(dims, (list, tuple)) and len(dims) == 2 and all(isinstance(each, (list, tuple)) for each in dims):
        pairs = [each % a.dim() for each in dims[0]], [each % b.dim() for each in dims[1]]
    else:
        return NotImplemented
    if len(pairs[0]) != len(pairs[1]) or a.dim() + b.dim() > len(string.ascii_letters):
        return NotImplemented
    left, right = string.ascii_letters[: a.dim()], list(string.ascii_letters[a.dim() : a.dim() + b.dim()])
    for i, j in zip(*pairs, strict=True):
        right[j] = left[i]
    kept = [name for i, name in enumerate(left) if i not in pairs[0]]
    kept += [name for j, name in enumerate(right) if j not in pairs[1]]
    return _contract(call, a, b, left, "".join(right), "".join(kept))


def _parse(equation: str, operands: Sequence[Tensor]) -> tuple[str, str, str] | None:
    """Returns the names of the dimensions of both operands and of the result; None where torch is to complain."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [name for name in string.ascii_letters if name not in equation]
    broadcast = ""
    for number, (term, operand) in enumerate(zip(terms, operands, strict=False)):
        if "..." in term:
            named = operand.dim() - len(term.replace("...", ""))
            if term.count(".") != 3 or not 0 <= named <= len(free):
                return None
            letters = "".join(free[:named])[::-1]  # aligned at the last dimension, as broadcasting is
            terms[number] = term.replace("...", letters)
            broadcast = max(broadcast, letters, key=len)
    if not arrow:
        names = "".join(terms)
        result = broadcast + "".join(sorted(name for name in {*names} - {*broadcast} if names.count(name) == 1))
    result = result.replace("...", broadcast)
    fits = len(terms) == 2 and all(len(term) == each.dim() for term, each in zip(terms, operands, strict=True))
    known = {*"".join(terms)}
    if not fits or not {*result} <= known or not all(name in string.ascii_letters for name in known):
        return None
    return terms[0], terms[1], result


def _contract(call: Call, a: Tensor, b: Tensor, left: str, right: str, result: str) -> Any:
    sizes = dict(zip(left, a.shape, strict=True))
    repeated = any(len({*names}) < len(names) for names in (left, right, result))
    if repeated or any(sizes.setdefault(name, size) != size for name, size in zip(right, b.shape, strict=True)):
        return NotImplemented  # diagonals, and dimensions of size 1 that are broadcast
    batch = [name for name in left if name in right and name in result]
    summed = [name for name in left if name in right and name not in result]
    rows = [name for name in left if name not in right and name in result]
    columns = [name for name in right if name not in left and name in result]
    if not summed:
        return NotImplemented
    a, left = _sum_away(a, left, {*right, *result})
    b, right = _sum_away(b, right, {*left, *result})
    matrices = (
        _as_matrices(a, left, batch, rows, summed, sizes),
        _as_matrices(b, right, batch, summed, columns, sizes),
    )
    y = call.matmul(*matrices)
    if y is NotImplemented:
        return y
    names = [*batch, *rows, *columns]
    y = y.reshape([sizes[name] for name in names])
    return y.permute([names.index(name) for name in result])


def _sum_away(x: Tensor, names: str, used: set[str]) -> tuple[Tensor, str]:
    """Sums over the dimensions that nothing else has."""
    alone = [dim for dim, name in enumerate(names) if name not in used]
    return (x.sum(alone), "".join(name for name in names if name in used)) if alone else (x, names)


def _as_matrices(
    x: Tensor, names: str, batch: list[str], rows: list[str], columns: list[str], sizes: dict[str, int]
) -> Tensor:
    """Returns ``x`` as (*batch, rows, columns), where it can as a view."""
    ordered = x.permute([names.index(name) for name in (*batch, *rows, *columns)])
    shape = [sizes[name] for name in batch]
    return ordered.reshape(*shape, math.prod(sizes[n] for n in rows), math.prod(sizes[n] for n in columns))

"""Sums of products over named dimensions as one batched product."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .function_calls import Call


def einsum(call: Call, equation: Any, *operands: Any) -> Any:
    """``torch.einsum``, of more than two operands from left to right; where nothing is summed it stays float."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) < 2 or not all(isinstance(each, Tensor) for each in operands):
        return NotImplemented
    parsed = _parse(equation, operands)
    if parsed is None:
        return NotImplemented
    terms, result = parsed
    if len(operands) == 2:
        return _contract(call, operands[0], operands[1], terms[0], terms[1], result)
    x, names = operands[0], terms[0]
    for number, (other, term) in enumerate(zip(operands[1:], terms[1:], strict=True)):
        rest = {*result}.union(*terms[number + 2 :])
        kept = "".join(name for name in dict.fromkeys(names + term) if name in rest) if terms[number + 2 :] else result
        part = Call(call.module, call.products, f"{call.place}.{number}")
        y = _contract(part, x, other, names, term, kept)
        x = torch.einsum(f"{names},{term}->{kept}", x, other) if y is NotImplemented else y
        names = kept
    return x


def tensordot(call: Call, a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Any:
    """``torch.tensordot``."""
    if out is not None or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return NotImplemented
    dims = dims.tolist() if isinstance(dims, Tensor) else dims
    if isinstance(dims, int):
        pairs = [*range(a.dim() - dims, a.dim())], [*range(dims)]
    elif isinstance(dims, (list, tuple)) and len(dims) == 2 and all(isinstance(each, (list, tuple)) for each in dims):
        pairs = [*dims[0]], [*dims[1]]
    else:
        return NotImplemented
    if len(pairs[0]) != len(pairs[1]) or a.dim() + b.dim() > len(string.ascii_letters):
        return NotImplemented
    for x, chosen in zip((a, b), pairs, strict=True):
        if not all(-x.dim() <= each < x.dim() for each in chosen):
            return NotImplemented
        chosen[:] = [each % x.dim() for each in chosen]
        if len({*chosen}) < len(chosen):
            return NotImplemented
    left, right = string.ascii_letters[: a.dim()], list(string.ascii_letters[a.dim() : a.dim() + b.dim()])
    for i, j in zip(*pairs, strict=True):
        right[j] = left[i]
    kept = [name for i, name in enumerate(left) if i not in pairs[0]]
    kept += [name for j, name in enumerate(right) if j not in pairs[1]]
    return _contract(call, a, b, left, "".join(right), "".join(kept))


def _parse(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """Returns the names of the dimensions of each operand, and of the result; None where torch is to complain."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        return None
    free = [name for name in string.ascii_letters if name not in equation]
    broadcast = ""
    for number, (term, operand) in enumerate(zip(terms, operands, strict=True)):
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
    known = {*"".join(terms)}
    named = all(len(term) == each.dim() for term, each in zip(terms, operands, strict=True))
    if not named or not {*result} <= known or len({*result}) < len(result) or not known <= {*string.ascii_letters}:
        return None
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for name, size in zip(term, operand.shape, strict=True):
            if size != 1 and sizes.setdefault(name, size) != size:
                return None
    return terms, result


def _contract(call: Call, a: Tensor, b: Tensor, left: str, right: str, result: str) -> Any:
    if any(len({*names}) < len(names) for names in (left, right)):
        return NotImplemented  # diagonals
    a, left = _squeeze(a, left, dict(zip(right, b.shape, strict=True)))
    b, right = _squeeze(b, right, dict(zip(left, a.shape, strict=True)))
    sizes = {**dict(zip(left, a.shape, strict=True)), **dict(zip(right, b.shape, strict=True))}
    batch = [name for name in left if name in right and name in result]
    summed = [name for name in left if name in right and name not in result]
    rows = [name for name in left if name not in right and name in result]
    columns = [name for name in right if name not in left and name in result]
    if not summed or any(a.shape[left.index(name)] != b.shape[right.index(name)] for name in (*batch, *summed)):
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


def _squeeze(x: Tensor, names: str, others: Mapping[str, int]) -> tuple[Tensor, str]:
    """Takes dimensions of size 1 away that the other operand is to be broadcast over."""
    gone = [dim for dim, name in enumerate(names) if x.shape[dim] == 1 and others.get(name, 1) != 1]
    return x.squeeze(gone), "".join(name for dim, name in enumerate(names) if dim not in gone)


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

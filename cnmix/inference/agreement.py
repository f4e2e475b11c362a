"""Whether two ways to compute a model agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def copied(inputs: Any) -> Any:
    """Returns inputs that a model may write to; what is one tensor stays one."""
    copies = {id(x): x.clone() for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)}
    return pytree.tree_map(lambda x: copies.get(id(x), x), inputs)


def is_same(expected: Any, found: Tensor) -> bool:
    """Whether two results are the same to the bit; any NaN is as good as another."""
    alike = isinstance(expected, Tensor) and expected.shape == found.shape and expected.dtype == found.dtype
    return alike and bool(((expected == found) | (expected != expected) & (found != found)).all())


def is_close(expected: Any, found: Tensor) -> bool:
    """Whether two results in float are the same but for rounding."""
    if is_same(expected, found):
        return True
    if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return False
    largest = expected.nan_to_num().abs().max().item()
    return torch.allclose(expected, found, rtol=1e-3, atol=1e-4 * largest, equal_nan=True)

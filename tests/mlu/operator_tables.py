"""How the tables of operators are written: a row is a name, a call, and what its tensors are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Draw(NamedTuple):
    """What a tensor is drawn from."""

    kind: str
    shape: tuple[int, ...]
    high: int = 0

    def tensor(self, generator: torch.Generator, dtype: torch.dtype, strided: bool) -> Tensor:
        """Draws it on the host; ``strided`` is every second element of a longer one."""
        shape = (*self.shape[:-1], 2 * self.shape[-1]) if strided and self.shape else self.shape
        if self.kind == "integers":
            drawn = torch.randint(0, self.high, shape, generator=generator)
        elif self.kind == "flags":
            drawn = torch.rand(shape, generator=generator) < 0.5
        elif self.kind == "units":
            drawn = torch.rand(shape, generator=generator).mul_(0.9).add_(0.05).to(dtype)
        elif self.kind == "positives":
            drawn = torch.rand(shape, generator=generator).mul_(3).add_(0.1).to(dtype)
        elif self.kind == "definite":
            root = torch.randn(self.shape, generator=generator)
            return (root @ root.mT + torch.eye(self.shape[-1])).to(dtype)
        else:
            drawn = torch.randn(shape, generator=generator).to(dtype)
        return drawn[..., ::2] if strided and self.shape else drawn


class Row(NamedTuple):
    """An operator: its call, and the tensors that it gets."""

    name: str
    call: Callable[..., Any]
    draws: tuple[Draw, ...]


def row(name: str, call: Callable[..., Any], *draws: Draw) -> Row:
    return Row(name, call, draws)


def normal(*shape: int) -> Draw:
    return Draw("normal", shape)


def units(*shape: int) -> Draw:
    """Between 0 and 1, without them."""
    return Draw("units", shape)


def positives(*shape: int) -> Draw:
    return Draw("positives", shape)


def definite(*shape: int) -> Draw:
    """Symmetric matrices with positive eigenvalues."""
    return Draw("definite", shape)


def integers(high: int, *shape: int) -> Draw:
    """From 0 to below ``high``."""
    return Draw("integers", shape, high)


def flags(*shape: int) -> Draw:
    return Draw("flags", shape)

"""The operators that this project's models use most: forward and gradients on a card have the host's bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from operator_tables import Row
from operators_of_elements import ELEMENTS
from operators_of_networks import NETWORKS
from operators_of_shapes import SHAPES
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cnmix.torch_mlu.observation import OperatorObserver

TABLE = [*ELEMENTS, *SHAPES, *NETWORKS]

# A device's cell is a fused one, which adds in another order.
ROUNDED = {"gru_cell"}
# PyTorch takes another formula for its gradient while something watches operators.
ROUNDED_WHERE_WATCHED = {*ROUNDED, "prod"}

VARIANTS = {
    "float32": (torch.float32, False),
    "strided": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float64": (torch.float64, True),
}


def run(operator: Row, variant: str, device: str) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """Returns results, gradients of the inputs, and the inputs as they are afterwards."""
    dtype, strided = VARIANTS[variant]
    generator = torch.Generator().manual_seed(0)
    leaves = [draw.tensor(generator, dtype, strided) for draw in operator.draws]
    inputs = []
    for leaf in leaves:
        # The same strides on both devices: .to() makes them dense.
        placed = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device).copy_(leaf)
        wants_gradient = leaf.is_floating_point() and not operator.name.rstrip("0123456789").endswith("_")
        inputs.append(placed.requires_grad_(wants_gradient))
    torch.manual_seed(1)
    results = tree_leaves(operator.call(*inputs))
    differentiable = [each for each in results if isinstance(each, Tensor) and each.requires_grad]
    wanted = [each for each in inputs if each.requires_grad]
    gradients = []
    if differentiable and wanted:
        weights = [torch.linspace(-1, 2, each.numel()).reshape(each.shape).to(each) for each in differentiable]
        found = torch.autograd.grad(differentiable, wanted, weights, allow_unused=True)
        gradients = [each for each in found if each is not None]
    return results, gradients, [each.detach() for each in inputs]


def assert_alike(card: Sequence[Any], host: Sequence[Any], rounded: bool) -> None:
    assert len(card) == len(host)
    for a, b in zip(card, host, strict=True):
        if not isinstance(a, Tensor):
            assert a == b
            continue
        assert a.device == torch.device("mlu:0")
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        close = {
            "rtol": 1e-2 if b.dtype == torch.bfloat16 else 1e-5,
            "atol": 1e-2 if b.dtype == torch.bfloat16 else 1e-6,
        }
        exact = {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(a.detach().cpu(), b.detach(), equal_nan=True, **(close if rounded else exact))


def test_there_are_at_least_200_distinct_operators() -> None:
    names = {operator.name.split(".")[0] for operator in TABLE}
    assert len(names) >= 200
    assert len({operator.name for operator in TABLE}) == len(TABLE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("operator", TABLE, ids=lambda operator: operator.name)
def test_an_operator_is_the_hosts(operator: Row, variant: str) -> None:
    try:
        host = run(operator, variant, "cpu")
    except (RuntimeError, NotImplementedError):  # the host has none for the dtype: nor has the card
        with pytest.raises((RuntimeError, NotImplementedError)):
            run(operator, variant, "mlu")
        assert variant != "float32"
        return
    for found, expected in zip(run(operator, variant, "mlu"), host, strict=True):
        assert_alike(found, expected, operator.name in ROUNDED)


@pytest.mark.parametrize("operator", TABLE, ids=lambda operator: operator.name)
def test_a_watched_operator_is_the_hosts(operator: Row) -> None:
    host = run(operator, "float32", "cpu")
    with OperatorObserver():
        card = run(operator, "float32", "mlu")
    for found, expected in zip(card, host, strict=True):
        assert_alike(found, expected, operator.name in ROUNDED_WHERE_WATCHED)

"""A module whose forward pass is one function of its parameters, and what to hold that against."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import cnmix
from cnmix.fixed_point import absmax, choose_position
from cnmix.kernels import reference

INT8 = {"bitwidth": 8, "max_bitwidth": 8}
INT31 = {"bitwidth": 31, "max_bitwidth": 31}


class Calls(nn.Module):
    """Calls a function with its parameters, which are drawn in these shapes."""

    def __init__(self, function: Callable[..., Any], *shapes: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.function = function
        self.operands = nn.ParameterList([torch.randn(*shape, generator=generator) for shape in shapes])

    def forward(self) -> Any:
        return self.function(*self.operands)


def places(model: nn.Module) -> list[str]:
    """Returns the names of the functions' products that have been trained."""
    return [name for name in cnmix.state_dict(model)["models"][0]["modules"] if ".." in name]


def run(model: nn.Module) -> list[Tensor | None]:
    """Returns the output, and the gradients of all parameters for a gradient that was drawn."""
    y = model()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    return [y.detach(), *torch.autograd.grad(y, list(model.parameters()), grad, allow_unused=True)]


def float_and_core(
    function: Callable[..., Any], *shapes: Sequence[int], **settings: Any
) -> tuple[list[Any], list[Any], list[str]]:
    """Returns what ``run`` does in float32 and on the core, and the places; a message in place of what raised one."""
    results: list[list[Any]] = []
    for converted in (False, True):
        model = Calls(function, *shapes)
        if converted:
            cnmix.initialize(model, **settings or INT31)
        try:
            results.append(run(model))
        except Exception as error:
            results.append([f"{type(error).__name__}: {error}"])
    return results[0], results[1], places(model)


def assert_close(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    """Asserts that int31 is float32 but for its rounding."""
    for a, b in zip(ours, theirs, strict=True):
        if b is None or a is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, equal_nan=True)


def product_of_integers(function: Callable[..., Tensor], a: Tensor, b: Tensor) -> list[Tensor]:
    """Returns what ``run`` does for a function of two operands in int8.

    It computes in float64, which holds the sums of integers exactly. Each operand has the position that fits it; each
    product is rounded once, to float32.
    """

    def quantized(x: Tensor) -> tuple[Tensor, int]:
        position = choose_position(absmax(x), 8)
        return reference.quantize(x, 8, position).double(), position

    (qa, pa), (qb, pb) = quantized(a.detach()), quantized(b.detach())
    y = function(qa.requires_grad_(), qb.requires_grad_())
    qg, pg = quantized(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)))
    grad_a, grad_b = torch.autograd.grad(y, (qa, qb), qg)
    scaled = ((y.detach(), pa + pb), (grad_a, pg + pb), (grad_b, pg + pa))
    return [torch.ldexp(sums.float(), torch.tensor(position)) for sums, position in scaled]

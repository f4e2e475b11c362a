"""Batch norms in evaluation as stages of chains: what the kernel of this build of torch computes, to the bit.

The kernel computes ``x * factor + term`` in each channel, from factors and terms that it makes in float32 steps of its
own. How often it rounds is a matter of the compiler and the processor. So the kernel itself is asked, for all three.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .nodes import Stage
from .program import Program, Ref, Spec, Step, find_operator, resolved

_BATCH_NORM, _IN_EVALUATION = "aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"
_ARGUMENTS = {_BATCH_NORM: 9, _IN_EVALUATION: 7}
_ATTEMPTS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.1,
    -0.7,
    3.3,
    -10.7,
    123.4,
    -5678.9,
    1e-20,
    -1e-20,
    3e38,
    -3e38,
    torch.inf,
    torch.nan,
)


def norm_stages(program: Program) -> dict[int, list[Stage]]:
    """Returns the stages that compute what batch norms do, by the places of their steps.

    Those of constant statistics and parameters are in it, unless the kernel computes them in another way.
    """
    found = {}
    for place, step in enumerate(program.steps):
        stages = _stages(step, program) if step.operator in _ARGUMENTS else None
        if stages is not None:
            found[place] = stages
    return found


def _stages(step: Step, program: Program) -> list[Stage] | None:
    arguments, outputs = step.arguments, step.outputs
    if step.keywords or len(arguments) != _ARGUMENTS[step.operator] or outputs[0] is None or any(outputs[1:]):
        return None
    x, *parameters = arguments[:5]
    if not isinstance(x, Ref) or any(
        isinstance(each, Ref) and each.name not in program.constants for each in parameters
    ):
        return None
    weight, bias, mean, variance = resolved(parameters, program.constants)
    spec = program.specs.get(x.name)
    if spec is None or mean is None or variance is None or not _follows_memory(spec):
        return None
    known = [each for each in (weight, bias, mean, variance) if each is not None]
    if any(each.dtype != torch.float32 or each.shape != spec.shape[1:2] for each in known):
        return None
    if step.operator == _BATCH_NORM and arguments[5]:  # it takes the statistics of the batch
        return None

    def normalized(x: Tensor, bias: Tensor | None, mean: Tensor) -> Tensor:
        made = find_operator(step.operator)(x, weight, bias, mean, variance, *arguments[5:])
        return made if isinstance(made, Tensor) else made[0]

    with torch.no_grad():
        ones = torch.ones((1, len(mean)), dtype=torch.float32, device="cpu")
        factor = normalized(ones, None, torch.zeros_like(mean))
        # A product of -0 changes no term, not even one that is -0.
        term = normalized(torch.copysign(torch.zeros_like(ones), -factor), bias, mean)
        once = _rounds_once()
        if once is None or not bool((factor.isfinite() & term.isfinite()).all()):
            return None
        attempts = torch.tensor(_ATTEMPTS, dtype=torch.float32, device="cpu")[:, None] * ones
        computed = fused_multiply_add(attempts, factor, term) if once else attempts * factor + term
        if not _same(normalized(attempts, bias, mean), computed):
            return None
    factor, term = factor[0], term[0]
    return [Stage("multiply_add", (factor, term))] if once else [Stage("multiply", factor), Stage("add", term)]


def _follows_memory(spec: Spec) -> bool:
    """Whether the kernel takes a tensor as it lies; all others it computes in another way."""
    if spec.dtype != torch.float32 or len(spec.shape) < 2 or 0 in spec.shape:
        return False
    x = torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device="meta")
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return x.is_contiguous() or x.is_contiguous(memory_format=last)


@cache
def _rounds_once() -> bool | None:
    """Whether the kernel rounds ``x * factor + term`` once; None if not in every layout, and not twice either."""
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    factor, term = draw(67), draw(67)  # registers and what fills none
    # The square root of 1 is 1: these are the kernel's own factor and term.
    statistics = torch.zeros_like(term), torch.ones_like(term)
    once = twice = True
    for shape, order in (
        ((9, 67), torch.contiguous_format),
        ((2, 67, 41), torch.contiguous_format),
        ((2, 67, 5, 9), torch.contiguous_format),
        ((2, 67, 5, 9), torch.channels_last),
        ((2, 67, 2, 3, 5), torch.channels_last_3d),
    ):
        x = draw(*shape).contiguous(memory_format=order)
        found = torch.ops.aten._native_batch_norm_legit_no_training(x, factor, term, *statistics, 0.1, 0.0)[0]
        by, plus = (each.view(-1, *(1,) * (len(shape) - 2)) for each in (factor, term))
        once = once and _same(found, fused_multiply_add(x, by, plus))
        twice = twice and _same(found, x * by + plus)
    return once if once or twice else None


def fused_multiply_add(x: Tensor, factor: Tensor, term: Tensor) -> Tensor:
    """Returns ``x * factor + term`` of float32 tensors, rounded once.

    float64 holds the product. Where it does not hold the sum, the last bit of the sum is made odd, so that rounding it
    to float32 is rounding the exact one.
    """
    product, term = x.double() * factor, term.double()
    total = product + term
    part = total - product
    missing = (product - (total - part)) + (term - part)
    even = total.view(torch.int64) & 1 == 0
    beyond = torch.nextafter(total, torch.copysign(torch.full_like(total, torch.inf), missing))
    return torch.where(even & (missing != 0) & total.isfinite(), beyond, total).float()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether tensors have the same bits; any NaN is as good as another."""
    a, b = a.contiguous(), b.contiguous()
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())

"""How much of a model's multiply-accumulates the core computes."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import Batch, Case, loss_of


def _grouped_mm_flop(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    # Rows by experts' weights, or for the gradient of those, columns by rows.
    return 2 * (a[0] * a[1] * b[-1])


def _convolution_backward_flop(grad_output: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    # Each gradient takes what the output took; torch's own counts a group's channels with those of the others.
    transposed, output_mask = args[4], args[7]
    return 2 * math.prod(x if transposed else grad_output) * math.prod(weight[1:]) * sum(output_mask[:2])


_FLOPS = {
    torch.ops.aten._grouped_mm: _grouped_mm_flop,
    torch.ops.aten.convolution_backward: _convolution_backward_flop,
}


def float_macs(model: nn.Module, batch: Batch) -> int:
    """Returns the multiply-accumulates of a forward and backward pass that torch computes in float."""
    counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
    # The other kernels of attention are not counted on a CPU.
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss_of(model, batch).backward()
    return counter.get_total_flops() // 2


def share_on_core(case: Case, model: nn.Module) -> float:
    """Returns the share of multiply-accumulates of forward and backward pass that the core computes.

    Args:
        case: what the model was built from.
        model: converted.
    """
    batch = case.batch()
    return 1 - float_macs(model, batch) / float_macs(case.build(), batch)

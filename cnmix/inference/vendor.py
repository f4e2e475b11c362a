"""From a checkpoint to the state_dict of the vendor's quantized modules."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import modules as quantized
from ..nn import quantized_modules, quantizer_sets
from .freezing import prepare

logger = logging.getLogger("cnmix")

# What quantize_dynamic_mlu replaces, and whose weight and input it quantizes.
_REPLACED = (
    quantized.QuantizedLinear,
    quantized.QuantizedConv1d,
    quantized.QuantizedConv2d,
    quantized.QuantizedConv3d,
)
_MODES = {8: 1, 16: 2}
_FARTHEST = 100  # position whose scale no step in float32 takes out of its range


def vendor_state_dict(model: nn.Module, checkpoint: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns a checkpoint as ``mlu_quantize.quantize_dynamic_mlu(model).load_state_dict`` takes it.

    The keys are those of the plain model, with its float weights, and for each Linear, Conv1d, Conv2d and Conv3d that
    trained in fixed point ``use_symmetry``, ``scale`` and ``quantized_mode``, so that the card multiplies the integers
    that ``load`` has. There are two forms. Where input and weight have one width, 8 or 16 bits, the mode is 1 or 2 and
    the scales are ``2**-position``, of which the card keeps this very position; every version of the vendor's package
    reads that. Other widths are in the form that the later ones (with CNNL) read too: ``scale`` has both widths, and
    ``quantized_mode`` both positions. So are positions beyond 100 or -100, whose scales could leave float32.

    What differs from ``load``: batch norms stay modules, whose float operations round otherwise than a factor and a
    term. Products that the vendor's package does not quantize, of recurrent layers, transposed convolutions, attention
    and functions, are float there, and the log names them. A layer that trained in float has no such keys: give its
    name as "float16" in ``mixed_layer``.

    Args:
        model: a plain model of the checkpoint's architecture; it stays as it is.
        checkpoint: a file that ``cnmix.checkpoint.load`` reads, or what it returned.

    Returns:
        Tensors of the CPU, to save with ``torch.save``.

    Raises:
        ValueError: as ``load`` does, or if a layer does not round to nearest, ties to even.
        RuntimeError: if the weights do not fit.
    """
    prepared = prepare(copy.deepcopy(model), checkpoint)
    state: dict[str, Tensor] = {name: value.detach().cpu() for name, value in prepared.state_dict().items()}
    left: list[str] = []
    for fqn, module in quantized_modules(prepared):
        if type(module) in _REPLACED and fqn:
            state.update({f"{fqn}.{name}": value for name, value in _quantization(fqn, module).items()})
        else:
            left.append(fqn or type(model).__name__)
    functions = [name for name, quantizers in quantizer_sets(prepared) if quantizers.of_function]
    left += [name for name in functions if not name.endswith("value_gradient")]  # of training alone
    if left:
        logger.warning(
            "the vendor's package has no integers for the products of %s, which are float there",
            ", ".join(sorted(left)),
        )
    return state


def _quantization(fqn: str, module: Any) -> dict[str, Tensor]:
    quantizers = module.quantizers
    for operand, quantizer in (("input", quantizers.input), ("weight", quantizers.weight)):
        rounding = quantizer.rounding(training=False)
        if rounding != "nearest_even":
            raise ValueError(
                f"the {operand} of {fqn!r} is rounded by {rounding!r}, and a card rounds to nearest, ties to even: "
                "train with rounding='nearest_even'"
            )
    weight = quantizers.quantize_weight(module.weight, training=False)
    if not weight.finite:
        raise ValueError(f"the weight of {fqn!r} holds NaN or infinity, which no integer stands for: train anew")
    of_input = quantizers.input.state
    if of_input.position is None:
        raise ValueError(f"the input of {fqn!r} was zero throughout training, which gives it no position: train anew")
    scale, mode = scale_and_mode(of_input.bits, of_input.position, weight.bits, weight.position)
    return {
        "use_symmetry": torch.tensor([1]),
        "scale": torch.tensor(scale, dtype=torch.float32),
        "quantized_mode": torch.tensor(mode, dtype=torch.int32),
    }


def scale_and_mode(bits: int, position: int, weight_bits: int, weight_position: int) -> tuple[list[float], list[int]]:
    """Returns ``scale`` and ``quantized_mode`` for the formats of an input and a weight.

    Of a scale the card keeps floor(log2(qmax / scale)) - (bits - 2). Of 2**-position, with qmax just below
    2**(bits - 1), that is the position, and a logarithm in float32 is not so far off that it could be the next.
    """
    positions = [position, weight_position]
    if bits != weight_bits or bits not in _MODES or max(map(abs, positions)) > _FARTHEST:
        return [float(bits), float(weight_bits)], positions
    return [2.0**-each for each in positions], [_MODES[bits]]

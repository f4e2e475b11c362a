"""The vendor's ``torch_mlu.core.mlu_quantize``: adaptive training, and quantization for inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ... import amp
from .quantized.convert import Mapped, add_observer_, convert, copy_of, propagate_qconfig_, swap_module
from .quantized.observer import (
    MLULrnObserver,
    MLUMinMaxObserver,
    MLUNormObserver,
    MLUPerChannelMinMaxObserver,
    mlu_activation_observer_dict,
)
from .quantized.qscheme import ConvQuantifyParams, MatmulQuantifyParams, QConfig, compose_qconfig

__all__ = [
    "ConvQuantifyParams",
    "MLULrnObserver",
    "MLUMinMaxObserver",
    "MLUNormObserver",
    "MLUPerChannelMinMaxObserver",
    "MatmulQuantifyParams",
    "QConfig",
    "adaptive_quantize",
    "add_observer_",
    "compose_qconfig",
    "convert",
    "dequantize",
    "mlu_activation_observer_dict",
    "propagate_qconfig_",
    "quantize_dynamic_mlu",
    "swap_module",
]

Model = TypeVar("Model", bound=nn.Module)


def adaptive_quantize(
    model: Model, steps_per_epoch: int | None = None, bitwidth: int = 8, inplace: bool = False
) -> Model:
    """Prepares a model for training in fixed point with widths that adapt: ``cnmix.initialize`` at level O1.

    Args:
        model: with float32 parameters, on the host or a card.
        steps_per_epoch: training steps in an epoch, which the schedule of updates is written in. None is 10000.
        bitwidth: width that operands start with: 8, 16 or 31.
        inplace: change ``model`` itself, and no copy of it. Build the optimizer from what is returned: one that was
            built before trains the parameters of ``model``, which with a copy are others.

    Returns:
        The model, with the keys and dtypes that its ``state_dict`` had.

    Raises:
        TypeError: if it is no module.
        ValueError: if a setting is out of its range, or the model was quantized before with other settings.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adaptive_quantize takes a torch.nn.Module, got {type(model).__name__}")
    target = model if inplace else copy_of(model)
    amp.initialize(target, None, "O1", bitwidth=bitwidth, steps_per_epoch=steps_per_epoch)
    return target


def dequantize(model: Model) -> Model:
    """Makes a model that ``adaptive_quantize`` prepared a float one again, in place; its parameters stay.

    Returns:
        ``model``.
    """
    return amp.dequantize(model)  # type: ignore[return-value]


def quantize_dynamic_mlu(
    model: Model,
    qconfig_spec: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    mapping: Mapped | None = None,
    inplace: bool = False,
    gen_quant: bool = False,
    mixed_layer: Mapping[str, str] | None = None,
) -> Model:
    """Quantizes Linear and convolutions for inference; the rest stays float.

    With ``gen_quant`` the model measures its inputs: run it on the host with data as it is after preprocessing, and
    save its ``state_dict``. Without, it is the model to load that file into, and to bring to the card, where it
    multiplies integers. On the host both compute in float.

    Args:
        model: with its trained parameters where scales are generated, with any where a file is loaded then.
        qconfig_spec: how scales are measured: ``iteration`` (forward passes that count, 1), ``use_avg`` (False),
            ``data_scale`` (1.0), ``per_channel`` (False), ``method`` ("minmax"); and what the first Conv2d of the model
            does to images in [0, 255] on the card: ``mean`` and ``std``, of images in [0, 1], and ``firstconv``, by
            default whether both are given. Unknown keys are ignored, with a warning.
        dtype: "int8" or "int16"; must be said where scales are generated, and else is of no effect.
        mapping: classes of quantized modules by the exact classes that they take the place of, instead of Linear's and
            the convolutions'; they have ``from_float(module)``.
        inplace: change ``model`` itself, and no copy of it.
        gen_quant: generate scales.
        mixed_layer: another dtype for some modules: ``{"features.0,classifier": "int16"}``, each name with all below
            it; "float16" leaves them float. Say so of the model that loads the file, too.

    Returns:
        The model, in evaluation mode.

    Raises:
        TypeError: if it is no module.
        ValueError: if an argument is wrong, a name of ``mixed_layer`` is none, the first convolution does not fit the
            mean and std, or a Conv3d is to have a scale per channel; ``model`` is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_dynamic_mlu takes a torch.nn.Module, got {type(model).__name__}")
    qconfig = compose_qconfig(qconfig_spec, dtype)
    if gen_quant and dtype is None:
        raise ValueError("quantize_dynamic_mlu with gen_quant=True takes dtype='int8' or dtype='int16'")
    target = model if inplace else copy_of(model)
    propagate_qconfig_(target, qconfig if gen_quant else qconfig._replace(dtype=None), mapping, mixed_layer)
    target.eval()
    if gen_quant:
        add_observer_(target)
    convert(target, mapping, inplace=True)
    return target

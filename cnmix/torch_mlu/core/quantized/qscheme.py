"""What the user says of a quantization: the scheme's dict, parsed, and the widths by name."""

from __future__ import annotations

import difflib
import numbers
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from .observer import MLUMinMaxObserver, MLUPerChannelMinMaxObserver, mlu_activation_observer_dict

BITS = {"int8": 8, "int16": 16}
"""The widths that a model is quantized to, by the name that ``dtype`` takes."""


@dataclass(frozen=True)
class Scheme:
    """How scales are measured, and what the card does to images.

    Attributes:
        iteration: forward passes that the observer of an input counts; later ones are ignored.
        use_avg: take running averages of the bounds that forward passes had, instead of the widest.
        data_scale: factor on the bounds.
        mean: of the data set, for each channel, in [0, 1]; images are in [0, 255] and it is brought there.
        std: likewise, above 0.
        firstconv: whether the first Conv2d subtracts the mean and divides by std, on the card only.
        per_channel: whether each output channel's weights have a scale of their own.
        method: "minmax".
    """

    iteration: int = 1
    use_avg: bool = False
    data_scale: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    firstconv: bool = False
    per_channel: bool = False
    method: str = "minmax"


class QConfig(NamedTuple):
    """How one module is quantized.

    Attributes:
        scheme: how scales are measured.
        dtype: "int8" or "int16"; None for a model that takes its scales from a file.
    """

    scheme: Scheme
    dtype: str | None = None

    @property
    def bits(self) -> int:
        """The width of both operands."""
        return BITS[self.dtype or "int8"]

    def activation(self) -> MLUMinMaxObserver:
        """Returns an observer for the module's inputs."""
        scheme, kind = self.scheme, mlu_activation_observer_dict[self.scheme.method]
        return kind(self.bits, scheme.iteration, scheme.use_avg, scheme.data_scale)

    def weight(self) -> MLUMinMaxObserver:
        """Returns an observer for the module's weight.

        As in the vendor's package, ``data_scale`` is for inputs, and for the weights of single channels.
        """
        if self.scheme.per_channel:
            return MLUPerChannelMinMaxObserver(self.bits, data_scale=self.scheme.data_scale)
        return MLUMinMaxObserver(self.bits)


def compose_qconfig(qconfig_spec: Mapping[str, Any] | None = None, dtype: str | None = None) -> QConfig:
    """Parses what ``quantize_dynamic_mlu`` takes.

    Args:
        qconfig_spec: any of the fields of ``Scheme``; None as a value is the default. ``firstconv`` is by default
            whether mean and std are given. Unknown keys are ignored, with a warning. None is ``{}``.
        dtype: "int8", "int16", or None.

    Raises:
        ValueError: if it is no dict, or a value is out of its range.
    """
    if dtype is not None and dtype not in BITS:
        raise ValueError(f"dtype must be 'int8' or 'int16', got {dtype!r}")
    if qconfig_spec is not None and not isinstance(qconfig_spec, Mapping):
        raise ValueError(
            f"qconfig_spec must be a dict, as {{'use_avg': False, 'data_scale': 1.0}}, or None, got {qconfig_spec!r}"
        )
    given = {name: value for name, value in (qconfig_spec or {}).items() if value is not None}
    known = {each.name for each in fields(Scheme)}
    for name in [name for name in qconfig_spec or {} if name not in known]:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
        warnings.warn(f"qconfig_spec: the key {name!r} is unknown, and ignored; {hint}", stacklevel=3)
        given.pop(name, None)
    for name in ("mean", "std"):
        if name in given:
            given[name] = _numbers(name, given[name])
    given.setdefault("firstconv", "mean" in given and "std" in given)
    scheme = Scheme(**given)
    _check(scheme)
    return QConfig(scheme, dtype)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    try:
        return tuple(torch.as_tensor(values, dtype=torch.float64).reshape(-1).tolist())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"qconfig_spec: {name} must be a list with a number for each channel, got {values!r}"
        ) from error


def _check(scheme: Scheme) -> None:
    for name in ("use_avg", "firstconv", "per_channel"):
        if getattr(scheme, name) not in (True, False):
            raise ValueError(f"qconfig_spec: {name} must be True or False, got {getattr(scheme, name)!r}")
    iteration = scheme.iteration
    if not isinstance(iteration, numbers.Integral) or isinstance(iteration, bool) or iteration < 1:
        raise ValueError(f"qconfig_spec: iteration must be a whole number, at least 1, got {iteration!r}")
    if not isinstance(scheme.data_scale, numbers.Real) or not 0 < scheme.data_scale < float("inf"):
        raise ValueError(f"qconfig_spec: data_scale must be a positive number, got {scheme.data_scale!r}")
    if scheme.method not in mlu_activation_observer_dict:
        raise ValueError(f"qconfig_spec: method must be 'minmax', got {scheme.method!r}")
    if not scheme.firstconv:
        return
    if not scheme.mean or not scheme.std or len(scheme.mean) != len(scheme.std):
        raise ValueError(
            "qconfig_spec: firstconv takes mean and std, lists with a number for each channel, "
            f"got mean={scheme.mean} and std={scheme.std}"
        )
    if not all(0 <= each <= 1 for each in scheme.mean) or not all(0 < each <= 1 for each in scheme.std):
        raise ValueError(
            "qconfig_spec: mean must lie in [0, 1] and std in (0, 1], as of images in [0, 1]; the card has them times "
            f"255; got mean={list(scheme.mean)} and std={list(scheme.std)}"
        )
    if not any(scheme.mean) and all(each == 1 for each in scheme.std):
        warnings.warn(
            "qconfig_spec: firstconv with a mean of 0 and a std of 1 only divides images by 255 on the card",
            stacklevel=4,
        )


@dataclass
class QuantifyParams:
    """The constants of adaptive quantization, as the vendor's package lists them; ``cnmix.QuantizeConfig`` explains.

    Nothing reads them: ``cnmix.QuantizeConfig`` has the same values, and ``cnmix.core`` sets them.
    """

    init_bitwidth: int = 8
    max_bitwidth: int = 31
    quantify_rate: float = 0.01
    alpha: float = 0.04
    beta: float = 0.1
    gamma: float = 2
    delta: float = 100
    th: float = 0.03
    steps_per_epoch: int = 10000

    def set_bitwidth(self, init: int, maximum: int) -> None:
        """Sets the first and the largest width."""
        self.init_bitwidth, self.max_bitwidth = init, maximum

    def set_hyperparam(self, **changes: float) -> None:
        """Sets any of the constants by name.

        Raises:
            ValueError: if there is none of this name.
        """
        for name, value in changes.items():
            if name not in {each.name for each in fields(self)}:
                raise ValueError(f"there is no constant {name!r}")
            setattr(self, name, value)


@dataclass
class ConvQuantifyParams(QuantifyParams):
    """Those of convolutions."""


@dataclass
class MatmulQuantifyParams(QuantifyParams):
    """Those of matrix products."""

    th: float = 0.01

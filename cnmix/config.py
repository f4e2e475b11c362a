"""Settings: frozen dataclasses that check their values and name what is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .fixed_point import ROUNDINGS, Rounding, check_bits

Mode = Literal["adaptive", "fixed_width", "fixed_interval"]
ErrorMeasure = Literal["mean", "l1"]
Product = Literal["convolution", "matmul"]

OPERANDS = ("input", "weight", "grad_output")
"""The operands of a module's products, each with a quantizer of its own."""

# Where the error threshold is left open: catch's ConvQuantifyParams and MatmulQuantifyParams.
_DEFAULT_THRESHOLD: dict[str, float] = {"convolution": 0.03, "matmul": 0.01}


@dataclass(frozen=True)
class QuantizeConfig:
    """How operands are quantized and how their widths adapt.

    The constants and their ranges are those of Cambricon's CNNL user guide (cnnlQuantizeStrategy) and of catch.

    Attributes:
        bitwidth: width that every operand starts with: 8, 16 or 31.
        max_bitwidth: width that none exceeds: 8, 16 or 31.
        mode: "adaptive" (width and interval adapt), "fixed_width" (only the interval adapts) or "fixed_interval"
            (only the width adapts, looked at every ``interval`` steps).
        interval: steps between updates in mode "fixed_interval".
        steps_per_epoch: training forward passes in an epoch. The schedule is written in epochs: an update on every
            step at first, then after an interval that adapts, and once an epoch after the first one.
        quantify_rate: share of the first epoch with an update on every step, in [0, 1].
        threshold: quantization error above which the width grows, in (0, 0.5); None is 0.03 for convolutions and
            0.01 for matrix products.
        alpha: weight of the present position in its moving average, in (0, 0.4).
        beta: numerator of the interval, in (0, 1).
        gamma: steps taken off the interval, in [0, 100].
        delta: weight of the squared error in the interval, in (0, 1000).
        error_measure: "mean" compares the mean magnitudes before and after; "l1" takes the mean magnitude of the
            difference.
        rounding: "nearest_even", "half_up", "half_away" or "stochastic".
        online: update on every step, whatever the schedule says.
        saturation: update early once more than this share of the values since the last update, in [0, 1), lay at the
            limits of the format; None: updates come when they are due.
        narrowing: go back to the next narrower width, not below ``bitwidth``, on an update at which the error there
            would be at most this share of the threshold, in (0, 1); None: widths only grow, as in the original.
        per_entry: in products of batches of matrices, as attention's, give each matrix of the batch a position of its
            own, the one that fits it on every step; the width stays one for all.
        exact_int31: multiply 31-bit operands exactly; the default rounds their sums to float64 on the way.
    """

    bitwidth: int = 8
    max_bitwidth: int = 31
    mode: Mode = "adaptive"
    interval: int = 100
    steps_per_epoch: int = 10_000
    quantify_rate: float = 0.01
    threshold: float | None = None
    alpha: float = 0.04
    beta: float = 0.1
    gamma: float = 2.0
    delta: float = 100.0
    error_measure: ErrorMeasure = "mean"
    rounding: Rounding = "nearest_even"
    online: bool = False
    saturation: float | None = None
    narrowing: float | None = None
    per_entry: bool = False
    exact_int31: bool = False

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # NumPy's numbers would make checkpoints that weights_only refuses
            value = getattr(self, item.name)
            if not isinstance(value, (int, float)) and isinstance(value, numbers.Number) and hasattr(value, "item"):
                object.__setattr__(self, item.name, value.item())
            elif isinstance(value, float):
                object.__setattr__(self, item.name, float(value))
        check_bits(self.bitwidth, "bitwidth")
        check_bits(self.max_bitwidth, "max_bitwidth")
        if self.bitwidth > self.max_bitwidth:
            raise ValueError(
                f"bitwidth {self.bitwidth} is over max_bitwidth {self.max_bitwidth}: lower the one or raise the other"
            )
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("error_measure", self.error_measure, get_args(ErrorMeasure))
        _check_choice("rounding", self.rounding, ROUNDINGS)
        for name in ("interval", "steps_per_epoch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of steps, at least 1, got {value!r}")
        for name in ("online", "per_entry", "exact_int31"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _check_range("quantify_rate", self.quantify_rate, "[", 0, 1, "]")
        if self.threshold is not None:
            _check_range("threshold", self.threshold, "(", 0, 0.5, ")")
        if self.saturation is not None:
            _check_range("saturation", self.saturation, "[", 0, 1, ")")
        if self.narrowing is not None:
            _check_range("narrowing", self.narrowing, "(", 0, 1, ")")
        _check_range("alpha", self.alpha, "(", 0, 0.4, ")")
        _check_range("beta", self.beta, "(", 0, 1, ")")
        _check_range("gamma", self.gamma, "[", 0, 100, "]")
        _check_range("delta", self.delta, "(", 0, 1000, ")")

    def threshold_for(self, product: Product) -> float:
        """Returns the error threshold for this kind of product."""
        return _DEFAULT_THRESHOLD[product] if self.threshold is None else self.threshold

    def replace(self, **changes: Any) -> QuantizeConfig:
        """Returns a copy with these fields changed.

        Raises:
            ValueError: for an unknown field, with the nearest known one, or a value out of its range.
        """
        check_names(changes, (field.name for field in dataclasses.fields(self)), "setting")
        return dataclasses.replace(self, **changes)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizeConfig:
        return self  # frozen, and there are three in each of a model's products


OperandConfigs = Mapping[str, QuantizeConfig]
"""The settings of a module, by operand."""


def check_names(given: Iterable[str] | Mapping[str, Any], valid: Iterable[str], what: str) -> None:
    """Raises ValueError for the first name that is not valid, with the nearest valid one."""
    known = list(valid)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(known)}"
            raise ValueError(f"unknown {what} {name!r}: {hint}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_range(name: str, value: object, opening: str, low: float, high: float, closing: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    inside = number and (
        (low <= value if opening == "[" else low < value)  # type: ignore[operator]
        and (value <= high if closing == "]" else value < high)  # type: ignore[operator]
    )
    if not inside:
        raise ValueError(f"{name} must lie in {opening}{low}, {high}{closing}, got {value!r}")

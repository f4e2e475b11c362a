"""What measures the bounds of a tensor, and makes a scale of them: ``scale = qmax / absmax``."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ....fixed_point import limits


class MLUMinMaxObserver:
    """Keeps the least and the largest value that it saw.

    Args:
        bits: width that the scale is for: 8 or 16.
        iteration: calls that count; None is all.
        use_avg: merge by a running average instead of by the widest bounds. As in the vendor's package the call that
            comes ``n``-th is averaged in as the ``n + 1``-th, so that the first one weighs more.
        data_scale: factor on the bounds.
    """

    def __init__(
        self, bits: int = 8, iteration: int | None = None, use_avg: bool = False, data_scale: float = 1.0
    ) -> None:
        self.bits, self.iteration, self.use_avg, self.data_scale = bits, iteration, use_avg, data_scale
        self.name = "a tensor"
        self.calls = 0
        self._warned = False
        self.min_val: Tensor | None = None
        self.max_val: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Looks at a float tensor of any shape, and returns it."""
        if self.iteration is not None and self.calls >= self.iteration:
            if not self._warned:
                print(
                    f"[warning] It seems that evaluation reaches maxium img_num: {self.name} counts iteration="
                    f"{self.iteration} forward passes and ignores the rest"
                )
            self._warned = True
            return x
        if x.numel() == 0:
            return x
        self.calls += 1
        # float32 throughout, as the vendor's: the scale is a float32 quotient of float32 bounds
        low, high = (bound * self.data_scale for bound in self._bounds(x.detach().float().cpu()))
        if self.min_val is None or self.max_val is None:
            self.min_val, self.max_val = low, high
        elif self.use_avg:
            n = self.calls
            self.min_val = (self.min_val * n + low) / (n + 1)
            self.max_val = (self.max_val * n + high) / (n + 1)
        else:
            self.min_val, self.max_val = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        return x

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.aminmax(x)

    def absmax(self) -> Tensor | None:
        """Returns the largest magnitude, float32, or None where nothing was seen."""
        if self.min_val is None or self.max_val is None:
            return None
        return torch.maximum(-self.min_val, self.max_val).reshape(-1)

    def calculate_scale(self) -> Tensor:
        """Returns the scale: float32 [1], or one for each channel. It is 1 where the bounds say nothing.

        That is where all is zero, and, with a warning, where nothing was seen or the bounds are not finite.
        """
        absmax = self.absmax()
        if absmax is None:
            warnings.warn(
                f"{self.name} was not observed, and gets the scale 1.0: run the model before state_dict() is taken",
                stacklevel=2,
            )
            return torch.ones(1)
        return self._scale_of(absmax)

    def _scale_of(self, absmax: Tensor) -> Tensor:
        finite = absmax.isfinite()
        if not finite.all():
            warnings.warn(f"{self.name} has values that are not finite, and gets the scale 1.0", stacklevel=3)
        qmax = torch.full_like(absmax, limits(self.bits)[1])  # a number over a tensor would be rounded twice
        scale = qmax / absmax
        # A magnitude below qmax / 3.4e38 has no scale in float32: to the integers of this width it is zero.
        return torch.where(finite & scale.isfinite(), scale, torch.ones(()))


class MLUPerChannelMinMaxObserver(MLUMinMaxObserver):
    """Keeps the bounds of each index of the first dimension."""

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x.flatten(1), dim=1)
        return low, high


class MLULrnObserver(MLUMinMaxObserver):
    """Makes the scale of the squares, which is what a local response normalization sums up."""

    def absmax(self) -> Tensor | None:
        """Returns the largest square, float32, or None where nothing was seen."""
        bound = super().absmax()
        return None if bound is None else bound.square()


class MLUNormObserver(MLUMinMaxObserver):
    """Makes two scales: that of the values, and that of their squares."""

    def absmax(self) -> Tensor | None:
        """Returns the largest magnitude and the largest square, float32 [2], or None where nothing was seen."""
        bound = super().absmax()
        return None if bound is None else torch.cat([bound, bound.square()])


mlu_activation_observer_dict: dict[str, type[MLUMinMaxObserver]] = {"minmax": MLUMinMaxObserver}
"""The observers of inputs, by the scheme's ``method``."""

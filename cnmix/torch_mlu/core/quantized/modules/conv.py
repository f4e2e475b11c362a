"""Convolutions, quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .. import functional
from .base import MLUQuantizedModule


class _MLUConv(MLUQuantizedModule, nn.modules.conv._ConvNd):
    def _convolve(self, input: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor | None:
        """Returns the result of the operator, or None where the host's floats are to be multiplied."""
        if not self._is_integer(input) or self.quantization is None:
            return None
        return functional.convolution(
            input,
            self.weight,
            self.bias,
            mean,
            std,
            self.stride,
            self._reversed_padding_repeated_twice,
            self.dilation,
            self.groups,
            self.padding_mode,
            *self.quantization,
            self._name(),
        )


class MLUConv1d(_MLUConv, nn.Conv1d):
    """``nn.Conv1d`` with integers on the card."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, length) or (C, length) to (N, O, output) or (O, output)."""
        y = self._convolve(input)
        return nn.Conv1d.forward(self, input) if y is None else y


class MLUConv2d(_MLUConv, nn.Conv2d):
    """``nn.Conv2d`` with integers on the card.

    Attributes:
        input_mean: what the card subtracts from images in [0, 255] first, float32 (1, C, 1, 1), or None.
        input_std: what it divides them by then, likewise.
    """

    input_mean: Parameter | None
    input_std: Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._register_images(None, None)

    def _register_images(self, mean: Tensor | None, std: Tensor | None) -> None:
        for name, value in (("input_mean", mean), ("input_std", std)):
            constant = None if value is None else value.detach().to(self.weight.device, torch.float32, copy=True)
            self._parameters[name] = None if constant is None else Parameter(constant, requires_grad=False)

    def _begin(self) -> None:
        scheme = None if self.qconfig is None else self.qconfig.scheme
        images = (scheme.mean, scheme.std) if scheme is not None and scheme.firstconv else (None, None)
        self._register_images(
            *(None if each is None else (torch.tensor(each) * 255).view(1, -1, 1, 1) for each in images)
        )

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, height, width) or (C, height, width) to (N, O, *output) or (O, *output)."""
        y = self._convolve(input, self.input_mean, self.input_std)
        return nn.Conv2d.forward(self, input) if y is None else y

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = ("input_mean", "input_std")
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        kept = {}
        if len(given) == 1:
            absent = next(name for name in names if name not in given)
            error_msgs.append(f"{prefix}{absent} missing beside {prefix}{next(iter(given))}")
        elif given:
            wrong = [
                f"{prefix}{name} must have the shape (1, {self.in_channels}, 1, 1), got {tuple(value.shape)}"
                for name, value in given.items()
                if tuple(value.shape) != (1, self.in_channels, 1, 1)
            ]
            mean, std = given["input_mean"], given["input_std"]
            if not wrong and not (mean.isfinite().all() and (std.isfinite() & (std > 0)).all()):
                wrong = [
                    f"{prefix}input_mean must be finite, and {prefix}input_std above 0, as images are divided by it"
                ]
            error_msgs.extend(wrong)
            if not wrong:
                self._register_images(mean, std)
        else:
            self._begin()  # what another file brought goes, what the qconfig asks for stays
            kept = {prefix + name: self._parameters[name] for name in names if self._parameters.get(name) is not None}
        super()._load_from_state_dict(
            {**state_dict, **kept}, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class MLUConv3d(_MLUConv, nn.Conv3d):
    """``nn.Conv3d`` with integers on the card; never with a scale per channel."""

    takes_scales_per_channel: ClassVar[bool] = False

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, depth, height, width), or that without N, to (N, O, *output), or that without N."""
        y = self._convolve(input)
        return nn.Conv3d.forward(self, input) if y is None else y

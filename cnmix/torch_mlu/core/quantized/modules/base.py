"""What quantized modules have in common: where they come from, and what is in their state_dict."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..observer import MLUMinMaxObserver
from ..qscheme import QConfig
from ..state import GENERATED, REQUIRED, Quantization, parse_quantization

Self = TypeVar("Self", bound="MLUQuantizedModule")

_MODES = {8: 1, 16: 2}


class MLUQuantizedModule(nn.Module):
    """Base of modules that multiply floats on the host, and integers on the card.

    Attributes:
        quantization: scales and mode; None until a file was loaded.
        activation_post_process: what observes the inputs, of a model that its scales are generated from, else None.
        qconfig: how it is quantized, likewise.
        fqn: its name in the model, for messages.
    """

    # What torch.jit would compile while it traces.
    __jit_unused_properties__: ClassVar[list[str]] = ["scale", "quantized_mode", "use_symmetry"]
    takes_scales_per_channel: ClassVar[bool] = True

    quantization: Quantization | None = None
    activation_post_process: MLUMinMaxObserver | None = None
    qconfig: QConfig | None = None
    fqn: str = ""
    weight: Any  # a Tensor, but each float class says so in its own way
    bias: Any

    @classmethod
    def from_float(cls: type[Self], module: nn.Module) -> Self:
        """Returns a module of this class with the parameters, hooks and attributes of a float one."""
        made = cls.__new__(cls)
        made.__dict__.update(module.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            made.__dict__[name] = dict(getattr(module, name))
        made._begin()
        return made

    def _begin(self) -> None:
        """Takes what the qconfig asks for besides scales."""

    @property
    def scale(self) -> Parameter | None:
        """The scales as the state_dict has them: float32 [2] or [2 + channels], or None before a file is loaded."""
        return None if self.quantization is None else self._constant(self.quantization.scale, torch.float32)

    @property
    def quantized_mode(self) -> Parameter | None:
        """The mode as the state_dict has it: int32 [1] or [2], or None before a file is loaded."""
        return None if self.quantization is None else self._constant(self.quantization.mode, torch.int32)

    @property
    def use_symmetry(self) -> Parameter:
        """int64 [1], always 1."""
        return self._constant([1], torch.int64)

    def _constant(self, values: Any, dtype: torch.dtype) -> Parameter:
        return Parameter(torch.as_tensor(values, dtype=dtype).to(self.weight.device), requires_grad=False)

    def _is_integer(self, x: Tensor) -> bool:
        """Whether to multiply by the operator that has integers on the card, rather than by the host's floats.

        Raises:
            RuntimeError: if a tensor of the card comes to a module that knows no scales.
        """
        if self.quantization is not None:
            # A trace made on the host may run on the card; and where only one of them is there, the operator says so.
            return "mlu" in (x.device.type, self.weight.device.type) or torch.jit.is_tracing()
        if x.device.type == "mlu" and self.activation_post_process is None:
            raise RuntimeError(
                f"{self._name()!r} has no scales to compute with on {x.device}: load the state_dict of a model that "
                "quantize_dynamic_mlu(model, ..., dtype='int8', gen_quant=True) made"
            )
        return False

    def _name(self) -> str:
        return self.fqn or type(self).__name__

    def _measured(self, observer: MLUMinMaxObserver) -> dict[str, Tensor]:
        """Returns what was found of the inputs and what the weight is now, under the keys of a file."""
        assert self.qconfig is not None  # comes with the observer
        of_input, of_weight = observer, self.qconfig.weight()
        of_input.name, of_weight.name = f"the input of {self._name()!r}", f"the weight of {self._name()!r}"
        of_weight(self.weight)
        scales = of_weight.calculate_scale()
        mode = self._constant([_MODES[self.qconfig.bits]], torch.int32)
        if not self.qconfig.scheme.per_channel:
            both = torch.cat([of_input.calculate_scale(), scales])
            return {"scale": self._constant(both, torch.float32), "quantized_mode": mode}
        return {
            "scale": self._constant(torch.cat([of_input.calculate_scale(), torch.zeros(1)]), torch.float32),
            "quantized_mode": mode,
            "scale_weight_per_channel": self._constant(scales, torch.float32),
            "quantized_by_channel": self._constant([1], torch.int64),
        }

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._parameters.items():
            if parameter is not None:  # the vendor's files have parameters
                destination[prefix + name] = parameter
        destination[prefix + "use_symmetry"] = self.use_symmetry
        observer = self.activation_post_process
        if observer is not None and (observer.calls > 0 or self.quantization is None):
            for name, value in self._measured(observer).items():
                destination[prefix + name] = value
        elif self.quantization is not None:
            destination[prefix + "scale"] = self.scale
            destination[prefix + "quantized_mode"] = self.quantized_mode

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
        own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        given = {name: own.pop(prefix + name) for name in (*REQUIRED, *GENERATED) if prefix + name in own}
        if strict and (given or self.activation_post_process is None):
            missing_keys.extend(prefix + name for name in REQUIRED if name not in given)
        if "scale" in given and "quantized_mode" in given:
            try:
                self.quantization = parse_quantization(
                    given, prefix, self.weight.shape[0], self.takes_scales_per_channel
                )
            except ValueError as error:
                error_msgs.append(str(error))
        if given and prefix + "weight" in own:
            self._follow_bias(own, prefix)
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _follow_bias(self, own: dict[str, Any], prefix: str) -> None:
        """Makes the bias that a file has or, as the vendor's package does, one of zeros where it has none."""
        zeros = torch.zeros(self.weight.shape[0], dtype=self.weight.dtype, device=self.weight.device)
        if prefix + "bias" not in own:
            if self.bias is not None:
                warnings.warn(f"{prefix}bias is not in the state_dict: {self._name()!r} gets zeros", stacklevel=2)
            own[prefix + "bias"] = zeros
        if self.bias is None:
            self.bias = Parameter(zeros, requires_grad=self.weight.requires_grad)

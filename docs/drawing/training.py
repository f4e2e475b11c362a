"""The run that some pictures are of: the digits recipe for seconds."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cnmix
from cnmix.measures import quantization_error
from cnmix.nn.base import QuantizedModule

from .common import ROOT, fitted


class Trained:
    """A short training run of the digits recipe, looked at through one operand.

    Attributes:
        name: of the operand.
        steps: of each training step: bits, position, error, whether it measured, and the error before it widened.
        gradient: float32, the operand's tensor on the last step.
        steps_per_epoch: training steps in an epoch.
    """

    def __init__(self, epochs: int = 4) -> None:
        spec = importlib.util.spec_from_file_location("digits", ROOT / "recipes" / "digits.py")
        assert spec is not None
        assert spec.loader is not None
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        torch.manual_seed(0)
        net = recipe.Net()
        images, classes = recipe.load()[0].tensors
        self.steps_per_epoch = len(images) // 64
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        # More updates than the default's, so that there is something to see in four epochs.
        cnmix.initialize(net, optimizer, steps_per_epoch=self.steps_per_epoch, quantify_rate=0.5)
        layer = net.fc1
        assert isinstance(layer, QuantizedModule)
        quantizer = layer.quantizers.grad_output
        self.name = "grad_output of fc1"
        self.steps: list[dict[str, Any]] = []
        seen: list[Tensor] = []
        layer.register_full_backward_pre_hook(lambda _, gradients: seen.append(gradients[0].detach()))
        for step in range(epochs * self.steps_per_epoch):
            chosen = torch.randint(len(images), (64,))
            bits, updates = quantizer.state.bits, quantizer.state.updates
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), classes[chosen]).backward()
            optimizer.step()
            state, threshold = quantizer.state, quantizer.config.threshold_for(quantizer.product)
            widened = state.bits > bits
            before = quantization_error(seen[-1], fitted(seen[-1], bits)) if widened else None
            self.steps.append(
                {
                    "step": step,
                    "bits": state.bits,
                    "position": state.position,
                    "error": state.error,
                    "updated": state.updates > updates,
                    "error_before": before,
                    "threshold": threshold,
                }
            )
        self.gradient = seen[-1]


@functools.cache
def trained() -> Trained:
    """Returns the run, which trains when it is first asked for."""
    return Trained()

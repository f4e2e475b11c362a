"""The arms of the training-step benchmark: eager and compiled peers, and cnmix."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from networks import Task
from torch import Tensor, nn
from torch.nn import functional as F

import cnmix
from cnmix.nn import quantizer_sets

Gradients = dict[str, Tensor | None]


@dataclass
class Arm:
    """One way of training one network.

    Attributes:
        task: the network's data and loss.
        model: holds the parameters.
        run: what is called: the model, or the model compiled.
        forward_context: entered around the forward pass.
        step_context: entered around the whole step.
        scale: whether the loss goes through ``cnmix.scale_loss``.
        note: what the table says of the arm.
    """

    task: Task
    model: nn.Module
    run: Callable[[Tensor], Tensor]
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    step_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    scale: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.task.learning_rate)
        self.inputs, self.targets = self.task.batch()

    def backward(self) -> None:
        """Leaves the gradients of the loss in the parameters."""
        self.optimizer.zero_grad()
        with self.step_context():
            with self.forward_context():
                output = self.run(self.inputs)
            loss = self.task.loss(output.to(self.inputs.dtype), self.targets)
            with cnmix.scale_loss(loss, self.optimizer) if self.scale else nullcontext(loss) as scaled:
                scaled.backward()

    def step(self) -> None:
        """Trains one step."""
        self.backward()
        self.optimizer.step()

    def gradients(self) -> Gradients:
        """Returns the gradients that the last ``backward`` left, by name."""
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}

    def updates(self) -> int:
        """Returns how often operands of cnmix have been measured so far."""
        return sum(q.state.updates for _, quantizers in quantizer_sets(self.model) for _, q in quantizers)


class _OneDnnProduct(torch.autograd.Function):
    """A Linear whose three products are oneDNN's in float32; torch's own go to MKL."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = onednn_product(grad, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, onednn_product(grad.t(), x_rows.t()), grad_bias


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns ``x @ weight.T + bias`` of oneDNN in float32, for (..., K) and (N, K) of any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` on oneDNN's float32 product."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return _OneDnnProduct.apply(input, self.weight, self.bias)


def fake_quantize(x: Tensor) -> Tensor:
    """Rounds to 255 levels between -absmax and absmax of the present tensor; the gradient passes straight through."""
    with torch.no_grad():
        low, high = torch.aminmax(x)
        scale = torch.maximum(-low, high).clamp_min(1e-30) / 127
        zero = torch.zeros(1, dtype=torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, -127, 127)


class FakeQuantizedLinear(nn.Linear):
    """``nn.Linear`` of a fake-quantized input and weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return F.linear(fake_quantize(input), fake_quantize(self.weight), self.bias)


class FakeQuantizedConv2d(nn.Conv2d):
    """``nn.Conv2d`` of a fake-quantized input and weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, O, H', W')."""
        return self._conv_forward(fake_quantize(input), fake_quantize(self.weight), self.bias)


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _swap(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model


@contextlib.contextmanager
def _medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, fullgraph=True, dynamic=False)


def _float32(task: Task, model: nn.Module, epoch: int) -> Arm:
    return Arm(task, model, model)


def _float32_onednn(task: Task, model: nn.Module, epoch: int) -> Arm:
    _swap(model, {nn.Linear: OneDnnLinear})
    return Arm(task, model, model, note="convolutions are oneDNN's in every float32 arm")


def _float32_medium(task: Task, model: nn.Module, epoch: int) -> Arm:
    return Arm(task, model, model, step_context=_medium, note="products round to bfloat16")


def _float32_compiled(task: Task, model: nn.Module, epoch: int) -> Arm:
    return Arm(task, model, _compiled(model))


def _bfloat16(task: Task, model: nn.Module, epoch: int) -> Arm:
    return Arm(task, model, model, forward_context=_autocast)


def _bfloat16_compiled(task: Task, model: nn.Module, epoch: int) -> Arm:
    return Arm(task, model, _compiled(model), forward_context=_autocast)


def _torchao(task: Task, model: nn.Module, epoch: int) -> Arm:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.prototype.quantized_training import int8_mixed_precision_training
    from torchao.quantization import quantize_

    quantize_(model, int8_mixed_precision_training(module_swap=True))
    arm = Arm(task, model, model)
    swapped = [module for module in model.modules() if isinstance(module, nn.Linear)]
    arm.note = f"{len(swapped)} Linear"
    try:
        arm.backward()
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        for module in swapped:
            module.register_forward_hook(lambda _module, _args, output: _Contiguous.apply(output))
        arm.note += "; its backward fails on a strided gradient, here made contiguous"
    return arm


def _torchao_compiled(task: Task, model: nn.Module, epoch: int) -> Arm:
    from torchao.prototype.quantized_training import int8_mixed_precision

    arm = _torchao(task, model, epoch)
    theirs = int8_mixed_precision._Int8MixedPrecisionTrainingLinearFunction

    # torchao passes its config to the function, which torch.compile cannot take: the graph would break at each Linear.
    # Without module_swap nothing is quantized, torchao 0.18 with torch 2.13 computes in float32.
    @torch.compiler.allow_in_graph
    class WithoutConfig(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return theirs.forward(ctx, x, weight, bias, int8_mixed_precision.Int8MixedPrecisionTrainingConfig())

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return theirs.backward(ctx, grad)[:3]

    class CompilableLinear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return WithoutConfig.apply(input, self.weight, self.bias)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = CompilableLinear
    arm.run = _compiled(model)
    arm.note += "; config closed over, for one graph"
    return arm


def _fake_quant(task: Task, model: nn.Module, epoch: int) -> Arm:
    _swap(model, {nn.Linear: FakeQuantizedLinear, nn.Conv2d: FakeQuantizedConv2d})
    return Arm(task, model, model)


def _cnmix(task: Task, model: nn.Module, epoch: int, level: str = "O1", **settings: Any) -> Arm:
    arm = Arm(task, model, model, scale=True)
    cnmix.initialize(model, arm.optimizer, opt_level=level, steps_per_epoch=epoch, **settings)
    for _ in range(epoch + 1):
        arm.step()
    return arm


def _cnmix_int8(task: Task, model: nn.Module, epoch: int) -> Arm:
    return _cnmix(task, model, epoch, max_bitwidth=8)


def _cnmix_o2(task: Task, model: nn.Module, epoch: int) -> Arm:
    return _cnmix(task, model, epoch, level="O2")


def _cnmix_o3(task: Task, model: nn.Module, epoch: int) -> Arm:
    return _cnmix(task, model, epoch, level="O3")


def _cnmix_int8_compiled(task: Task, model: nn.Module, epoch: int) -> Arm:
    arm = _cnmix_int8(task, model, epoch)
    arm.run = _compiled(model)
    return arm


ARMS: dict[str, tuple[str, Callable[[Task, nn.Module, int], Arm]]] = {
    "float32": ("float32", _float32),
    "float32_onednn": ("float32, oneDNN products", _float32_onednn),
    "float32_medium": ('float32, precision "medium"', _float32_medium),
    "float32_compiled": ("float32, compiled", _float32_compiled),
    "bfloat16": ("bfloat16 autocast", _bfloat16),
    "bfloat16_compiled": ("bfloat16 autocast, compiled", _bfloat16_compiled),
    "torchao": ("torchao int8", _torchao),
    "torchao_compiled": ("torchao int8, compiled", _torchao_compiled),
    "fake_quant": ("fake-quantized int8", _fake_quant),
    "cnmix_int8": ("cnmix O1, int8", _cnmix_int8),
    "cnmix_int8_compiled": ("cnmix O1, int8, compiled", _cnmix_int8_compiled),
    "cnmix_adaptive": ("cnmix O1, adaptive", _cnmix),
    "cnmix_o2": ("cnmix O2", _cnmix_o2),
    "cnmix_o3": ("cnmix O3", _cnmix_o3),
}

"""What the modules in fixed point have in common.

Conversion assigns one of their classes to an existing module. The module, its parameters, hooks and state_dict keys
stay; the quantizers are an ordinary attribute, neither parameter nor buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Product
from .card_tensors import check_one_device, is_on_card
from .places import module_name
from .quantizers import ModuleQuantizers
from .recomputation import reentrant_part

NO_TENSOR_PARALLELISM = (
    "is split by tensor parallelism (DTensor): each part of its weight would have a format of its own, and the "
    "processes other widths. Leave it out with exclude=[...], or share the model out with fully_shard or "
    "DistributedDataParallel alone"
)


def is_distributed(x: Tensor) -> bool:
    """Whether this is a DTensor."""
    return type(x).__module__.startswith("torch.distributed.tensor")  # without loading it


class QuantizedModule(nn.Module):
    """A module whose products run in fixed point."""

    product: Product
    weight: Tensor
    quantizers: ModuleQuantizers

    @classmethod
    def places(cls, module: nn.Module) -> dict[str, str]:
        """Returns the name of the weight of each product of a module, converted or not, by place."""
        return {"": "weight"}

    def extra_repr(self) -> str:
        """Adds the width of each operand to the module's own description."""
        widths = ", ".join(f"{name}=int{quantizer.state.bits}" for name, quantizer in self.quantizers)
        return f"{super().extra_repr()}, {widths}"

    def _check_input(self, x: Tensor) -> Tensor:
        """Returns the input to compute with."""
        return check_input(x, self, "weight", self.quantizers.fqn)

    def _moves_statistics(self) -> bool:
        return moves_statistics(self, self.quantizers)


def check_input(x: Tensor, module: nn.Module, name: str, fqn: str) -> Tensor:
    """Returns the input to multiply by the module's weight of this name.

    Raises:
        TypeError: if it is no float tensor.
        RuntimeError: if it is neither on the CPU nor on the emulated card, or elsewhere than the weight, or one of them
            is split by tensor parallelism.
    """
    weight = module._parameters.get(name)  # not the attribute: a parametrization would compute it once more
    if not torch.compiler.is_compiling() and (is_distributed(x) or (weight is not None and is_distributed(weight))):
        raise RuntimeError(f"{fqn!r} {NO_TENSOR_PARALLELISM}")
    if not x.is_floating_point():
        raise TypeError(f"{fqn!r} takes a float tensor, got {x.dtype}")
    if not x.is_cpu and not is_on_card(x):
        raise RuntimeError(
            f"{fqn!r} got a tensor on {x.device}: this version of cnmix computes on the CPU, and on the emulated card "
            "that cnmix.torch_mlu brings"
        )
    if weight is not None and weight.is_cpu != x.is_cpu:
        check_one_device(fqn, x, weight)
    if torch.compiler.is_compiling() or type(x).__module__ != "torch.distributed._functional_collectives":
        return x
    return x.clone()  # a tensor-parallel neighbour's collective is under way: any operation but a view waits for it


def moves_statistics(module: nn.Module, *sets: ModuleQuantizers) -> bool:
    """Whether this forward pass moves the statistics of the module's quantizers.

    Raises:
        RuntimeError: if the module is in training, and frozen for inference.
    """
    if module.training and sets[0].frozen:
        raise RuntimeError(f"{module_name(sets[0].fqn)!r} is frozen for integer inference: call model.eval() first")
    if not module.training or torch.compiler.is_compiling():
        return module.training and torch.is_grad_enabled()
    if torch.is_grad_enabled():
        return True
    part = reentrant_part()  # a training step's first pass, which runs without gradients
    for quantizers in sets:
        quantizers.reentrant_part = part
    return part is not None

"""Weights that ``fully_shard`` has split among processes, gathered as the integers that their products take.

Between updates the format of a weight stands, so each process can quantize its own part: one byte an element travels
in place of four, or two of int16. What arrives is scaled back to float, ``q * 2**position``, which is exact and
quantizes to the same integers: the module computes the same bits as from the float weight. Where it would not, the
float weight is gathered: on steps that measure it, for int31, and for stochastic rounding, whose numbers are drawn by
the place of an element in the whole weight.

torch asks the local tensor of a sharded parameter for what to gather, if it has these two functions ("all-gather
extensions", the way of torchao's float8 weights). Here they are attributes of the tensor, which stays a plain one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from .. import kernels
from ..fixed_point import FixedPoint, dequantize
from .base import QuantizedModule


def gather_integers(groups: Iterable[Any]) -> None:
    """Lets the weights of converted modules travel as integers, where ``fully_shard`` gathers them.

    Weights that something else than one module may read stay as they are: shared and parametrized ones, those of
    a mixed-precision policy, those sharded along another dimension than the first, and offloaded ones.

    Args:
        groups: torch's groups of parameters.
    """
    for group in groups:
        for parameter in group.fsdp_params:
            owner, name = parameter._module_info.module, parameter._module_info.param_name
            plain = (
                isinstance(owner, QuantizedModule)
                and name == "weight"
                and not is_parametrized(owner)
                and not parameter._module_info.shared_modules
                and getattr(parameter, "param_dtype", torch.float32) is None  # unknown until it first runs
                and parameter.orig_dtype == torch.float32
                and parameter.fsdp_placement.dim == 0
                and not parameter.is_dtensor
                and not parameter.offload_to_cpu
                and not group._use_post_forward_mesh
            )
            # Alone in its part of the mesh a process gathers nothing; and none that is under way is changed.
            idle = group._all_gather_result is None and parameter.sharded_state.name == "SHARDED"
            travels = idle and getattr(parameter.mesh_info, "shard_mesh_size", 1) > 1
            if plain and travels and not hasattr(parameter._sharded_local_tensor, "fsdp_pre_all_gather"):
                _IntegerGather(parameter, owner, group).take_over()


class _IntegerGather:
    """What torch calls before and after it gathers one sharded weight.

    Args:
        parameter: torch's ``FSDPParam``.
        owner: the module with the weight.
        group: torch's ``FSDPParamGroup`` of the parameter.
    """

    def __init__(self, parameter: Any, owner: Any, group: Any) -> None:
        self._parameter = parameter
        self._group = group
        self._owner = owner
        self._gathers: torch.dtype | None = None

    def take_over(self) -> None:
        """Gathers from now on; the memory of the unsharded parameter becomes one that torch frees and we fill."""
        parameter = self._parameter
        self._attach()
        parameter._init_extensions()
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_inner_tensors = list(parameter.all_gather_outputs)
            parameter.all_gather_outputs = []
        reset = parameter.reset_sharded_param

        def reset_and_attach() -> None:  # loading weights may put another local tensor in the place of this one
            reset()
            self._attach()

        parameter.reset_sharded_param = reset_and_attach

    def __deepcopy__(self, memo: Any) -> _IntegerGather:  # of a copied tensor, which torch gathers nothing for
        return self

    def __reduce__(self) -> tuple[type[_IntegerGather], tuple[None, None, None]]:
        return _IntegerGather, (None, None, None)

    def _attach(self) -> None:
        local = self._parameter._sharded_local_tensor
        local.fsdp_pre_all_gather, local.fsdp_post_all_gather = self.before, self.after

    def before(self, mesh: Any) -> tuple[tuple[Tensor, ...], tuple[int, int] | None]:
        """Returns what to gather: this process's part, padded to the size of the first one's.

        Beside integers goes one that says whether the part is finite.
        """
        part = self._parameter._sharded_param_data.view(self._parameter.padded_sharded_param_size)
        if not isinstance(self._owner, QuantizedModule):  # a plain one again
            return self._choose((part,)), None
        quantizer = self._owner.quantizers.weight
        state, training = quantizer.state, self._owner.training
        # Where the weight is kept after a forward pass, a training step may find that of an evaluation.
        kept = self._group.post_forward_mesh_info is None
        measures = quantizer.due if training else kept
        if state.position is None or state.bits > 16 or measures or quantizer.rounding(training) == "stochastic":
            inputs: tuple[Tensor, ...] = (part,)
            form = None
        else:
            quantized = kernels.quantize_measured(part, state.bits, state.position, quantizer.rounding(training))[0]
            inputs = (quantized.values, torch.tensor([quantized.finite], dtype=torch.int8))
            form = state.bits, state.position
        return self._choose(inputs), form

    def _choose(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._gathers != inputs[0].dtype:  # torch keeps the outputs of the last gather
            self._gathers = inputs[0].dtype
            self._parameter.all_gather_outputs = []
        return inputs

    @torch.no_grad()
    def after(
        self, gathered: tuple[Tensor, ...], form: tuple[int, int] | None, dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Writes the float weight to ``out``, or returns it where there is none yet, with the memory to free."""
        if isinstance(self._owner, QuantizedModule):
            self._owner.quantizers.weight_is_integers = form is not None
        if form is None:
            whole = gathered[0]
        else:
            whole = dequantize(FixedPoint(gathered[0], *form, finite=bool(gathered[1].all())))
        if out is None:
            whole = whole.clone() if form is None else whole
            return whole, (whole,)
        with torch.autograd._unsafe_preserve_version_counter(out):
            out.copy_(whole[: out.shape[0]])
        return None

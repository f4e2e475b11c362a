"""How the processes that train one model on parts of the data choose its formats together.

On an update step each process quantizes with the format that fits its own tensor and notes what it measured. When the
backward pass has ended, one collective adds up what all of them noted, and each takes the same width, position and
interval from it: one sum for all operands of the model, and none on steps without an update. Weights need none of it:
they are the same everywhere, and so is what is measured of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..adaptive import OperandQuantizer
from ..config import OPERANDS
from ..fixed_point import BITS
from ..operand import Observation
from .recomputation import current_backward

if TYPE_CHECKING:
    from .quantizers import ModuleQuantizers

logger = logging.getLogger("cnmix")

# A sum finds the largest exponent: each process adds 2**(14 * exponent), and fewer than 2**14 of them never carry into
# the next one. float64 has room for 70 exponents, and float32 has 277.
_DIGIT, _DIGITS, _SMALLEST_EXPONENT = 14, 70, -148
_EXPONENT_SLOTS = 4
_ROW = 3 + _EXPONENT_SLOTS + 2 * len(BITS)  # see pack


class Ranks:
    """The processes that train a model together, found when it first trains; shared by the quantizers of the model.

    They are those of the ``DistributedDataParallel`` that the model runs in, of the mesh that ``fully_shard`` was
    given, or those that ``initialize`` was told.

    Args:
        model: the model.

    Attributes:
        group: the processes; None where this process decides alone.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.group: dist.ProcessGroup | None = None
        self._model = None if model is None else weakref.ref(model)
        self._chosen: dist.ProcessGroup | None = None
        self._members: list[weakref.ref[ModuleQuantizers]] = []
        self._differ = False  # whether processes may run different modules
        self._every_step = False
        self._due = False
        self._queued_in = -1
        self._searched = False
        self._sharded = False

    def add(self, member: ModuleQuantizers) -> None:
        """Takes in the quantizers of a module."""
        self._members.append(weakref.ref(member))
        self._decide_alone()  # until all processes have found each other anew, with this one

    def choose(self, group: dist.ProcessGroup | None) -> None:
        """Decides together with these processes, whatever the model is wrapped in; None leaves it to the wrapper."""
        self._chosen = group or self._chosen

    def forward_begins(self, member: ModuleQuantizers) -> None:
        """Is called before a module quantizes for a training step."""
        if not dist.is_available() or not dist.is_initialized():
            if self.group is not None:
                self._decide_alone()
            return
        group = self._find_group()
        if group is not self.group:
            self._join(group)
        if group is not None:
            self._due |= member.input.due

    def backward_begins(self, member: ModuleQuantizers) -> None:
        """Is called before a module quantizes its ``grad_output``: sees to a decision when the backward pass ends."""
        if self.group is None:
            return
        self._due |= member.grad_output.due
        task = current_backward()
        if (self._due or self._every_step) and task not in (-1, self._queued_in):
            self._queued_in = task
            torch.autograd.Variable._execution_engine.queue_callback(self._decide)

    def _find_group(self) -> dist.ProcessGroup | None:
        wrapper = DistributedDataParallel._active_ddp_module
        group: dist.ProcessGroup | None
        if self._chosen is not None:
            group = self._chosen
        elif wrapper is not None:
            group = wrapper.process_group
            self._differ |= wrapper.find_unused_parameters
            if wrapper._join_config.enable:
                raise RuntimeError(
                    "cnmix cannot train under torch's join() for uneven inputs: a process without data takes no part "
                    "in choosing formats. Give every process as many batches, as DistributedSampler does"
                )
        elif self.group is not None or self._searched:  # a part of the model that is called by itself
            return self.group
        else:
            self._searched = True
            group = self._find_mesh()
            if group is None and dist.get_world_size() > 1:
                logger.warning(
                    "torch.distributed has %d processes, and this model is in neither DistributedDataParallel nor "
                    "fully_shard: each process chooses its formats alone. If they train one model together, give "
                    "cnmix.initialize(..., process_group=...)",
                    dist.get_world_size(),
                )
        return group if group is self.group or (group is not None and dist.get_world_size(group) > 1) else None

    def _find_mesh(self) -> dist.ProcessGroup | None:
        """Returns the processes that share the model's parameters among them, where ``fully_shard`` did that."""
        model = None if self._model is None else self._model()
        if model is None:
            return None
        for module in model.modules():
            for parameters in parameter_groups(module):
                self._sharded = True
                mesh = parameters.mesh_info.mesh
                return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()
        return None

    def _quantizers(self) -> list[OperandQuantizer]:
        """Returns those whose formats the processes choose together.

        What they measure of weights is the same anyway, unless one of them does not run a module.
        """
        members = [member() for member in self._members]
        chosen = [name for name in OPERANDS if name != "weight" or self._differ]
        return [getattr(member, name) for member in members if member is not None for name in chosen]

    def _join(self, group: dist.ProcessGroup | None) -> None:
        """Begins to decide together, from the state of the group's first process, as wrappers do with parameters.

        Raises:
            ValueError: on every process, if one has other modules or settings than the first.
        """
        self.group = group
        if group is None:
            self._decide_alone()
            return
        members = [found for member in self._members if (found := member()) is not None]
        described = [(member.fqn, *(_comparable(config) for config in member.configs.values())) for member in members]
        digest = hashlib.sha256(repr(described).encode()).hexdigest()
        digests: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(digests, digest, group=group)
        others = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
        if others:
            self.group = None
            raise ValueError(
                f"rank {others[0]} of {len(digests)} converted other modules than rank 0, or with other settings: call "
                "cnmix.initialize with the same model and the same arguments in every process"
            )
        states: list[Any] = [[member.state_dict() for member in members]]
        dist.broadcast_object_list(states, dist.get_global_rank(group, 0), group=group)
        for member, state in zip(members, states[0], strict=True):
            member.follow(state)
        # An update that saturation brings forward is one that no other process knows of.
        watching = any(quantizer.config.saturation is not None for quantizer in self._quantizers())
        self._every_step = self._differ or watching
        # Each draws its own random numbers: the data differ, and equal noise would not average out.
        key = dist.get_rank(group) * 0x9E3779B97F4A7C15 % 2**64
        for quantizer in self._quantizers():
            quantizer.observation = Observation(first_step=quantizer.state.step)
        for member in members:
            member.input.draw_key = member.grad_output.draw_key = key

    def _decide_alone(self) -> None:
        self.group = None
        for member in self._members:
            for _, quantizer in member() or ():
                quantizer.observation, quantizer.draw_key = None, 0

    def _decide(self) -> None:
        """Adds up what the processes noted, and gives every quantizer the state that follows from it."""
        quantizers = [each for each in self._quantizers() if each.observation is not None]
        total = torch.tensor([pack(each.state.step, each.observation) for each in quantizers], dtype=torch.float64)
        if "cpu" not in dist.get_backend_config(self.group):
            total = total.cuda()
        dist.all_reduce(total, group=self.group)
        for quantizer, row in zip(quantizers, total.tolist(), strict=True):
            if row[0]:  # a process ran it
                steps, seen = unpack(row)
                quantizer.agree(quantizer.observation.first_step + steps, seen)  # type: ignore[union-attr]
        self._due = False
        model = None if self._model is None else self._model()
        if self._sharded and model is not None:
            from .sharded import gather_integers  # which needs the modules, and they need this

            gather_integers(model)
            self._sharded = False

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:  # a copy finds its own
        return Ranks, ()


def parameter_groups(module: nn.Module) -> list[Any]:
    """Returns torch's groups of parameters of a module that ``fully_shard`` was called on; none for another one."""
    if not is_fully_sharded(type(module)):
        return []
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)  # a single one until torch 2.11
    return list(groups) if groups is not None else [each for each in [state._fsdp_param_group] if each is not None]


def fully_sharded_modules(model: nn.Module) -> set[nn.Module]:
    """Returns the modules whose parameters ``fully_shard`` alone has split, which it puts together to compute."""
    groups = [group for module in model.modules() for group in parameter_groups(module)]
    return {each._module_info.module for group in groups for each in group.fsdp_params if not each.is_dtensor}


def is_fully_sharded(kind: type) -> bool:
    """Whether this is a class that ``fully_shard`` made."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was not imported, nothing is sharded
    return fsdp is not None and hasattr(fsdp, "FSDPModule") and issubclass(kind, fsdp.FSDPModule)


def pack(step: int, observation: Observation | None) -> list[float]:
    """Returns what a process noted of an operand as numbers that add up over the processes.

    Whether it ran the module, its steps, its share of saturated values, the exponent of the largest magnitude, and for
    each width the two sums of its quantization error.
    """
    if observation is None or step == observation.first_step:
        return [0.0] * _ROW
    exponents = [0.0] * _EXPONENT_SLOTS
    if observation.absmax > 0:
        slot, digit = divmod(math.frexp(observation.absmax)[1] - _SMALLEST_EXPONENT, _DIGITS)
        exponents[slot] = 2.0 ** (_DIGIT * digit)
    sums = [number for bits in BITS for number in observation.sums.get(bits, (0.0, 0.0))]
    return [1.0, float(step - observation.first_step), observation.saturation, *exponents, *sums]


def unpack(row: list[float]) -> tuple[int, Observation]:
    """Returns the steps since the processes last agreed, and what they saw together, from the sum of their numbers.

    The largest magnitude comes back as the power of two that its position follows from.
    """
    ran, steps, saturation = row[:3]
    seen = Observation(saturation=saturation / ran)
    for slot in reversed(range(_EXPONENT_SLOTS)):
        number = row[3 + slot]
        if number > 0:
            digit = (math.frexp(number)[1] - 1) // _DIGIT
            seen.absmax = math.ldexp(0.5, slot * _DIGITS + digit + _SMALLEST_EXPONENT)
            break
    for index, bits in enumerate(BITS):
        difference, magnitude = row[3 + _EXPONENT_SLOTS + 2 * index :][:2]
        if magnitude > 0:
            seen.sums[bits] = (difference, magnitude)
    return math.ceil(steps / ran), seen


def _comparable(config: Any) -> dict[str, Any]:
    """Returns the settings that must be equal; the steps in an epoch differ where data sets do not divide evenly."""
    return {**dataclasses.asdict(config), "steps_per_epoch": None}

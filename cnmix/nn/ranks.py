"""How the processes that train one model on parts of the data choose its formats together.

In a round that measures each process quantizes with the format that fits its own tensor and notes what it measured.
When the backward pass has ended, one collective adds up what all of them noted, and each takes the same width, position
and interval from it: one sum for all operands of the model, and none in rounds that measure nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.parallel import DistributedDataParallel

from ..closing import Closing
from ..fixed_point import BITS
from ..kernels.profiling import timed
from ..operand import Observation, Rounds
from .places import FUNCTIONS, quantizers_of
from .recomputation import current_backward, in_reentrant_backward

if TYPE_CHECKING:
    from .quantizers import ModuleQuantizers

logger = logging.getLogger("cnmix")

# A sum finds the largest exponent: each process adds 2**(14 * exponent), and fewer than 2**14 of them never carry into
# the next one. float64 has room for 70 exponents, and float32 has 277.
_DIGIT, _DIGITS, _SMALLEST_EXPONENT = 14, 70, -148
_EXPONENT_SLOTS = 4
# Rounds after which an operand is asked for again that no process runs.
_LONGEST_PATIENCE = 1024
_ROW = 3 + _EXPONENT_SLOTS + 2 * len(BITS)  # see pack
_NEVER = 2**62  # a round that does not come


class Ranks:
    """The processes that train a model together, found when it first trains; shared by the quantizers of the model.

    They are those of the ``DistributedDataParallel`` that the model runs in, of the mesh that ``fully_shard`` was
    given, or those that ``initialize`` was told. All of them take part in each round: a backward pass that averages
    gradients. Whether a round measures follows from what they agreed on before, never from what one process did: one
    may call a module more often than another, or not at all.

    Attributes:
        group: the processes; None where this process decides alone.
        closing: when the adaptive strategy closes.
    """

    def __init__(self, closing: Closing | None = None) -> None:
        self.closing = closing or Closing()
        self.group: dist.ProcessGroup | None = None
        self._chosen: dist.ProcessGroup | None = None
        self._wrappers: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        self._left: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        self._members: list[weakref.ref[ModuleQuantizers]] = []
        self._newcomers: list[weakref.ref[ModuleQuantizers]] = []  # which decide alone
        self._rounds = Rounds()
        self._next_collective = 0  # its round
        self._last_collective = -1
        self._every_round = False
        self._averages = False  # whether the backward pass that comes averages gradients
        self._queued_in = -1
        self._nested = False
        self._searched = False
        self._stays_alone = False
        self._sharded = False
        self._hooks: list[Any] = []

    def add(self, member: ModuleQuantizers) -> None:
        """Takes in the quantizers of a module, or of a function that it called for the first time."""
        if member.of_function:  # perhaps in this process alone
            self._newcomers = [each for each in self._newcomers if each() is not None] + [weakref.ref(member)]
            return
        self._members = [each for each in self._members if each() is not None] + [weakref.ref(member)]
        self._decide_alone()  # until all processes have found each other anew, with this one

    def choose(self, group: dist.ProcessGroup | None) -> None:
        """Decides together with these processes, whatever the model is wrapped in; None leaves it to the wrapper."""
        self._chosen = group or self._chosen
        self._searched = False

    def close_after(self, count: int) -> None:
        """Has the adaptive strategy close after so many more iterations, 0 for never, where that is new."""
        if self.closing.begin(count):
            self.states_were_loaded()  # where it had closed, no decision was to come

    def stay_alone(self) -> None:
        """Has this process decide alone, whatever else trains: in a step of trial that it takes for itself."""
        self._stays_alone = True

    def states_were_loaded(self) -> None:
        """Has this round end with a decision, before which nobody knows how many rounds the new states are to last."""
        self._next_collective, self._last_collective = self._rounds.present, self._rounds.present - 1

    def forward_begins(self) -> None:
        """Is called before a module quantizes for a training step."""
        if self.closing.backward_began and current_backward() == -1:  # not in one that checkpointing repeats
            self.closing.end_iteration()
        if self._stays_alone:
            return
        if not dist.is_available() or not dist.is_initialized():
            if self.group is not None or self._chosen is not None:
                self._chosen = None
                self._leave()
            return
        if self._nested:  # the backward pass before ran in checkpointed parts alone, which end before it does
            self._end_round()
        group = self._find_group()
        if group is not self.group:
            self._join(group)

    def backward_begins(self) -> None:
        """Is called in a backward pass, before a module quantizes its ``grad_output``, and with the first gradient."""
        self.closing.backward_began = True
        task = current_backward()
        if self.group is None or not self._averages or task in (-1, self._queued_in):
            return
        if in_reentrant_backward():
            self._nested = True
            return
        self._queued_in = task
        torch.autograd.Variable._execution_engine.queue_callback(self._end_round)

    def _find_group(self) -> dist.ProcessGroup | None:
        wrapper = DistributedDataParallel._active_ddp_module
        group: dist.ProcessGroup | None
        if self._chosen is not None:
            group, self._averages = self._chosen, True
        elif wrapper is not None:
            group, self._averages = wrapper.process_group, wrapper.require_backward_grad_sync
            if wrapper._join_config.enable:
                raise RuntimeError(
                    "cnmix cannot train under torch's join() for uneven inputs: a process without data takes no part "
                    "in choosing formats. Give every process as many batches, as DistributedSampler does"
                )
            if wrapper not in self._wrappers:
                self._enter(wrapper)
        elif self.group is not None or self._searched:  # a part of the model that is called by itself
            self._averages |= self._sharded
            return self.group
        else:
            self._searched = True
            group, self._averages = self._find_mesh(), True
            if group is None and dist.get_world_size() > 1:
                logger.warning(
                    "torch.distributed has %d processes, and this model is in neither DistributedDataParallel nor "
                    "fully_shard: each process chooses its formats alone. If they train one model together, give "
                    "cnmix.initialize(..., process_group=...)",
                    dist.get_world_size(),
                )
        return group if group is self.group or (group is not None and dist.get_world_size(group) > 1) else None

    def _enter(self, wrapper: DistributedDataParallel) -> None:
        """Takes note of a wrapper that the model, or a part of it, trains in.

        Raises:
            RuntimeError: if another part trains in a wrapper of other processes.
        """
        if wrapper in self._left:
            raise RuntimeError(
                "parts of one model train in DistributedDataParallels of different process groups: give each part a "
                "cnmix.initialize of its own"
            )
        if any(each.process_group is not wrapper.process_group for each in self._wrappers):
            self._left.update(self._wrappers)
            self._leave()
        self._wrappers.add(wrapper)
        trained = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
        # A process may run none of our modules in a round: then too it has to take part.
        self._hooks.append(register_multi_grad_hook(trained, lambda _: self.backward_begins(), mode="any"))

    def _find_mesh(self) -> dist.ProcessGroup | None:
        """Returns the processes that share the modules' parameters among them, where ``fully_shard`` did that."""
        for parameters in all_parameter_groups():
            owners = (each._module_info.module for each in parameters.fsdp_params)
            if any(knower.ranks is self for owner in owners for knower in _that_know_ranks(owner)):
                self._sharded = True
                mesh = parameters.mesh_info.mesh
                return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()
        return None

    def _join(self, group: dist.ProcessGroup | None) -> None:
        """Begins to decide together, from the state of the group's first process, as wrappers do with parameters.

        Raises:
            ValueError: on every process, if one has other modules or settings than the first.
        """
        self._decide_alone()
        if group is None:
            return
        members = [found for member in self._members if (found := member()) is not None]
        digest = hashlib.sha256(repr([_described(member) for member in members]).encode()).hexdigest()
        digests: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(digests, digest, group=group)
        others = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
        if others:
            raise ValueError(
                f"rank {others[0]} of {len(digests)} converted other modules than rank 0, or with other settings: call "
                "cnmix.initialize with the same model and the same arguments in every process"
            )
        self._follow_first(members, group)
        self.group = group
        self._last_collective = self._rounds.present - 1
        self._next_collective = self._rounds.present  # how many steps a round has is known when it ends

    def _follow_first(self, members: list[ModuleQuantizers], group: dist.ProcessGroup) -> None:
        """Gives these, the same in every process, the states that they have in the first one, and begins to observe."""
        states: list[Any] = [[member.state_dict() for member in members]]
        dist.broadcast_object_list(states, dist.get_global_rank(group, 0), group=group)
        # Each draws its own random numbers: the data differ, and equal noise would not average out.
        key = dist.get_rank(group) * 0x9E3779B97F4A7C15 % 2**64
        for member, state in zip(members, states[0], strict=True):
            member.follow(state)
            for name, quantizer in member:
                quantizer.draw_key = 0 if name == "weight" and not member.of_function else key
                quantizer.observe(self._rounds)

    def _take_in_newcomers(self, group: dist.ProcessGroup) -> None:
        """Has products of functions that all processes have called by now decide together too."""
        own = {found.fqn: found for member in self._newcomers if (found := member()) is not None}
        described = {name: _described(member) for name, member in own.items()}
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, described, group=group)
        common = [name for name in sorted(own) if all(each.get(name) == described[name] for each in everyone)]
        self._follow_first([own[name] for name in common], group)
        self._members += [weakref.ref(own.pop(name)) for name in common]
        self._newcomers = [weakref.ref(member) for member in own.values()]

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._wrappers = [], weakref.WeakSet()
        self._decide_alone()

    def _decide_alone(self) -> None:
        self.group, self._searched, self._nested = None, False, False
        members = [found for member in self._members if (found := member()) is not None]
        for member in members:
            for _, quantizer in member:
                quantizer.observation, quantizer.draw_key = None, 0
        self._newcomers += [weakref.ref(member) for member in members if member.of_function]
        self._members = [weakref.ref(member) for member in members if not member.of_function]

    @timed("adapt")
    def _end_round(self) -> None:
        """Ends a round: adds up what the processes noted, if one measured, and gives every quantizer the same state."""
        self._nested = False
        if self.group is None:
            return
        if self._wrappers:  # a second backward pass through the same graph averages nothing
            self._averages = False
        present, self._rounds.present = self._rounds.present, self._rounds.present + 1
        if present < self._next_collective and not self._every_round:
            return
        quantizers = [quantizer for each in self._members for _, quantizer in each() or ()]
        rows = [pack(each.state.step, each.observation) for each in quantizers]
        newcomers = sum(each() is not None for each in self._newcomers)
        rows.append([float(newcomers), float(self.closing.closed)] + [0.0] * (_ROW - 2))
        total = torch.tensor(rows, dtype=torch.float64)
        if "cpu" not in dist.get_backend_config(self.group):
            total = total.cuda()
        dist.all_reduce(total, group=self.group)
        rounds = present - self._last_collective
        self._last_collective = present
        *sums, (newcomers, closed, *_) = total.tolist()
        for quantizer, row in zip(quantizers, sums, strict=True):
            observation = quantizer.observation
            if observation is not None and row[0]:
                steps, seen = unpack(row)
                seen.rounds = self._rounds
                quantizer.agree(observation.first_step + steps, seen, steps / rounds)
            elif observation is not None and observation.due_round <= present:  # no process ran it
                observation.due_round = present + observation.patience
                observation.patience = min(2 * observation.patience, _LONGEST_PATIENCE)
        if newcomers:
            self._take_in_newcomers(self.group)
            quantizers = [quantizer for each in self._members for _, quantizer in each() or ()]
        over = closed == dist.get_world_size(self.group)  # what has a position is not measured again, in any of them
        asked = [each for each in quantizers if not over or each.state.position is None]
        due = [each.observation.due_round for each in asked if each.observation is not None]
        self._next_collective = min(due, default=_NEVER if over else present + 1)
        # An update that saturation brings forward is one that no process knows of the others.
        self._every_round = any(each.config.saturation is not None for each in asked)
        if self._sharded:
            from .sharded import gather_integers  # which needs the modules, and they need this

            gather_integers(all_parameter_groups())

    def __reduce__(self) -> tuple[type[Ranks], tuple[Closing]]:  # a copy finds its own
        return Ranks, (self.closing,)


def parameter_groups(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """Yields torch's groups of parameters of those modules that ``fully_shard`` was called on."""
    for module in modules:
        if is_fully_sharded(type(module)):
            state = module._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None)  # a single one until torch 2.11
            yield from (each for each in ([state._fsdp_param_group] if groups is None else groups) if each is not None)


def all_parameter_groups() -> Iterator[Any]:
    """Yields the groups of all modules of the process that ``fully_shard`` was called on."""
    states = sys.modules.get("torch.distributed._composable_state")  # where it was not imported, there are none
    return parameter_groups(list(getattr(states, "_module_state_mapping", ())))


def fully_sharded_modules(model: nn.Module) -> set[nn.Module]:
    """Returns the modules whose parameters ``fully_shard`` alone has split, which it puts together to compute."""
    groups = parameter_groups(model.modules())
    return {each._module_info.module for group in groups for each in group.fsdp_params if not each.is_dtensor}


def resting_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the model's parameters as they are outside of its passes, each once.

    In between ``fully_shard`` puts whole ones in the place of the parts that have gradients and that optimizers know.
    """
    parts = {
        id(each._unsharded_param): each.sharded_param
        for group in parameter_groups(model.modules())
        for each in group.fsdp_params
        if hasattr(each, "_unsharded_param")
    }
    return list(dict.fromkeys(parts.get(id(parameter), parameter) for parameter in model.parameters()))


def is_fully_sharded(kind: type) -> bool:
    """Whether this is a class that ``fully_shard`` made."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was not imported, nothing is sharded
    return fsdp is not None and hasattr(fsdp, "FSDPModule") and issubclass(kind, fsdp.FSDPModule)


def _that_know_ranks(module: nn.Module) -> Iterator[Any]:
    """Yields the quantizers of a module's products, and what makes those of functions that it calls."""
    yield from (quantizers for _, quantizers in quantizers_of(module))
    if FUNCTIONS in module.__dict__:
        yield module.__dict__[FUNCTIONS]


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


def _described(member: ModuleQuantizers) -> tuple[Any, ...]:
    """Returns what must be equal in all processes: the name of the product, and its settings."""
    return member.fqn, *(_comparable(config) for config in member.configs.values())


def _comparable(config: Any) -> dict[str, Any]:
    """Returns the settings that must be equal; the steps in an epoch differ where data sets do not divide evenly."""
    return {**dataclasses.asdict(config), "steps_per_epoch": None}

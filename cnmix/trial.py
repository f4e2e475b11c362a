"""A training step for trial, which leaves nothing of the model changed: to count it, to look at it, to compare it."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from .nn import quantizers_of
from .nn.function_calls import function_products, set_function_products
from .nn.places import ATTRIBUTES, detach
from .nn.ranks import Ranks
from .registry import unwrap


@contextmanager
def trial(model: nn.Module, loss: Any = None) -> Iterator[None]:
    """Runs what is within on the model as it is, eagerly, and puts back what it changed.

    Put back are parameters' gradients, buffers, quantizers and torch's random numbers; parameters are taken not to
    change. What functions multiply in compiled modules is float, as it is where these are compiled. Where several
    processes train the model, this one decides alone, and the others need not take part.

    Args:
        model: as it is called, so perhaps wrapped by ``torch.compile`` or DistributedDataParallel.
        loss: what the step's loss is computed by; where that is a module, what it has is put back too.

    Raises:
        ValueError: if the model has lazy modules without weights yet.
    """
    compiled = compiled_modules(model)
    model = unwrap(model)
    lazy = next((fqn for fqn, each in model.named_parameters() if is_lazy(each)), None)
    if lazy is not None:
        raise ValueError(f"{lazy!r} has no shape yet, and a forward pass would give it one: run one first")
    both = nn.ModuleList([model, loss]) if isinstance(loss, nn.Module) else model
    with _unchanged(both), _functions_in_float(compiled), eagerly():
        yield


def compiled_modules(model: nn.Module) -> set[nn.Module]:
    """Returns the modules that are compiled, and those in them."""
    roots = [each for each in model.modules() if getattr(each, "_compiled_call_impl", None) is not None]
    roots += [each for each in model.modules() if isinstance(getattr(each, "_orig_mod", None), nn.Module)]
    return {inside for root in roots for inside in root.modules()}


def eagerly() -> AbstractContextManager[Any]:
    """Runs compiled functions eagerly: in a graph operations are fused, and modules have no hooks."""
    used = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # from torch 2.6 on
    return torch.compiler.set_stance("force_eager") if used else nullcontext()


def copied(values: Any) -> Any:
    """Copies the tensors in nested tuples, lists and dicts; the model's call may change them, and so may gradients."""
    known: dict[int, Tensor] = {}

    def copy_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            known[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        return known[id(value)]

    return tree_map(copy_of, values)


def total_of(output: Any) -> Tensor | None:
    """Returns a scalar to go backwards from: the output's ``loss``, or the sum of its floating tensors.

    None where nothing in the output needs a gradient.
    """
    loss = getattr(output, "loss", None)
    found = [each.sum() for each in tensors_in(output if loss is None else loss) if each.requires_grad]
    return torch.stack(found).sum() if found else None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in([*value.values()])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, each.name, None) for each in dataclasses.fields(value)])
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)


def _ranks_of(module: nn.Module) -> Iterator[Ranks]:
    """Yields those that the products of this very module know, of functions that are still to be called too."""
    yield from (quantizers.ranks for _, quantizers in quantizers_of(module))
    products = function_products(module)
    if products is not None:
        yield products.ranks


@contextmanager
def _functions_in_float(modules: set[nn.Module]) -> Iterator[None]:
    """Has the functions that these modules call multiply in float, as they do where they are compiled."""
    before = [(module, products) for module in modules if (products := function_products(module)) is not None]
    try:
        for module, _ in before:
            set_function_products(module, None)
        yield
    finally:
        for module, products in before:
            set_function_products(module, products)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts aside what a training step changes, and puts it back."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    # What is to happen to a new gradient, as an optimizer's step.
    hooks = [(each, dict(each)) for p in parameters if (each := p._post_accumulate_grad_hooks) is not None]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    quantizers = [
        (module, {name: vars(module)[name] for name in ATTRIBUTES if name in vars(module)})
        for module in model.modules()
        if not any(each.frozen for _, each in quantizers_of(module))
    ]
    with torch.random.fork_rng(devices=[]):
        try:
            copies = copy.deepcopy([originals for _, originals in quantizers])  # together, for what they share
            for (module, _), own in zip(quantizers, copies, strict=True):
                vars(module).update(own)
                for ranks in _ranks_of(module):
                    ranks.stay_alone()
            for parameter in parameters:
                parameter.grad = None
            for each, _ in hooks:
                each.clear()
            yield
        finally:
            for module, originals in quantizers:
                detach(module)
                vars(module).update(originals)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for each, before in hooks:
                each.update(before)
            for module, before in buffers:
                module._buffers.update(before)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):  # others keep the counter of their versions
                        buffer.copy_(value)

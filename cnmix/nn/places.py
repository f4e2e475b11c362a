"""Where the quantizers of a model are, and what each product's are called.

A Linear or convolution has one product, and its quantizers have the module's name. A module with several, such as an
LSTM, has quantizers for each, by place within the module. The two are joined with two dots, ``encoder.lstm..l0.input``:
no part of a module's name is empty, so that no other module can have that name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .quantizers import ModuleQuantizers

_BETWEEN = ".."
# Plain attributes, neither submodules, parameters nor buffers: state_dict does not see them.
ATTRIBUTES = _ONE, _SEVERAL, FUNCTIONS = "quantizers", "quantizers_by_place", "function_products"


def quantizers_of(module: nn.Module) -> Iterator[tuple[str, ModuleQuantizers]]:
    """Yields the place, "" for a module's only product, and the quantizers of each product of this very module."""
    if _ONE in module.__dict__:
        yield "", module.__dict__[_ONE]
    yield from module.__dict__.get(_SEVERAL, {}).items()


def quantizer_sets(model: nn.Module) -> Iterator[tuple[str, ModuleQuantizers]]:
    """Yields the quantizers of every product of the model in fixed point, with the name that its state is saved by."""
    for fqn, module in model.named_modules():
        for place, quantizers in quantizers_of(module):
            yield product_name(fqn, place), quantizers


def attach(module: nn.Module, by_place: Mapping[str, ModuleQuantizers]) -> None:
    """Gives a module the quantizers of its products."""
    for place, quantizers in by_place.items():
        if place:
            module.__dict__.setdefault(_SEVERAL, {})[place] = quantizers
        else:
            module.__dict__[_ONE] = quantizers


def detach(module: nn.Module) -> None:
    """Takes them away."""
    module.__dict__.pop(_ONE, None)
    module.__dict__.pop(_SEVERAL, None)


def product_name(fqn: str, place: str) -> str:
    """Returns the name of the product at this place of a module."""
    return f"{fqn}{_BETWEEN}{place}" if place else fqn


def place_within(product: str) -> str:
    """Returns the place of a product within its module; empty for a module's only one."""
    return product.partition(_BETWEEN)[2]


def module_name(product: str) -> str:
    """Returns the name of the module that a product is in."""
    return product.partition(_BETWEEN)[0]

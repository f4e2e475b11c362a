"""Which parameters the products of a model multiply by, told from the names of the products."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from ..nn.classes import find_conversion, plain_class
from ..nn.function_places import ATTENTION_PLACES
from ..nn.places import module_name, place_within

_PARAMETER = re.compile(r"\(([\w.]+)\)")


class Weights:
    """The parameters of a model that products multiply by.

    Args:
        model: plain or converted.
        products: names of all of its products.
    """

    def __init__(self, model: nn.Module, products: Iterable[str]) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._by_functions = {id(self._parameters[name]) for each in products for name in self._of_function(each)}

    def names(self, product: str) -> Iterator[str]:
        """Yields the names of the parameters that a product multiplies by; none that the model does not have."""
        yield from self._of_function(product)
        fqn, place = module_name(product), place_within(product)
        module = self._modules.get(fqn)
        converted = None if module is None else find_conversion(plain_class(module))[0]
        if module is None or converted is None or place not in converted.places(module):
            return
        name = _within(fqn, converted.places(module)[place])
        if name in self._parameters:
            yield name
        parametrized = _within(fqn, f"parametrizations.{converted.places(module)[place]}.")
        yield from (name for name in self._parameters if name.startswith(parametrized))

    def serve_functions(self, product: str) -> bool:
        """Whether functions multiply by a weight of this product of a module too."""
        return any(id(self._parameters[name]) in self._by_functions for name in self.names(product))

    def _of_function(self, product: str) -> Iterator[str]:
        fqn, place = module_name(product), place_within(product)
        if place in ATTENTION_PLACES:
            own = _within(fqn, "")
            yield from (
                name
                for name in self._parameters
                if name.startswith(own) and (name.endswith("_weight") or name == f"{own}out_proj.weight")
            )
        for found in _PARAMETER.findall(place):
            whole = found.rpartition(".")[0]  # of a part of a parameter, which has a number
            yield from (name for name in (_within(fqn, found), _within(fqn, whole)) if name in self._parameters)


def _within(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name

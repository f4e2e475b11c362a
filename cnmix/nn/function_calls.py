"""Products that a module's forward pass computes by calling functions of torch."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OperandConfigs, Product
from .base import moves_statistics
from .batched import multiply_batches
from .card_tensors import check_one_device, is_on_card
from .exported import is_fake
from .functional import multiply
from .places import FUNCTIONS, attach, product_name
from .products import ConvolutionGeometry
from .quantizers import ModuleQuantizers
from .ranks import Ranks
from .recomputation import reentrant_part
from .shared_input import LatestInput

logger = logging.getLogger("cnmix")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)


class FunctionProducts:
    """What makes the quantizers of the functions that one module calls; an attribute of the module.

    Args:
        configs: settings of the operands.
        fqn: fully qualified name of the module.
        latest_input: shared with the other modules of the model.
        ranks: likewise.

    Attributes:
        configs: settings of the operands of each kind of product.
        fqn: see above.
        ranks: see above.
        expected: places of products in the state that was loaded, which were not called since.
        unexpected: places that are not in it, and were called.
        frozen: whether they are fixed for inference, and no new ones come to be.
        on_make: is called with the module and the quantizers that come to be, before they decide. A copy has none.
    """

    frozen = False
    on_make: Callable[[nn.Module, ModuleQuantizers], None] | None = None

    def __init__(self, configs: OperandConfigs, fqn: str, latest_input: LatestInput, ranks: Ranks) -> None:
        self.configs: dict[Product, OperandConfigs] = {"matmul": configs, "convolution": configs}
        self.fqn = fqn
        self._latest_input = latest_input
        self.ranks = ranks
        self.expected: set[str] = set()
        self.unexpected: set[str] = set()
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def change_settings(self, products: Iterable[Product] = ("matmul", "convolution"), **changes: Any) -> None:
        """Changes these settings of every operand of products that come to be from now on.

        Raises:
            ValueError: as ``QuantizeConfig.replace`` does.
        """
        for kind in products:
            self.configs[kind] = {name: config.replace(**changes) for name, config in self.configs[kind].items()}

    def name_of(self, module: nn.Module, operand: Tensor) -> str:
        """Returns the name of the parameter that an operand is, within the module, or the number of the part of one.

        Empty for another operand. A place that a loop goes through with several parameters is a product for each.
        """
        whole = _whole(operand)
        if not isinstance(whole, nn.Parameter) and not is_fake(whole):
            return ""
        known = self._names.get(id(whole))
        if known is None or known[0]() is not whole:
            names = {id(each): name for name, each in module.named_parameters()}
            known = self._names[id(whole)] = weakref.ref(whole), names.get(id(whole), "")
        name = known[1]
        if is_fake(whole):  # in a parameter's place, for this pass
            del self._names[id(whole)]
        if not name or operand.numel() == whole.numel():
            return name
        return f"{name}.{(operand.storage_offset() - whole.storage_offset()) // max(1, operand.numel())}"

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_names": {}}  # of the parameters of this very module
        state.pop("on_make", None)
        return state

    def make(self, module: nn.Module, place: str) -> ModuleQuantizers:
        """Gives the module, whose attribute this is, quantizers for the product of this place."""
        kind = kind_of(place)
        made = ModuleQuantizers(
            self.configs[kind],
            kind,
            product_name(self.fqn, place),
            self._latest_input,
            self.ranks,
            of_function=True,
        )
        attach(module, {place: made})
        if self.on_make is not None:
            self.on_make(module, made)
        return made

    def report_unexpected(self) -> None:
        """Says, once, that the module calls other functions than when its state was saved."""
        if self.expected:
            logger.warning(
                "%r does not call %s, which the state that was loaded has, but %s, which it does not have and which "
                "begins anew: a place is named by its line in the code, which has changed since",
                self.fqn,
                ", ".join(sorted(self.expected)),
                ", ".join(sorted(self.unexpected)),
            )
        self.expected, self.unexpected = set(), set()


def function_products(module: nn.Module) -> FunctionProducts | None:
    """Returns what makes the quantizers of the functions that a module calls; None where they stay float."""
    found: FunctionProducts | None = module.__dict__.get(FUNCTIONS)
    return found


def set_function_products(module: nn.Module, products: FunctionProducts | None) -> None:
    """Gives it to a module, or takes it away."""
    if products is None:
        module.__dict__.pop(FUNCTIONS, None)
    else:
        module.__dict__[FUNCTIONS] = products


def kind_of(place: str) -> Product:
    """Returns the kind of a function's product, by the name of its place."""
    return "convolution" if place.rpartition(":")[2].startswith("conv") else "matmul"


def is_multiplied(*operands: Any) -> bool:
    """Whether the core multiplies these: plain dense tensors of a float type up to 32 bits, none empty."""
    return all(
        (type(each) in _PLAIN or is_fake(each))
        and each.dtype in _DTYPES
        and (each.is_cpu or is_on_card(each))
        and each.layout is torch.strided
        and not each.is_nested
        and each.numel() > 0
        for each in operands
    )


def are_broadcast(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are broadcast against each other."""
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


def is_broadcast_to(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of this shape is broadcast to another one."""
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(each in (1, size) for each, size in sizes)


class Call:
    """One call of a function that multiplies.

    Its methods return ``NotImplemented`` where the product stays float.

    Args:
        module: whose forward pass it is in.
        products: of that module.
        place: of the call in the code; empty in a module of torch's, whose products have names.
    """

    def __init__(self, module: nn.Module, products: FunctionProducts, place: str) -> None:
        self.module = module
        self.products = products
        self.place = place

    def quantizers(self, *operands: Tensor, part: str = "") -> tuple[ModuleQuantizers, bool] | None:
        """Finds the quantizers of the product, or those of one of several products of the call.

        They come to be the first time that gradients flow through it, or that it multiplies by a parameter or is one
        of attention in a training step: what is computed from constants, such as a table of positions, stays float.

        Args:
            operands: what the product's result is computed from.
            part: name of one of several products, as of attention.

        Returns:
            Them, and whether their statistics move; None where the product stays float.

        Raises:
            RuntimeError: if the operands are on several devices.
        """
        if any(each.is_cpu != operands[0].is_cpu for each in operands):
            check_one_device(self.products.fqn, *operands)
        place, parameter = self.place, ""
        if not part:
            names = (self.products.name_of(self.module, each) for each in reversed(operands))
            parameter = next(filter(None, names), "")
            place += f"({parameter})" if parameter else ""
        elif place:
            place = f"{place}.{part}"
        else:
            place = part
        found = self.module.__dict__.get("quantizers_by_place", {}).get(place)
        if self.products.expected:
            self.products.expected.discard(place)
            if found is None:
                self.products.unexpected.add(place)
        if found is None:
            if self.products.frozen or not self._is_trained(operands, bool(part or parameter)):
                return None
            found = self.products.make(self.module, place)
        return found, moves_statistics(self.module, found)

    def _is_trained(self, operands: tuple[Tensor, ...], surely: bool) -> bool:
        if torch.is_grad_enabled():
            return (surely and self.module.training) or any(each.requires_grad for each in operands)
        return self.module.training and reentrant_part() is not None  # gradients will flow when the part is repeated

    def matmul(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Any:
        """Multiplies as ``torch.matmul`` does, and adds a bias (N,) where ``b`` has up to two dimensions.

        A column by a row is no sum, and stays float.
        """
        if not is_multiplied(a, b) or a.dim() == b.dim() == 1 or a.dim() == 0 or b.dim() == 0:
            return NotImplemented
        k = a.shape[-1]
        if k == 1 or k != b.shape[-2 if b.dim() > 1 else 0] or not are_broadcast(a.shape[:-2], b.shape[:-2]):
            return NotImplemented
        found = self.quantizers(a, b)
        if found is None:
            return NotImplemented
        left = a.unsqueeze(0) if a.dim() == 1 else a
        if b.dim() == 1:
            return _multiply_matrix(left, b.unsqueeze(0), bias, *found).squeeze(-1)
        y = _multiply_matrix(left, b.t(), bias, *found) if b.dim() == 2 else multiply_batches(left, b, *found)
        return y.squeeze(-2) if a.dim() == 1 else y

    def multiply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: ConvolutionGeometry | None = None,
        part: str = "",
    ) -> Any:
        """Multiplies as ``functional.multiply`` does."""
        if not is_multiplied(x, weight):
            return NotImplemented
        found = self.quantizers(x, weight, part=part)
        return NotImplemented if found is None else _multiply_matrix(x, weight, bias, *found, geometry)


def _multiply_matrix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantizers: ModuleQuantizers,
    training: bool,
    geometry: ConvolutionGeometry | None = None,
) -> Tensor:
    note_parameter(quantizers, weight)
    return multiply(x, weight, bias, quantizers, training, geometry)


def note_parameter(quantizers: ModuleQuantizers, weight: Tensor) -> None:
    """Tells quantizers whether the right operand is a parameter; an export's is what it was in eager mode."""
    if not is_fake(weight):
        quantizers.keeps_weight = is_parameter(weight)


def is_parameter(weight: Tensor) -> bool:
    """Whether this is a parameter, or all of one in another layout."""
    whole = _whole(weight)
    return isinstance(whole, nn.Parameter) and whole.numel() == weight.numel()


def _whole(x: Tensor) -> Tensor:
    """Returns what ``x`` is a view of, or itself."""
    return x if x._base is None else x._base

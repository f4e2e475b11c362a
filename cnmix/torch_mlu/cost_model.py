"""Estimates how long an operator takes on a card.

    time    = max(compute, memory) + launch
    compute = multiply-accumulates / (cores × clock × multiply-accumulates per cycle and core for the operands' types)
    memory  = bytes read and written / bandwidth of the card's memory

The card's numbers, and where they come from, are in ``cards``. Multiply-accumulates are those that
``cnmix.float_products`` counts, of cnmix's own products those that the core's kernels tell. Where a card does not
multiply in float, operands of float32 are int31, and those of half precision int16, as in the vendor's PyTorch, which
takes int32 tensors for int31 too. Every tensor is read once and written once, in its own dtype, since the vendor's
fused operators take float tensors and quantize them on the way; of an expanded one what it holds. cnmix's own products
read, besides the float tensors, each product's operands as integers. Other operators take the time of their memory.

It is the time of a kernel that reaches the peak rate and overlaps both parts whole, so that a real card takes longer.
Left out are the padding of channels to multiples of 64 and other losses of small and odd shapes, what stays on the chip
from one operator to the next, the statistics of adaptive quantization on its update steps, the arithmetic of
activations, norms and reductions, several passes over a tensor (softmax, norms), and the bus between host and card.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import float_products
from .cards import Card

LAUNCH = 5e-6
"""Seconds that an operator takes besides: starting a kernel. Nothing is published; this is the usual magnitude."""

# They give memory to numbers to come, or other shapes to those that are there.
_FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach_", "squeeze_", "unsqueeze_"}
_FREE |= {"t_", "transpose_", "set_", "resize_", "as_strided_", "_unsafe_view", "record_stream"}
# They write their first tensor without reading it.
_FILL = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_"}
# They read as much of their first tensor as they return.
_PICK = {"embedding", "gather", "index", "index_select"}
_COPY = {"copy_", "_copy_from", "_copy_from_and_resize", "_to_copy"}
_NUMBER = "_local_scalar_dense"  # to the host


class Product(NamedTuple):
    """A product of matrices, or a convolution.

    Attributes:
        macs: multiply-accumulates.
        left: type of one operand: int8, int16, int31, float16, bfloat16 or float32.
        right: of the other.
    """

    macs: int
    left: str
    right: str


@dataclass(frozen=True)
class Estimate:
    """How long an operator takes on a card, estimated.

    Attributes:
        compute: seconds of its multiply-accumulates at the peak rate; 0 without any.
        memory: seconds of its memory traffic at the full bandwidth.
        launch: seconds of starting it; 0 where nothing is started, as for a view.
        traffic: bytes read and written.
        products: what it multiplies.
    """

    compute: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    traffic: int = 0
    products: tuple[Product, ...] = ()

    @property
    def seconds(self) -> float:
        """All in all."""
        return max(self.compute, self.memory) + self.launch

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all products."""
        return sum(each.macs for each in self.products)


NOTHING = Estimate()


@dataclass(frozen=True)
class CostModel:
    """Estimates the time of operators on one card.

    Attributes:
        card: the card.
        floating: whether it multiplies float tensors in float, if it can; else in fixed point.
        bits: width of the operands of these products in fixed point; those of half precision have 16 at most.
    """

    card: Card
    floating: bool
    bits: int = 31

    @classmethod
    def of(cls, card: Card) -> CostModel:
        """Returns the model of a card that multiplies float tensors as it does by itself."""
        return cls(card, card.floating)

    def operand(self, dtype: torch.dtype) -> str:
        """Returns the type that the card multiplies a tensor of this dtype in."""
        in_float = self.floating and self.card.floating
        if dtype in (torch.float16, torch.bfloat16):
            return str(dtype).removeprefix("torch.") if in_float else f"int{min(self.bits, 16)}"
        if dtype.is_floating_point or dtype.is_complex:
            return "float32" if in_float else f"int{self.bits}"
        return {1: "int8", 2: "int16"}.get(dtype.itemsize, "int31")

    def products(self, products: Iterable[Product], traffic: int) -> Estimate:
        """Estimates one operator that multiplies.

        Args:
            products: of matrices, or convolutions, one after another; none for an operator that does not multiply.
            traffic: bytes that it reads and writes.

        Raises:
            ValueError: if the card does not multiply such operands.
        """
        products = tuple(products)
        return Estimate(
            compute=sum(each.macs / self.card.rate(each.left, each.right) for each in products),
            memory=traffic / self.card.bandwidth,
            launch=LAUNCH,
            traffic=traffic,
            products=products,
        )

    def operator(
        self, name: str, arguments: Mapping[str, Any], result: Any, kind: str | None = None
    ) -> Estimate | None:
        """Estimates one call of one of PyTorch's operators.

        Args:
            name: with its overload, as ``aten::addmm`` or ``aten::add.Tensor``.
            arguments: by their names in the operator's schema, in its order, defaults included.
            result: what it returned.
            kind: type of the operands of its product; None is what the card takes their dtype for.

        Returns:
            ``NOTHING`` where no kernel runs, as for a view; None of a copy between host and card.
        """
        base = name.removeprefix("aten::").partition(".")[0]
        aliases = _aliases(name)
        if aliases.is_view or base in _FREE:
            return NOTHING
        if base == _NUMBER or (base in _COPY and len({each.device for each in tensors_in([arguments, result])}) > 1):
            return None
        written = [result, *(arguments[key] for key in aliases.written)]
        traffic = _traffic(base, inputs_of(name, arguments), written)
        values = [*arguments.values()]
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else () for each in values]
        macs = float_products.count(
            f"aten::{base}", shapes, [None if isinstance(each, Tensor) else each for each in values]
        )
        if not macs:
            return self.products((), traffic)
        kind = kind or self.operand(next(each.dtype for each in values if isinstance(each, Tensor)))
        return self.products([Product(macs, kind, kind)], traffic)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested lists, tuples and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)


def count_bytes(x: Tensor) -> int:
    """Returns the bytes that hold a tensor's numbers; those of an expanded one count once."""
    if _is_special(x):
        return x.numel() * x.element_size()
    kept = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size)
    return math.prod(kept) * x.element_size()


def count_traffic(read: Any, written: Any) -> int:
    """Returns the bytes of tensors that are read, and of those that are written; the same tensor counts once of each.

    Args:
        read: tensors in nested lists, tuples and mappings.
        written: likewise.
    """
    return sum(_sizes(read).values()) + sum(_sizes(written).values())


def _traffic(base: str, read: Mapping[str, Any], written: Any) -> int:
    tensors = [*tensors_in(read)]
    if base in _PICK and tensors:
        return count_traffic(tensors[1:], written) + min(count_bytes(tensors[0]), sum(_sizes(written).values()))
    return count_traffic(tensors[base in _FILL :], written)


def _sizes(tensors: Any) -> dict[Any, int]:
    return {_place(each): count_bytes(each) for each in tensors_in(tensors)}


def _place(x: Tensor) -> Any:
    """Returns what is equal for tensors of the same numbers in memory."""
    if _is_special(x):
        return id(x)
    return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride()


def inputs_of(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an operator, by name, without the tensors that are there for its results."""
    return {key: value for key, value in arguments.items() if key not in _aliases(name).outputs}


class _Aliases(NamedTuple):
    """What an operator's declaration says of its arguments' memory.

    Attributes:
        outputs: those that are written and not read.
        written: those that are written.
        is_view: whether its result is another view of one, and nothing is computed.
    """

    outputs: frozenset[str]
    written: frozenset[str]
    is_view: bool


@functools.cache
def _aliases(name: str) -> _Aliases:
    operator, _, overload = name.partition(".")
    try:
        declared = torch._C._get_schema(operator, overload).arguments
    except RuntimeError:  # it is none of PyTorch's
        return _Aliases(frozenset(), frozenset(), False)
    outputs = frozenset(each.name for each in declared if each.is_out or each.name == "dst")
    written = frozenset(each.name for each in declared if each.alias_info is not None and each.alias_info.is_write)
    shared = any(each.alias_info is not None for each in declared)
    return _Aliases(outputs, written, shared and not written)


def _is_special(x: Tensor) -> bool:
    return x.is_nested or x.layout is not torch.strided

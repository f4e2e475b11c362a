"""The ranges that ``torch.profiler`` sees around the products on the core, and who else is told of what kernels do.

A range says what was multiplied: ``cnmix::matmul(int8 16x64, int16 64x10) 10240 MACs head``. What torch multiplies
inside of one, where the compiled part does not serve, is how the core is emulated, and no float product.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.autograd.profiler import record_function

from ..fixed_point import FixedPoint, FixedPointBatch
from .reference import output_size

_P = ParamSpec("_P")
_Operand = FixedPoint | FixedPointBatch
_RANGE = re.compile(r"cnmix::(\w+)\(int(\d+) [\dx]*, int(\d+) [\dx]*\) (\d+) MACs ?(.*)", re.DOTALL)

_R = TypeVar("_R")

Work = Literal["quantize", "product", "adapt", "look"]
"""What time goes into: the pass that quantizes an operand, a product, what update steps do beyond the pass, and looking
at a tensor for telemetry."""


class KernelListener(Protocol):
    """Is told what the kernels do in a context."""

    def multiplied(self, bits: tuple[int, int], macs: int, numbers: tuple[int, int]) -> None:
        """Takes note of a product, after it; one that another is made of is not told.

        Args:
            bits: widths of the two operands.
            macs: multiply-accumulates.
            numbers: how many numbers each operand has.
        """

    def spent(self, work: Work, seconds: float) -> None:
        """Takes note of the time that work took; what it called in turn is not told."""


_listeners: ContextVar[tuple[KernelListener, ...]] = ContextVar("kernel_listeners", default=())


def listeners() -> tuple[KernelListener, ...]:
    """Returns those that this context's kernels tell."""
    return _listeners.get()


def add_listener(listener: KernelListener) -> None:
    """Has the kernels of this context tell it, until ``remove_listener``."""
    _listeners.set((*_listeners.get(), listener))


def remove_listener(listener: KernelListener) -> None:
    """Takes that back; one that is not there is no mistake."""
    _listeners.set(tuple(each for each in _listeners.get() if each is not listener))


class ProfiledProduct(NamedTuple):
    """What the name of a range says.

    Attributes:
        kind: the kernel's name: matmul, batched_matmul, convolution, …
        bits: widths of the two operands.
        macs: multiply-accumulates.
        name: of the product, "" where the kernel was not told.
    """

    kind: str
    bits: tuple[int, int]
    macs: int
    name: str


def profiled(
    count: Callable[..., int],
) -> Callable[[Callable[_P, Tensor]], Callable[_P, Tensor]]:
    """Makes every call of a kernel a range while a profiler is on, and tells the listeners; without either: 0.3 µs.

    Args:
        count: returns the multiply-accumulates of a call from its arguments.
    """

    def decorate(kernel: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
        kind = kernel.__name__

        @functools.wraps(kernel)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
            told = _listeners.get()
            if told:
                result = _tell(told, "product", call, *args, **kwargs)
                a, b = (cast(_Operand, each) for each in args[:2])
                for each in told:
                    each.multiplied((a.bits, b.bits), count(*args, **kwargs), (a.values.numel(), b.values.numel()))
                return result
            if not _profiler_enabled():
                return kernel(*args, **kwargs)
            with record_function(_describe(kind, count, *args, **kwargs)):
                return kernel(*args, **kwargs)

        return call

    return decorate


def timed(work: Work) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Tells the listeners how long each call took; without any: 0.1 µs."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            told = _listeners.get()
            return _tell(told, work, function, *args, **kwargs) if told else function(*args, **kwargs)

        return call

    return decorate


def _tell(
    told: tuple[KernelListener, ...], work: Work, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs
) -> _R:
    """Calls a function, within which nobody is told, and tells how long it took."""
    token, started = _listeners.set(()), time.perf_counter()
    try:
        return function(*args, **kwargs)
    finally:
        seconds = time.perf_counter() - started
        _listeners.reset(token)
        for each in told:
            each.spent(work, seconds)


def parse(name: str) -> ProfiledProduct | None:
    """Returns what the name of a range says, None where it is not one of these."""
    found = _RANGE.fullmatch(name)
    if found is None:
        return None
    kind, a_bits, b_bits, macs, product = found.groups()
    return ProfiledProduct(kind, (int(a_bits), int(b_bits)), int(macs), product)


def _describe(kind: str, count: Callable[..., int], *args: Any, **kwargs: Any) -> str:
    operands = ", ".join(f"int{x.bits} {'x'.join(map(str, x.values.shape))}" for x in args[:2])
    return f"cnmix::{kind}({operands}) {count(*args, **kwargs)} MACs {kwargs.get('name', '')}".rstrip()


def count_matmul(a: _Operand, b: _Operand, **_: Any) -> int:
    """Returns the multiply-accumulates of (M, K) by (K, N), or of a batch of such products."""
    return a.values.numel() * b.values.shape[-1]


def count_convolution(
    x: FixedPoint,
    weight: FixedPoint,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    **_: Any,
) -> int:
    """Returns those of a convolution: a window for each number of the output."""
    channels, *window = weight.values.shape
    size = output_size(x.values.shape[2:], window[1:], stride, padding, dilation)
    return x.values.shape[0] * channels * math.prod(size) * math.prod(window)


def count_grad_input(grad_output: FixedPoint, weight: FixedPoint, *_: Any, **__: Any) -> int:
    """Returns those of the gradient of its input, or of a transposed convolution: as many as the convolution's."""
    return grad_output.values.numel() * math.prod(weight.values.shape[1:])


def count_grad_weight(grad_output: FixedPoint, x: FixedPoint, weight_size: Sequence[int], *_: Any, **__: Any) -> int:
    """Returns those of the gradient of its weight: as many as the convolution's."""
    return grad_output.values.numel() * math.prod(weight_size[1:])

"""Products of tensors on the emulated card, which are computed on the host's tensors with the same bytes.

A function of autograd that multiplies in fixed point reads its operands by their addresses. For tensors on the card a
form of it runs that hands it the host's, in the forward and the backward pass, and brings what it returns to the card:
nothing is copied, and the numbers are those of the host. A process without the emulated card never comes here.

The operators between the two, ``cnmix_card::host`` and ``cnmix_card::card``, come with ``cnmix.torch_mlu``, which this
module does not import.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

# Called as ``observer(name, phase, inputs, outputs, bits)``; see ``product_observers``.
ProductObserver = Callable[[str, str, Mapping[str, Any], Mapping[str, Tensor], Mapping[str, int]], None]

product_observers: ContextVar[tuple[ProductObserver, ...]] = ContextVar("product_observers", default=())
"""What is told of each product of tensors on the card, when it begins and when it ends.

The name of a product is ``quantize_matmul``, ``quantize_convolution``, ``quantize_attention``, ``quantize_lstm``,
``quantize_gru`` or ``quantize_rnn``, with ``_backward`` behind it in the backward pass; the phase is "begins", then
"ends", or "fails" where it raises. Inputs are by name (``input``, ``weight``, ``bias``, and the ``geometry`` of a
convolution; ``grad_output``), outputs ``result``, and ``grad_input``, ``grad_weight`` and so on; there are none before
the end. Bits are the widths of the operands ``input``, ``weight`` and ``grad_output``, the widest where a function
computes several products.
Under a transform of ``torch.func`` and in compiled graphs nobody is told.
"""

product_watcher: ContextVar[Callable[..., Any] | None] = ContextVar("product_watcher", default=None)
"""Called as ``watcher(apply, function, *args)`` in the place of each function that multiplies in fixed point, on any
device: ``apply(function, *args)`` computes it, and what the watcher returns is its result."""

_Teller = Callable[[str, list[str], Any], None]

# The first operands of every product, as its observers know them.
_NAMES = {"x": "input", "a": "input", "b": "weight"}


class _Described(Protocol):
    """What a function has among its arguments that says what it computes."""

    @property
    def product(self) -> str:
        """What is computed."""

    @property
    def fqn(self) -> str:
        """Where."""

    @property
    def bits(self) -> dict[str, int]:
        """Widths by operand."""


def apply_on_host(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Applies a function that multiplies in fixed point, wherever its tensors are.

    Args:
        function: takes two tensors first, and as ``quantizers``, ``attention`` or ``layer`` what says what it computes:
            a ``product``, its ``fqn``, and ``bits`` by operand.
        *args: its arguments.

    Returns:
        What it returns; on the card if the arguments are.

    Raises:
        RuntimeError: if some are on one device and some on another.
    """
    watcher = product_watcher.get()
    return _apply(function, *args) if watcher is None else watcher(_apply, function, *args)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    if args[0].is_cpu and args[1].is_cpu:
        return function.apply(*args)
    return _card_form(function).apply(*args)


def is_on_card(x: Tensor) -> bool:
    """Whether a tensor is on the emulated card."""
    if x.is_cpu or x.device.type != torch._C._get_privateuse1_backend_name():
        return False
    return torch._C._dispatch_has_kernel("cnmix_card::host")


def check_one_device(fqn: str, *args: Any) -> None:
    """Checks that the tensors among some arguments are on one device.

    Raises:
        RuntimeError: if not; it names the module.
    """
    devices = sorted({str(each.device) for each in args if isinstance(each, Tensor)})
    if len(devices) > 1:
        raise RuntimeError(f"{fqn!r} got tensors on {' and '.join(devices)}: bring them to one device with .to()")


def known_as(x: Tensor) -> Tensor:
    """Returns the tensor of the card that a function's argument stands for, or the argument itself."""
    found: Tensor = x.__dict__.get("_cnmix_on_card", x)
    return found


def widest(*bits: Mapping[str, int]) -> dict[str, int]:
    """Returns the largest width by operand of several products."""
    return {operand: max(each[operand] for each in bits) for operand in bits[0]}


def _described(args: tuple[Any, ...]) -> _Described:
    return next(each for each in args if not isinstance(each, Tensor) and hasattr(each, "bits"))


def to_host(x: Any) -> Any:
    """Returns a tensor's host view, differentiably; other values, and tensors of the host, as they are."""
    return torch.ops.cnmix_card.host.default(x) if isinstance(x, Tensor) and not x.is_cpu else x


def to_device_of(x: Tensor, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns host tensors as tensors of the card that ``x`` is on, if it is on one."""
    return tuple(results) if x.is_cpu else _on_card(tuple(results), x.get_device())


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what computes as a function of the host's tensors does, wherever the tensors are.

    Args:
        function: takes a tensor first, and others with it as they are; returns one or a tuple of them.
    """

    @functools.wraps(function)
    def computed(x: Tensor, *args: Any) -> Any:
        results = function(to_host(x), *map(to_host, args))
        return results if x.is_cpu else _on_card(results, x.get_device())

    return computed


def host_by_default() -> AbstractContextManager[Any]:
    """Returns a context in which new tensors are the host's, even where ``torch.set_default_device`` says otherwise."""
    return nullcontext() if torch._C._len_torch_function_stack() == 0 else torch.device("cpu")


def _host_views(args: tuple[Any, ...]) -> list[Any]:
    """Returns arguments with the host views of tensors in their place, by which ``known_as`` finds them again.

    Raises:
        RuntimeError: if tensors are on several devices.
    """
    card, host = args[0].get_device(), torch.ops.cnmix_card.host.default
    views = []
    for each in args:
        if isinstance(each, Tensor):
            if each.get_device() != card:
                check_one_device(_described(args).fqn, *args)
            view = host(each)
            view._cnmix_on_card = each
            views.append(view)
        else:
            views.append(each)
    return views


@functools.cache
def _card_form(function: Any) -> Any:
    """Returns the function that computes what ``function`` does of tensors of the card."""
    inner_forward, inner_backward = function.forward, function.backward
    contextless = function.setup_context is not torch.autograd.Function.setup_context
    code = inner_forward.__code__
    parameters = code.co_varnames[not contextless : code.co_argcount]
    names = [_NAMES.get(name, name) for name in parameters]
    describing = next(i for i, name in enumerate(parameters) if name in ("quantizers", "attention", "layer"))

    def forward(ctx: Any, *args: Any) -> Any:
        views, observers = _host_views(args), product_observers.get()
        ctx.card, ctx.described = args[0].get_device(), args[describing]
        tell = (
            _teller(observers, f"quantize_{ctx.described.product}", ctx.described, names, args) if observers else None
        )
        results = _on_card(_computed(tell, inner_forward, ctx, *views), ctx.card)
        if tell is not None:
            tell("ends", _result_names(results), results)
        return results

    def backward(ctx: Any, *gradients: Any) -> Any:
        observers, tell = product_observers.get(), None
        if observers:
            given = ["grad_output", *(f"grad_output{i}" for i in range(1, len(gradients)))]
            tell = _teller(observers, f"quantize_{ctx.described.product}_backward", ctx.described, given, gradients)
        found = _on_card(_computed(tell, inner_backward, ctx, *map(to_host, gradients)), ctx.card)
        if tell is not None:
            tell("ends", [f"grad_{name}" for name in names], found)
        return found

    def contextless_forward(*args: Any) -> Any:
        return _on_card(_computed(None, inner_forward, *_host_views(args)), args[0].get_device())

    # The other form's backward pass is a function that comes by ``apply_on_host`` itself.
    methods = {"forward": contextless_forward} if contextless else {"forward": forward, "backward": backward}
    return type(f"{function.__name__}OnCard", (function,), {name: staticmethod(each) for name, each in methods.items()})


def _computed(tell: _Teller | None, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of the host's tensors, and tells where it raises."""
    if tell is None and torch._C._len_torch_function_stack() == 0:
        return function(*args)
    try:
        with host_by_default():
            return function(*args)
    except BaseException:
        if tell is not None:
            tell("fails", [], ())
        raise


def _on_card(results: Any, card: int) -> Any:
    to_card = torch.ops.cnmix_card.card.default
    if isinstance(results, tuple):
        return tuple([to_card(each, card) if isinstance(each, Tensor) else each for each in results])
    return to_card(results, card)


def _result_names(results: Any) -> list[str]:
    count = len(results) if isinstance(results, tuple) else 1
    return ["result", *(f"result{i}" for i in range(1, count))]


def _teller(
    observers: tuple[ProductObserver, ...], name: str, described: _Described, names: list[str], args: Any
) -> _Teller:
    """Tells observers that a product begins; returns what tells them that it ends, or fails."""
    # Switches and quantizers are no operands.
    inputs = {
        name: value
        for name, value in zip(names, args, strict=False)
        if value is None or (isinstance(value, (Tensor, tuple)) and value is not described)
    }
    for observer in observers:
        observer(name, "begins", inputs, {}, described.bits)

    def tell(phase: str, names: list[str], results: Any) -> None:
        outputs = _by_name(names, results)
        for observer in reversed(observers):
            observer(name, phase, inputs, outputs, described.bits)

    return tell


def _by_name(names: list[str], values: Any) -> dict[str, Tensor]:
    pairs = zip(names, values if isinstance(values, tuple) else (values,), strict=False)
    return {name: value for name, value in pairs if isinstance(value, Tensor)}

"""What runs on the card, seen operator by operator: for the dump tool, the logs and the profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from ..nn.card_tensors import product_observers

_CARD = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
_COMPOSITE = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")


# What computes nothing: detach, which would come here again from within, and what PyTorch asks before x.data = y.
_QUESTIONS = (torch.ops.aten.detach.default, torch.ops.aten._has_compatible_shallow_copy_type.default)

_DTYPES_OF_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


@dataclass(frozen=True, eq=False)
class OperatorCall:
    """One call of an operator that runs on the card.

    Attributes:
        name: of the operator, as the vendor's tools write it: without namespace, overload and leading underscores,
            ``add``, ``convolution_overrideable``, ``local_scalar_dense``.
        full_name: as PyTorch writes it, ``aten::add.Tensor``.
        arguments: by the names of its declaration and in their order, those left out with their defaults. Tensors are
            as they are on the card.
        number: of the call within its parent, from 1.
        parent: the call that this one is part of.
        operator: what to call, or None for one of cnmix's own products, which PyTorch has no operator for.
        bits: widths of such a product's operands, by ``input``, ``weight`` and ``grad_output``; else empty.
    """

    name: str
    full_name: str
    arguments: Mapping[str, Any]
    number: int
    parent: OperatorCall | None
    operator: torch._ops.OpOverload | None
    bits: Mapping[str, int]

    @property
    def depth(self) -> int:
        """How many calls this one is within: 0 for what the script itself calls."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def in_place(self) -> bool:
        """Whether it writes into its first argument: ``add_``."""
        return self.name.endswith("_")

    @property
    def out_form(self) -> bool:
        """Whether it writes into arguments given for that: ``add.out``."""
        return self.operator is not None and any(each.is_out for each in self.operator._schema.arguments)

    @property
    def is_view(self) -> bool:
        """Whether its result is another view of an argument's memory, and nothing is computed: ``view``."""
        return self.operator is not None and self.operator.is_view


class OperatorObserver:
    """Base of what watches the operators of the card, on this thread, while it is entered.

    An operator is what has a kernel of the card's own; one that is made of others is not seen, they are. Operators on
    tensors of the host are not seen. Backward passes are seen, as they run on the thread that asks for them.

    Several observers can be active at once, and each sees the same.
    """

    unseen: frozenset[str] = frozenset()
    """Names of operators that are neither shown nor numbered."""

    def __init__(self) -> None:
        self._numbers = [0]  # of the calls seen, per level
        self._open: list[OperatorCall] = []

    def begins(self, call: OperatorCall) -> None:
        """Called before an operator runs. Tensors may be read; what runs here is not seen, and has no gradients."""

    def ends(self, call: OperatorCall, result: Any) -> None:
        """Called after it ran, with what it returns. Not called where it raised."""

    def __enter__(self) -> OperatorObserver:
        mode = _active_mode()
        if mode is None:
            mode = _Mode()
            mode.__enter__()
            product_observers.set((*product_observers.get(), mode.product))
        mode.observers.append(self)
        self._numbers, self._open = [0], []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        mode = _active_mode()
        if mode is None or self not in mode.observers:
            return
        mode.observers.remove(self)
        # Where something else was entered since, ours stays below it, watching nothing, until it is needed again.
        if not mode.observers and _get_current_dispatch_mode_stack()[-1] is mode:
            product_observers.set(tuple(each for each in product_observers.get() if each != mode.product))
            mode.__exit__(kind, error, trace)

    def _begin(self, name: str, *rest: Any) -> OperatorCall | None:
        if name in self.unseen:
            return None
        self._numbers[-1] += 1
        full_name, arguments, operator, bits = rest
        parent = self._open[-1] if self._open else None
        call = OperatorCall(name, full_name, arguments, self._numbers[-1], parent, operator, bits)
        self.begins(call)
        self._open.append(call)
        self._numbers.append(0)
        return call

    def _close(self, call: OperatorCall) -> None:
        level = self._open.index(call)
        del self._open[level:], self._numbers[level + 1 :]


class _Mode(TorchDispatchMode):
    """PyTorch's hook at the operators that reach a device: one for all observers of a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.observers: list[OperatorObserver] = []
        self._products: list[list[tuple[OperatorObserver, OperatorCall]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(each, FakeTensor) for each in types):
            return func(*args, **kwargs)  # a compiler tracing: nothing is computed
        if not all(map(_is_plain, types)):
            return NotImplemented  # a tensor class of its own says what it is made of
        if func is torch.ops.aten.convolution.default and torch._C._get_tracing_state() is not None:
            return self._trace_convolution(*args)
        given = args, kwargs
        args, kwargs = numbers_as_tensors(func._schema, args, kwargs)
        if not self.observers or not (_on_card(args) or _on_card(kwargs.values())):
            return func(*args, **kwargs)
        if func in _QUESTIONS:
            return func(*args, **kwargs)
        full_name = func.name()
        # Only a call from the top lets other modes below this one see it. What calls just its own out form is one
        # operator too.
        from_top = _calls_its_out_form(full_name) or bool(_get_current_dispatch_mode_stack())
        if not from_top and _is_made_of_others(full_name):
            with self:
                return func.redispatch(_CARD, *args, **kwargs)
        with contextlib.nullcontext() if from_top else self:
            opened = self._begin(_plain_name(full_name), full_name, _by_name(func._schema, *given), func, {})
            try:
                result = func(*args, **kwargs) if from_top else func.redispatch(_CARD, *args, **kwargs)
            except BaseException:
                self._close(opened)
                raise
            self._end(opened, result)
        return result

    def _trace_convolution(self, *args: Any) -> torch.Tensor:
        """Lets ``torch.jit.trace`` see what a convolution calls, and records; below here it sees nothing."""
        key: Any = torch._C._parse_dispatch_key("Tracer")
        tracer = torch._C.DispatchKeySet(key)
        included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        flags = (
            *(torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()),
            *(torch._C._get_cudnn_enabled(), torch._C._get_cudnn_allow_tf32()),
        )
        with torch._C._ForceDispatchKeyGuard(included | tracer, excluded - tracer), self:
            traced: torch.Tensor = torch.ops.aten._convolution.default(*args, *flags)
        return traced

    def product(
        self,
        name: str,
        phase: str,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        bits: Mapping[str, int],
    ) -> None:
        """Takes what cnmix's own products say: they are no operators of PyTorch's."""
        if phase == "begins":
            arguments = {key: value for key, value in inputs.items() if key != "geometry"}
            if inputs.get("geometry") is not None:
                arguments.update(inputs["geometry"]._asdict())
            self._products.append(self._begin(name, f"cnmix::{name}", arguments, None, dict(bits)))
        elif self._products and phase == "ends":
            self._end(self._products.pop(), _result_of(outputs))
        elif self._products:
            self._close(self._products.pop())

    def _begin(self, *what: Any) -> list[tuple[OperatorObserver, OperatorCall]]:
        with _unseen():
            begun = [(each, each._begin(*what)) for each in list(self.observers)]
        return [(observer, call) for observer, call in begun if call is not None]

    def _end(self, opened: list[tuple[OperatorObserver, OperatorCall]], result: Any) -> None:
        self._close(opened)
        with _unseen():
            for observer, call in opened:
                observer.ends(call, result)

    def _close(self, opened: list[tuple[OperatorObserver, OperatorCall]]) -> None:
        for observer, call in opened:
            if call in observer._open:
                observer._close(call)


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """What runs within is seen by no observer, and leaves no trace for gradients."""
    with torch.no_grad(), torch._C._DisableTorchDispatch():
        yield


def _active_mode() -> _Mode | None:
    return next((each for each in _get_current_dispatch_mode_stack() if isinstance(each, _Mode)), None)


def _is_plain(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is torch._C._disabled_torch_dispatch_impl


def _on_card(values: Any) -> bool:
    for each in values:
        if isinstance(each, torch.Tensor):
            if each.device.type == "mlu":
                return True
        elif isinstance(each, torch.device):
            if each.type == "mlu":
                return True
        elif isinstance(each, (list, tuple)) and _on_card(each):
            return True
    return False


def _plain_name(full_name: str) -> str:
    name = full_name.partition("::")[2].partition(".")[0]
    return name.lstrip("_") or name


def _by_name(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {}
    for index, each in enumerate(schema.arguments):
        if index < len(args):
            arguments[each.name] = args[index]
        else:
            arguments[each.name] = kwargs.get(each.name, each.default_value if each.has_default_value() else None)
    return arguments


def _is_made_of_others(full_name: str) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return not has_kernel(full_name, "PrivateUse1") and any(has_kernel(full_name, key) for key in _COMPOSITE)


def _calls_its_out_form(full_name: str) -> bool:
    out = f"{full_name}_out" if "." in full_name else f"{full_name}.out"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return (
        has_kernel(full_name, "CompositeExplicitAutograd")
        and not has_kernel(full_name, "PrivateUse1")
        and torch._C._dispatch_has_kernel(out)
        and has_kernel(out, "PrivateUse1")
    )


def numbers_as_tensors(
    schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Returns an operator's arguments with tensors in the places of numbers that were one.

    PyTorch shows ``x % 2`` to Python as ``remainder.Tensor(x, 2)``, and few operators take that back.

    Args:
        schema: of the operator.
        args: as they are shown.
        kwargs: likewise.
    """
    if not any(type(each) in _DTYPES_OF_NUMBERS for each in (*args, *kwargs.values())):
        return args, kwargs
    tensors = {each.name for each in schema.arguments if "Tensor" in str(each.type)}

    def restored(name: str, value: Any) -> Any:
        if name not in tensors or type(value) not in _DTYPES_OF_NUMBERS:
            return value
        with _unseen():
            made = torch.tensor(value, dtype=_DTYPES_OF_NUMBERS[type(value)], device="cpu")
            torch.ops.cnmix_card.mark_number_(made)
        return made

    positional = tuple(restored(each.name, value) for each, value in zip(schema.arguments, args, strict=False))
    return positional, {name: restored(name, value) for name, value in kwargs.items()}


def _result_of(outputs: Mapping[str, torch.Tensor]) -> Any:
    values = tuple(outputs.values())
    return values[0] if len(values) == 1 else values

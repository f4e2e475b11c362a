"""Lists the operators that ran on the card: their time on this host, and an estimate of that on a card.

with profiler.profile() as pro:
    y = model(x)
print(pro)
pro.export_json("times.json")
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from ...kernels.profiling import Work, add_listener, listeners, remove_listener
from ...tables import format_table
from ..cards import find_card
from ..cost_model import NOTHING, CostModel, Estimate, Product, count_traffic, inputs_of, tensors_in
from ..observation import OperatorCall, OperatorObserver
from ..settings import settings

_FORMULA = "max(multiply-accumulates / peak rate, bytes / bandwidth) + launch"
_SHOWN = 4  # input tensors in a line of the table
_BYTES = {8: 1, 16: 2, 31: 4}


class Input(NamedTuple):
    """A tensor that an operator was given.

    Attributes:
        name: of the argument.
        shape: of the tensor.
        dtype: without "torch.".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(frozen=True)
class Operator:
    """One call of an operator.

    Attributes:
        name: ``aten::addmm``, or ``cnmix::quantize_matmul`` for products in fixed point.
        host_time: seconds that the emulation took for it on this host.
        estimate: what a card would take; None of a copy between host and card.
        inputs: the tensors among its arguments.
    """

    name: str
    host_time: float
    estimate: Estimate | None
    inputs: tuple[Input, ...]

    @property
    def device_time(self) -> float:
        """Seconds that a card would take, estimated; 0 where nothing is."""
        return self.estimate.seconds if self.estimate else 0.0

    @property
    def operands(self) -> str:
        """Types of what it multiplies, as "int16 × int8"; "" for an operator that multiplies no matrices."""
        products = self.estimate.products if self.estimate else ()
        return ", ".join(dict.fromkeys(f"{each.left} × {each.right}" for each in products))

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain data, times in microseconds."""
        known = self.estimate
        return {
            "name": self.name,
            "host_time_us": self.host_time * 1e6,
            "device_time_estimate_us": known.seconds * 1e6 if known else None,
            "compute_estimate_us": known.compute * 1e6 if known else None,
            "memory_estimate_us": known.memory * 1e6 if known else None,
            "bytes": known.traffic if known else None,
            "products": [product._asdict() for product in known.products] if known else [],
            "inputs": [{**x._asdict(), "dim": x.dim} for x in self.inputs],
        }


@dataclass(frozen=True)
class Average:
    """All calls of an operator with the same operands.

    Attributes:
        name: of the operator.
        operands: types of what it multiplies, or "".
        calls: how many.
        host_time: seconds of all calls on this host.
        device_time: seconds of all calls on a card, estimated.
    """

    name: str
    operands: str
    calls: int
    host_time: float
    device_time: float


@dataclass(frozen=True)
class Averages:
    """The operators, the one with the largest estimate first; its text is a table."""

    rows: tuple[Average, ...]
    title: str

    def __iter__(self) -> Iterator[Average]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("operator", "operands", "calls", "host µs", "per call", "device µs (estimate)", "per call", "share")
        ]
        total = sum(row.device_time for row in self.rows)
        for row in self.rows:
            host = [f"{row.host_time * 1e6:.1f}", f"{row.host_time * 1e6 / row.calls:.1f}"]
            device = ["–"] * 3  # of copies
            if row.device_time:
                device = [f"{row.device_time * 1e6:.1f}", f"{row.device_time * 1e6 / row.calls:.1f}"]
                device.append(f"{row.device_time / total:.1%}")
            table.append((row.name, row.operands, f"{row.calls}", *host, *device))
        return f"{self.title}\n{format_table(table)}"


class profile(OperatorObserver):
    """Lists the operators that run on the emulated card within it; its text is a table.

    Device times are estimates of ``cnmix.torch_mlu.cost_model``, never measured; there is none of copies between host
    and card. What runs no kernel, as views do, is left out. Of an operator that is made of others, those are listed; of
    cnmix's products in fixed point each as a whole, with the widths that it ran with. What runs on the host, and in
    other threads, is not seen. One that is entered can be printed at any time, and is entered once.

    Args:
        card: name of the card whose time is estimated; None is the emulated one.

    Attributes:
        operators: the calls, in the order in which they ended; where one raised, it is left out.

    Raises:
        ValueError: if there is no card of that name.
    """

    def __init__(self, card: str | None = None) -> None:
        super().__init__()
        self._card = None if card is None else find_card(card)
        self._model: CostModel | None = None
        self.operators: list[Operator] = []
        self._entered: float | None = None
        self._took: float | None = None
        self._inputs: tuple[Input, ...] = ()
        self._started = 0.0
        self._products: list[Product] = []
        self._integers = 0  # bytes of the operands of these

    def __enter__(self) -> profile:
        if self._entered is not None:
            raise RuntimeError("a profile is entered once: make another with profiler.profile()")
        if any(isinstance(each, profile) for each in listeners()):
            raise RuntimeError("another profile is running: leave its with block before this one")
        importlib.import_module("torch._dynamo")  # else the first operator loads it, and seems to take a second
        known = settings()
        floating = known.multiplies_in_float if self._card is None else self._card.floating
        self._model = CostModel(self._card or known.card, floating, known.product_bits)
        super().__enter__()
        add_listener(self)
        self._entered = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._took = self.e2e_time
        remove_listener(self)
        super().__exit__(kind, error, trace)

    def begins(self, call: OperatorCall) -> None:
        """Notes what an operator is given."""
        if call.depth:
            return
        self._inputs = tuple(_inputs(inputs_of(call.full_name, call.arguments)))
        self._products, self._integers = [], 0
        self._started = time.perf_counter()

    def ends(self, call: OperatorCall, result: Any) -> None:
        """Adds an operator to the list."""
        if call.depth:
            return
        took = time.perf_counter() - self._started
        assert self._model is not None  # set on entering
        estimate: Estimate | None
        # What PyTorch's own operators multiply does not depend on how this host emulates it.
        if self._products and not call.full_name.startswith("aten::"):
            traffic = count_traffic(call.arguments, result) + self._integers
            estimate = self._model.products(self._products, traffic)
        else:
            estimate = self._model.operator(call.full_name, call.arguments, result)
        if estimate is not NOTHING:
            name = call.full_name.partition(".")[0]
            self.operators.append(Operator(name, took, estimate, self._inputs))

    def multiplied(self, bits: tuple[int, int], macs: int, numbers: tuple[int, int]) -> None:
        """Takes what cnmix's kernels multiply within the present operator."""
        self._products.append(Product(macs, *(f"int{each}" for each in bits)))
        self._integers += sum(_BYTES[each] * count for each, count in zip(bits, numbers, strict=True))

    def spent(self, work: Work, seconds: float) -> None:
        """Leaves the time of kernels to that of the operator that they are in."""

    @property
    def card(self) -> str:
        """Name of the card whose time is estimated."""
        return (self._model.card if self._model else self._card or settings().card).name

    @property
    def e2e_time(self) -> float:
        """Seconds on this host from entering to leaving, or until now: with what the host computes, and profiling."""
        if self._entered is None:
            return 0.0
        return time.perf_counter() - self._entered if self._took is None else self._took

    @property
    def device_time(self) -> float:
        """Seconds of all operators on a card, estimated, one after another."""
        return sum(each.device_time for each in self.operators)

    def key_averages(self) -> Averages:
        """Returns calls, times and their averages by operator and operands."""
        found: dict[tuple[str, str], list[Operator]] = {}
        for each in self.operators:
            found.setdefault((each.name, each.operands), []).append(each)
        rows = (
            Average(*key, len(calls), sum(c.host_time for c in calls), sum(c.device_time for c in calls))
            for key, calls in found.items()
        )
        return Averages(tuple(sorted(rows, key=lambda row: -row.device_time)), self._title())

    def export_json(self, path: str | os.PathLike[str]) -> None:
        """Writes every call, and the end-to-end times, as JSON; times in microseconds.

        The file is written under a temporary name and renamed, so that a failure leaves what was there before.

        Args:
            path: the file; its folder is made where it is missing.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self._as_dict(), indent=2) + "\n", encoding="utf-8")
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("operator", "host µs", "device µs (estimate)", "input shapes", "dtypes", "dims", "operands")
        ]
        for each in self.operators:
            shapes = _few(["×".join(map(str, x.shape)) or "()" for x in each.inputs])
            dtypes, dims = _few([x.dtype for x in each.inputs]), _few([f"{x.dim}" for x in each.inputs])
            host, device = f"{each.host_time * 1e6:.1f}", f"{each.device_time * 1e6:.1f}" if each.estimate else "–"
            table.append((each.name, host, device, shapes, dtypes, dims, each.operands))
        return f"{self._title()}\n{format_table(table)}"

    def _title(self) -> str:
        if self._model is None:
            return "no operators: the profile was not entered"
        note = f" ({self._model.card.note})" if self._model.card.note else ""
        return f"device times are estimates for {self.card}{note}: {_FORMULA}"

    def _as_dict(self) -> dict[str, Any]:
        return {
            "card": self.card,
            "device_time": self._title(),
            "e2e": {"host_time_us": self.e2e_time * 1e6, "device_time_estimate_us": self.device_time * 1e6},
            "operators": [each.as_dict() for each in self.operators],
        }


def _inputs(arguments: Mapping[str, Any]) -> Iterator[Input]:
    for name, value in arguments.items():
        several = not isinstance(value, Tensor)
        for index, x in enumerate(tensors_in(value)):
            yield Input(f"{name}[{index}]" if several else name, tuple(x.shape), str(x.dtype).removeprefix("torch."))


def _few(values: Sequence[str]) -> str:
    more = len(values) - _SHOWN
    return ", ".join(values[:_SHOWN]) + (f" … {more} more" if more > 0 else "")

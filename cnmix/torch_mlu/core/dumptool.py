"""The vendor's ``torch_mlu.core.dumptool``: what every operator of the card got and gave, as text files."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from ..observation import OperatorCall, OperatorObserver, numbers_as_tensors

# What only makes or moves memory is never dumped.
_UNSEEN = frozenset({"copy_", "copy_from", "copy_from_and_resize", "empty", "empty_strided"})

_TYPES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}
_SCALARS = {bool: "Bool", int: "Long", float: "Double", complex: "ComplexDouble"}

_FIRST = 10  # values at level 0
_CHUNK = 1 << 16  # values that are made text at once


class Dumper:
    """Writes the arguments and the result of every operator that runs on the card within it: forward, loss, backward.

    A context manager, with ``start`` and ``end`` for what cannot be one. Operator number ``n`` has a folder
    ``n_name``, which contains the folders of the operators that it called, numbered likewise, and the files
    ``mlu_argument``, ``cnnl_result`` and, with ``use_cpu``, ``cpu_result``. What only copies or allocates is left out.

    Args:
        dump_dir: the folder to make, ``./dump`` where empty. Where it exists, the next free of ``dump_dir1``,
            ``dump_dir2`` and so on.
        enable: whether anything is written. If not, no folder is made.
        use_cpu: also compute each operator in float on the host, from copies of the same arguments, and write that
            beside. Operators that write into their arguments are left out, and so are those that fail there. It changes
            nothing of what the script computes, nor its random numbers.
        level: of a tensor, 0 writes the first 10 values, 1 the sum of absolute values, 2 all.

    Raises:
        TypeError: if ``dump_dir`` is no path.
        ValueError: if there is no such level.
        NotADirectoryError: if ``dump_dir`` is below a file.
        PermissionError: if it cannot be made.
    """

    def __init__(
        self, dump_dir: str | os.PathLike[str] = "./dump", enable: bool = True, use_cpu: bool = False, level: int = 0
    ) -> None:
        if not isinstance(dump_dir, (str, os.PathLike)):
            raise TypeError(f"Dumper writes into a folder: dump_dir must be a path, not {dump_dir!r}")
        if level not in (0, 1, 2) or isinstance(level, bool):
            raise ValueError(
                f"Dumper has no level {level!r}: take 0 (the first {_FIRST} values of a tensor), 1 (the sum of "
                "absolute values) or 2 (all values)"
            )
        self._writer: _Writer | None
        self._wanted = Path(os.fspath(dump_dir).rstrip("/") or "./dump")
        self._enable, self._use_cpu, self._level = bool(enable), bool(use_cpu), level
        self._folder, self._writer = self._wanted, None
        if enable:
            _check_can_be_made(self._wanted)

    @property
    def dump_dir(self) -> str:
        """The folder that is written, or was last; before the start, the one that is wished for."""
        return str(self._folder)

    def start(self) -> None:
        """Begins to dump. Nothing happens where the dumper is disabled, or has begun."""
        if self._enable and self._writer is None:
            self._folder = _new_folder(self._wanted)
            self._writer = _Writer(self._folder, self._use_cpu, self._level)
            self._writer.__enter__()

    def end(self) -> None:
        """Ends to dump."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.__exit__(None, None, None)

    def __enter__(self) -> Dumper:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def dump_cnnl_gencase(enable: bool = True, level: str = "L1") -> bool:
    """Switches the cases of operators on or off, which tell a library's developers what was called, and how.

    Each call of an operator on this thread becomes a file ``./gen_case/operator/operator_number``: at L1 with types,
    shapes and strides, at L2 also with smallest and largest values, at L3 with all values.

    Args:
        enable: whether they are written from now on.
        level: L1, L2 or L3.

    Returns:
        Whether the switch was made. It is not where the environment variable ``CNNL_GEN_CASE`` is set, which decides
        instead.

    Raises:
        ValueError: if there is no such level.
    """
    if level not in ("L1", "L2", "L3"):
        raise ValueError(f"dump_cnnl_gencase has no level {level!r}: take 'L1', 'L2' or 'L3'")
    if "CNNL_GEN_CASE" in os.environ:
        logging.getLogger("torch_mlu").warning("CNNL_GEN_CASE is set: dump_cnnl_gencase changes nothing")
        return False
    if _cases.writer is not None:
        _cases.writer.__exit__(None, None, None)
        _cases.writer = None
    if enable:
        folder = Path("./gen_case")
        folder.mkdir(exist_ok=True)
        _cases.writer = _CaseWriter(folder.absolute(), level)
        _cases.writer.__enter__()
    return True


class _Writer(OperatorObserver):
    """Writes a dumper's folder."""

    unseen = _UNSEEN

    def __init__(self, folder: Path, use_cpu: bool, level: int) -> None:
        super().__init__()
        self._folder, self._use_cpu, self._level = folder, use_cpu, level
        self._process = os.getpid()

    def begins(self, call: OperatorCall) -> None:
        if os.getpid() != self._process:  # a fork of this one, as a data loader's: it has a dumper of its own or none
            return
        folder = self._of(call)
        folder.mkdir(parents=True)
        kinds = _argument_kinds(call)
        for name, value in call.arguments.items():
            self._write(folder / f"mlu_{name}", value, kinds.get(name, "Array"))
        if self._use_cpu and not call.in_place and not call.out_form:
            # Before it runs: some operators write into arguments that their declarations do not name so.
            found, result = _on_host(call)
            if found:
                self._write(folder / "cpu_result", result, _result_kind(call))

    def ends(self, call: OperatorCall, result: Any) -> None:
        if os.getpid() == self._process:
            self._write(self._of(call) / "cnnl_result", result, _result_kind(call))

    def _of(self, call: OperatorCall) -> Path:
        above = self._folder if call.parent is None else self._of(call.parent)
        return above / f"{call.number}_{call.name}"

    def _write(self, path: Path, value: Any, kind: str) -> None:
        with path.open("w", encoding="utf-8") as file:
            write_value(file, value, kind, self._level)


class _CaseWriter(OperatorObserver):
    """Writes cases."""

    unseen = _UNSEEN

    def __init__(self, folder: Path, level: str) -> None:
        super().__init__()
        self._folder, self._level = folder, {"L1": -2, "L2": -1, "L3": 2}[level]
        self._counts: dict[str, int] = {}

    def begins(self, call: OperatorCall) -> None:
        self._counts[call.name] = number = self._counts.get(call.name, 0) + 1
        folder = self._folder / call.name
        folder.mkdir(exist_ok=True)
        kinds = _argument_kinds(call)
        with (folder / f"{call.name}_{number}").open("w", encoding="utf-8") as file:
            file.write(f"{call.full_name}\n")
            for name, value in call.arguments.items():
                file.write(f"{name}\n")
                write_value(file, value, kinds.get(name, "Array"), self._level)


class _Cases:
    writer: _CaseWriter | None = None


_cases = _Cases()


def _check_can_be_made(folder: Path) -> None:
    above = next(each for each in folder.absolute().parents if each.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"Dumper cannot make {folder}: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"Dumper cannot make {folder}: {above} cannot be written")


def _new_folder(wanted: Path) -> Path:
    folder, number = wanted, 0
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}{number}")
        else:
            return folder.absolute()  # the script may change its working directory


# The files: a line that says what it is, then the values, one a line.


def _argument_kinds(call: OperatorCall) -> dict[str, str]:
    if call.operator is None:
        return {}
    return {each.name: _kind(str(each.type)) for each in call.operator._schema.arguments}


def _result_kind(call: OperatorCall) -> str:
    returns = [] if call.operator is None else call.operator._schema.returns
    return "Vector" if len(returns) == 1 and "List[" in str(returns[0].type) else "Tuple"


def _kind(declared: str) -> str:
    """Returns the name of the kind of list that the vendor's operators take for a type of PyTorch's declarations."""
    if "List[Optional[Tensor]]" in declared:
        return "List"
    return "TensorList" if "List[Tensor]" in declared else "Array"


def write_value(file: TextIO, value: Any, kind: str, level: int) -> None:
    """Writes a value as a dump has it."""
    if isinstance(value, torch.Tensor):
        _write_tensor(file, value, level)
    elif value is None:
        # A result that is not there is a tensor without a type; an argument was optional.
        file.write("Tensor : Type = Undefined\n" if kind in ("Tuple", "Vector") else "Optional : None\n")
    elif type(value) in _SCALARS:
        file.write(f"Scalar : Type = {_SCALARS[type(value)]}\n{_text(value)}\n")
    elif isinstance(value, (list, tuple)):
        file.write(f"{kind} : Size = {len(value)}\n")
        for each in value:
            if type(each) in _SCALARS:
                file.write(f"{_text(each)}\n")
            else:
                write_value(file, each, kind, level)
    elif isinstance(value, torch.Generator):
        file.write("Generator : \n")
    else:
        file.write(f"{_other_kind(value)} : {_TYPES.get(value, value)}\n")


def _other_kind(value: Any) -> str:
    return {"dtype": "ScalarType", "device": "Device", "layout": "Layout", "memory_format": "MemoryFormat"}.get(
        type(value).__name__, "String" if isinstance(value, str) else type(value).__name__
    )


def _write_tensor(file: TextIO, x: torch.Tensor, level: int) -> None:
    if x.numel() == 0:
        file.write("Tensor : Type = Empty\n")
        return
    values = _values(x, level)
    file.write(
        f"Tensor : Type = {_TYPES.get(x.dtype, str(x.dtype).removeprefix('torch.'))} : Shape = {list(x.shape)} : "
        f"Stride = {list(x.stride())} : Dumped = {len(values)}\n"
    )
    for start in range(0, len(values), _CHUNK):
        file.writelines(_lines(values[start : start + _CHUNK].tolist()))


def _values(x: torch.Tensor, level: int) -> torch.Tensor:
    """Returns what is written of a tensor: 1-D, on the host, as the level says."""
    if level in (0, -2):
        return _first(_host(x), _FIRST if level == 0 else 0)
    flat = _host(x).resolve_conj().resolve_neg().reshape(-1)
    if level == 2:
        return flat
    if level == -1:
        return flat[:0] if flat.is_complex() else torch.stack([flat.min(), flat.max()])
    if flat.dtype == torch.bool:
        return flat.sum().reshape(1)
    wide = torch.complex128 if flat.is_complex() else torch.float64 if flat.is_floating_point() else torch.int64
    return flat.to(wide).abs().sum().reshape(1)


def _first(x: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the first values, 1-D, and copies little more: ``x`` may be large and of any strides."""
    for dim in range(x.dim()):
        behind = math.prod(x.shape[dim + 1 :])
        x = x.narrow(dim, 0, min(x.shape[dim], max(1, -(-count // behind))))
    return x.resolve_conj().resolve_neg().reshape(-1)[:count]


def _lines(values: list[Any]) -> Iterable[str]:
    if values and isinstance(values[0], float):
        yield "%g\n" * len(values) % tuple(values)  # six digits, as the vendor's
    else:
        yield from (f"{_text(each)}\n" for each in values)


def _text(value: complex) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, complex):
        return f"({value.real:g},{value.imag:g})"
    return f"{value:g}" if isinstance(value, float) else str(value)


# The same operator on the host.

_HOST_FORMS = {
    "aten::convolution_overrideable": torch.ops.aten.convolution.default,
    "aten::convolution_backward_overrideable": torch.ops.aten.convolution_backward.default,
}


def _on_host(call: OperatorCall) -> tuple[bool, Any]:
    """Returns whether an operator could be computed on the host, and its result."""
    with contextlib.suppress(Exception), warnings.catch_warnings(), _untouched_random_numbers():
        warnings.simplefilter("ignore")
        arguments = dict(call.arguments)
        for name, value in arguments.items():
            # A view is of the memory around it too, and is not written.
            arguments[name] = _host(value) if call.is_view and isinstance(value, torch.Tensor) else _host_copy(value)
        if call.operator is None:
            return _float_product(call.name, arguments)
        operator = _HOST_FORMS.get(call.full_name, call.operator)
        if operator is torch.ops.aten.convolution_backward.default:
            weight, transposed = arguments["weight"], arguments["transposed"]
            channels = weight.shape[1] * arguments["groups"] if transposed else weight.shape[0]
            arguments["bias_sizes"] = [channels]
        positional = [arguments[each.name] for each in operator._schema.arguments if not each.kwarg_only]
        named = {each.name: arguments[each.name] for each in operator._schema.arguments if each.kwarg_only}
        args, kwargs = numbers_as_tensors(operator._schema, tuple(positional), named)
        return True, operator(*args, **kwargs)
    return False, None


def _float_product(name: str, arguments: Mapping[str, Any]) -> tuple[bool, Any]:
    """Computes one of cnmix's products in float, where its operands say all of it: the forward ones of modules."""
    if name not in ("quantize_matmul", "quantize_convolution") or "weight" not in arguments:
        return False, None
    x, weight = arguments["input"], arguments["weight"]
    if name == "quantize_convolution":
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        geometry = {key: arguments[key] for key in names}
        geometry["output_padding"] = geometry["output_padding"] or [0] * len(geometry["stride"])
        return True, torch.ops.aten.convolution(x, weight, arguments["bias"], *geometry.values())
    if "bias" not in arguments:  # two batches of matrices
        return True, x @ weight
    return True, torch.nn.functional.linear(x, weight.flatten(1), arguments["bias"])


def _host(x: torch.Tensor) -> torch.Tensor:
    view: torch.Tensor = torch.ops.cnmix_card.host(x) if x.device.type == "mlu" else x
    return view


def _host_copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _host(value).clone()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_host_copy, value))
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.Generator):
        copy = torch.Generator()
        copy.set_state(value.get_state())
        return copy
    return value


@contextlib.contextmanager
def _untouched_random_numbers() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)

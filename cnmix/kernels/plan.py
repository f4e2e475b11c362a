"""Plans: a fixed list of steps over prepared memory, which the compiled part runs in one call.

A step is a product of integers or a pass over float elements, with a chain of float32 operations on every element that
it makes, each rounded by itself, and with places where the elements go, as floats or quantized again. What steps hand
on to each other shares memory as soon as it is no longer needed.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from .native import structures
from .native.structures import Place, Step, Steps, Windows
from .plan_chain import (
    ARENA,
    Add,
    AddValue,
    Bounded,
    Clamp,
    LeakyRelu,
    Multiply,
    MultiplyAdd,
    Quantize,
    Relu,
    Stage,
    Store,
    Value,
    check_chain,
    encode,
    simplify,
)
from .plan_memory import aligned, lay_out, note_replaced
from .plan_weights import Weights, arrange, gather_columns, pack_depthwise
from .reference import output_size

__all__ = [
    "Add",
    "AddValue",
    "Clamp",
    "LeakyRelu",
    "Multiply",
    "MultiplyAdd",
    "Plan",
    "Quantize",
    "Relu",
    "Stage",
    "Store",
    "Value",
    "serves",
]

_MOST_TAPS = 131071  # int8 products whose sum fits int32: 131072 * 2**14 is 2**31
_STEP = {name: i for i, name in enumerate(("product", "depthwise", "elements", "max_pool", "copy", "enlarge"))}


def serves() -> bool:
    """Whether plans run here: the compiled part is built, and the processor multiplies int8 vectors."""
    library = native.library()
    return library is not None and library.cnmix_isa(-1) >= 3


class Plan:
    """Collects steps in the order in which they run, then runs them.

    First make values and steps, then call ``finish``, then ``run`` as often as wanted, from any thread.
    """

    def __init__(self) -> None:
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._inner: list[Value] = []
        self._places: list[tuple[Place, Value, int]] = []  # to be filled in when memory is laid out
        self._steps: list[Step] = []
        self._kept: list[object] = []  # what pointers of steps point to
        self._weights: list[tuple[Step, Weights]] = []
        self._lock = threading.Lock()
        self._arena: Tensor | None = None
        self._packed: Tensor | None = None
        self._array: Steps | None = None
        self.arena_bytes = 0

    def input(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        """Declares a tensor that is given at each run."""
        value = Value(shape, dtype, 1 + len(self._inputs) + len(self._outputs))
        value.written = -1
        self._inputs.append(value)
        return value

    def output(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        """Declares a tensor whose memory is given at each run."""
        value = Value(shape, dtype, 1 + len(self._inputs) + len(self._outputs))
        self._outputs.append(value)
        return value

    def value(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        """Declares a tensor between steps."""
        value = Value(shape, dtype, ARENA)
        self._inner.append(value)
        return value

    def product(
        self,
        source: Value,
        weight: Tensor,
        chain: Sequence[Stage],
        *,
        stride: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilation: Sequence[int] = (),
        groups: int = 1,
    ) -> None:
        """Correlates an int8 image with a kernel, or multiplies rows by a matrix; sums are rounded to float32 once.

        Args:
            source: int8 (N, C, *spatial) with up to three spatial dimensions; for a matrix, any rows of K channels.
            weight: int8 (O, C / groups, *kernel), or a matrix (O, K).
            chain: what becomes of the sums.
            stride: one number per spatial dimension, as the next two; not for a matrix.
            padding: zeros around the image.
            dilation: distance between taps.
            groups: groups of channels.

        Raises:
            ValueError: Shapes or types do not fit, or K is so long that sums could leave int32.
        """
        matrix = weight.dim() == 2
        spatial = (1,) * (0 if matrix else weight.dim() - 2)
        stride, dilation, padding = stride or spatial, dilation or spatial, padding or (0,) * len(spatial)
        outputs, run, *kernel = weight.shape
        if weight.dtype != torch.int8 or source.dtype != torch.int8:
            raise ValueError(f"a plan multiplies int8, not {source.dtype} by {weight.dtype}")
        if run * groups != source.channels or outputs % groups or (not matrix and weight.dim() != len(source.shape)):
            raise ValueError(f"a weight {tuple(weight.shape)} in {groups} groups does not fit {source}")
        if not all(len(numbers) == len(kernel) for numbers in (stride, padding, dilation)) or len(kernel) > 3:
            raise ValueError(f"stride, padding and dilation need a number for each of at most 3 dimensions of {kernel}")
        if run * math.prod(kernel) > _MOST_TAPS:
            raise ValueError(
                f"K of {run * math.prod(kernel)} is more than {_MOST_TAPS}: int8 sums could leave int32; run this "
                "product outside of a plan"
            )
        size = [] if matrix else list(source.shape[2:])
        output = output_size(size, kernel, stride, padding, dilation)
        images = source.rows if matrix else source.shape[0]
        geometry = native.WindowGeometry(output, kernel, stride, dilation, padding, (1,) * len(kernel))
        windows = _windows(images, size, geometry, run, source.channels)
        rows = images * math.prod(output)
        depthwise = groups > 1 and groups == source.channels == outputs
        step = Step(_STEP["depthwise" if depthwise else "product"])
        step.rows, step.channels, step.bytes, step.groups, step.windows = rows, outputs, 1, groups, windows
        if depthwise:
            weights = pack_depthwise(weight)
        else:
            step.arrangement = arrange(windows, groups)
            weights = gather_columns(weight, step.arrangement, windows, groups)
        step.tiles = weights.tiles
        self._weights.append((step, weights))
        largest = weight.detach().flatten(1).short().abs().sum(1).max().item() if weight.numel() else 0
        self._add(step, source, None, chain, 128.0 * largest)

    def elements(self, source: Value, chain: Sequence[Stage]) -> None:
        """Applies a chain to the elements of a float32 value."""
        if source.dtype != torch.float32:
            raise ValueError(f"a chain takes float32 elements, not {source}")
        step = Step(_STEP["elements"])
        step.rows, step.channels, step.bytes = source.rows, source.channels, 4
        step.windows.images = source.shape[0]
        self._add(step, source, None, chain, source.bound)

    def max_pool(
        self,
        source: Value,
        target: Value,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        """Takes the largest element of each window; what lies outside the image is smaller than any.

        Args:
            source: (N, C, *spatial).
            target: (N, C, *positions) of the same type; its size decides how many windows there are.
            kernel: one number per spatial dimension, as the next three.
            stride: distance between windows.
            padding: how far the first window reaches out of the image.
            dilation: distance between the elements of a window.
        """
        dims = len(source.shape) - 2
        if (
            source.dtype != target.dtype
            or source.shape[:2] != target.shape[:2]
            or not 1 <= dims <= 3
            or not all(len(numbers) == dims for numbers in (target.shape[2:], kernel, stride, padding, dilation))
        ):
            raise ValueError(f"a pool of {tuple(kernel)} does not make {target} of {source}")
        geometry = native.WindowGeometry(target.shape[2:], kernel, stride, dilation, padding, (1,) * dims)
        step = Step(_STEP["max_pool"])
        step.rows, step.channels, step.bytes = target.rows, target.channels, source.dtype.itemsize
        step.windows = _windows(source.shape[0], source.shape[2:], geometry, source.channels, source.channels)
        self._add(step, source, target, (), source.bound)

    def concatenate(self, sources: Sequence[Value], target: Value) -> None:
        """Puts the channels of values of equal rows side by side."""
        if any(s.dtype != target.dtype or s.rows != target.rows for s in sources) or (
            sum(s.channels for s in sources) != target.channels
        ):
            raise ValueError(f"{', '.join(map(str, sources))} side by side are not {target}")
        first = 0
        for source in sources:
            step = Step(_STEP["copy"])
            step.rows, step.channels = target.rows, source.channels
            step.windows.run = step.source_stride = source.channels * source.dtype.itemsize
            step.target_stride = target.channels * target.dtype.itemsize
            self._add(step, source, target, (), source.bound, first * target.dtype.itemsize, again=first > 0)
            first += source.channels

    def upsample_nearest(self, source: Value, target: Value) -> None:
        """Repeats each pixel a whole number of times in each dimension."""
        size, output = source.shape[2:], target.shape[2:]
        if (
            source.dtype != target.dtype
            or source.shape[:2] != target.shape[:2]
            or not 1 <= len(size) == len(output) <= 3
            or any(n == 0 or m % n for n, m in zip(size, output, strict=True))
        ):
            raise ValueError(f"{target} is not {source} with each pixel repeated")
        ones = (1,) * len(size)
        step = Step(_STEP["enlarge"])
        step.rows, step.channels = target.rows, target.channels
        run = source.channels * source.dtype.itemsize
        geometry = native.WindowGeometry(output, ones, ones, ones, (0,) * len(size), ones)
        step.windows = _windows(source.shape[0], size, geometry, run, run)
        self._add(step, source, target, (), source.bound)

    def finish(self) -> None:
        """Lays out memory and packs weights; no step can be added any more."""
        library = native.library()
        if library is None or not serves():
            raise RuntimeError("plans need the compiled part and a processor with AVX-512 VNNI")
        for value in self._outputs:
            if value.written is None:
                raise ValueError(f"no step writes the output {value}")
        self.arena_bytes = lay_out(self._inner)
        self._arena = native.empty((max(1, self.arena_bytes),), torch.int8)
        for place, value, more in self._places:
            place.base, place.offset = value.base, value.offset + more
        sizes = [aligned(weights.bytes) for _, weights in self._weights]
        self._packed = native.empty((max(1, sum(sizes)),), torch.int8)
        at = self._packed.data_ptr()
        for (step, weights), size in zip(self._weights, sizes, strict=True):
            step.weights, step.corrections = at, weights.corrections.data_ptr()
            self._kept.append(weights.corrections)
            weights.pack(library, at)
            at += size
        array = (Step * len(self._steps))(*self._steps)
        self._array = Steps(array, len(self._steps))
        self._kept.append(array)
        self._weights, self._places = [], []

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Runs the steps.

        Args:
            inputs: tensors of the inputs' shapes and types, in the order of their declaration, or of a whole number of
                times their first dimension: then the steps run so many times, which keeps what is between them in the
                cache. Anything that is not channels last is copied first, unless only steps on elements read it.
            outputs: memory for the outputs, channels last.

        Returns:
            False where a quantized element was NaN or infinite: then the outputs hold nothing of use.

        Raises:
            ValueError: A tensor has another shape, type or layout.
            MemoryError: There was no memory for a thread's rows.
        """
        return self._run(inputs, outputs, None)

    def profile(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[float]:
        """Runs the steps and returns the seconds that each one took."""
        seconds = (ctypes.c_double * len(self._steps))()
        self._run(inputs, outputs, seconds)
        return list(seconds)

    def _run(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], seconds: ctypes.Array[ctypes.c_double] | None
    ) -> bool:
        library = native.library()
        if self._array is None or self._arena is None or library is None:
            raise ValueError("finish the plan before it runs")
        if len(inputs) != len(self._inputs) or len(outputs) != len(self._outputs):
            raise ValueError(f"the plan takes {len(self._inputs)} inputs and {len(self._outputs)} outputs")
        count = 1 + len(inputs) + len(outputs)
        bases, numbers = (ctypes.c_void_p * count)(self._arena.data_ptr()), ctypes.c_int64 * count
        strides, planes = numbers(), numbers()
        kept = []
        turns = _turns([*inputs, *outputs], [*self._inputs, *self._outputs])
        for tensor, value in zip(inputs, self._inputs, strict=True):
            if not _channels_last(tensor):
                if value.planes and tensor.is_contiguous():
                    planes[value.base] = 1
                else:
                    tensor = tensor.movedim(1, -1).contiguous()
            kept.append(tensor)
            bases[value.base], strides[value.base] = tensor.data_ptr(), value.bytes
        for tensor, value in zip(outputs, self._outputs, strict=True):
            if not _channels_last(tensor):
                raise ValueError(
                    f"the memory of the output {value} must be channels last, not of strides {tensor.stride()}"
                )
            bases[value.base], strides[value.base] = tensor.data_ptr(), value.bytes
        run = structures.Run(*(ctypes.addressof(array) for array in (bases, strides, planes)), turns)
        run.seconds = None if seconds is None else ctypes.addressof(seconds)
        with self._lock:
            outcome = library.cnmix_run_plan(ctypes.byref(self._array), ctypes.byref(run))
        if outcome == 2:
            raise MemoryError("no memory for the rows that a thread of a plan prepares")
        return outcome == 0

    def _add(
        self,
        step: Step,
        source: Value,
        target: Value | None,
        chain: Sequence[Stage],
        bound: float,
        more: int = 0,
        again: bool = False,
    ) -> None:
        if self._array is not None:
            raise ValueError("the plan is finished")
        index = len(self._steps)
        source.note_read(index)
        if step.kind != _STEP["elements"]:
            source.planes = False
        self._places.append((step.source, source, 0))
        step.target.base = -1
        if target is not None:
            target.note_written(index, again)
            target.bound = max(bound, target.bound) if again else bound
            self._places.append((step.target, target, more))
        check_chain(chain, step.rows, step.channels)
        for stage in chain:
            if isinstance(stage, AddValue):
                stage.value.note_read(index)
                stage.value.planes = False
            elif isinstance(stage, (Store, Quantize)):
                stage.value.note_written(index)
        note_replaced(source, chain)
        simple = simplify(chain, bound, of_sums=step.kind != _STEP["elements"])
        stages = (structures.Stage * len(simple))(*(encode(stage, self._kept) for stage in simple))
        for operation, made in zip(simple, stages, strict=True):
            made.place.base = -1
            if isinstance(operation, (AddValue, Store, Quantize, Bounded)):
                made.stride = step.channels
                self._places.append((made.place, operation.value, 0))
        self._kept.append(stages)
        step.stages, step.stage_count = stages, len(simple)
        self._steps.append(step)


def _windows(images: int, size: Sequence[int], geometry: native.WindowGeometry, run: int, pixel: int) -> Windows:
    windows = Windows(images, run, pixel)
    missing = 3 - len(size)
    for name, values, neutral in (("size", size, 1), ("before", geometry.before, 0), ("output", geometry.size, 1)):
        getattr(windows, name)[:] = [neutral] * missing + list(values)
    for name in ("kernel", "stride", "dilation", "step"):
        getattr(windows, name)[:] = [1] * missing + list(getattr(geometry, name))
    return windows


def _turns(tensors: Sequence[Tensor], values: Sequence[Value]) -> int:
    """Returns how many times the tensors have the values' N, after a check of everything else."""
    turns = max(
        (len(x) // max(1, value.shape[0]) for x, value in zip(tensors, values, strict=True) if x.dim()), default=1
    )
    for x, value in zip(tensors, values, strict=True):
        shape = (turns * value.shape[0], *value.shape[1:])
        if tuple(x.shape) != shape or x.dtype != value.dtype or x.device.type != "cpu":
            raise ValueError(f"the plan takes {value}, not {x.dtype} {tuple(x.shape)} on {x.device}")
    return turns


def _channels_last(tensor: Tensor) -> bool:
    return tensor.movedim(1, -1).is_contiguous()

"""Writes what happens in a training to a file of lines of JSON, step by step."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..adaptive import OperandQuantizer
from ..decisions import Decision
from ..fixed_point import FixedPoint, FixedPointBatch
from ..kernels import saturated_share
from ..kernels.profiling import add_listener, remove_listener
from ..nn import ModuleQuantizers, callers
from ..nn.places import product_name, quantizers_of
from ..registry import registry, unwrap
from ..rules import RuleBook
from ..version import __version__
from .rules import TelemetryRule, is_due, parse_telemetry_rules
from .statistics import StepSample, measure_values

logger = logging.getLogger("cnmix")

FILE = "telemetry.jsonl"
FORMAT_VERSION = 1

# Statistics that are taken from values of an operand.
_OF_VALUES = ("underflow", "snr", "histogram")

# Lines that are kept before they are written; each step that is sampled writes them anyway.
_MOST_LINES = 2000


@dataclass
class _Watched:
    """An operand that is recorded.

    Attributes:
        number: of the operand in the file.
        rules: that hold for it.
        quantizer: of the operand.
        sample: what was found in the step that is being sampled; None where nothing was looked at.
        statistics: that this step is asked for.
        met_nonfinite: whether NaN or infinity has been recorded.
    """

    number: int
    rules: tuple[TelemetryRule, ...]
    quantizer: OperandQuantizer
    sample: dict[str, Any] | None = None
    statistics: set[str] = field(default_factory=set)
    met_nonfinite: bool = False


def record(
    model: nn.Module,
    path: str | os.PathLike[str],
    every_n_steps: int = 50,
    rules: Iterable[TelemetryRule | Mapping[str, Any]] = (),
    first_step: int = 0,
) -> Recorder:
    """Records a training in a plain loop.

        with cnmix.telemetry.record(model, "run/") as recorder:
            for inputs, targets in loader:
                ...
                optimizer.step()
                recorder.step(loss=loss)

    Everything from one ``step`` to the next is one step, and its time; only rank 0 of several processes writes.

    Args:
        model: as ``cnmix.initialize`` returned it.
        path: a folder, in which the file is ``telemetry.jsonl``, or a file that ends in ``.jsonl``. It is made where
            it is missing, and written on where it is there.
        every_n_steps: steps from one that is sampled to the next.
        rules: what is sampled of which operands; see ``TelemetryRule``. Decisions are recorded of all operands.
        first_step: number of the first step, where a run is resumed: what the file has from it on counts no more.

    Raises:
        RuntimeError: if another recorder records the model.
        TypeError: if ``rules`` is no list.
        ValueError: for an unknown name in a rule, with the nearest known one, or a value out of its range.
    """
    recorder = Recorder(model, path, every_n_steps, rules, first_step=first_step)
    recorder.begin_step(first_step)
    return recorder


class Recorder:
    """Records decisions of all operands as they come, and samples statistics and times every n steps.

    ``begin_step`` and ``end_step`` stand around each optimizer step; ``step`` does both, for plain loops. Of a step
    with several micro-batches the first is looked at. Other ranks than 0 record nothing.

    Args:
        model: see ``record``; likewise ``path``, ``every_n_steps``, ``rules`` and ``first_step``.
        path: see there.
        every_n_steps: see there.
        rules: see there.
        first_step: see there.
        level: opt level, for readers of the file; None where ``cnmix.initialize`` knows it.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str],
        every_n_steps: int = 50,
        rules: Iterable[TelemetryRule | Mapping[str, Any]] = (),
        *,
        first_step: int = 0,
        level: str | None = None,
    ) -> None:
        self._model = unwrap(model)
        self._every_n_steps = every_n_steps
        self._rules = parse_telemetry_rules(rules, every_n_steps)
        self._book = RuleBook(self._model, ())
        for rule in self._rules:
            self._book.check_names_of(rule)
        target = Path(path)
        self.file = target if target.suffix == ".jsonl" else target / FILE
        self._active = not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)
        self._names = {id(module): fqn for fqn, module in self._model.named_modules()}
        self._watched: dict[int, _Watched] = {}
        self._run: dict[str, Any] | None = None  # the first line, until it is written
        self._lines: list[str] = []  # no objects, through which the garbage collector would go again and again
        self._step, self._latest = first_step - 1, first_step - 1
        self._started: float | None = None
        self._sample: StepSample | None = None
        self._between: dict[str, Any] | None = None  # first, last and seconds of the steps that were not sampled
        if not self._active:
            return
        sets = [(module, each) for module in self._model.modules() for _, each in quantizers_of(module)]
        recorded: list[object] = [quantizer.listener for _, each in sets for _, quantizer in each]
        recorded += [products.on_make for _, _, products in callers(self._model)]
        if any(each is not None for each in recorded):
            raise RuntimeError("another recorder records this model: close it first")
        self.file.parent.mkdir(parents=True, exist_ok=True)  # before anything is changed that an error would leave so
        setup = registry.models.get(self._model)
        self._run = {
            "kind": "run",
            "version": FORMAT_VERSION,
            "cnmix": __version__,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "level": level if level is not None or setup is None else setup.level.name,
            "every_n_steps": every_n_steps,
            "steps_per_epoch": None,
            "first_step": first_step,
        }
        for module, each in sets:
            self._watch(module, each)
        for _, _, products in callers(self._model):
            products.on_make = self._watch

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin_step(self, step: int | None = None) -> None:
        """Begins an optimizer step; without a number, the one after the last."""
        if not self._active:
            return
        self._stop_looking()  # at a step that was begun and not ended
        self._step = self._step + 1 if step is None else step
        due = {rule for rule in self._rules if rule.is_due(self._step, self._latest)}
        if due or is_due(self._every_n_steps, self._step, self._latest):
            self._ask(due)
        self._latest = self._step
        self._started = time.perf_counter()

    def end_step(self, **metrics: float | Tensor) -> None:
        """Ends the step that was begun; ``metrics`` are recorded with it."""
        if not self._active or self._started is None:
            return
        if "step" in metrics or "kind" in metrics:
            raise ValueError("a metric cannot be called step or kind, which each line has already: rename it")
        seconds, self._started = time.perf_counter() - self._started, None
        sample = self._sample
        if sample is None:
            between = self._between = self._between or {"first": self._step, "last": self._step, "seconds": 0.0}
            between.update(last=self._step, seconds=between["seconds"] + seconds)
        else:
            self._write_sample(sample, seconds)
        if metrics:
            values = {name: each.item() if isinstance(each, Tensor) else each for name, each in metrics.items()}
            self._write("metrics", step=self._step, **{name: _number(float(each)) for name, each in values.items()})
        if sample is not None or len(self._lines) > _MOST_LINES:
            self.flush()

    def step(self, **metrics: float | Tensor) -> None:
        """Ends a step and begins the next one."""
        self.end_step(**metrics)
        self.begin_step()

    def flush(self) -> None:
        """Appends what is there to the file, in whole lines."""
        if self._run is not None:
            for watched in self._watched.values():  # a Trainer's plugin learns it with the first batch
                self._run["steps_per_epoch"] = watched.quantizer.config.steps_per_epoch
                break
            self._lines.insert(0, json.dumps(self._run))
            self._run = None
        if not self._lines:
            return
        text = "".join(f"{line}\n" for line in self._lines)
        with open(self.file, "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line that a killed run was at
                    text = f"\n{text}"
            file.write(text.encode())
        self._lines = []

    def close(self) -> None:
        """Writes the rest, and leaves the model as it was; a step that was begun and not ended counts for nothing."""
        if not self._active:
            return
        self._active = False
        self._stop_looking()
        for watched in self._watched.values():
            watched.quantizer.listener = None
        for _, _, products in callers(self._model):
            products.on_make = None
        self._write_between()
        self.flush()

    def decided(self, quantizer: OperandQuantizer, decision: Decision) -> None:
        """Records a decision."""
        at, reason, errors, _, bits, (before, after), outcome, interval, interval_reason = decision
        # Operands decide in their thousands, and json.dumps would take twice as long.
        tried = ", ".join(f'"{width}": {"null" if error is None else error}' for width, error in errors.items())
        self._lines.append(
            f'{{"kind": "decision", "step": {self._step}, "id": {self._watched[id(quantizer)].number}, "at": {at}, '
            f'"reason": "{reason}", "errors": {{{tried}}}, "bits": [{bits[0]}, {bits[1]}], '
            f'"position": [{"null" if before is None else before}, {after}], "outcome": "{outcome}", '
            f'"interval": {interval}, "interval_reason": "{interval_reason}"}}'
        )

    def met_nonfinite(self, quantizer: OperandQuantizer) -> None:
        """Records the first NaN or infinity of an operand, and says which was the first of all."""
        watched = self._watched[id(quantizer)]
        if not watched.met_nonfinite:
            if not any(each.met_nonfinite for each in self._watched.values()):
                logger.warning("the run's first NaN or infinity: %s, in step %d", quantizer.name, self._step)
            watched.met_nonfinite = True
            self._write("nonfinite", step=self._step, id=watched.number)

    def looked(self, quantizer: OperandQuantizer, x: Tensor, quantized: FixedPoint | FixedPointBatch) -> None:
        """Measures an operand that this step is to sample."""
        watched = self._watched[id(quantizer)]
        if self._sample is None or not watched.statistics:  # another asked for it
            return
        position = quantized.position if isinstance(quantized, FixedPoint) else quantizer.state.position
        found: dict[str, Any] = {"bits": quantized.bits, "position": position}
        if "saturation" in watched.statistics:
            found["saturation"] = saturated_share(quantized) if quantized.finite else None
        if "scale" in watched.statistics:
            found["scale"] = None if position is None else math.ldexp(1.0, position)
        names = [name for name in _OF_VALUES if name in watched.statistics]
        values: dict[str, Any] = {}
        if names and quantized.finite and x.numel() and position is not None:
            values = measure_values(x, quantized, position)
        watched.sample = {**found, **{name: values.get(name) for name in names}}

    def _watch(self, module: nn.Module, quantizers: ModuleQuantizers) -> None:
        """Takes in the quantizers of a product, of a function that was called for the first time too."""
        place = next(place for place, each in quantizers_of(module) if each is quantizers)
        name = product_name(self._names.get(id(module), ""), place) or quantizers.fqn
        rules = [rule for rule in self._rules if self._book.holds(rule, module)]
        for operand, quantizer in quantizers:
            holding = tuple(rule for rule in rules if not rule.operands or operand in rule.operands)
            number = len(self._watched)
            self._watched[id(quantizer)] = _Watched(number, holding, quantizer)
            quantizer.listener = self
            self._write(
                "operand",
                id=number,
                module=name,
                operand=operand,
                product=quantizers.product,
                bits=quantizer.state.bits,
                max_bitwidth=quantizer.config.max_bitwidth,
                threshold=quantizer.config.threshold_for(quantizers.product),
            )

    def _ask(self, due: set[TelemetryRule]) -> None:
        """Has this step sampled: its times, and what these rules name."""
        self._sample = StepSample()
        for watched in self._watched.values():
            watched.sample, watched.statistics = None, set()
            for rule in watched.rules:
                if rule in due:
                    watched.statistics.update(rule.statistics)
            if watched.statistics:
                watched.quantizer.look_next = watched.quantizer.look_next or "values"
        add_listener(self._sample)

    def _stop_looking(self) -> None:
        if self._sample is None:
            return
        remove_listener(self._sample)
        self._sample = None
        for watched in self._watched.values():  # some took no part in this step
            if watched.quantizer.look_next == "values":
                watched.quantizer.look_next = False

    def _write_sample(self, sample: StepSample, seconds: float) -> None:
        self._stop_looking()
        self._write_between()
        for watched in self._watched.values():
            if watched.sample is None:
                continue
            state = watched.quantizer.state
            found = {"interval": state.interval, "error": state.error, **watched.sample}
            self._write("sample", step=self._step, id=watched.number, **found)
        self._write("time", step=self._step, **sample.split(seconds), macs=sample.macs)

    def _write_between(self) -> None:
        if self._between is not None:
            self._write("steps", **self._between)
            self._between = None

    def _write(self, kind: str, **entries: Any) -> None:
        self._lines.append(json.dumps({"kind": kind, **entries}, allow_nan=False))


def _number(value: float) -> float | None:
    """Returns what JSON has of a number: it has no NaN and no infinity."""
    return value if math.isfinite(value) else None

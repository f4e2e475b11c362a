"""Reads what trainings logged: ``telemetry.jsonl``, and ``metrics.csv`` beside it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "telemetry.jsonl"
METRICS_FILE = "metrics.csv"
_VERSION = 1


@dataclass(frozen=True)
class LoggedDecision:
    """What an update step of an operand measured and decided.

    Attributes:
        step: optimizer step.
        at: the operand's own training step.
        reason: why it measured.
        errors: QEM at each width that was tried; None where it was not finite.
        bits: width before and after.
        position: position before (None at the first) and after.
        outcome: "kept", "widened", "narrowed", or "over": the error is over the threshold at max_bitwidth.
        interval: steps until the next update.
        interval_reason: what decided the interval.
    """

    step: int
    at: int
    reason: str
    errors: Mapping[int, float | None]
    bits: tuple[int, int]
    position: tuple[int | None, int | None]
    outcome: str
    interval: int
    interval_reason: str

    @property
    def error(self) -> float | None:
        """QEM at the width that was taken."""
        return self.errors.get(self.bits[1])


@dataclass(frozen=True)
class Histogram:
    """How many of the sampled values have which exponent, floor(log2|x|).

    Attributes:
        first: the exponent that ``counts`` starts with.
        counts: values with this exponent and each one above.
        zeros: values that are zero.
    """

    first: int
    counts: tuple[int, ...]
    zeros: int

    @property
    def total(self) -> int:
        """All values, zeros among them."""
        return sum(self.counts) + self.zeros


@dataclass(frozen=True)
class Sample:
    """What a sampled step found of one operand; a statistic that was not asked for, or was not finite, is None."""

    step: int
    bits: int
    position: int | None
    interval: int | None
    error: float | None
    saturation: float | None
    underflow: float | None
    snr: float | None
    histogram: Histogram | None


@dataclass(frozen=True)
class StepTime:
    """Where the seconds of one sampled step went, and what it multiplied: multiply-accumulates by pair of widths."""

    step: int
    seconds: float
    parts: Mapping[str, float]
    macs: Mapping[str, int]


@dataclass(frozen=True)
class Stretch:
    """Seconds that the steps from ``first`` to ``last`` took, sampled ones not among them."""

    first: int
    last: int
    seconds: float

    @property
    def seconds_per_step(self) -> float:
        """Mean over the steps."""
        return self.seconds / (self.last - self.first + 1)


@dataclass
class Operand:
    """One operand of one module, and all that was logged of it."""

    module: str
    operand: str
    product: str
    bits: int
    max_bitwidth: int
    threshold: float
    decisions: list[LoggedDecision] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As messages call it: ``fc1.input``."""
        return f"{self.module}.{self.operand}" if self.module else self.operand

    @property
    def last_bits(self) -> int:
        """Width at the end."""
        return self.decisions[-1].bits[1] if self.decisions else self.samples[-1].bits if self.samples else self.bits

    @property
    def statistics(self) -> dict[str, list[tuple[int, float]]]:
        """Steps and values of each statistic that was sampled."""
        found: dict[str, list[tuple[int, float]]] = {"saturation": [], "underflow": [], "snr": []}
        for name, points in found.items():
            points += [(each.step, value) for each in self.samples if (value := getattr(each, name)) is not None]
        return found

    @property
    def changes(self) -> list[LoggedDecision]:
        """Decisions that changed the width."""
        return [each for each in self.decisions if each.bits[0] != each.bits[1]]

    @property
    def over(self) -> list[LoggedDecision]:
        """Decisions that left the error over the threshold."""
        return [each for each in self.decisions if each.outcome == "over"]

    @property
    def worst_ratio(self) -> float:
        """The largest error that a decision settled for, as a multiple of the threshold; 0 without any."""
        return max((each.error / self.threshold for each in self.decisions if each.error is not None), default=0.0)

    def largest(self, statistic: str) -> float | None:
        """Returns the largest ``saturation`` or ``underflow`` of all samples."""
        return max((value for _, value in self.statistics[statistic]), default=None)

    @property
    def interest(self) -> tuple[Any, ...]:
        """Orders operands: those that one should look at first are the largest."""
        lost = max(self.largest("saturation") or 0.0, self.largest("underflow") or 0.0)
        return bool(self.nonfinite), bool(self.over), self.last_bits, len(self.changes), self.worst_ratio, lost


@dataclass
class Training:
    """One training: one level, one seed.

    Attributes:
        folder: where it was logged.
        label: how the report calls it.
        header: the first line of the file; empty for a float baseline without one.
        operands: in the order in which training met them.
        times: the sampled steps.
        stretches: the steps in between.
        curves: by name of the metric, the steps at which it was logged and its values.
        resumed: optimizer steps from which the training was resumed into the same file.
        unreadable: lines that could not be read, as a kill leaves one.
    """

    folder: Path
    label: str
    header: dict[str, Any] = field(default_factory=dict)
    operands: list[Operand] = field(default_factory=list)
    times: list[StepTime] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    unreadable: int = 0

    @property
    def level(self) -> str:
        """Opt level, "" where neither the file nor the folder's name says it."""
        return self.header.get("level") or _level_and_seed(self.folder)[0]

    @property
    def seed(self) -> str:
        """Seed, "" where the folder's name does not say it."""
        return _level_and_seed(self.folder)[1]

    @property
    def steps(self) -> tuple[int, int]:
        """First and last optimizer step that anything is known of."""
        logged = [each.step for operand in self.operands for each in operand.decisions]
        logged += [each.step for operand in self.operands for each in operand.samples]
        logged += [each.step for each in self.times]
        logged += [step for each in self.stretches for step in (each.first, each.last)]
        logged += [step for points in self.curves.values() for step, _ in points]
        return (min(logged), max(logged)) if logged else (0, 0)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the steps that were not sampled; over the sampled ones where there are no others."""
        steps = sum(each.last - each.first + 1 for each in self.stretches)
        if steps:
            return sum(each.seconds for each in self.stretches) / steps
        return sum(each.seconds for each in self.times) / len(self.times) if self.times else None

    def most_interesting(self, count: int) -> list[Operand]:
        """Returns at most ``count`` operands, those that one should look at first in front."""
        return sorted(self.operands, key=lambda each: each.interest, reverse=True)[:count]


def find_trainings(path: Path) -> tuple[list[Training], dict[str, Training]]:
    """Reads the trainings of a run.

    Args:
        path: a run's folder, as ``cnmix train`` leaves it, or one training's folder.

    Returns:
        The trainings with telemetry of operands, and by seed the float32 baselines (level O0), which need no telemetry.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing that telemetry was written to.
        ValueError: if a file is not what cnmix writes.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: give a run's folder, as runs/digits/2026-01-31_12-00-00")
    own = (path / FILE).is_file()
    siblings = path.resolve().parent if own or (path / METRICS_FILE).is_file() else path
    beside = [child for child in sorted(siblings.iterdir()) if child.is_dir()]
    folders = [path] if own else [child for child in beside if (child / FILE).is_file()]
    found = [each for each in map(read_training, folders) if each.operands or len(folders) == 1]
    if not found:
        raise FileNotFoundError(
            f"{path} has no {FILE} of a training in fixed point: cnmix train writes one unless telemetry.every_n_steps "
            "is 0, and cnmix.telemetry.record(model, folder) in a loop of your own"
        )
    baselines = {}
    for child in beside:
        level, seed = _level_and_seed(child)
        if level == "O0" and child.resolve() != path.resolve() and (child / METRICS_FILE).is_file():
            baselines[seed] = read_training(child)
    return found, baselines


def read_training(folder: Path) -> Training:
    """Reads what one training logged.

    Raises:
        ValueError: if a file is not what cnmix writes, with its line.
    """
    training = Training(folder, folder.resolve().name)
    file = folder / FILE
    if file.is_file():
        _Reader(training, file).read()
    for name, points in _read_metrics(folder / METRICS_FILE).items():
        training.curves[name] = points
    return training


class _Reader:
    """Takes the lines of a file into a training."""

    def __init__(self, training: Training, file: Path) -> None:
        self.training = training
        self.file = file
        self.by_id: dict[int, Operand] = {}
        self.by_name: dict[str, Operand] = {}

    def read(self) -> None:
        with open(self.file, encoding="utf-8", errors="replace") as lines:
            for number, text in enumerate(lines, start=1):
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    self.training.unreadable += bool(text.strip())
                    continue
                try:
                    self._take(line)
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    problem = error if isinstance(error, _NotOursError) else f"{type(error).__name__}: {error}"
                    raise ValueError(f"{self.file}, line {number}, is not what cnmix writes: {problem}") from None

    def _take(self, line: dict[str, Any]) -> None:
        kind = line["kind"]
        if kind == "run":
            self._begin(line)
        elif kind == "operand":
            self._meet(line)
        elif kind in ("decision", "sample", "nonfinite"):
            if line["id"] not in self.by_id:
                raise _NotOursError(f"there is no operand {line['id']} above it")
            operand = self.by_id[line["id"]]
            if kind == "decision":
                operand.decisions.append(_decision(line))
            elif kind == "sample":
                operand.samples.append(_sample(line))
            else:
                operand.nonfinite.append(int(line["step"]))
        elif kind == "time":
            parts: dict[str, float] = {
                name: float(line[name]) for name in ("quantize", "product", "adapt", "other") if name in line
            }
            self.training.times.append(StepTime(line["step"], line["seconds"], parts, _macs(line.get("macs", {}))))
        elif kind == "steps":
            self.training.stretches.append(Stretch(line["first"], line["last"], line["seconds"]))
        elif kind == "metrics":
            for name, value in line.items():
                if name not in ("kind", "step") and isinstance(value, (int, float)):
                    self.training.curves.setdefault(name, []).append((line["step"], float(value)))

    def _begin(self, line: dict[str, Any]) -> None:
        """Takes the line that a training starts with; of one that was resumed, what it overran is dropped."""
        if line["version"] > _VERSION:
            raise _NotOursError(f"it is of version {line['version']}, which a newer cnmix reads")
        training, first = self.training, line["first_step"]
        if training.header:
            training.resumed.append(first)
        training.header = training.header or line
        for operand in training.operands:
            operand.decisions = [each for each in operand.decisions if each.step < first]
            operand.samples = [each for each in operand.samples if each.step < first]
            operand.nonfinite = [step for step in operand.nonfinite if step < first]
        training.times = [each for each in training.times if each.step < first]
        training.stretches = [each for each in training.stretches if each.last < first]
        for name, points in training.curves.items():
            training.curves[name] = [(step, value) for step, value in points if step < first]

    def _meet(self, line: dict[str, Any]) -> None:
        """Takes an operand; numbers are given anew where a training is resumed, names are not."""
        operand = Operand(
            module=str(line["module"]),
            operand=str(line["operand"]),
            product=str(line["product"]),
            bits=int(line["bits"]),
            max_bitwidth=int(line["max_bitwidth"]),
            threshold=float(line["threshold"]),
        )
        known = self.by_name.setdefault(operand.name, operand)
        if known is operand:
            self.training.operands.append(operand)
        self.by_id[line["id"]] = known


class _NotOursError(ValueError):
    """Says in words what is wrong with a line."""


def _decision(line: dict[str, Any]) -> LoggedDecision:
    before, after = line["bits"]
    position_before, position_after = line["position"]
    return LoggedDecision(
        step=int(line["step"]),
        at=int(line["at"]),
        reason=str(line["reason"]),
        errors={int(bits): error for bits, error in line["errors"].items()},
        bits=(before, after),
        position=(position_before, position_after),
        outcome=str(line["outcome"]),
        interval=int(line["interval"]),
        interval_reason=str(line["interval_reason"]),
    )


def _sample(line: dict[str, Any]) -> Sample:
    values = {name: line.get(name) for name in Sample.__dataclass_fields__ if name != "histogram"}
    found = line.get("histogram")
    histogram = Histogram(found["first"], tuple(found["counts"]), found["zeros"]) if found else None
    return Sample(**values, histogram=histogram)  # type: ignore[arg-type]


def _macs(found: Mapping[str, int]) -> dict[str, int]:
    """Returns multiply-accumulates by pair of widths, the narrower first, whichever operand has it."""
    together: dict[str, int] = {}
    for pair, count in found.items():
        narrow, wide = sorted(map(int, pair.split("x")))
        key = f"{narrow}×{wide}"
        together[key] = together.get(key, 0) + count
    return together


def _read_metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the columns of a CSVLogger's file, without those of CnmixMonitor."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in _rows(file):
        for name, text in row.items():
            if name in (None, "epoch", "step") or name.startswith("cnmix/") or not text:
                continue
            try:
                step, value = int(row["step"]), float(text)
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{file} is no metrics.csv as Lightning's CSVLogger writes it: {row}") from None
            if math.isfinite(value):
                curves.setdefault(name, []).append((step, value))
    return curves


def _rows(file: Path) -> Iterator[dict[str, str]]:
    if file.is_file():
        with open(file, newline="", encoding="utf-8") as text:
            yield from csv.DictReader(text)


def _level_and_seed(folder: Path) -> tuple[str, str]:
    match = re.fullmatch(r"(\w+)-seed(\d+)", folder.resolve().name)
    return (match[1], match[2]) if match else ("", "")


def name_apart(trainings: Sequence[Training]) -> None:
    """Gives each training the shortest end of its path that no other one has as a label."""
    paths = [training.folder.resolve().parts for training in trainings]
    for training, parts in zip(trainings, paths, strict=True):
        for length in range(1, len(parts) + 1):
            if sum(other[-length:] == parts[-length:] for other in paths) == 1:
                break
        training.label = "/".join(parts[-length:])

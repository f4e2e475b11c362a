"""Reads what trainings logged: ``telemetry.jsonl``, and ``metrics.csv`` beside it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .recorder import FILE, FORMAT_VERSION
from .records import PARTS, Histogram, LoggedDecision, Operand, Sample, StepTime, Stretch, Training, level_and_seed

METRICS_FILE = "metrics.csv"


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
    if not folders:
        raise FileNotFoundError(
            f"{path} has no {FILE} of a training: cnmix train writes one unless telemetry.every_n_steps is 0, and "
            "cnmix.telemetry.record(model, folder) in a loop of your own"
        )
    every = [read_training(folder) for folder in folders]
    found = [each for each in every if each.operands] or every
    shown = {each.folder.resolve() for each in found}
    baselines = {}
    for child in beside:
        level, seed = level_and_seed(child)
        if level == "O0" and child.resolve() not in shown and (child / METRICS_FILE).is_file():
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
        if self.training.unreadable and not self.training.header:
            raise ValueError(f"{self.file} is not what cnmix writes: no line says of which training it is")

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
            parts: dict[str, float] = {name: float(line[name]) for name in PARTS if name in line}
            self.training.times.append(StepTime(line["step"], line["seconds"], parts, _macs(line.get("macs", {}))))
        elif kind == "steps":
            self.training.stretches.append(Stretch(line["first"], line["last"], line["seconds"]))
        elif kind == "metrics":
            for name, value in line.items():
                if name not in ("kind", "step") and isinstance(value, (int, float, type(None))):
                    value = math.nan if value is None else float(value)
                    self.training.curves.setdefault(name, []).append((int(line["step"]), value))

    def _begin(self, line: dict[str, Any]) -> None:
        """Takes the line that a training starts with; of one that was resumed, what it overran is dropped."""
        if line["version"] > FORMAT_VERSION:
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
            module="".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in line["module"]),
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
    histogram = Histogram(found["first"] or 0, tuple(found["counts"]), found["zeros"]) if found else None
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
            points = curves.setdefault(name, [])
            while points and points[-1][0] >= step:  # resumed from before it
                points.pop()
            points.append((step, value))
    return curves


def _rows(file: Path) -> Iterator[dict[str, str]]:
    if file.is_file():
        with open(file, newline="", encoding="utf-8") as text:
            yield from csv.DictReader(text)


def name_apart(trainings: Sequence[Training]) -> None:
    """Gives each training as a label the shortest end of its path that no other one has."""
    paths = {training.folder.resolve().parts for training in trainings}
    for training in trainings:
        parts = training.folder.resolve().parts
        for length in range(1, len(parts) + 1):
            if sum(other[-length:] == parts[-length:] for other in paths) == 1:
                break
        training.label = "/".join(parts[-length:])

"""The collector of times that the scripts of the vendor's model zoo import, and the logs that it writes."""

from __future__ import annotations

import glob
import importlib.util
import json
import logging
import os
import statistics
from collections.abc import Mapping
from datetime import datetime
from time import perf_counter
from typing import Any

from ..closing import STRATEGY_COUNT, strategy_count
from .protocol import AVG_LOG, BENCHMARK_LOG, log_file

logger = logging.getLogger("cnmix")

# In the vendor's order, and spelled as there.
_KEYS = (
    *("date", "net", "batch_size", "cards", "precision", "DPF_mode", "batch_time_avg", "batch_time_var"),
    *("hardware_time_avg", "hardware_time_var", "throughput", "device", "dataset"),
)
_UNKNOWN = "unknow"
_UNKNOWN_DEVICE = "Unkonw"
_NOTIFIER = "torch_mlu.core.device.notifier"


class Timer:
    """Times iterations, and leaves the first ones out.

    Args:
        skipped: how many.

    Attributes:
        seconds: of each iteration after those.
    """

    name = "batch_time"

    def __init__(self, skipped: int) -> None:
        self.seconds: list[float] = []
        self._skipped, self._count = skipped, 0
        self._placed: Any = None

    def place(self) -> None:
        """Begins an iteration."""
        self._placed = self._now()

    def record(self) -> None:
        """Ends one.

        Raises:
            RuntimeError: if none was begun.
        """
        if self._placed is None:
            raise RuntimeError("record() ends an iteration that place() began: call place() before the loop")
        self._count += 1
        if self._count > self._skipped:
            self.seconds.append(self._since(self._placed))

    @property
    def count(self) -> int:
        """Iterations so far, with those that are left out."""
        return self._count

    @property
    def average(self) -> float:
        """Seconds of an iteration."""
        return statistics.fmean(self.seconds)

    @property
    def variance(self) -> float:
        """Of the seconds, in square seconds, as of the whole population."""
        return statistics.pvariance(self.seconds)

    def _now(self) -> Any:
        return perf_counter()

    def _since(self, placed: Any) -> float:
        return float(self._now() - placed)


class _CardTimer(Timer):
    """Times iterations by the card's notifiers."""

    name = "hardware_time"

    def _now(self) -> Any:
        from torch_mlu.core.device.notifier import Notifier

        notifier = Notifier()
        notifier.place()
        return notifier

    def _since(self, placed: Any) -> float:
        end = self._now()
        end.synchronize()
        return float(placed.hardware_time(end)) / 1e6


class MetricCollector:
    """Times the iterations of a training loop after the adaptive strategy has closed, and logs their average.

    The vendor's interface: ``place()`` before the loop, ``record(); place()`` at the end of each iteration, then
    ``insert_metrics(net=…, batch_size=…, precision=…, cards=…, DPF_mode=…)`` and ``dump()``. The first
    ``MLU_ADAPTIVE_STRATEGY_COUNT`` iterations of each collector are left out. Where neither ``BENCHMARK_LOG`` nor
    ``AVG_LOG`` names a file all of this does nothing.

    Args:
        enable: False has it do nothing.
        enable_only_benchmark: do nothing without ``BENCHMARK_LOG``, and write no other file.
        enable_only_avglog: do nothing without ``AVG_LOG``, and write no other file.
        record_elapsed_time: time iterations by this host's clock.
        record_hardware_time: time them by the notifiers of ``torch_mlu``, where there is one. Those of the emulated
            card tell the host's time.
        profile_memory: taken, and without effect: no field of the log has it.

    Raises:
        ValueError: for a bad value of ``MLU_ADAPTIVE_STRATEGY_COUNT``, or a log that cannot be written.
    """

    def __init__(
        self,
        enable: bool = True,
        enable_only_benchmark: bool = False,
        enable_only_avglog: bool = False,
        record_elapsed_time: bool = False,
        record_hardware_time: bool = False,
        profile_memory: bool = False,
    ) -> None:
        self._skipped = strategy_count()
        without_benchmark = enable_only_avglog and not enable_only_benchmark
        without_average = enable_only_benchmark and not enable_only_avglog
        self._benchmark_log = log_file(BENCHMARK_LOG) if enable and not without_benchmark else None
        self._average_log = log_file(AVG_LOG) if enable and not without_average else None
        self._enabled = bool(self._benchmark_log or self._average_log)
        self._metrics: dict[str, Any] = {}
        self._timers: list[Timer] = []
        if self._enabled and record_hardware_time and _has_notifiers():
            self._timers.append(_CardTimer(self._skipped))
        if self._enabled and record_elapsed_time:
            self._timers.append(Timer(self._skipped))

    def place(self) -> None:
        """Begins an iteration."""
        for timer in self._timers:
            timer.place()

    def record(self) -> None:
        """Ends one.

        Raises:
            RuntimeError: if ``place`` was not called before.
        """
        for timer in self._timers:
            timer.record()

    def insert_metrics(self, **metrics: Any) -> None:
        """Adds entries, which go over those that are there, and over the collector's own."""
        if self._enabled:
            self._metrics.update(metrics)

    def get_metrics(self) -> dict[str, Any]:
        """Returns averages and variances in seconds, rounded to 3 and 6 places, and the entries that were added.

        Where no iteration was left to average the log says so, and the two are missing.
        """
        found: dict[str, Any] = {}
        for timer in self._timers:
            if timer.seconds:
                found[f"{timer.name}_avg"] = round(timer.average, 3)
                found[f"{timer.name}_var"] = round(timer.variance, 6)
            elif timer.count:
                logger.warning(
                    "%s=%d leaves out all of the %d iterations that were recorded, so that there is no average: set it "
                    "lower, or run more iterations (each collector counts its own, as one for each epoch)",
                    STRATEGY_COUNT,
                    self._skipped,
                    timer.count,
                )
        return {**found, **self._metrics}

    def dump(self) -> None:
        """Appends a record to ``BENCHMARK_LOG``, and a line to ``AVG_LOG``; call it in the first process alone."""
        if not self._enabled:
            return
        metrics = self.get_metrics()
        if self._benchmark_log:
            exact = next((each.average for each in self._timers if type(each) is Timer and each.seconds), None)
            append_benchmark_log(self._benchmark_log, metrics, exact)
        if self._average_log:
            append_average_log(self._average_log, metrics)


def append_benchmark_log(path: str, metrics: Mapping[str, Any], batch_time: float | None = None) -> None:
    """Appends a record with the vendor's fields to a log of timed runs.

    What is missing is "unknow", as there, but for the date, the throughput, the device (of the driver's files under
    /proc) and the data set (``DATASET_NAME``).

    Args:
        path: the file; it is made where it is missing, in a folder that is there.
        metrics: the fields that are known; others are left out.
        batch_time: seconds of an iteration, for the throughput where the rounded ``batch_time_avg`` is 0.
    """
    known = dict(metrics)
    known.setdefault("date", datetime.now().strftime("%Y-%m-%d %H:%M:%S"))
    known.setdefault("device", _device())
    known.setdefault("dataset", os.environ.get("DATASET_NAME") or _UNKNOWN)
    seconds = known.get("batch_time_avg") or batch_time
    if "throughput" not in known and seconds and {"batch_size", "cards"} <= known.keys():
        known["throughput"] = round(known["batch_size"] / seconds * known["cards"], 2)
    record = {key: known.get(key, _UNKNOWN) for key in _KEYS}
    _append(path, json.dumps(record, indent=4) + "\n")


def append_average_log(path: str, metrics: Mapping[str, Any]) -> None:
    """Appends a line to a log of accuracies: ``net:resnet50, accuracy:0.7613``.

    Where the adaptive strategy closes early the accuracy is "not valid".

    Args:
        path: the file; it is made where it is missing, in a folder that is there.
        metrics: ``net`` and ``accuracy``; what is missing is "unknow".
    """
    accuracy = metrics.get("accuracy", _UNKNOWN)
    if strategy_count():
        accuracy = f"not valid ({STRATEGY_COUNT}={strategy_count()})"
    _append(path, f"net:{metrics.get('net', _UNKNOWN)}, accuracy:{accuracy}\n")


def _append(path: str, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def _has_notifiers() -> bool:
    try:
        return importlib.util.find_spec(_NOTIFIER) is not None
    except (ImportError, ValueError):
        return False


def _device() -> str:
    """Returns the name of the card, as the driver's files have it."""
    for path in sorted(glob.glob("/proc/driver/*/*/*/information")):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = [line.partition(":") for line in file]
        except OSError:
            continue
        for key, _, value in lines:
            if key.strip().lower() in ("device name", "model") and value.strip():
                return value.strip()
    return _UNKNOWN_DEVICE

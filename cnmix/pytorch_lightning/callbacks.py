"""Callbacks for the Trainer of ``pytorch_lightning``; what they do is in ``cnmix.plugins.callbacks``."""

from __future__ import annotations

from pytorch_lightning.callbacks import Callback, RichProgressBar

from ..plugins.callbacks import MonitorHooks, ProgressBarHooks, SummaryHooks
from ..plugins.telemetry import TelemetryHooks


class CnmixMonitor(MonitorHooks, Callback):
    """Logs what the operands do, to every logger of the Trainer; arguments and keys: ``MonitorHooks``."""


class CnmixProgressBar(ProgressBarHooks, RichProgressBar):
    """Lightning's ``RichProgressBar``, with the mean width of the operands and the optimizer steps in a second."""


class CnmixSummary(SummaryHooks, Callback):
    """Prints a table of the operands when fitting ends, of ``max_rows`` modules at most; needs rich."""


class CnmixTelemetry(TelemetryHooks, Callback):
    """Records a run in ``telemetry.jsonl``, beside the logger's files; arguments: ``TelemetryHooks``."""

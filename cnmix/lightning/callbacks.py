"""Callbacks for the Trainer of ``lightning.pytorch``: log, show and sum up what the operands do."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback, RichProgressBar

from ..plugins.callbacks import MonitorHooks, ProgressBarHooks, SummaryHooks


class CnmixMonitor(MonitorHooks, Callback):
    """Logs what the operands do, to every logger of the Trainer.

    The keys are ``cnmix/<module>/<operand>/`` and: ``bits``, ``position``, ``interval`` (steps until the next update),
    ``error`` (QEM, at the last update), and of the step that is logged ``saturation`` (share of the values at the
    limits of the format) and ``underflow`` (share of values that are not zero and became zero). The step is
    ``trainer.global_step`` before the batch; of accumulated batches the first is looked at.

    Args:
        every_n_steps: optimizer steps between two that are logged; the first one is.
        modules: names, or patterns as ``encoder.*``, of the modules to log; a name covers all below it. Empty: all.
        operands: of ``input``, ``weight`` and ``grad_output``. Empty: all three.

    Raises:
        TypeError: if ``modules`` or ``operands`` is no list.
        ValueError: for an unknown operand or an ``every_n_steps`` below 1; when fitting starts, for an unknown module.
    """


class CnmixProgressBar(ProgressBarHooks, RichProgressBar):
    """Lightning's ``RichProgressBar``, with the width of the operands and the optimizer steps in a second.

    ``width`` is the plain mean over all operands of all converted modules; ``steps/s`` is of the last 50 optimizer
    steps, without validation. The arguments are those of ``RichProgressBar``; it needs ``pip install rich``.
    """


class CnmixSummary(SummaryHooks, Callback):
    """Prints a table of the operands when fitting ends: width and position, updates, interval and largest error.

    Args:
        max_rows: modules shown; the rest is summed up in a line.

    Raises:
        ModuleNotFoundError: without rich: ``pip install rich``.
        ValueError: for ``max_rows`` below 1.
    """

"""Callbacks that watch a run, without Lightning: each of its packages puts them over classes of its own.

``cnmix.lightning.callbacks`` and ``cnmix.pytorch_lightning.callbacks`` are the thin other halves. Hooks that the class
behind a mix-in has too are passed on to it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any

from torch import nn

from ..adaptive import OperandQuantizer
from ..config import OPERANDS, check_names
from ..nn import ModuleQuantizers, callers, quantizer_sets, quantizers_of
from ..nn.function_calls import function_products
from ..rules import matches, no_module_called
from ..telemetry.rules import check_every_n_steps, is_due
from .operand_table import operand_table

logger = logging.getLogger("cnmix")

# The optimizer steps that the rate in the progress bar is of.
_RATE_STEPS = 50


class MonitorHooks:
    """Logs what the operands do, to every logger of the Trainer.

    The keys are ``cnmix/<module>/<operand>/`` and ``bits``, ``position``, ``interval`` (steps until the next update),
    ``error`` (QEM at the last update), and of the step that is logged ``saturation`` (share of the values at the limits
    of the format) and ``underflow`` (share of the values that are not zero and became zero). The step is
    ``trainer.global_step`` before the batch; of accumulated batches the first is looked at.

    Args:
        every_n_steps: optimizer steps from one that is logged to the next; step 0 is the first.
        modules: names, or patterns such as ``encoder.*``, of modules to log; a name covers all below it. Empty: all.
        operands: of ``input``, ``weight`` and ``grad_output`` those to log. Empty: all three.

    Raises:
        TypeError: if ``modules`` or ``operands`` is no list.
        ValueError: for an unknown operand or an ``every_n_steps`` below 1; when fitting starts, for an unknown module.
    """

    def __init__(self, every_n_steps: int = 50, modules: Sequence[str] = (), operands: Sequence[str] = ()) -> None:
        check_every_n_steps(every_n_steps)
        for name, given in (("modules", modules), ("operands", operands)):
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise TypeError(f"CnmixMonitor's {name} must be a list of names, got {given!r}: write [{given!r}]")
        check_names(operands, OPERANDS, "operand in CnmixMonitor:")
        super().__init__()
        self.every_n_steps = every_n_steps
        self.modules = tuple(modules)
        self.operands = tuple(operands) or OPERANDS
        self._watching = False
        self._watched: dict[str, OperandQuantizer] = {}
        self._latest_step = 0
        self._asked_at: int | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Chooses what is logged; the model has been converted by now.

        Raises:
            ValueError: if one of ``modules`` is no name, with the nearest known one, or nothing there is converted.
        """
        self._let_go()
        chosen = choose_products(pl_module, self.modules)  # on every rank, so that all of them refuse a wrong name
        if not trainer.is_global_zero:
            return
        if not chosen and not any(callers(pl_module)):
            logger.warning("CnmixMonitor has nothing to log: %s", _NOTHING_CONVERTED)
        elif not trainer.loggers:
            logger.warning("CnmixMonitor has nowhere to log to: the Trainer has no logger (logger=True makes one)")
        else:
            self._watching = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts to count; a resumed run logs on the steps on which an uninterrupted one would."""
        self._latest_step, self._asked_at = trainer.global_step - 1, None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Has the quantizers look at their shares, on the first batch of a step that is to be logged."""
        due = is_due(self.every_n_steps, trainer.global_step, self._latest_step)
        self._latest_step = trainer.global_step
        if due and self._watching:
            self._asked_at = trainer.global_step
            self._watch(pl_module)
            for quantizer in self._watched.values():
                quantizer.look_next, quantizer.shares = True, None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs, where the batch's start asked for it."""
        if self._asked_at is None:
            return
        self._watch(pl_module)
        metrics = {
            f"{operand}/{name}": value
            for operand, quantizer in self._watched.items()
            for name, value in operand_metrics(quantizer).items()
        }
        for each in trainer.loggers:
            each.log_metrics(metrics, step=self._asked_at)
        self._stop_looking()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leaves the quantizers as they were."""
        self._let_go()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the quantizers as they were."""
        self._let_go()

    def _watch(self, model: nn.Module) -> None:
        """Finds what is logged; products of functions come to be when they are first called."""
        self._watched = {
            f"cnmix/{name}/{operand}": quantizer
            for name, quantizers in choose_products(model, self.modules).items()
            for operand, quantizer in quantizers
            if operand in self.operands
        }

    def _stop_looking(self) -> None:
        self._asked_at = None
        for quantizer in self._watched.values():  # some took no part in this batch
            quantizer.look_next = False

    def _let_go(self) -> None:
        self._stop_looking()
        self._watching, self._watched = False, {}


class ProgressBarHooks:
    """Adds to Lightning's ``RichProgressBar`` the width of the operands, and the optimizer steps in a second.

    ``width`` is the plain mean over all operands of all converted modules; ``steps/s`` is of the last 50 optimizer
    steps, without validation. The arguments are those of ``RichProgressBar``; it needs ``pip install rich``.
    """

    _quantizers: Sequence[OperandQuantizer] = ()
    # (seconds of training, optimizer steps) as each step ended; the first is where the rate counts from.
    _steps: Sequence[tuple[float, int]] = ()
    _paused_at: float = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts to count."""
        self._find_quantizers(pl_module)
        self._steps = [(monotonic(), trainer.global_step)]
        bar: Any = super()
        bar.on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the optimizer's steps."""
        if batch_idx < 2 or batch_idx % _RATE_STEPS == 0:  # products of functions come to be when they are first called
            self._find_quantizers(pl_module)
        if self._steps and trainer.global_step > self._steps[-1][1]:
            self._steps = [*self._steps[-_RATE_STEPS:], (monotonic(), trainer.global_step)]
        bar: Any = super()
        bar.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _find_quantizers(self, model: nn.Module) -> None:
        self._quantizers = [each for _, quantizers in quantizer_sets(model) for _, each in quantizers]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stops the clock."""
        self._paused_at = monotonic()
        bar: Any = super()
        bar.on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Lets the clock go on from where it stopped."""
        paused = monotonic() - self._paused_at
        self._steps = [(at + paused, step) for at, step in self._steps]
        bar: Any = super()
        bar.on_validation_end(trainer, pl_module)

    def configure_columns(self, trainer: Any) -> list[Any]:
        """Leaves Lightning's rate of batches to the bars without ``steps/s``: 80 columns are too few for both."""
        from rich.progress import ProgressColumn, Task
        from rich.text import Text

        bar: Any = self

        class OutsideTraining(ProgressColumn):
            def __init__(self, column: ProgressColumn) -> None:
                super().__init__()
                self.column = column

            def render(self, task: Task) -> Any:
                return Text() if task.id == bar.train_progress_bar_id else self.column.render(task)

        above: Any = super()
        columns = above.configure_columns(trainer)
        return [OutsideTraining(each) if type(each).__name__ == "ProcessingSpeedColumn" else each for each in columns]

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Returns the bar's metrics with ``width``, the plain mean over all operands, and ``steps/s``."""
        bar: Any = super()
        metrics: dict[str, Any] = {}
        if self._quantizers:
            bits = sum(quantizer.state.bits for quantizer in self._quantizers) / len(self._quantizers)
            metrics["width"] = f"{bits:.1f} bit"
        if len(self._steps) > 1:
            (start, first), (end, last) = self._steps[0], self._steps[-1]
            rate = (last - first) / max(end - start, 1e-9)
            metrics["steps/s"] = f"{rate:.2f}" if rate < 10 else f"{rate:.0f}"
        return {**metrics, **bar.get_metrics(trainer, pl_module)}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lets go of the model."""
        self._quantizers = ()
        bar: Any = super()
        bar.on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets go of the model."""
        self._quantizers = ()
        bar: Any = super()
        bar.teardown(trainer, pl_module, stage)


class SummaryHooks:
    """Prints a table of the operands when fitting ends: width and position, updates, interval and largest error.

    Args:
        max_rows: modules shown; the rest is summed up in a line.

    Raises:
        ModuleNotFoundError: without rich: ``pip install rich``.
        ValueError: for ``max_rows`` below 1.
    """

    def __init__(self, max_rows: int = 40) -> None:
        if not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < 1:
            raise ValueError(f"max_rows must be a whole number of modules, at least 1, got {max_rows!r}")
        if importlib.util.find_spec("rich") is None:
            raise ModuleNotFoundError("CnmixSummary needs rich: pip install rich", name="rich")
        super().__init__()
        self.max_rows = max_rows
        self._finished = False

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Notes that training came to its end."""
        self._finished = trainer.is_global_zero

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prints the table, on rank zero and below a progress bar that comes earlier in the list."""
        if not self._finished:
            return
        self._finished = False
        products = dict(quantizer_sets(pl_module))
        if not products:
            logger.warning("CnmixSummary has nothing to print: %s", _NOTHING_CONVERTED)
            return
        from rich import get_console

        get_console().print(operand_table(products, self.max_rows, trainer.global_step))


_NOTHING_CONVERTED = (
    "nothing of the model computes in fixed point (is CnmixPlugin among the Trainer's plugins, at a level over O0?)"
)


def choose_products(model: nn.Module, patterns: Iterable[str]) -> dict[str, ModuleQuantizers]:
    """Returns the quantizers of the modules that one of the patterns covers, by product; all of them without patterns.

    Those of functions that a module calls are among them once they have been called.

    Raises:
        ValueError: for a pattern that no module's name fits, with the nearest one, or no module in fixed point; not
            where the model has none at all.
    """
    converted = dict(quantizer_sets(model))
    patterns = tuple(patterns)
    if not patterns or (not converted and not any(callers(model))):
        return converted
    # A module that is registered under several names can be chosen by any of them.
    known = dict(model.named_modules(remove_duplicate=False))
    chosen: set[int] = set()
    for pattern in patterns:
        covered = [module for fqn, module in known.items() if matches(fqn, pattern)]
        if not covered:
            raise ValueError(f"CnmixMonitor: {no_module_called(pattern, known)}")
        found = {id(quantizers) for module in covered for _, quantizers in quantizers_of(module)}
        if not found and not any(function_products(module) is not None for module in covered):
            raise ValueError(f"CnmixMonitor: nothing in {pattern!r} computes in fixed point: see cnmix.summary(model)")
        chosen |= found
    return {name: quantizers for name, quantizers in converted.items() if id(quantizers) in chosen}


def operand_metrics(quantizer: OperandQuantizer) -> dict[str, float]:
    """Returns what is logged of one operand: what its state says, and the shares where it was asked for them."""
    state, shares = quantizer.state, quantizer.shares
    metrics: dict[str, float] = {"bits": state.bits, "interval": state.interval}
    if state.position is not None:  # something was measured
        metrics.update(position=state.position, error=state.error)
    if shares is not None:
        metrics.update(saturation=shares.saturation, underflow=shares.underflow)
    return metrics

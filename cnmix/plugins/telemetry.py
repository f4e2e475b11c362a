"""The callback that records a run, without Lightning: each of its packages puts it over a class of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..telemetry import Recorder, TelemetryRule
from ..telemetry.rules import parse_telemetry_rules


class TelemetryHooks:
    """Records what the operands do, and decide, in ``telemetry.jsonl``, which ``cnmix inspect`` draws.

    A step is an optimizer step, from the start of its first batch to the end of its last; ``step`` in the file is
    ``trainer.global_step`` before it.

    Args:
        every_n_steps: optimizer steps from one whose statistics and times are sampled to the next; step 0 is the first.
        rules: what is sampled of which operands, see ``cnmix.telemetry.TelemetryRule``; empty: everything of all.
        path: the file, or its folder; None is where the Trainer's first logger writes, beside its ``metrics.csv``.
        part: name of the part of the model that is recorded, from which names in rules and in the file count; empty:
            the whole.

    Raises:
        TypeError: if ``rules`` is no list.
        ValueError: for an unknown name in a rule, with the nearest known one, or a value out of its range; when
            training starts, for an unknown module.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        rules: Iterable[TelemetryRule | Mapping[str, Any]] = (),
        path: str | os.PathLike[str] | None = None,
        part: str = "",
    ) -> None:
        self.rules = parse_telemetry_rules(rules, every_n_steps)
        super().__init__()
        self.every_n_steps = every_n_steps
        self.path = path
        self.part = part
        self._recorder: Recorder | None = None
        self._step: int | None = None  # that has begun

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins the file, or goes on with it where a run is resumed."""
        self._close()
        folder = self.path or trainer.log_dir or trainer.default_root_dir  # of log_dir all ranks have to ask
        level = getattr(trainer.precision_plugin, "opt_level", None)
        self._recorder = Recorder(
            pl_module.get_submodule(self.part),
            Path(folder),
            self.every_n_steps,
            self.rules,
            first_step=trainer.global_step,
            level=level,
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begins a step with its first batch."""
        if self._recorder is not None and self._step is None:
            self._step = trainer.global_step
            self._recorder.begin_step(self._step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends the step if the optimizer has taken it."""
        if self._recorder is not None and self._step is not None and trainer.global_step > self._step:
            self._step = None
            self._recorder.end_step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the file."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the file."""
        self._close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends the file."""
        self._close()

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._recorder, self._step = None, None

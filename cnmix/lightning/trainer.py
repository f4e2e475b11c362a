"""The precision plugin for the Lightning Trainer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.plugins.precision import Precision

from .fabric import FabricCnmixPlugin


class CnmixPlugin(Precision, FabricCnmixPlugin):
    """Trains in adaptive fixed point under ``lightning.pytorch.Trainer(plugins=[CnmixPlugin(opt_level="O1")])``.

    The steps in an epoch come from the trainer unless they are given. The quantizers' state is in the checkpoint; the
    weights there are a plain model's. The arguments are those of ``FabricCnmixPlugin``.
    """

    # The model that was told, and the steps.
    _known_steps: tuple[Any, Any] = (None, None)

    @contextlib.contextmanager
    def train_step_context(self) -> Iterator[None]:
        """Takes the steps in an epoch from the trainer, which knows them only once the loop runs."""
        if "steps_per_epoch" not in self.settings:
            self._take_steps_from_trainer(getattr(self._module, "trainer", None))
        with super().train_step_context():
            yield

    def _take_steps_from_trainer(self, trainer: Any) -> None:
        steps = getattr(trainer, "num_training_batches", math.inf)
        if (self._module, steps) != self._known_steps:
            self._known_steps = (self._module, steps)
            # Infinite for a data set without a length: the default of 10,000 stays.
            if math.isfinite(steps) and steps >= 1:
                self.set_steps_per_epoch(int(steps))

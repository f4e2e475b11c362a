"""How a checkpoint is written: a mix-in class over Lightning's ``TorchCheckpointIO``."""

from __future__ import annotations

import os
from typing import Any

from ..checkpoint import write


class AtomicSaving:
    """Writes a checkpoint beside its place and renames it, so that a kill leaves the whole file that was there before.

    Lightning's own way writes into the folder for temporary files, from where the file is copied, not renamed, if that
    is on another file system; a kill then leaves part of it. What is no local path is left to Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes a checkpoint to a file."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # type: ignore[misc]
        else:
            write(path, checkpoint)

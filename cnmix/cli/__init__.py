"""The command ``cnmix``: a file for each group of commands."""

from __future__ import annotations

import sys

from .application import Console, Text, app, console

# In the order of ``cnmix --help``.
from . import training, inspection, benchmarking, recipes, deployment, scripts  # isort: skip

__all__ = ["app", "benchmarking", "console", "deployment", "inspection", "main", "recipes", "scripts", "training"]


def main() -> None:
    """Runs the command; a mistake in what it was given is one line, not a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        reason = str(error)
        if reason.startswith("Caught ") and "DataLoader worker" in reason.partition("\n")[0]:  # with its traceback
            reason = reason.strip().rpartition("\n")[2]
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {reason}"), soft_wrap=True)
        sys.exit(2)

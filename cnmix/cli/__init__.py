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
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(2)

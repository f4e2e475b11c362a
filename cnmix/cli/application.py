"""The application that the commands belong to, and the terminal that they write to."""

from __future__ import annotations

import sys
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.text import Text
except ModuleNotFoundError as error:
    sys.exit(f'the command cnmix needs {error.name}: pip install "cnmix[recipes]"')

from ..version import __version__

__all__ = ["Console", "Text", "app", "console", "print_lines"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()


def print_lines(*lines: str) -> None:
    """Prints lines as they are, each in one piece, to be copied."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _describe(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Train PyTorch models in adaptive fixed point, and evaluate them with integers."""

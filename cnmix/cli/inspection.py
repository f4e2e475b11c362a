"""The command that shows what a training logged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app, print_lines


@app.command("inspect")
def inspect(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or of single trainings.")],
    output: Annotated[
        Path | None, typer.Option(help="The page; else report.html in RUN, or for several comparison.html here.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="A folder to put each figure into as a PNG.")] = None,
) -> None:
    """Write a page that shows what a run's operands did: widths, errors, decisions and their reasons, time."""
    from ..telemetry.report import write_report

    file = write_report(runs, output, png, report=print_lines)
    lines = [f"Kept in {file}: {file.stat().st_size:,} bytes, needs no network"]
    print_lines(*lines, *([f"Figures in {png}"] if png is not None else []))

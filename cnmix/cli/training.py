"""Commands that train, and evaluate what was trained."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .application import app, console, print_lines

if TYPE_CHECKING:
    from ..training import RunResult


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file, or the name of one that comes with cnmix.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as optimizer.args.lr=0.1")] = None,
    compare: Annotated[bool, typer.Option(help="Also train the float32 baseline from the same seeds.")] = False,
    levels: Annotated[
        str | None, typer.Option(help="Levels to train at, as O0,O1,O2,O3, in place of the recipe's own.")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="With the recipe's tiny settings and data.")] = False,
    resume: Annotated[Path | None, typer.Option(help="A run's last.ckpt to go on from.")] = None,
) -> None:
    """Train a recipe; leaves runs/<recipe>/<time>/ with its settings, metrics and checkpoints."""
    from ..evaluation import operand_rows
    from ..recipe import load_recipe
    from ..strategies import find_level
    from ..training import run_recipe

    loaded = load_recipe(recipe, overrides or [], tiny=tiny)
    folder, results, model = run_recipe(
        loaded,
        recipe.stem,
        compare=compare,
        levels=() if levels is None else [name.strip() for name in levels.split(",")],
        resume=resume,
        progress=console.is_terminal,
        report=print_lines,
    )
    rows = list(operand_rows(model))
    if rows:
        table = Table(title=f"Operands after the last {results[-1].level} run")
        table.add_column("module", overflow="fold")  # in a narrow terminal a long name is not cut but goes on below
        table.add_column("operand", no_wrap=True)
        for heading in ("width", "position", "interval", "updates", "error (QEM)"):
            table.add_column(heading, justify="right", no_wrap=heading != "error (QEM)")
        for fqn, operand, bits, position, interval, updates, qem in rows:
            values = (f"int{bits}", str(position), str(interval), str(updates), f"{qem:.2e}")
            table.add_row(fqn if operand == "input" else "", operand, *values, end_section=operand == "grad_output")
        console.print(table)
    console.print(_results_table(results))
    lines = [f"Kept in {folder}"]
    if any(find_level(result.level).quantizes and not result.strategy_count for result in results):
        lines.append(f"Evaluate with integers: cnmix eval {folder}")
    print_lines(*lines)


@app.command("eval")
def evaluate(
    path: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint in it.")],
    module: Annotated[Path | None, typer.Option(help="The recipe's Python file, if it has moved.")] = None,
) -> None:
    """Evaluate checkpoints in float32 and with integers at the positions that training stored."""
    from ..evaluation import evaluate_checkpoints

    table = Table(title="Test accuracy and loss")
    for heading in ("checkpoint", "level", "seed", "float32", "integer"):
        table.add_column(heading, justify="left" if heading in ("checkpoint", "level") else "right", overflow="fold")
    for each in evaluate_checkpoints(path, module):
        pairs = ((each.float_accuracy, each.float_loss), (each.integer_accuracy, each.integer_loss))
        cells = [f"{accuracy:.2%}  {loss:.4f}" if accuracy is not None else "–" for accuracy, loss in pairs]
        shown = str(Path(each.file).relative_to(path)) if path.is_dir() else path.name
        table.add_row(escape(shown), each.level, str(each.seed), *cells)
    console.print(table)


def _results_table(results: list[RunResult]) -> Table:
    """Returns a column for each level, and for each seed and their mean a row for each measure."""
    levels = list(dict.fromkeys(result.level for result in results))
    seeds = list(dict.fromkeys(result.seed for result in results))
    labels = {"O0": "float32 (O0)"}
    table = Table(title="Results on the test data")
    table.add_column("seed", justify="right")
    table.add_column("")
    for level in levels:
        table.add_column(labels.get(level, level), justify="right")
    groups = [(str(seed), [result for result in results if result.seed == seed]) for seed in seeds]
    if len(seeds) > 1:
        groups.append(("mean", results))
    for name, group in groups:
        columns = [[result for result in group if result.level == level] for level in levels]
        seconds = [f"{statistics.mean(each.seconds for each in column):.1f}" for column in columns]
        table.add_row(name, "accuracy", *(_mean_accuracy(column) for column in columns))
        table.add_row("", "loss", *(_mean_loss(column) for column in columns))
        table.add_row("", "seconds", *seconds, end_section=True)
    return table


def _mean_accuracy(results: list[RunResult]) -> str:
    accuracies = [result.test_accuracy for result in results if result.test_accuracy is not None]
    return f"{statistics.mean(accuracies):.2%}" if len(accuracies) == len(results) else "not valid"


def _mean_loss(results: list[RunResult]) -> str:
    losses = [result.test_loss for result in results if result.test_loss is not None]
    return f"{statistics.mean(losses):.4f}" if len(losses) == len(results) else "–"

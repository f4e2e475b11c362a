"""The command that times recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .application import app, console, print_lines

if TYPE_CHECKING:
    from ..benchmark.protocol import Plan
    from ..benchmark.runs import BenchmarkResult


@app.command()
def benchmark(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as batch_size=32")] = None,
    levels: Annotated[str, typer.Option(help="What to time; fp32 is PyTorch without cnmix.")] = "fp32,O0,O1,O2,O3",
    devices: Annotated[int, typer.Option(help="Processes that train together.")] = 1,
    iterations: Annotated[int, typer.Option(help="How many to time, after those in which operands adapt.")] = 50,
    tiny: Annotated[bool, typer.Option("--tiny", help="With the recipe's tiny settings and data.")] = False,
) -> None:
    """Time training steps after MLU_ADAPTIVE_STRATEGY_COUNT iterations (100 where it is not set)."""
    from ..benchmark.protocol import make_plan
    from ..benchmark.runs import notes, run_benchmark
    from ..recipe import load_recipe

    plan = make_plan(iterations)
    loaded = load_recipe(recipe, overrides or [], tiny=tiny)
    adapt = f"{plan.skipped} iterations in which operands adapt, then {plan.timed} that are timed"
    if not plan.skipped:
        adapt = f"{plan.timed} iterations that are timed, in which operands adapt as ever"
    print_lines(f"{adapt}; no evaluation, and the accuracy of such a run is not valid")
    chosen = [level.strip() for level in levels.split(",") if level.strip()]
    result = run_benchmark(loaded, recipe.stem, plan, chosen, devices=devices, report=print_lines)
    console.print(_table(result, recipe.stem, plan, loaded.batch_size, devices))
    if result.no_estimates:
        print_lines(f"no estimates for the cards: {result.no_estimates}")
    else:
        print_lines(
            "ESTIMATED: a step of one card by the cost model, where every kernel reaches the card's peak; nothing was "
            f"measured on a card. {'; '.join(notes())}"
        )


def _table(result: BenchmarkResult, name: str, plan: Plan, batch_size: int, devices: int) -> Table:
    """Returns a column for each level, and a row for each measure and card."""
    from ..benchmark.estimates import CARDS
    from ..benchmark.runs import FLOAT

    where = "1 device" if devices == 1 else f"{devices} devices"
    table = Table(title=f"{name}: {plan.timed} iterations of {batch_size} samples on {where}")
    table.add_column("level", no_wrap=True)
    for each in result.levels:
        table.add_column(each.level, justify="right", no_wrap=True)
    base = next((each.average for each in result.levels if each.level == FLOAT), None)
    table.add_row("batch_time_avg, s", *(f"{each.average:.4g}" for each in result.levels))
    table.add_row("batch_time_var, s²", *(f"{each.variance:.2g}" for each in result.levels))
    table.add_row("throughput, samples/s", *(f"{each.throughput:.4g}" for each in result.levels))
    relative = ("–" if base is None else f"{base / each.average:.2f}" for each in result.levels)
    table.add_row(f"× {FLOAT}", *relative, end_section=True)
    if not result.no_estimates:
        for card in CARDS:
            table.add_row(f"{card}, s, ESTIMATED", *(f"{each.estimates[card]:.3g}" for each in result.levels))
    return table

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
    from ..benchmark.runs import run_benchmark
    from ..recipe import load_recipe

    plan = make_plan(iterations)
    loaded = load_recipe(recipe, overrides or [], tiny=tiny)
    print_lines(
        f"{plan.skipped} iterations in which operands adapt, then {plan.timed} that are timed; no evaluation, and the "
        "accuracy of such a run is not valid"
    )
    chosen = [level.strip() for level in levels.split(",") if level.strip()]
    result = run_benchmark(loaded, recipe.stem, plan, chosen, devices=devices, report=print_lines)
    console.print(_table(result, recipe.stem, plan, loaded.batch_size, devices))
    if result.no_estimates:
        print_lines(f"no estimates for the cards: {result.no_estimates}")


def _table(result: BenchmarkResult, name: str, plan: Plan, batch_size: int, devices: int) -> Table:
    from ..benchmark.estimates import CARDS
    from ..benchmark.runs import FLOAT, notes

    where = "1 device" if devices == 1 else f"{devices} devices"
    table = Table(title=f"{name}: {plan.timed} iterations of {batch_size} samples on {where}")
    table.add_column("level")
    for heading in ("batch_time_avg\ns", "batch_time_var\ns²", "throughput\nsamples/s", f"× {FLOAT}"):
        table.add_column(heading, justify="right")
    for card in () if result.no_estimates else CARDS:
        table.add_column(f"{card}\ns, ESTIMATED", justify="right")
    base = next((each.average for each in result.levels if each.level == FLOAT), None)
    for each in result.levels:
        relative = "–" if base is None else f"{base / each.average:.2f}"
        times = (f"{each.average:.4g}", f"{each.variance:.2g}", f"{each.throughput:.4g}", relative)
        table.add_row(each.level, *times, *(f"{seconds:.3g}" for seconds in each.estimates.values()))
    if not result.no_estimates:
        lines = ["ESTIMATED for a step of one card by the cost model, as if every kernel reached the card's peak"]
        lines += ["; nothing was measured on a card. ", "; ".join(notes())]
        table.caption = "".join(lines)
    return table

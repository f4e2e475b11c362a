"""Commands for the recipes that come with cnmix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .application import app, console, print_lines

recipes = typer.Typer(invoke_without_command=True)
app.add_typer(recipes, name="recipes")


@recipes.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes that come with cnmix; copy takes one along."""
    from ..shipped import shipped_recipes

    if context.invoked_subcommand is not None:
        return
    table = Table(title="Recipes", show_lines=True)
    table.add_column("name", no_wrap=True)
    for heading in ("what", "data", "--tiny"):
        table.add_column(heading, overflow="fold")
    for recipe in shipped_recipes().values():
        data = escape(recipe.data) or ("comes along" if recipe.file.suffix == ".yaml" else "a script of its own")
        table.add_row(recipe.name, escape(recipe.description), data, "yes" if recipe.tiny else "–")
    console.print(table)
    print_lines("Train one: cnmix train NAME [--tiny]", "Take one along: cnmix recipes copy NAME [FOLDER]")


@recipes.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="One that cnmix recipes lists.")],
    folder: Annotated[Path, typer.Argument(help="Where to put it.")] = Path(),
) -> None:
    """Copy a recipe with the Python files that it needs; a file that is there already stays as it is."""
    from ..shipped import copy_recipe

    first, *others = copy_recipe(name, folder)
    start = "cnmix train" if first.suffix == ".yaml" else "python"
    print_lines(str(first), *map(str, others), f"Train it: {start} {first}")

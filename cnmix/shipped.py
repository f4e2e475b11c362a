"""The recipes that come with cnmix: listed, found by their names, copied."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from .config import check_names


class Shipped(NamedTuple):
    """A recipe that comes with cnmix.

    Attributes:
        name: the name of its file without the suffix, or of its folder.
        file: its YAML file; for a recipe that is a folder, the script that trains it.
        description: one line, from the first comment of the file, or from the folder's README.
        data: the files that it reads, as arguments of its data or network; "" where its data comes along.
        tiny: whether it has tiny settings.
    """

    name: str
    file: Path
    description: str
    data: str
    tiny: bool


def shipped_recipes() -> dict[str, Shipped]:
    """Returns the recipes that come with cnmix by their names, in alphabetical order."""
    recipes = [_describe(file) for file in _folder().glob("*.yaml")]
    for script in _folder().glob("*/train.py"):
        lines = (script.parent / "README.md").read_text(encoding="utf-8").splitlines()
        first = next(line for line in lines if line and not line.startswith("#"))
        recipes.append(Shipped(script.parent.name, script, first, "", False))
    return {recipe.name: recipe for recipe in sorted(recipes)}


def find_recipe(path: Path) -> Path:
    """Returns a recipe's file, given that or the name of a recipe that comes with cnmix.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the recipe has a script of its own.
    """
    if path.is_file():
        return path
    here = path.with_name(f"{path.name}.yaml")
    if not path.suffix and here.is_file():  # a copy that was taken along comes first
        return here
    if path.suffix or len(path.parts) != 1:
        raise FileNotFoundError(f"there is no recipe {path}")
    found = shipped_recipes().get(path.name)
    if found is None:
        raise FileNotFoundError(f"there is no recipe {path}: `cnmix recipes` lists those that come with cnmix")
    if found.file.suffix != ".yaml":
        raise ValueError(f"{found.name} has a script of its own: python {found.file}")
    return found.file


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copies a recipe with the Python files that it needs.

    Args:
        name: of the recipe.
        folder: where to; it is made if it is not there. Files that are there already stay.

    Returns:
        The copies, the recipe first.

    Raises:
        FileExistsError: if another file of such a name is there; then nothing is copied.
        ValueError: if there is no such recipe.
    """
    recipes = shipped_recipes()
    check_names([name], recipes, "recipe")
    origin = recipes[name].file
    if origin.suffix == ".yaml":
        module = yaml.safe_load(origin.read_text(encoding="utf-8"))["module"]
        first = [origin, *_with_imports(origin.parent / module)]
    else:
        others = sorted(each for each in origin.parent.iterdir() if each.is_file() and each != origin)
        first = [origin, *others, *(each for file in [origin, *others] for each in _with_imports(file))]
    copies = {folder / file.relative_to(_folder()): file for file in first}
    there = {copy: file for copy, file in copies.items() if copy.exists()}
    taken = [copy for copy, file in there.items() if copy.is_dir() or copy.read_bytes() != file.read_bytes()]
    if taken:
        raise FileExistsError(f"another file is there: {', '.join(map(str, taken))}; nothing was copied")
    for copy, file in copies.items():
        if copy not in there:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return list(copies)


def _folder() -> Path:
    """Returns the folder of the recipes: the package's own copy where it was installed, else the repository's."""
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{package} was installed without the recipes")


def _describe(file: Path) -> Shipped:
    text = file.read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    arguments = {**recipe["data"].get("args", {}), **recipe["model"].get("args", {})}.items()
    paths = [f"{key}={value}" for key, value in arguments if re.match(r"[^$]+/", str(value))]
    description = text.splitlines()[0].lstrip("# ").rstrip(":")
    return Shipped(file.stem, file, description, ", ".join(paths), bool(recipe.get("tiny")))


def _with_imports(file: Path) -> Iterator[Path]:
    """Yields a file, if it is of Python, and those of the recipes' that it imports."""
    waiting, seen = [file], set()
    while waiting:
        file = waiting.pop()
        if file in seen or file.suffix != ".py":
            continue
        seen.add(file)
        yield file
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names.append(node.module)
            places = [place / f"{name}.py" for name in names for place in (file.parent, _folder())]
            waiting += [place for place in places if place.is_file()]

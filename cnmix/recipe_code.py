"""The Python files of recipes: how they are imported, and what is found in them."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .config import check_names

# What the Python files of recipes are imported as.
_PREFIX = "cnmix_recipe_"


def load_module(path: str) -> ModuleType:
    """Imports a Python file by its path; at its top it may import the files beside it by their plain names.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"the recipe's module {path} is missing (`cnmix eval` takes --module where it has moved)"
        )
    spec = importlib.util.spec_from_file_location(f"{_PREFIX}{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"the recipe's module {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    with _importing_from(file.resolve().parent):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Lets files of a folder be imported, and forgets them then: another recipe may have others of the same names."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
                del sys.modules[name]


def getattr_or_explain(module: ModuleType, name: str) -> Callable[..., Any]:
    """Returns a public name that a module, or a file beside a recipe's, defines.

    Raises:
        ValueError: if there is none, with the nearest one.
    """
    where, beside = module.__name__, {module.__name__}
    if where.startswith(_PREFIX):
        where = f"{where.removeprefix(_PREFIX)}.py"
        beside |= {file.stem for file in Path(str(module.__file__)).parent.glob("*.py")}
    public = [
        each
        for each, value in vars(module).items()
        if not each.startswith("_")
        and ((home := getattr(value, "__module__", "")) in beside or home.startswith(module.__name__))
    ]
    check_names([name], public, f"name in {where}")
    return getattr(module, name)


def check_arguments(make: Callable[..., Any], args: Mapping[str, Any], where: str, given: int = 0) -> dict[str, Any]:
    """Returns a recipe's arguments of a function as plain data.

    Args:
        make: the function, or class.
        args: its arguments by name.
        where: what messages call them.
        given: how many arguments it gets in front of these.

    Raises:
        ValueError: if it takes no argument of such a name.
    """
    plain = OmegaConf.to_container(args) if isinstance(args, DictConfig) else dict(args)
    parameters = inspect.signature(make).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        names = [parameter.name for parameter in parameters][given:]
        check_names(plain, names, f"argument of {make.__name__} in {where}:")  # type: ignore[arg-type]
    return plain  # type: ignore[return-value]

"""Recipes: a model, its data and its settings in one YAML file, with overrides from the command line.

A recipe names a Python file beside it, and in that file a network and a function that returns the data. Everything
else has a place in the schema below; an unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from .config import QuantizeConfig, check_names
from .rules import Rule, leave_out, parse_rules
from .strategies import find_level


@dataclass
class Call:
    """A function or class by name, and its arguments."""

    name: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptionalCall:
    """As ``Call``, where no name means none."""

    name: str | None = None
    args: dict[str, Any] = field(default_factory=dict)


FixedPointSection = dataclasses.make_dataclass(
    "FixedPointSection",
    [
        ("opt_level", str, "O1"),
        ("exclude", list[str], field(default_factory=list)),
        ("rules", list[Any], field(default_factory=list)),
        # Checked by the level and QuantizeConfig. Null is the level's own; for steps_per_epoch, the trainer's.
        ("activation_dtype", Any, None),
        *((each.name, Any, None) for each in dataclasses.fields(QuantizeConfig)),
    ],
)
"""The arguments of ``cnmix.initialize``: level, names to leave out, rules, fields of ``cnmix.QuantizeConfig``."""


@dataclass
class Recipe:
    """The schema of a recipe.

    Attributes:
        module: Python file with the network and the data, relative to the recipe.
        model: the network: a class in that file.
        data: the data: a function in that file that returns two map-style data sets, (train, test), of (input, class),
            or of (input, classes) where the network classifies several positions of an input.
        batch_size: samples in a training step.
        epochs: passes over the training data.
        optimizer: a class of ``torch.optim``.
        scheduler: a class of ``torch.optim.lr_scheduler``, stepped once an epoch; none by default.
        seeds: one run for each.
        threads: threads of torch; torch's own choice where null.
        cnmix: how it computes.
        output: folder in which runs are kept, as ``output/<recipe>/<time>``.
    """

    module: str = MISSING
    model: Call = field(default_factory=Call)
    data: Call = field(default_factory=Call)
    batch_size: int = 64
    epochs: int = MISSING
    optimizer: Call = field(default_factory=Call)
    scheduler: OptionalCall = field(default_factory=OptionalCall)
    seeds: list[int] = field(default_factory=lambda: [0])
    threads: int | None = None
    cnmix: FixedPointSection = field(default_factory=FixedPointSection)  # type: ignore[valid-type]
    output: str = "runs"


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> DictConfig:
    """Reads a recipe, applies overrides and checks every name and value.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with dots between the keys, for example ``optimizer.args.lr=0.1``.

    Returns:
        The resolved recipe, read-only; ``module`` is an absolute path.

    Raises:
        FileNotFoundError: if the recipe or the Python file that it names is missing.
        ValueError: for an unknown key (with the nearest known one), a value of the wrong type, or a missing one.
    """
    file = Path(path)
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"an override has the form key=value, got {override!r}")
    given = _read(file)
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, TypeError) as error:
        reason, key = str(error).splitlines()[0], getattr(error, "full_key", None)
        raise ValueError(f"the overrides contradict each other: {reason}: {key}") from error
    return merge_recipe(given, changes, where=str(file), folder=file.parent)


def merge_recipe(*sources: Any, where: str, folder: Path) -> DictConfig:
    """Merges mappings of recipe keys, the later ones over the earlier, and checks every name and value.

    Args:
        *sources: mappings, such as a recipe and overrides.
        where: what messages call the recipe.
        folder: what ``module`` is relative to.

    Returns:
        The resolved recipe, read-only.

    Raises:
        ValueError: as ``load_recipe`` does.
    """
    with _explaining(where):
        recipe = _merge(sources)
        OmegaConf.resolve(recipe)
        missing = sorted(OmegaConf.missing_keys(recipe))
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")
        _check_values(recipe)
    recipe.module = str((folder / recipe.module).resolve())
    OmegaConf.set_readonly(recipe, True)
    return recipe


def load_section(recipe: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Reads the ``cnmix`` section of a recipe, which may lack everything else.

    Args:
        recipe: the YAML file, or a mapping of the recipe's keys or of the section's.

    Returns:
        The section's entries as plain data, without those that are null. Names and types have been checked; values are
        for the level to check.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown key (with the nearest known one), or a value of the wrong type.
    """
    if isinstance(recipe, (str, os.PathLike)):
        where, given = str(recipe), _read(Path(recipe))
    else:
        where, given = "recipe", recipe
    with _explaining(where):
        if isinstance(recipe, Mapping) and not set(recipe) & {each.name for each in dataclasses.fields(Recipe)}:
            given = {"cnmix": recipe}
        section = OmegaConf.to_container(_merge([given]).cnmix, resolve=True)
    return {str(name): value for name, value in section.items() if value is not None}  # type: ignore[union-attr]


def _read(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"there is no recipe {file}")
    try:
        return OmegaConf.load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error


def _merge(sources: Iterable[Any]) -> DictConfig:
    """Merges mappings of recipe keys over the schema, checking every name and type."""
    schema = recipe = OmegaConf.structured(Recipe)
    for source in sources:
        config = OmegaConf.create(source)
        if not isinstance(config, DictConfig):
            raise ValueError("must be a mapping of recipe keys")
        _check_keys(schema, config, "")
        recipe = OmegaConf.merge(recipe, config)
    return recipe


@contextlib.contextmanager
def _explaining(where: str) -> Iterator[None]:
    """Turns what goes wrong within into a ValueError that begins with the recipe's name."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{where}: {key}{str(error).splitlines()[0]}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_values(recipe: DictConfig) -> None:
    if not recipe.seeds:
        raise ValueError("seeds must name at least one seed")
    for seed in recipe.seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seeds must lie in [0, 2**63), got {seed}")
    for name in ("batch_size", "epochs", "threads"):
        if recipe[name] is not None and recipe[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {recipe[name]}")
    _check_level(recipe, recipe.cnmix.opt_level)


def _check_level(recipe: DictConfig, name: str) -> None:
    level = find_level(name)
    level.configure(fixed_point_settings(recipe))
    level.choose_activations(recipe.cnmix.activation_dtype)
    level.check_rules(recipe_rules(recipe))


def choose_levels(recipe: DictConfig, compare: bool, levels: Sequence[str]) -> list[str]:
    """Returns the opt levels to train a recipe at.

    Args:
        recipe: as ``load_recipe`` returns it.
        compare: the recipe's own level, and before it O0.
        levels: these instead of the recipe's own. Its settings hold at each that quantizes; O0 has no use for them.

    Raises:
        ValueError: for a level that there is not, that cannot take the recipe's settings or that stands there twice,
            or where both are given.
    """
    own = recipe.cnmix.opt_level
    if not levels:
        return ["O0", own] if compare and own != "O0" else [own]
    if compare:
        raise ValueError("--levels names every level to train at: drop --compare, and put O0 among them")
    for level in levels:
        if find_level(level).quantizes:
            try:
                _check_level(recipe, level)
            except (TypeError, ValueError) as error:
                raise ValueError(f"opt_level {level!r} cannot take the recipe's settings: {error}") from error
    if len(set(levels)) < len(levels):
        raise ValueError(f"--levels names a level twice: {','.join(levels)}")
    return list(levels)


def fixed_point_settings(recipe: DictConfig) -> dict[str, Any]:
    """Returns the recipe's operand settings, as keywords of ``cnmix.QuantizeConfig``."""
    section = dict(OmegaConf.to_container(recipe.cnmix))  # type: ignore[arg-type]
    others = ("opt_level", "exclude", "rules", "activation_dtype")
    return {str(name): value for name, value in section.items() if name not in others and value is not None}


def recipe_rules(recipe: DictConfig) -> tuple[Rule, ...]:
    """Returns the recipe's rules, those that leave ``exclude`` out first.

    Raises:
        TypeError: if a rule is no mapping.
        ValueError: for an unknown name in one, or a rule that makes no sense.
    """
    return (*leave_out(list(recipe.cnmix.exclude)), *parse_rules(OmegaConf.to_container(recipe.cnmix.rules)))  # type: ignore[arg-type]


def build_model(recipe: DictConfig) -> nn.Module:
    """Builds the recipe's network, float32, with weights from torch's random state."""
    return _call(getattr_or_explain(load_module(recipe.module), recipe.model.name), recipe.model.args, "model.args")


def load_data(recipe: DictConfig) -> tuple[Dataset[Any], Dataset[Any]]:
    """Loads the recipe's training and test data."""
    return _call(getattr_or_explain(load_module(recipe.module), recipe.data.name), recipe.data.args, "data.args")


def build_optimizer(recipe: DictConfig, parameters: Any) -> tuple[Optimizer, LRScheduler | None]:
    """Builds the recipe's optimizer, and its scheduler where it has one."""
    make = getattr_or_explain(torch.optim, recipe.optimizer.name)
    optimizer = _call(make, recipe.optimizer.args, "optimizer.args", parameters)
    if recipe.scheduler.name is None:
        return optimizer, None
    make = getattr_or_explain(torch.optim.lr_scheduler, recipe.scheduler.name)
    return optimizer, _call(make, recipe.scheduler.args, "scheduler.args", optimizer)


# What the Python files of recipes are imported as.
_RECIPE_MODULE = "cnmix_recipe_"


def load_module(path: str) -> ModuleType:
    """Imports a Python file by its path.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"the recipe's module {path} is missing (`cnmix eval` takes --module where it has moved)"
        )
    spec = importlib.util.spec_from_file_location(f"{_RECIPE_MODULE}{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"the recipe's module {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def getattr_or_explain(module: ModuleType, name: str) -> Callable[..., Any]:
    """Returns a public name of a module; raises ValueError with the nearest one where there is none."""
    where = (
        f"{module.__name__.removeprefix(_RECIPE_MODULE)}.py" if _RECIPE_MODULE in module.__name__ else module.__name__
    )
    public = [
        each
        for each, value in vars(module).items()
        if not each.startswith("_") and getattr(value, "__module__", "").startswith(module.__name__)
    ]
    check_names([name], public, f"name in {where}")
    return getattr(module, name)


def _call(make: Callable[..., Any], args: Mapping[str, Any], where: str, *first: Any) -> Any:
    plain = OmegaConf.to_container(args) if isinstance(args, DictConfig) else dict(args)
    parameters = inspect.signature(make).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        names = [parameter.name for parameter in parameters][len(first) :]
        check_names(plain, names, f"argument of {make.__name__} in {where}:")  # type: ignore[arg-type]
    return make(*first, **plain)  # type: ignore[arg-type]


def _check_keys(schema: DictConfig, given: DictConfig, prefix: str) -> None:
    check_names(
        [str(key) for key in given],
        [str(key) for key in schema],
        f"recipe key under {prefix[:-1]}:" if prefix else "recipe key",
    )
    for key in given:
        inner, value, name = schema._get_node(key), given._get_node(key), prefix + str(key)
        if isinstance(inner, ListConfig) and not isinstance(value, ListConfig):
            raise ValueError(f"{name} must be a list, as {name}=[{value!s}]")
        if not isinstance(inner, DictConfig):
            continue
        if not isinstance(value, DictConfig):
            raise ValueError(f"{name} must be a mapping of {', '.join(map(str, inner)) or 'arguments'}, got {value!s}")
        if OmegaConf.get_type(inner) not in (dict, None):
            _check_keys(inner, value, f"{name}.")

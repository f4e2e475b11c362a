"""Recipes: a model, its data and its settings in one YAML file, with overrides from the command line.

A recipe names a Python file beside it, and in that file a network, a function that returns the data and, where it does
not classify, a loss and a score (see ``cnmix.task``). Everything else has a place in the schema below; an unknown key
is refused with the nearest known one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
from .recipe_code import check_arguments, getattr_or_explain, load_module
from .rules import Rule, leave_out, parse_rules
from .shipped import find_recipe
from .strategies import find_level
from .telemetry.rules import TelemetryRule, parse_telemetry_rules


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
class TelemetrySection:
    """What a run records, see ``cnmix.telemetry``; nothing where ``every_n_steps`` is 0."""

    every_n_steps: int = 50
    rules: list[Any] = field(default_factory=list)


@dataclass
class Recipe:
    """The schema of a recipe.

    Attributes:
        module: Python file with the network and the data, relative to the recipe.
        model: the network: a class in that file.
        data: the data: a function in that file that returns two map-style data sets, (train, test), of (inputs,
            targets). Inputs are a tensor, or a tuple of what the network is called with. Targets are what loss and
            score take; without these, a class, or classes where the network classifies several positions of an input.
            A data set with a method ``collate(samples)`` puts its batches together itself.
        loss: a function in that file: ``loss(outputs, targets)`` returns a scalar tensor, the mean over a batch. None:
            cross entropy of classes.
        score: a function in that file: ``score(outputs, targets)`` returns two integers, how many are right, and of how
            many. None: of classes.
        batch_size: samples in a training step.
        test_batch_size: samples in a step of evaluation.
        workers: processes that load training data, and test data; 0 is the training's own.
        epochs: passes over the training data.
        optimizer: a class of ``torch.optim``.
        scheduler: a class of ``torch.optim.lr_scheduler``, stepped once an epoch; none by default.
        seeds: one run for each.
        threads: threads of torch; torch's own choice where null.
        cnmix: how it computes.
        telemetry: what is recorded of it.
        output: folder in which runs are kept, as ``output/<recipe>/<time>``.
        tiny: keys of a recipe that ``load_recipe`` puts over the others where it is asked to, or leaves out: empty in
            what it returns. One that gives a ``name`` takes the arguments beside it alone.
    """

    module: str = MISSING
    model: Call = field(default_factory=Call)
    data: Call = field(default_factory=Call)
    loss: OptionalCall = field(default_factory=OptionalCall)
    score: OptionalCall = field(default_factory=OptionalCall)
    batch_size: int = 64
    test_batch_size: int = 500
    workers: int = 0
    epochs: int = MISSING
    optimizer: Call = field(default_factory=Call)
    scheduler: OptionalCall = field(default_factory=OptionalCall)
    seeds: list[int] = field(default_factory=lambda: [0])
    threads: int | None = None
    cnmix: FixedPointSection = field(default_factory=FixedPointSection)  # type: ignore[valid-type]
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)
    output: str = "runs"
    tiny: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, tiny: bool = False) -> DictConfig:
    """Reads a recipe, applies overrides and checks every name and value.

    Args:
        path: the YAML file, or the name of a recipe that comes with cnmix.
        overrides: ``key=value`` with dots between the keys, for example ``optimizer.args.lr=0.1``.
        tiny: put the recipe's ``tiny`` settings over the others, below the overrides. They are checked in any case.

    Returns:
        The resolved recipe, read-only; ``module`` is an absolute path.

    Raises:
        FileNotFoundError: if the recipe or the Python file that it names is missing.
        ValueError: for an unknown key (with the nearest known one), a value of the wrong type, or a missing one; if it
            has no tiny settings and these are asked for.
    """
    file = find_recipe(Path(path))
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"an override has the form key=value, got {override!r}")
        try:
            OmegaConf.from_dotlist([override])
        except yaml.YAMLError as error:
            raise ValueError(f"the override {override!r} is no YAML: {' '.join(str(error).split())}") from error
    given = _read(file)
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, TypeError) as error:
        reason, key = str(error).splitlines()[0], getattr(error, "full_key", None)
        raise ValueError(f"the overrides contradict each other: {reason}: {key}") from error
    small = _take_tiny(given, str(file))
    if tiny and not small:
        raise ValueError(f"{file} has no tiny settings")
    return merge_recipe(small if tiny else given, changes, where=str(file), folder=file.parent)


def _take_tiny(given: Any, where: str) -> DictConfig | None:
    """Takes the tiny settings out of a recipe; returns them over it, checked, or None where it has none."""
    if not isinstance(given, DictConfig) or "tiny" not in given:  # what is no mapping is refused by merge_recipe
        return None
    tiny = given._get_node("tiny")
    given.pop("tiny")
    if not isinstance(tiny, DictConfig):
        raise ValueError(f"{where}: tiny must be a mapping of recipe keys, got {tiny!s}")
    if not tiny:
        return None
    with _explaining(f"{where}: tiny"):
        if "tiny" in tiny:
            raise ValueError("has tiny settings of its own")
        entries = tiny.items_ex(resolve=False)
        named = [key for key, value in entries if isinstance(value, DictConfig) and "name" in value]
        small = OmegaConf.create({key: value for key, value in given.items_ex(resolve=False) if key not in named})
        small.merge_with(tiny)
        recipe = _merge([small])
        if not OmegaConf.missing_keys(recipe):  # else the command line has to say more, and is checked with the rest
            OmegaConf.resolve(recipe)
            _check_values(recipe)
    return small


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
        if recipe.tiny:
            raise ValueError("tiny stands in a recipe's file: beside --tiny give the keys themselves")
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
    if len(set(recipe.seeds)) < len(recipe.seeds):
        raise ValueError(f"seeds names a seed twice: {list(recipe.seeds)}")
    for seed in recipe.seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seeds must lie in [0, 2**63), got {seed}")
    for name, least in {"batch_size": 1, "test_batch_size": 1, "workers": 0, "epochs": 1, "threads": 1}.items():
        if recipe[name] is not None and recipe[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {recipe[name]}")
    telemetry_rules(recipe)
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


def telemetry_rules(recipe: DictConfig) -> tuple[TelemetryRule, ...]:
    """Returns the rules of what a run records; none where it records nothing.

    Raises:
        TypeError: if a rule is no mapping.
        ValueError: for an unknown name in one, or a value out of its range.
    """
    section = recipe.telemetry
    rules = parse_telemetry_rules(OmegaConf.to_container(section.rules), section.every_n_steps or 1)  # type: ignore[arg-type]
    return rules if section.every_n_steps else ()


def build_model(recipe: DictConfig) -> nn.Module:
    """Builds the recipe's network, float32, with weights from torch's random state."""
    make = getattr_or_explain(load_module(recipe.module), recipe.model.name)
    return make(**check_arguments(make, recipe.model.args, "model.args"))


def load_data(recipe: DictConfig) -> tuple[Dataset[Any], Dataset[Any]]:
    """Loads the recipe's training and test data."""
    make = getattr_or_explain(load_module(recipe.module), recipe.data.name)
    return make(**check_arguments(make, recipe.data.args, "data.args"))


def build_optimizer(recipe: DictConfig, parameters: Any) -> tuple[Optimizer, LRScheduler | None]:
    """Builds the recipe's optimizer, and its scheduler where it has one."""
    make = getattr_or_explain(torch.optim, recipe.optimizer.name)
    optimizer = make(parameters, **check_arguments(make, recipe.optimizer.args, "optimizer.args", given=1))
    if recipe.scheduler.name is None:
        return optimizer, None
    make = getattr_or_explain(torch.optim.lr_scheduler, recipe.scheduler.name)
    return optimizer, make(optimizer, **check_arguments(make, recipe.scheduler.args, "scheduler.args", given=1))


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

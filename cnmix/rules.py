"""Choice by module: which modules compute in fixed point, and with which settings for which operand."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .config import OPERANDS, QuantizeConfig, check_names

# With fewer weights (per group), integers gain nothing: quantizing and calling take longer than the float32 product.
# A convolution multiplies its weights with many positions, a Linear often with few rows. Measured: docs/levels.md.
SMALL_LINEAR = 128 * 128
SMALL_CONVOLUTION = 64 * 64
# Of a recurrent network the hidden size: its products have one row for each sequence of a batch.
SMALL_HIDDEN = 192
TOO_SMALL = "too small to gain"

_Selector = TypeVar("_Selector", bound="Selector")

# Of the settings, these belong to a product, and so to all of its operands.
_OF_PRODUCTS = ("exact_int31", "steps_per_epoch")


@dataclass(frozen=True)
class Selector:
    """Chooses operands of some modules of a model.

    Attributes:
        modules: patterns of fully qualified names, of which one must match; a name covers all below it. Empty: any.
        types: names of classes, or classes, of which the module or one that it is in must be one. Empty: any.
        small: only modules with fewer weights, per group, than ``SMALL_LINEAR`` or ``SMALL_CONVOLUTION``, or of
            a hidden size below ``SMALL_HIDDEN``: too small to gain.
        operands: of ``input``, ``weight`` and ``grad_output``. Empty: all three.
    """

    modules: tuple[str, ...] = ()
    types: tuple[str | type, ...] = ()
    small: bool = False
    operands: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("modules", "types", "operands"):
            value = getattr(self, name)
            several = isinstance(value, Iterable) and not isinstance(value, (str, type))
            object.__setattr__(self, name, tuple(value) if several else (value,))
        if not isinstance(self.small, bool):
            raise ValueError(f"a rule's small must be True or False, got {self.small!r}")
        for pattern in self.modules:
            if not isinstance(pattern, str):
                raise TypeError(f"a rule's modules are fully qualified names or patterns of them, got {pattern!r}")
        for kind in self.types:
            if not isinstance(kind, (str, type)):
                raise TypeError(f"a rule's types are classes or names of classes, got {kind!r}")
        check_names(self.operands, OPERANDS, "operand in a rule:")

    def under(self: _Selector, prefix: str) -> _Selector:
        """Returns the rule for a model that holds this one's under ``prefix``, such as ``"model."``."""
        return dataclasses.replace(self, modules=tuple(f"{prefix}{pattern}" for pattern in self.modules))


@dataclass(frozen=True)
class Rule(Selector):
    """What holds for some modules of a model; a later rule goes over an earlier one.

    ``cnmix.initialize`` and recipes take rules as mappings of the same names, with the settings beside them:
    ``{"modules": "encoder.*", "operands": "grad_output", "rounding": "stochastic"}``.

    Attributes:
        modules: see ``Selector``; likewise ``types``, ``small`` and ``operands``, which the settings are for.
        leave_out: leave the modules in float32.
        settings: fields of ``cnmix.QuantizeConfig``; ``width`` sets ``bitwidth`` and ``max_bitwidth`` to one value.
    """

    leave_out: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.leave_out, bool):
            raise ValueError(f"a rule's leave_out must be True or False, got {self.leave_out!r}")
        settings = dict(self.settings)
        if "width" in settings:
            both = {"bitwidth", "max_bitwidth"} & set(settings)
            if both:
                raise ValueError(f"a rule's width sets both bitwidth and max_bitwidth: drop {' and '.join(both)}")
            settings["bitwidth"] = settings["max_bitwidth"] = settings.pop("width")
        known = [each.name for each in dataclasses.fields(QuantizeConfig)]
        check_names(settings, known, "setting in a rule:")
        for name, value in settings.items():
            try:
                QuantizeConfig().replace(**{name: value})  # each by itself; how they go together depends on the level
            except ValueError as error:
                raise ValueError(f"{_show(self)}: {error}") from error
        object.__setattr__(self, "settings", settings)
        if self.leave_out and (settings or self.operands):
            raise ValueError(
                "a rule that leaves modules out has no settings and no operands: a product is of integers or of "
                "floats, and all three operands stay float32"
            )
        if not self.leave_out and not settings:
            raise ValueError(f"{_show(self)} says neither leave_out nor a setting: give one")
        for name in _OF_PRODUCTS:
            if name in settings and self.operands:
                raise ValueError(f"{name} is of a whole module: give it in a rule without operands")


def parse_rules(rules: Iterable[Rule | Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Builds rules from mappings.

    Raises:
        TypeError: if ``rules`` is no list of mappings or rules.
        ValueError: for an unknown name (with the nearest known one) or a rule that makes no sense.
    """
    if isinstance(rules, (str, Mapping, Rule)) or not isinstance(rules, Iterable):
        raise TypeError(
            f"rules must be a list of mappings, as [{{'modules': 'head', 'leave_out': True}}], got {rules!r}"
        )
    parsed = []
    selectors = [each.name for each in dataclasses.fields(Rule) if each.name != "settings"]
    for rule in rules:
        if isinstance(rule, Mapping):
            names = [*selectors, "width", *(each.name for each in dataclasses.fields(QuantizeConfig))]
            check_names(rule, names, "name in a rule:")
            for name in ("modules", "types", "operands", "small"):
                if name in rule and not rule[name]:
                    raise ValueError(
                        f"the rule {dict(rule)} chooses by {name}={rule[name]!r}: name some, or drop {name}"
                    )
            chosen = {name: rule[name] for name in selectors if name in rule}
            settings = {name: value for name, value in rule.items() if name not in selectors}
            rule = Rule(**chosen, settings=settings)
        if not isinstance(rule, Rule):
            raise TypeError(f"a rule is a mapping, as {{'modules': 'head', 'leave_out': True}}, got {rule!r}")
        parsed.append(rule)
    return tuple(parsed)


def leave_out(names: Sequence[str]) -> tuple[Rule, ...]:
    """Returns the rules that leave modules of these names in float32.

    Raises:
        TypeError: for a string where a list of names is meant.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"exclude must be a list of module names, got {names!r}: write [{names!r}]")
    return tuple(Rule(modules=(name,), leave_out=True) for name in names)


class RuleBook:
    """The rules for one model.

    Args:
        model: whose modules are chosen from; nothing is changed.
        rules: in the order in which they apply.
    """

    def __init__(self, model: nn.Module, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._names: dict[int, list[str]] = {}
        self._classes: dict[str, tuple[type, ...]] = {}
        # A module that is registered under several names can be chosen by any of them.
        for fqn, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(fqn)
            self._classes[fqn] = type(module).__mro__

    def check(self) -> None:
        """Raises ValueError, with the nearest name, for a pattern or class that no module has."""
        for rule in self.rules:
            self.check_names_of(rule)

    def check_names_of(self, rule: Selector) -> None:
        """Raises ValueError, with the nearest name, for a pattern or class of this rule that no module has."""
        for pattern in rule.modules:
            if not self._has_name(pattern):
                raise ValueError(f"{_show(rule)}: {no_module_called(pattern, self._classes)}")
        for kind in rule.types:
            if not self._has_class(kind):
                name = kind if isinstance(kind, str) else kind.__name__
                names = {each.__name__ for classes in self._classes.values() for each in classes}
                near = difflib.get_close_matches(name, sorted(names), n=1)
                hint = f"did you mean {near[0]!r}?" if near else "print(model) shows the classes"
                raise ValueError(f"{_show(rule)}: no module is of the class {name!r}: {hint}")

    def check_sizes(self, modules: Iterable[nn.Module]) -> None:
        """Raises ValueError, naming it, for a module without weights yet that a rule would choose by its size."""
        lazy = [module for module in modules if isinstance(module, LazyModuleMixin)]
        for rule in self.rules:
            for module in lazy:
                if rule.small and self.holds(dataclasses.replace(rule, small=False), module):
                    raise ValueError(
                        f"{_show(rule)}: {self._names[id(module)][0]!r} is a {type(module).__name__}, whose size is "
                        "known after a forward pass: run one first, or leave it out of the rule"
                    )

    def check_effect(self, convertible: Iterable[nn.Module]) -> None:
        """Raises ValueError for a rule with settings that holds for no module in fixed point; one by size may."""
        chosen = [module for module in convertible if self.why_left_out(module) in ("", TOO_SMALL)]
        for rule in self.rules:
            if not rule.leave_out and not rule.small and not any(self.holds(rule, module) for module in chosen):
                raise ValueError(
                    f"{_show(rule)}: of what it chooses nothing computes in fixed point: it is of no class that is "
                    "converted (print(cnmix.summary(model)) names the reason), or left out by another rule"
                )

    def without_gone(self) -> tuple[Rule, ...]:
        """Returns the rules without the patterns and classes that no module has, of a model that has been changed."""
        rules = []
        for rule in self.rules:
            modules = tuple(pattern for pattern in rule.modules if self._has_name(pattern))
            types = tuple(kind for kind in rule.types if self._has_class(kind))
            if bool(modules) == bool(rule.modules) and bool(types) == bool(rule.types):
                rules.append(dataclasses.replace(rule, modules=modules, types=types))
        return tuple(rules)

    def why_left_out(self, module: nn.Module) -> str:
        """Returns why the module stays float32, or "" where it does not."""
        holding = [rule for rule in self.rules if rule.leave_out and self.holds(rule, module)]
        if not holding:
            return ""
        return TOO_SMALL if all(rule.small for rule in holding) else "left out"

    def configure(self, module: nn.Module, config: QuantizeConfig) -> dict[str, QuantizeConfig]:
        """Returns the settings of each operand of the module: ``config``, changed by the rules that hold for it.

        Raises:
            ValueError: if they contradict each other, naming the module.
        """
        changes: dict[str, dict[str, Any]] = {operand: {} for operand in OPERANDS}
        for rule in self.rules:
            if not rule.leave_out and self.holds(rule, module):
                for operand in rule.operands or OPERANDS:
                    changes[operand].update(rule.settings)
        try:
            return {operand: config.replace(**changes[operand]) for operand in OPERANDS}
        except ValueError as error:
            fqn = self._names[id(module)][0] or type(module).__name__
            raise ValueError(f"the rules for {fqn!r}: {error}") from error

    def _has_name(self, pattern: str) -> bool:
        return any(matches(fqn, pattern) for fqn in self._classes)

    def _has_class(self, kind: str | type) -> bool:
        return any(kind is each or kind == each.__name__ for classes in self._classes.values() for each in classes)

    def holds(self, rule: Selector, module: nn.Module) -> bool:
        """Whether a rule chooses this module of the model."""
        if rule.small and not _is_small(module):
            return False
        return any(
            (not rule.modules or any(matches(fqn, pattern) for pattern in rule.modules))
            and (not rule.types or self._within(fqn, rule.types))
            for fqn in self._names.get(id(module), ())
        )

    def _within(self, fqn: str, types: tuple[str | type, ...]) -> bool:
        parts = fqn.split(".") if fqn else []
        above = [".".join(parts[:count]) for count in range(len(parts) + 1)]
        classes = {each for name in above for each in self._classes.get(name, ())}
        return not classes.isdisjoint(types) or not {each.__name__ for each in classes}.isdisjoint(types)


def _is_small(module: nn.Module) -> bool:
    # Not from the weight: a parametrization would compute it, and a lazy module has none yet.
    if isinstance(module, LazyModuleMixin):
        return False
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features < SMALL_LINEAR
    if isinstance(module, nn.Bilinear):
        return module.in1_features * module.in2_features * module.out_features < SMALL_LINEAR
    if isinstance(module, nn.modules.conv._ConvNd):
        per_group = module.in_channels * module.out_channels // module.groups**2
        return per_group * math.prod(module.kernel_size) < SMALL_CONVOLUTION
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return module.hidden_size < SMALL_HIDDEN
    return False


def _show(rule: Selector) -> str:
    parts = {each.name: getattr(rule, each.name) for each in dataclasses.fields(rule) if each.name != "settings"}
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in parts.items() if value}
    return f"rule { ({**shown, **getattr(rule, 'settings', {})}) }"


def no_module_called(pattern: str, names: Iterable[str]) -> str:
    """Says that no module has this name, and which is the nearest that one has."""
    near = difflib.get_close_matches(pattern, list(names), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see the names in model.named_modules()"
    return f"no module is called {pattern!r}: {hint}"


def matches(fqn: str, pattern: str) -> bool:
    """Whether a pattern of fully qualified names covers this one: the name itself, or one above it."""
    return fnmatch.fnmatchcase(fqn, pattern) or fnmatch.fnmatchcase(fqn, f"{pattern}.*")

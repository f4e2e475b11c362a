"""Rules that widen operands: what they are, what they gain and what they cost."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..config import OPERANDS, OperandConfigs
from ..files import replacing
from ..fixed_point import POSITION_MIN
from ..kernels.profiling import Work
from ..nn import module_name, quantizer_sets
from ..rules import Rule, parse_rules
from ..tables import format_table


class Width(NamedTuple):
    """What an operand's rule sets.

    Attributes:
        bitwidth: width to begin with, below which it does not come.
        max_bitwidth: width that it does not exceed.
    """

    bitwidth: int
    max_bitwidth: int


@dataclass(frozen=True)
class Suggestion:
    """Rules that widen operands, and what they do; its text says all of it.

    Attributes:
        mappings: the rules as ``cnmix.initialize(rules=...)``, recipes and the plugins take them. They go behind rules
            that the model has.
        before: relative error of the step's gradients (without a backward pass of its output) as the model is.
        after: with the rules, measured.
        wanted: what was asked for.
        macs_before: multiply-accumulates of the step by widths of the operands, as "int8 x int8".
        macs_after: with the rules.
    """

    mappings: tuple[dict[str, Any], ...]
    before: float
    after: float
    wanted: float
    macs_before: Mapping[str, int]
    macs_after: Mapping[str, int]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules as ``cnmix.Rule``."""
        return parse_rules(self.mappings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a YAML file with the rules under ``cnmix: rules:``, as a recipe has them, and comments on them."""
        from omegaconf import OmegaConf

        text = OmegaConf.to_yaml(OmegaConf.create({"cnmix": {"rules": [*self.mappings]}}))
        with replacing(path) as temporary:
            comments = "".join(f"# {line}\n" for line in self._describe().splitlines())
            temporary.write_text(comments + text, encoding="utf-8")

    def _describe(self) -> str:
        reached = "" if self.after <= self.wanted else f", not the {self.wanted:.2g} that was asked for"
        text = f"error of the step: {self.before:.2g}, with these rules {self.after:.2g}{reached}\n"
        total = sum(self.macs_before.values()) or 1
        table: list[tuple[str, ...]] = [("multiply-accumulates", "before", "after")]
        for name in sorted({*self.macs_before, *self.macs_after}, key=_widths):
            shares = (macs.get(name, 0) / total for macs in (self.macs_before, self.macs_after))
            table.append((name, *(f"{share:.1%}" for share in shares)))
        return text + format_table(table)

    def __str__(self) -> str:
        return "\n".join([*(str(each) for each in self.mappings), self._describe()])


def _widths(name: str) -> tuple[int, ...]:
    return tuple(int(each.removeprefix("int")) for each in name.split(" x "))


def widen(model: nn.Module, widths: Mapping[tuple[str, str], Width]) -> None:
    """Gives operands, by module and name, wider formats in place, in the range that they have."""
    for name, quantizers in quantizer_sets(model):
        for operand, quantizer in quantizers:
            width = widths.get((module_name(name), operand))
            if width is None:
                continue
            state = quantizer.state
            more = max(width.bitwidth - state.bits, 0)
            state.bits += more
            state.moving_position -= more
            if state.position is not None:
                state.position = max(state.position - more, POSITION_MIN)
            quantizer.config = quantizer.config.replace(**width._asdict())


class CountedMacs:
    """Counts the multiply-accumulates of the core by the widths of their operands, as a listener of the kernels."""

    def __init__(self) -> None:
        self.by_widths: dict[str, int] = {}

    def multiplied(self, bits: tuple[int, int], macs: int, numbers: tuple[int, int]) -> None:
        """Takes note of a product."""
        name = " x ".join(f"int{each}" for each in sorted(bits))
        self.by_widths[name] = self.by_widths.get(name, 0) + macs

    def spent(self, work: Work, seconds: float) -> None:
        """Takes note of nothing."""


def make_rules(
    configs: Mapping[str, OperandConfigs], wider: Mapping[tuple[str, str], Width]
) -> tuple[dict[str, Any], ...]:
    """Returns the rules, as mappings, that give some operands other widths, and leave all others what they have.

    A rule for a module covers those within it: where they are not to be widened too, a rule behind it says so.

    Args:
        configs: settings of every module with products, by name.
        wider: widths of operands, by module and name.
    """
    settings_of: dict[tuple[str, str], dict[str, int]] = {}  # that rules so far give an operand
    alike: dict[tuple[Any, ...], list[str]] = {}  # modules, by depth, operands and settings
    for fqn in sorted(configs, key=_depth):
        by_settings: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for operand in OPERANDS:
            above = next((settings_of[each, operand] for each in _above(fqn) if (each, operand) in settings_of), {})
            config = configs[fqn][operand]
            own = Width(config.bitwidth, config.max_bitwidth)
            now = {**own._asdict(), **above}
            wanted = wider.get((fqn, operand), own)._asdict()
            changes = {name: value for name, value in wanted.items() if now[name] != value}
            settings_of[fqn, operand] = {**above, **changes}
            if changes:
                by_settings.setdefault(tuple(changes.items()), []).append(operand)
        for settings, operands in by_settings.items():
            alike.setdefault((_depth(fqn), tuple(operands), settings), []).append(fqn)
    return tuple(_mapping(modules, operands, dict(settings)) for (_, operands, settings), modules in alike.items())


def _mapping(modules: list[str], operands: tuple[str, ...], settings: dict[str, int]) -> dict[str, Any]:
    """Returns one rule."""
    rule: dict[str, Any] = {}
    if modules != [""]:  # the model itself, which a rule without names is for, and all below it
        rule["modules"] = [glob.escape(each) for each in modules]
    if len(operands) < len(OPERANDS):
        rule["operands"] = list(operands)
    if len({*settings.values()}) == 1 and len(settings) == 2:
        return {**rule, "width": settings["bitwidth"]}
    return {**rule, **settings}


def _above(fqn: str) -> list[str]:
    """Returns the names of the modules that this one is in, the innermost first."""
    parts = fqn.split(".") if fqn else []
    return [".".join(parts[:count]) for count in reversed(range(len(parts)))]


def _depth(fqn: str) -> int:
    return len(_above(fqn))

"""How many cards there are, which, and how strict."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from .card import library
from .cards import Card, check_count, find_card


@dataclass(frozen=True)
class Settings:
    """What the emulation is set to.

    Attributes:
        cards: how many there are.
        strict: whether an operator refuses what a card would refuse.
        card: which they are.
        floating: whether products of float tensors are computed in float. None is as the card does.
        product_bits: the width of these products where they are not: 8, 16 or 31.
        cnml: whether a script chose the graphs of inference.
        core_number: of an offline model.
        core_version: the card that an offline model is for; empty is this one.
        input_format: the order of an image's channels, 0 to 3.
        fuses: whether traced modules run fused.
        offline_model: the name of the offline model that the next trace shall leave; empty for none.
    """

    cards: int
    strict: bool
    card: Card
    floating: bool | None = None
    product_bits: int = 31
    cnml: bool = False
    core_number: int = 1
    core_version: str = ""
    input_format: int = 0
    fuses: bool = True
    offline_model: str = ""

    @property
    def multiplies_in_float(self) -> bool:
        """Whether products of float tensors are computed in float."""
        return self.card.floating if self.floating is None else self.floating


class _Current:
    settings: Settings | None = None


_current = _Current()


def settings() -> Settings:
    """Returns the settings in force.

    Raises:
        RuntimeError: if the emulation is not in place.
    """
    if _current.settings is None:
        raise RuntimeError("the emulated torch_mlu is not in place: call cnmix.torch_mlu.install() first")
    return _current.settings


def changed(**changes: Any) -> Settings:
    """Returns the settings with some changed; the rest is as in force, or at first what the environment says.

    Raises:
        ValueError: if the number of cards is not one that can be had, or there is no card of the name in
            ``DEFAULT_MLU_DEVICE_NAME``.
    """
    found = replace(_current.settings or _from_environment(), **changes)
    check_count(found.cards)
    return found


def put_in_force(found: Settings) -> None:
    """Makes these the settings in force."""
    _current.settings = found
    library().set(found.cards, found.strict, not found.multiplies_in_float, found.card.memory)


def configure(**changes: Any) -> None:
    """Changes the settings that are given.

    Raises:
        ValueError: as ``changed`` does.
    """
    put_in_force(changed(**changes))


def _from_environment() -> Settings:
    visible = os.environ.get("MLU_VISIBLE_DEVICES")
    return Settings(
        cards=1 if visible is None else len([each for each in visible.split(",") if each.strip()]),
        strict=os.environ.get("CNMIX_STRICT_DEVICE") == "1",
        card=find_card(os.environ.get("DEFAULT_MLU_DEVICE_NAME") or "MLU370"),
    )

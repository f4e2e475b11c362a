"""How many cards there are, which, and how strict."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from .card import library
from .cards import Card, find_card


@dataclass(frozen=True)
class Settings:
    """What the emulation is set to.

    Attributes:
        cards: how many there are.
        strict: whether an operator refuses what a card would refuse.
        card: which they are.
        floating: whether float tensors are multiplied in float32; else as int31. None is as the card does.
    """

    cards: int
    strict: bool
    card: Card
    floating: bool | None = None

    @property
    def multiplies_in_float(self) -> bool:
        """Whether float tensors are multiplied in float32."""
        return self.card.floating if self.floating is None else self.floating


class _Current:
    settings: Settings | None = None


_current = _Current()


def settings() -> Settings:
    """Returns the settings in force."""
    if _current.settings is None:
        raise RuntimeError("the emulated torch_mlu is not in place: call cnmix.torch_mlu.install() first")
    return _current.settings


def configure(cards: int | None = None, strict: bool | None = None, card_name: str | None = None) -> Settings:
    """Changes what is given; the rest stays, or is what the environment says at first."""
    known = _current.settings
    if known is None:
        visible = os.environ.get("MLU_VISIBLE_DEVICES")
        known = Settings(
            cards=1 if visible is None else len([each for each in visible.split(",") if each.strip()]),
            strict=os.environ.get("CNMIX_STRICT_DEVICE") == "1",
            card=find_card(os.environ.get("DEFAULT_MLU_DEVICE_NAME") or "MLU370"),
        )
    if cards is not None:
        if not 0 <= cards <= 64:
            raise ValueError(f"there can be 0 to 64 emulated cards, not {cards}")
        known = replace(known, cards=cards)
    if strict is not None:
        known = replace(known, strict=strict)
    if card_name is not None:
        known = replace(known, card=find_card(card_name))
    return _apply(known)


def set_floating(floating: bool | None) -> None:
    """Sets whether float tensors are multiplied in float32; None is as the card does."""
    _apply(replace(settings(), floating=floating))


def _apply(changed: Settings) -> Settings:
    _current.settings = changed
    library().set(changed.cards, changed.strict, not changed.multiplies_in_float, changed.card.memory)
    return changed

"""The cards that can be emulated, and what is known of them."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """A card of the vendor's.

    Attributes:
        name: as ``get_device_name`` returns it.
        cores: IPU cores.
        clusters: of cores.
        memory: in bytes.
        clock: of the cores, in Hz.
        bandwidth: of the memory, in bytes per second.
        macs_per_cycle: multiply-accumulates per cycle and core, by the wider operand's type.
        floating: whether it multiplies float tensors in float; else as int31.
        capability: major and minor.
    """

    name: str
    cores: int
    clusters: int
    memory: int
    clock: float
    bandwidth: float
    macs_per_cycle: dict[str, float]
    floating: bool
    capability: tuple[int, int]


_GIB = 1 << 30
_INT = {"int8": 4096.0, "int16": 2048.0, "int31": 512.0}

_CARDS = (
    Card("MLU220", 4, 1, 8 * _GIB, 1.0e9, 25.6e9, {k: v / 2 for k, v in _INT.items()}, False, (2, 20)),
    Card("MLU270", 16, 4, 16 * _GIB, 1.0e9, 102.0e9, _INT, False, (2, 70)),
    Card("MLU290", 64, 16, 32 * _GIB, 1.0e9, 1228.0e9, _INT, False, (2, 90)),
    Card("MLU370", 16, 4, 24 * _GIB, 1.0e9, 307.2e9, {**_INT, "float16": 1536.0, "float32": 384.0}, True, (3, 70)),
    Card("MLU590", 32, 8, 80 * _GIB, 1.0e9, 2000.0e9, {**_INT, "float16": 1536.0, "float32": 384.0}, True, (5, 90)),
)


def find_card(name: str) -> Card:
    """Returns the card of this name, whatever its case and variant (``MLU370-X8`` is an MLU370).

    Raises:
        ValueError: if there is none.
    """
    wanted = name.strip().upper()
    for card in _CARDS:
        if wanted == card.name or wanted.startswith(f"{card.name}-"):
            return card
    raise ValueError(f"there is no card {name!r}: take one of {', '.join(card.name for card in _CARDS)}")

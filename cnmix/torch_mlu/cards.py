"""The cards that can be emulated, and what is known of them.

Where the numbers come from:

- ``macs_per_cycle``: the performance model in Cambricon's own test harness, ``mlu-ops`` on GitHub
  (test/mlu_op_gtest/pb_gtest/src/executor.cpp). MLU220: int8 2048, int16 1024. MLU270, 290 and 370: int8 4096, int16
  2048; the 370 float16 1536 and float32 384 too. It runs int16 × int8 as int16, int31 × int16 at a half and
  int31 × int31 at a quarter of int16's rate. bfloat16 equals float16 in the published peaks of the MLU370-X8.
- Cores and clock: cores × clock × multiply-accumulates × 2 is the published peak. MLU270: 128 TOPS in int8, with 16
  cores. MLU290: 512 TOPS in int8 and 256 in int16, with 64 cores. MLU370-X8: 256 in int8, 128 in int16, 96 in float16
  and bfloat16; 24 in float32 follows (one press page says 32). All of them ask for one clock, 128e12 / 2^17 =
  976.5625 MHz: at 1 GHz the first would be 131. The 370's 32 cores are what its peak asks for at that clock.
  MLU220: no peak was found; four cores at the same clock, 16 TOPS in int8, are assumed.
- Four cores make a cluster on all of them.
- Memory and bandwidth: the vendor's product descriptions as generally known. They were not checked against a document.
- MLU590: nothing is published, and the harness has zeros in its place. Cores, clock and rates of the MLU370, 80 GiB and
  2 TB/s are assumed: its estimates say what such a card would do, and no more.
"""

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
        note: what is assumed of it beyond the others, or "".
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
    note: str = ""

    def rate(self, left: str, right: str) -> float:
        """Returns the multiply-accumulates per second of all cores, for operands of these types.

        Args:
            left: int8, int16 or int31, or one of the float types that the card multiplies.
            right: likewise.

        Raises:
            ValueError: if the card does not multiply these.
        """
        types = {left, right}
        known = self.macs_per_cycle
        if unknown := types - known.keys():
            raise ValueError(f"{self.name} multiplies {', '.join(known)}: not {min(unknown)}")
        slowest = min(known[each] for each in types)
        if "int31" in types and types & {"int8", "int16"}:
            # Two int16 products, one for each half of the int31 operand, where int31 × int31 takes four.
            slowest = known["int16"] / 2
        return self.cores * self.clock * slowest

    def peak(self, type_: str) -> float:
        """Returns the operations per second on operands of one type, a multiply-accumulate being two."""
        return 2 * self.rate(type_, type_)


_GIB = 1 << 30
_CLOCK = 128e12 / 2**17
_INT = {"int8": 4096.0, "int16": 2048.0, "int31": 512.0}
_INT_AND_FLOAT = {**_INT, "float16": 1536.0, "bfloat16": 1536.0, "float32": 384.0}

_CARDS = (
    Card(
        "MLU220",
        cores=4,
        clusters=1,
        memory=8 * _GIB,
        clock=_CLOCK,
        bandwidth=29.9e9,  # LPDDR4X, 64 bit, 3733 MT/s
        macs_per_cycle={"int8": 2048.0, "int16": 1024.0, "int31": 256.0},
        floating=False,
        capability=(2, 20),
        note="MLU220: cores and clock are assumed",
    ),
    Card("MLU270", 16, 4, 16 * _GIB, _CLOCK, 102.4e9, _INT, False, (2, 70)),  # DDR4, 256 bit, 3200 MT/s
    Card("MLU290", 64, 16, 32 * _GIB, _CLOCK, 1228.8e9, _INT, False, (2, 90)),  # HBM2, 4096 bit, 2400 MT/s
    Card("MLU370", 32, 8, 48 * _GIB, _CLOCK, 614.4e9, _INT_AND_FLOAT, True, (3, 70)),  # the X8, LPDDR5
    Card(
        "MLU590",
        cores=32,
        clusters=8,
        memory=80 * _GIB,
        clock=_CLOCK,
        bandwidth=2000e9,
        macs_per_cycle=_INT_AND_FLOAT,
        floating=True,
        capability=(5, 90),
        note="MLU590: nothing is published, all its numbers are assumed",
    ),
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


def check_count(cards: int) -> None:
    """Checks that there can be as many emulated cards.

    Raises:
        ValueError: if not.
    """
    if not 0 <= cards <= 64:  # card.h has the same number
        raise ValueError(f"there can be 0 to 64 emulated cards, not {cards}")

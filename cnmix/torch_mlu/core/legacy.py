"""Names of the vendor's first generation, which scripts of the 200 series set."""

from __future__ import annotations

from ..cards import find_card
from ..settings import configure, settings


def set_cnml_enabled(enabled: bool) -> None:
    """Chooses between the graphs of inference (True) and training, operator by operator (False).

    The emulated card computes operator by operator in both, so that it is remembered for ``get_running_mode`` alone.
    """
    configure(cnml=bool(enabled))


def get_running_mode() -> str:
    """Returns the library that the card computes with: CNML, or CNNL (the default)."""
    return "CNML" if settings().cnml else "CNNL"


def set_core_number(number: int) -> None:
    """Sets how many cores an inference takes.

    Raises:
        ValueError: if the card, or the one that ``set_core_version`` named, does not have as many.
    """
    card = find_card(settings().core_version or settings().card.name)
    if not 1 <= int(number) <= card.cores:
        raise ValueError(f"an {card.name} has 1 to {card.cores} cores to take, not {number}")
    configure(core_number=int(number))


def set_core_version(name: str) -> None:
    """Sets the card that an offline model is for, as ``"MLU270"``.

    Raises:
        ValueError: if there is no card of this name.
    """
    configure(core_version=find_card(name).name)


def set_input_format(order: int) -> None:
    """Sets the order of an image's channels for inference: 0 RGBA (the default), 1 ARGB, 2 BGRA, 3 ABGR.

    Raises:
        ValueError: if it is none of them.
    """
    if order not in range(4):
        raise ValueError(f"the order of channels is 0 (RGBA), 1 (ARGB), 2 (BGRA) or 3 (ABGR), not {order!r}")
    configure(input_format=int(order))


def set_quantized_bitwidth(bits: int) -> None:
    """Sets the width at which products of float tensors run on a card of the 200 series: 31 (the default), 16 or 8.

    Raises:
        ValueError: if it is none of them.
    """
    if bits not in (8, 16, 31):
        raise ValueError(f"products run at 8, 16 or 31 bits, not {bits!r}")
    configure(product_bits=int(bits))


def save_as_cambricon(name: str) -> None:
    """Asks that the next ``torch.jit.trace`` leaves an offline model ``<name>.cambricon``; an empty name takes it back.

    The file is for the shapes of the example inputs, and names the core number and the core version that are set then;
    ``cnmix.inference.OfflineModel`` and ``cnmix infer`` run it.
    """
    configure(offline_model=str(name).removesuffix(".cambricon"))

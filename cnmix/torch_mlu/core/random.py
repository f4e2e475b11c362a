"""Random numbers of the cards, which draw from the host's default generator.

A script that seeds with ``torch.manual_seed`` draws the same numbers on the card as on the host.
"""

from __future__ import annotations

import torch

from .device.cards import DeviceLike, card_index


def manual_seed(seed: int) -> None:
    """Seeds the current card's generator, which is the host's default one."""
    torch.default_generator.manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seeds the generators of all cards, which are the host's default one."""
    torch.default_generator.manual_seed(int(seed))


def seed() -> int:
    """Seeds the generator with a number from the system, and returns it."""
    return int(torch.default_generator.seed())


seed_all = seed


def initial_seed() -> int:
    """Returns the seed that the generator has."""
    return int(torch.default_generator.initial_seed())


def get_rng_state(device: DeviceLike = "mlu") -> torch.Tensor:
    """Returns the state of a card's generator, uint8 on the host."""
    card_index(device)
    return torch.default_generator.get_state()


def get_rng_state_all() -> list[torch.Tensor]:
    """Returns the state of the one generator that all cards draw from, in a list."""
    return [torch.default_generator.get_state()]


def set_rng_state(new_state: torch.Tensor, device: DeviceLike = "mlu") -> None:
    """Sets the state of a card's generator."""
    card_index(device)
    torch.default_generator.set_state(new_state.cpu())


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    """Sets the state of the one generator that all cards draw from."""
    for state in new_states:
        set_rng_state(state)

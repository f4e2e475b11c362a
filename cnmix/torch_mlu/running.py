"""Runs a script with the emulated ``torch_mlu`` in place."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .cards import find_card


def environment(cards: int | None = None, card_name: str | None = None, strict: bool = False) -> dict[str, str]:
    """Returns the environment in which Python, and every Python below it, has the emulation when it imports torch.

    Args:
        cards: how many there are. None is as ``MLU_VISIBLE_DEVICES`` says, or one.
        card_name: which they are. None is as ``DEFAULT_MLU_DEVICE_NAME`` says, or MLU370.
        strict: whether operators refuse what a card would refuse.

    Raises:
        ValueError: if there is no card of that name, or the number of cards cannot be had.
    """
    env = dict(os.environ)
    startup = str(Path(__file__).parent / "startup")
    paths = [startup, *(each for each in env.get("PYTHONPATH", "").split(os.pathsep) if each and each != startup)]
    env |= {"CNMIX_TORCH_MLU": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if cards is not None:
        if not 0 <= cards <= 64:
            raise ValueError(f"there can be 0 to 64 emulated cards, not {cards}")
        env["MLU_VISIBLE_DEVICES"] = ",".join(map(str, range(cards)))
    if card_name is not None:
        env["DEFAULT_MLU_DEVICE_NAME"] = find_card(card_name).name
    if strict:
        env["CNMIX_STRICT_DEVICE"] = "1"
    return env


def run(arguments: Sequence[str], env: dict[str, str]) -> int:
    """Runs ``python <arguments>`` in this environment, in this process's place where the system can do that.

    Returns:
        The exit status, where the process could not be replaced.
    """
    command = [sys.executable, *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(sys.executable, command, env)
    import subprocess

    return subprocess.run(command, env=env).returncode

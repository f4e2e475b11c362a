"""Runs a script with the emulated ``torch_mlu`` in place."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .cards import check_count, find_card


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
    given = env.get("PYTHONPATH")
    paths = given.split(os.pathsep) if given else []  # an empty entry among others is the current folder
    env |= {
        "CNMIX_TORCH_MLU": sys.prefix,
        "PYTHONPATH": os.pathsep.join([startup, *(each for each in paths if each != startup)]),
    }
    if cards is not None:
        check_count(cards)
        env["MLU_VISIBLE_DEVICES"] = ",".join(map(str, range(cards)))
    name = card_name or env.get("DEFAULT_MLU_DEVICE_NAME")
    if name:
        env["DEFAULT_MLU_DEVICE_NAME"] = find_card(name).name
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

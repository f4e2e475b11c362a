"""Logs of the emulated card, on Python's logging, with the levels of the vendor's environment variables."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import Any

import torch

from .observation import OperatorCall, OperatorObserver

_CARD_LOG = "torch_mlu"
_MAGICMIND_LOG = "torch_mlu.magicmind"

_LEVELS = (logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
_CARD_LEVELS = {"-1": logging.DEBUG, **{str(i): level for i, level in enumerate(_LEVELS)}}
_MAGICMIND_LEVELS = {str(i): level for i, level in enumerate(_LEVELS)}


def set_up_logs() -> None:
    """Sets the loggers ``torch_mlu`` and ``torch_mlu.magicmind`` to the levels that the environment names.

    ``TORCH_MIN_CNLOG_LEVEL`` is DEBUG (-1), INFO (0), WARNING (1, the default), ERROR (2) or FATAL (3);
    ``MM_CPP_MIN_LOG_LEVEL`` is the same without DEBUG. A value that is neither warns, and the default holds. At DEBUG
    every operator that runs on the card on this thread is logged with its arguments.

    Messages go to the standard error stream, unless the logger has a handler of its own, or the root logger one that
    prints them. Calling it again changes only what the environment says differently.
    """
    card = logging.getLogger(_CARD_LOG)
    if not card.handlers:
        card.addHandler(_Screen())
    read_levels()
    _watch(os.environ.get("TORCH_MIN_CNLOG_LEVEL", "").strip() == "-1")


def read_levels() -> None:
    """Sets both loggers to the levels that the environment names now; one that it does not name stays."""
    _set_level(logging.getLogger(_CARD_LOG), "TORCH_MIN_CNLOG_LEVEL", _CARD_LEVELS)
    _set_level(logging.getLogger(_MAGICMIND_LOG), "MM_CPP_MIN_LOG_LEVEL", _MAGICMIND_LEVELS)


def _set_level(logger: logging.Logger, variable: str, levels: dict[str, int]) -> None:
    value = os.environ.get(variable, "").strip()
    if value in levels:
        logger.setLevel(levels[value])
        return
    if logger.level == logging.NOTSET or value:
        logger.setLevel(logging.WARNING)
    if value:
        logger.warning("%s=%s is no level: take one of %s. WARNING (1) holds", variable, value, ", ".join(levels))


class _Screen(logging.StreamHandler[Any]):
    """Prints to what the standard error stream is at that time, where nothing else prints there."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("[%(levelname)s][%(asctime)s][%(name)s][%(process)d] %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if not any(_prints(each) for each in logging.getLogger().handlers):
            self.stream = sys.stderr
            super().emit(record)


def _prints(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.stdout)


class _OperatorLog(OperatorObserver):
    """Logs each operator, with what it is given, at DEBUG."""

    def begins(self, call: OperatorCall) -> None:
        logger = logging.getLogger(_CARD_LOG)
        if logger.isEnabledFor(logging.DEBUG):
            arguments = ", ".join(f"{name}={_text(value)}" for name, value in call.arguments.items())
            logger.debug("%s%s(%s)", "  " * call.depth, call.name, arguments)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


class _Watching:
    log: _OperatorLog | None = None


_watching = _Watching()


def _watch(wanted: bool) -> None:
    if wanted and _watching.log is None:
        _watching.log = _OperatorLog()
        _watching.log.__enter__()
        atexit.register(_watch, False)
    elif not wanted and _watching.log is not None:
        _watching.log.__exit__(None, None, None)
        _watching.log = None
        atexit.unregister(_watch)

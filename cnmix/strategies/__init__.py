"""Optimize levels: one level, one class."""

from .base import Strategy
from .levels import LEVELS, O0, O1, O2, O3, find_level, levels, register_level

__all__ = ["LEVELS", "O0", "O1", "O2", "O3", "Strategy", "find_level", "levels", "register_level"]

"""Optimize levels: one level, one class."""

from .base import Strategy
from .levels import LEVELS, O0, O1, find_level

__all__ = ["LEVELS", "O0", "O1", "Strategy", "find_level"]
